"""The compiled modules: which sources, which flags for which file, and how they are built.

setuptools knows one set of flags for an extension; here each instruction set has its own. So this writes a build.ninja (with
the ninja package's own writer) and lets ninja compile, in parallel and only what changed. Everything else about the package
is in pyproject.toml. The sources need a C++17 compiler and pybind11, never torch.

fused_resnet._cpu is always built. fused_resnet._cuda is built if FUSED_RESNET_CUDA=1, not if it is 0, and if it is unset where
there are both nvcc and an NVIDIA driver; it needs nvcc (tested with 13.0) and CUTLASS's headers (from PyPI's nvidia-cutlass, which pip
fetches for the build, or from the folder that CUTLASS_PATH names), and no GPU. FUSED_RESNET_CUDA_ARCHS chooses among "80 90a".
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

X86 = os.uname().machine in ("x86_64", "AMD64")
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
# Flags beyond the common ones. GCC 12's AVX-512 headers trip -Wmaybe-uninitialized by themselves.
SOURCES: dict[str, list[str]] = {
    "csrc/bindings.cpp": ["-O2"],
    "csrc/bindings_training.cpp": ["-O2"],
    "csrc/facts.cpp": ["-O2"],
    "csrc/watch.cpp": ["-O2"],
    "csrc/cpu/algorithm.cpp": ["-O2"],
    "csrc/cpu/convolution.cpp": ["-O2"],
    "csrc/cpu/direct_convolution.cpp": ["-O3"],
    "csrc/cpu/dispatch.cpp": ["-O2"],
    "csrc/cpu/fingerprint.cpp": ["-O3"],
    "csrc/cpu/fresh_convolution.cpp": ["-O2"],
    "csrc/cpu/input_gradient.cpp": ["-O2"],
    "csrc/cpu/max_pool.cpp": ["-O2"],
    "csrc/cpu/mean_pool.cpp": ["-O2"],
    "csrc/cpu/network.cpp": ["-O2"],
    "csrc/cpu/passes.cpp": ["-O2"],
    "csrc/cpu/program.cpp": ["-O2"],
    "csrc/cpu/program_run.cpp": ["-O2"],
    "csrc/cpu/team.cpp": ["-O2"],
    "csrc/cpu/weight_gradient.cpp": ["-O2"],
    "csrc/cpu/winograd_convolution.cpp": ["-O2"],
    "csrc/cpu/winograd_tiles.cpp": ["-O2"],
    "csrc/cpu/zero_pad.cpp": ["-O2"],
    # GCC 12's loop vectorizer reads one step beyond what strided loops read, on which a page may end that is nobody's.
    "csrc/cpu/isa_scalar.cpp": ["-O3", "-fno-tree-loop-vectorize"],
    **({"csrc/cpu/isa_avx2.cpp": ["-O3", *AVX2]} if X86 else {}),
    **({"csrc/cpu/isa_avx512.cpp": ["-O3", "-Wno-maybe-uninitialized", *AVX512]} if X86 else {}),
    **({"csrc/cpu/isa_avx512_bf16.cpp": ["-O3", "-Wno-maybe-uninitialized", "-mavx512bf16", *AVX512]} if X86 else {}),
}
KNOW_PYTHON = ("csrc/bindings.cpp", "csrc/bindings_training.cpp", "csrc/facts.cpp", "csrc/watch.cpp", "csrc/cuda/bindings.cpp")
# -ffp-contract=off: the scalar kernels multiply and add wherever they are compiled; the others call FMA by name.
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wextra"]

CUTLASS = "nvidia-cutlass==4.2.0.0"
ARCHITECTURES = ("80", "90a")
# -DNDEBUG: an assertion is a call, and a call inside a wgmma pipeline makes ptxas serialize it. CUTLASS's headers are not ours to
# warn about.
CUDA_COMMON = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]

# Hopper's kernels wait for the one before them on the stream, where they are launched so that they need to.
GDC = ["-DCUTLASS_ENABLE_GDC_FOR_SM90"]
LINK = "-shared -fopenmp"
# The static runtime, its symbols hidden: torch brings a runtime of its own under the same names.
CUDA_LINK = "-shared -cudart static -Xlinker --exclude-libs=ALL"


class Unit(NamedTuple):
    """One compilation: rule, source and flags."""

    rule: str
    source: str
    flags: list[str]


def python_includes() -> list[str]:
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def nvcc() -> str | None:
    """CUDA_HOME's, else the PATH's, else the usual place's."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which("nvcc", path=f"{home}/bin") for home in homes if home]
    own = [path for path in found[:-1] if path]
    return own[0] if own else shutil.which("nvcc") or found[-1]


