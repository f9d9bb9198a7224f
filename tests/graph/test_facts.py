"""Facts: what an analysis read, checked by the native pass and by the one in Python."""

from __future__ import annotations

import random
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from fused_resnet import _extension
from fused_resnet.graph.checked import Checked, _Plain
from fused_resnet.graph.facts import Facts


class Holder:
    value = 1

    def method(self) -> None:
        pass


class Derived(Holder):
    pass


def _function(a: int = 1, *, b: int = 2) -> int:
    return a + b


def _cell() -> tuple[types.CellType, Callable[[Any], None]]:
    inside = 1

    def read() -> int:
        return inside

    def write(value: Any) -> None:
        nonlocal inside
        inside = value

    assert read.__closure__ is not None
    return read.__closure__[0], write


_CELL, _write_cell = _cell()
Case = tuple[Callable[[Facts, Any], Any], Callable[[Any], Any], bool]

# what is read; what changes; whether the fact breaks
CASES: dict[str, Case] = {
    "item replaced": (lambda f, h: f.item(h.__dict__, "a"), lambda h: h.__dict__.update(a=[]), True),
    "item equal": (lambda f, h: f.item(h.__dict__, "number"), lambda h: h.__dict__.update(number=float("1.5")), False),
    "item of another type": (lambda f, h: f.item(h.__dict__, "one"), lambda h: h.__dict__.update(one=True), True),
    "item gone": (lambda f, h: f.item(h.__dict__, "a"), lambda h: h.__dict__.pop("a"), True),
    "tuple equal": (lambda f, h: f.item(h.__dict__, "pair"), lambda h: h.__dict__.update(pair=(1, "b" * 3)), False),
    "tuple other": (lambda f, h: f.item(h.__dict__, "pair"), lambda h: h.__dict__.update(pair=(1, "c")), True),
    "another item": (lambda f, h: f.item(h.__dict__, "a"), lambda h: h.__dict__.update(more=1), False),
    "absent comes": (lambda f, h: f.item(h.__dict__, "late"), lambda h: h.__dict__.update(late=None), True),
    "empty filled": (lambda f, h: f.is_empty(h.__dict__, "empty"), lambda h: h.empty.update(x=1), True),
    "empty replaced": (lambda f, h: f.is_empty(h.__dict__, "empty"), lambda h: h.__dict__.update(empty=OrderedDict()), False),
    "empty replaced, filled": (lambda f, h: f.is_empty(h.__dict__, "empty"), lambda h: h.__dict__.update(empty=OrderedDict(x=1)), True),
    "full emptied": (lambda f, h: f.is_empty(h.__dict__, "full"), lambda h: h.full.clear(), True),
    "contents more": (lambda f, h: f.contents(h.full), lambda h: h.full.update(z=3), True),
    "contents other": (lambda f, h: f.contents(h.full), lambda h: h.full.update(x=[]), True),
    "contents same": (lambda f, h: f.contents(h.full), lambda h: h.full.update(x=1), False),
    "contents in another order": (lambda f, h: f.contents(h.full), lambda h: h.full.update(x=h.full.pop("x")), True),
    "ordered moved": (lambda f, h: f.contents(h.ordered), lambda h: h.ordered.move_to_end("x"), True),
    "ordered same": (lambda f, h: f.contents(h.ordered), lambda h: h.ordered.update(x=1), False),
    "list longer": (lambda f, h: f.listed(h.a), lambda h: h.a.append(1), True),
    "list other": (lambda f, h: f.listed(h.a), lambda h: h.a.__setitem__(0, []), True),
    "class": (lambda f, h: f.class_of(h.inner), lambda h: setattr(h.inner, "__class__", Derived), True),
    "attributes replaced": (lambda f, h: f.class_of(h.inner), lambda h: setattr(h.inner, "__dict__", {}), True),
    "attributes changed": (lambda f, h: f.class_of(h.inner), lambda h: setattr(h.inner, "x", 1), False),
    "base's attribute": (lambda f, h: f.lookup(Derived, "value"), lambda h: setattr(Holder, "value", 2), True),
    "hidden": (lambda f, h: f.lookup(Derived, "value"), lambda h: setattr(Derived, "value", 1000), True),
    "not found, comes": (lambda f, h: f.lookup(Derived, "late"), lambda h: setattr(Holder, "late", None), True),
    "not found, stays": (lambda f, h: f.lookup(Derived, "late"), lambda h: setattr(Holder, "early", None), False),
    "code": (lambda f, h: f.function(_function), lambda h: setattr(_function, "__code__", _cell.__code__.replace(co_freevars=())), True),
    "defaults": (lambda f, h: f.function(_function), lambda h: setattr(_function, "__defaults__", (2,)), True),
    "keyword defaults": (lambda f, h: f.function(_function), lambda h: setattr(_function, "__kwdefaults__", {"b": 3}), True),
    "cell": (lambda f, h: f.cell(_CELL), lambda h: _write_cell(2), True),
    "another object of the kind": (lambda f, h: f.kind(h.__dict__, "inner", (int, Holder)), lambda h: setattr(h, "inner", Holder()), False),
    "the other kind": (lambda f, h: f.kind(h.__dict__, "inner", (int, Holder)), lambda h: setattr(h, "inner", 1), False),
    "a kind derived from it": (lambda f, h: f.kind(h.__dict__, "inner", (int, Holder)), lambda h: setattr(h, "inner", Derived()), True),
    "of a kind, gone": (lambda f, h: f.kind(h.__dict__, "inner", (int, Holder)), lambda h: delattr(h, "inner"), True),
    "of no such kind": (lambda f, h: f.kind(h.__dict__, "inner", (int,)), lambda h: setattr(h, "inner", 1), True),
}


