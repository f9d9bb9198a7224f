"""Where the machine is crowded: which threads help a converted network, and that nothing else changes.

What is trusted: the processes are told that they lose their core a thousand times a second, by a getrusage of the test's own before the
system's (so nothing depends on how busy this machine is); helpers of our own say so in their names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GETRUSAGE = """
#define _GNU_SOURCE
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
int getrusage(__rusage_who_t who, struct rusage* used) {
  int result = syscall(SYS_getrusage, who, used);
  if (who == RUSAGE_THREAD) used->ru_nivcsw = 1000 * used->ru_utime.tv_sec + used->ru_utime.tv_usec / 1000;
  return result;
}
"""

PROCESS = """
import glob, sys, time, torch
import fused_resnet
from fused_resnet import models, fuse_

def helpers():
    found = 0
    for name in glob.glob("/proc/self/task/*/comm"):
        try:
            found += open(name).read() == "fused_resnet\\n"
        except OSError:  # it has just ended
            pass
    return found

torch.manual_seed(0)
torch.set_num_threads(3)
model = models.cifar_resnet(20, width=32).eval()
x, weight = torch.randn(4, 3, 32, 32), torch.randn(64, 64, 3, 3)
many = torch.randn(4, 64, 56, 56)
with torch.no_grad():
    fuse_(model)
    first = model(x)
    alone = fused_resnet.conv_bias_add_relu(many, weight, padding=1)
    for threads in (3, 2):
        torch.set_num_threads(threads)
        seen, begin = {0}, time.thread_time()
        while time.thread_time() < begin + 0.6:
            assert torch.equal(model(x), first)
            assert torch.equal(fused_resnet.conv_bias_add_relu(many, weight, padding=1), alone)
            if time.thread_time() > begin + 0.2:  # those of before have gone
                seen.add(helpers())
        print(max(seen))
"""


@pytest.fixture(scope="module")
def preempted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that, loaded before the others, says that its process is often interrupted."""
    if sys.platform != "linux":
        pytest.skip("only Linux tells how often a thread loses its core")
    folder = tmp_path_factory.mktemp("preempted")
    (folder / "getrusage.c").write_text(GETRUSAGE)
    command = [os.environ.get("CC") or "gcc", "-shared", "-fPIC", str(folder / "getrusage.c"), "-o", str(folder / "getrusage.so")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "getrusage.so"


@pytest.mark.parametrize(
    ("environment", "helpers"),
    [({}, ["2", "1"]), ({"OMP_PROC_BIND": "true"}, ["0", "0"]), ({"OMP_THREAD_LIMIT": "2"}, ["1", "1"])],
    ids=["crowded", "bound", "limited"],
)
def test_helpers(kernels: object, preempted: Path, environment: dict[str, str], helpers: list[str]) -> None:
    """Ours, as many as are wanted; OpenMP's where they are bound to places. The same bits whoever helps."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    settings |= {"LD_PRELOAD": str(preempted), **environment}
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, timeout=240, check=False, env=settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == helpers
