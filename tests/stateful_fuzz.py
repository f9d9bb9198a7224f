"""The random sequences of ``_stateful.py`` at length. Run by hand: ``python tests/stateful_fuzz.py [--steps 100000]``.

Not part of the suite. Sequences of 50 steps are drawn until there were so many steps, in rounds whose seeds are printed; after each round
what there was is kept in bench/results/stateful.json: the machine, the sources' digest, steps by kind, and the sequence of a failure,
shortened. Started again, it goes on where it was, unless sources or machine are others or ``--fresh`` says so. Exit status 1: a step was wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _kept import RESULTS, Report, digest, machine
from _stateful import Sequences, steps
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

PARTS = ("csrc", "fused_resnet", "tests/_stateful.py")
ROUND = 40  # sequences


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--fresh", action="store_true", help="start over")
    options = parser.parse_args(arguments)
    report = Report(RESULTS / "stateful.json", {"machine": machine(), "sources": digest(PARTS)}, options.fresh)
    if report.note:
        print(report.note)
    how = settings(
        max_examples=ROUND, stateful_step_count=50, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    while sum(found["steps"] for found in report.section("rounds").values()) < options.steps:
        number = len(report.section("rounds"))
        steps.clear()
        start, wrong = time.perf_counter(), ""
        try:
            run_state_machine_as_test(seed(number)(Sequences), settings=how)
        except Exception:
            wrong = traceback.format_exc()[-4000:]
        count = sum(steps.values())
        result = {"steps": count, "seconds": round(time.perf_counter() - start, 1), "by kind": dict(sorted(steps.items())), "wrong": wrong}
        report.keep("rounds", f"seed {number}", result)
        total = sum(found["steps"] for found in report.section("rounds").values())
        print(f"seed {number}: {count} steps, {total} in all{': WRONG' if wrong else ''}", flush=True)
        if wrong:
            print(wrong)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
