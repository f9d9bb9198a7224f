"""What the commands share: types of arguments, what a user got wrong, optional packages, the device and the threads."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
CUDA_DTYPES = {**DTYPES, "float16": torch.float16}
DEVICES = ("cpu", "cuda")


class Usage(Exception):
    """Wrong usage: one sentence for the user, exit status 2."""


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = {"PIL": "pillow", "sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise Usage(f'this command needs {package}, which is not installed: pip install "fused-resnet[{extra}]"') from None


def positive(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def seed(text: str) -> int:
    """An argument type: what torch.Generator and numpy both take."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**31 - 1}, got {text!r}")
    return value


def positive_seconds(text: str) -> float:
    """An argument type: a time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


def writable(text: str) -> Path:
    """An argument type: a file that can be written. Checked before the work whose result it is to hold."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: it is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: there is no folder {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: permission denied")
    return path


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to compute (default: cpu)")


def device(name: str) -> torch.device:
    """The device that ``--device`` names, if it can be used."""
    if name == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None:
            raise Usage(f"--device cuda: torch {torch.__version__} was built without CUDA")
        raise Usage("--device cuda: torch finds no CUDA device that it can use (fused-resnet env says more)")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


PICTURES = (".pdf", ".png", ".svg")


def picture(text: str) -> Path:
    """An argument type: a picture that can be written, in a format that its name says."""
    path = writable(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"the name of a picture must end in {', '.join(PICTURES)}, got {text!r}")
    return path


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the figures to FILE")


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Run with torch's thread count set, and set back afterwards."""
    before = torch.get_num_threads()
    if count is not None and count != before:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
