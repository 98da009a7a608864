"""The tables of the documentation, from the raw results in ``benchmarks/results``.

``python -m benchmarks.report`` writes them into README, ``docs/benchmarks.md`` and ``docs/paper.md``,
each between the comment that names it and ``<!-- end -->``; a test holds pages and results together.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
PAPER = RESULTS / "paper"
PAGES = [ROOT.parent / page for page in ("README.md", "docs/benchmarks.md", "docs/paper.md")]
_BLOCK = re.compile(r"(<!-- (?P<name>[a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

TITLES = {
    "vgg9-224": "VGG-9 from VGG-9, 224², window at level 1, frozen",
    "vgg9-224-batch": "VGG-9 from VGG-9, 224², window at level 1, batch statistics",
    "resnet18-224": "ResNet-18 from ResNet-34, 224², window at `layer1`, frozen",
    "vgg4-32": "VGG-4 from VGG-9, 32², label logit, batch statistics",
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its first column is text."""
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def results(name: str) -> list[dict[str, Any]]:
    """What one command measured, a configuration each."""
    return json.loads((RESULTS / name).read_text())["results"]


def accuracies(
    name: str, methods: Mapping[str, str] | None = None, columns: Sequence[str] | None = None
) -> str:
    """One of the paper's tables: methods down, ``mean ± deviation`` across; the best in bold.

    ``methods``: those that are shown, and what the page calls them; ``columns``: those that are shown.
    """
    path = PAPER / name / "table.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = "noise" if "noise" in rows[0] else "samples_per_class"
    header = "standard deviation of the noise" if key == "noise" else "images per class"
    values = columns or list(dict.fromkeys(row[key] for row in rows))
    methods = methods or {row["method"]: row["method"] for row in rows}
    cells = {(row["method"], row[key]): row for row in rows}
    best = {v: max(float(row["mean"]) for row in rows if row[key] == v) for v in values}
    table = []
    for method, called in methods.items():
        line = [called]
        for value in values:
            row = cells.get((method, value))
            if row is None:
                line.append("")
                continue
            mean = float(row["mean"])
            text = f"**{mean:.1f}**" if mean == best[value] else f"{mean:.1f}"
            line.append(text + (f" ± {float(row['std']):.1f}" if row["std"] else ""))
        table.append(line)
    return markdown([header, *values], table)


EXACTNESS = {
    "no Jacobians": "cross-entropy alone",
    "fastjac": "fastjac",
    "double backward": "PyTorch's double backward",
    "detached": "both Jacobians detached",
    "mean": "mean over the input's dimensions",
    "mixed": "`logits[:, y]`: one index mixed up",
}


def exactness() -> str:
    """Accuracies by fastjac, by the double backward, and with each mistake."""
    lines = (PAPER / "exactness" / "exactness.jsonl").read_text().splitlines()
    found: dict[str, list[float]] = {name: [] for name in EXACTNESS}
    for run in map(json.loads, lines):
        if "contender" in run:
            found[run["contender"]].append(run["accuracy"])
    rows = [
        [EXACTNESS[name], f"{statistics.mean(all_):.1f} ± {statistics.stdev(all_):.1f}"]
        for name, all_ in found.items()
    ]
    return markdown(["", "accuracy"], rows)


def steps(name: str) -> str:
    """Every contender's time and memory over the plain step's, configuration by configuration."""
    found = results(name)
    settings = list(dict.fromkeys(s for result in found for s in result["time"]))
    memories = [m for m in ("memory", "memory_needed") if any(result.get(m) for result in found)]
    header = ["", *(f"time, {setting}" for setting in settings)]
    header += [m.replace("_", " ") for m in memories] + ["error of the gradient, float64"]
    rows = []
    for result in found:
        config = f"{TITLES.get(result['configuration'], result['configuration'])}"
        rows.append([f"**{config}, batch {result['batch']}**", *[""] * (len(header) - 1)])
        errors = result["gradient_error_float64"]
        names = dict.fromkeys([*next(iter(result["time"].values())), *errors])
        for each in names:
            row = [f"`{each}`"]
            for setting in settings:
                timed = result["time"][setting].get(each)
                row.append(f"{timed['ratio']:.2f}" if timed else "not timed")
            for memory in memories:
                used = result[memory]
                row.append(f"{used[each] / used['plain']:.2f}" if each in used else "")
            row.append(f"{errors[each]:.0e}" if each in errors else "")
            rows.append(row)
    return markdown(header, rows)


