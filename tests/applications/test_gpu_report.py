"""bench/gpu_report.py and what it times with: every stage on tiny shapes on the CPU, and what becomes of contenders that fail, are
wrong or take too long.

What is trusted: ``benchmark.timing`` (test_timing.py); figures that nobody measured, whose ratios are known.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _calls import ROOT

from fused_resnet.benchmark import gpu_contest, gpu_modules, gpu_peers, gpu_timing
from fused_resnet.cases import BlockCase, ConvCase

sys.path.insert(0, str(ROOT / "bench"))
import _gpu_stages
import _gpu_table
import gpu_report

CPU = torch.device("cpu")
PATIENT = 3600  # seconds: what ends earlier is a fault, and no slow or busy machine
QUICK = gpu_contest.Effort(2, 0.02, PATIENT, 1e-6)
CASE = ConvCase(16, 16, (8, 8), (3, 3), padding=(1, 1), shortcut=True, batch=2)
pytestmark = pytest.mark.usefixtures("one_thread")


def store(folder: Path, stage: str, budget: float = PATIENT) -> _gpu_stages.Store:
    return _gpu_stages.Store(folder, stage, CPU, budget, smoke=True)


def scope(only: str = "", **changes: Any) -> _gpu_stages.Scope:
    given: dict[str, Any] = {"smoke": True, "without": frozenset({"compile"}), "only": _gpu_stages.Only.of(only), **changes}
    return _gpu_stages.Scope(CPU, _gpu_stages.effort_of(True, PATIENT), **given)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of every measuring stage, without torch.compile."""
    folder = tmp_path_factory.mktemp("report")
    for stage, jobs in _gpu_stages.MEASURING.items():
        assert store(folder, stage).run(jobs(scope(folder=folder))), stage
    return folder


def test_stages_measure_and_compare(measured: Path) -> None:
    assert set(_gpu_stages.MEASURING) == set(gpu_report.MEASURING)
    for stage in set(_gpu_stages.MEASURING) - {"ceilings", "tiles"}:
        results = json.loads((measured / f"{stage}.json").read_text())["results"]
        assert results, stage
        for key, result in results.items():
            assert result["ok"] is True, key
            assert result["wrong"] == []
            assert result["failed"] == {}
            for kind in {"times", "graphs"} & set(result):
                medians = {name: t["median_ms"] for name, t in result[kind].items()}
                ours = min(t for name, t in medians.items() if name in gpu_peers.OURS)
                best = result[f"best_peer_{kind}"]
                assert medians[best] == min(t for name, t in medians.items() if gpu_peers.is_peer(name))
                assert result[f"ratio_{kind}"] == pytest.approx(medians[best] / ours)
            for name, error in result["errors"].items():
                assert 0 <= error <= result["allowed_error"], name
            if "cudnn" in (*gpu_peers.CONVOLUTION, *gpu_peers.MODULE) and stage != "training":
                assert result["left_out"]["cudnn"] == "cuDNN is for CUDA devices"
    tiles = json.loads((measured / "tiles.json").read_text())["results"]
    assert all(set(result["graphs"]) == {"auto"} for result in tiles.values())


def test_report(measured: Path) -> None:
    file, page, lines = _gpu_table.write(measured)
    merged = json.loads(file.read_text())
    assert set(merged["stages"]) == set(_gpu_stages.MEASURING)
    assert merged["machine"]["torch"] == torch.__version__
    assert merged["demands"] == lines
    assert any(line["what"] == "every CUDA test green" and line["verdict"] == "not measured" for line in lines)
    text = page.read_text()
    titles = "What must hold", "Every kernel by itself", "Layers", "Blocks, networks, training", "The choice among our kernels", "Left out"
    for title in titles:
        assert f"\n## {title}" in text
    assert CASE.name in text
    assert str(measured) not in text
    assert text.startswith("# A smoke run, in which nothing is measured: ")


