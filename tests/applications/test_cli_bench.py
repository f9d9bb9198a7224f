"""``fused-resnet bench``: wrong usage, what is measured, written and shown, peers that fail or are wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _cli import TINY

from fused_resnet import _machine, cli
from fused_resnet.benchmark import contenders
from fused_resnet.cli import _gpu_bench, bench

pytestmark = pytest.mark.usefixtures("one_thread")


GPU_BENCH_WRONG = [
    (["--mode", "train"], "--mode train: on --device cuda it is for --what network"),
    (["--mode", "frozen"], "--mode frozen: it is for --device cpu"),
    (["--peers", "eager"], "--peers: unknown peer 'eager'; on --device cuda there are channels_last, folded, compile, cudnn, ours"),
    (["--peers", ","], "--peers must name at least one of channels_last"),
    (["--threads", "2"], "--threads: it is for --device cpu"),
    (["--picture", "x.png"], "--picture: on --device cuda there is none yet"),
    (["--case", "basic 63"], "contains 'basic 63'; there are"),
]


@pytest.fixture
def cpu_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in a GPU's place, for what a command does before and after it measures."""
    fake = SimpleNamespace(type="cuda")
    monkeypatch.setattr(bench, "device", lambda name: fake)
    monkeypatch.setattr(_machine, "short", lambda device=None: "a GPU")


