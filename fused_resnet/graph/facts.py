"""What a decision was made on, as data that is checked before each use of it.

An analysis reads attributes, globals, classes and containers only through ``Facts``, which writes down what it found there;
``checked.py`` makes a native pass of it.
"""

from __future__ import annotations

import types
from typing import Any

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "MISSING"})()  # what is looked for and not there

# The kinds, as csrc/facts.h numbers them, and what (place, name, value) says. A place of None is the owner's __dict__, which would
# else keep the owner itself alive.
ITEM = 0  # the dictionary holds this value under this name
ABSENT = 1  # the dictionary does not hold this name
EMPTY = 2  # what the dictionary holds under this name is an empty dictionary
CONTENTS = 3  # the dictionary holds these names (a tuple) with these values (a tuple), in this order, and nothing else
LIST = 4  # the list holds these values (a tuple)
TYPE = 5  # the object is of this class (value) and has this dictionary of attributes (name; None: it is not asked for)
LOOKUP = 6  # the class, or the first of its bases that has this name, has this value for it; or none has it
FUNCTION = 7  # the function has this code (name) and these defaults (value: of arguments by position, by keyword)
CELL = 8  # the closure's cell holds this value
KIND = 9  # the dictionary holds under this name an object whose class is one of these (a tuple), not one derived from them

Row = tuple[int, Any, Any, Any]


def lookup(cls: type, name: str) -> Any:
    """What a class has under a name, itself or by inheritance, as it stands there: no descriptor is asked. Else MISSING."""
    for base in cls.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return MISSING


def attributes_of(obj: Any) -> dict[str, Any] | None:
    """An object's own attributes, where it keeps them in a plain dictionary."""
    try:
        found = object.__getattribute__(obj, "__dict__")
    except AttributeError:
        return None
    return found if type(found) is dict else None


class Facts:
    """Reads for an analysis, and remembers. ``owner``: the module that the analysis is about."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner.__dict__
        self._owner_id = id(owner)
        self._rows: dict[tuple[int, int, Any], Row] = {}
        self._reads: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._cells: dict[int, types.CellType] = {}  # one for each function that was followed, by its id: see ``function``

    def _write(self, kind: int, place: Any, name: Any, value: Any) -> None:
        self._rows.setdefault((kind, id(place), name), (kind, None if place is self._owner else place, name, value))

    def item(self, place: dict[str, Any], name: str) -> Any:
        """What a dictionary holds under a string, or MISSING."""
        value = place.get(name, MISSING)
        self._write(ABSENT if value is MISSING else ITEM, place, name, value)
        return value

    def kind(self, place: dict[str, Any], name: str, classes: tuple[type, ...]) -> Any:
        """What a dictionary holds under a string, or MISSING, for a decision that depends on whether its class is one of ``classes``."""
        value = place.get(name, MISSING)
        if type(value) in classes:
            self._write(KIND, place, name, classes)
            return value
        return self.item(place, name)

    def contents(self, place: dict[Any, Any]) -> dict[Any, Any]:
        """A dictionary's whole contents."""
        found = dict(place)
        self._write(CONTENTS, place, None, (tuple(found), tuple(found.values())))
        return found

    def is_empty(self, place: dict[str, Any], name: str) -> bool:
        """Whether the dictionary that ``place`` holds under a name is empty."""
        inner = place.get(name)
        if isinstance(inner, dict) and not inner:
            self._write(EMPTY, place, name, None)
            return True
        if isinstance(self.item(place, name), dict):
            assert inner is not None
            self.contents(inner)
        return False

    def listed(self, place: list[Any]) -> tuple[Any, ...]:
        """A list's items."""
        found = tuple(place)
        self._write(LIST, place, None, found)
        return found

    def class_of(self, obj: Any) -> type:
        """An object's class; the owner's own is what its forward was found in."""
        if id(obj) != self._owner_id:
            self._write(TYPE, obj, None, (attributes_of(obj), type(obj)))
        return type(obj)

    def lookup(self, cls: type, name: str) -> Any:
        """As the function."""
        value = lookup(cls, name)
        self._write(LOOKUP, cls, name, value)
        return value

    def function(self, function: types.FunctionType) -> tuple[Any, ...]:
        """A function's code and its defaults, as a fact. Returns the path of the function.

        The path begins at a closure's cell that is made for it: torch.compile guards what a closure holds, and so what is read of the
        function, wherever the forward has the function from.
        """
        self._write(FUNCTION, function, None, (function.__code__, (function.__defaults__, function.__kwdefaults__)))
        cell = self._cells.setdefault(id(function), types.CellType(function))
        defaults, keywords = function.__defaults__, function.__kwdefaults__
        for name, values, keys in (("__defaults__", defaults, range(len(defaults or ()))), ("__kwdefaults__", keywords, keywords or ())):
            self.read((cell, name))
            for key in keys:
                self.read((cell, name, (key,)))
            if values is not None:
                self.read((cell, name, ("", "length")))
        return (cell,)

    def cell(self, cell: types.CellType) -> Any:
        """What a closure's cell holds, or MISSING."""
        try:
            value = cell.cell_contents
        except ValueError:
            return MISSING
        self._write(CELL, cell, None, value)
        return value

    def read(self, path: tuple[Any, ...]) -> None:
        """Remember how to come to something that was read: see ``values.Known``."""
        root, *steps = path
        self._reads[(id(root), *steps)] = path

    def rows(self) -> tuple[Row, ...]:
        """As the pass takes them."""
        return tuple([_unpacked(row) for row in self._rows.values()])

    def reads(self) -> tuple[tuple[Any, ...], ...]:
        """The paths that ``read`` was told."""
        return tuple(self._reads.values())


def _unpacked(row: Row) -> Row:
    kind, place, _, value = row
    return (kind, place, *value) if kind in (CONTENTS, TYPE, FUNCTION) else row
