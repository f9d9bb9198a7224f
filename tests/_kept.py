"""What the scripts that are run by hand share: results that are kept as they come, so that a script can be taken up again."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# The scripts themselves and their tables: no result of a test depends on them.
SCRIPTS = ("faults.py", "any_machine.py", "_kept.py", "_fault*.py")


def digest(parts: Iterable[str]) -> str:
    """Of the sources: names and contents of the files in these parts of the repository, without results and what is compiled."""
    total = hashlib.sha256()
    for part in parts:
        folder = ROOT / part
        files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else [folder]
        for file in files:
            if "__pycache__" in file.parts or file.suffix == ".so" or file.is_relative_to(RESULTS):
                continue
            if file.parent.name == "tests" and any(file.match(script) for script in SCRIPTS):
                continue
            if file.exists():
                total.update(f"{file.relative_to(ROOT)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """What the results depend on beside the sources, without what a process chooses for itself."""
    sys.path.insert(0, str(ROOT))
    from fused_resnet import _machine

    found = _machine.describe(paths=False)
    return {name: found[name] for name in ("cpu", "cpu_flags", "cores", "caches", "os", "python", "torch")}


class Report:
    """A JSON file: what the results depend on, and the results in sections, each with its date.

    Results that depended on something else (other sources, another machine) are not taken over: an old result is none.
    """

    def __init__(self, path: Path, depends: dict[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(json.dumps({**depends, "results": {}}))
        self.note = ""
        if path.exists() and not fresh:
            found = json.loads(path.read_text())
            others = [name for name in depends if found.get(name) != self.content[name]]
            if others:
                self.note = f"{path.name} is of another state ({', '.join(others)}): everything is run again"
            else:
                self.content["results"] = found["results"]

    def section(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.content["results"].setdefault(name, {})
        return found

    def keep(self, section: str, name: str, result: dict[str, Any]) -> None:
        """Write the file with this result; whatever ends this process, the file is whole."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.section(section)[name] = {**result, "date": now}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(unfinished, self.path)
