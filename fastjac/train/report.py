"""One page that shows a table's results: no other file, no script, nothing fetched."""

from __future__ import annotations

import base64
import html
import platform
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastjac.train.files import write_text
from fastjac.train.tables import Row, columns

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --best: #0a7d3c; }
@media (prefers-color-scheme: dark) { :root { --best: #5fd38d; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
td b { color: var(--best); } td small { opacity: .75; }
pre { background: var(--soft); padding: .8rem; border-radius: .4rem; white-space: pre-wrap;
      overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; }
img { max-width: 100%; background: #fff; border-radius: .4rem; }
figcaption { font-size: .9rem; opacity: .8; } figure { margin: 1rem 0; }
"""


def write_report(
    path: Path,
    title: str,
    about: str,
    table: Sequence[Row],
    runs: Sequence[Row],
    settings: Mapping[str, Any],
    command: str,
    pictures: Mapping[str, Path],
) -> str:
    """Write the page to ``path``; its name.

    Args:
        about: what was run, in a sentence or two.
        table, runs: the means, and every student's accuracy and seconds.
        settings: options and their values, those that are not the defaults.
        command: what makes it again.
        pictures: by caption, SVG (whose black becomes the text's colour) and PNG files.
    """
    seconds = [row["seconds"] for row in runs if "seconds" in row]
    parts = [
        f"<h1>{_text(title)}</h1><p>{_text(about)}</p>",
        "<h2>Accuracy, %</h2>",
        f'<div class="wide">{_accuracies(table)}</div>',
        "<p>Mean ± standard deviation (of the sample) over the seeds; the best of each column in "
        "colour.</p>",
        *(_figure(caption, file) for caption, file in pictures.items()),
        "<h2>Time and memory</h2>",
        f"<p>{_cost(seconds)}</p>",
        f'<div class="wide">{_seconds(runs)}</div>' if seconds else "",
        "<h2>Repeat it</h2>",
        f"<pre>{_text(command)}</pre>",
        f"<p>{_text(_machine())}</p>",
        "<details><summary>Options that are not the defaults</summary>",
        f'<div class="wide">{_settings(settings)}</div></details>',
        "<details><summary>Every student</summary>",
        f'<div class="wide">{_list(runs)}</div></details>',
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    write_text(path, page)
    return path.name


def _text(value: Any) -> str:
    return html.escape(str(value))


def _rows(head: Sequence[Any], body: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return f"<table>{''.join(lines)}</table>"


def _accuracies(table: Sequence[Row]) -> str:
    key, name, values = columns(table)
    cells = {(row["method"], row[key]): row for row in table}
    best = {v: max(row["mean"] for row in table if row[key] == v) for v in values}
    body = []
    for method in dict.fromkeys(row["method"] for row in table):
        line = [_text(method)]
        for value in values:
            row = cells.get((method, value))
            if row is None:
                line.append("")
                continue
            mean = f"{row['mean']:.1f}"
            spread = f" <small>± {row['std']:.1f}</small>" if row["std"] != "" else ""
            line.append((f"<b>{mean}</b>" if row["mean"] == best[value] else mean) + spread)
        body.append(line)
    return _rows([name, *values], body)


def _seconds(runs: Sequence[Row]) -> str:
    taken: dict[str, list[float]] = {}
    for row in runs:
        taken.setdefault(row["method"], []).append(row["seconds"])
    body = [
        [_text(method), f"{statistics.median(values):.1f}", str(len(values))]
        for method, values in taken.items()
    ]
    return _rows(["method", "seconds of a student (median)", "students"], body)


def _settings(settings: Mapping[str, Any]) -> str:
    return _rows(["option", "value"], [[_text(k), _text(v)] for k, v in settings.items()])


def _list(runs: Sequence[Row]) -> str:
    head = list(dict.fromkeys(key for row in runs for key in row))
    return _rows(head, [[_text(row.get(key, "")) for key in head] for row in runs])


def _figure(caption: str, path: Path) -> str:
    if path.suffix == ".svg":
        drawing = path.read_text("utf-8")
        picture = drawing[drawing.index("<svg") :].replace("#000000", "currentColor")
    else:
        code = base64.b64encode(path.read_bytes()).decode()
        picture = f'<img alt="{_text(caption)}" src="data:image/png;base64,{code}">'
    return f"<figure>{picture}<figcaption>{_text(caption)}</figcaption></figure>"


def _cost(seconds: Sequence[float]) -> str:
    unit = 1 << (20 if sys.platform == "darwin" else 10)
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    memory = f"The largest process that made this page took {peak / unit:.0f} MiB at its peak."
    if not seconds:
        return memory
    return f"{len(seconds)} students took {sum(seconds) / 60:.1f} minutes in all. {memory}"


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    threads = torch.get_num_threads()
    return (
        f"fastjac {version('fastjac')}, PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}, {device}, {threads} thread{'s' * (threads > 1)}."
    )
