"""One training run: SGD with momentum 0.9 and a cosine schedule, batches of 128, weight decay on weights and never on biases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._data import Data

BATCH = 128
DECAY = 1e-4
GUESSING = 90.0  # % error of a network of which nothing is left but NaN: ten classes


def optimiser(network: nn.Module, rate: float, decay: float = DECAY) -> torch.optim.SGD:
    """Matrices and kernels decay; biases, gamma and beta do not."""
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    return torch.optim.SGD([{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}], rate, momentum=0.9)


def batches(data: Data, generator: torch.Generator, batch: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in an order drawn from ``generator``; what does not fill a batch waits for the next epoch."""
    order = torch.randperm(len(data.images), generator=generator)
    for first in range(0, len(order) - batch + 1, batch):
        chosen = order[first : first + batch]
        yield data.images[chosen], data.classes[chosen]


@torch.no_grad()
def error(network: nn.Module, images: Tensor, classes: Tensor) -> float:
    """The classification error in eval mode, %."""
    mode = network.training
    network.eval()
    wrong = 0
    for first in range(0, len(images), 512):
        output = network(images[first : first + 512])
        if not torch.isfinite(output).all():
            network.train(mode)
            return GUESSING
        wrong += int((output.argmax(1) != classes[first : first + 512]).sum())
    network.train(mode)
    return 100 * wrong / len(images)


def train(network: nn.Module, data: Data, rate: float, epochs: int, generator: torch.Generator, batch: int = BATCH) -> dict[str, Any]:
    """Train; returns the curve and how it ended.

    losses: mean cross-entropy of each epoch's batches, nats. errors: classification error of the same batches, %.
    training_error, test_error: of the finished network, in eval mode, %. A run whose loss is not finite any more has diverged:
    its curve ends there, and its errors are those of guessing.
    """
    steps = epochs * (len(data.images) // batch)
    sgd = optimiser(network, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    losses: list[float] = []
    errors: list[float] = []
    for _ in range(epochs):
        total, wrong, count = 0.0, 0, 0
        for images, classes in batches(data, generator, batch):
            output = network(images)
            loss = F.cross_entropy(output, classes)
            sgd.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
            schedule.step()
            total += loss.item()
            wrong += int((output.argmax(1) != classes).sum())
            count += 1
            if not math.isfinite(total):
                return {
                    "losses": losses, "errors": errors, "diverged": True, "training_error": GUESSING, "test_error": GUESSING,
                }  # fmt: skip
        losses.append(round(total / count, 5))
        errors.append(round(100 * wrong / (count * batch), 3))
    return {
        "losses": losses,
        "errors": errors,
        "diverged": False,
        "training_error": round(error(network, data.images, data.classes), 3),
        "test_error": round(error(network, data.test_images, data.test_classes), 3),
    }