def gpu_results() -> list[dict[str, Any]]:
    """The steps on a GPU, a configuration each, with the memory that ``gpu_check`` measured."""
    memory: dict[tuple[str, int], dict[str, float]] = {}
    for step in json.loads((RESULTS / "gpu_check-h200.json").read_text())["steps"].values():
        found = step.get("results") or {}
        for result in found.get("results", []) if isinstance(found, dict) else []:
            if result.get("memory"):
                memory[result["configuration"], result["batch"]] = result["memory"]
    return [
        {**result, "memory": memory[result["configuration"], result["batch"]]}
        for result in results("step-h200.json")
    ]


def on_a_gpu() -> str:
    """Milliseconds and MiB of a step on a GPU: configurations down, contenders across."""
    rows = []
    for result in gpu_results():
        name = f"{short_title(result)}, batch {result['batch']}"
        timed, memory = result["time"]["device"], result["memory"]
        times = [
            f"{1e3 * timed[each]['median_s']:.3g} ({timed[each]['ratio']:.2f})"
            for each in GPU_COLUMNS
        ]
        used = [f"{memory[each] / 2**20:.0f}" if each in memory else "" for each in GPU_COLUMNS]
        for title, cells in ((f"{name}: ms", times), (f"{name}: MiB", used)):
            bold = zip(GPU_COLUMNS, cells, strict=True)
            cells = [f"**{c}**" if c and each.startswith("fastjac") else c for each, c in bold]
            rows.append([title, *cells])
    return markdown(["", *GPU_COLUMNS.values()], rows)


def short_title(result: Mapping[str, Any]) -> str:
    """The student of a configuration."""
    return TITLES[result["configuration"]].split(",")[0].split(" from")[0]


def cost() -> str:
    """Time and memory of a step with Jacobians over those of the same step without."""
    columns = {
        "naive": "double backward",
        "naive-compiled": "compiled",
        "crop-compiled": "compiled, on a crop",
        "fastjac": "**fastjac**",
    }

    def cells(timed: Mapping[str, Any], used: Mapping[str, float]) -> list[str]:
        both = {
            each: f"{timed[each]['ratio']:.2f}, {used[each] / used['plain']:.2f}"
            for each in columns
            if each in timed
        }
        both["fastjac"] = f"**{both['fastjac']}**"
        return [both.get(each, "") for each in columns]

    rows = []
    for result in results("step-cpu.json"):
        title = f"{short_title(result)}, batch {result['batch']}, two CPU cores, float32"
        if "logit" in TITLES[result["configuration"]]:
            title = title.replace(",", " at 32², label's logit,", 1)
        rows.append([title, *cells(result["time"]["pages kept"], result["memory"])])
    for result in gpu_results():
        timed, title = result["time"]["device"], f"{short_title(result)}, batch {result['batch']}"
        rows.append([f"{title}, H200, bfloat16", *cells(timed, result["memory"])])
        graphs = timed["fastjac-graphed"]["median_s"] / timed["plain-graphed"]["median_s"]
        rows.append([f"{title}, H200, both as CUDA graphs", "", "", "", f"**{graphs:.2f}**"])
    return markdown(["time, memory", *columns.values()], rows)


