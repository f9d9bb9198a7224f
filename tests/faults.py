"""The tests themselves: plant known faults in the kernels, one at a time, and see the suite go red.

    python tests/faults.py [NAME ...]

For each fault: copies the project to a temporary folder, changes one line of csrc/, compiles, and runs the test files that trust
that line. A fault that no test notices is a hole in the suite: exit status 1. Run by hand (a few minutes); not part of the suite.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    """``old`` stands exactly once in ``file`` and becomes ``new``; ``tests`` are the files that must notice."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ("tests/test_exact.py",)


SPECIAL = ("tests/test_special_values.py",)
GRADIENTS = ("tests/test_gradients.py",)

FAULTS = {
    "bias dropped": Fault(
        "cpu/direct.h",
        "if (a.bias) bias = V::load_n(static_cast<const S*>(a.bias) + k, count);",
        "",
    ),
    "shortcut of the first pixel for all": Fault(
        "cpu/direct.h", "+ a.shortcut_offset[pixel + m] + k;", "+ a.shortcut_offset[pixel] + k;"
    ),
    "> for >= in the mask": Fault(
        "cpu/vec_avx512.h",
        "static reg relu_gradient(reg g, reg y) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero(), _CMP_NLE_UQ), g); }",
        "static reg relu_gradient(reg g, reg y) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero(), _CMP_NLT_UQ), g); }",
        GRADIENTS,
    ),
    "NaN lost in the ReLU": Fault(
        "cpu/vec_avx512.h",
        "static reg relu(reg v) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, zero(), _CMP_NLE_UQ), v); }",
        "static reg relu(reg v) { return _mm512_max_ps(v, zero()); }",
        SPECIAL,
    ),
    "NaN lost in the scalar ReLU": Fault(
        "epilogue.h", "return value <= T(0) ? T(0) : value;", "return value > T(0) ? value : T(0);", SPECIAL
    ),
    "padding shifted by one": Fault(
        "cpu/convolution.cpp", "w0 = t.col * s.stride_w - s.pad_left;", "w0 = t.col * s.stride_w - s.pad_left + (s.pad_left > 0);"
    ),
    "last tap skipped": Fault(
        "cpu/direct.h", "tap < t.chunk->count; ++tap", "tap < t.chunk->count - (t.chunk->count > 2); ++tap"
    ),
    "channels beyond the vector width lost": Fault(
        "cpu/direct.h",
        "const i64 channels = smaller(a.k - k, W);",
        "const i64 channels = smaller(a.k - k, W - (a.k > W));",
    ),
    "rounding towards zero in bfloat16": Fault(
        "cpu/vec_avx512.h",
        "_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)))",
        "bits",
        ("tests/test_envelope.py",),
    ),
    "bias gradient summed twice": Fault(
        "cpu/pointwise.h",
        "V::add(V::load_n(sum + i, count), value)",
        "V::add(V::load_n(sum + i, count), V::add(value, value))",
        GRADIENTS,
    ),
    "a row too few in the workspace": Fault(
        "cpu/algorithm.cpp",
        "b.slots = slots_for(b.rows);",
        "b.slots = slots_for(b.rows) - (b.images > 1);",
    ),
    "threads overlap": Fault(
        "cpu/convolution.cpp",
        "char* const mine = data + omp_get_thread_num() * workspace_;",
        "char* const mine = data;",
        ("tests/test_determinism.py",),
    ),
}


def plant(fault: Fault, folder: Path) -> None:
    shutil.copytree(
        ROOT,
        folder,
        ignore=shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", "*.so", "__pycache__", "results"),
        dirs_exist_ok=True,
    )
    file = folder / "csrc" / fault.file
    text = file.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.file} has changed: {fault.old!r} stands there {text.count(fault.old)} times")
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def run(fault: Fault) -> str:
    """'' if a test went red because of the fault, else what happened."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(fault, folder)
        built = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if built.returncode:
            return f"does not compile: {built.stderr[-500:]}"
        # The copy comes first on the path, and its compiled module lies beside it.
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", *fault.tests],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 1 and " failed" in done.stdout:
            return ""
        return "NOT NOTICED" if done.returncode == 0 else f"pytest did not run: {(done.stdout + done.stderr)[-500:]}"


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        print(f"unknown fault {unknown[0]!r}; the faults are: {', '.join(FAULTS)}", file=sys.stderr)
        return 2
    missed = 0
    for name in names or FAULTS:
        outcome = run(FAULTS[name])
        missed += bool(outcome)
        print(f"{name:42s} {outcome or 'noticed'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
