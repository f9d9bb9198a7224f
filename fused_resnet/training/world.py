"""The processes of one run: which one this is, and the little that they tell each other outside of DistributedDataParallel.

``torchrun`` starts them and sets RANK, LOCAL_RANK and WORLD_SIZE; without these there is one process and no process group.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Its functions take the process group of the time of its import as a default, and so keep it until the process ends.
# DistributedDataParallel imports it too: imported here, before there is a group, it keeps none.
import torch.distributed.nn.functional
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .errors import Ending, Failed, Wrong

T = TypeVar("T")
CPU = torch.device("cpu")

# How long a process waits for the others: longer than reading one batch, shorter than anybody would watch a run that hangs.
PATIENCE = timedelta(minutes=10)
# What gloo says when it has lost one, in an error of no class of its own.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


@dataclass(frozen=True)
class World:
    """``rank`` of ``size`` processes, which computes on ``device``. Rank 0 is the one that prints and writes."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    def first(self, function: Callable[[], T]) -> T:
        """What ``function`` gives on rank 0, on every rank. Files are read and written like this: the others need not see them.

        Raises:
            Wrong, Failed: on every rank, if it raised that on rank 0.
        """
        result = self.together(lambda: function() if self.rank == 0 else None)
        results = [result]
        if self.size > 1:
            dist.broadcast_object_list(results, 0)
        one: Any = results[0]
        return one  # type: ignore[no-any-return]

    def together(self, function: Callable[[], T]) -> T:
        """Call ``function`` on every rank. One that communicates would wait for ranks where it raised.

        Raises:
            Wrong, Failed: on every rank, if it raised that on any; for rank 0 to tell the user.
        """
        result: Any = None
        error: Ending | None = None
        try:
            result = function()
        except Ending as raised:
            error = raised
        for raised_somewhere in self.gather([error]):
            if raised_somewhere is not None:
                raised_somewhere.told = self.rank > 0
                raise raised_somewhere
        return result  # type: ignore[no-any-return]

    def gather(self, part: Sequence[T]) -> list[T]:
        """The parts of all ranks, one after the other, on every rank."""
        parts: list[Any] = [part]
        if self.size > 1:
            parts = [None] * self.size
            dist.all_gather_object(parts, part)
        return [item for one in parts for item in one]

    def sums(self, values: Sequence[float | torch.Tensor]) -> list[float]:
        """Each value summed over the ranks, in float64; the same bits on every rank."""
        on_device = [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values]
        total = torch.stack(on_device)
        if self.size > 1:
            dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found


def choose_device(name: str, local_rank: int, local_size: int) -> torch.device:
    """auto is CUDA where there is a device for each process of this machine.

    Raises:
        Wrong: for CUDA without a device for this process.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count >= local_size else "cpu"
    if name == "cpu":
        return CPU
    if count < local_size:
        found = "torch finds none" if count == 0 else f"there are {count} for {local_size} processes"
        raise Wrong(f"--device cuda needs a CUDA device for each process, and {found}")
    return torch.device("cuda", local_rank)


def _make_group(backend: str) -> None:
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store when it starts the processes again: without a name of its own, this attempt would at times
        # connect to the addresses of the one before. On several machines their counts may differ, and torchrun's own remedy
        # is TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


@contextmanager
def join(device: str) -> Iterator[World]:
    """Take this process's place among those that torchrun started: NCCL between CUDA devices, gloo between CPUs.

    Raises:
        Wrong: without a device, or if the processes do not find each other. Failed: if one of them is lost later.
    """
    local_rank, local_size = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    chosen = choose_device(device, local_rank, local_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(device=chosen)
        return
    try:
        _make_group("nccl" if chosen.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise Wrong(f"the processes do not find each other: {str(error).splitlines()[0]}") from None
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(words in str(error) for words in LOST):
            raise Failed("another process of this run is gone or does not answer; the last checkpoint is whole") from error
        raise
    # Not after an error: the group could wait for ranks that are gone. The process ends then, and its connections with it.
    # The group's threads end with the last reference to it. A thread that still holds a tensor when Python ends would abort
    # the process (pytorch/pytorch#179291). So DistributedDataParallel, which lies in circles of references, is freed first.
    gc.collect()
    dist.destroy_process_group()
