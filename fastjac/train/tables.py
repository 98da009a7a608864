"""Accuracies of students as a table: methods down, images per class or noise across."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastjac.train.options import StudentOptions

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One student of the table: its row's name, and its options."""

    row: str
    run: StudentOptions


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Mean, standard deviation (of the sample; empty for one seed) and n, in percent right."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        key = (row["method"], row["samples_per_class"], row.get("noise"))
        groups.setdefault(key, []).append(row["accuracy"])
    order = list(dict.fromkeys(row["method"] for row in rows))
    return [
        {
            "method": method,
            "samples_per_class": count,
            **({} if noise is None else {"noise": noise}),
            "mean": round(statistics.mean(values), 4),
            "std": round(statistics.stdev(values), 4) if len(values) > 1 else "",
            "n": len(values),
        }
        for (method, count, noise), values in sorted(
            groups.items(), key=lambda item: order.index(item[0][0])
        )
    ]


def columns(table: Sequence[Row]) -> tuple[str, str, list[Any]]:
    """What a table has across: the key of its rows, what that is called, and its values."""
    key, name = "samples_per_class", "images per class"
    if any("noise" in row for row in table) and len({row[key] for row in table}) == 1:
        key, name = "noise", "standard deviation of the noise"
    return key, name, list(dict.fromkeys(row[key] for row in table))


def as_text(table: Sequence[Row]) -> str:
    """Methods down, images per class (or noise) across, ``mean ± std`` in percent."""
    methods = list(dict.fromkeys(row["method"] for row in table))
    key, name, values = columns(table)
    cells = {(row["method"], row[key]): row for row in table}
    width = max(len("test accuracy, %"), *map(len, methods))
    lines = [f"{'test accuracy, %':<{width}}" + "".join(f"{v!s:>14}" for v in values)]
    for method in methods:
        line = f"{method:<{width}}"
        for value in values:
            row = cells.get((method, value))
            spread = f" ± {row['std']:.1f}" if row and row["std"] != "" else ""
            line += (f"{row['mean']:.1f}{spread}" if row else "").rjust(14)
        lines.append(line)
    lines.append(f"{'':<{width}}" + name.rjust(14 * len(values)))
    return "\n".join(lines)
