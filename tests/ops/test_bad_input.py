"""Bad input: each wrong call gives the error and the sentence of ``testing.ERROR_CALLS``, before any work; then a valid call works.

What is trusted: the table, which the documentation quotes. "Before any work" means that nothing was allocated.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from _calls import CONV, PASS, allocated, run_python

import fused_resnet
from fused_resnet import reference, testing
from fused_resnet.testing.errors import valid_arguments

pytestmark = pytest.mark.usefixtures("one_thread", "integers_stay_exact")
ERRORS = (TypeError, ValueError)


def names(call: testing.ErrorCall) -> str:
    return f"{call.operator}: {call.name}"


CALLS = testing.ERROR_CALLS
CONV_CALLS = [call for call in CALLS if call.operator == "conv_bias_add_relu"]
# torch.ops takes True for 1 and 2.0 for 2, and knows no padding='same'.
RAW_CALLS = [c for c in CALLS if not c.name.endswith(("as a bool", "as a float")) and c.name != "padding='same' with a stride"]


def valid_call_works(operator: str) -> None:
    arguments = valid_arguments(operator)
    ours = getattr(fused_resnet, operator)(**arguments)
    result = testing.compare_exact(ours, getattr(reference, operator)(**arguments))
    assert result, result.reason


@pytest.mark.smoke
@pytest.mark.parametrize("call", CALLS, ids=names)
def test_error(call: testing.ErrorCall, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = call.arguments()
    function = getattr(fused_resnet, call.operator)
    with pytest.raises(ERRORS) as caught:
        function(**arguments)
    assert (type(caught.value), str(caught.value)) == (call.error, call.message)

    valid_call_works(call.operator)
    assert capfd.readouterr() == ("", ""), "an error is raised, never printed"

    def again() -> None:  # under the profiler, which makes it take the dispatcher's way
        with pytest.raises(ERRORS) as caught:
            function(**arguments)
        assert (type(caught.value), str(caught.value)) == (call.error, call.message)

    assert not allocated(again), "memory was allocated before the error"
    valid_call_works(call.operator)


@pytest.mark.parametrize("call", CALLS, ids=names)
def test_error_with_gradients_wanted(call: testing.ErrorCall) -> None:
    arguments = {
        name: t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() and not t.is_quantized else t
        for name, t in call.arguments().items()
    }
    with pytest.raises(ERRORS) as caught:
        getattr(fused_resnet, call.operator)(**arguments)
    assert (type(caught.value), str(caught.value)) == (call.error, call.message)


@pytest.mark.parametrize("call", CONV_CALLS, ids=names)
def test_error_of_why_not(call: testing.ErrorCall) -> None:
    with pytest.raises(ERRORS) as caught:
        fused_resnet.why_not(**call.arguments())
    assert (type(caught.value), str(caught.value)) == (call.error, call.message)


def test_names_and_numbers_of_arguments() -> None:
    """Python's own errors: an unknown name, too few and too many arguments."""
    valid = valid_arguments()
    for call in (
        lambda: fused_resnet.conv_bias_add_relu(valid["input"]),
        lambda: fused_resnet.conv_bias_add_relu(**valid, strides=1),
        lambda: fused_resnet.bias_add_relu(),
        lambda: fused_resnet.bias_add_relu(*[valid["input"]] * 5),
    ):
        with pytest.raises(TypeError, match="argument"):
            call()
    valid_call_works("conv_bias_add_relu")


@pytest.mark.parametrize("call", RAW_CALLS, ids=names)
def test_through_torch_ops(call: testing.ErrorCall) -> None:
    """The registered operator with the same tensors: an exception, whatever its words, and the process lives."""
    arguments = {"bias": None, "shortcut": None, **call.arguments()}
    tensors = [arguments[name] for name in ("input", "weight", "bias", "shortcut") if name in arguments]
    if call.operator == "bias_add_relu":
        refused = [lambda: PASS(*tensors, True)]
    else:

        def both(value: Any) -> Any:
            return (value, value) if isinstance(value, int) else value

        stride, dilation = (both(arguments.get(name, 1)) for name in ("stride", "dilation"))
        padding = both(arguments.get("padding", 0))
        padding = (padding[0], padding[0], *padding[1:2], *padding[1:]) if isinstance(padding, tuple) else padding
        refused = [lambda: CONV(*tensors, stride, padding, dilation, arguments.get("groups", 1), True)]
    for one in refused:
        with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
            one()
    valid_call_works(call.operator)