def figures() -> dict[str, Any]:
    """Of a device that copies 4 TB/s and multiplies 800 TFLOP/s, on which ours takes 1 ms and peers 1.2 and 1.5 ms each time; the
    memory-bound layer at batch 256 is at 0.9 of the copy, its cousin at batch 32 at half of that."""
    times = {name: {"median_ms": t} for name, t in (("channels_last", 1.5), ("cudnn", 1.2), ("compile", 1.4), ("ours", 1.0))}
    common = {"dtype": "bfloat16", "ok": True, "wrong": [], "failed": {}, "errors": {}, "times": times, "graphs": times}
    common |= {"ratio_times": 1.2, "ratio_graphs": 1.2}
    layer = ConvCase(64, 256, (56, 56), (1, 1), shortcut=True)
    operators = {}
    for batch, megabytes in ((256, 3600.0), (32, 1800.0), (1, 1.0)):
        size = {"gflop": 400.0, "megabytes": megabytes, "kernel": [1, 1], "shortcut": True, "height": 56}
        operators[f"N={batch}"] = {"case": layer.at(batch).name, "batch": batch, **common, **size}
    slow = {"batch": 32, "times": {**times, "ours": {"median_ms": 2.0}}}
    whole = {"batch": 256, "images_a_second_times": {"ours": 50000.0, "ours, bias only": 40000.0}, **common}
    return {
        "ceilings": {"copy": {"bytes_a_second": 4e12}, "product bfloat16": {"flops": 8e14}},
        "operators": operators,
        "networks": {"blocks": {"case": "resnet50, residual blocks", **whole}, "whole": {"case": "resnet50", **common, **slow}},
        "graphs": {"block": {"case": "a block", "network": "resnet50", "batch": 1, **common}},
        "training": {"bias only": {"case": "resnet50, bias only", "batch": 256, "autocast": False, **common}},
        "tests": {"cuda": {"ok": True}, "large": {"ok": False}},
    }


