"""What ``fuse_`` did, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FusionEntry", "FusionReport"]


@dataclass(frozen=True)
class FusionEntry:
    """One residual block of the model.

    name: its path in the model ("" is the model itself). type: its class.
    became: what it runs as, "" if refused. reason: why it was refused, with the line of the forward that stands against it, "" if fused.
    path: "hot" (our kernels), "general" (the library's convolution, then our pass), "" if refused. It is what is known
    without an input; ``fused_resnet.why_not`` asks for one call. path_reason: why "general".
    """

    name: str
    type: str
    fused: bool
    became: str = ""
    reason: str = ""
    path: str = ""
    path_reason: str = ""


@dataclass(frozen=True)
class FusionReport:
    """What ``fuse_`` did: an entry for each residual block, in the model's order. ``print`` shows it as a table.

    stems: the networks whose stem (the convolution, batch norm and ReLU in front of the blocks) is one layer too, by name.
    pools: the max poolings that run by our own kernels (with a gradient, in float32 and channels_last), by name.
    """

    entries: tuple[FusionEntry, ...]
    stems: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()

    @property
    def fused(self) -> list[FusionEntry]:
        return [entry for entry in self.entries if entry.fused]

    @property
    def refused(self) -> list[FusionEntry]:
        return [entry for entry in self.entries if not entry.fused]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and bools, for ``json.dump``."""
        entries = [asdict(e) for e in self.entries]
        counts = {"fused": len(self.fused), "refused": len(self.refused)}
        return {"entries": entries, **counts, "stems": list(self.stems), "pools": list(self.pools)}

    def __str__(self) -> str:
        if not self.entries:
            return "no residual block found"
        rows = [("block", "class", "fused", "as, or why not", "path")]
        for e in self.entries:
            fused = "yes" if e.fused else "no"
            rows.append((e.name or "(the model)", e.type, fused, e.became or e.reason, e.path or "-"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        rows.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        why = sorted({e.path_reason for e in self.entries if e.path_reason})
        notes = [f"general path: {reason}" for reason in why]
        stems = [f"stem of {name or 'the model'}: convolution, batch norm and ReLU as one layer" for name in self.stems]
        pools = [f"{name}: max pooling by our kernel" for name in self.pools]
        return "\n".join([*lines, f"{len(self.fused)} fused, {len(self.refused)} refused", *stems, *pools, *notes])
