"""bench/gpu_first.py without a GPU: every stand-in kernel through `smoke` and `profile`, what becomes of one that is wrong, hangs or dies,
and modules linked from objects that another build made.

What is trusted: the module's twin (``_cuda_twin``), whose stand-ins are right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import _cuda_twin
import pytest
import torch
from _calls import ROOT

from fused_resnet import _extension
from fused_resnet.benchmark import gpu_kernels

sys.path.insert(0, str(ROOT / "bench"))
import _gpu_smoke
import gpu_first

PATIENT = 3600  # seconds: what ends earlier is a fault, and no slow or busy machine
CPU = torch.device("cpu")


def script(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / "gpu_first.py"), *words, "--twin", str(_cuda_twin.build().__file__)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_smoke(tmp_path: Path) -> None:
    """Each kernel in a process of its own, feature by feature; a line for each."""
    patient = ("--seconds", str(PATIENT), "--total", str(PATIENT))
    done = script("smoke", "--out", str(tmp_path), "--jobs", "2", *patient)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"smoke: {len(_cuda_twin.TILES)} of {len(_cuda_twin.TILES)} kernels right\n")
    found = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    for line in found:
        assert line["passed"] == [f.name for f in gpu_kernels.features(line["tile"]) if f.name != gpu_kernels.MANY]
    assert sorted(line["tile"] for line in found) == sorted(_cuda_twin.TILES)
    # Another time only some, or another module: what is known of the others of this module stays.
    assert {line["verdict"] for line in found} == {"right"}
    (mark,) = {line["module"] for line in found}
    assert mark == _gpu_smoke.mark_of(_cuda_twin.build())
    others = [{"tile": "sm90 float32 image 64x64", "module": "of other kernels", "verdict": "wrong"}, {**found[0], "verdict": "unknown"}]
    with (tmp_path / "smoke.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in others) + '{"tile": "cut o')
    assert script("smoke", "--out", str(tmp_path), "--only", found[1]["tile"], *patient).returncode == 0
    later = {line["tile"]: line for line in _gpu_smoke.read(tmp_path)}
    assert sorted(later) == sorted(_cuda_twin.TILES)
    assert [tile for tile, line in later.items() if line["verdict"] != "right"] == [found[0]["tile"]]
    assert _gpu_smoke.read(tmp_path, "of other kernels") == _gpu_smoke.read(tmp_path / "nothing") == []
    nothing = script("smoke", "--out", str(tmp_path), "--only", "no such kernel", *patient)
    assert (nothing.returncode, nothing.stdout) == (1, "smoke: 0 of 0 kernels right\n")


def test_profile() -> None:
    done = script("profile")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "sm90 bfloat16 matrix 128x128: 1x1 64->256 @ 56x56 + shortcut",
        "sm90 bfloat16 matrix 128x128: 1x1 256->64 @ 56x56",
        "sm90 bfloat16 image 128x128: 3x3 128->128 @ 28x28",
    ]


def test_what_becomes_of_a_kernel() -> None:
    """Right, wrong, hung, dead, silent: what was known last, and where it ended."""

    def told(*says: dict[str, Any], end: str = "", seconds: float = PATIENT) -> dict[str, Any]:
        code = "import json, os, sys, time; print('noise')\n"
        code += "".join(f"print('RESULT ' + json.dumps({{'tile': 'a tile', **{say!r}}}), flush=True)\n" for say in says)
        return gpu_first.judged("a tile", [sys.executable, "-c", code + end], seconds)

    passed = {"verdict": "unknown", "passed": ["one tile"], "running": "bias, ReLU"}
    right = {"verdict": "right", "passed": ["one tile", "bias, ReLU"]}
    found = told(passed, right)
    assert found["verdict"] == "right"
    assert "ended" not in found
    wrong = told(passed, {**passed, "running": "shortcut", "verdict": "wrong", "wrong": {"feature": "shortcut", "nan": 3}}, end="sys.exit(0)")
    assert (wrong["verdict"], wrong["wrong"]["nan"]) == ("wrong", 3)
    dead = told(passed, end="sys.stderr.write('illegal access'); sys.stderr.flush(); os._exit(9)")
    assert (dead["verdict"], dead["passed"]) == ("wrong", ["one tile"])
    assert dead["ended"] == "died with status 9, at: bias, ReLU"
    assert "illegal access" in dead["end"]
    hung = told(passed, end="sys.stderr.write('Timeout (0:00:20)!'); sys.stderr.flush(); os._exit(1)")  # as faulthandler says it
    assert (hung["verdict"], hung["ended"]) == ("wrong", "hung, at: bias, ReLU")
    # What says nothing against the kernel.
    late = told(end="time.sleep(3600)", seconds=0.5)
    assert (late["verdict"], late["ended"]) == ("unknown", "not done in 0 s, at: its start")
    late = told(passed, end="time.sleep(3600)", seconds=5)
    assert (late["verdict"], late["ended"]) == ("unknown", "not done in 5 s, at: bias, ReLU")
    unborn = told(end="raise ImportError")
    assert (unborn["verdict"], unborn["ended"]) == ("unknown", "died with status 1, at: its start")
    silent = told()
    assert (silent["verdict"], silent["ended"]) == ("unknown", "ended without a word, at: its start")
    # What ends in the row of calls, which is a setting's that is off, was right before.
    row = told(passed, {**right, "running": gpu_first.ROW}, end="os._exit(1)")
    assert (row["verdict"], row["ended"]) == ("right", "died with status 1, at: wrong in a row")
    said = [gpu_first.said(line).split("; ")[0] for line in (found, row, dead, silent)]
    assert said == ["ok  a tile", "ok  a tile", "BAD a tile", "??  a tile"]
    assert "WRONG where a call starts" in gpu_first.said({**right, "tile": "a tile", gpu_first.ROW: {"nan": 1}})


def test_a_wrong_kernel_ends_its_features(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first feature that is wrong is told, with how, and none is tried after it."""
    tile = "sm90 bfloat16 image 128x128"
    names = [feature.name for feature in gpu_kernels.features(tile)]
    right = gpu_kernels.Trial.wrong
    tried: list[int] = []

    def wrong(trial: gpu_kernels.Trial) -> dict[str, Any]:
        tried.append(1)
        return right(trial) if len(tried) < 4 else {"elements": 5}

    monkeypatch.setattr(gpu_kernels.Trial, "wrong", wrong)
    monkeypatch.setattr(gpu_first.faulthandler, "dump_traceback_later", lambda *a, **k: None)  # this process is the tests'
    before = torch.are_deterministic_algorithms_enabled()
    try:
        assert gpu_first.child(tile, str(_cuda_twin.build().__file__), PATIENT) == 0
    finally:
        torch.use_deterministic_algorithms(before)
    found = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert found["passed"] == names[:3]
    assert found["wrong"] == {"feature": names[3], "case": gpu_kernels.features(tile)[3].case.name, "elements": 5}
    assert len(tried) == 4