@pytest.mark.parametrize(("options", "message"), GPU_BENCH_WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_usage_of_bench_on_a_gpu(
    options: list[str], message: str, cpu_for_cuda: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gpu_bench, "_measure", lambda *arguments: pytest.fail("work was started"))
    assert cli.main(["bench", "--device", "cuda", *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err


@pytest.mark.parametrize(
    ("what", "case"),
    [("conv", "3x3 64->64 @ 8x8 + shortcut"), ("block", TINY), ("network", "cifar20"), ("network train", "cifar20")],
)
def test_bench_on_a_gpu(
    what: str, case: str, tmp_path: Path, cpu_for_cuda: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's contests, on the CPU: what is measured, written and shown."""
    measure = _gpu_bench._measure
    cpu = torch.device("cpu")
    monkeypatch.setattr(_gpu_bench, "_measure", lambda c, n, dtype, device, *rest: measure(c, n, dtype, cpu, *rest))
    monkeypatch.setattr(_gpu_bench, "release", lambda device: None)
    file = tmp_path / "bench.json"
    words, _, train = what.partition(" ")
    argv = ["bench", "--device", "cuda", "--what", words, "--case", case, "--quick", "--batch", "2", "--json", str(file)]
    assert cli.main([*argv, *(["--mode", "train"] if train else [])]) == 0
    (result,) = json.loads(file.read_text())["results"]
    shown = capsys.readouterr().out
    assert (result["ok"], result["batch"], result["dtype"]) == (True, 2, "bfloat16")
    assert f"{result['ratio_times']:.2f}" in shown
    assert "geometric mean of the ratios, called from Python: " in shown
    assert ("graphs" in result) == (not train)
    if not train:
        assert f"left out  {result['case']}, cudnn: cuDNN is for CUDA devices" in shown


def test_missing_peer_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ncnn = dataclasses.replace(contenders.CONTENDERS["ncnn"], modules=("no_such_module",))
    monkeypatch.setitem(contenders.CONTENDERS, "ncnn", ncnn)
    assert cli.main(["bench", "--peers", "eager,ncnn"]) == 2
    needs = 'it needs packages that are not installed: pip install ncnn pnnx, or pip install "fused-resnet[bench]"'
    assert f"--peers: ncnn cannot run here: {needs}" in capsys.readouterr().err
    left_out = [sentence for sentence in contenders.remarks("float32", "forward") if "not installed" in sentence]
    assert len(left_out) == 1
    assert "ncnn" in left_out[0]


def test_what_does_not_suit_is_left_out_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "missing", lambda name: "")
    assert contenders.remarks("float32", "forward") == []
    assert "left out: onnxruntime, ncnn, mnn, mnn_exact, which are not timed in bfloat16" in contenders.remarks("bfloat16", "forward")
    assert contenders.remarks("float32", "train") == [
        "left out: onnxruntime, openvino, ncnn, mnn, mnn_exact, which have no backward pass here"
    ]


def bench_json(tmp_path: Path, *options: str, names: str = "eager,fused") -> dict[str, Any]:
    file = tmp_path / "bench.json"
    argv = ["bench", "--quick", "--threads", "1", "--peers", names]
    assert cli.main([*argv, *options, "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_bench_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "bench.png"
    names = "eager,channels_last,fused,fused_channels_last"
    found = bench_json(tmp_path, "--case", TINY, "--batch", "1", "2", "--picture", str(picture), names=names)
    shown = capsys.readouterr().out
    assert [(r["case"], r["batch"], r["threads"]) for r in found["results"]] == [(TINY, 1, 1), (TINY, 2, 1)]
    for result in found["results"]:
        assert set(result["contenders"]) == {"eager", "channels_last", "fused", "fused_channels_last"}
        for timing in result["contenders"].values():
            assert 0 < timing["q20_ms"] <= timing["median_ms"] <= timing["q80_ms"]
            assert timing["samples"] >= 3
            assert 0 <= timing["error"] <= result["allowed_error"]
        times = {name: timing["median_ms"] for name, timing in result["contenders"].items()}
        eager, ours = min(times["eager"], times["channels_last"]), min(times["fused"], times["fused_channels_last"])
        assert result["ratio"] == result["ratio_eager"] == pytest.approx(eager / ours)
        assert result["failed"] == {}
        assert f"{result['ratio']:.2f}" in shown
    product = found["results"][0]["ratio"] * found["results"][1]["ratio"]
    assert found["geometric_mean"] == pytest.approx(product**0.5)
    assert found["machine"]["torch"] == torch.__version__
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [
        ("--what", "conv", "--case", "3x3 64->64 @ 8x8"),
        ("--what", "conv", "--case", "3x3 64->64 @ 8x8 + shortcut", "--mode", "train"),
        ("--what", "conv", "--case", "input gradient of 3x3 64->64 @ 8x8", "--mode", "train"),
        ("--what", "conv", "--case", "weight gradient of 3x3 64->64 @ 8x8", "--mode", "train"),
        ("--what", "conv", "--case", "3x3 64->64 @ 8x8", "--dtype", "bfloat16"),
        ("--what", "conv", "--case", "3x3 64->64 @ 8x8", "--dtype", "float64"),
        ("--what", "block", "--case", "basic 32->64 /2 @ 16x16", "--mode", "train", "--batch", "2"),
        ("--what", "block", "--case", "basic 32->64 /2 @ 16x16", "--mode", "frozen", "--batch", "2"),
        ("--what", "block", "--case", TINY, "--dtype", "bfloat16"),
        ("--what", "network", "--model", "cifar20"),
    ],
    ids=" ".join,
)
def test_bench_kinds(options: tuple[str, ...], tmp_path: Path) -> None:
    found = bench_json(tmp_path, *options, names="fused_channels_last")
    assert len(found["results"]) == 1
    assert set(found["results"][0]["contenders"]) == {"fused_channels_last"}
    assert found["results"][0]["ok"]
    if ("train" in options or "frozen" in options) and " gradient of " not in found["results"][0]["case"]:
        assert all("gradient_error" in timing for timing in found["results"][0]["contenders"].values())


def test_bench_without_eager_has_no_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    argv = ["bench", "--quick", "--threads", "1", "--case", TINY, "--peers", "fused", "--json", str(file)]
    assert cli.main(argv) == 0
    assert json.loads(file.read_text())["results"][0]["ratio"] is None
    assert "geometric mean" not in capsys.readouterr().out


FAKES = """
import os
from fused_resnet.benchmark import torch_contenders
from fused_resnet.benchmark.worker import Built

def wrong(task, threads, folder):
    # One thousandth too much: too little to see in a picture, much more than rounding.
    right = torch_contenders.fused(task, threads, folder)
    return Built(lambda: 1.001 * right.call(), right.results, right.context)

def dies(task, threads, folder): os._exit(3)
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A function that puts a fake in a contender's place."""
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)

    def put(name: str, fake: str) -> None:
        monkeypatch.setitem(contenders.CONTENDERS, name, contenders.Contender(name, f"fakes:{fake}"))

    return put


@pytest.mark.parametrize(("what", "case"), [("conv", "3x3 64->64 @ 8x8 + shortcut"), ("block", TINY)])
def test_bench_ends_with_1_for_a_wrong_result(
    what: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], fakes: Callable[[str, str], None]
) -> None:
    fakes("fused", "wrong")
    file = tmp_path / "bench.json"
    argv = ["bench", "--quick", "--threads", "1", "--what", what, "--case", case, "--peers", "eager,fused"]
    assert cli.main([*argv, "--json", str(file)]) == 1
    result = json.loads(file.read_text())["results"][0]
    assert result["wrong"] == ["fused"]
    assert result["ratio"] is None
    assert f"WRONG  {case}, fused: error " in capsys.readouterr().out


def test_bench_ends_with_1_if_ours_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], fakes: Callable[[str, str], None]) -> None:
    fakes("fused", "dies")
    assert cli.main(["bench", "--quick", "--threads", "1", "--case", TINY, "--peers", "eager,fused"]) == 1
    assert f"FAILED  {TINY}, fused: its process ended with status 3" in capsys.readouterr().out