def floors(name: str) -> str:
    """GFLOP of a step, and the time of these at a large product's rate over the step's own."""
    rows = []
    for result in results(name):
        setting = next(iter(result["time"]))
        rate = result["flop_per_second"][setting]
        for each, timed in result["time"][setting].items():
            if timed.get("flop"):
                floor = timed["flop"] / rate / timed["median_s"]
                title = TITLES.get(result["configuration"], result["configuration"])
                rows.append([title, f"`{each}`", f"{timed['flop'] / 1e9:.0f}", f"{floor:.2f}"])
    return markdown(["", "", "GFLOP of a step", "share of the time that they need at least"], rows)


def first_steps(name: str) -> str:
    """Seconds from the networks to the end of a step, without any cache."""
    rows = []
    for result in results(name):
        title = TITLES.get(result["configuration"], result["configuration"])
        for each, seconds in result.get("first", {}).items():
            cells = [f"{seconds[key]:.1f}" for key in ("first", "tenth", "other_batch")]
            rows.append([title, f"`{each}`", *cells])
    return markdown(["", "", "first step", "tenth step", "first at another batch"], rows)


def scaling(name: str) -> str:
    """Time over the plain step's, along one field of the configuration: contenders down."""
    found = results(name)
    field = found[0]["configuration"].partition(", ")[2].partition(" ")[0] or "batch"
    names = dict.fromkeys(each for r in found for each in next(iter(r["time"].values())))
    memory = "memory_needed" if "memory_needed" in found[0] else "memory"
    rows = []
    for each in names:
        row = [f"`{each}`"]
        for result in found:
            timed = next(iter(result["time"].values())).get(each)
            text = f"{timed['ratio']:.2f}" if timed else ""
            if timed and each in (used := result.get(memory) or {}):
                text += f", {used[each] / used['plain']:.2f}"
            row.append(text)
        rows.append(row)
    title = f"{TITLES.get(found[0]['configuration'].partition(', ')[0], '')}: {field}"
    return markdown([title, *(str(result[field]) for result in found)], rows)


def largest_batches(name: str) -> str:
    """The largest batch that each contender can take in fixed memory."""
    rows = []
    for result in results(name):
        title = TITLES.get(result["configuration"], result["configuration"])
        title += f", {result['memory_limit'] / 2**30:g} GiB"
        rows += [[title, f"`{each}`", str(n)] for each, n in result["largest_batch"].items()]
    return markdown(["", "", "images"], rows)


def host(name: str) -> str:
    """The host's time of a step with next to no arithmetic, over the plain step's."""
    rows = []
    for result in results(name):
        timed = result["host"]["rows"]
        title = TITLES.get(result["configuration"], result["configuration"]).split(",")[0]
        rows += [
            [title, f"`{each}`", f"{1e3 * row['median_s']:.2f}", f"{row['ratio']:.2f}"]
            for each, row in timed.items()
        ]
    return markdown(["", "", "ms", "of the plain step's"], rows)


PENALISED = {"vit": "ViT-tiny", "convnext": "ConvNeXt-atto", "sdf": "softplus network"}


def penalties(*names: str) -> str:
    """Time and memory of a step with the penalty over those of the step without."""
    rows = []
    for name in names:
        for result in results(name):
            kind = {"r1": "R1", "wgan-gp": "WGAN-GP", "eikonal": "eikonal"}[result["penalty"]]
            network = PENALISED.get(result.get("network"), f"{result['norm'].capitalize()}Norm")
            for each in ("naive", "compiled", "fastjac"):
                if each not in result["memory"]:
                    continue
                row = [f"{kind}, {network}", f"`{each}`"]
                row += [f"{timed[each]['ratio']:.2f}" for timed in result["time"].values()]
                for memory in (result["memory"], result["memory_needed"]):
                    row.append(f"{memory[each] / memory['plain']:.2f}")
                rows.append(row)
    settings = results(names[0])[0]["time"]
    times = [f"time, {s}" for s in settings]
    return markdown(["", "", *times, "memory", "memory needed"], rows)


