"""The study's JSON file: every run as it ends, so that an interrupted study goes on where it was.

The file is replaced, never written into: whoever reads it, and whatever ends the process or fills the disk, finds it whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FORMAT = "fused_resnet study"


class Changed(Exception):
    """Another process has written the file meanwhile."""


class Store:
    """The content of one study's file, in step with it.

    Raises:
        ValueError: if there is a file already that is not a study's, is broken, or was made with other settings.
        OSError: if it cannot be read.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"format": FORMAT, "settings": settings, "machine": {}, "runs": {}, "reports": {}}
        self._seen = self._stamp()
        if self._seen is not None:
            self.content = load(path)
            _compare(path, self.content["settings"], settings)

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        runs: dict[str, dict[str, Any]] = self.content["runs"]
        return runs

    def add(self, key: str, run: dict[str, Any]) -> None:
        self.runs[key] = run
        self.write()

    def write(self) -> None:
        """Replace the file.

        Raises:
            OSError: if the disk is full, or the like; the file is then as it was.
            Changed: if another process has written it meanwhile, whose runs would be lost.
        """
        if self._stamp() != self._seen:
            raise Changed(f"{self.path} was written by another process while this study ran: run the command again to go on")
        text = json.dumps(self.content, separators=(",", ":"), allow_nan=False).replace('},"', '},\n"') + "\n"
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        self._seen = self._stamp()

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def load(path: Path) -> dict[str, Any]:
    """The content of a study's file.

    Raises:
        ValueError: if it is none. OSError: if it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not JSON: broken, or not made by this command; it is left as it is") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a study: another program's; it is left as it is")
    parts = [content.get(name) for name in ("settings", "machine", "runs", "reports")]
    whole = all(isinstance(part, dict) for part in parts) and all(
        isinstance(run, dict)
        and isinstance(run.get("parameters"), dict)
        and isinstance(run.get("result"), dict)
        and bool(run["result"])
        and isinstance(run.get("seconds"), (int, float))
        for run in content["runs"].values()
    )
    if not whole:
        raise ValueError(f"{path} lacks a part of what a study's file holds: broken; it is left as it is")
    return content


def _compare(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in {**stored, **wanted}:
        if stored.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} holds runs made with {name} = {stored.get(name)!r}, and this study has {wanted.get(name)!r}: "
                "name another folder (--out), or delete the file"
            )
