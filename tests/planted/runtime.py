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
    Fault(
        "views of two sizes at one address push each other out",
        ("fused_resnet/ops/store.py",),
        "if source.strong is None and (",
        "if False and (",
        ("tests/ops/test_store.py::test_views_of_two_sizes_at_one_address",),
    ),
    Fault(
        "calls with old weights are kept while new ones are packed",
        ("fused_resnet/runtime/executor.py",),
        "    if before is not None and not before.holds():\n",
        "    if False:\n",
        (
            "tests/ops/test_store.py::test_a_module_packs_anew_when_the_old_is_gone",
            "tests/ops/test_store.py::test_calls_that_cannot_be_repeated_drop_those_that_could",
        ),
    ),
    Fault(
        "of a tensor whose changes nothing counts some bytes are compared",
        ("fused_resnet/ops/derived.py",),
        "_ALL if version_of(t) < 0 else SOME",
        "SOME",
        ("tests/ops/test_store.py::test_data_of_another_kind_than_the_tensor", "tests/ops/test_derived.py::test_inference_tensors"),
    ),
    Fault(
        "max pooling: the last window of ceil_mode may begin in the padding",
        ("fused_resnet/runtime/pooling.py",),
        "(count - 1) * stride >= size + padding",
        "(count - 1) * stride >= size + 2 * padding",
        ("tests/runtime/test_pooling.py::test_outputs_without_memory",),
    ),
    Fault(
        "a pooled shortcut is made although groups are the library's",
        ("fused_resnet/runtime/program.py",),
        "None in others or any([operand.groups != 1 for operand in operands]):",
        "None in others:",
        ("tests/runtime/test_profiler.py::test_a_pooled_shortcut_is_made_once",),
    ),
)
