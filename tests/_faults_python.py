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
        "return bool((held is not None or stamp[2]() is t) and identity == stamp[0] and _fingerprint(t, identity) == stamp[1])",
        "return bool(held is not None or stamp[2]() is t)",
        ("tests/test_derived.py::test_remade_after", "tests/test_derived.py::test_training_loop"),
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
