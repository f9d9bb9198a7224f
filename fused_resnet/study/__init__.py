"""The lesson "why do residual networks work?" as experiments that run: ``python -m fused_resnet study``.

One experiment a file, whose docstring states the claim, its source and what would refute it. Each has ``tasks(settings)``, the
runs that it is made of; ``perform(data, **parameters)``, one run; ``report(runs, settings)``, what they say; ``draw(...)``, its pictures.
"""

from __future__ import annotations

from types import ModuleType

from . import decay, depth, gradients, identity, shortcut

EXPERIMENTS: dict[str, ModuleType] = {
    "depth": depth,
    "identity": identity,
    "decay": decay,
    "shortcut": shortcut,
    "gradients": gradients,
}
