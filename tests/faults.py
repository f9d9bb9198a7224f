"""Plants known faults in the sources and sees that the tests go red. Run by hand: ``python tests/faults.py [NAME ...]``.

Not part of the suite: each fault compiles the kernels again. It needs a C++ compiler and takes about a minute a fault.

A copy of the repository is made in a temporary folder and built there as ``setup.py`` builds it, so that the module lies
beside the copy's own Python files and is the one that is found. Without a fault the tests must be green there (the first
line of the table), or red would mean nothing. Each fault is a change of text that must be found, so a fault whose text is gone
is an error and not a pass. Exit status 0: every fault was seen.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("csrc", "fused_resnet", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Fault:
    """Text to be replaced, in every place where it stands in these files, and the tests (files, or nodes of them) of which
    each must go red."""

    name: str
    files: tuple[str, ...]
    old: str
    new: str
    tests: tuple[str, ...]


VECTORS = ("csrc/cpu/vec_avx2.h", "csrc/cpu/vec_avx512.h")
EXACT = "tests/test_exact.py::test_awkward_convolutions"
GUARD_BYTES = "tests/test_memory.py::test_memory[guard bytes]"
TASKS = "tests/test_memory.py::test_memory[TSan]"

FAULTS = (
    Fault(
        "F(2x2, 3x3): a sign of the input transform",
        ("csrc/cpu/winograd.h",),
        "t[2] = V::sub(d[2], d[1]);",
        "t[2] = V::sub(d[1], d[2]);",
        (EXACT,),
    ),
    Fault(
        "F(2x2, 3x3) with stride 2: a sign of the weight's transform",
        ("csrc/cpu/winograd.h",),
        "u[1] = g0 + g2;",
        "u[1] = g0 - g2;",
        (EXACT,),
    ),
    Fault(
        "Winograd: padding shifted by one, rows",
        ("csrc/cpu/winograd_convolution.cpp",),
        "const i64 h0 = t.row * step - s.pad_top,",
        "const i64 h0 = t.row * step - s.pad_top + 1,",
        (EXACT,),
    ),
    Fault(
        "projection left out of the joined product's weight",
        ("csrc/cpu/direct_convolution.cpp",),
        "a.weight = joined.data;",
        "a.weight = weight.data;",
        ("tests/test_conversion.py",),
    ),
    Fault(
        "bias dropped, channels_last",
        ("csrc/cpu/direct.h",),
        "if (a.bias) bias = Full ?",
        "if (false) bias = Full ?",
        (EXACT,),
    ),
    Fault(
        "bias dropped, contiguous",
        ("csrc/cpu/direct.h",),
        "if (a.bias) value = V::add(value, V::set1(widen(static_cast<const S*>(a.bias)[k + j])));",
        "",
        (EXACT,),
    ),
    Fault(
        "shortcut dropped",
        ("csrc/cpu/direct.h",),
        "value = V::add(value, Full ? V::load_all(shortcut) : V::load_n(shortcut, count));",
        "(void)shortcut;",
        (EXACT,),
    ),
    Fault(
        "mask < instead of <=, SIMD",
        VECTORS,
        "(y, zero(), _CMP_NLE_UQ)",
        "(y, zero(), _CMP_NLT_UQ)",
        ("tests/test_exact.py::test_relu_backward", "tests/test_gradients.py::test_exact_integer_gradients"),
    ),
    Fault(
        "mask < instead of <=, scalar",
        ("csrc/epilogue.h",),
        "return output <= T(0) ? T(0) : grad;",
        "return output < T(0) ? T(0) : grad;",
        ("tests/test_exact.py::test_relu_backward", "tests/test_gradients.py::test_exact_integer_gradients"),
    ),
    Fault(
        "relu loses NaN, SIMD (the operands of max swapped)",
        VECTORS,
        "_max_ps(zero(), v)",
        "_max_ps(v, zero())",
        ("tests/test_special_values.py::test_relu_of_nan_is_nan", "tests/test_special_values.py::test_convolution"),
    ),
    Fault(
        "relu loses NaN, scalar",
        ("csrc/epilogue.h",),
        "return value <= T(0) ? T(0) : value;",
        "return value > T(0) ? value : T(0);",
        ("tests/test_special_values.py::test_relu_of_nan_is_nan", "tests/test_special_values.py::test_convolution"),
    ),
    Fault(
        "mask loses the gradient at NaN",
        VECTORS,
        "(y, zero(), _CMP_NLE_UQ)",
        "(y, zero(), _CMP_GT_OQ)",
        ("tests/test_special_values.py::test_gradients_through_nan_outputs",),
    ),
    Fault(
        "relu cuts at 1 instead of 0, scalar",
        ("csrc/epilogue.h",),
        "return value <= T(0) ? T(0) : value;",
        "return value <= T(1) ? T(0) : value;",
        (EXACT,),
    ),
    Fault(
        "padding shifted by one, rows",
        ("csrc/cpu/direct_convolution.cpp",),
        "const i64 h0 = t.row * s.stride_h - s.pad_top,",
        "const i64 h0 = t.row * s.stride_h - s.pad_top + (s.pad_top > 0),",
        (EXACT, "tests/test_envelope.py::test_awkward_convolutions"),
    ),
    Fault(
        "padding shifted by one, columns",
        ("csrc/cpu/direct_convolution.cpp",),
        "w0 = t.col * s.stride_w - s.pad_left;",
        "w0 = t.col * s.stride_w - s.pad_left + (s.pad_left > 0);",
        (EXACT,),
    ),
    Fault(
        "right padding not cleared",
        ("csrc/cpu/direct_convolution.cpp",),
        "std::memset(row + right * b.pitch * bytes, 0, std::size_t((width - right) * b.pitch * bytes));",
        "",
        (EXACT,),
    ),
    Fault(
        "last tap skipped",
        ("csrc/cpu/direct.h",),
        "for (i64 tap = 0; tap < t.chunk->count; ++tap) {",
        "for (i64 tap = 0; tap < t.chunk->count - (t.last && t.chunk->count > 1); ++tap) {",
        (EXACT,),
    ),
    Fault(
        "tail mask one too short, AVX-512",
        ("csrc/cpu/vec_avx512.h",),
        "__mmask16((1u << n) - 1u)",
        "__mmask16(((1u << n) - 1u) >> 1)",
        (EXACT, "tests/test_exact.py::test_bias_add_relu"),
    ),
    Fault(
        "tail mask one too short, AVX2",
        ("csrc/cpu/vec_avx2.h",),
        "_mm256_cmpgt_epi32(_mm256_set1_epi32(n >= width ? width : int(n)),",
        "_mm256_cmpgt_epi32(_mm256_set1_epi32(n >= width ? width : int(n) - 1),",
        (EXACT, "tests/test_exact.py::test_bias_add_relu"),
    ),
    Fault(
        "panel tail one channel short",
        ("csrc/cpu/packing.h",),
        "const i64 rows_here = smaller(a.k - a.k_begin - j, W);",
        "const i64 rows_here = smaller(a.k - a.k_begin - j - 1, W);",
        (EXACT,),
    ),
    Fault(
        "last panel not computed when it is half full",
        ("csrc/cpu/direct_convolution.cpp",),
        "t.panels_end = std::min(panels, t.panel + b.panels);",
        "t.panels_end = std::min(std::max<i64>(shape_.k / b.cut.channels, 1), t.panel + b.panels);",
        (EXACT,),
    ),
    Fault(
        "bias gradient summed twice",
        ("csrc/cpu/passes.cpp",),
        "totals[std::size_t(k)] += double(value);",
        "totals[std::size_t(k)] += 2 * double(value);",
        ("tests/test_exact.py::test_relu_backward", "tests/test_gradients.py::test_exact_integer_gradients"),
    ),
    Fault(
        "bias gradient summed twice, float64",
        ("csrc/cpu/passes.cpp",),
        "totals[std::size_t(k)] += value;",
        "totals[std::size_t(k)] += 2 * value;",
        ("tests/test_exact.py::test_relu_backward", "tests/test_gradients.py::test_gradcheck"),
    ),
    Fault(
        "bfloat16 truncated instead of rounded, SIMD",
        VECTORS,
        "set1_epi32(0x7fff)",
        "set1_epi32(0)",
        ("tests/test_envelope.py::test_awkward_convolutions", "tests/test_envelope.py::test_bias_add_relu"),
    ),
    Fault(
        "bfloat16 truncated instead of rounded, scalar",
        ("csrc/epilogue.h",),
        "bits + 0x7fffu + ((bits >> 16) & 1u)",
        "bits",
        ("tests/test_envelope.py::test_awkward_convolutions", "tests/test_envelope.py::test_bias_add_relu"),
    ),
    Fault(
        "output's strides taken for the shortcut's",
        ("csrc/cpu/direct_convolution.cpp",),
        "t.col * s.shortcut.w;",
        "t.col * s.y.w;",
        ("tests/test_layouts.py::test_each_operand",),
    ),
    Fault(
        "relu_backward reads the output with the gradient's step",
        ("csrc/cpu/passes.cpp",),
        "a.output_step = rows.channels ? s.second.c : s.second.w;",
        "a.output_step = a.grad_step;",
        ("tests/test_layouts.py::test_each_operand_of_relu_backward",),
    ),
    Fault(
        "the sum depends on the number of threads",
        ("csrc/cpu/passes.cpp",),
        "std::max<i64>(64, (rows.count + kMostPieces - 1) / kMostPieces)",
        "std::max<i64>(64, (rows.count + threads - 1) / threads)",
        ("tests/test_determinism.py::test_passes",),
    ),
    Fault(
        "fingerprint misses the last word",
        ("csrc/cpu/fingerprint.cpp",),
        "(words - 1) * i / (kSamples - 1)",
        "(words - 1) * i / kSamples",
        ("tests/test_derived.py::test_writes_through_data_of_a_large_weight",),
    ),
    Fault(
        "the hot path is never taken",
        ("fused_resnet/_select.py",),
        "    return why\n",
        '    return why or ["a fault"]\n',
        ("tests/test_isa.py::test_the_plan_is_of_this_instruction_set",),
    ),
    Fault(
        "a changed weight is not packed again",
        ("fused_resnet/_derived.py",),
        "return bool((held is not None or stamp[2]() is t) and identity == stamp[0] and _fingerprint(t, identity) == stamp[1])",
        "return bool(held is not None or stamp[2]() is t)",
        ("tests/test_derived.py::test_remade_after", "tests/test_derived.py::test_training_loop"),
    ),
    Fault(
        "bias of a projection lost that is joined to a layer without one",
        ("csrc/cpu/block.cpp",),
        "s.has_bias = s.has_bias || shape_.projection.has_bias;",
        "",
        ("tests/test_stem.py::test_a_projection_without_a_norm_comes_and_goes",),
    ),
    Fault(
        "a packed weight laid out for one size of the input",
        ("csrc/cpu/algorithm.cpp",),
        "fits(b.cut) < few) b.cut",
        "fits(b.cut) < std::min(few, all)) b.cut",
        ("tests/test_winograd.py::test_one_weight_for_inputs_of_every_size",),
    ),
    Fault(
        "block: an intermediate reaches into the next",
        ("csrc/cpu/block.cpp",),
        "between_strides(layer, bytes_).n), bytes_));",
        "between_strides(layer, bytes_).n), bytes_)) - 64;",
        (GUARD_BYTES,),
    ),
    Fault(
        "block: the last group of images is done as a full one",
        ("csrc/cpu/block.cpp",),
        "const Group& group = shape_.n - image < first.images ? groups_.back() : first;",
        "const Group& group = first;",
        (GUARD_BYTES,),
    ),
    Fault(
        "block: no memory for what the two phases of a convolution share, depth first",
        ("csrc/cpu/block.cpp",),
        "g.slot.back() + g.shared + g.thread",
        "g.slot.back() + g.thread",
        (GUARD_BYTES,),
    ),
    Fault(
        "joined convolution: a task packs one pixel more than it has",
        ("csrc/cpu/direct_convolution.cpp",),
        "a.pixels = t.cols;",
        "a.pixels = t.cols + 1;",
        (GUARD_BYTES,),
    ),
    Fault(
        "Winograd: a task of the first phase does the next row of tiles as well",
        ("csrc/cpu/winograd_convolution.cpp",),
        "transform(begin, begin + b.cols,",
        "transform(begin, std::min(begin + 2 * b.cols, all_tiles()),",
        (TASKS,),
    ),
    Fault(
        "training: a continued run begins its epoch again",
        ("fused_resnet/training/data.py",),
        "islice(iter(self.share), self.done, self.per_epoch)",
        "islice(iter(self.share), self.per_epoch - self.done)",
        (
            "tests/test_train.py::test_batches_are_the_same_for_any_number_of_processes",
            "tests/test_train.py::test_continues_bit_for_bit_from_any_step",
        ),
    ),
    Fault(
        "training: momenta lost when a run continues",
        ("fused_resnet/training/loop.py",),
        'self.optimizer.load_state_dict(state["optimizer"])',
        "pass",
        ("tests/test_train.py::test_continues_bit_for_bit_from_any_step",),
    ),
    Fault(
        "training: gradients not averaged over the processes",
        ("fused_resnet/training/loop.py",),
        "if world.size > 1 else self.network",
        "if world.size > 2 else self.network",
        ("tests/test_train.py::test_two_processes_do_what_one_does",),
    ),
    Fault(
        "training: a checkpoint written over the one before",
        ("fused_resnet/training/checkpoint.py",),
        'path.with_name(path.name + ".unfinished")',
        "path",
        ("tests/test_train_bad_input.py::test_a_crash_in_mid_write_leaves_the_old_file",),
    ),
    Fault(
        "training: a checkpoint that may run code",
        ("fused_resnet/training/checkpoint.py",),
        "weights_only=True",
        "weights_only=False",
        ("tests/test_train_bad_input.py::test_foreign_checkpoint_is_refused_and_kept",),
    ),
    Fault(
        "training: checksums not compared",
        ("fused_resnet/training/checkpoint.py",),
        "damaged = archive.testzip()",
        "damaged = None",
        ("tests/test_train_bad_input.py::test_broken_checkpoint_is_refused_and_kept",),
    ),
    Fault(
        "CUDA, general: a pixel below the map counts as inside",
        ("csrc/cuda/general.cuh",),
        "return i >= 0 && i < size;",
        "return i >= 0 && i <= size;",
        ("tests/test_cuda_twin.py::test_awkward_convolutions", "tests/test_cuda_host.py"),
    ),
    Fault(
        "CUDA, general: the joined convolution reads its first pixels",
        ("csrc/cuda/general.cuh",),
        "pixel.joined = image * j_n + row * joined_stride_h * j_h",
        "pixel.joined = image * j_n + row * j_h",
        ("tests/test_cuda_twin.py::test_blocks_of_bfloat16_run_on_tensor_cores",),
    ),
    Fault(
        "CUDA: a weight in another order than the tensor cores read",
        ("fused_resnet/_gpu.py",),
        "wanted = (r * s * c, 1, s * c, c)",
        "wanted = (r * s * c, 1, c, r * c)",
        ("tests/test_cuda_twin.py::test_tensor_core_kernels_get_what_they_read",),
    ),
    Fault(
        "CUDA: a misaligned view given to the tensor cores",
        ("fused_resnet/_gpu.py",),
        "return not any([t is not None and t.data_ptr() % _ALIGNMENT for t in tensors])",
        "return True",
        ("tests/test_cuda_twin.py::test_tensor_core_kernels_get_what_they_read",),
    ),
    Fault(
        "CUDA: only the first bias of a joined projection",
        ("fused_resnet/_gpu.py",),
        "lambda a, b: (a.float() + b.float()).to(a.dtype)",
        "lambda a, b: a.clone()",
        ("tests/test_cuda_twin.py::test_blocks_of_bfloat16_run_on_tensor_cores",),
    ),
    Fault(
        "CUDA: any 1x1 convolution read as a matrix",
        ("csrc/cuda/config.cpp",),
        "s.stride_h == 1 && s.stride_w == 1 && s.pad_top == 0 && s.pad_left == 0 && s.p == s.h && s.q == s.w;",
        "true;",
        ("tests/test_cuda_config.py",),
    ),
)


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """In the copy, with the copy first on the path and nothing of this checkout on it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FUSED_RESNET_")}
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _copy(folder: Path) -> None:
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif source.exists():
            shutil.copy2(source, folder / part)


