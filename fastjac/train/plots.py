"""The two pictures of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastjac import LabelLogit, input_jacobian
from fastjac.data import ImageData
from fastjac.train.build import build_data, load_trained
from fastjac.train.files import replacing
from fastjac.train.options import StudentOptions, TableOptions
from fastjac.train.tables import columns

COLUMNS = 10  # test images in jacobians.png
LABELS = {"ce": "cross-entropy", "jacobians": "Jacobians", "jacobian-norm": "Jacobian norm"}


def label(method: str) -> str:
    """``ce+jacobians`` as ``cross-entropy + Jacobians``; a row's name as it is."""
    return " + ".join(LABELS.get(term, term) for term in method.split("+"))


def draw_table(table: Sequence[dict[str, Any]], path: Path) -> str:
    """Accuracy over what is across, a line per method, one standard deviation as error bar."""
    methods = list(dict.fromkeys(row["method"] for row in table))
    key, name, values = columns(table)
    places = {value: i for i, value in enumerate(values)}
    height = max(4.2, 0.26 * len(methods) + 1)
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots()
    for i, method in enumerate(methods):
        rows = [row for row in table if row["method"] == method]
        shift = 0.02 * (i - (len(methods) - 1) / 2)  # so that the error bars stand side by side
        axes.errorbar(
            [places[row[key]] + shift for row in rows],
            [row["mean"] for row in rows],
            [row["std"] or 0 for row in rows],
            label=label(method),
            marker="os^Dvp"[i % 6],
            linestyle=("-", "--", ":")[i // 10 % 3],
            markersize=5,
            linewidth=1.5,
            capsize=3,
        )
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.set_xlabel(f"training {name}" if key == "samples_per_class" else name)
    axes.set_ylabel("test accuracy, %")
    counts = sorted({row["n"] for row in table})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    axes.set_title(
        f"mean and standard deviation over {seeds} seed{'s' * (seeds != '1')}", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return _save(figure, path)


def draw_jacobians(options: TableOptions, cells: Sequence[StudentOptions], path: Path) -> list[str]:
    """Test images, and the label logit's input Jacobian of the teacher and of two students.

    The students are a plain and a matched one of the first seed, trained on the same images: the
    largest number per class. Nothing is drawn unless there are both.
    """
    plain = next((m for m in options.methods if m == "ce"), None)
    matched = next((m for m in options.methods if "jacobians" in m.split("+")), None)
    if plain is None or matched is None or options.target != "label-logit" or not options.teacher:
        return []
    count, seed = max(options.samples), options.seeds[0]
    folders = {
        label(method): str(Path(cell.output) / str(cell.experiment))
        for method in (plain, matched)
        for cell in cells
        if cell.experiment == f"{method}-{count}-seed{seed}"
    }
    data = build_data(options)
    x, y = _one_per_class(data)
    names = {"teacher": str(options.teacher), **folders}
    jacobians = {
        name: _jacobian(load_trained(folder).model, x, y) for name, folder in names.items()
    }
    rows = 1 + len(jacobians)
    figure = Figure(figsize=(1.05 * len(x) + 1.3, 1.25 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, len(x), squeeze=False)
    for column, image in enumerate(x):
        pixels = image[0] if data.channels == 1 else image.permute(1, 2, 0)
        grid[0, column].imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1)
        grid[0, column].set_title(data.classes[int(y[column])], fontsize=9)
    reference = jacobians["teacher"].flatten(1)
    for row, (name, jacobian) in enumerate(jacobians.items(), 1):
        alike = nn.functional.cosine_similarity(jacobian.flatten(1), reference)
        for column, one in enumerate(jacobian):
            shown = one.mean(0)
            top = shown.abs().max().item() or 1.0
            grid[row, column].imshow(shown.numpy(), cmap="RdBu_r", vmin=-top, vmax=top)
            if name != "teacher":
                grid[row, column].set_xlabel(
                    f"{alike[column]:.2f}".replace("-", "−"), fontsize=8, labelpad=2
                )
        grid[row, 0].set_ylabel(_wrapped(name), fontsize=9)
    grid[0, 0].set_ylabel("test image", fontsize=9)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(
        f"∂(logit of the right class)/∂(pixels); students of {count} images per class; "
        "below each: cosine with the teacher's",
        fontsize=10,
    )
    return [_save(figure, path)]


def _wrapped(name: str) -> str:
    return name.replace(" + ", "\n+ ")


def _one_per_class(data: ImageData) -> tuple[Tensor, Tensor]:
    """The first test image of each of the first classes."""
    found: dict[int, Tensor] = {}
    wanted = min(COLUMNS, len(data.classes))
    for i in range(len(data.test)):
        image, k = data.test[i]
        if int(k) < wanted:
            found.setdefault(int(k), image)
        if len(found) == wanted:
            break
    order = sorted(found)
    return torch.stack([found[k] for k in order]), torch.tensor(order)


def _jacobian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return input_jacobian(model.eval(), x, LabelLogit(), y)


def _save(figure: Figure, path: Path) -> str:
    with replacing(path) as draft:
        figure.savefig(draft, dpi=160, format="png")
    return path.name
