"""``table`` and ``demo``: methods x images per class x seeds, some students at a time."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from joblib import cpu_count
from tqdm import tqdm

from fastjac.data import ImageData, NoisyImages
from fastjac.errors import FastjacError, TrainingFailed, first_line, read_text
from fastjac.progress import progress_bar
from fastjac.train import interrupts
from fastjac.train.build import build_data, load_trained, pick_device
from fastjac.train.changes import changed
from fastjac.train.claims import claim, claim_in_turn, wait_for
from fastjac.train.commands import prepare
from fastjac.train.files import RunFolder, read_json, write_csv, write_text
from fastjac.train.loop import Training, evaluate
from fastjac.train.options import (
    TAUGHT,
    TERMS,
    DataOptions,
    RunOptions,
    StudentOptions,
    TableOptions,
    TeacherOptions,
    names,
)
from fastjac.train.parse import parse
from fastjac.train.report import write_report
from fastjac.train.sources import find_trained, is_library_name
from fastjac.train.tables import Cell, Row, as_text, summarize
from fastjac.train.teacher_cache import weights_key


def tabulate(options: TableOptions, command: str = "") -> str:
    """Train whatever is not trained yet; write ``table.csv`` and the report; the table as text.

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
    if options.teacher is None and _need_teacher(options):
        teacher = _teacher(options, path)
        options = replace(options, teacher=str(path / "teacher"))
    cells = _cells(options, path)
    todo = [cell for cell in cells if not _finished(cell.run)]
    _check_images(todo)
    if teacher is not None and not _finished(teacher):
        while _train_one(teacher, bar=True) is None:
            wait_for(path / "teacher")
    _check_methods(todo)
    with claim_in_turn(path):
        RunFolder(options.output, str(options.experiment)).open(asdict(options))
    jobs = options.jobs or (cpu_count() if device.type == "cpu" else 1)
    _train_all(todo, jobs, options.test_noise, str(options.experiment), path)
    from fastjac.train.plots import draw_jacobians, draw_table

    with claim_in_turn(path):
        rows = [row for cell in cells for row in _results(cell, options.test_noise, device)]
        write_csv(path / "runs.csv", rows)
        table = summarize(rows)
        write_csv(path / "table.csv", table)
        pictures = [draw_table(table, path / "table.png"), draw_table(table, path / "table.svg")]
        jacobians = draw_jacobians(options, cells, path / "jacobians.png")
        report = write_report(
            path / "report.html",
            options.title or str(options.experiment),
            _about(options, teacher),
            table,
            rows,
            _not_default(options),
            command or f"python -m fastjac.train table --config {options.config}",
            {_CAPTIONS[name]: path / name for name in ("table.svg", *jacobians)},
        )
        written = ", ".join([report, "table.csv", "runs.csv", *pictures, *jacobians])
    return f"{as_text(table)}\n\nresults in {path}: {written}"


_CAPTIONS = {
    "table.svg": "Mean and standard deviation over the seeds",
    "jacobians.png": "Input Jacobians of the teacher and of two students",
}


def _about(options: TableOptions, teacher: TeacherOptions | None) -> str:
    """What was run, in words."""
    size = "" if options.img_size is None else f" at {options.img_size} x {options.img_size}"
    student = options.model + (f" ({options.plan})" if options.plan else "")
    width = "" if options.width == 1 else f" at {options.width:g} of its width"
    by = "no teacher"
    if teacher is not None:
        by = f"a {teacher.model} that was trained on all images"
    elif options.teacher is not None:
        library = is_library_name(options.teacher)
        by = f"the teacher {options.teacher if library else Path(options.teacher).name}"
    steps = options.epoch_steps
    length = _count(options.epochs, "epoch") + ("" if steps is None else f" of {steps} steps")
    tested = "The accuracy is that on all test images."
    if options.validation:
        tested = f"The accuracy is that on {options.validation} training images held out."
    few = " (fewer above 10 images per class)" if options.fewer_seeds else ""
    return (
        f"{options.dataset}{size}: students {student}{width}, {by}. {length}, batches of "
        f"{options.batch_size} at most, {options.opt} at {options.lr:g}; "
        f"{_count(len(options.seeds), 'seed')}{few}, for the images, the weights and the batches. "
        f"{tested}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + "s" * (number != 1)


def _not_default(options: TableOptions) -> dict[str, Any]:
    plain = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(options)
    }
    return {
        name: value
        for name, value in asdict(options).items()
        if value != plain[name] and name not in ("output", "experiment", "jobs", "title")
    }


def _teacher(options: TableOptions, path: Path) -> TeacherOptions:
    """The recipe's teacher, on the table's data and device."""
    if options.config is None:
        raise FastjacError("--teacher is missing, and without --config there is no recipe for one")
    shared = ["dataset", "data_dir", "download", "img_size", "channels", "num_classes"]
    shared += ["device", "workers", "threads", "amp", "amp_dtype", "channels_last", "tensorboard"]
    overrides = {name: getattr(options, name) for name in shared}
    overrides |= {"output": str(path), "experiment": "teacher"}
    return parse("teacher", TeacherOptions, ["--config", options.config], overrides)


