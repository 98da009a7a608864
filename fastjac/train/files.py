"""Files that are whole or absent, and the folder of a run."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from fastjac.errors import FastjacError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; when the block ends well, the file moves to ``path`` in one step."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step."""
    with replacing(path) as draft:
        draft.write_text(text)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace ``path`` by a table of ``rows``; the columns are all their keys."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class RunFolder:
    """``<output>/<experiment>``: everything that a run leaves behind.

    ``args.yaml`` (its options), ``subset.json`` (which images, where not all), ``last.pt`` and
    ``best.pt`` (the full state), ``metrics.jsonl`` and ``summary.csv`` (an epoch per line), and at
    the end ``model.safetensors`` (the last epoch's weights) with ``config.json``.
    """

    def __init__(self, output: str | Path, experiment: str) -> None:
        self.path = Path(output) / experiment
        self.last, self.best = self.path / "last.pt", self.path / "best.pt"

    def finished(self) -> bool:
        """Whether the run got to its end."""
        return (self.path / "config.json").is_file()

    def open(self, options: dict[str, Any]) -> None:
        """Make the folder and write ``args.yaml``."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FastjacError(f"{self.path} cannot be made: {error.strerror}") from error
        text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
        write_text(self.path / "args.yaml", text)

    def save_state(self, state: dict[str, Any], best: bool) -> None:
        """Write ``last.pt``, ``best.pt`` if it is that, and the metrics of ``state["history"]``."""
        for path in (self.best, self.last) if best else (self.last,):
            with replacing(path) as draft:
                torch.save(state, draft)
        self.write_metrics(state["history"])

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write ``metrics.jsonl`` and ``summary.csv``."""
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in history))
        write_csv(self.path / "summary.csv", history)

    def save_subset(self, subset: dict[str, Any]) -> None:
        """Write ``subset.json``."""
        write_text(self.path / "subset.json", json.dumps(subset) + "\n")

    def save_model(self, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        """Write ``model.safetensors``; then ``config.json``, which marks the run as finished."""
        from safetensors.torch import save

        with replacing(self.path / "model.safetensors") as draft:
            draft.write_bytes(save({k: v.contiguous() for k, v in weights.items()}))
        write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")
