"""What the tests, ``fused-resnet check`` and the benchmarks share: data, comparisons, devices, bad calls, gradient cases.

===============  ======================================================================================
``data``         integer and float operands of a case; memory layouts of an operand
``compare``      comparisons with a reason when they fail, and tolerances as formulas
``devices``      the same data on another device
``errors``       the one table of wrong calls and the sentence each must give
``gradients``    inputs for gradcheck and gradgradcheck
===============  ======================================================================================
"""

from .compare import (
    Comparison,
    compare_exact,
    compare_forward,
    compare_gradients,
    compare_tensors,
    error_scale,
    norm_error,
    relative_error,
    tf32_allowed,
    truth_and_peer,
)
from .data import LAYOUTS, MAGNITUDE, float_operands, integer_operands, layout, unit_gradient
from .devices import library, moved, on
from .errors import ENVIRONMENT_ERRORS, ERROR_CALLS, EnvironmentCall, ErrorCall
from .gradients import GradientCase, gradient_cases

__all__ = [
    "ENVIRONMENT_ERRORS",
    "ERROR_CALLS",
    "LAYOUTS",
    "MAGNITUDE",
    "Comparison",
    "EnvironmentCall",
    "ErrorCall",
    "GradientCase",
    "compare_exact",
    "compare_forward",
    "compare_gradients",
    "compare_tensors",
    "error_scale",
    "float_operands",
    "gradient_cases",
    "integer_operands",
    "layout",
    "library",
    "moved",
    "norm_error",
    "on",
    "relative_error",
    "tf32_allowed",
    "truth_and_peer",
    "unit_gradient",
]