@pytest.fixture
def _restored() -> Any:
    code = _function.__code__
    yield
    _function.__code__, _function.__defaults__, _function.__kwdefaults__ = code, (1,), {"b": 2}
    Holder.value = 1
    for cls in (Holder, Derived):
        for name in ("late", "early", *(("value",) if cls is Derived else ())):
            if name in cls.__dict__:
                delattr(cls, name)
    _write_cell(1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("_restored")
def test_a_fact_breaks(name: str) -> None:
    """The native pass and the one in Python agree, before and after a change."""
    read, change, breaks = CASES[name]
    holder: Any = Holder()
    holder.a, holder.one, holder.number, holder.pair, holder.inner = [0], 1, 1.5, (1, "bbb"), Holder()
    holder.empty, holder.full, holder.ordered = {}, {"x": 1, "y": 2}, OrderedDict(x=1, y=2)
    seen = Facts(holder)
    read(seen, holder)
    checked = Checked(seen)
    passes = [_Plain(checked.rows)] + ([] if _extension.cpu is None else [checked])
    for _ in range(2):  # what has not changed since the first time is not looked into the second time
        assert [p.broken(holder.__dict__) for p in passes] == [-1] * len(passes)
    change(holder)
    for _ in range(2):
        found = [p.broken(holder.__dict__) for p in passes]
    assert [n >= 0 for n in found] == [breaks] * len(passes)
    assert len(set(found)) == 1


def test_a_broken_fact_is_told() -> None:
    holder: Any = Holder()
    holder.a, holder.b = 1, 2
    seen = Facts(holder)
    seen.item(holder.__dict__, "a"), seen.item(holder.__dict__, "b")
    checked = Checked(seen)
    holder.b = 3
    assert checked.broken(holder.__dict__) == 1
    assert checked.rows[1][2] == "b"


def _read_something(rng: random.Random, seen: Facts, holder: Any, shared: Holder) -> None:
    reads: list[Callable[[], Any]] = [
        lambda: seen.item(holder.__dict__, rng.choice(("a", "b", "late", "later"))),
        lambda: seen.is_empty(holder.__dict__, "empty"),
        lambda: seen.contents(rng.choice((holder.kept, holder.ordered))),
        lambda: seen.kind(holder.__dict__, "inner", (Holder,)),
        lambda: seen.class_of(shared),
        lambda: seen.listed(holder.listed),
    ]
    rng.choice(reads)()


def _change_something(rng: random.Random, holders: list[Any]) -> None:
    """One change at random of what the facts of ``test_facts_after_any_changes`` are about."""
    holder = rng.choice(holders)
    values: list[Any] = [1, 2, 1.5, "a", (1, 2), (1, 2.0), None, True, holders[0].kept, Holder(), Derived(), {}, OrderedDict(), {"x": 1}]
    name = rng.choice(("a", "b", "inner", "empty", "late", "later"))
    empty = holders[0].__dict__.get("empty")
    place = rng.choice((holder.__dict__, holder.kept, holder.ordered, empty if isinstance(empty, dict) else holder.kept))
    changes: list[Callable[[], Any]] = [
        lambda: place.update({name: rng.choice(values)}),
        lambda: place.pop(name, None),
        place.clear if place is not holder.__dict__ else lambda: None,
        lambda: holder.ordered.move_to_end(next(iter(holder.ordered))) if holder.ordered else None,
        lambda: setattr(holder.inner, "__class__", rng.choice((Holder, Derived))) if isinstance(holder.__dict__.get("inner"), Holder) else None,
        lambda: setattr(holder, name, rng.choice(values)),
        lambda: holder.listed.append(1) if rng.random() < 0.5 else holder.listed.clear(),
        lambda: None,
    ]
    rng.choice(changes)()


@pytest.mark.skipif(_extension.cpu is None, reason="the compiled module's pass is compared")
@pytest.mark.parametrize("seed", range(40))
def test_facts_after_any_changes(seed: int) -> None:
    """Many facts about dictionaries that share objects, some of them included, and changes at random, there and back: after each, the
    native pass and the one in Python agree whether all of them hold, though the native one looks only into what has changed."""
    rng = random.Random(seed)
    holders: list[Any] = [Holder() for _ in range(3)]
    shared = Holder()
    for holder in holders:
        holder.a, holder.b, holder.inner, holder.listed = 1, (1, 2), shared, [1]
        holder.empty, holder.kept, holder.ordered = {}, holders[0].__dict__.get("kept", {"a": 1}), OrderedDict(a=1, b=2)
    all_facts = []
    for holder in holders:
        seen = Facts(holder)
        for _ in range(rng.randrange(1, 6)):
            _read_something(rng, seen, rng.choice(holders), shared)
        all_facts.append(Checked(seen))
    plain = _Plain(all_facts[0].rows)
    for checked, holder in zip(all_facts[1:], holders[1:], strict=True):
        all_facts[0].include(checked, holder.__dict__)
        plain.include(_Plain(checked.rows), holder.__dict__)
    owner = holders[0].__dict__
    broken = 0
    for _ in range(60):
        found = all_facts[0].broken(owner)
        assert (found >= 0) == (plain.broken(owner) >= 0)
        if found >= 0:
            broken += 1
            if rng.random() < 0.7:  # back, as far as it goes: what does not hold must not be remembered as what holds
                for holder in holders:
                    holder.__dict__.update(a=1, b=(1, 2), inner=shared, empty={})
                    holder.kept.clear(), holder.kept.update(a=1), holder.listed.__setitem__(slice(None), [1])
                    holder.ordered.clear(), holder.ordered.update(a=1, b=2)
                    holder.__dict__.pop("late", None), holder.__dict__.pop("later", None)
                object.__setattr__(shared, "__class__", Holder)
        _change_something(rng, holders)
    assert 0 < broken < 60


@pytest.mark.skipif(_extension.cpu is None, reason="what the compiled module's pass remembers")
def test_facts_of_two_owners_in_turn() -> None:
    """As a module and a shallow copy of it, which shares its facts: what was seen of the one is nothing that is known of the other."""
    one, other = Holder(), Holder()
    for holder in (one, other):
        holder.__dict__.update(empty={}, b=1)
    seen = Facts(one)
    assert seen.is_empty(one.__dict__, "empty")
    seen.item(one.__dict__, "b")
    checked = Checked(seen)
    assert [checked.broken(owner.__dict__) for owner in (one, other, one)] == [-1] * 3
    other.__dict__["b"] = 2  # behind what is empty: that is the other's by then
    assert [checked.broken(owner.__dict__) for owner in (one, other, one, other, one)] == [-1, 1, -1, 1, -1]
    checked.broken(other.__dict__)
    one.__dict__["empty"].update(x=1)
    assert checked.broken(one.__dict__) == 0
    one.__dict__["empty"].clear()
    checked.broken(other.__dict__)
    del other.__dict__["empty"]  # freed, and not to be read any more
    assert checked.broken(one.__dict__) == -1


@pytest.mark.skipif(_extension.cpu is None, reason="the compiled module's pass is asked")
def test_what_is_no_dictionary_holds_no_facts() -> None:
    holder: Any = Holder()
    place: Any = types.MappingProxyType({"a": 1})
    seen = Facts(holder)
    seen.item(place, "a")
    assert Checked(seen).broken(holder.__dict__) == 0


@pytest.mark.usefixtures("_restored")
def test_a_class_that_changes_again() -> None:
    """Lookups in a class are not repeated until it changes: after each change, of them or of others, they are."""
    holder: Any = Holder()
    seen = Facts(holder)
    seen.lookup(Derived, "value"), seen.lookup(Derived, "late"), seen.lookup(Holder, "method")
    checked = Checked(seen)
    for _ in range(3):
        assert checked.broken(holder.__dict__) == -1
        Holder.early = 1  # type: ignore[attr-defined]
        assert checked.broken(holder.__dict__) == checked.broken(holder.__dict__) == -1
        Holder.late = 1  # type: ignore[attr-defined]
        assert checked.broken(holder.__dict__) == checked.broken(holder.__dict__) == 1
        del Holder.late  # type: ignore[attr-defined]
        assert checked.broken(holder.__dict__) == -1
        Derived.value = 1000
        assert checked.broken(holder.__dict__) == 0
        del Derived.value
        assert checked.broken(holder.__dict__) == -1
