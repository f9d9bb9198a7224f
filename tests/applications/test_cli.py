"""The command line: help, wrong usage (status 2, one sentence, before any work), files, pipes and terminals, exit status."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _calls import ROOT
from _cli import TINY

from fused_resnet import _machine, cli
from fused_resnet.cases import BLOCKS
from fused_resnet.cli import arguments, bench, check, demo

COMMANDS = tuple(cli.COMMANDS)
pytestmark = pytest.mark.usefixtures("one_thread")


def environment(**changes: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: fused-resnet {command}" in shown
    assert "--json FILE" in shown


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {command} " in shown for command in COMMANDS)


WRONG = [
    ([], "the following arguments are required: COMMAND"),
    (["teach"], "invalid choice: 'teach'"),
    (["env", "--fast"], "unrecognized arguments: --fast"),
    (["check", "--json", "no/such/folder/x.json"], "--json: cannot write 'no/such/folder/x.json': there is no folder"),
    (["check", "--json", "."], "--json: cannot write '.': it is a folder"),
    (["check", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    (["check", "--seed", "-1"], "--seed: must be a whole number from 0 to 2147483647, got '-1'"),
    (["bench", "--seed", "-1"], "--seed: must be a whole number from 0 to 2147483647, got '-1'"),
    (["demo", "--seed", "99999999999"], "--seed: must be a whole number from 0 to 2147483647, got '99999999999'"),
    (["bench", "--threads", "0"], "--threads: must be a whole number of at least 1, got '0'"),
    (["bench", "--batch", "two"], "--batch: must be a whole number of at least 1, got 'two'"),
    (["bench", "--seconds", "nan"], "--seconds: must be a number of seconds above 0, got 'nan'"),
    (["bench", "--case", "basic 63"], f"contains 'basic 63'; there are: {BLOCKS[0].name}; "),
    (["bench", "--what", "network", "--case", "vgg"], "there are: resnet18; resnet50; cifar20"),
    (["bench", "--peers", "eager,tvm"], "--peers: unknown peer 'tvm'; there are eager, channels_last, compile, onnxruntime, "),
    (["bench", "--peers", "eager,ncnn", "--dtype", "bfloat16"], "--peers: ncnn cannot run here: it is not timed in bfloat16"),
    (["bench", "--peers", "eager,mnn", "--mode", "train"], "--peers: mnn cannot run here: it has no backward pass here"),
    (["bench", "--peers", "eager,ncnn", "--mode", "frozen"], "--peers: ncnn cannot run here: it has no backward pass here"),
    (["bench", "--peers", ","], "--peers must name at least one of"),
    (["bench", "--picture", "times.txt"], "--picture: the name of a picture must end in .pdf, .png, .svg, got 'times.txt'"),
    (["check", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
    (["check", "--dtype", "float16"], "--dtype: float16 is for --device cuda"),
    (["bench", "--dtype", "float16"], "--dtype: float16 is for --device cuda"),
    (["demo", "--out", "no/such/folder/x.png"], "--out: cannot write 'no/such/folder/x.png': there is no folder"),
    (["demo", "--threads", "0"], "--threads: must be a whole number of at least 1, got '0'"),
    (["demo", "--image-size", "8"], "--image-size must be at least 32, got 8"),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("argv", "message"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence on stderr, nothing on stdout, status 2, and no work done."""

    def work(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(check, "plan", work)
    monkeypatch.setattr(bench, "_measure", work)
    monkeypatch.setattr(demo, "_train", work)
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("fused-resnet: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


@pytest.mark.parametrize("command", ["check", "demo", "bench"])
def test_a_device_that_is_not_there(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([command, "--device", "cuda"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("fused-resnet: --device cuda: torch ")
    assert shown.err.count("\n") == 1


def test_missing_package_names_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command, extra in ((["demo"], "demo"), (["bench", "--case", TINY, "--picture", "x.png"], "bench")):
        assert cli.main(command) == 2
        assert f'needs matplotlib, which is not installed: pip install "fused-resnet[{extra}]"' in capsys.readouterr().err


def test_env(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "env.json"
    assert cli.main(["env", "--json", str(file)]) == 0
    shown, found = capsys.readouterr().out, json.loads(file.read_text())
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"] in shown
    if found["extension"]["loaded"]:
        assert found["extension"]["isa"] in found["extension"]["available_isas"]
        assert found["extension"]["file"] in shown
    else:
        assert found["extension"]["why"] in shown


@pytest.mark.parametrize(
    ("words", "gradient", "expected"),
    [
        (("8x64x56x56", "64x3x3"), False, {"path": "hot: one kernel", "weights": ""}),
        (("8x64x56x56", "64x3x3"), True, {"path": "hot: one kernel", "gradient": "input"}),
        (("1x512x7x7", "512x3x3"), True, {"reason": "49 pixels for 2359296 weights: packing these takes longer than is saved"}),
        (("1x3x224x224", "64x7x7/2"), False, {"reason": "3 input channels under a 7x7 kernel: for a network's stem the library's"}),
        (("1x64x56x56", "64x3x3/3"), True, {"reason": "stride 3: "}),
    ],
)
def test_env_explains(
    kernels: object, words: tuple[str, str], gradient: bool, expected: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "env.json"
    argv = ["env", "--explain", *words, "--json", str(file), *(["--gradient", "input"] if gradient else [])]
    assert cli.main(argv) == 0
    found = json.loads(file.read_text())
    for key, value in expected.items():
        assert found[key].startswith(value)
    shown = capsys.readouterr().out
    assert all(value in shown for value in found.values())


def test_env_variables_and_one_openmp_runtime() -> None:
    """In a process of its own: this one has imported packages that bring runtimes."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fused_resnet", "env"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(FUSED_RESNET_BACKEND="reference"),
    )
    assert "FUSED_RESNET_BACKEND=reference" in done.stdout
    assert "FUSED_RESNET_BACKEND=reference turns the kernels off" in done.stdout
    assert "OpenMP runtimes are loaded where one is expected" not in done.stdout


def test_two_runtimes_are_found_and_said() -> None:
    maps = "\n".join(
        [
            "7f00-7f01 r-xp 00000000 fd:00 12 /venv/torch/lib/libgomp.so.1",
            "7f02-7f03 r--p 00001000 fd:00 12 /venv/torch/lib/libgomp.so.1",
            "7f04-7f05 r-xp 00000000 fd:00 13 /opt/intel/lib/libiomp5.so",
            "7f06-7f07 r-xp 00000000 fd:00 14 /venv/lib/libompression.so",
            "7f08-7f09 rw-p 00000000 00:00 0 ",
        ]
    )
    assert _machine.find_runtimes(maps) == ["/opt/intel/lib/libiomp5.so", "/venv/torch/lib/libgomp.so.1"]
    found = {**_machine.describe(), "openmp_runtimes": _machine.find_runtimes(maps)}
    assert any(sentence.startswith("2 OpenMP runtimes are loaded") for sentence in cli.env.warnings(found))


def test_env_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with two GPUs would see, one of them too old."""
    old = "our CUDA kernels are for compute capability 8.0 and later, Old has 7.5"
    devices = [{"name": "New", "capability": "9.0", "why_not": ""}, {"name": "Old", "capability": "7.5", "why_not": old}]
    build = {"cuda": "13.0", "architectures": "80 90a"}
    cuda = {"torch_build": "13.0", "cudnn": 91000, "devices": devices, "kernels": True, "build": build, "tiles": ["a", "b"]}
    found = {**_machine.describe(), "cuda": cuda}
    rows = dict(cli.env.lines(found))
    assert rows["CUDA devices"] == "New (9.0), Old (7.5)"
    assert rows["CUDA kernels of ours"] == "built with CUDA 13.0 for 80 90a, 2 of them for tensor cores"
    assert f"on this GPU everything is computed through the library: {old}" in cli.env.warnings(found)


def test_check_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "check.json"
    assert cli.main(["check", "--quick", "--json", str(file)]) == 0
    shown, found = capsys.readouterr(), json.loads(file.read_text())
    assert shown.err == ""  # captured, so not a terminal
    assert found["ok"] is True
    assert found["failures"] == []
    groups = {group["group"]: group["cases"] for group in found["groups"]}
    for dtype in ("float64", "float32", "bfloat16"):
        assert groups[f"forward {dtype}, integers"] > 0
        assert groups[f"integer gradients {dtype}"] > 0
    for shortcut in ("none", "tensor", "input", "view", "expanded"):
        assert groups[f"finite differences, shortcut {shortcut}"] > 0
        assert f"finite differences, shortcut {shortcut}" in shown.out


def test_check_reports_a_crash_as_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*tensors: Any, **parameters: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(check.ops, "conv_bias_add_relu", crash)
    file = tmp_path / "check.json"
    assert cli.main(["check", "--quick", "--dtype", "float64", "--json", str(file)]) == 1
    assert "RuntimeError: boom" in capsys.readouterr().out
    assert json.loads(file.read_text())["ok"] is False


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with arguments.threads(before + 2) as count:
        assert count == torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before


DEMO = ("demo", "--epochs", "12", "--image-size", "64", "--repeat", "3", "--threads", "1")


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A short demo, in a pipe."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "fused_resnet", *DEMO, "--json", "demo.json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment(),
    )
    return done, folder


def test_demo(demonstrated: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = demonstrated
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "demo.json").read_text())
    assert found["ok"] is True
    assert len(found["training"]["accuracies"]) == 12
    assert found["training"]["accuracies"][-1] >= demo.GOAL
    assert found["gradients"]["ok"] is True
    assert [(c["network"], c["fused_blocks"], c["blocks"]) for c in found["conversions"]] == [
        ("ResNet-18", 8, 8),
        ("ResNet-50", 16, 16),
    ]
    for conversion in found["conversions"]:
        assert conversion["keys_kept"] is True
        assert 0 < conversion["error"] <= conversion["allowed_error"]
        distinct = [row["case"] for row in conversion["times"] if not row["whole"]]
        assert len(distinct) == len(set(distinct)) == {"ResNet-18": 7, "ResNet-50": 8}[conversion["network"]]
    assert (folder / "fused-resnet-demo.png").read_bytes().startswith(b"\x89PNG")
    assert found["machine"]["openmp_runtimes"] == found["machine"]["openmp_runtimes"][:1]
    assert "all as they should be" in done.stdout


def test_no_progress_bar_in_a_pipe(demonstrated: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = demonstrated
    assert "\r" not in done.stdout + done.stderr
    assert "%|" not in done.stdout + done.stderr


def test_demo_ends_with_1_under_the_goal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "GOAL", 1.01)
    monkeypatch.setattr(demo, "_convert", lambda arguments, where: ([], SimpleNamespace(pixels=None)))
    monkeypatch.setattr("fused_resnet.cli._pictures.draw_demo", lambda *arguments: None)
    assert cli.main(["demo", "--epochs", "1", "--threads", "1", "--out", str(tmp_path / "demo.png")]) == 1
    shown = capsys.readouterr().out
    assert "FAILED  the accuracy" in shown
    assert "NOT as they should be: the accuracy" in shown


END = b"<end>"


def read_terminal(master: int, shown: bytearray) -> None:
    """All that is written, as it comes: a terminal's buffer is small, and a bar on a slow machine writes for long."""
    while END not in shown:
        shown += os.read(master, 65536)


def test_progress_bar_on_a_terminal() -> None:
    """The same program with a terminal for its stderr: there the bar appears."""
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "fused_resnet", "check", "--quick", "--dtype", "bfloat16"],
            stdout=subprocess.PIPE,
            stderr=slave,
            env=environment(TERM="xterm", COLUMNS="100"),
        )
        shown = bytearray()
        reader = threading.Thread(target=read_terminal, args=(master, shown), daemon=True)
        reader.start()
        out, _ = process.communicate()
        os.write(slave, END)
        reader.join()
    finally:
        os.close(master)
        os.close(slave)
    assert process.returncode == 0
    assert b"check: " in shown
    assert b"%|" in shown
    assert b"\r" not in out