def _build(folder: Path) -> None:
    done = _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", "build/faults"], folder)
    if done.returncode:
        raise SystemExit(f"the copy does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    code = "from fused_resnet._extension import cpu; print(cpu.__file__)"
    found = _run([sys.executable, "-c", code], folder).stdout.strip()
    if not found.startswith(str(folder)):
        raise SystemExit(f"the tests would use {found!r} instead of the module built in {folder}")


def _red(test: str, folder: Path) -> bool:
    """Whether this test fails: a failed assertion, not a collection that broke."""
    done = _run([sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", test], folder)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest {test} did not run (exit status {done.returncode}):\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.returncode == 1


def _plant(fault: Fault, folder: Path) -> dict[Path, str]:
    """Changes the copy; returns the files as they were."""
    before = {}
    for name in fault.files:
        path = folder / name
        before[path] = path.read_text()
        if fault.old not in before[path]:
            raise SystemExit(f"fault {fault.name!r}: its text is no longer in {name}: {fault.old!r}")
        path.write_text(before[path].replace(fault.old, fault.new))
    return before


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="faults whose name contains this; all by default")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    options = parser.parse_args(arguments)
    faults = [f for f in FAULTS if not options.name or any(word in f.name for word in options.name)]
    if options.list or not faults:
        print("\n".join(f.name for f in FAULTS))
        return 0 if options.list else 2
    missed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name).resolve()
        _copy(folder)
        _build(folder)
        green = sorted({test for fault in faults for test in fault.tests})
        for test in green:
            if _red(test, folder):
                print(f"{test} is red without any fault", flush=True)
                return 1
        print(f"{'no fault':<75} green ({len(green)} tests)", flush=True)
        for fault in faults:
            start = time.perf_counter()
            before = _plant(fault, folder)
            try:
                _build(folder)
                unseen = [test for test in fault.tests if not _red(test, folder)]
            finally:
                for path, text in before.items():
                    path.write_text(text)
            missed += bool(unseen)
            verdict = "red" if not unseen else "NOT SEEN by " + ", ".join(unseen)
            print(f"{fault.name:<75} {verdict} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} faults seen")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
