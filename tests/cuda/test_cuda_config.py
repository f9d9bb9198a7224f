"""Which kernel computes a convolution on a GPU: csrc/cuda/config.cpp, a pure function of shape, dtype and device.

What is trusted: the device's numbers are arguments here, so that the choice for a GPU can be looked at without one.
"""

from __future__ import annotations

from typing import Any

import _cuda_twin
import pytest

# Compute capability, multiprocessors, bytes a microsecond of memory (0: not told).
HOPPER, AMPERE, BLACKWELL, TURING = (9, 0, 132, 0.0), (8, 0, 108, 0.0), (10, 0, 148, 0.0), (7, 5, 40, 0.0)
H200 = (9, 0, 132, 4.917e6)
TILES = [
    (architecture, dtype, form, m, n)
    for dtype in ("bfloat16", "float16", "float32")
    for architecture, forms, sizes in (
        ("sm90", ("matrix", "image"), ((128, 256), (128, 128), (128, 64), (64, 128), (64, 64))),
        ("sm80", ("image",), ((128, 128), (128, 64), (64, 64))),
    )
    for form in forms
    for m, n in sizes
]


def _choose(
    n: int,
    c: int,
    size: int,
    k: int,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    dtype: str = "bfloat16",
    device: tuple[int, int, int, float] = HOPPER,
    tf32: bool = True,
    algorithm: str = "auto",
    padding: int | None = None,
    strides: tuple[int, ...] | None = None,
    tiles: Any = TILES,
    shortcut: bool = True,
    joined: int = 0,
) -> tuple[str, str]:
    """Kernel and reason for a square convolution in channels_last, 'same' padding unless told. joined: channels of a projection."""
    pad = dilation * (kernel // 2) if padding is None else padding
    out = (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
    dense = (c * size * size, 1, c * size, c)
    output = (k * out * out, 1, k * out, k)
    found: tuple[str, str] = _cuda_twin.build().choose(
        dtype, (n, c, size, size), (k, c // groups, kernel, kernel), (n, k, out, out), (stride, stride), (pad, pad),
        (dilation, dilation), groups, strides or dense, output, output if shortcut else None, tf32, device, tiles, algorithm,
        (joined, (1, 1), (joined * out * out, 1, joined * out, joined)) if joined else None,
    )  # fmt: skip
    return found


def test_forms() -> None:
    """A 1x1 convolution with stride 1 is a product of matrices as they lie; everything else is read by image coordinates."""
    assert " matrix " in _choose(32, 256, 14, 1024, 1)[0]
    assert " image " in _choose(32, 256, 14, 1024, 1, 2)[0]
    assert " image " in _choose(32, 256, 14, 1024, 1, padding=1)[0]
    assert " image " in _choose(32, 256, 14, 256)[0]


@pytest.mark.parametrize(
    ("device", "architecture"),
    [(HOPPER, "sm90"), (AMPERE, "sm80"), ((8, 9, 128, 0.0), "sm80"), (BLACKWELL, "sm80"), ((12, 0, 170, 0.0), "sm80")],
)
def test_architectures(device: tuple[int, int, int, float], architecture: str) -> None:
    """Hopper's kernels run on Hopper alone; later GPUs take Ampere's, through PTX."""
    assert _choose(32, 128, 28, 128, device=device)[0].startswith(architecture)


def test_stems() -> None:
    """Four channels of 16 bits have a kernel of their own, on every GPU; in float32 they are a vector as any other."""
    few = [*TILES, ("any", "bfloat16", "few", 128, 64)]
    for device in (HOPPER, AMPERE, BLACKWELL):
        assert _choose(32, 4, 224, 64, 7, 2, tiles=few, device=device)[0] == "any bfloat16 few 128x64"
    assert _choose(32, 4, 224, 64, 7, 2, dtype="float32")[0].startswith("sm90 float32 image")
    assert _choose(32, 4, 224, 64, 7, 2)[1] == "this build has no sm90 kernels for bfloat16"


def test_tiles_fit_the_problem() -> None:
    """64 output channels never take a tile of 128 or more; a few pixels take the small tiles, many the large ones."""
    for n in (1, 32, 256):
        assert _choose(n, 64, 56, 64)[0].endswith("x64")
    assert _choose(256, 512, 14, 512)[0].split()[-1] in ("128x128", "128x256")
    assert _choose(1, 512, 7, 512)[0].endswith("64x64")
    assert _choose(1, 512, 7, 512) == _choose(1, 512, 7, 512)


def _predicted(*call: int, **more: Any) -> tuple[str, float]:
    kernel, reason = _choose(*call, **more)
    name, _, time = reason.partition(": predicted ")
    assert name == kernel
    return kernel.split()[-1], float(time.removesuffix(" us"))


def test_predictions() -> None:
    """What bounds a kernel, and 5 % of the rest, and 3.5 us to start: of each bound a layer of ResNet-50 at batch 256, by hand."""
    # The L2 cache, on an H200: 192 lines of 128 bytes a step at 42 bytes a cycle, 585 cycles, 9 steps of 48 waves at 1.7 GHz; one end of
    # 4 x 350 cycles. The ends of all waves take 39.5 us, memory 52.2.
    sums, ends, memory = 48 * 9 * (192 * 128 / 42) / 1.7e3, 48 * 4 * 350 / 1.7e3, 2 * (2 * 802816 * 64 + 36864) / (0.8 * 4.917e6)
    bound = sums + 4 * 350 / 1.7e3
    wanted = bound + 0.05 * (sums + ends + memory - bound) + 3.5
    assert _predicted(256, 64, 56, 64, device=H200, shortcut=False) == ("128x64", round(wanted))
    # Memory: 64 > 256 channels with the addition. 48 waves of tiles whose ends are 8 x 700 cycles for each of two warp groups.
    sums, ends = 48 * (2 * 128 * 256 * 64 / (0.85 * 4096)) / 1.7e3, 48 * 8 * 700 / 1.7e3
    memory = 2 * (802816 * (64 + 2 * 256) + 64 * 256) / (0.8 * 4.917e6)
    assert memory > sums + ends
    assert _predicted(256, 64, 56, 256, 1, device=H200) == ("128x256", round(memory + 0.05 * (sums + ends) + 3.5))
    # Arithmetic: 3 waves of 36 steps at 85 % of 4096 operations a cycle; warp groups that cooperate sum nothing during their ends.
    sums, ends = 3 * 36 * (2 * 128 * 256 * 64 / (0.85 * 4096)) / 1.7e3, 3 * 8 * 350 / 1.7e3
    memory = 2 * (2 * 50176 * 256 + 9 * 256 * 256) / (0.8 * 4.917e6)
    assert _predicted(256, 256, 14, 256, device=H200, shortcut=False) == ("128x256", round(sums + ends + 0.05 * memory + 3.5))
    # Ampere's rates and efficiencies are its own: 59 waves on 108 multiprocessors, 65 % of 2048 operations at 1.4 GHz; an A100's memory.
    sums, ends = 59 * 9 * (2 * 128 * 64 * 64 / (0.65 * 2048)) / 1.4e3, 59 * 4 * 350 / 1.4e3
    memory = 2 * (2 * 802816 * 64 + 36864) / (0.8 * 1.55e6)
    bound = sums + 4 * 350 / 1.4e3
    wanted = bound + 0.05 * (sums + ends + memory - bound) + 3.5
    assert _predicted(256, 64, 56, 64, device=AMPERE, shortcut=False) == ("128x64", round(wanted))


    # A projection's channels are steps too, and its pixels and weight bytes: ResNet-50's 64 > 256 beside 64 > 256, which memory bounds.
    joined = [("sm90", "bfloat16", "joined", 128, 256)]
    sums, ends = 48 * 2 * (2 * 128 * 256 * 64 / (0.85 * 4096)) / 1.7e3, 48 * 8 * 350 / 1.7e3
    memory = 2 * (802816 * (64 + 256 + 64) + 2 * 64 * 256) / (0.8 * 4.917e6)
    wanted = round(memory + 0.05 * (sums + ends) + 3.5)
    assert _predicted(256, 64, 56, 256, 1, device=H200, shortcut=False, tiles=joined, joined=64) == ("128x256", wanted)
    # ... and 512 > 2048 beside 1024 > 2048, which arithmetic bounds: 6 waves of 8 + 16 steps.
    sums, ends = 6 * (8 + 16) * (2 * 128 * 256 * 64 / (0.85 * 4096)) / 1.7e3, 6 * 8 * 350 / 1.7e3
    memory = 2 * (12544 * (512 + 2048 + 1024) + 2048 * (512 + 1024)) / (0.8 * 4.917e6)
    wanted = round(sums + ends + 0.05 * memory + 3.5)
    assert _predicted(256, 512, 7, 2048, 1, device=H200, shortcut=False, tiles=joined, joined=1024) == ("128x256", wanted)


def test_a_bound_that_tiles_share_leaves_no_tie() -> None:
    """Layers that memory bounds with every tile: the one that does least beside it, whatever the order of the tiles."""
    for tiles in (TILES, TILES[::-1]):
        chosen = {
            (c, k, size): _choose(256, c, size, k, 1, device=H200, shortcut=shortcut, tiles=tiles)[0].split()[-1]
            for c, k, size, shortcut in (
                (64, 64, 56, False),
                (256, 64, 56, False),
                (64, 256, 56, True),
                (128, 512, 28, True),
                (256, 1024, 14, True),
                (1024, 256, 14, False),
            )
        }
        assert chosen == {
            (64, 64, 56): "128x64",
            (256, 64, 56): "128x64",
            (64, 256, 56): "128x256",
            (128, 512, 28): "128x256",
            (256, 1024, 14): "128x256",
            (1024, 256, 14): "128x256",
        }


def test_the_devices_own_bandwidth() -> None:
    """What memory bounds takes longer on a GPU with less of it; what arithmetic bounds does not."""
    slow = (9, 0, 132, 4.917e6 / 2)
    layer = (256, 64, 56, 256, 1)
    assert _predicted(*layer, device=slow)[1] > 1.7 * _predicted(*layer, device=H200)[1]
    layer = (256, 256, 14, 256)
    assert _predicted(*layer, device=slow)[1] < 1.1 * _predicted(*layer, device=H200)[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": "float64"}, "float64 has no tensor-core kernel"),
        ({"dtype": "float32", "tf32": False}, "float32 without TF32"),
        ({"groups": 4}, "groups = 4"),
        ({"device": TURING}, "compute capability 7.5: our tensor-core kernels need 8.0"),
        ({"c": 60}, "60 input and 64 output channels: bfloat16 tensor-core kernels need multiples of 8"),
        ({"k": 66, "dtype": "float32"}, "64 input and 66 output channels: float32 tensor-core kernels need multiples of 4"),
        ({"strides": (64 * 28 * 28, 28 * 28, 28, 1)}, "input is not channels_last without gaps"),
        ({"kernel": 33, "padding": 16}, "a kernel of 33x33"),
        ({"stride": 9}, "stride 9: TMA takes at most 8"),
        ({"kernel": 3, "dilation": 70, "padding": 140}, "further than TMA's offsets"),
        ({"n": 1, "c": 4096, "size": 600}, "more than 2^31 bytes"),
    ],
)
def test_what_tensor_cores_cannot_compute(arguments: dict[str, Any], sentence: str) -> None:
    call = {"n": 8, "c": 64, "size": 28, "k": 64, **arguments}
    kernel, reason = _choose(**call)
    assert kernel == "general"
    assert sentence in reason
    if sentence.startswith("stride 9") or "TMA" in sentence:
        assert _choose(**call, device=AMPERE)[0].startswith("sm80"), "only Hopper's kernels read by TMA"
    # Without what is in the way it is computed there: the sentence is about that alone.
    assert _choose(8, 64, 28, 64)[0].startswith("sm90")


def test_the_plain_kernel_is_only_asked_for() -> None:
    """CUTLASS's own kernel computes what an image's does, where it is named; the choice has it nowhere, alone or not."""
    plain = ("sm90", "bfloat16", "plain", 128, 128)
    name = "sm90 bfloat16 plain 128x128"
    for kernel in (1, 3):
        assert _choose(256, 128, 28, 128, kernel, tiles=[plain, *TILES]) == _choose(256, 128, 28, 128, kernel)
        assert _choose(8, 128, 28, 128, kernel, tiles=[plain], algorithm=name) == (name, "asked for")
    assert _choose(8, 128, 28, 128, tiles=[plain]) == ("general", "this build has no sm90 kernels for bfloat16")
    with pytest.raises(ValueError, match="groups = 2"):
        _choose(8, 128, 28, 128, groups=2, tiles=[plain], algorithm=name)


def test_what_is_asked_for_is_taken_or_refused() -> None:
    assert _choose(1, 64, 28, 64, algorithm="general") == ("general", "asked for")
    assert _choose(1, 64, 28, 64, algorithm="sm90 bfloat16 image 128x256")[0] == "sm90 bfloat16 image 128x256"
    for algorithm, arguments, message in (
        ("sm90 bfloat16 matrix 128x128", {}, "not for this dtype, shape or device"),
        ("sm80 bfloat16 image 128x128", {}, "not for this dtype, shape or device"),
        ("sm90 float16 image 128x128", {}, "not for this dtype, shape or device"),
        ("sm90 bfloat16 image 128x128", {"groups": 2}, "cannot compute this: groups = 2"),
        ("sm90 bfloat16 image 96x96", {}, "the name of a tile of this build"),
    ):
        with pytest.raises(ValueError, match=message):
            _choose(1, 64, 28, 64, algorithm=algorithm, **arguments)


def test_a_build_without_this_architecture_says_so() -> None:
    kernel, reason = _choose(8, 64, 28, 64, tiles=[t for t in TILES if t[0] == "sm80"])
    assert (kernel, reason) == ("general", "this build has no sm90 kernels for bfloat16")
