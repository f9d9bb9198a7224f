"""Random sequences of calls and changes over a pool of weights and blocks: ``test_stateful.py`` runs some, ``stateful_fuzz.py`` many.

What is trusted: the reference in float64, for the operator; for a block an unconverted twin, to which every change is done as well. A stale
packed weight, plan or repeated call gives another result, and every change here is large enough to be far outside of rounding: what is
written is at least as large as the values that are there.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import fused_resnet
from fused_resnet import _extension, _plain, _settings, reference
from fused_resnet.ops import derived

# ||ours - expected|| / ||expected||, per dtype. Winograd F(4x4, 3x3) of 64 channels has 1e-6 (bench/results/numerics.json), a block of two
# such layers and batch norm over few pixels a few times that; bfloat16 has 2^-9 for each rounding, of which a twin's block has six.
BOUND = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 4e-2}
DTYPES = list(BOUND)
FORMATS = [torch.contiguous_format, torch.channels_last]
# The same of the gradient of a block's input. A pre-activation next to zero may be rounded to either side, which turns the gradient of one
# element on or off; a gradient through a weight that is no longer there is wrong in all of them, by at least its own size.
GRADIENT_BOUND = 0.4
ERRORS = (RuntimeError, TypeError, ValueError)
MOST = 4  # weights, and blocks, at a time

steps: Counter[str] = Counter()  # how often each rule has run


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def differ(ours: Tensor, expected: Tensor, bound: float | None = None) -> str:
    """Why two results are not the same; "" if they are."""
    if ours.shape != expected.shape:
        return f"shape {list(ours.shape)} instead of {list(expected.shape)}"
    a, b = ours.detach().double(), expected.detach().double()
    if not bool(b.isfinite().all()):
        return "the sequence has left the finite numbers"
    error, size = float((a - b).norm()), float(b.norm())
    if error <= (bound or BOUND[ours.dtype]) * size + 1e-30:  # not so for a NaN
        return ""
    return f"error {error / max(size, 1e-300):.1e} in {ours.dtype}"


def one_element(t: Tensor) -> None:
    t.view(-1)[t.numel() // 3].add_(8) if t.is_contiguous() else t.add_(8)


# What is done to a weight, which may be a Parameter, by name. Each changes values.
CHANGES: dict[str, Callable[[Tensor, int], Any]] = {
    "add_": lambda t, seed: t.add_(3 - 6 * (seed % 2)),
    "one element": lambda t, seed: one_element(t),
    "copy_": lambda t, seed: t.copy_(integers(tuple(t.shape), seed)),
    "neg_ through .data": lambda t, seed: t.data.neg_(),
    "neg_ through detach": lambda t, seed: t.detach().neg_(),
    ".data =": lambda t, seed: setattr(t, "data", integers(tuple(t.shape), seed).to(t.dtype)),
    ".data = other layout": lambda t, seed: setattr(t, "data", (-t.data).contiguous(memory_format=FORMATS[seed % 2])),
    "fewer outputs": lambda t, seed: setattr(t, "data", t.data[: max(t.shape[0] // 2, 1)]),
    "fewer inputs": lambda t, seed: setattr(t, "data", t.data[:, : max(t.shape[1] // 2, 1)]),
}
# What is done to a block and its twin.
BLOCK_CHANGES: dict[str, Callable[[Any, int], Any]] = {
    "weight in place": lambda b, seed: b.conv2.weight.copy_(normal(tuple(b.conv2.weight.shape), seed)),
    "weight through .data": lambda b, seed: b.conv1.weight.data.neg_(),
    "weight .data =": lambda b, seed: setattr(b.conv1.weight, "data", -b.conv1.weight.data),
    "another Parameter": lambda b, seed: setattr(b.conv2, "weight", nn.Parameter(-b.conv2.weight.detach().clone())),
    "running_mean": lambda b, seed: b.bn1.running_mean.add_(2),
    "running_var, another buffer": lambda b, seed: setattr(b.bn2, "running_var", b.bn2.running_var.clone() * 4),
    "norm's weight": lambda b, seed: b.bn2.weight.neg_(),
    "eps": lambda b, seed: setattr(b.bn1, "eps", b.bn1.eps + 1),
    "stride": lambda b, seed: None if b.downsample is None else [setattr(m, "stride", (1 + seed % 2,) * 2) for m in (b.conv1, b.downsample[0])],
    "load_state_dict": lambda b, seed: b.load_state_dict({k: v / (1 + v.is_floating_point()) for k, v in b.state_dict().items()}),
    "train": lambda b, seed: b.train(),
    "eval": lambda b, seed: b.eval(),
    "double": lambda b, seed: b.double(),
    "float": lambda b, seed: b.float(),
    "frozen": lambda b, seed: b.requires_grad_(seed % 2 == 0),
    "hook": lambda b, seed: b.bn1.register_forward_hook(lambda module, args, output: output * 2),
    "no hooks": lambda b, seed: b.bn1._forward_hooks.clear(),
}


class Sequences(RuleBasedStateMachine):
    """The pool, what can be done with it, and what must hold after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self.blocks: list[tuple[Any, Any]] = []  # ours, its twin
        # The arguments of the last calls: a change comes between two calls that are alike.
        self.call: dict[str, Any] = {"uses": [(7, 1)], "batch": 1, "memory_format": FORMATS[1], "grad": False, "shortcut": False, "seed": 0}
        self.block_call: dict[str, Any] = {"size": 8, "batch": 1, "memory_format": FORMATS[1], "mode": "no_grad", "times": 2, "seed": 0}
        cpu = _extension.cpu
        self.before = torch.get_num_threads(), _settings.current.numerics, _settings.current.algorithm, None if cpu is None else cpu.isa()

    @initialize()
    def start(self) -> None:
        warnings.simplefilter("ignore", RuntimeWarning)  # a block with a hook says that it runs unfused

    def teardown(self) -> None:
        threads, numerics, algorithm, isa = self.before
        torch.set_num_threads(threads)
        _settings.set_numerics(numerics)
        _settings.change(algorithm=algorithm)
        if isa is not None:
            _settings.use_isa(isa)
        self.weights.clear()
        self.blocks.clear()

    # The operator.

    @rule(
        channels=st.sampled_from([(3, 5), (16, 16), (24, 40), (64, 64)]),
        kernel=st.sampled_from([1, 3]),
        dtype=st.sampled_from(DTYPES),
        parameter=st.booleans(),
        seed=st.integers(0, 99),
    )
    def new_weight(self, channels: tuple[int, int], kernel: int, dtype: torch.dtype, parameter: bool, seed: int) -> None:
        steps["new weight"] += 1
        weight = integers((channels[1], channels[0], kernel, kernel), seed).to(dtype)
        self.weights.append(nn.Parameter(weight, requires_grad=seed % 2 == 0) if parameter else weight)
        del self.weights[:-MOST]

    @precondition(lambda self: self.weights)
    @rule(
        which=st.integers(0, MOST - 1),
        uses=st.lists(st.sampled_from([(7, 1), (14, 2), (14, 1), (15, 2), (4, 1)]), min_size=1, max_size=3),
        batch=st.sampled_from([1, 3]),
        memory_format=st.sampled_from(FORMATS),
        grad=st.booleans(),
        shortcut=st.booleans(),
        seed=st.integers(0, 99),
    )
    def call_operator(
        self, which: int, uses: list[tuple[int, int]], batch: int, memory_format: Any, grad: bool, shortcut: bool, seed: int
    ) -> None:
        """One weight for several sizes (of the input) and strides."""
        self.call = {"uses": uses, "batch": batch, "memory_format": memory_format, "grad": grad, "shortcut": shortcut, "seed": seed}
        self.compare_operator(self.weights[which % len(self.weights)])

    def compare_operator(self, weight: Tensor) -> None:
        """With the arguments of the last call."""
        steps["call of the operator"] += 1
        batch, seed = self.call["batch"], self.call["seed"]
        for size, stride in self.call["uses"]:
            x = integers((batch, weight.shape[1], size, size), seed).to(weight.dtype).contiguous(memory_format=self.call["memory_format"])
            parameters: dict[str, Any] = {"stride": stride, "padding": weight.shape[2] // 2, "relu": seed % 3 > 0}
            wide = weight.detach().double()
            expected = reference.conv_bias_add_relu(x.double(), wide, **{**parameters, "relu": False})
            added = integers(tuple(expected.shape), seed + 1).to(weight.dtype) if self.call["shortcut"] else None
            expected = reference.conv_bias_add_relu(x.double(), wide, None, None if added is None else added.double(), **parameters)
            with torch.set_grad_enabled(self.call["grad"]):
                y = fused_resnet.conv_bias_add_relu(x, weight, None, added, **parameters)
            why = differ(y, expected)
            assert not why, f"operator, size {size}, stride {stride}: {why}"

    @precondition(lambda self: self.weights)
    @rule(which=st.integers(0, MOST - 1), how=st.sampled_from(list(CHANGES)), seed=st.integers(0, 99))
    def change_weight(self, which: int, how: str, seed: int) -> None:
        steps["change of a weight"] += 1
        weight = self.weights[which % len(self.weights)]
        self.compare_operator(weight)
        with torch.no_grad():
            CHANGES[how](weight, seed)
        self.compare_operator(weight)

    @precondition(lambda self: self.weights)
    @rule(which=st.integers(0, MOST - 1))
    def alias(self, which: int) -> None:
        """Another tensor on the same memory joins the pool; its version counter is shared."""
        steps["alias"] += 1
        self.weights.append(self.weights[which % len(self.weights)].detach())
        del self.weights[:-MOST]

    @precondition(lambda self: self.weights)
    @rule(which=st.integers(0, MOST - 1))
    def drop_weight(self, which: int) -> None:
        steps["weight dropped"] += 1
        del self.weights[which % len(self.weights)]

    # Blocks.

    @precondition(lambda self: len(self.blocks) < MOST)
    @rule(channels=st.sampled_from([8, 16, 64]), projection=st.booleans(), share=st.booleans(), seed=st.integers(0, 99))
    def new_block(self, channels: int, projection: bool, share: bool, seed: int) -> None:
        steps["new block"] += 1
        stride = 1 + projection * (seed % 2)
        down = _plain.projection(channels, channels, stride) if projection else None
        twin = _plain.BasicBlock(channels, channels, stride, down).eval()
        with torch.no_grad():
            for i, t in enumerate([*twin.parameters(), *twin.buffers()]):
                if t.is_floating_point():
                    t.copy_(normal(tuple(t.shape), seed + i) / 4)
            for norm in (m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.running_var.abs_().add_(0.5)  # type: ignore[union-attr]
        ours = nn.Sequential(copy.deepcopy(twin))
        assert len(fused_resnet.fuse_(ours).fused) == 1
        for other, other_twin in self.blocks if share else ():
            if other.conv2.weight.shape == ours[0].conv1.weight.shape and other.conv2.weight.dtype == torch.float32:
                ours[0].conv1.weight, twin.conv1.weight = other.conv2.weight, other_twin.conv2.weight  # type: ignore[union-attr]
        self.blocks.append((ours[0], twin))

    @precondition(lambda self: self.blocks)
    @rule(
        which=st.integers(0, MOST - 1),
        size=st.sampled_from([5, 8, 16]),
        batch=st.sampled_from([1, 2]),
        memory_format=st.sampled_from(FORMATS),
        mode=st.sampled_from(["no_grad", "inference", "grad"]),
        times=st.integers(1, 3),
        seed=st.integers(0, 99),
    )
    def call_block(self, which: int, size: int, batch: int, memory_format: Any, mode: str, times: int, seed: int) -> None:
        self.block_call = {"size": size, "batch": batch, "memory_format": memory_format, "mode": mode, "times": times, "seed": seed}
        self.compare_block(self.blocks[which % len(self.blocks)])

    @staticmethod
    def run_block(block: Any, x: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
        """The output and, in mode "grad", the gradient of the input."""
        if mode != "grad":
            with torch.inference_mode() if mode == "inference" else torch.no_grad():
                return block(x), None
        x = x.clone().requires_grad_()
        y = block(x)
        # Not the weights' gradients: the library's own of a projection of few channels is wrong (``ops.gradients._writes_beyond_its_buffer``).
        return y, torch.autograd.grad(y.sum(), x)[0]

    def compare_block(self, pair: tuple[Any, Any]) -> None:
        """With the arguments of the last call."""
        steps["call of a block"] += 1
        ours, twin = pair
        size, batch, memory_format, mode, times, seed = self.block_call.values()
        weight = ours.conv1.weight
        x = normal((batch, weight.shape[1], size, size), seed).to(weight.dtype).contiguous(memory_format=memory_format)
        for _ in range(times):
            try:
                expected, gradient = self.run_block(twin, x, mode)
            except ERRORS as error:  # a block whose norm has another dtype than the weight that it shares, say
                try:
                    self.run_block(ours, x, mode)
                except ERRORS:
                    return
                raise AssertionError(f"block: no error, where the twin says {error}") from None
            y, ours_gradient = self.run_block(ours, x, mode)
            why = differ(y, expected)
            assert not why, f"block: {why}"
            if gradient is not None and ours_gradient is not None:
                why = differ(ours_gradient, gradient, GRADIENT_BOUND)
                assert not why, f"gradient of the input: {why}"
        for (key, ours_buffer), buffer in zip(ours.named_buffers(), twin.buffers(), strict=True):
            assert torch.allclose(ours_buffer.double(), buffer.double(), rtol=1e-4, atol=1e-5), key

    @precondition(lambda self: self.blocks)
    @rule(which=st.integers(0, MOST - 1), how=st.sampled_from(list(BLOCK_CHANGES)), seed=st.integers(0, 99))
    def change_block(self, which: int, how: str, seed: int) -> None:
        steps["change of a block"] += 1
        pair = self.blocks[which % len(self.blocks)]
        self.compare_block(pair)
        for block in pair:
            with torch.no_grad():
                BLOCK_CHANGES[how](block, seed)
        self.compare_block(pair)

    @precondition(lambda self: self.blocks)
    @rule(which=st.integers(0, MOST - 1), what=st.sampled_from(["dropped", "copied"]))
    def drop_or_copy_block(self, which: int, what: str) -> None:
        steps[f"block {what}"] += 1
        index = which % len(self.blocks)
        if what == "copied":
            self.blocks[index] = copy.deepcopy(self.blocks[index])
        else:
            del self.blocks[index]

    # The process.

    @rule(
        numerics=st.sampled_from(["fast", "strict"]),
        algorithm=st.sampled_from(["auto", "auto", "direct", "winograd2", "winograd4"]),
        threads=st.integers(1, 3),
        isa=st.integers(0, 9),
    )
    def settings(self, numerics: str, algorithm: str, threads: int, isa: int) -> None:
        steps["settings"] += 1
        _settings.set_numerics(numerics)
        _settings.change(algorithm=algorithm)
        torch.set_num_threads(threads)
        if _extension.cpu is not None and isa < 4:
            names = _extension.cpu.available_isas()
            _settings.use_isa(names[isa % len(names)])

    @rule(unseen=st.booleans())
    def clear(self, unseen: bool) -> None:
        """``unseen``: after writes that nothing else would make known."""
        steps["clear_derived"] += 1
        if unseen:
            for t in (*self.weights, *(b.conv1.weight for pair in self.blocks for b in pair)):
                one_element(t.data)
        fused_resnet.clear_derived()
        assert not derived._beside
        for weight in self.weights:
            self.compare_operator(weight)
        for pair in self.blocks:
            self.compare_block(pair)

    @invariant()
    def nothing_is_kept_of_what_is_gone(self) -> None:
        """Beside no storages but those of the pool's tensors and of what is folded from the blocks' parameters."""
        if len(derived._beside) > 8 * MOST:
            gc.collect()
        assert len(derived._beside) <= 8 * MOST, "derived values pile up"
