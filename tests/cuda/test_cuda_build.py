"""The compiled CUDA module on a machine without a GPU: it loads, knows its kernels, and says what is missing.

Skipped where the module was not built (``FUSED_RESNET_CUDA=1 pip install .`` builds it with nvcc alone).
"""

from __future__ import annotations

import pytest
import torch
from _calls import run_python

from fused_resnet import _extension
from fused_resnet.ops import cuda

pytestmark = pytest.mark.skipif(_extension.cuda() is None, reason=f"no CUDA module: {_extension.cuda_missing()}")


def test_kernels() -> None:
    """Every tile is there, in each dtype and form; the architectures are those of the build."""
    module = _extension.cuda()
    assert module is not None
    built = module.BUILD["architectures"].split()
    assert built
    found = set(cuda.tiles())
    expected = {f"any {dtype} few 128x64" for dtype in ("bfloat16", "float16")}
    for dtype in ("bfloat16", "float16", "float32"):
        if "90a" in built:
            sizes = ("128x256", "128x128", "128x64", "64x128", "64x64")
            expected |= {f"sm90 {dtype} {form} {size}" for form in ("matrix", "image") for size in sizes}
            if dtype == "bfloat16":
                expected.add("sm90 bfloat16 plain 128x128")
            if dtype != "float32":
                expected |= {f"sm90 {dtype} joined {size}" for size in ("128x256", "128x128", "64x64")}
        if "80" in built:
            expected |= {f"sm80 {dtype} image {size}" for size in ("128x128", "128x64", "64x64")}
    assert found == expected
    assert module.kernels_to_load() == 20 + 46  # convolutions by tile, index and dtype; passes


def test_an_import_does_not_load_it() -> None:
    code = "import sys, fused_resnet; print('fused_resnet._cuda' in sys.modules)"
    done = run_python(code)
    assert done.stdout.strip() == "False", done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    module = _extension.cuda()
    assert module is not None
    with pytest.raises(RuntimeError, match="device's capability"):
        module.capability(0)
