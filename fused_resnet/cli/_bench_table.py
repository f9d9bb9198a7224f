"""What `bench` prints: one line a case, the legend, and a sentence for everything that is not as it should be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .. import _machine
from ..benchmark import contenders
from ..benchmark.output import milliseconds, table


def is_contested(result: dict[str, Any]) -> bool:
    """Whether other processes held the cores while a contender of this case was timed."""
    return any(timing["contested"] for timing in result["contenders"].values())


def show(report: dict[str, Any], names: Sequence[str]) -> None:
    results, peak = report["results"], report["fma_peak_gflops"]
    header = ["case", "N", "threads", *names, "best peer", "ratio", "to eager"]
    shares = bool(peak) and report["options"]["dtype"] == "float32"
    header += [*(["% of FMA peak"] if shares else []), "error ours", "error eager"]
    rows = []
    for result in results:
        row: list[object] = [result["case"], result["batch"], result["threads"]]
        row += [_cell(result, name) for name in names]
        row += [result["best_peer"] or "-", _ratio(result, "ratio"), _ratio(result, "ratio_eager")]
        row += [_share(result, peak)] if shares else []
        row += [_error(result, contenders.OURS), _error(result, contenders.EAGER)]
        rows.append(row)
    print(table(header, rows))
    print(
        "\nmedian milliseconds a call (--json has the quantiles); ratio: best peer / better of ours; to eager: better eager / better "
        "of ours; error: largest, against float64, over the result's largest value"
    )
    for sentence in (*_remarks(report), *report["remarks"]):
        print(sentence)
    for key, what in (("geometric_mean", "best peer"), ("geometric_mean_eager", "better eager")):
        if report[key] is not None:
            print(f"geometric mean of the ratios to the {what}: {report[key]:.2f} over {len(results)} cases")
    print(_machine.short())
    if report["warning"]:
        print(f"warning: {report['warning']}")


def _remarks(report: dict[str, Any]) -> Iterator[str]:
    for result in report["results"]:
        for name, reason in result["failed"].items():
            yield f"FAILED  {result['case']}, {name}: {reason}"
        for name in result["wrong"]:
            for what in ("error", "gradient_error"):
                error = result["contenders"][name].get(what, 0.0)
                allowed = result[f"allowed_{what}"]
                if error is None or error > (allowed or 0.0):
                    got = "a NaN or an infinity" if error is None else f"{what} {error:.2g}"
                    yield f"WRONG  {result['case']}, {name}: {got}, allowed {allowed:.2g}"
    if any(result["wrong"] for result in report["results"]):
        yield "times marked ! are of wrong results and count in no ratio"


def _cell(result: dict[str, Any], name: str) -> str:
    if name in result["failed"]:
        return "failed"
    if name not in result["contenders"]:
        return "-"
    median = milliseconds(result["contenders"][name]["median_ms"] / 1e3)
    return f"{median}!" if name in result["wrong"] else median


def _ratio(result: dict[str, Any], what: str) -> str:
    return "-" if result[what] is None else f"{result[what]:.2f}{'?' if is_contested(result) else ''}"


def _share(result: dict[str, Any], peak: float) -> str:
    """Arithmetic of a direct convolution in our time, over what the threads could do at most."""
    if result["best_ours"] is None:
        return "-"
    seconds = result["contenders"][result["best_ours"]]["median_ms"] / 1e3
    return f"{100 * result['gflop'] / seconds / (peak * result['threads']):.0f}"


def _error(result: dict[str, Any], names: tuple[str, ...]) -> str:
    there = [result["contenders"][name]["error"] for name in names if name in result["contenders"]]
    if not there:
        return "-"
    return "not finite" if None in there else f"{max(there):.1e}"
