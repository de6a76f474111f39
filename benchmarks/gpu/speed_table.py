"""What the runs of speed.py say beside each other: ratios of speed and memory within a model and a kind of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import measuring

Found = dict[str, dict[str, Any]]

AGAIN = ", again"


def tuned(found: Found, group: str) -> str | None:
    """The quickest of TRL's tuned ways, which is what somebody who tunes would keep."""
    names = [name for name in found if name.startswith(f"{group}, trl tuned")]
    return max(names, key=lambda name: found[name]["loss_tokens_per_s"], default=None)


def ratios(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float | None]:
    """Tokens with loss a second, and peak memory, of one run over those of another."""
    memory = one["peak_gb"] / other["peak_gb"] if other["peak_gb"] else None
    return one["loss_tokens_per_s"] / other["loss_tokens_per_s"], memory


def table(found: Found) -> str:
    """Per model and data: tokens with loss, memory, ceiling, and both against TRL as it comes and tuned."""
    rows = []
    for name, one in found.items():
        group, fit = ", ".join(name.split(", ")[:2]), one["fit"]
        row: list[object] = [name, one["loss_tokens_per_s"]]
        row.append(f"{one['step_s']:.3g} ({one['shortest_s']:.3g}–{one['longest_s']:.3g})")
        row += [one["peak_gb"], one["of_ceiling"], one["attention"], f"{fit['micro_batch']} × {fit['accumulation']}"]
        row.append(f"{fit['recomputed']}{', offloaded' if fit['offload'] else ''}")
        for reference in (f"{group}, trl defaults", tuned(found, group)):
            row += ratios(one, found[reference]) if reference in found else (None, None)
        rows.append([*row, one["mean_loss"]])
    without = all(one["attention"] != "flash_attention_2" for name, one in found.items() if ", trl tuned" in name)
    best = f"TRL's quickest tuned{', without flash-attn' if without else ''}"
    header = ["case", "tokens with loss a second", "s a step (shortest–longest)", "peak GB", "of the ceiling"]
    header += ["attention", "micro batch × passes", "layers recomputed"]
    header += ["speed / TRL's defaults", "memory", f"speed / {best}", "memory", "mean loss"]
    return "\n".join([measuring.table(header, rows), *notes(found)])


def notes(found: Found) -> Iterator[str]:
    """Where half of TRL's memory is too little for anybody, and how far a second run was from the first."""
    for name, one in found.items():
        if one.get("half_possible") is False and one.get("half_gb") is not None:
            group = ", ".join(name.split(", ")[:2])
            yield (
                f"{group}: half of what TRL's defaults took is {one['half_gb']:.1f} GB, and by the plan nothing trains "
                f"this in less than {one['least_gb']:.1f} GB; ft was measured with the least.\n"
            )
        if name.endswith(AGAIN) and (first := found.get(name.removesuffix(AGAIN))) is not None:
            speed, _ = ratios(one, first)
            yield f"{name.removesuffix(AGAIN)}: measured again at another time, {speed:.3f}× the speed.\n"
