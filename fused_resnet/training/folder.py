"""A folder of images, one folder in it a class: torchvision's ``ImageFolder`` layout.

Where the folder holds ``train`` and ``val``, these hold the class folders; else every fifth image of each class is a test image.
Every file is decoded once before the first step, so that a broken one stops a run before it has cost anything; a run that
continues takes the checkpoint's word for files of the same names and sizes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import _machine
from .data import TEST, Data
from .errors import Failed, Wrong
from .world import World

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Of ImageNet, as in torchvision's pretrained networks.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Found:
    """The images of a folder: (path below ``root``, class, whether for the test), in a fixed order."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[tuple[str, int, bool], ...]

    def digest(self) -> str:
        """Which images these are: the names and sizes of all files."""
        names = "\n".join(f"{name} {_bytes(self.root / name)}" for name, _, _ in self.files)
        return f"folder of {len(self.files)} ({hashlib.sha256(os.fsencode(names)).hexdigest()[:16]})"


def find(root: Path) -> Found:
    """List the images.

    Raises:
        Wrong: if there is no such folder, fewer than two classes, a class without images, or a test class that is not trained.
    """
    if not root.is_dir():
        raise Wrong(f"--folder {root}: there is no such folder")
    names = _folders(root)
    split = "train" in names and "val" in names
    classes = _folders(root / "train") if split else names
    where = root / "train" if split else root
    if len(classes) < 2:
        has = f"has one, {classes[0]!r}" if classes else "has none"
        raise Wrong(f"--folder needs a folder for each of at least two classes, and {where} {has}")
    files: list[tuple[str, int, bool]] = []
    for index, name in enumerate(classes):
        images = _images(where / name)
        files += [(str(image.relative_to(root)), index, not split and i % TEST == 0) for i, image in enumerate(images)]
        if len(images) < (1 if split else 2):
            raise Wrong(f"--folder: the class folder {where / name} holds {len(images)} images ({', '.join(SUFFIXES)}), too few")
    for name in _folders(root / "val") if split else ():
        if name not in classes:
            raise Wrong(f"--folder: {root / 'val'} has the class {name!r}, which {where} has not")
        files += [(str(image.relative_to(root)), classes.index(name), True) for image in _images(root / "val" / name)]
    if not any(test for _, _, test in files):
        raise Wrong(f"--folder: {root / 'val'} holds no images of these classes")
    return Found(root, tuple(classes), tuple(files))


def _folders(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise Wrong(f"--folder: {path} cannot be listed: {error.strerror}") from None


def _images(path: Path) -> list[Path]:
    """A link to nothing is one, which cannot be decoded."""
    names = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    return sorted(file for file in names if not file.is_dir())


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


class Unreadable(Exception):
    """An image that cannot be decoded to its last byte, and why."""


def read(path: Path, size: int) -> Tensor:
    """An image as [3, size, size]: the shorter side resized to ``size``, the middle cut out, normalised as ImageNet.

    Raises:
        Unreadable: whatever PIL raised.
    """
    import numpy
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image: Image.Image = file
            if file.mode.startswith("I;16"):  # PIL's own conversion makes everything above 255 white
                image = Image.fromarray((numpy.asarray(file).astype("uint16") // 257).astype("uint8"))
            elif file.mode in ("I", "F"):
                raise ValueError(f"images of mode {image.mode} (32 bits a pixel) have no known range")
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise Unreadable(str(error).replace(f" {str(path)!r}", "") or type(error).__name__) from None
    pixels = torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1).float().div_(255)
    return pixels.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(DEVIATION).view(3, 1, 1))


def check(found: Found, size: int, world: World, advance: Callable[[str], None]) -> list[tuple[str, str]]:
    """(name, reason) of each file that cannot be decoded. The processes share the work; each decodes on its cores."""
    mine = [name for name, _, _ in found.files[world.rank :: world.size]]

    def reason(name: str) -> str:
        try:
            read(found.root / name, size)
        except Unreadable as error:
            return str(error)
        return ""

    reasons: list[tuple[str, str]] = []
    with ThreadPoolExecutor(max(1, _machine.cores() // world.size)) as pool:
        for name, why in zip(mine, pool.map(reason, mine), strict=True):
            advance(name)
            if why:
                reasons.append((name, why))
    return sorted(world.gather(reasons))


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images that are decoded when they are asked for."""

    def __init__(self, root: Path, files: Sequence[tuple[str, int]], size: int) -> None:
        self.root, self.files, self.size = root, tuple(files), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name, label = self.files[index]
        try:
            return read(self.root / name, self.size), label
        except Unreadable as error:
            raise Failed(f"{self.root / name} was readable when the run began and is not any more: {error}") from None


def data(found: Found, skipped: Sequence[str], size: int) -> Data:
    """What to train on, without the skipped files.

    Raises:
        Wrong: if nothing is left for one of the two.
    """
    left_out = set(skipped)

    def part(test: bool) -> Iterator[tuple[str, int]]:
        return ((name, label) for name, label, is_test in found.files if is_test == test and name not in left_out)

    training, test = (ImageFiles(found.root, list(part(which)), size) for which in (False, True))
    if not len(training) or not len(test):
        raise Wrong(f"--folder: of {found.root}'s images for {'testing' if len(training) else 'training'} none is readable")
    return Data(str(found.root), found.classes, training, test)
