"""What ``fuse_`` makes of every model of torchvision and timm, and of two such runs what differs.

    python bench/conversions.py --output after.json            # can be taken up again: what the file has is not run again
    python bench/conversions.py --compare before.json after.json

Models are built with random weights, on the meta device where that works: a conversion reads code and shapes, not values.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import importlib.util
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_resnet import _machine, models
from fused_resnet.fusion import fuse_

TESTS = Path(__file__).parent.parent / "tests"
Record = dict[str, Any]


def _load(name: str) -> Any:
    """A file of tests/."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def candidates() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """(name, what builds it) of every model."""
    libraries = _load("_torchvision")
    torchvision, timm = libraries.import_torchvision(), libraries.import_timm()
    spellings = _load("_blocks").SPELLINGS
    for name, make in spellings.items():
        yield f"spelling {name}", make
    for depth in (20, 56):
        for shortcut in ("A", "B", "C"):
            yield f"models cifar_resnet({depth}, {shortcut})", lambda d=depth, s=shortcut: models.cifar_resnet(d, shortcut=s)  # type: ignore[misc]
    for name in torchvision.models.list_models():
        more = {"weights_backbone": None} if "segmentation" in str(torchvision.models.get_model_builder(name).__module__) else {}
        more = {"weights_backbone": None} if "detection" in str(torchvision.models.get_model_builder(name).__module__) else more
        yield f"torchvision {name}", lambda n=name, m=more: torchvision.models.get_model(n, weights=None, **m)  # type: ignore[misc]
    for name in timm.list_models():
        yield f"timm {name}", lambda n=name: timm.create_model(n, pretrained=False)  # type: ignore[misc]


def build(make: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return make()
    except Exception:
        return make()


def record(make: Callable[[], nn.Module]) -> Record:
    """What ``fuse_`` did to one model."""
    try:
        model = build(make)
    except Exception as error:
        return {"not_built": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
    start = time.perf_counter()
    report = fuse_(model)
    seconds = time.perf_counter() - start
    return {
        "fused": [entry.name for entry in report.fused],
        "refused": {entry.name: entry.reason for entry in report.refused},
        "stems": list(report.stems),
        "seconds": round(seconds, 4),
    }


def run(output: Path, only: str) -> None:
    records: dict[str, Record] = json.loads(output.read_text()) if output.exists() else {}
    for name, make in candidates():
        if name in records or not re.search(only, name):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            records[name] = record(make)
        if len(records) % 20 == 0:
            output.write_text(json.dumps(records))
    output.write_text(json.dumps(records))
    print(json.dumps(summary(records), indent=1))


def summary(records: dict[str, Record]) -> Record:
    """Totals, and how often each reason stands for a refusal, with the names in it left out."""
    built = {name: r for name, r in records.items() if "not_built" not in r}
    reasons = collections.Counter(re.sub(r" \(line .*\)$", "", reason) for r in built.values() for reason in r["refused"].values())
    return {
        "models": len(built),
        "not_built": len(records) - len(built),
        "models_with_fused_blocks": sum(bool(r["fused"]) for r in built.values()),
        "fused": sum(len(r["fused"]) for r in built.values()),
        "refused": sum(len(r["refused"]) for r in built.values()),
        "stems": sum(len(r["stems"]) for r in built.values()),
        "slowest_seconds": max(r["seconds"] for r in built.values()),
        "reasons": dict(reasons.most_common(25)),
    }


def compare(before: dict[str, Record], after: dict[str, Record]) -> Record:
    """What differs between two runs, over the models of both."""
    changes: list[str] = []
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        if "not_built" in old or "not_built" in new:
            continue
        groups: dict[str, list[str]] = collections.defaultdict(list)
        for block in dict.fromkeys([*old["fused"], *old["refused"], *new["fused"], *new["refused"]]):
            was, now = _status(old, block), _status(new, block)
            if was.partition(":")[0] != now.partition(":")[0]:
                groups[f"{was} -> {now}"].append(block)
        changes += [f"{name}: {len(blocks)} blocks ({blocks[0]} ...): {change}" for change, blocks in groups.items()]
        if old["stems"] != new["stems"]:
            changes.append(f"{name}: stems {old['stems']} -> {new['stems']}")
    totals = {side: {k: v for k, v in summary(records).items() if k != "reasons"} for side, records in (("before", before), ("after", after))}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm")}
    return {"machine": _machine.describe(paths=False), "versions": versions, **totals, "changes": changes}


def _status(record: Record, block: str) -> str:
    if block in record["fused"]:
        return "fused"
    return f"refused: {record['refused'][block]}" if block in record["refused"] else "no entry"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file that a run writes")
    parser.add_argument("--only", default="", help="a regular expression that a model's name must contain")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two such files")
    parser.add_argument("--save", type=Path, help="where to write the comparison")
    arguments = parser.parse_args()
    if arguments.compare:
        found = compare(*[json.loads(path.read_text()) for path in arguments.compare])
        text = json.dumps(found, indent=1)
        if arguments.save:
            arguments.save.write_text(text + "\n")
        print(text)
    elif arguments.output:
        run(arguments.output, arguments.only)
    else:
        parser.error("give --output or --compare")


if __name__ == "__main__":
    main()