def _need_teacher(options: TableOptions) -> bool:
    return any(row.get(term) for row in options.contenders().values() for term in TAUGHT)


def _check_images(cells: Sequence[Cell]) -> None:
    """Find what is wrong with the students' images and network, before any teacher is trained."""
    alone = {term: float(term == "ce") for term in TERMS}
    alone |= {"teacher": None, "input_noise": 0.0, "unlabelled": None}
    for cell in {(cell.row, cell.run.samples_per_class): cell for cell in cells}.values():
        _data_of(cell.run)
        _prepare(replace(cell.run, **alone))


def _check_methods(cells: Sequence[Cell]) -> None:
    """Find what is wrong with what they are taught, before any student is trained."""
    for cell in {cell.row: cell for cell in cells}.values():
        _prepare(cell.run).try_once()


def _cells(options: TableOptions, path: Path) -> list[Cell]:
    """Every student."""
    own = {name: getattr(options, name) for name in names(StudentOptions)}
    _check_names(list(options.contenders()))
    cells = []
    for seed in options.seeds:
        for count in options.samples:
            many = not 0 < count <= 10
            if many and seed in options.seeds[options.fewer_seeds :] and options.fewer_seeds:
                continue
            for row, given in options.contenders().items():
                where = {
                    "samples_per_class": count or None,
                    "seed": seed,
                    "output": str(path / "students"),
                    "experiment": f"{_as_name(row)}-{count or 'all'}-seed{seed}",
                }
                run = StudentOptions(**own | given | where)
                if run.teacher_cache == "auto" and run.teacher and not run.uncacheable():
                    # Shared by the students; SQLite's locks are sound on one machine alone.
                    cache = path / f"teacher-cache-{socket.gethostname()}"
                    run = replace(run, teacher_cache=str(cache))
                cells.append(Cell(row, run))
    return cells


def _check_names(rows: Sequence[str]) -> None:
    """Raise for rows whose students would have one folder, or one that no file system takes."""
    folders: dict[str, str] = {}
    for row in rows:
        if len(_as_name(row)) > 200:
            raise FastjacError(f"--rows: expected names of at most 200 characters, got {row!r}")
        if row.encode("utf-8", "replace").decode() != row:
            raise FastjacError(f"--rows: expected names in UTF-8, got {row!a}")
        if (other := folders.setdefault(_as_name(row), row)) != row:
            raise FastjacError(
                f"--rows: {other!r} and {row!r} would have one folder, {_as_name(row)}; expected names "
                "that differ in their letters, digits or .+=_-"
            )


def _as_name(row: str) -> str:
    """A row's name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9.+=_-]+", "-", row).strip("-") or "row"


def _finished(run: StudentOptions | TeacherOptions) -> bool:
    """Whether the run is done; raises if what is there was run with other options."""
    folder = RunFolder(run.output, str(run.experiment))
    if not folder.finished():
        return False
    before = _args(folder.path)
    now = asdict(run)
    different = changed(before, now)
    if before.get("epochs") != now["epochs"] and not different:
        different = [f"--epochs (was {before.get('epochs')}, now {now['epochs']})"]
    if different:
        raise FastjacError(
            f"{folder.path} was run with other options: {', '.join(different)}; "
            "--experiment names another table"
        )
    about = read_json(folder.path / "config.json")
    taught_by = about.get("teacher") if isinstance(about, dict) else None
    source = getattr(run, "teacher", None)
    if taught_by and source and os.path.exists(source) and taught_by != _key_of(source):
        raise FastjacError(
            f"{folder.path} had another teacher: the weights of {source} are not those that it was "
            "taught by; --experiment names another table"
        )
    return True


def _key_of(teacher: str) -> str:
    """A digest of the weights of the network in a run's folder or a file."""
    path = find_trained(teacher)
    return _read_key(path, path.stat().st_mtime_ns)


@functools.cache
def _read_key(path: Path, written: int) -> str:
    return weights_key(load_trained(path).model)


