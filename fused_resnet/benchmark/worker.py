"""One contender in a process of its own: `python -m fused_resnet.benchmark.worker`, started by ``team.py``.

It reads requests, one JSON object a line, from stdin and answers each with one on stdout; between them it sleeps, so that one
process at a time computes. It ends when stdin does, which is also what happens when the process that started it dies.
Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import timing

if TYPE_CHECKING:
    from torch import Tensor


def _as_it_is(results: Any) -> Any:
    return results


@dataclass(frozen=True)
class Built:
    """A contender of one case, ready to be timed.

    ``call`` is what is timed; ``results`` turns what it returned into tensors. Both run inside ``context``.
    """

    call: Callable[[], Any]
    results: Callable[[Any], tuple[Tensor, ...]] = _as_it_is
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Worker:
    """The requests, one method each; they take and return what JSON can hold."""

    def __init__(self) -> None:
        self._built: Built | None = None

    def build(self, builder: str, folder: str, threads: int, warmup: int, least: float) -> dict[str, Any]:
        """Build a contender, warm it up, write its results to a file, and say how many calls make a sample."""
        import torch

        from .contest import Task

        self._built = None  # first let go of the last one's memory
        module, name = builder.split(":")
        task = Task.load(Path(folder) / "task.pt")
        built: Built = getattr(importlib.import_module(module), name)(task, threads, Path(folder))
        path = Path(folder) / f"results-{os.getpid()}.pt"
        with built.context():
            # The second call's result: buffers that the first one spoils show.
            built.call()
            torch.save([t.detach().clone() for t in built.results(built.call())], path)
            for _ in range(warmup - 2):
                built.call()
            inner = timing.autorange(built.call, least)
        self._built = built
        settle()
        return {"results": str(path), "inner": inner}

    def sample(self, inner: int) -> dict[str, Any]:
        """Seconds a call over ``inner`` calls, and whether a foreign process held a core meanwhile."""
        assert self._built is not None
        with self._built.context():
            # The others have cooled the caches and the threads of this process sleep: one call, untimed, undoes both.
            self._built.call()
            contention = timing.Contention()
            seconds = timing.seconds_a_call(self._built.call, inner, time.perf_counter)
            disturbed = contention.much()
        settle()
        return {"seconds": seconds, "disturbed": disturbed}


def settle(longest: float = 0.25, folder: Path = Path("/proc/self/task")) -> None:
    """Wait until the other threads of this process sleep.

    Thread pools wait for work by spinning: ONNX Runtime's for some 30 ms after a call, OpenMP's for some 5 ms. That is left as
    it is, since it serves them in a loop of calls; but the next contender must not find a core taken by it.
    """
    end = time.perf_counter() + longest
    while _running(folder) and time.perf_counter() < end:
        time.sleep(0.0005)


def _running(folder: Path) -> bool:
    """Whether a thread other than the first is on a core or waits for one. False where the system does not tell."""
    for file in folder.glob("*/stat"):
        try:
            state = file.read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):  # the thread has ended
            continue
        if state == "R" and file.parent.name != str(os.getpid()):
            return True
    return False


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        methods: dict[str, Callable[..., dict[str, Any]]] = {"build": worker.build, "sample": worker.sample}
        method = methods[request.pop("do")]
        try:
            answer = method(**request)
        except Exception as error:
            sentence = " ".join(str(error).split())
            answer = {"failed": f"{type(error).__name__}: {sentence}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
