"""Faults in the package's Python files. ``faults.py`` plants them."""

from __future__ import annotations

from _fault import Fault

FAULTS = (
    Fault(
        "the hot path is never taken",
        ("fused_resnet/_select.py",),
        "    return why\n",
        '    return why or ["a fault"]\n',
        ("tests/test_isa.py::test_the_plan_is_of_this_instruction_set",),
    ),
    Fault(
        "a changed weight is not packed again",
        ("fused_resnet/_derived.py",),
        "return entry if same and source.guard is not None and source.guard.holds() else None",
        "return entry",
        ("tests/test_derived.py::test_remade_after", "tests/test_derived.py::test_training_loop"),
    ),
    Fault(
        "a tensor through .data taken for the one before",
        ("fused_resnet/_derived.py",),
        "    if source.weak is not None and source.weak() is not t:\n        return None\n",
        "",
        ("tests/test_sequences.py::test_aliases_of_one_storage",),
    ),
    Fault(
        "a pruned weight goes unseen in a repeated block",
        ("fused_resnet/_whole.py",),
        " or [(t.shape, t.stride(), t.dtype) for t in self.others] != self.layouts",
        "",
        ("tests/test_sequences.py::test_pruned_in_place",),
    ),
    Fault(
        "a cut bias goes unseen by a block's plans",
        ("fused_resnet/_whole.py",),
        "*[None if t is None else t.shape for t in self.sources]",
        "*[None if t is None else t.dim() for t in self.sources], weight.shape",
        ("tests/test_sequences.py::test_a_vector_that_is_cut_is_an_error_as_in_pytorch",),
    ),
    Fault(
        "clear_derived leaves what blocks keep",
        ("fused_resnet/_derived.py",),
        "    for store in [*_stores]:\n        store.clear()\n",
        "",
        ("tests/test_sequences.py::test_clear_derived_makes_everything_anew",),
    ),
    Fault(
        "packed weights stay after .to()",
        ("fused_resnet/_block.py",),
        "            current.bound.clear()\n",
        "            pass\n",
        ("tests/test_sequences.py::test_packed_weights_are_given_back",),
    ),
    Fault(
        "a block and what it keeps refer to each other",
        ("fused_resnet/_whole.py",),
        "own = None if store is None else weakref.ref(store)",
        "own = None if store is None else (lambda: store)",
        ("tests/test_sequences.py::test_a_deleted_block_gives_everything_back",),
    ),
    Fault(
        "a weak reference to a Parameter",
        ("fused_resnet/_derived.py",),
        "self.weak = None if gone is None or isinstance(t, nn.Parameter) else",
        "self.weak = None if gone is None else",
        ("tests/test_sequences.py::test_conversions_that_swap_parameters",),
    ),
    Fault(
        "the guard reads memory that nobody holds",
        ("fused_resnet/_derived.py",),
        "    entry = found.entries.get((tag, t.data_ptr()))\n    if entry is None:",
        "    del storage\n    entry = found.entries.get((tag, t.data_ptr()))\n    if entry is None:",
        ("tests/test_sequences.py::test_the_guard_reads_memory_that_is_held",),
    ),
    Fault(
        "every change of numerics strands the plans",
        ("fused_resnet/_numerics.py",),
        "key=lambda item: item[0])), len(_numbers))",
        "key=lambda item: item[0])) + (changes,), len(_numbers))",
        ("tests/test_sequences.py::test_switching_numerics_to_and_fro_keeps_plans",),
    ),
    Fault(
        "operands without memory are read",
        ("fused_resnet/_arguments.py",),
        "    if t.numel() and t.untyped_storage().nbytes() == 0:\n",
        "    if False:\n",
        ("tests/test_freed_storage.py",),
    ),
    Fault(
        "saved for a gradient that nobody wants",
        ("fused_resnet/_operators.py",),
        "saved = (input, weight) if ctx.needs_input_grad[0] or ctx.needs_input_grad[1] else (None, None)",
        "saved = (input, weight)",
        ("tests/test_gradients.py::test_only_the_shortcut_wants_a_gradient",),
    ),
    Fault(
        "training: a continued run begins its epoch again",
        ("fused_resnet/training/data.py",),
        "islice(iter(self.share), self.done, self.per_epoch)",
        "islice(iter(self.share), self.per_epoch - self.done)",
        (
            "tests/test_train.py::test_batches_are_the_same_for_any_number_of_processes",
            "tests/test_train.py::test_continues_bit_for_bit_from_any_step",
        ),
    ),
    Fault(
        "training: momenta lost when a run continues",
        ("fused_resnet/training/loop.py",),
        'self.optimizer.load_state_dict(state["optimizer"])',
        "pass",
        ("tests/test_train.py::test_continues_bit_for_bit_from_any_step",),
    ),
    Fault(
        "training: gradients not averaged over the processes",
        ("fused_resnet/training/loop.py",),
        "if world.size > 1 else self.network",
        "if world.size > 2 else self.network",
        ("tests/test_train.py::test_two_processes_do_what_one_does",),
    ),
    Fault(
        "training: a checkpoint written over the one before",
        ("fused_resnet/training/checkpoint.py",),
        'path.with_name(path.name + ".unfinished")',
        "path",
        ("tests/test_train_bad_input.py::test_a_crash_in_mid_write_leaves_the_old_file",),
    ),
    Fault(
        "training: a checkpoint that may run code",
        ("fused_resnet/training/checkpoint.py",),
        "weights_only=True",
        "weights_only=False",
        ("tests/test_train_bad_input.py::test_foreign_checkpoint_is_refused_and_kept",),
    ),
    Fault(
        "training: checksums not compared",
        ("fused_resnet/training/checkpoint.py",),
        "damaged = archive.testzip()",
        "damaged = None",
        ("tests/test_train_bad_input.py::test_broken_checkpoint_is_refused_and_kept",),
    ),
)
