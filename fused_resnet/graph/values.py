"""The values of an analysis besides operations: what was there before the call, and the functions that a call makes."""

from __future__ import annotations

import ast
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

PLAIN = (type(None), bool, int, float, str)
# Immutable objects of torch that may be an argument.
CONSTANTS = (*PLAIN, type(Ellipsis), torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size)
DICTS: tuple[type, ...] = (dict, OrderedDict)
FunctionNode = ast.FunctionDef | ast.Lambda


class Definition(NamedTuple):
    """node: the function's syntax tree. file: its name, without folders. owner: the class around it, by which Python mangles __names."""

    node: FunctionNode
    file: str
    owner: str


class Known:
    """An object that was there before the call.

    path: how to come to it again, or None: (root, step, ...). The root is a dictionary of globals, a closure's cell, or "" for the owner. A
    step is a name (an attribute; of a root of globals, a global), a tuple of one key (an item), (name, "class") for an attribute of the
    object's class, (name, "absent") for one that is not there, (key, "missing") for an item that is not there, or ("", "length").
    """

    __slots__ = ("path", "value")

    def __init__(self, value: Any, path: tuple[Any, ...] | None = None) -> None:
        self.value = value
        self.path = path

    def step(self, step: Any) -> tuple[Any, ...] | None:
        """The path of what one step leads to."""
        plain = type(step) is str or type(step[0]) in (str, int, bool)
        return (*self.path, step) if plain and self.path is not None else None


@dataclass(frozen=True, eq=False)
class Method:
    """A Python function bound to its first argument."""

    function: types.FunctionType
    owner: Any


@dataclass(frozen=True, eq=False)
class Local:
    """A function that the forward itself defines: its syntax tree, the call (``recorder.Frame``) that defines it, its defaults."""

    node: Any
    frame: Any
    defaults: list[Any]
    keyword_defaults: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Super:
    """``super()``: what comes behind ``cls`` in the owner's class."""

    cls: type
    owner: Known


@dataclass(frozen=True, eq=False)
class Native:
    """A function whose effect is known: ``call(run, args, kwargs)``."""

    name: str
    call: Callable[..., Any]


def is_module(value: Any) -> bool:
    return isinstance(value, Known) and issubclass(type(value.value), nn.Module)
