"""The compiled module: which sources, which flags for which file, and how they are built.

setuptools knows one set of flags for an extension; here each instruction set has its own. So this writes a build.ninja (with
the ninja package's own writer) and lets ninja compile, in parallel and only what changed. Everything else about the package
is in pyproject.toml. The sources need a C++17 compiler and pybind11, never torch.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from ninja import ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

X86 = os.uname().machine in ("x86_64", "AMD64")
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
# Flags beyond the common ones. GCC 12's AVX-512 headers trip -Wmaybe-uninitialized by themselves.
SOURCES: dict[str, list[str]] = {
    "csrc/bindings.cpp": [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-O2"],
    "csrc/cpu/algorithm.cpp": ["-O2"],
    "csrc/cpu/block.cpp": ["-O2"],
    "csrc/cpu/convolution.cpp": ["-O2"],
    "csrc/cpu/direct_convolution.cpp": ["-O3"],
    "csrc/cpu/dispatch.cpp": ["-O2"],
    "csrc/cpu/fingerprint.cpp": ["-O3"],
    "csrc/cpu/passes.cpp": ["-O2"],
    "csrc/cpu/winograd_convolution.cpp": ["-O2"],
    "csrc/cpu/isa_scalar.cpp": ["-O3"],
    **({"csrc/cpu/isa_avx2.cpp": ["-O3", *AVX2]} if X86 else {}),
    **({"csrc/cpu/isa_avx512.cpp": ["-O3", "-Wno-maybe-uninitialized", *AVX512]} if X86 else {}),
    **({"csrc/cpu/isa_avx512_bf16.cpp": ["-O3", "-Wno-maybe-uninitialized", "-mavx512bf16", *AVX512]} if X86 else {}),
}
# -ffp-contract=off: the scalar kernels multiply and add wherever they are compiled; the others call FMA by name.
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wextra"]


class NinjaBuild(build_ext):
    """Compiles and links one extension with ninja."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler.split()[0]) is None:
            raise SystemExit(f"fused_resnet needs a C++17 compiler: {compiler!r} was not found; name another one in CXX")
        library = folder / target.name
        with open(folder / "build.ninja", "w", encoding="utf-8") as file:
            writer = ninja_syntax.Writer(file)
            writer.variable("cxx", compiler)
            writer.variable("common", [*COMMON, *os.environ.get("CXXFLAGS", "").split()])
            writer.rule(
                "compile",
                "$cxx $common $flags -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="compile $in",
            )
            writer.rule("link", "$cxx -shared $in -o $out -fopenmp $ldflags", description="link $out")
            objects = []
            for source, flags in SOURCES.items():
                objects.append(str(folder / (Path(source).stem + ".o")))
                writer.build(objects[-1], "compile", str(ROOT / source), variables={"flags": flags})
            ldflags = os.environ.get("LDFLAGS", "").split()
            writer.build(str(library), "link", objects, variables={"ldflags": ldflags})
            writer.default(str(library))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        jobs = os.environ.get("MAX_JOBS")
        result = subprocess.run([*command, *(["-j", jobs] if jobs else [])], check=False)
        if result.returncode:
            sys.exit("fused_resnet: the C++ sources did not compile; the compiler's messages are above")
        shutil.copyfile(library, target)


if __name__ == "__main__":  # the tests import this file for its sources and flags
    setup(
        ext_modules=[Extension("fused_resnet._cpu", sources=list(SOURCES))],
        cmdclass={"build_ext": NinjaBuild},
    )
