"""Random sequences over a pool of weights and blocks, a short run: see ``_stateful.py``. ``python tests/stateful_fuzz.py`` is the long one."""

from __future__ import annotations

from types import ModuleType

from _stateful import Sequences, steps
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test


def test_random_sequences(kernels: ModuleType) -> None:
    """A failure prints the sequence, shortened, as a program that repeats it."""
    steps.clear()
    run_state_machine_as_test(
        Sequences,
        settings=settings(
            max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert steps["call of the operator"] + steps["call of a block"] > 50