def test_objects_are_packed_and_linked(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of two files: one compiled elsewhere, and one, which knows Python, here."""
    setup = gpu_first.setup_file()
    build, packed = tmp_path / "build", tmp_path / "packed"
    small = {"_cpu": ["csrc/bindings.cpp", "csrc/cpu/team.cpp"], "_cuda": ["csrc/cuda/bindings.cpp", "csrc/cuda/config.cpp"]}
    units = {name: [setup.Unit("compile", source, []) for source in sources] for name, sources in small.items()}
    monkeypatch.delenv("FUSED_RESNET_CUDA_ARCHS", raising=False)
    setup.cpu_units, setup.cuda_units = (lambda: units["_cpu"]), (lambda: units["_cuda"])
    monkeypatch.setattr(gpu_first, "setup_file", lambda: setup)
    for name, sources in small.items():
        (build / f"fused_resnet.{name}").mkdir(parents=True)
        for stem in ("removed since", *(Path(source).stem for source in sources)):
            (build / f"fused_resnet.{name}" / f"{stem}.o").write_text(stem)
    assert gpu_first.pack(build, packed) == 0
    assert sorted(path.name for path in packed.rglob("*.o")) == ["config.o", "team.o"]
    capsys.readouterr()
    assert gpu_first.pack(tmp_path / "nothing", packed) == 1
    assert "team.o" in capsys.readouterr().err
    assert len(list(packed.rglob("*.o"))) == 2  # what was there stays
    assert gpu_first.link(tmp_path / "nothing") == 1
    assert "there is nothing to link" in capsys.readouterr().err
    made_of = json.loads((packed / "made_of.json").read_text())
    assert made_of == {"mark": gpu_first.mark_of(ROOT), "architectures": "80 90a"}
    (packed / "made_of.json").write_text(json.dumps({**made_of, "mark": "others"}))
    assert gpu_first.link(packed) == 1
    assert "of other sources" in capsys.readouterr().err
    (packed / "made_of.json").write_text(json.dumps(made_of))
    setup.nvcc = lambda: None
    assert gpu_first.link(packed) == 1
    assert "there is no nvcc" in capsys.readouterr().err

    compiler = (os.environ.get("CXX") or "g++").split()
    (tmp_path / "there.cpp").write_text("int seven() { return 7; }\n")
    (tmp_path / "here.cpp").write_text(
        "#include <pybind11/pybind11.h>\nint seven();\nPYBIND11_MODULE(small, m) { m.def(\"seven\", [] { return seven(); }); }\n"
    )
    objects = tmp_path / "objects" / "small"
    objects.mkdir(parents=True)
    subprocess.run([*compiler, "-fPIC", "-c", str(tmp_path / "there.cpp"), "-o", str(objects / "there.o")], check=True)
    here = [*compiler, "-std=c++17", "-fPIC", *setup.python_includes(), "-c", str(tmp_path / "here.cpp")]
    target = tmp_path / f"small{sysconfig.get_config_var('EXT_SUFFIX')}"
    linker = {"small": [*compiler, "-shared"]}
    assert list(gpu_first.compile_and_link({"small": {"here": here}}, linker, tmp_path / "objects", {"small": target})) == [True]
    call = [sys.executable, "-c", "import small; print(small.seven())"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "7\n", done.stderr
    broken = {"small": {"here": [*here, "-no-such-flag"]}}
    assert list(gpu_first.compile_and_link(broken, linker, tmp_path / "objects", {"small": target})) == [False]
    assert "-no-such-flag" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_module_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_load_cuda", lambda: (None, "no CUDA module"))
    with pytest.raises(RuntimeError, match="CUDA"):
        gpu_kernels.tiles(torch.device("cuda", 0))


def test_the_mark_follows_the_sources(tmp_path: Path) -> None:
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    for name in ("setup.py", "csrc/a.h", "csrc/cuda/b.cu"):
        (tmp_path / name).write_text("x")
    marks = [gpu_first.mark_of(tmp_path)]
    for name, text in (("csrc/a.h", "y"), ("csrc/cuda/b.cu", "y"), ("setup.py", "y"), ("csrc/cuda/c.cu", "")):
        (tmp_path / name).write_text(text)
        marks.append(gpu_first.mark_of(tmp_path))
    assert len(set(marks)) == 5
    assert gpu_first.mark_of(tmp_path) == marks[-1]
