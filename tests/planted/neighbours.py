"""Faults in what a convolution's gradient ends with, in who relies on that, and in the passes that are left. ``faults.py`` plants them."""

from __future__ import annotations

from .fault import Fault

GRADIENT = "tests/kernels/test_input_gradient.py"
ENDS = f"{GRADIENT}::test_ends"
GUARD_BYTES = "tests/kernels/test_memory.py::test_memory[guard bytes]"
CPP = ("csrc/cpu/input_gradient.cpp",)
NEIGHBOURS = "tests/runtime/test_neighbours.py"

FAULTS = (
    Fault(
        "input gradient: its end begins at the row's first pixel, whatever the residue",
        CPP,
        "part.shortcut = row * shape.shortcut.h + column * shape.shortcut.w;",
        "part.shortcut = row * shape.shortcut.h;",
        (ENDS,),
    ),
    Fault(
        "input gradient: its end lies as the gradient does",
        CPP,
        "shape.shortcut.h * shape.stride_h, shape.shortcut.w * shape.stride_w};",
        "shape.x.h * shape.stride_h, shape.x.w * shape.stride_w};",
        (ENDS,),
    ),
    Fault(
        "input gradient: what is added is not, where no window touches a pixel",
        CPP,
        "const bool adds = s.has_shortcut && !s.masked,",
        "const bool adds = false,",
        (ENDS,),
    ),
    Fault(
        "input gradient: the mask is added, Winograd, channels_last",
        ("csrc/cpu/winograd.h",),
        "l * a.shortcut_stride.w), a.masked);",
        "l * a.shortcut_stride.w), false);",
        (ENDS,),
    ),
    Fault(
        "input gradient: the mask is added, Winograd, contiguous",
        ("csrc/cpu/winograd.h",),
        "load_steps<V>(shortcut, a.shortcut_stride.w, pixels), a.masked);",
        "load_steps<V>(shortcut, a.shortcut_stride.w, pixels), false);",
        (ENDS,),
    ),
    Fault(
        "input gradient: the mask is added, contiguous",
        ("csrc/cpu/direct.h",),
        "with_shortcut<V>(value, V::load_n(shortcut, pixels), a.masked);",
        "with_shortcut<V>(value, V::load_n(shortcut, pixels), false);",
        (ENDS,),
    ),
    Fault(
        "gradients: where the direct one stands in, nothing ends it",
        ("fused_resnet/ops/cpu.py",),
        'backend.gradient(operand, spec, "direct", masked)',
        'backend.gradient(operand, spec, "direct")',
        (f"{GRADIENT}::test_ends_of_special_values",),
    ),
    Fault(
        "gradients: the library's has no end",
        ("fused_resnet/ops/gradients.py",),
        "        if end is not None:\n            found",
        "        if False:\n            found",
        (f"{GRADIENT}::test_ends_by_the_library",),
    ),
    Fault(
        "gradients: their plan is found whatever the end's strides",
        ("fused_resnet/ops/plans.py",),
        "(end.shape, end.stride(), end.dtype, end.is_cpu, masked)",
        "(end.shape, end.dtype, end.is_cpu, masked)",
        (f"{NEIGHBOURS}::test_one_input_many_ends",),
    ),
    Fault(
        "gradients: their plan is found whatever the end means",
        ("fused_resnet/ops/plans.py",),
        "(end.shape, end.stride(), end.dtype, end.is_cpu, masked)",
        "(end.shape, end.stride(), end.dtype, end.is_cpu)",
        (f"{NEIGHBOURS}::test_one_input_many_ends",),
    ),
    Fault(
        "neighbours: the gradient is not taken through the ReLU in front, which relies on it",
        ("fused_resnet/ops/functions.py",),
        "through = role.reads is not None",
        "through = False",
        (f"{NEIGHBOURS}::test_neighbours",),
    ),
    Fault(
        "neighbours: the gradient of the input's other reader is lost",
        ("fused_resnet/ops/functions.py",),
        "end = input if through else end",
        "end = input if through else None",
        (f"{NEIGHBOURS}::test_neighbours",),
    ),
    Fault(
        "neighbours: with no gradient of its own, the other reader's is lost",
        ("fused_resnet/ops/functions.py",),
        "return None, end, *[None] * 8",
        "return None, None, *[None] * 8",
        (f"{NEIGHBOURS}::test_a_graph_of_neighbours",),
    ),
    Fault(
        "neighbours: a ReLU masks though its reader did",
        ("fused_resnet/ops/functions.py",),
        "    if role.reads is not None:\n        role.reads.reader_masks = True\n",
        "",
        (f"{NEIGHBOURS}::test_which_neighbours",),
    ),
    Fault(
        "neighbours: a ReLU relies on its reader before there is one",
        ("fused_resnet/ops/role.py",),
        "self.reader_masks = False",
        "self.reader_masks = True",
        (f"{NEIGHBOURS}::test_neighbours", f"{NEIGHBOURS}::test_relu_in_place"),
    ),
    Fault(
        "neighbours: the input's other reader reads the input itself",
        ("fused_resnet/runtime/training.py",),
        "self._values[self._part.inputs[self._node]] = again",
        "pass",
        (f"{NEIGHBOURS}::test_nothing_is_left_to_add",),
    ),
    Fault(
        "neighbours: the input comes back where it wants no gradient",
        ("fused_resnet/runtime/training.py",),
        " and self._values[number].requires_grad",
        "",
        (f"{NEIGHBOURS}::test_which_neighbours",),
    ),
    Fault(
        "neighbours: a value with two readers counts as one's own",
        ("fused_resnet/runtime/bound.py",),
        "if readers[value] == 1 and reads[i].count(value) == 1",
        "if reads[i].count(value) == 1",
        (f"{NEIGHBOURS}::test_who_reads_what",),
    ),
    Fault(
        "neighbours: a sum may be written over what comes back",
        ("fused_resnet/runtime/bound.py",),
        "isinstance(node, BoundConvolution) and _keeps(node)",
        "isinstance(node, BoundConvolution)",
        (f"{NEIGHBOURS}::test_who_reads_what",),
    ),
    Fault(
        "a bias gradient without a ReLU: by the library, so that the sum depends on the threads",
        ("fused_resnet/ops/backend.py",),
        "if self.why_no_kernels(grad.device) or self.on_gpu:\n            return grad.sum",
        "if True:\n            return grad.sum",
        (f"{NEIGHBOURS}::test_a_bias_gradient_does_not_depend_on_the_threads",),
    ),
    Fault(
        "a bias gradient without a ReLU: behind the first pixel of a line a mask is read",
        ("csrc/cpu/pointwise.h",),
        "    if (!masks) continue;\n",
        "",
        (GUARD_BYTES,),
    ),
    Fault(
        "relu_backward: a run of memory though the operands lie otherwise",
        ("csrc/cpu/passes.cpp",),
        "!by_channel && alike(s.first, s.result) && (!has_second || alike(s.second, s.result))",
        "!by_channel && alike(s.first, s.result)",
        ("tests/kernels/test_layouts.py::test_each_operand_of_relu_backward",),
    ),
    Fault(
        "relu_backward: all runs are as long",
        ("csrc/cpu/passes.cpp",),
        "std::min(kRun, s.n * s.k * s.p * s.q - i * kRun)",
        "kRun",
        (GUARD_BYTES,),
    ),
    Fault(
        "relu_backward: pixels of a line are as far apart in the output as in the gradient",
        ("csrc/cpu/passes.cpp",),
        "a.output_pitch = s.second.w,",
        "a.output_pitch = s.first.w,",
        ("tests/kernels/test_layouts.py::test_each_operand_of_relu_backward",),
    ),
)
