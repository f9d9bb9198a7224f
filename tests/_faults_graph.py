"""Faults in the analysis of forwards, fused_resnet/graph/, and in what checks its facts. ``faults.py`` plants them."""

from __future__ import annotations

from _fault import Fault

_INTERPRETER = ("fused_resnet/graph/interpreter.py",)
_OBJECTS = ("fused_resnet/graph/objects.py",)
_FACTS = ("fused_resnet/graph/facts.py",)
_FORWARD = "tests/test_forwards.py::test_a_forward"
_CHANGE = "tests/test_forwards.py::test_a_change"

FAULTS = (
    Fault(
        "a context inside a forward is forgotten",
        _INTERPRETER,
        "raise Refused(f\"it runs under `with {', '.join(shown(item) for item in s.items)}`, which is not followed\")",
        "self.block(s.body)",
        (_FORWARD, "tests/test_forwards.py::test_a_stem"),
    ),
    Fault(
        "a write to an attribute is forgotten",
        _INTERPRETER,
        'raise Refused(f"it sets {shown(target)}")',
        "pass",
        (_FORWARD,),
    ),
    Fault(
        "a counter is forgotten",
        _INTERPRETER,
        'raise Refused(f"it changes {shown(s.target)}")',
        "return",
        (_FORWARD, "tests/test_forwards.py::test_a_stem"),
    ),
    Fault(
        "an unknown call gives False, once and for all",
        ("fused_resnet/graph/calls.py",),
        "    raise run.not_followed(obj)\n",
        "    return Known(False)\n",
        (_FORWARD,),
    ),
    Fault(
        "only eval mode is followed",
        ("fused_resnet/graph/analysis.py",),
        "        pending += [(*chosen[:i], True) for i in range(len(modes), len(chosen))]\n",
        "",
        (_FORWARD, "tests/test_conversion_refusals.py::test_refusals"),
    ),
    Fault(
        "all modules are of one mode",
        ("fused_resnet/graph/recorder.py",),
        "        key = id(module.value)\n",
        "        key = 0\n",
        (_FORWARD,),
    ),
    Fault(
        "a global that was read is no fact",
        _INTERPRETER,
        "value, path = self.facts.item(scope, name), (scope, name)",
        "value, path = scope.get(name, MISSING), (scope, name)",
        (_CHANGE,),
    ),
    Fault(
        "an attribute that was read is no fact",
        _OBJECTS,
        "value = run.facts.item(attributes, name)",
        "value = attributes.get(name, MISSING)",
        (_CHANGE,),
    ),
    Fault(
        "a class's attribute is no fact",
        _FACTS,
        "        self._write(LOOKUP, cls, name, value)\n",
        "",
        (_CHANGE, "tests/test_graph.py::test_a_fact_breaks"),
    ),
    Fault(
        "a function's code is no fact",
        _FACTS,
        "        self._write(FUNCTION, function, None, (function.__code__, (function.__defaults__, function.__kwdefaults__)))\n",
        "",
        (_CHANGE, "tests/test_graph.py::test_a_fact_breaks"),
    ),
    Fault(
        "a closure's cell is no fact",
        _FACTS,
        "        self._write(CELL, cell, None, value)\n",
        "",
        (_CHANGE, "tests/test_graph.py::test_a_fact_breaks"),
    ),
    Fault(
        "the order of a container's modules is no fact",
        ("csrc/facts.cpp",),
        "    if (!same(key, PyTuple_GET_ITEM(names, i)) || !same(value, PyTuple_GET_ITEM(values, i))) return false;\n",
        "    if (item(dict, PyTuple_GET_ITEM(names, i)) == nullptr) return false;\n",
        (_CHANGE, "tests/test_graph.py::test_a_fact_breaks"),
    ),
    Fault(
        "a hook in a new dictionary is not heard",
        ("csrc/facts.cpp",),
        "return there != nullptr && PyDict_Check(there) && PyDict_GET_SIZE(there) == 0;",
        "return there != nullptr && PyDict_Check(there);",
        (_CHANGE, "tests/test_graph.py::test_a_fact_breaks"),
    ),
    Fault(
        "a hook on an absorbed module is not called",
        ("fused_resnet/graph/calls.py",),
        "        if not facts.is_empty(attributes, name):\n",
        "        if facts.is_empty(attributes, name) is None:\n",
        (_CHANGE, "tests/test_conversion_refusals.py::test_refusals"),
    ),
    Fault(
        "a subclass is taken for PyTorch's own layer",
        _OBJECTS,
        "    return all(as_ever) and (not name or facts.item(F.__dict__, name) is function)\n",
        "    return len(as_ever) > 0\n",
        (_FORWARD, "tests/test_conversion_refusals.py::test_refusals"),
    ),
    Fault(
        "a dropout's probability is no fact",
        ("fused_resnet/graph/match.py",),
        "        value = self.facts.item(find(self.module, path).__dict__, name)\n",
        "        value = find(self.module, path).__dict__.get(name, MISSING)\n",
        (_CHANGE,),
    ),
    Fault(
        "a module of two names is found again by either",
        ("fused_resnet/graph/calls.py",),
        '        parent = run.facts.item(parent.__dict__["_modules"], name)\n',
        '        parent = parent.__dict__["_modules"][name]\n',
        ("tests/test_graph.py::test_two_names_after_compilation",),
    ),
    Fault(
        "a source that changed is believed",
        ("fused_resnet/graph/source.py",),
        "    if not found or not any(_same(code, other) for other in codes.get(place, ())):\n",
        "    if not found:\n",
        ("tests/test_graph.py::test_a_source_that_changed",),
    ),
    Fault(
        "torch.compile guards no attribute",
        ("fused_resnet/_block.py",),
        "                _read(self, reads)\n",
        "",
        ("tests/test_forwards.py::test_a_change_after_compilation",),
    ),
    Fault(
        "torch.compile guards no global",
        ("fused_resnet/_block.py",),
        "                    reader()\n",
        "                    pass\n",
        ("tests/test_forwards.py::test_a_change_after_compilation",),
    ),
    Fault(
        "torch.compile guards no container's modules",
        _OBJECTS,
        "    read_all(run, owner, children.values())\n",
        "",
        ("tests/test_forwards.py::test_a_container_changed_after_compilation",),
    ),
    Fault(
        "torch.compile guards no closure",
        _INTERPRETER,
        "            value, path = self.facts.cell(cell), (cell,)\n",
        "            value, path = self.facts.cell(cell), None\n",
        ("tests/test_forwards.py::test_a_change_after_compilation",),
    ),
    Fault(
        "a list is taken for a tuple",
        ("fused_resnet/graph/match.py",),
        "        return type(value)([plain_value(v) for v in value])\n",
        "        return tuple([plain_value(v) for v in value])\n",
        (_FORWARD,),
    ),
    Fault(
        "an attribute that hides a parameter goes unseen",
        ("fused_resnet/graph/match.py",),
        "        hiding = self.facts.item(attributes, name)\n",
        "        hiding = attributes.get(name, MISSING)\n",
        (_CHANGE,),
    ),
    Fault(
        "a refusal keeps what refused it, and so the block",
        ("fused_resnet/_block.py",),
        "            self.refusal = Refused(error.reason, error.is_block, error.where)",
        "            self.refusal = error",
        ("tests/test_graph.py::test_a_block_that_runs_unfused_is_freed_at_once",),
    ),
    Fault(
        "a refusal names the function, not the line",
        _INTERPRETER,
        "            frame.line = statement.lineno\n",
        "",
        ("tests/test_forwards.py::test_a_refusal_names_its_line",),
    ),
    Fault(
        "a nested function sees what its names were",
        _INTERPRETER,
        "        outer = local.frame\n",
        "        outer = local.frame\n        outer.values = {**outer.values, 'k': Known(0)} if 'k' in outer.values else outer.values\n",
        (_FORWARD,),
    ),
)
