"""What a run is: everything that its result depends on, but for the machine. Checkpoints hold it and are compared by it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import nn

from .. import models
from .errors import Wrong

IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclasses.dataclass(frozen=True)
class Settings:
    """``epochs`` or ``steps`` is None. ``images`` says which images: the name of a set, or a digest of a folder's."""

    model: str
    shortcut: str
    plain: bool
    norm: str
    zero_init: bool
    sync_batch_norm: bool
    images: str
    image_size: int | None
    augment: bool
    batch: int
    epochs: int | None
    steps: int | None
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    amp: str
    memory_format: str
    seed: int

    def differences(self, others: dict[str, Any]) -> list[str]:
        """Where a checkpoint's settings are others, in words. With a constant rate a run may be made longer."""
        free = ("epochs", "steps") if self.schedule == others.get("schedule") == "constant" else ()
        mine = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        return [f"{name} {others.get(name)} there, {value} here" for name, value in mine.items() if others.get(name) != value]


def cifar_depth(model: str) -> int | None:
    """The depth in "cifar20", or None for one of torchvision's layout.

    Raises:
        Wrong: for a name that is neither.
    """
    if model in IMAGENET:
        return None
    match = re.fullmatch(r"cifar(\d{1,4})", model)
    if match is None:
        raise Wrong(f"--model must be one of {', '.join(IMAGENET)}, or cifarN with N = 6n + 2, such as cifar20, got {model!r}")
    return int(match.group(1))


def network(settings: Settings, classes: int) -> nn.Module:
    """The network with its first weights, which torch's generator draws.

    Raises:
        Wrong: for a name or a depth that there is not.
    """
    norm_layer = nn.Identity if settings.norm == "none" else None
    depth = cifar_depth(settings.model)
    if depth is None:
        make = getattr(models, settings.model)
        built: nn.Module = make(classes, norm_layer=norm_layer, zero_init_residual=settings.zero_init)
        return built
    try:
        return models.cifar_resnet(
            depth, settings.shortcut, settings.plain, norm_layer, classes, zero_init_residual=settings.zero_init
        )
    except ValueError as error:
        raise Wrong(f"--model {settings.model}: {error}") from None
