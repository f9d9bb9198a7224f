"""Checkpoints: whole or not at all, and never another run's overwritten.

A file is written beside the one that it replaces, forced to the disk and renamed over it; a crash at any moment leaves the old one
or the new one. A lock keeps a second run out of the folder; it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from .errors import Failed, Wrong
from .settings import Settings

FORMAT = "fused-resnet training checkpoint, 1"


def write(path: Path, content: bytes) -> None:
    """Replace a file at once.

    Raises:
        Failed: if it cannot be written; the old file is as it was.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        # The rename too must reach the disk: it is in the folder.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        before = "the one before it is whole" if path.exists() else "there is none before it"
        raise Failed(f"cannot write {path}: {error.strerror}; {before}") from None


class Folder:
    """Where a run keeps its checkpoint and its curve; this process's alone while the object lives.

    Raises:
        Wrong: if the folder cannot be made or written, or another run has it.
    """

    def __init__(self, path: Path) -> None:
        self.checkpoint, self.curve = path / "checkpoint.pt", path / "curve.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("ab")
        except OSError as error:
            raise Wrong(f"--out {path}: {error.strerror}") from None
        try:
            # lockf and not flock: that one would be held by DataLoader's workers too, for seconds after this process was killed.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            reason = "another run is writing there" if error.errno in (errno.EACCES, errno.EAGAIN) else error.strerror
            raise Wrong(f"--out {path}: {reason}") from None

    def close(self) -> None:
        self._lock.close()

    def save(self, state: dict[str, Any], settings: dict[str, Any], curve: dict[str, Any]) -> None:
        """Replace the checkpoint, then the curve.

        Raises:
            Failed: if the disk does not take it.
        """
        content = io.BytesIO()
        # Into memory first: torch's writer would report a full disk as "unexpected pos", and may end the process.
        torch.save({"format": FORMAT, "versions": versions(), "settings": settings, "state": state}, content)
        write(self.checkpoint, content.getvalue())
        write(self.curve, (json.dumps(curve, indent=1, allow_nan=False) + "\n").encode())

    def load(self, settings: Settings) -> dict[str, Any] | None:
        """The state at which to continue, or None to begin.

        Raises:
            Wrong: for a file that is not a whole checkpoint of such a run. It stays as it is.
        """
        if not self.checkpoint.exists():
            return None
        found = load(self.checkpoint)
        differences = settings.differences(found["settings"])
        if differences:
            raise Wrong(
                f"{self.checkpoint} is of a run with other settings ({'; '.join(differences)}); it was left as it is: "
                "give its settings, or another --out"
            )
        state: dict[str, Any] = found["state"]
        return state


def versions() -> dict[str, str]:
    return {"fused_resnet": __version__, "torch": str(torch.__version__)}


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU; only tensors and plain values are unpickled.

    Raises:
        Wrong: for a file that is broken, or something else.
    """
    kept = "it was left as it is: move it away, or give another --out"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Wrong(f"cannot read {path}: {error.strerror}") from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()  # torch.load does not compare checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        raise Wrong(f"{path} is cut off, damaged or no checkpoint ({error}); {kept}") from None
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise Wrong(f"{path} is not a checkpoint of `fused-resnet train`; {kept}")
    state = found.get("state")
    if not isinstance(found.get("settings"), dict) or not isinstance(state, dict) or not isinstance(state.get("skipped"), list):
        raise Wrong(f"{path} lacks a part of what a checkpoint holds; {kept}")
    return found
