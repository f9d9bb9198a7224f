"""Runs tasks, each alone on one thread: in this process, or in several that take one task after the other.

A network of 8 channels on 8x8 pixels has no use for a second thread; two runs side by side have. The number of processes
changes nothing in the results.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from typing import Any

import torch

from ._data import Data, load
from ._protocol import Task


@lru_cache(maxsize=1)
def _data(name: str) -> Data:
    return load(name)


def perform(task: Task, data: str) -> dict[str, Any]:
    """Run one task; returns what the JSON file keeps of it."""
    module = importlib.import_module(f"{__package__}.{task.experiment}")
    start = time.perf_counter()
    result = module.perform(_data(data), **task.parameters)
    return {"parameters": task.parameters, "result": result, "seconds": round(time.perf_counter() - start, 2)}


def run(tasks: Sequence[Task], data: str, jobs: int) -> Generator[tuple[Task, dict[str, Any]], None, None]:
    """Each task and its run, in the order in which they end. What is still running when the iterator is closed is stopped."""
    tasks = sorted(tasks, key=lambda task: -task.weight)
    if jobs == 1 or len(tasks) <= 1:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for task in tasks:
                yield task, perform(task, data)
        finally:
            torch.set_num_threads(before)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn"), _start)
    try:
        running = {pool.submit(perform, task, data): task for task in tasks}
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join()


def _start() -> None:
    """In each process: one thread; the end is the parent's business, be it by Ctrl-C or because it is gone."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