def test_bench_survives_peers_that_fail_or_are_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fakes: Callable[[str, str], None]
) -> None:
    """They are reported, count in no ratio, and leave the exit status alone."""
    fakes("ncnn", "dies")
    fakes("mnn", "wrong")
    found = bench_json(tmp_path, "--case", TINY, "--picture", str(tmp_path / "x.png"), names="ncnn,eager,mnn,fused")
    result, shown = found["results"][0], capsys.readouterr().out
    assert result["failed"] == {"ncnn": "its process ended with status 3"}
    assert set(result["contenders"]) == {"eager", "mnn", "fused"}
    assert result["wrong"] == ["mnn"]
    assert result["best_peer"] == "eager"
    assert f"FAILED  {TINY}, ncnn: its process ended with status 3" in shown
    assert f"WRONG  {TINY}, mnn: error " in shown
    row = next(line for line in shown.splitlines() if line.startswith(TINY))
    assert " failed " in row
    assert "! " in row


def test_bench_draws_twenty_cases_a_picture(tmp_path: Path) -> None:
    """From figures that nobody measured: 21 cases in two settings, one of them contested, one without a peer, one without ours."""
    from fused_resnet.cli import _pictures

    def timing(milliseconds: float, contested: bool = False) -> dict[str, Any]:
        return {"median_ms": milliseconds, "contested": contested}

    names = ("eager", "ncnn", "fused")
    results: list[dict[str, Any]] = []
    for i in range(21):
        for threads in (1, 2):
            there = [name for name in names if (i, name) not in ((5, "ncnn"), (6, "fused"))]
            contenders = {name: timing(1.0 + i / len(name), i == 3) for name in there}
            results.append(
                {
                    "case": f"case {i}", "batch": 1, "threads": threads, "contenders": contenders, "wrong": ["ncnn"] * (i == 4),
                    "failed": {}, "best_eager": "eager" if i != 7 else None, "best_ours": "fused" if i != 6 else None,
                }
            )  # fmt: skip
    report = {"machine": {**_machine.describe(paths=False)}, "options": {"mode": "forward", "dtype": "float32"}, "results": results}
    written = _pictures.draw_bench(report, tmp_path / "bench.png")
    assert [file.name for file in written] == ["bench.png", "bench-2.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)


PEERS = [name for name, contender in contenders.CONTENDERS.items() if not contender.torch]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(("what", "case"), [("block", "basic 32->64 /2 @ 16x16"), ("conv", "3x3 64->64 @ 8x8 + shortcut")])
def test_peers_are_right(name: str, what: str, case: str, tmp_path: Path) -> None:
    """More than one image, a shortcut that ncnn needs help with, a second input.

    A layer or an input that is not what it should be makes an error of the order of 1; how much a peer rounds is its own
    affair, and the benchmark says so.
    """
    reason = contenders.missing(name)
    if reason:
        pytest.skip(f"{name} cannot run here: {reason}")
    result = bench_json(tmp_path, "--what", what, "--case", case, "--batch", "2", names=name)["results"][0]
    assert result["failed"] == {}
    assert result["contenders"][name]["error"] < 1e-2
    assert set(result["contenders"]) == {name}
