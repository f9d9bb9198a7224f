"""Faults in the store of derived values and in what the profiler sees. ``faults.py`` plants them."""

from __future__ import annotations

from .fault import Fault

FAULTS = (
    Fault(
        "the store of packed weights has no bound",
        ("fused_resnet/ops/store.py",),
        "            if excess <= 0:\n",
        "            if True:\n",
        ("tests/ops/test_store.py::test_all_packings_of_an_operators_weight", "tests/ops/test_store.py::test_all_packings_of_a_blocks_weights"),
    ),
    Fault(
        "a value larger than the store's bound is made at each call",
        ("fused_resnet/ops/store.py",),
        "in in_order[:-1]:",
        "in in_order:",
        ("tests/ops/test_store.py::test_the_last_value_is_kept_however_large",),
    ),
    Fault(
        "calls that can be repeated hold packed weights beyond the store's bound",
        ("fused_resnet/runtime/cached.py",),
        " and all([entry.kept for entry in found[0].entries])]",
        "]",
        ("tests/ops/test_store.py::test_calls_in_turn_hold_no_more_than_the_store",),
    ),
    Fault(
        "what was made of a weight before it changed stays",
        ("fused_resnet/ops/derived.py",),
        "        store.forget_changed(number, owner)\n",
        "",
        ("tests/ops/test_store.py::test_what_was_made_before_a_change_goes_at_once",),
    ),
    Fault(
        "a value of several sources stays until the next is made",
        ("fused_resnet/ops/derived.py",),
        "        store.drop(number, tag)\n",
        "",
        ("tests/ops/test_store.py::test_another_source_that_changed",),
    ),
    Fault(
        "what is derived from pieces of one buffer piles up",
        ("fused_resnet/ops/store.py",),
        "if len(self.places) >= _MOST_PLACES and",
        "if False and",
        ("tests/ops/test_store.py::test_places_of_a_storage_start_over",),
    ),
    Fault(
        "under the profiler a program's last stage is left out",
        ("fused_resnet/runtime/stages.py",),
        "enumerate(program.stages()):",
        "enumerate(program.stages()[:-1]):",
        ("tests/runtime/test_profiler.py::test_a_networks_stages_are_ranges",),
    ),
    Fault(
        "a stage ends after its first phase",
        ("csrc/cpu/program.cpp",),
        "      stages_.back().end = i + 1;\n",
        "",
        ("tests/runtime/test_profiler.py::test_a_stage_of_several_phases",),
    ),
    Fault(
        "a joined projection is in no stage",
        ("csrc/cpu/program.cpp",),
        "if (node.joined_number != Network::kNone)",
        "if (false)",
        ("tests/runtime/test_profiler.py::test_a_networks_stages_are_ranges",),
    ),
    Fault(
        "under the profiler what is not finite is not computed directly",
        ("fused_resnet/runtime/stages.py",),
        "                return False\n",
        "                break\n",
        ("tests/runtime/test_profiler.py::test_where_a_value_is_not_finite",),
    ),
)