def _args(folder: Path) -> dict[str, Any]:
    """The options that a finished run was made with."""
    path = folder / "args.yaml"
    advice = f"delete {folder / 'config.json'} to have both made anew"
    try:
        found = yaml.safe_load(read_text(path))
    except (FastjacError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise FastjacError(
            f"{path} is damaged or missing: {first_line(error)}; {advice}"
        ) from error
    if not isinstance(found, dict):
        raise FastjacError(f"{path} is damaged: expected the run's options, by name; {advice}")
    return found


def _seconds(folder: Path) -> float:
    """The time that the epochs of a finished run took."""
    path = folder / "metrics.jsonl"
    try:
        return sum(float(json.loads(line)["seconds"]) for line in read_text(path).splitlines())
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # or a FastjacError
        raise FastjacError(
            f"{path} is damaged or missing: {first_line(error)}; delete {folder / 'config.json'} to "
            "have both made anew"
        ) from error


def _resumed(run: Any) -> Any:
    return replace(run, resume=bool(RunFolder(run.output, run.experiment).checkpoints()))


def _train_one(
    run: StudentOptions | TeacherOptions, bar: bool = False, noises: Sequence[float] = ()
) -> float | None:
    """The accuracy of a run; None while another process, maybe of another machine, trains it."""
    folder = RunFolder(run.output, str(run.experiment))
    with claim(folder.path) as mine:
        if not mine:
            return None
        if folder.finished():
            return _accuracy(folder.path)
        found = _prepare(_resumed(run)).run(bar)["test_accuracy"]
        if noises:
            _under_noise(run, folder.path, noises, pick_device(run.device))
        return found


def _prepare(run: StudentOptions | TeacherOptions) -> Training:
    """The run, with images that this process has read already if it has."""
    return prepare(run, _data_of(run))


def _data_of(run: StudentOptions | TeacherOptions) -> ImageData:
    values = tuple(getattr(run, name) for name in _DATA_OPTIONS)
    return _data(values, getattr(run, "unlabelled", None))


_DATA_OPTIONS = tuple(names(DataOptions))


@functools.lru_cache(maxsize=2)
def _data(values: tuple[Any, ...], unlabelled: str | None) -> ImageData:
    return build_data(RunOptions(**dict(zip(_DATA_OPTIONS, values, strict=True))), unlabelled)


def _enter_worker(threads: int) -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
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


def _train_all(
    cells: Sequence[Cell], jobs: int, noises: Sequence[float], name: str, path: Path
) -> None:
    if not cells:
        return
    try:
        with (
            progress_bar(total=len(cells), desc=name, unit="run") as bar,
            _workers(min(jobs, len(cells))) as pool,
        ):
            left = [cell.run for cell in cells]
            while left:
                with interrupts.put_off():
                    futures = {pool.submit(_train_one, run, False, noises): run for run in left}
                left = []
                for done in as_completed(futures):
                    run, accuracy = futures[done], done.result()
                    if accuracy is None:
                        left.append(run)
                        continue
                    bar.update()
                    bar.set_postfix_str(f"{run.experiment}: {100 * accuracy:.1f}%")
                if left:
                    wait_for(Path(left[0].output) / str(left[0].experiment))
    except BrokenProcessPool as error:
        raise TrainingFailed(
            "a process that trains students was killed, maybe for want of memory (fewer --jobs take "
            f"less); what is finished is kept in {path}, the same command goes on from there"
        ) from error
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"interrupted; what is finished is kept in {path}, the same command goes on from there"
        ) from stop


def _results(cell: Cell, noises: Sequence[float], device: torch.device) -> list[Row]:
    """The rows of one student: on the test images, and under each noise."""
    folder = RunFolder(cell.run.output, str(cell.run.experiment)).path
    accuracy = _accuracy(folder)
    seconds = _seconds(folder)
    about = {
        "method": cell.row,
        "samples_per_class": cell.run.samples_per_class or "all",
        "seed": cell.run.seed,
    }
    if not noises:
        return [about | {"accuracy": round(100 * accuracy, 4), "seconds": round(seconds, 1)}]
    return [
        about | {"noise": noise, "accuracy": round(100 * found, 4), "seconds": round(seconds, 1)}
        for noise, found in _under_noise(cell.run, folder, noises, device).items()
    ]


def _accuracy(folder: Path) -> float:
    """That of a finished run."""
    about = read_json(folder / "config.json")
    accuracy = about.get("accuracy") if isinstance(about, dict) else None
    if not isinstance(accuracy, int | float):
        raise FastjacError(
            f"{folder / 'config.json'} has no accuracy; delete it to have it made anew"
        )
    return accuracy


def _under_noise(
    run: StudentOptions | TeacherOptions,
    folder: Path,
    noises: Sequence[float],
    device: torch.device,
) -> dict[float, float]:
    """The accuracy under each noise; kept in the student's folder."""
    path = folder / "noise.json"
    known = read_json(path) if path.is_file() else {}
    if not isinstance(known, dict) or not all(isinstance(v, float) for v in known.values()):
        raise FastjacError(f"{path} does not hold accuracies; delete it to have it made anew")
    if todo := [noise for noise in noises if str(noise) not in known]:
        trained, data = load_trained(folder), _data_of(run)
        for noise in todo:
            images = NoisyImages(data.test, noise)
            found = evaluate(
                *(trained.model.to(device), images, len(data.classes)), 256, run.workers
            )
            known[str(noise)] = found["accuracy"]
        write_text(path, json.dumps(known) + "\n")
    return {noise: known[str(noise)] for noise in noises}
