"""Faults in the gradients of convolutions. ``faults.py`` plants them."""

from __future__ import annotations

from .fault import Fault

GRADIENT = "tests/kernels/test_input_gradient.py"
AWKWARD = f"{GRADIENT}::test_awkward"
GUARD_BYTES = "tests/kernels/test_memory.py::test_memory[guard bytes]"
CPP = ("csrc/cpu/input_gradient.cpp",)
OPERATOR = "tests/ops/test_gradients.py"
TRAINING = "tests/runtime/test_training.py"

FAULTS = (
    Fault(
        "input gradient: the kernel is not turned round, contiguous weights",
        ("csrc/cpu/packing.h",),
        "backwards ? taps - 1 - e : e); }",
        "e); }",
        (AWKWARD,),
    ),
    Fault(
        "input gradient: a residue's pixels begin at the row's first",
        CPP,
        "part.y = row * shape.x.h + column * shape.x.w;",
        "part.y = row * shape.x.h;",
        (AWKWARD,),
    ),
    Fault(
        "input gradient: every tap rather than every other",
        CPP,
        "-step_h * weight.h, -step_w * weight.w};",
        "-step_h * weight.h, -weight.w};",
        (AWKWARD,),
    ),
    Fault(
        "input gradient: dy is read from its first pixel, whatever the padding",
        CPP,
        "a.skip = std::max<i64>(under, 0);",
        "a.skip = 0;",
        (AWKWARD,),
    ),
    Fault(
        "input gradient: the first tap that meets the residue is forgotten",
        CPP,
        "while (tap < step && (first + pad - tap * dilation) % stride != 0) ++tap;",
        "while (tap + 1 < step && (first + pad - tap * dilation) % stride != 0) ++tap;",
        (AWKWARD,),
    ),
    Fault(
        "input gradient: no zeros where no window touches",
        CPP,
        "zero(index, operands.y);",
        "",
        (GUARD_BYTES,),
    ),
    Fault(
        "input gradient: the last rows of zeros are left out",
        CPP,
        "const i64 per_image = (s.h + zero_rows_ - 1) / zero_rows_, begin",
        "const i64 per_image = (s.h + zero_rows_ - 1) / zero_rows_; s.h > 1 ? --const_cast<i64&>(s.h) : 0; const i64 begin",
        (GUARD_BYTES,),
    ),
    Fault(
        "input gradient: two parts pack into the same memory",
        CPP,
        "part.shared_at = shared_bytes_;",
        "part.shared_at = 0;",
        (GUARD_BYTES,),
    ),
    Fault(
        "input gradient: a Winograd that is not finite is kept",
        ("fused_resnet/ops/cpu.py",),
        "if self.kernel.run(g, w, result.data_ptr()) or ",
        "if self.kernel.run(g, w, result.data_ptr()) is not None or ",
        (f"{GRADIENT}::test_special_values",),
    ),
    Fault(
        "input gradient: zeros around dy meet a weight that is not finite",
        ("csrc/cpu/fresh_convolution.cpp",),
        "any_weight_(!of_gradient && convolution_->choice()",
        "any_weight_(convolution_->choice()",
        (f"{GRADIENT}::test_a_weight_that_is_not_finite",),
    ),
    Fault(
        "input gradient: a batch that autograd hides goes to the kernel",
        ("fused_resnet/_compat.py",),
        "or _is_batched(t))",
        ")",
        (f"{OPERATOR}::test_batches_of_gradients",),
    ),
    Fault(
        "fresh weights: each chunk forgets the channels before it",
        ("csrc/cpu/winograd_convolution.cpp",),
        "a.more = first > 0;",
        "a.more = false;",
        (f"{GRADIENT}::test_many_channels", GUARD_BYTES),
    ),
    Fault(
        "fresh weights: every chunk is made of the first channels",
        ("csrc/cpu/winograd_convolution.cpp",),
        "w.weight = element(operands.fresh.data, first * group * operands.fresh.stride.c);",
        "w.weight = operands.fresh.data;",
        (f"{GRADIENT}::test_many_channels", GUARD_BYTES),
    ),
    Fault(
        "fresh weights: no room for the last chunk",
        ("csrc/cpu/winograd_convolution.cpp",),
        "return align64(blocking_.positions() * blocking_.chunk * blocking_.cut.channels * kernels_->accumulator_bytes);",
        "return align64(blocking_.positions() * (blocking_.chunk - 1) * blocking_.cut.channels * kernels_->accumulator_bytes);",
        (GUARD_BYTES,),
    ),
    Fault(
        "packing: a piece of channels is left out",
        ("csrc/cpu/convolution.cpp",),
        "(shape_.c + kPackChannels - 1) / kPackChannels",
        "std::max<i64>(shape_.c / kPackChannels, 1)",
        (AWKWARD, "tests/kernels/test_exact.py::test_awkward_convolutions"),
    ),
    Fault(
        "input gradient: of the memory format of dy, whatever the input's",
        ("fused_resnet/ops/autograd.py",),
        "channels_last = ctx.input_format is torch.channels_last",
        "channels_last = is_channels_last(masked)",
        (f"{OPERATOR}::test_memory_formats_are_eagers",),
    ),
    Fault(
        "input gradient: a second derivative through a kernel that has none",
        ("fused_resnet/ops/autograd.py",),
        "if needs_grad(grad, weight) or has_tangent(grad, weight):",
        "if has_tangent(grad, weight):",
        (f"{OPERATOR}::test_gradgradcheck_every_element",),
    ),
    Fault(
        "the library's input gradient with uneven padding: not cut",
        ("fused_resnet/ops/gradients.py",),
        "padding.left : padding.left + width]",
        "0 : width]",
        (f"{OPERATOR}::test_exact_integer_gradients", f"{OPERATOR}::test_gradients_that_are_differentiated_further"),
    ),
    Fault(
        "input gradient: its plan is found whatever the padding",
        ("fused_resnet/ops/plans.py",),
        "*(input_size, channels_last, geometry, backend.state(grad, weight), _settings.number),",
        "*(input_size, channels_last, geometry[0], geometry[2:], backend.state(grad, weight), _settings.number),",
        (f"{GRADIENT}::test_one_size_many_paddings",),
    ),
    Fault(
        "training: a weight that is trained is packed and kept",
        ("fused_resnet/ops/autograd.py",),
        "if trains_weight and isinstance(plan, CpuPlan)",
        "if False",
        (f"{TRAINING}::test_nothing_of_a_trained_weight_is_kept",),
    ),
    Fault(
        "training: a Winograd that is not finite is kept",
        ("fused_resnet/ops/cpu.py",),
        "if not self._fresh(False).run(x, w, b, s, output.data_ptr()):",
        "if self._fresh(False).run(x, w, b, s, output.data_ptr()) is None:",
        (f"{TRAINING}::test_once_with_special_values",),
    ),
    Fault(
        "training: packing counts in the choice of the algorithm, so that training computes other bits",
        ("csrc/cpu/fresh_convolution.cpp",),
        "request.fresh = of_gradient;",
        "request.fresh = true;",
        (f"{TRAINING}::test_once",),
    ),
    Fault(
        "training: what the two phases share lies over the packed weight",
        ("csrc/cpu/fresh_convolution.cpp",),
        "return convolution_->run_task(phase - 1, index, packed, shared + shared_at_, mine);",
        "return convolution_->run_task(phase - 1, index, packed, shared, mine);",
        (f"{TRAINING}::test_once",),
    ),
    Fault(
        "training: a convolution in front of a live norm loses its bias",
        ("fused_resnet/runtime/executor.py",),
        "conv_bias_add_relu(x, weight, conv.bias, None, conv.stride, conv.padding, conv.dilation, conv.groups, False)",
        "conv_bias_add_relu(x, weight, None, None, conv.stride, conv.padding, conv.dilation, conv.groups, False)",
        (f"{TRAINING}::test_a_bias_before_a_live_norm",),
    ),
    Fault(
        "training: every 3x3 convolution is ours, however small",
        ("fused_resnet/ops/select.py",),
        "return n * h * w >= _TRAINED_PIXELS and (h * w >= _TRAINED_MAP or n * h * w * channels * outputs >= _TRAINED_PRODUCTS)",
        "return True",
        (f"{TRAINING}::test_whose_convolutions",),
    ),
)