def test_kernels_in_the_report(tmp_path: Path) -> None:
    assert _gpu_table.kernels(tmp_path) == "Not tried."
    lines = [
        {"tile": "b", "verdict": "wrong", "passed": ["one"], "wrong": {"feature": "bias", "case": "1x1"}},
        {"tile": "a", "verdict": "right", "passed": ["one", "two"], "wrong in a row": {}},
        {"tile": "c", "verdict": "wrong", "passed": [], "ended": "hung, at: one tile"},
        {"tile": "d", "verdict": "right", "passed": ["one"], "wrong in a row": {"elements": 3}},
        {"tile": "e", "verdict": "unknown", "ended": "time was up before it was tried", "wrong in a row": None},
    ]
    (tmp_path / "smoke.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = _gpu_table.kernels(tmp_path).splitlines()[2:]
    assert rows[0] == "| a | 2 | right | - | right |"
    assert rows[1] == "| b | 1 | wrong: {'feature': 'bias', 'case': '1x1'} | - | not tried |"
    assert rows[2] == "| c | 0 | wrong | hung, at: one tile | not tried |"
    assert rows[3] == "| d | 1 | right | - | {'elements': 3} |"
    assert rows[4] == "| e | 0 | unknown | time was up before it was tried | not tried |"


def test_a_kernel_that_smoke_found_wrong_takes_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"sm90 bfloat16 {tile}" for tile in ("matrix 64x64", "image 64x64", "image 128x64", "joined 64x64", "plain 128x128")]
    monkeypatch.setattr(_gpu_stages.cuda, "tiles", lambda: names)
    gpu = _gpu_stages.Scope(torch.device("cuda"), QUICK, smoke=True, folder=tmp_path)
    assert gpu.right_tiles() == names
    monkeypatch.setattr(_gpu_stages._gpu_smoke, "mark_of", lambda module: "this")
    verdicts = ["unknown", "right", "wrong", "right", "wrong"]
    lines = [{"tile": name, "verdict": verdict, "module": "this"} for name, verdict in zip(names, verdicts, strict=True)]
    lines.append({"tile": names[0], "verdict": "wrong", "module": "another"})
    (tmp_path / "smoke.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert gpu.right_tiles() == [names[0], names[1], names[3]]
    chosen = [job.args[3] for _, job in _gpu_stages.tiles(gpu) if job.args[1] is torch.bfloat16]
    assert chosen
    assert all(found == ["auto", *names[:2], "general"] for found in chosen)


def test_tests_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pytest's plugins for it are installed; large tests never share the device's memory."""
    for there, part, wanted in (
        ((), "cuda", []),
        (("xdist", "pytest_timeout"), "cuda", ["-n", "12", "--timeout", "60", "--timeout-method", "thread"]),
        (("xdist", "pytest_timeout"), "cuda, large", ["--timeout", "120", "--timeout-method", "thread"]),
        (("xdist",), "the quick part", ["-n", "12"]),
    ):
        monkeypatch.setattr(os, "cpu_count", lambda: 16)
        monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name, there=there: name if name in there else None)
        assert gpu_report.at_once(part) == wanted


@pytest.mark.smoke
def test_demands_by_known_figures(tmp_path: Path) -> None:
    for stage, results in figures().items():
        (tmp_path / f"{stage}.json").write_text(json.dumps({"stage": stage, "results": results}))
    _, page, lines = _gpu_table.write(tmp_path)
    found = {line["what"]: (line["measured"], line["verdict"]) for line in lines}
    assert "smoke" not in page.read_text()
    table = "operators, bf16, ResNet-50's table, batch 32 and 256, best peer over ours, geometric mean, in CUDA graphs"
    bound = "memory-bound layers (1x1 + add, stages 1 and 2), bf16, batch {}: lowest share of the copy's rate"
    assert found[table] == ("1.20", "holds")
    assert found["the lowest of all layers, best peer over ours"] == ("1.20", "holds")
    assert found[bound.format(256)] == ("90%", "holds")
    assert found[bound.format(32)] == ("45%", "does not hold")
    assert found["resnet50, bf16, batch 32: its time in a graph over that from Python"] == ("0.50", "does not hold")
    assert found["residual blocks of ResNet-50, bf16, batch 256, images a second"] == ("50000", "holds")
    assert found["blocks of resnet50 at batch 1 in CUDA graphs, compile over ours, geometric mean"] == ("1.40", "holds")
    assert found["blocks of resnet18 at batch 1 in CUDA graphs, compile over ours, geometric mean"] == ("-", "not measured")
    assert found["forward + backward of resnet50, bias only, bf16, batch 256, compile over ours"] == ("1.40", "holds")
    assert found["every CUDA test green"] == ("50%", "does not hold")
    assert found["compute-sanitizer clean"] == ("-", "not measured")
    # 400 GFLOP in 1 ms are half of 800 TFLOP/s.
    assert re.search(r"\| 1x1 64->256 @ 56x56 N=256 \+ shortcut \| bfloat16 \|.* 90% \| 50% \|", page.read_text())


def test_only_some_tables() -> None:
    """Words of each kind choose among that kind, and a kind that is not named is whole."""
    gpu = _gpu_stages.Scope(torch.device("cuda"), QUICK)
    assert (gpu.dtypes, gpu.tables, gpu.batches) == ((torch.bfloat16, torch.float16), ("resnet50", "resnet18"), (256, 32, 1))
    few = replace(gpu, only=_gpu_stages.Only.of("bfloat16 resnet50 256,32"))
    assert (few.dtypes, few.tables, few.networks, few.batches) == ((torch.bfloat16,), ("resnet50",), ("resnet50",), (256, 32))
    assert {(dtype, batch) for dtype, batch, _ in few.layers()} == {(torch.bfloat16, 256), (torch.bfloat16, 32)}
    assert [key for key, _ in _gpu_stages.training_jobs(replace(gpu, only=_gpu_stages.Only.of("resnet18 256")))] == [
        f"bfloat16{how} N=256 resnet18, {kind}" for how in ("", " autocast") for kind in ("bias only", "frozen norm")
    ]
    assert not list(_gpu_stages.compiled_operators(replace(gpu, only=_gpu_stages.Only.of("float16"))))
    assert len(list(_gpu_stages.compiled_operators(gpu))) == 2 * len(_gpu_stages.convolutions("resnet50", False))
    with pytest.raises(ValueError, match="'resnet51': dtypes, networks and batches are 1, 2, 256"):
        _gpu_stages.Only.of("resnet51")


def test_the_fastest_tile_takes_part(tmp_path: Path) -> None:
    """Beside the chosen kernel, and in no ratio: neither a peer nor ours."""
    (key, _), *_ = _gpu_stages.operators(scope())
    graphs = {name: {"median_ms": time} for name, time in (("auto", 1.0), ("slow", 3.0), ("quick", 2.0))}
    assert _gpu_stages.fastest_tile({"graphs": graphs}) == ["tile quick"]
    assert _gpu_stages.fastest_tile({"graphs": {"auto": graphs["auto"]}}) == _gpu_stages.fastest_tile({}) == []
    (tmp_path / "tiles.json").write_text(json.dumps({"stage": "tiles", "results": {key: {"graphs": graphs}}}))
    chosen = [job.args[3] for _, job in _gpu_stages.operators(scope(folder=tmp_path))]
    assert chosen[0][-1] == "tile quick"
    assert not any(name.startswith("tile ") for names in chosen[1:] for name in names)
    found = gpu_contest.convolution(CASE, torch.bfloat16, CPU, ("channels_last", "tile auto", "ours"), QUICK)
    assert set(found["times"]) == {"channels_last", "tile auto", "ours"}
    assert found["best_peer_times"] == "channels_last"
    assert found["ok"] is True


def test_wrong_failing_and_slow_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong one is marked and not timed, one that raises is written down with its message, one that takes too long as well."""
    right = gpu_peers.convolution

    def fake(name: str, *rest: Any) -> Any:
        if name == "channels_last":
            call = right(name, *rest)
            return lambda i: call(i) * 1.05  # beyond the rounding of bfloat16 (1/256)
        if name == "cudnn":
            raise RuntimeError("no algorithm\nwas found")
        if name == "compile":
            return lambda i: time.sleep(PATIENT)
        return right(name, *rest)

    monkeypatch.setattr(gpu_peers, "convolution", fake)
    effort = gpu_contest.Effort(2, 0.02, 1, 1e-6)
    found = gpu_contest.convolution(CASE, torch.bfloat16, CPU, gpu_peers.CONVOLUTION, effort)
    assert found["wrong"] == ["channels_last"]
    assert found["failed"] == {"cudnn": "RuntimeError: no algorithm was found", "compile": "TimeoutError: compiling took more than 1 s"}
    assert set(found["times"]) == set(found["graphs"]) == {"eager", "ours"}
    assert found["ok"] is True
    # Short of time, the case is left for another run, with a sentence for none of its contenders.
    late = gpu_contest.Effort(2, 0.02, 60, 1e-6, time.monotonic() + 1)
    with pytest.raises(gpu_contest.OutOfTime):
        gpu_contest.convolution(CASE, torch.bfloat16, CPU, gpu_peers.CONVOLUTION, late)


@pytest.mark.parametrize("fault", [lambda y: y * 1.05, lambda y: y * float("nan"), lambda y: y[:1]], ids=["scaled", "nan", "shape"])
def test_a_wrong_result_of_ours_is_not_ok(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    function = gpu_peers.our_function
    monkeypatch.setattr(gpu_peers, "our_function", lambda case: lambda *tensors: fault(function(case)(*tensors)))
    found = gpu_contest.convolution(CASE, torch.bfloat16, CPU, ("channels_last", "ours"), QUICK)
    assert found["ok"] is False
    assert found["wrong"] == ["ours"]
    assert found["ratio_times"] is None


def test_training_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    make = gpu_modules.training_model

    def faulty(kind: str, network: str) -> Any:
        eager, ours = make(kind, network)
        ours.fc.register_forward_hook(lambda module, arguments, y: 0.1 * y.detach() + 0.9 * y)  # the values stay, gradients shrink
        return eager, ours

    arguments = ("bias only", "cifar20", 2, torch.float32, False, CPU, ("channels_last", "ours"), QUICK)
    assert gpu_modules.training(*arguments)["ok"] is True
    monkeypatch.setattr(gpu_modules, "training_model", faulty)
    assert gpu_modules.training(*arguments)["wrong"] == ["ours"]


def test_compile_takes_part() -> None:
    """The contender is built and right; the CPU's compiler is enough for that."""
    block = BlockCase("basic", 16, 16, (8, 8))
    found = gpu_modules.block(block, 1, torch.float32, CPU, ("compile", "ours"), QUICK, graphs=False)
    assert found["failed"] == {}
    assert set(found["times"]) == {"compile", "ours"}
    assert found["compile_seconds"]["compile"] > 0


def test_a_stage_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def job(name: str) -> Any:
        def work() -> dict[str, Any]:
            made.append(name)
            if name == "b":
                raise RuntimeError("boom")
            return {"ok": True, "n": name}

        return name, work

    first = store(tmp_path, "operators", budget=-1)
    assert not first.run([job("a")])
    assert (made, first.content["left"]) == ([], ["a"])
    second = store(tmp_path, "operators")
    assert not second.run(map(job, "ab"))  # b failed
    third = store(tmp_path, "operators")
    third.run(map(job, "abc"))
    assert made == ["a", "b", "c"]
    assert third.results == {"a": {"ok": True, "n": "a"}, "b": {"error": "RuntimeError: boom"}, "c": {"ok": True, "n": "c"}}

    def late() -> dict[str, Any]:
        raise gpu_contest.OutOfTime

    assert not third.run([("late", late)])
    assert "late" not in third.results
    assert third.content["left"] == ["late"]
    # A process that died leaves a note, and the case is not tried again.
    third.content["running"] = "d"
    third.save()
    module = tmp_path / "module.so"
    module.write_bytes(b"kernels")
    monkeypatch.setattr(_gpu_stages._extension, "cpu", SimpleNamespace(__file__=str(module)))
    built = _gpu_stages.fingerprint(CPU)
    os.utime(module, (1, 1))
    assert _gpu_stages.fingerprint(CPU) == built  # the same module elsewhere, or fetched again
    module.write_bytes(b"others")
    assert _gpu_stages.fingerprint(CPU) != built
    monkeypatch.undo()
    assert store(tmp_path, "operators").results["d"] == {"error": "the process ended during this case"}
    assert _gpu_stages.Store(tmp_path, "operators", CPU, PATIENT, afresh=True).results == {}
    assert "1 cases left" in capsys.readouterr().out


def test_a_case_that_hangs_or_dies_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The watchdog ends a process that waits in C and hears no signal; its stage goes on without that case, and is told once."""
    code = f"""if True:
        import os, pathlib, sys, threading
        sys.path[:0] = {[str(ROOT), str(ROOT / "bench")]!r}
        import torch, _gpu_stages
        lock = threading.Lock()
        lock.acquire()
        good = dict(ok=True)
        jobs = [("a", lambda: good), ("b", lambda: lock.acquire()), ("c", lambda: os._exit(7)), ("d", lambda: good)]
        store = _gpu_stages.Store(pathlib.Path({str(tmp_path)!r}), "operators", torch.device("cpu"), 3600, AFRESH, True, 10)
        sys.exit(0 if store.run(jobs) else 1)"""
    asked = []

    def command(options: Any, stage: str, seconds: float, afresh: bool) -> list[str]:
        asked.append(afresh)
        return [sys.executable, "-W", "ignore", "-c", code.replace("AFRESH", str(afresh))]

    monkeypatch.setattr(gpu_report, "_stage", command)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "operators", "--afresh", "--out", str(tmp_path)])
    assert gpu_report.main() == 7
    gone = {"error": "the process ended during this case"}
    content = json.loads((tmp_path / "operators.json").read_text())
    assert content["results"] == {"a": {"ok": True}, "b": gone, "c": gone, "d": {"ok": True}}
    assert asked == [True, False, False]
    told = [line.partition(", ")[2] for line in capsys.readouterr().out.splitlines()]
    assert told == ["lost in b: it goes on without that", "lost in c: it goes on without that", ""]
    # What a process that never came to its cases left behind says nothing of the next one, which is tried once more and then not again.
    content["running"] = "x"
    (tmp_path / "operators.json").write_text(json.dumps(content))
    asked.clear()
    code = "import sys; sys.exit(5)"
    assert gpu_report.main() == 5
    assert asked == [True, False]


def test_a_stage_that_lost_the_device_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every later call of a process fails: the next process has the rest."""
    runs = []

    def work(key: str) -> dict[str, Any]:
        if key == "b":
            raise RuntimeError("an illegal memory access was encountered")
        return {"ok": True}

    def run(command: list[str], **rest: Any) -> Any:
        runs.append(command)
        monkeypatch.setattr(_gpu_stages, "broken", lambda device: "the device is lost" if len(runs) == 1 else "")
        good = _gpu_stages.Store(tmp_path, "operators", CPU, PATIENT, "--afresh" in command).run([(key, partial(work, key)) for key in "abcd"])
        return SimpleNamespace(returncode=0 if good else 1)

    monkeypatch.setattr(gpu_report.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "operators", "--afresh", "--out", str(tmp_path)])
    assert gpu_report.main() == 1
    assert ["--afresh" in command for command in runs] == [True, False]
    content = json.loads((tmp_path / "operators.json").read_text())
    assert list(content["results"]) == ["a", "b", "c", "d"]
    assert content["left"] == []
    assert content["results"]["b"]["error"].endswith("illegal memory access was encountered")


def test_a_stage_that_is_stopped_leaves_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow case that began late: nothing is said against it."""
    held = store(tmp_path, "operators")
    held.run([("a", lambda: {"ok": True})])
    held.content["running"] = "b"
    held.save()
    calls = []

    def run(command: list[str], **rest: Any) -> Any:
        calls.append(command)
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(gpu_report.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "operators", "--out", str(tmp_path)])
    assert gpu_report.main() == 1
    assert len(calls) == 1
    assert store(tmp_path, "operators").results == {"a": {"ok": True}}


def test_turns_rotate_buffers_and_results(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = gpu_timing.Turns(lambda i: [i], 3)
    for _ in range(4):
        turns()
    assert [kept[0] for kept in turns.kept] == [0, 1, 2]
    first = turns.kept[1]
    turns()
    assert turns.kept[1] is not first
    graph = gpu_timing.Graph(lambda i: i, 3, CPU)
    graph()
    assert graph.kept == [0, 1, 2]
    assert graph.calls == 3
    # The time of a call, not of a replay: of a clock that the calls alone move.
    now = [0.0]

    def slow(i: int) -> None:
        now[0] += 0.25

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert gpu_timing.seconds_a_call(gpu_timing.Graph(slow, 5, CPU), 2, CPU) == 0.25


def test_the_script(tmp_path: Path) -> None:
    """As it is called: one stage and the report, in processes of their own; a device that is not there."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / "gpu_report.py"), *words, "--out", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    tar = tmp_path / "results.tar.gz"
    patient = ("--total", str(PATIENT), "--patience", str(PATIENT), "--tar", str(tar))
    done = call("ceilings", "report", "--device", "cpu", "--smoke", *patient)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(tar) as archive:
        assert set(archive.getnames()) == {"ceilings.json", "report.json", "report.md"}
    tar.unlink()
    assert call("report", "--tar", str(tar)).returncode == 0
    assert tar.is_file()
    assert "ceilings: status 0\n" in done.stdout
    assert "not measured" in done.stdout
    assert json.loads((tmp_path / "ceilings.json").read_text())["results"]["copy"]["bytes_a_second"] > 0
    done = call("ceilings", "tests", "--device", "cpu", "--smoke", "--total", "0")
    assert (done.returncode, done.stdout) == (3, "ceilings: left, time is up\ntests: left, time is up\n")
    done = call("ceilings", "--device", "cpu", "--only", "nothing")
    assert done.returncode == 2
    assert "gpu_report: --only 'nothing'" in done.stderr
    if not torch.cuda.is_available():
        done = call("ceilings")
        assert done.returncode == 2
        assert done.stderr.startswith("gpu_report: torch finds no CUDA device")


def test_outside_programs(tmp_path: Path) -> None:
    """What the other stages run: a time limit, the log, the failures, what pytest counted; a wheel unpacked."""
    log = tmp_path / "log.txt"
    code = "print('FAILED x'); print('2 failed, 3 passed, 1 skipped in 1s'); raise SystemExit(1)"
    done = gpu_report.run([sys.executable, "-c", code], 60, log)
    assert (done["ok"], done["status"], done["failures"]) == (False, 1, ["FAILED x"])
    assert gpu_report.counts(log) == {"failed": 2, "passed": 3, "skipped": 1}
    slow = gpu_report.run([sys.executable, "-c", "import time; time.sleep(60)"], 1, log)
    assert (slow["ok"], slow["why"]) == (False, "not done within 1 s")
    assert not gpu_report.run([str(tmp_path / "nothing")], 1, log)["ok"]
    import zipfile

    wheel = tmp_path / "nvidia_cutlass.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("cutlass_library/source/include/cutlass/cutlass.h", "")
    folder = gpu_report.cutlass(str(wheel), tmp_path)
    assert folder is not None
    assert (folder / "cutlass_library" / "source" / "include" / "cutlass" / "cutlass.h").is_file()
    assert gpu_report.cutlass(str(folder), tmp_path) == folder
