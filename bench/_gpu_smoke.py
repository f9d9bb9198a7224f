"""What ``smoke`` of gpu_first.py found of each kernel of one module: written by it, a line a kernel, and read by the stages of gpu_report.py.

A line has the kernel's name ("tile"), the module's mark ("module") and a verdict. RIGHT: of all its features. WRONG: of one, or it hung or
died there. UNKNOWN: it was not tried, or not to its end, which says nothing against it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

RIGHT, WRONG, UNKNOWN = "right", "wrong", "unknown"
Line = dict[str, Any]


def mark_of(module: Any) -> str:
    """What tells a compiled module from another."""
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:16] if module is not None and module.__file__ else "none"


def path_in(folder: Path) -> Path:
    return folder / "smoke.jsonl"


def read(folder: Path | None, mark: str | None = None) -> list[Line]:
    """The last line of each kernel, by its name; none where ``smoke`` was not there. mark: of the module whose lines are wanted; None: all. A
    line that was cut off is left out."""
    try:
        text = "" if folder is None else path_in(folder).read_text(encoding="utf-8")
    except OSError:
        return []
    found: dict[str, Line] = {}
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if mark is None or content["module"] == mark:
            found[content["tile"]] = content
    return [found[tile] for tile in sorted(found)]


def begin(folder: Path, mark: str, tiles: Container[str]) -> None:
    """The file before these kernels are tried: with what is known of the others of this module."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [line for line in read(folder, mark) if line["tile"] not in tiles]
    path_in(folder).write_text("".join([json.dumps(line) + "\n" for line in kept]), encoding="utf-8")


def add(folder: Path, line: Line) -> None:
    with path_in(folder).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
