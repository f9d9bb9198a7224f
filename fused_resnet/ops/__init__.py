"""The operators: ``api.py`` is what users call.

A call goes ``api`` -> ``plans`` (the plan for such a call) -> the plan, of ``cpu``, ``cuda`` or ``general``; what that derives from weights is
made by ``derived`` and kept in a ``store``. Where autograd, autocast, torch.compile or a mode has to see it, the dispatcher is asked in
between: ``schema``, ``registration``, ``autograd``; in a step of training ``functions`` goes forward and backward. What a call is given is
a ``spec``; which way it takes, and why, is ``select``'s.
"""

from . import registration  # noqa: F401  for what it does: the operators are there before anybody can call them
from .api import bias_add_relu, conv_bias_add_relu, why_not

__all__ = ["bias_add_relu", "conv_bias_add_relu", "why_not"]
