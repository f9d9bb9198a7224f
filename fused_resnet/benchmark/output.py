"""Tables, progress and files of figures, for the commands and for the scripts in bench/."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        # NaN and infinity are not JSON; nothing that is written here may hold them.
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def finite(value: float) -> float | None:
    """A figure for JSON: null where there is no number."""
    return value if abs(value) < float("inf") else None


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        lines.append(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal, nothing in a pipe. Gives a function to call after each step with a note for the bar."""
    if not sys.stderr.isatty():
        yield lambda note: None
        return
    try:
        from tqdm import tqdm
    except ImportError:  # `check` runs without any extra: count
        done = 0

        def count(note: str) -> None:
            nonlocal done
            done += 1
            print(f"\r\x1b[K{what} {done}/{total} {note}", end="", file=sys.stderr, flush=True)

        yield count
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        return
    # tqdm draws nothing on a terminal that gives its size as 0 x 0, as containers' terminals may; this gives 80 x 24 there.
    columns, rows = shutil.get_terminal_size()
    with tqdm(total=total, desc=what, leave=False, ncols=columns, nrows=rows) as bar:

        def advance(note: str) -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update()

        yield advance


def megabytes(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"
