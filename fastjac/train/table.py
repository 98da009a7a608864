"""``table`` and ``demo``: methods x images per class x seeds, some students at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from joblib import cpu_count
from tqdm import tqdm

from fastjac.errors import FastjacError
from fastjac.train.build import pick_device
from fastjac.train.commands import prepare
from fastjac.train.files import RunFolder, write_csv
from fastjac.train.options import (
    TERMS,
    StudentOptions,
    TableOptions,
    TeacherOptions,
    changed,
    names,
)
from fastjac.train.parse import parse

Row = dict[str, Any]


def tabulate(options: TableOptions) -> str:
    """Train whatever is not trained yet; write ``table.csv`` and the pictures; the table as text.

    Without ``--teacher``, the recipe's own is trained first, on all images.
    """
    if options.experiment is None:
        name = f"table-{options.dataset}-{options.model.replace('/', '-')}"
        options = replace(options, experiment=name)
    if options.resume:
        raise FastjacError("a table always goes on where it was; --resume is for one run")
    device = pick_device(options.device)
    path = Path(options.output) / str(options.experiment)
    teacher = None
    if options.teacher is None and any(method != "ce" for method in options.methods):
        teacher = _teacher(options, path)
        options = replace(options, teacher=str(path / "teacher"))
    cells = _cells(options, path)
    todo = [cell for cell in cells if not _finished(cell)]
    _check_images(todo)
    if teacher is not None and not _finished(teacher):
        prepare(_resumed(teacher)).run()
    _check_methods(todo)
    RunFolder(options.output, str(options.experiment)).open(asdict(options))
    jobs = options.jobs or (cpu_count() if device.type == "cpu" else 1)
    _train_all(todo, jobs, str(options.experiment), path)
    from fastjac.train.plots import draw_jacobians, draw_table

    rows = [_result(options, cell) for cell in cells]
    write_csv(path / "runs.csv", rows)
    table = summarize(rows)
    write_csv(path / "table.csv", table)
    pictures = [draw_table(table, path / "table.png")]
    pictures += draw_jacobians(options, cells, path / "jacobians.png")
    written = ", ".join(["table.csv", "runs.csv", *pictures])
    return f"{as_text(table)}\n\nresults in {path}: {written}"


def _teacher(options: TableOptions, path: Path) -> TeacherOptions:
    """The recipe's teacher, on the table's data and device."""
    if options.config is None:
        raise FastjacError("--teacher is missing, and without --config there is no recipe for one")
    shared = ["dataset", "data_dir", "download", "img_size", "num_classes", "device", "workers"]
    shared += ["threads", "amp", "amp_dtype", "channels_last", "tensorboard"]
    overrides = {name: getattr(options, name) for name in shared}
    overrides |= {"output": str(path), "experiment": "teacher"}
    return parse("teacher", TeacherOptions, ["--config", options.config], overrides)


def _check_images(cells: Sequence[StudentOptions]) -> None:
    """Find what is wrong with the students' images and network, before any teacher is trained."""
    alone = {"ce": 1.0, "activations": 0.0, "attention": 0.0, "jacobians": 0.0}
    for cell in {cell.samples_per_class: cell for cell in cells}.values():
        prepare(replace(cell, **alone))


def _check_methods(cells: Sequence[StudentOptions]) -> None:
    """Find what is wrong with what they are taught, before any student is trained."""
    for cell in {tuple(getattr(cell, term) for term in TERMS): cell for cell in cells}.values():
        prepare(cell).try_once()


def _cells(options: TableOptions, path: Path) -> list[StudentOptions]:
    """The options of every student."""
    own = {name: getattr(options, name) for name in names(StudentOptions)}
    return [
        StudentOptions(
            **own
            | options.terms(method)
            | {
                "samples_per_class": count,
                "seed": seed,
                "output": str(path / "students"),
                "experiment": f"{method}-{count}-seed{seed}",
            }
        )
        for seed in options.seeds
        for count in options.samples
        for method in options.methods
    ]


def _finished(run: StudentOptions | TeacherOptions) -> bool:
    """Whether the run is done; raises if what is there was run with other options."""
    folder = RunFolder(run.output, str(run.experiment))
    if not folder.finished():
        return False
    before = yaml.safe_load((folder.path / "args.yaml").read_text())
    now = asdict(run)
    different = changed(before, now)
    if before.get("epochs") != now["epochs"] and not different:
        different = [f"--epochs (was {before.get('epochs')}, now {now['epochs']})"]
    if different:
        raise FastjacError(
            f"{folder.path} was run with other options: {', '.join(different)}; "
            "--experiment names another table"
        )
    return True


def _resumed(run: Any) -> Any:
    return replace(run, resume=RunFolder(run.output, run.experiment).last.is_file())


def _train_one(run: StudentOptions) -> float:
    return prepare(_resumed(run)).run(bar=False)["test_accuracy"]


def _enter_worker(threads: int) -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, lost when the worker is ended
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for ``jobs`` students at a time, ended at once if the block is left by an error."""
    threads = max(1, cpu_count() // jobs)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, spawn, _enter_worker, (threads,))
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _train_all(runs: Sequence[StudentOptions], jobs: int, name: str, path: Path) -> None:
    if not runs:
        return
    try:
        with (
            tqdm(total=len(runs), desc=name, unit="run", dynamic_ncols=True, disable=None) as bar,
            _workers(min(jobs, len(runs))) as pool,
        ):
            futures = {pool.submit(_train_one, run): run for run in runs}
            for done in as_completed(futures):
                accuracy = done.result()
                bar.update()
                bar.set_postfix_str(f"{futures[done].experiment}: {100 * accuracy:.1f}%")
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"interrupted; what is finished is kept in {path}, the same command goes on from there"
        ) from stop


def _result(options: TableOptions, run: StudentOptions) -> Row:
    folder = RunFolder(run.output, str(run.experiment)).path
    accuracy = json.loads((folder / "config.json").read_text())["accuracy"]
    method = next(m for m in options.methods if run.experiment.startswith(f"{m}-"))
    return {
        "method": method,
        "samples_per_class": run.samples_per_class,
        "seed": run.seed,
        "accuracy": round(100 * accuracy, 4),
    }


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Mean, standard deviation (of the sample; empty for one seed) and n, in percent right."""
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["samples_per_class"]), []).append(row["accuracy"])
    return [
        {
            "method": method,
            "samples_per_class": count,
            "mean": round(statistics.mean(values), 4),
            "std": round(statistics.stdev(values), 4) if len(values) > 1 else "",
            "n": len(values),
        }
        for (method, count), values in sorted(
            groups.items(), key=lambda item: [r["method"] for r in rows].index(item[0][0])
        )
    ]


def as_text(table: Sequence[Row]) -> str:
    """Methods down, images per class across, ``mean ± std`` in percent."""
    methods = list(dict.fromkeys(row["method"] for row in table))
    counts = list(dict.fromkeys(row["samples_per_class"] for row in table))
    cells = {(row["method"], row["samples_per_class"]): row for row in table}
    width = max(len("test accuracy, %"), *map(len, methods))
    lines = [f"{'test accuracy, %':<{width}}" + "".join(f"{c:>14}" for c in counts)]
    for method in methods:
        line = f"{method:<{width}}"
        for count in counts:
            row = cells[method, count]
            spread = f" ± {row['std']:.1f}" if row["std"] != "" else ""
            line += f"{row['mean']:.1f}{spread}".rjust(14)
        lines.append(line)
    lines.append(f"{'':<{width}}" + "images per class".rjust(14 * len(counts)))
    return "\n".join(lines)
