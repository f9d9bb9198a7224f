"""The demo's second half: a ResNet before and after ``fuse_``, on photographs. Results compared, each distinct block timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _plain, testing
from ..benchmark.gpu_modules import folding_allows
from ..benchmark.gpu_timing import synchronised
from ..benchmark.timing import interleave
from ..cases import BlockCase
from ..testing.compare import accumulator, unit_roundoff
from ._digits import sklearn_folder
from .arguments import need

# Channel means and standard deviations of ImageNet, with which torchvision's networks expect their input.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Photograph:
    """A square cut out of a photograph: for the eye (height, width, RGB in 0..255) and for a network [1, 3, H, W]."""

    pixels: Any
    tensor: Tensor


def photograph(name: str, size: int, corner: tuple[float, float] = (0.5, 0.5)) -> Photograph:
    """``size`` x ``size`` pixels of one of scikit-learn's two photographs (china.jpg, flower.jpg).

    The square is as large as fits; ``corner`` says where it lies: (0.5, 0.5) is the middle.
    """
    image_module = need("PIL.Image", "demo")
    numpy = need("numpy", "demo")
    with image_module.open(sklearn_folder() / "images" / name) as image:
        side = min(image.size)
        left, top = (round((n - side) * c) for n, c in zip(image.size, corner, strict=True))
        square = image.convert("RGB").crop((left, top, left + side, top + side)).resize((size, size))
    pixels = numpy.asarray(square).copy()
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return Photograph(pixels, ((tensor - mean) / std)[None].contiguous())


def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Set the batch-norm statistics to those of ``images``, as training would have; returns the model in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over the batches seen
    model.train()
    with torch.no_grad():
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


@dataclass
class Conversion:
    """One network before and after. Errors are relative to the largest output; times are in milliseconds."""

    name: str
    fused_blocks: int
    blocks: int
    difference: float
    error: float
    eager_error: float
    allowed: float
    keys_kept: bool
    rows: list[dict[str, Any]]

    @property
    def ok(self) -> bool:
        return self.fused_blocks == self.blocks and self.error <= self.allowed and self.keys_kept


def residual_blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (_plain.BasicBlock, _plain.Bottleneck))}


def _distinct(model: nn.Module, x: Tensor) -> dict[str, tuple[str, Tensor]]:
    """Path of the first block of each shape -> its name in the layer table and the input that reaches it."""
    inputs: dict[str, Tensor] = {}
    hooks = []
    for path, block in residual_blocks(model).items():

        def keep(module: nn.Module, args: tuple[Tensor], path: str = path) -> None:
            inputs[path] = args[0].clone()

        hooks.append(block.register_forward_pre_hook(keep))
    model(x)
    for hook in hooks:
        hook.remove()
    found: dict[str, tuple[str, Tensor]] = {}
    for path, block in residual_blocks(model).items():
        kind = "bottleneck" if isinstance(block, _plain.Bottleneck) else "basic"
        convolution = block.get_submodule("conv1")
        assert isinstance(convolution, nn.Conv2d)
        size = inputs[path].shape[2], inputs[path].shape[3]
        stride = int(getattr(block, "stride"))  # noqa: B009  (mypy knows nothing of it)
        name = BlockCase(kind, convolution.in_channels, convolution.out_channels, size, stride).name
        if name not in {known for known, _ in found.values()}:
            found[path] = name, inputs[path]
    return found


def convert(
    name: str,
    model: nn.Module,
    image: Tensor,
    repeat: int,
    advance: Callable[[str], None],
) -> Conversion:
    """Convert a copy of ``model``, run ``image`` through both, compare, and time each distinct block in both."""
    from ..fusion import fuse_

    fused = copy.deepcopy(model)
    report = fuse_(fused)
    with torch.inference_mode():
        truth = copy.deepcopy(model).double()(image.double())
        eager, ours = model(image), fused(image)
    error, eager_error = testing.relative_error(ours, truth), testing.relative_error(eager, truth)
    # As in `bench`: twice the larger of eager's error and of what sums of this length lose, where the largest output is 1.
    additions = sum(m.weight[0].numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    roundoff, summed = unit_roundoff(image.dtype), unit_roundoff(accumulator(image.dtype)) * additions**0.5
    allowed = 2 * max(eager_error, summed) + roundoff
    if image.dtype in (torch.bfloat16, torch.float16):  # there folding rounds as much as a layer does: see `benchmark.gpu_modules`
        allowed = folding_allows(model, eager_error, image.dtype)
    before, after = model.state_dict(), fused.state_dict()
    keys_kept = list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    advance(f"{name} converted")
    return Conversion(
        name,
        _fused_blocks(report),
        len(residual_blocks(model)),
        testing.relative_error(ours, eager.double()),
        error,
        eager_error,
        allowed,
        keys_kept,
        _time(name, model, fused, image, repeat, advance),
    )


def _fused_blocks(report: Any) -> int:
    return len(report.fused)


def channels_last(model: nn.Module) -> nn.Module:
    """A copy of the model with its weights in channels_last."""
    copied: nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied


def _time(name: str, model: nn.Module, fused: nn.Module, image: Tensor, repeat: int, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Each distinct block and the whole network: the better memory format of eager against the better one of ours."""
    forms = {
        "eager": (model, torch.contiguous_format),
        "eager channels_last": (channels_last(model), torch.channels_last),
        "fused": (fused, torch.contiguous_format),
        "fused channels_last": (channels_last(fused), torch.channels_last),
    }
    rows = []
    with torch.inference_mode():
        parts = {"": (name, image), **_distinct(model, image)}
        for path, (label, x) in reversed(parts.items()):
            calls = {}
            for form, (whole, memory_format) in forms.items():
                part = whole.get_submodule(path)
                mine = x.contiguous(memory_format=memory_format)
                calls[form] = lambda part=part, mine=mine: part(mine)
            timings = interleave(calls, repeat=repeat, seconds=2, clock=synchronised(x.device))
            eager = min(("eager", "eager channels_last"), key=lambda form: timings[form].median)
            ours = min(("fused", "fused channels_last"), key=lambda form: timings[form].median)
            rows.append(
                {
                    "network": name,
                    "case": label,
                    "whole": not path,
                    "before": {"form": eager, **timings[eager].as_dict()},
                    "after": {"form": ours, **timings[ours].as_dict()},
                    "ratio": timings[eager].median / timings[ours].median,
                }
            )
            advance(label)
    return rows[:-1][::-1] + rows[-1:]
