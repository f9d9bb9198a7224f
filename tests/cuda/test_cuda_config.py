"""Which kernel computes a convolution on a GPU: csrc/cuda/config.cpp, a pure function of shape, dtype and device.

What is trusted: the device's numbers are arguments here, so that the choice for a GPU can be looked at without one.
"""

from __future__ import annotations

from typing import Any

import _cuda_twin
import pytest

HOPPER, AMPERE, BLACKWELL, TURING = (9, 0, 132), (8, 0, 108), (10, 0, 148), (7, 5, 40)
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
    device: tuple[int, int, int] = HOPPER,
    tf32: bool = True,
    algorithm: str = "auto",
    padding: int | None = None,
    strides: tuple[int, ...] | None = None,
    tiles: Any = TILES,
) -> tuple[str, str]:
    """Kernel and reason for a square convolution in channels_last, 'same' padding unless told."""
    pad = dilation * (kernel // 2) if padding is None else padding
    out = (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
    dense = (c * size * size, 1, c * size, c)
    output = (k * out * out, 1, k * out, k)
    found: tuple[str, str] = _cuda_twin.build().choose(
        dtype, (n, c, size, size), (k, c // groups, kernel, kernel), (n, k, out, out), (stride, stride), (pad, pad),
        (dilation, dilation), groups, strides or dense, output, output, tf32, device, tiles, algorithm,
    )  # fmt: skip
    return found


def test_forms() -> None:
    """A 1x1 convolution with stride 1 is a product of matrices as they lie; everything else is read by image coordinates."""
    assert " matrix " in _choose(32, 256, 14, 1024, 1)[0]
    assert " image " in _choose(32, 256, 14, 1024, 1, 2)[0]
    assert " image " in _choose(32, 256, 14, 1024, 1, padding=1)[0]
    assert " image " in _choose(32, 256, 14, 256)[0]


@pytest.mark.parametrize(
    ("device", "architecture"), [(HOPPER, "sm90"), (AMPERE, "sm80"), ((8, 9, 128), "sm80"), (BLACKWELL, "sm80"), ((12, 0, 170), "sm80")]
)
def test_architectures(device: tuple[int, int, int], architecture: str) -> None:
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


@pytest.mark.parametrize(
    ("device", "tile", "n", "channels", "size", "wanted"),
    [
        # Hopper: 4096 operations a cycle and multiprocessor at 1.7 GHz. 6272 tiles are 48 waves of 9 steps; 55 % of the rate.
        (HOPPER, "128x64", 256, 64, 56, 48 * 9 * 2 * 128 * 64 * 64 / (0.55 * 4096) / 1.7e3 + 3.5),
        # 392 tiles are 3 waves of 36 steps; 85 %.
        (HOPPER, "128x256", 256, 256, 14, 3 * 36 * 2 * 128 * 256 * 64 / (0.85 * 4096) / 1.7e3 + 3.5),
        # Ampere: 2048 operations at 1.4 GHz. 6272 tiles are 59 waves on 108 multiprocessors; 65 %.
        (AMPERE, "128x64", 256, 64, 56, 59 * 9 * 2 * 128 * 64 * 64 / (0.65 * 2048) / 1.4e3 + 3.5),
    ],
)
def test_predictions(device: tuple[int, int, int], tile: str, n: int, channels: int, size: int, wanted: float) -> None:
    """Of layers that arithmetic bounds: the rates and efficiencies are those of the tile's own architecture."""
    kernel, reason = _choose(n, channels, size, channels, device=device)
    assert kernel.endswith(f" image {tile}")
    assert reason == f"{kernel}: predicted {wanted:.0f} us"


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
