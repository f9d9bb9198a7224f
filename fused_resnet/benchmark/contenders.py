"""The table of contenders: eager PyTorch, ours, and the peers; what each needs, and what it is left out of."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass

EXTRA = 'pip install "fused-resnet[bench]"'


@dataclass(frozen=True)
class Contender:
    """``builder``: the function, as module:name, that builds it in a process of its own (see ``worker.Built``).

    ``modules``: what it imports, and ``packages``: what they are called on PyPI. ``dtypes``: what it is timed in.
    ``torch``: it takes any mode, and can be called in the process that asks.
    """

    label: str
    builder: str
    modules: tuple[str, ...] = ()
    packages: str = ""
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    torch: bool = True


_TORCH = "fused_resnet.benchmark.torch_contenders"
_PEERS = "fused_resnet.benchmark.peers"
_ONNX = ("onnx", "onnxscript")  # through which torch.onnx exports

CONTENDERS: dict[str, Contender] = {
    "eager": Contender("eager", f"{_TORCH}:eager"),
    "channels_last": Contender("eager, channels_last", f"{_TORCH}:channels_last"),
    "compile": Contender("torch.compile", f"{_TORCH}:compiled"),
    "onnxruntime": Contender(
        "ONNX Runtime", f"{_PEERS}:onnxruntime", ("onnxruntime", *_ONNX), "onnxruntime onnx onnxscript", ("float32",), False
    ),
    "openvino": Contender(
        "OpenVINO", f"{_PEERS}:openvino", ("openvino", *_ONNX), "openvino onnx onnxscript", ("float32", "bfloat16"), False
    ),
    "ncnn": Contender("ncnn", f"{_PEERS}:ncnn", ("ncnn", "pnnx"), "ncnn pnnx", ("float32",), False),
    "mnn": Contender("MNN", f"{_PEERS}:mnn", ("MNN", "_tools", *_ONNX), "MNN onnx onnxscript", ("float32",), False),
    # MNN's default tiles of Winograd reach errors of 1e-3; the smaller ones are the fastest of it with float32's accuracy.
    "mnn_exact": Contender(
        "MNN, smaller tiles", f"{_PEERS}:mnn_exact", ("MNN", "_tools", *_ONNX), "MNN onnx onnxscript", ("float32",), False
    ),
    "fused": Contender("ours", f"{_TORCH}:fused"),
    "fused_channels_last": Contender("ours, channels_last", f"{_TORCH}:fused_channels_last"),
}
EAGER = ("eager", "channels_last")
OURS = ("fused", "fused_channels_last")


def peers() -> list[str]:
    """All but ours, in the order of the table."""
    return [name for name in CONTENDERS if name not in OURS]


def missing(name: str) -> str:
    """Why this contender cannot run here, or ''."""
    if name == "compile" and not any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++")):
        return "torch.compile needs a C++ compiler and there is none on the path"
    contender = CONTENDERS[name]
    if any(importlib.util.find_spec(module) is None for module in contender.modules):
        return f"it needs packages that are not installed: pip install {contender.packages}, or {EXTRA}"
    return ""


def unsuitable(name: str, dtype: str, mode: str) -> str:
    """Why this contender has no part in a contest of this kind, or ''."""
    contender = CONTENDERS[name]
    if mode != "forward" and not contender.torch:
        return "it has no backward pass here"
    if dtype not in contender.dtypes:
        return f"it is not timed in {dtype}"
    return ""


def remarks(dtype: str, mode: str) -> list[str]:
    """Sentences on the contenders that are left out: those that are not installed, and those that do not suit."""
    absent = [name for name in CONTENDERS if missing(name)]
    packages = dict.fromkeys(word for name in absent for word in CONTENDERS[name].packages.split())
    found = []
    if packages:
        names = ", ".join(name for name in absent if name != "compile")
        found.append(f"left out because they are not installed: {names} (pip install {' '.join(packages)}, or {EXTRA})")
    if "compile" in absent:
        found.append(f"torch.compile was left out: {missing('compile')}")
    unfit = [name for name in CONTENDERS if name not in absent and unsuitable(name, dtype, mode)]
    if unfit:
        why = "which have no backward pass here" if mode != "forward" else f"which are not timed in {dtype}"
        found.append(f"left out: {', '.join(unfit)}, {why}")
    if dtype == "bfloat16" and mode == "forward" and not missing("openvino"):
        found.append(
            "OpenVINO gets the model and the input in float32 and converts inside (INFERENCE_PRECISION_HINT=bf16), as its users have it"
        )
    return found
