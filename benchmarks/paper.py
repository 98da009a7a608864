"""The tables of ``docs/paper.md`` from the results in ``benchmarks/results/paper``.

``python -m benchmarks.paper`` writes them into the page, each between the comments that name its folder.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "paper"
PAGE = ROOT.parent / "docs" / "paper.md"
_BLOCK = re.compile(r"(<!-- (?P<name>[a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def as_markdown(path: Path) -> str:
    """A ``table.csv`` as Markdown: methods down, ``mean ± deviation`` across; the best in bold."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = "noise" if "noise" in rows[0] else "samples_per_class"
    name = "standard deviation of the noise" if key == "noise" else "images per class"
    values = list(dict.fromkeys(row[key] for row in rows))
    cells = {(row["method"], row[key]): row for row in rows}
    best = {v: max(float(row["mean"]) for row in rows if row[key] == v) for v in values}
    lines = [f"| {name} | " + " | ".join(values) + " |", "| --- " * (len(values) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [method]
        for value in values:
            row = cells.get((method, value))
            if row is None:
                line.append("")
                continue
            mean = float(row["mean"])
            text = f"**{mean:.1f}**" if mean == best[value] else f"{mean:.1f}"
            line.append(text + (f" ± {float(row['std']):.1f}" if row["std"] else ""))
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    """``page`` with the tables that its comments name."""

    def block(match: re.Match[str]) -> str:
        table = as_markdown(RESULTS / match["name"] / "table.csv")
        return f"{match[1]}\n{table}\n{match[3]}"

    return _BLOCK.sub(block, page)


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
