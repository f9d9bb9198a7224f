"""What the tests of `fused-resnet train` share: runs in this process, in others, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _calls import PATIENCE, ROOT
from torch import Tensor

from fused_resnet.training import Settings

# Small, fast, on one thread: sums are then in one order, and a run gives the same bits wherever it is cut.
SMALL = ("train", "--model", "cifar8", "--batch", "96", "--threads", "1", "--device", "cpu")


def settings(**changes: Any) -> Settings:
    """Those of a short run on the digits."""
    values: dict[str, Any] = {
        "model": "cifar8", "shortcut": "A", "plain": False, "norm": "batch", "zero_init": False, "sync_batch_norm": False,
        "images": "digits", "image_size": None, "augment": False, "batch": 96, "epochs": None, "steps": 20, "lr": 0.05,
        "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine", "amp": "off", "memory_format": "channels_last", "seed": 0,
    }  # fmt: skip
    return Settings(**{**values, **changes})


# Python's own hook for sites, put on the path of a run: its process stops itself once, right after its first checkpoint.
HOLD = """
import os, signal
replace, mark = os.replace, os.environ["HOLD"]
def hold(source, target, **keywords):
    replace(source, target, **keywords)
    if os.path.basename(target) == "checkpoint.pt" and not os.path.exists(mark):
        with open(mark + ".unfinished", "w") as file:
            file.write(str(os.getpid()))
        replace(mark + ".unfinished", mark)
        os.kill(os.getpid(), signal.SIGSTOP)
os.replace = hold
"""


# `fused-resnet` by direct convolution. A thread of the process group that outlives the run may abort the process at its end:
# none may be left (seen on Linux, where threads have names).
DIRECT = """
import pathlib, sys
from fused_resnet import _settings, cli
_settings.change(algorithm="direct")
status = cli.main(sys.argv[1:])
names = [file.read_text().strip() for file in pathlib.Path("/proc/self/task").glob("*/comm")]
left = [name for name in names if "gloo" in name]
sys.exit(f"threads are left: {left}" if left else status)
"""


def held(folder: Path) -> dict[str, str]:
    """Environment variables with which a run waits at its first checkpoint for a signal, however fast or slow the machine is; the
    file ``folder / "mark"`` then holds the number of the process."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(HOLD)
    path = os.pathsep.join(filter(None, (str(folder / "site"), str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "HOLD": str(folder / "mark")}


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    """Until a run has written this file."""
    end = time.monotonic() + PATIENCE
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{file.name} did not come"
        time.sleep(0.02)


def launch(
    *options: str, processes: int = 0, restarts: int = 0, limit: Any = None, program: tuple[str, ...] = ("-m", "fused_resnet"), **changes: str
) -> subprocess.Popen[str]:
    """`fused-resnet train` in a process of its own, or under torchrun; it talks to nobody but this machine. ``program``: or another."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts), "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes else ()), *program, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **changes},
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    """Its stdout and stderr when it has ended as it should."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, out + err
    return out, err


def saved(out: Path) -> dict[str, Any]:
    """A checkpoint's state, read without the package."""
    found: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)["state"]
    return found


def curve(out: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((out / "curve.json").read_text())["curve"]
    return found


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a checkpoint: parameters, batch statistics, momenta."""
    momenta = {f"momentum of {i}": s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}
    return {**state["network"], **momenta}


def assert_same_bits(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Of two checkpoints: step, curve and every tensor."""
    assert left["step"] == right["step"]
    assert left["curve"] == right["curve"]
    mine, others = tensors(left), tensors(right)
    assert mine.keys() == others.keys()
    assert [name for name in mine if not torch.equal(mine[name], others[name])] == []