def wants_cuda() -> tuple[bool, str]:
    """Whether the CUDA module is to be built, and why."""
    wish = os.environ.get("FUSED_RESNET_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"FUSED_RESNET_CUDA must be 0 or 1, got {wish!r}")
    if wish:
        return wish == "1", f"FUSED_RESNET_CUDA={wish}"
    if nvcc() is None:
        return False, "there is no nvcc here (FUSED_RESNET_CUDA=1 would insist on the CUDA kernels)"
    if not (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
        return False, "there is no NVIDIA driver here (FUSED_RESNET_CUDA=1 builds the CUDA kernels without one)"
    return True, "nvcc and an NVIDIA driver are here (FUSED_RESNET_CUDA=0 leaves the CUDA kernels out)"


def architectures() -> list[str]:
    wanted = os.environ.get("FUSED_RESNET_CUDA_ARCHS", " ".join(ARCHITECTURES)).replace(";", " ").replace(",", " ").split()
    if not wanted or any(a not in ARCHITECTURES for a in wanted):
        raise SystemExit(f"FUSED_RESNET_CUDA_ARCHS must be one or more of {' '.join(ARCHITECTURES)}, got {' '.join(wanted)!r}")
    return [a for a in ARCHITECTURES if a in wanted]


def has_cutlass() -> bool:
    return bool(os.environ.get("CUTLASS_PATH")) or importlib.util.find_spec("cutlass_library") is not None


def cutlass_includes() -> list[str]:
    """CUTLASS's header folders: those of CUTLASS_PATH, a checkout or an unpacked wheel, or of the installed nvidia-cutlass."""
    roots = [Path(os.environ["CUTLASS_PATH"])] if os.environ.get("CUTLASS_PATH") else []
    if not roots:
        spec = importlib.util.find_spec("cutlass_library")
        roots = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    for root in roots:
        for base in (root, root / "source", root / "cutlass_library" / "source"):
            if (base / "include" / "cutlass" / "cutlass.h").is_file():
                return [str(base / "include"), str(base / "tools" / "util" / "include")]
    raise SystemExit(f"the CUDA kernels need CUTLASS's headers: pip install {CUTLASS}, or name a checkout in CUTLASS_PATH")


def targets(name: str, wanted: list[str]) -> list[str]:
    """nvcc's -gencode flags for one source: machine code for the architectures wanted, PTX for later ones."""

    def code(virtual: str, *real: str) -> str:
        return f"-gencode=arch=compute_{virtual},code=[{','.join(real)}]"

    if name.startswith("sm90_"):  # wgmma and TMA: this architecture alone
        return [code("90a", "sm_90a")]
    if name.startswith("sm80_"):
        return [code("80", "sm_80", "compute_80")]
    # Everything else, few_* and the general kernels, runs on all of them.
    plain = [a.rstrip("a") for a in wanted]
    return [code(a, f"sm_{a}", *([f"compute_{a}"] if a == plain[-1] else [])) for a in plain]


def cpu_units() -> list[Unit]:
    includes = dict.fromkeys(KNOW_PYTHON, python_includes())
    return [Unit("compile", source, [*includes.get(source, []), *flags]) for source, flags in SOURCES.items()]


def cuda_host_units(wanted: list[str]) -> list[Unit]:
    """The files without kernels."""
    units = []
    for source in ("bindings", "config", "convolution", "device", "driver", "general", "prediction", "sequence", "tensor", "tma"):
        path = f"csrc/cuda/{source}.cpp"
        flags = ["-x", "c++", f'-DFR_ARCHITECTURES=\'"{" ".join(wanted)}"\'', *(python_includes() if path in KNOW_PYTHON else [])]
        units.append(Unit("nvcc", path, flags))
    return units


def cuda_units() -> list[Unit]:
    wanted = architectures()
    headers = [flag for folder in cutlass_includes() for flag in ("-isystem", folder)]
    folder = ROOT / "csrc" / "cuda"
    units = cuda_host_units(wanted)
    for file in sorted([*folder.glob("tiles/*.cu"), *folder.glob("*.cu")]):
        name = file.stem
        if (name.startswith("sm90_") and "90a" not in wanted) or (name.startswith("sm80_") and "80" not in wanted):
            continue
        own = [*headers, *(GDC if name.startswith("sm90_") else [])] if file.parent.name == "tiles" else ["-Xcompiler=-Wextra"]
        units.append(Unit("nvcc", str(file.relative_to(ROOT)), [*targets(name, wanted), *own]))
    return units


class NinjaBuild(build_ext):
    """Compiles and links each extension with ninja."""

    def run(self) -> None:
        built = [ext.name for ext in self.extensions]
        print(f"fused_resnet: building {' and '.join(built)}: {wants_cuda()[1]}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import ninja
        from ninja import ninja_syntax

        cuda = ext.name.endswith("_cuda")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler.split()[0]) is None:
            raise SystemExit(f"fused_resnet needs a C++17 compiler: {compiler!r} was not found; name another one in CXX")
        device_compiler = nvcc()
        if cuda and device_compiler is None:
            raise SystemExit("FUSED_RESNET_CUDA=1 needs nvcc, which was not found: put it on the PATH or set CUDA_HOME")
        units = cuda_units() if cuda else cpu_units()
        library = folder / target.name
        with open(folder / "build.ninja", "w", encoding="utf-8") as file:
            writer = ninja_syntax.Writer(file)
            ldflags = os.environ.get("LDFLAGS", "").split()
            if cuda:
                host = f" -ccbin {compiler.split()[-1]}" if os.environ.get("CXX") else ""
                writer.variable("nvcc", f"{device_compiler}{host}")
                writer.variable("common", CUDA_COMMON)
                writer.rule(
                    "nvcc",
                    "$nvcc $common -MD -MF $out.d $flags -c $in -o $out",
                    depfile="$out.d",
                    deps="gcc",
                    description="compile $in",
                )
                command = f"$nvcc {CUDA_LINK} $in -o $out $ldflags"
                ldflags = [f"-Xlinker={flag}" for flag in ldflags]
            else:
                writer.variable("cxx", compiler)
                writer.variable("common", [*COMMON, *os.environ.get("CXXFLAGS", "").split()])
                writer.rule(
                    "compile",
                    "$cxx $common $flags -MMD -MF $out.d -c $in -o $out",
                    depfile="$out.d",
                    deps="gcc",
                    description="compile $in",
                )
                command = f"$cxx {LINK} $in -o $out $ldflags"
            writer.rule("link", command, description="link $out")
            objects = []
            # What takes longest starts first.
            for unit in sorted(units, key=lambda unit: "tiles/sm90" not in unit.source):
                objects.append(str(folder / (Path(unit.source).stem + ".o")))
                writer.build(objects[-1], unit.rule, str(ROOT / unit.source), variables={"flags": unit.flags})
            writer.build(str(library), "link", objects, variables={"ldflags": ldflags})
            writer.default(str(library))
        command_line = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        jobs = os.environ.get("MAX_JOBS")
        result = subprocess.run([*command_line, *(["-j", jobs] if jobs else [])], check=False)
        if result.returncode:
            sys.exit(f"fused_resnet: the {'CUDA' if cuda else 'C++'} sources did not compile; the compiler's messages are above")
        shutil.copyfile(library, target)


if __name__ == "__main__":  # the tests import this file for its sources and flags
    with_cuda = wants_cuda()[0]
    extensions = [Extension("fused_resnet._cpu", sources=list(SOURCES))]
    if with_cuda:
        extensions.append(Extension("fused_resnet._cuda", sources=[]))
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": NinjaBuild},
        # pip reads this as a requirement of the build alone.
        setup_requires=[CUTLASS] if with_cuda and not has_cutlass() else [],
    )