def test_numbers_through_torch_ops() -> None:
    """Strides, paddings and dilations that the public function would never pass on, on both paths, fake and real."""
    arguments = valid_arguments()
    x, w, b = arguments["input"], arguments["weight"], arguments["bias"]
    bad = [
        ((0, 1), (1, 1, 1, 1), (1, 1), 1),
        ((1, 0), (1, 1, 1, 1), (1, 1), 1),
        ((-1, 1), (1, 1, 1, 1), (1, 1), 1),
        ((1, 1), (-1, -1, -1, -1), (1, 1), 1),
        ((1, 1), (1, -1, 1, 1), (1, 1), 1),
        ((1, 1), (1, 1, 1, -1), (1, 1), 1),
        ((1, 1), (1, 1), (1, 1), 1),
        ((1, 1), (1, 1, 1, 1, 1), (1, 1), 1),
        ((1, 1), (1, 1, 1, 1), (0, 1), 1),
        ((1, 1), (1, 1, 1, 1), (1, -1), 1),
        ((1, 1), (1, 1, 1, 1), (1, 1), 0),
        ((1, 1), (1, 1, 1, 1), (1, 1), -1),
        ((1, 1), (1, 1, 1, 1), (1, 1), 3),
        ((1, 1), (1, 1, 1, 1), (2**62, 1), 1),  # the kernel does not fit
    ]
    accepted = []
    for numbers, device, groups in itertools.product(bad, ("cpu", "meta"), (1, 2)):
        tensors = (x.to(device), w[:, : 4 // groups].to(device), b.to(device))
        stride, padding, dilation, of_case = numbers
        try:
            CONV(*tensors, None, stride, padding, dilation, groups if of_case == 1 else of_case, True)
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            pass
        except ArithmeticError as error:
            accepted.append((*numbers, device, groups, repr(error)))
        else:
            accepted.append((*numbers, device, groups, "no error"))
    assert not accepted, "\n".join(map(str, accepted))
    # Sizes beyond 64 bits: an overflow is an error, not a wrapped index.
    for stride, padding in (((1, 1), 2**62), ((2**62, 1), 2**62), ((1, 1), 2**40)):
        for groups in (1, 2):
            with pytest.raises((ValueError, TypeError, RuntimeError, OverflowError)):
                CONV(x, w[:, : 4 // groups], b, None, stride, (padding, padding, padding, padding), (1, 1), groups, True)
    valid_call_works("conv_bias_add_relu")


def test_relu_backward_checks_its_operands() -> None:
    """The third operator takes pointers too: operands that do not belong together must not be read."""
    output = torch.ones(2, 8, 6, 6)
    assert torch.ops.fused_resnet.relu_backward(output, output, True)[1].tolist() == [72.0] * 8
    wrong = {
        "grad of another shape": (torch.ones(1, 8, 6, 6), output),
        "grad of another rank": (torch.ones(8, 6, 6), output),
        "grad of another dtype": (torch.ones(2, 8, 6, 6, dtype=torch.bfloat16), output),
        "meta grad": (torch.ones(2, 8, 6, 6, device="meta"), output),
        "meta output": (torch.ones(2, 8, 6, 6), output.to("meta")),
        "integers": (output.int(), output.int()),
        "rank 3": (output[0], output[0]),
    }
    accepted = []
    for what, operands in wrong.items():
        for bias_grad in (True, False):
            try:
                torch.ops.fused_resnet.relu_backward(*operands, bias_grad)
            except ERRORS:
                continue
            except Exception as error:
                accepted.append(f"{what}: {type(error).__name__}: {str(error)[:80]}")
            else:
                accepted.append(f"{what}: no error")
    assert not accepted, "\n".join(accepted)


ISA_AND_BACKEND = [pytest.param(call, id=f"{call.variable}={call.value}") for call in testing.ENVIRONMENT_ERRORS]


@pytest.mark.parametrize("call", ISA_AND_BACKEND)
def test_environment(call: testing.EnvironmentCall, kernels: ModuleType) -> None:
    done = run_python("import fused_resnet", **{call.variable: call.value})
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: " + call.begins)
    assert last.endswith(call.ends)
    if call.variable == "FUSED_RESNET_ISA":
        for isa in kernels.available_isas():
            assert isa in last, "the error names the choices"


def test_unknown_instruction_set(kernels: ModuleType) -> None:
    before = kernels.isa()
    with pytest.raises(ValueError, match=r"must be one of scalar.*got 'mmx'"):
        kernels.set_isa("mmx")
    assert kernels.isa() == before


WITHOUT_MODULE = """
import pathlib, warnings
real = pathlib.Path.is_file
pathlib.Path.is_file = lambda path: not path.name.startswith("_cpu.") and real(path)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fused_resnet
    import torch
    from fused_resnet import reference
    for _ in range(3):
        x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
        w, b, s = torch.randn(6, 4, 3, 3), torch.randn(6), torch.randn(2, 6, 6, 6)
        y = fused_resnet.conv_bias_add_relu(x, w, b, s, padding=1)
        z = reference.conv_bias_add_relu(x, w, b, s, padding=1)
        assert torch.equal(torch.isnan(y), torch.isnan(z)) and torch.allclose(y, z, atol=1e-5)
        assert y.stride() == torch.nn.functional.conv2d(x, w, b, padding=1).stride()
        ours, theirs = (torch.autograd.grad(t.sum(), x)[0] for t in (y, z))
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert torch.equal(fused_resnet.bias_add_relu(s, b, s), reference.bias_add_relu(s, b, s))
        with torch.no_grad():
            w.mul_(2)
            assert torch.allclose(fused_resnet.conv_bias_add_relu(x, w, b, s, padding=1),
                                  reference.conv_bias_add_relu(x, w, b, s, padding=1), atol=1e-4)
    why = fused_resnet.why_not(x, w, b, s, padding=1)
    try:
        fused_resnet.conv_bias_add_relu(x, w, b[:3], s, padding=1)
    except ValueError as error:
        print(error)
ours = [w for w in caught if "fused_resnet" in str(w.message)]
print(len(ours), ours[0].category.__name__, ours[0].message)
print(why)
"""


def test_without_the_compiled_module() -> None:
    """The package imports, warns once, and computes through the reference; errors stay the same."""
    done = run_python(WITHOUT_MODULE)
    assert done.returncode == 0, done.stderr[-3000:]
    error, warning, why = done.stdout.strip().splitlines()
    assert error == "bias must have one value for each of the 6 output channels, got 3"
    assert warning.startswith("1 RuntimeWarning fused_resnet computes through its plain PyTorch reference")
    assert "not installed" in why


def test_backend_reference(kernels: ModuleType) -> None:
    """FUSED_RESNET_BACKEND=reference turns the kernels off, says so when asked, and warns of nothing."""
    code = """
import torch, fused_resnet
from fused_resnet import _extension, reference
x, w = torch.randn(1, 4, 6, 6), torch.randn(6, 4, 3, 3)
assert _extension.cpu is None
assert torch.equal(fused_resnet.conv_bias_add_relu(x, w), reference.conv_bias_add_relu(x, w))
print(fused_resnet.why_not(x, w))
"""
    done = run_python(code, FUSED_RESNET_BACKEND="reference")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FUSED_RESNET_BACKEND=reference" in done.stdout
    assert "Warning" not in done.stderr


def test_a_module_of_another_interface(kernels: ModuleType) -> None:
    """A compiled module from another version is refused with a warning that says what to do."""
    code = """
import importlib.util
import torch
real = importlib.util.module_from_spec
def other(spec):
    module = real(spec)
    if spec.name == "fused_resnet._cpu":
        exec_module = spec.loader.exec_module
        def run(m):
            exec_module(m)
            m.INTERFACE = -1
        spec.loader.exec_module = run
    return module
importlib.util.module_from_spec = other
import fused_resnet
from fused_resnet import _extension
assert _extension.cpu is None
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "another version of this package (interface -1" in done.stderr


def test_parameters_of_the_operator_are_no_call_s() -> None:
    """Four numbers of padding are legal for ``torch.ops`` alone, also right after they were seen there."""
    x, w = torch.ones(1, 4, 6, 6), torch.ones(4, 4, 3, 3)
    for _ in range(2):
        torch.ops.fused_resnet.conv_bias_add_relu(x, w, None, None, (1, 1), (1, 1, 1, 1), (1, 1), 1, True)
        with pytest.raises(ValueError, match="padding must be an int or a pair of ints, got 4 numbers"):
            fused_resnet.conv_bias_add_relu(x, w, None, None, (1, 1), (1, 1, 1, 1), (1, 1))
        fused_resnet.conv_bias_add_relu(x, w, None, None, (1, 1), (1, 1), (1, 1))
        with pytest.raises(ValueError, match="padding must have 4 numbers, got 2"):
            torch.ops.fused_resnet.conv_bias_add_relu(x, w, None, None, (1, 1), (1, 1), (1, 1), 1, True)


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_an_output_that_cannot_be_counted(wants_gradient: bool) -> None:
    for device, channels in itertools.product(("cpu", "meta"), (2**62, 2**61, 2**56)):
        x = torch.ones(2, 1, 4, 4, requires_grad=wants_gradient, device=device)
        weight = torch.ones(1, 1, 1, 1, device=device).expand(channels, 1, 1, 1)
        for function in (fused_resnet.conv_bias_add_relu, fused_resnet.why_not):
            with pytest.raises(ValueError, match=r"the output must have fewer than 2\*\*63 bytes, got the shape \[2, "):
                function(x, weight)