def trainer(name: str) -> str:
    """Images per second of the trainer, and an image's time over the plain run's."""
    rows = []
    for row in results(name):
        cells = [f"{row['images_per_second']:.0f}", f"{row['ratio']:.2f}"]
        cells += [f"{row['loader_share']:.2f}", f"{1e3 * row['checkpoint_s']:.0f}"]
        rows.append([f"`{row['variant']}`", *cells])
    header = ["", "images per second", "time of an image", "share spent waiting for the loader"]
    return markdown([*header, "longest wait at a checkpoint, ms"], rows)


def ranks(**names: str) -> str:
    """Images per second of the trainer by one process and by several."""
    rows = []
    for title, name in names.items():
        for row in results(name):
            low, high = row["quantiles"]
            rate = f"{row['images_per_second']:.0f} ({low:.0f} to {high:.0f})"
            cells = [f"`{row['variant']}`", rate, f"{row['loader_share']:.2f}"]
            rows.append([title.replace("_", " "), *cells])
    return markdown(["", "", "images per second", "share spent waiting for the loader"], rows)


def teacher_cache(name: str) -> str:
    """The step with Jacobians and a cached teacher, over the plain step that runs its teacher."""
    (row,) = results(name)
    cells = [f"{1e3 * row['plain_s']:.0f}", f"{1e3 * row['cached_s']:.0f}", f"{row['ratio']:.2f}"]
    return markdown(["", "plain, ms", "cached, ms", "ratio"], [["VGG-4 from VGG-9", *cells]])


# As the results that are kept call them; `compiled` is called plain-compiled now.
GPU_COLUMNS = {
    "plain": "no term",
    "compiled": "no term, compiled",
    "naive": "double backward",
    "fastjac": "**fastjac**",
    "plain-graphed": "no term, graph",
    "fastjac-graphed": "**fastjac, graph**",
}

FRONT_PAGE = {
    "ce": "cross-entropy",
    "ce+activations": "+ the teacher's logits",
    "ce+jacobians": "**+ its Jacobians**",
}

TABLES: dict[str, Callable[[], str]] = {
    "accuracy": lambda: accuracies("few-labels", FRONT_PAGE, ["1", "5", "10", "50", "500"]),
    "cost": cost,
    "steps-h200": on_a_gpu,
    "steps-cpu": lambda: steps("step-cpu.json"),
    "recipes": lambda: steps("step-cpu-recipes.json"),
    "floors": lambda: floors("step-cpu.json"),
    "first-steps": lambda: first_steps("step-cpu-first.json"),
    "steps-cpu-batch": lambda: steps("step-cpu-batch.json"),
    "steps-cpu-bf16": lambda: steps("step-cpu-bf16.json"),
    "host": lambda: host("host.json"),
    **{
        f"scaling-{field}": lambda field=field: scaling(f"scaling-{field}.json")  # type: ignore[misc]
        for field in ("batch", "size", "layer", "window", "depth", "depth-resnet")
    },
    "largest-batch": lambda: largest_batches("largest-batch.json"),
    "targets": lambda: scaling("targets.json"),
    "ablation": lambda: steps("ablation.json"),
    "penalties": lambda: penalties("penalty-cpu.json", "penalty-cpu-wgan-gp.json"),
    "penalties-networks": lambda: penalties(
        "penalty-cpu-networks.json", "penalty-cpu-convnext.json"
    ),
    "trainer": lambda: trainer("trainer-cpu.json"),
    "exactness": exactness,
    "teacher-cache": lambda: teacher_cache("teacher-cache-cpu.json"),
    "ranks": lambda: ranks(
        one_process="trainer-cpu-one.json", two_ranks="trainer-cpu-two-ranks.json"
    ),
}


def table(name: str) -> str:
    """The table that a page calls ``name``."""
    return TABLES[name]() if name in TABLES else accuracies(name)


def filled(page: str) -> str:
    """``page`` with the tables that its comments name."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{table(match['name'])}\n{match[3]}", page)


def main() -> None:
    """Write the tables into the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
