"""The two pictures of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastjac import AttentionWindow, LabelLogit, input_jacobian
from fastjac.data import ImageData
from fastjac.features import capture
from fastjac.models.levels import level_layer
from fastjac.train.build import build_data, load_trained
from fastjac.train.files import replacing
from fastjac.train.objective import find_teacher
from fastjac.train.options import StudentOptions, TableOptions
from fastjac.train.tables import Cell, columns

COLUMNS = 10  # test images in jacobians.png
LABELS = {"ce": "cross-entropy", "jacobians": "Jacobians", "jacobian-norm": "Jacobian norm"}
# Names of rows and classes are shown as they are, with their $.
_STYLE = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "fastjac"}


def label(method: str) -> str:
    """``ce+jacobians`` as ``cross-entropy + Jacobians``; a row's name as it is."""
    return " + ".join(LABELS.get(term, term) for term in method.split("+"))


@rc_context(_STYLE)
def draw_table(table: Sequence[dict[str, Any]], path: Path) -> str:
    """Accuracy over what is across, a line per method, one standard deviation as error bar."""
    methods = list(dict.fromkeys(row["method"] for row in table))
    key, name, values = columns(table)
    places = {value: i for i, value in enumerate(values)}
    height = max(4.2, 0.26 * len(methods) + 1)
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots()
    bars = []
    for i, method in enumerate(methods):
        rows = [row for row in table if row["method"] == method]
        shift = 0.02 * (i - (len(methods) - 1) / 2)  # so that the error bars stand side by side
        bar = axes.errorbar(
            [places[row[key]] + shift for row in rows],
            [row["mean"] for row in rows],
            [row["std"] or 0 for row in rows],
            marker="os^Dvp"[i % 6],
            linestyle=("-", "--", ":")[i // 10 % 3],
            markersize=5,
            linewidth=1.5,
            capsize=3,
        )
        bars.append(bar)
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
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes.legend(bars, [label(method) for method in methods], frameon=False, fontsize=8, **place)
    return _save(figure, path)


@rc_context(_STYLE)
def draw_jacobians(options: TableOptions, cells: Sequence[Cell], path: Path) -> list[str]:
    """Test images, and the input Jacobian of the teacher and of two students.

    The students are those of the first row without a Jacobian term and of the first row with one beside
    cross-entropy, of the first seed, trained on the same images: the largest number per class. For an
    attention window, its receptive field (where the teacher's Jacobian is not 0) is framed. Nothing is
    drawn unless there are both students and a trained teacher.
    """
    matched = next((c for c in cells if c.run.jacobians and c.run.ce and c.run.teacher), None)
    plain = next((c for c in cells if not c.run.jacobians), None)
    if (
        matched is None
        or plain is None
        or matched.run.target not in ("label-logit", "attention-window")
    ):
        return []
    count, seed = max(options.samples, key=lambda n: n or math.inf), options.seeds[0]
    shown = {
        c.row: c.run
        for row in (plain.row, matched.row)
        for c in cells
        if (c.row, c.run.samples_per_class or 0, c.run.seed) == (row, count, seed)
    }
    run = shown[matched.row]
    data = build_data(run)
    x, y = _one_per_class(data)
    teacher, _ = find_teacher(run, data)
    students = {
        label(row): load_trained(Path(one.output) / str(one.experiment)).model
        for row, one in shown.items()
    }
    nets = {"teacher": teacher, **students}
    jacobians = _jacobians(run, nets, x, y)
    rows = 1 + len(jacobians)
    figure = Figure(figsize=(1.05 * len(x) + 1.3, 1.25 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, len(x), squeeze=False)
    window = run.target == "attention-window"
    for column, image in enumerate(x):
        pixels = image[0] if data.channels == 1 else image.permute(1, 2, 0)
        grid[0, column].imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1)
        grid[0, column].set_title(data.classes[int(y[column])], fontsize=8)
        if window:
            _frame(grid[0, column], jacobians["teacher"][column])
    reference = jacobians["teacher"].flatten(1)
    for row, (name, jacobian) in enumerate(jacobians.items(), 1):
        alike = nn.functional.cosine_similarity(jacobian.flatten(1), reference)
        for column, one in enumerate(jacobian):
            mean = one.mean(0)
            top = mean.abs().max().item() or 1.0
            grid[row, column].imshow(mean.numpy(), cmap="RdBu_r", vmin=-top, vmax=top)
            if name != "teacher":
                grid[row, column].set_xlabel(
                    f"{alike[column]:.2f}".replace("-", "−"), fontsize=8, labelpad=2
                )
        grid[row, 0].set_ylabel(_wrapped(name), fontsize=9)
    grid[0, 0].set_ylabel("test image", fontsize=9)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    scalar = "the brightest window of the attention map" if window else "logit of the right class"
    figure.suptitle(
        f"∂({scalar})/∂(pixels); students of {count or 'all'} images per class; "
        "below each: cosine with the teacher's",
        fontsize=10,
    )
    return [_save(figure, path)]


def _jacobians(
    run: StudentOptions, nets: dict[str, nn.Module], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Each network's J, at the teacher's window."""
    if run.target == "label-logit":
        return {name: input_jacobian(net.eval(), x, LabelLogit(), y) for name, net in nets.items()}
    level = (run.levels or [run.level])[0]
    found, source = {}, None
    for name, net in nets.items():
        named = run.teacher_layer if name == "teacher" else run.layer
        target = AttentionWindow(named or level_layer(net, level), run.window, run.power)
        with torch.no_grad(), capture(net.eval(), [target.layer]) as features:
            net(x)
        map_ = features[target.layer]
        if source is None:
            source = (target, target.position(map_), map_)
        position = source[0].transfer(source[1], source[2], map_)
        found[name] = input_jacobian(net, x, target.at(position))
    return found


def _frame(axes: Any, jacobian: Tensor) -> None:
    """A rectangle around the support of a Jacobian ``[C, H, W]``."""
    from matplotlib.patches import Rectangle

    inside = jacobian.abs().amax(0) > 0
    if not inside.any():
        return
    rows, cols = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    corner = (int(cols[0]) - 0.5, int(rows[0]) - 0.5)
    size = (int(cols[-1] - cols[0]) + 1, int(rows[-1] - rows[0]) + 1)
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="tab:orange", linewidth=1.5))


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


def _save(figure: Figure, path: Path) -> str:
    vector = path.suffix == ".svg"
    options = {"transparent": True, "metadata": {"Date": None}} if vector else {"dpi": 160}
    with replacing(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], **options)
    return path.name
