"""The peers that are not torch: ONNX Runtime, OpenVINO, ncnn, MNN, each with the settings that serve it best in float32.

Each gets the input as contiguous NCHW, in memory that it reads without a copy where it can (all but MNN), and leaves its output
where it computes it; reading that out as a tensor is not timed. Models are exported once for each case, into the folder that all
processes share.
"""

from __future__ import annotations

import copy
import importlib
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._plain import PadShortcut
from .contest import Task
from .worker import Built


def _names(task: Task) -> list[str]:
    """Of the inputs; those that pnnx gives. The output is "out0"."""
    return [f"in{i}" for i in range(len(task.inputs))]


def _float(task: Task) -> tuple[nn.Module, tuple[Tensor, ...]]:
    module = copy.deepcopy(task.module).float().eval().requires_grad_(False)
    return module, tuple(t.float().contiguous() for t in task.inputs)


def _arrays(task: Task) -> list[Any]:
    """The inputs as numpy arrays."""
    return [t.numpy() for t in _float(task)[1]]


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _onnx(task: Task, folder: Path) -> str:
    """The case's file for ONNX Runtime, OpenVINO and MNN; whoever comes first writes it."""
    path = folder / "model.onnx"
    if not path.exists():
        module, inputs = _float(task)
        unfinished = folder / "unfinished.onnx"
        torch.onnx.export(
            module, inputs, str(unfinished), input_names=_names(task), output_names=["out0"], dynamo=True, external_data=False, verbose=False
        )
        unfinished.rename(path)
    return str(path)


def onnxruntime(task: Task, threads: int, folder: Path) -> Built:
    """All optimisations; input and output bound to memory. Its threads spin between calls, as is its default."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(_onnx(task, folder), options, providers=["CPUExecutionProvider"])
    binding, run = session.io_binding(), ort.RunOptions()
    # ORT does not hold on to the arrays: the closure does.
    inputs = [ort.OrtValue.ortvalue_from_numpy(array) for array in _arrays(task)]
    for name, value in zip(_names(task), inputs, strict=True):
        binding.bind_ortvalue_input(name, value)
    output = ort.OrtValue.ortvalue_from_shape_and_type(session.get_outputs()[0].shape, np.float32)
    binding.bind_ortvalue_output("out0", output)

    def call() -> list[Any]:
        session.run_with_iobinding(binding, run)
        return inputs

    return Built(call, lambda _: (_tensor(output.numpy()),))


def openvino(task: Task, threads: int, folder: Path) -> Built:
    """Precision as the task has it (by itself it takes bfloat16 where the processor has it); one stream, for latency."""
    ov = importlib.import_module("openvino")
    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if task.dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(_onnx(task, folder)), "CPU", settings).create_infer_request()
    arrays = _arrays(task)
    for name, array in zip(_names(task), arrays, strict=True):
        request.set_tensor(name, ov.Tensor(array, shared_memory=True))

    def call() -> list[Any]:
        request.infer(share_inputs=True, share_outputs=True)
        return arrays

    # To the task's dtype, in which results are compared: one more rounding, as a bfloat16 output has it.
    return Built(call, lambda _: (_tensor(request.get_output_tensor().data).to(task.dtype),))


class _Subsample(nn.Module):
    """PadShortcut in operators that pnnx can translate (it knows no slices with a step): a 1x1 window takes single pixels."""

    def __init__(self, old: PadShortcut) -> None:
        super().__init__()
        self.extra, self.stride = old.extra, old.stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(F.max_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.extra))


def ncnn(task: Task, threads: int, folder: Path) -> Built:
    """Without its low-precision options. A call takes one image after the other, as its networks do."""
    library = importlib.import_module("ncnn")
    module, inputs = _float(task)
    holder = nn.Sequential(module) if len(inputs) == 1 else module
    for parent in list(holder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PadShortcut):
                setattr(parent, name, _Subsample(child))
    images = [tuple(t[i : i + 1].contiguous() for t in inputs) for i in range(len(inputs[0]))]
    torch.jit.trace(holder, images[0]).save(str(folder / "ncnn.pt"))
    shapes = ",".join("[{}]f32".format(",".join(map(str, t.shape))) for t in images[0])
    # The program itself: its Python wrapper runs the model that it writes once more, and hides what went wrong.
    program = Path(sysconfig.get_path("scripts")) / "pnnx"
    command = [str(program), "ncnn.pt", f"inputshape={shapes}", "fp16=0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"pnnx could not translate the model: {(done.stderr or done.stdout).strip()[-200:]}")
    net = library.Net()
    net.opt.num_threads = threads
    for option in dir(net.opt):
        if option.startswith(("use_fp16", "use_bf16", "use_int8", "use_vulkan")):
            setattr(net.opt, option, False)
    if net.load_param(str(folder / "ncnn.ncnn.param")) or net.load_model(str(folder / "ncnn.ncnn.bin")):
        raise RuntimeError("ncnn could not load the model that pnnx wrote")
    mats = [[library.Mat(t[0].numpy()) for t in image] for image in images]

    def call() -> list[Any]:
        outputs = []
        for image in mats:
            extractor = net.create_extractor()
            for i, mat in enumerate(image):
                extractor.input(f"in{i}", mat)
            outputs.append(extractor.extract("out0")[1])
        return outputs

    def results(outputs: list[Any]) -> tuple[Tensor]:
        assert images  # whose memory the mats share
        return (torch.stack([_tensor(output) for output in outputs]),)

    return Built(call, results)


def mnn(task: Task, threads: int, folder: Path, tiles: int | None = None) -> Built:
    """Precision high. ``tiles``: how large the tiles of Winograd may be (its hint WINOGRAD_MEMORY_LEVEL; None: its default)."""
    library = importlib.import_module("MNN")
    path = folder / "model.mnn"
    if not path.exists():
        # The compiled part of `mnnconvert`. Its Python part, MNN.tools, installs a package with pip and reports to a server.
        converter = importlib.import_module("_tools")
        converter.mnnconvert(
            ["mnnconvert", "-f", "ONNX", "--modelFile", _onnx(task, folder), "--MNNModel", str(path), "--bizCode", "bench"]
        )
    interpreter = library.Interpreter(str(path))
    if tiles is not None:
        interpreter.setSessionHint(3, tiles)  # 3: WINOGRAD_MEMORY_LEVEL
    session = interpreter.createSession({"numThread": threads, "precision": "high", "backend": "CPU"})
    targets = interpreter.getSessionInputAll(session)
    arrays = _arrays(task)
    for name, array in zip(_names(task), arrays, strict=True):
        interpreter.resizeTensor(targets[name], tuple(array.shape))
    interpreter.resizeSession(session)
    # A session uses the memory of its inputs for other things once it has read them, so every call fills them.
    copies = [
        (targets[name], library.Tensor(tuple(array.shape), library.Halide_Type_Float, array, library.Tensor_DimensionType_Caffe))
        for name, array in zip(_names(task), arrays, strict=True)
    ]
    output = interpreter.getSessionOutput(session)

    def call() -> list[Any]:
        for target, host in copies:
            target.copyFrom(host)
        interpreter.runSession(session)
        return arrays

    def results(_: Any) -> tuple[Tensor]:
        shape = output.getShape()
        host = library.Tensor(shape, library.Halide_Type_Float, np.zeros(shape, np.float32), library.Tensor_DimensionType_Caffe)
        output.copyToHostTensor(host)
        return (_tensor(host.getNumpyData()).reshape(shape),)

    return Built(call, results)


def mnn_exact(task: Task, threads: int, folder: Path) -> Built:
    return mnn(task, threads, folder, tiles=1)
