"""The processes in which contenders live, one each, kept from case to case and killed at the end, whatever ends it.

The processes take turns: each computes only while the parent waits for its answer, and sleeps otherwise. One that dies, fails
or does not answer loses this case, with a sentence that says why; it is started anew for the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from . import timing
from .contest import Task


class Failed(timing.Lost):
    """A contender gave no answer, or an error: one sentence."""


class Member:
    """One process; started with the first request."""

    def __init__(self, threads: int, folder: Path) -> None:
        self._threads = threads
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: Path | None = None
        self._rest = b""

    def ask(self, seconds: float, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer, at most this long. The process does not survive a failure."""
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it is dead: reading says so
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line(process, seconds))
            if "failed" in answer:
                raise Failed(answer["failed"])
            return answer
        except BaseException:
            self.kill()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        number, name = tempfile.mkstemp(suffix=".txt", dir=self._folder)
        self._stderr = Path(name)
        # The same packages as here: from the same places, and in a folder where `-m` finds no others. Inductor compiles in the
        # process itself rather than in a pool that would idle beside it.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        changes = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(self._threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        changes["TORCHINDUCTOR_FREEZING"] = "1"
        with os.fdopen(number, "wb") as log:
            # A session of its own: an interrupt from the keyboard reaches the parent only, and killing takes compilers along.
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "fused_resnet.benchmark.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **changes},
                cwd=self._folder,
                start_new_session=True,
            )
        self._rest = b""
        return self._process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """The next line that the process writes."""
        assert process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            if not select.select([process.stdout], [], [], max(end - time.monotonic(), 0))[0]:
                raise Failed(f"no answer within {seconds:.0f} s")
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                raise Failed(self._epitaph(process))
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _epitaph(self, process: subprocess.Popen[bytes]) -> str:
        """How a process ended: its status, and the last line it wrote."""
        try:
            status = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its process closed its output"
        try:
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        except ValueError:
            how = f"by signal {-status}"
        lines = self._stderr.read_text(errors="replace").split("\n") if self._stderr is not None else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"its process ended {how}" + (f": {last[:200]}" if last else "")

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # what is left in the buffer has nowhere to go
                stream.close()


class Team:
    """The contenders' processes for one number of threads. ``builders``: name -> function as module:name."""

    BUILD, SAMPLE = 900.0, 300.0  # seconds after which a contender that has not answered has failed

    def __init__(self, builders: Mapping[str, str], threads: int) -> None:
        self._builders = builders
        self._threads = threads
        self._folder = tempfile.TemporaryDirectory(prefix="fused-resnet-bench-")
        self._members = {name: Member(threads, Path(self._folder.name)) for name in builders}
        self._cases = 0
        self._case = Path(self._folder.name)
        self._inner: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for member in self._members.values():
            member.kill()
        self._folder.cleanup()

    def open(self, task: Task) -> None:
        """Begin a case: from here on ``failed`` (name -> sentence) is about this one."""
        if self._cases:
            shutil.rmtree(self._case, ignore_errors=True)
        self._cases += 1
        self._case = Path(self._folder.name) / str(self._cases)
        self._case.mkdir()
        task.save(self._case / "task.pt")
        self.failed = {}
        self._inner = {}

    def build(self, name: str, least: float, warmup: int) -> tuple[Tensor, ...] | None:
        """Build a contender of the case, ready for samples of ``least`` seconds; its results, or None if it failed."""
        try:
            answer = self._members[name].ask(
                self.BUILD,
                do="build",
                builder=self._builders[name],
                folder=str(self._case),
                threads=self._threads,
                warmup=warmup,
                least=least,
            )
        except Failed as failure:
            self.failed[name] = str(failure)
            return None
        self._inner[name] = answer["inner"]
        return tuple(torch.load(answer["results"], weights_only=True))

    def time(self, repeat: int, seconds: float) -> dict[str, timing.Timing]:
        """Time the contenders that were built, sample by sample in turn; those that fail on the way are in ``failed``."""
        taken = timing.rounds({name: self._sampler(name) for name in self._inner}, repeat, seconds)
        return {name: timing.Timing.of(samples, self._inner[name], min(timing.FEWEST, repeat)) for name, samples in taken.items()}

    def _sampler(self, name: str) -> timing.Sampler:
        def take() -> timing.Sample:
            try:
                return timing.Sample(**self._members[name].ask(self.SAMPLE, do="sample", inner=self._inner[name]))
            except Failed as failure:
                self.failed[name] = str(failure)
                raise

        return take
