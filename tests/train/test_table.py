"""The table and the demo: what is trained, what is not trained twice, what is written."""

import contextlib
import csv
import os
import shutil
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from fastjac.errors import FastjacError, TrainingFailed
from fastjac.models import feature_levels
from fastjac.train import table
from fastjac.train.commands import prepare
from fastjac.train.files import RunFolder, write_text
from fastjac.train.options import StudentOptions, TableOptions, TeacherOptions
from fastjac.train.parse import parse
from fastjac.train.recipes import known
from fastjac.train.tables import Cell, as_text, summarize

METHODS = ["ce", "ce+activations", "ce+jacobians"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def recipe(tmp_path):
    """The recipe ``digits``, made small."""
    path = tmp_path / "tiny.yaml"
    content = {
        "dataset": "digits",
        "model": "vgg",
        "plan": "4 M 6 M",
        "epochs": 2,
        "val-interval": 2,
        "epoch-steps": 3,
        "batch-size": 8,
        "threads": 1,
        "activations": 0.5,
        "jacobians": 0.5,
        "teacher": {"plan": "6 M 8 M", "epochs": 1},
    }
    path.write_text(yaml.safe_dump(content))
    return ["--config", path, "--samples", 2, 1, "--seeds", 0, 7, "--methods", *METHODS]


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def students(folder):
    """The time of every finished student's mark."""
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("students/*/config.json")}


def alive(pid):
    """Whether that process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid):
    """The processes started by ``pid``, with theirs."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and alive(entry):
            with open(f"/proc/{entry}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == pid:
                    found += [int(entry), *children(int(entry))]
    return found


def wait(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.check
def test_demo(trainer, recipe, tmp_path):
    status, out, err = trainer("demo", *recipe, "--jobs", 2)
    assert (status, err) == (0, "")
    folder = tmp_path / "runs" / "demo"
    runs, table = rows(folder / "runs.csv"), rows(folder / "table.csv")
    assert len(runs) == len(students(folder)) == 3 * 2 * 2
    assert [(r["method"], r["samples_per_class"]) for r in table] == [
        (m, n) for m in METHODS for n in "21"
    ]
    for row in table:
        group = ("method", "samples_per_class")
        values = [float(r["accuracy"]) for r in runs if all(r[k] == row[k] for k in group)]
        assert float(row["mean"]) == pytest.approx(sum(values) / 2, abs=1e-3)
        assert float(row["std"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-3)
        assert row["n"] == "2"
        assert f"{float(row['mean']):.1f} ± {float(row['std']):.1f}" in out
    for picture in ("table.png", "jacobians.png"):
        assert (folder / picture).read_bytes().startswith(PNG)
        with Image.open(folder / picture) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(10**6)) > 100
    assert str(folder) in out

    before = students(folder)
    (folder / "students" / "ce-1-seed7" / "config.json").unlink()
    status, again, _ = trainer("demo", *recipe)
    assert (status, again) == (0, out)
    after = students(folder)
    assert {name for name in after if after[name] != before[name]} == {"ce-1-seed7"}

    for flags, message in (
        (["--lr", 0.5], "was run with other options: --lr (was 0.001, now 0.5)"),
        (["--epochs", 3], "was run with other options: --epochs (was 2, now 3)"),
    ):
        status, _, err = trainer("demo", *recipe, *flags)
        assert status == 2
        assert message in err
    assert students(folder) == after


def test_a_student_of_the_table_is_a_student(trainer, recipe, teacher, tmp_path):
    """The same weights as ``student`` gives with the same options."""
    # Cached, the teacher takes images one by one, which rounds otherwise.
    words = ["--teacher", teacher, *recipe, "--teacher-cache", "off"]
    assert trainer("table", *words, "--experiment", "t", "--jobs", 1)[0] == 0
    flags = ["--config", recipe[1], "--teacher", teacher, "--samples-per-class", 2, "--seed", 7]
    assert trainer("student", *flags, "--activations", 0, "--experiment", "s")[0] == 0
    table = tmp_path / "runs" / "t" / "students" / "ce+jacobians-2-seed7"
    one = tmp_path / "runs" / "s"
    assert (table / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


def test_finished_students_of_another_teacher(trainer, recipe, teacher, tmp_path):
    """They are not reported as those of the teacher that is now at its place."""
    mine = tmp_path / "mine"
    shutil.copytree(teacher, mine)
    words = ["table", "--config", recipe[1], "--teacher", mine, "--methods", "ce", "ce+jacobians"]
    words += ["--samples", 1, "--seeds", 0, "--jobs", 1, "--experiment", "t"]
    status, table, _ = trainer(*words)
    assert (status, trainer(*words)[:2]) == (0, (0, table))
    weights = load_file(mine / "model.safetensors")
    save_file(weights | {"fc.bias": weights["fc.bias"] + 1}, mine / "model.safetensors")
    status, _, err = trainer(*words)
    folder = tmp_path / "runs" / "t" / "students" / "ce+jacobians-1-seed0"
    assert status == 2
    assert f"{folder} had another teacher: the weights of {mine} are not those" in err


@pytest.mark.check
def test_killed_table_goes_on(start, trainer, recipe, teacher, tmp_path):
    """Its workers do not outlive it, and what was finished is not done again."""
    words = ["table", *recipe, "--methods", "ce+activations", "--seeds", 0, 1, 2, 3, 4, 5]
    words += ["--teacher", teacher, "--experiment", "t", "--epochs", 20, "--epoch-steps", 10]
    words += ["--val-interval", 20, "--jobs", 1]
    folder = tmp_path / "runs" / "t"
    process = start(*words)
    wait(lambda: len(students(folder)) >= 2 or process.poll() is not None)
    workers = children(process.pid)
    assert workers
    process.kill()
    process.wait()
    wait(lambda: not any(map(alive, workers)), 20)
    before = students(folder)
    assert 2 <= len(before) < 12
    assert not (folder / "table.csv").exists()
    status, _, err = trainer(*words)
    assert (status, err) == (0, "")
    after = students(folder)
    assert len(after) == 12
    assert {name: after[name] for name in before} == before


@pytest.mark.check
def test_ctrl_c_ends_the_workers(start, recipe, teacher, tmp_path):
    words = ["table", *recipe, "--teacher", teacher, "--experiment", "t", "--epochs", 4000]
    process = start(*words, "--jobs", 2)
    folder = tmp_path / "runs" / "t"
    wait(lambda: len(list(folder.glob("students/*/last.pt"))) == 2 or process.poll() is not None)
    workers = children(process.pid)
    assert workers
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err == (
        f"fastjac: interrupted; what is finished is kept in {folder}, "
        "the same command goes on from there\n"
    )
    wait(lambda: not any(map(alive, workers)), 20)
    for last in folder.glob("students/*/last.pt"):
        assert torch.load(last, weights_only=True)["epoch"] >= 0


@pytest.mark.check
def test_a_failing_student_stops_the_table(trainer, recipe, teacher, tmp_path):
    words = ["--teacher", teacher, "--opt", "sgd", "--lr", 1e30, "--epoch-steps", 40]
    status, out, err = trainer("table", *recipe, *words, "--experiment", "t", "--jobs", 2)
    assert (status, out) == (1, "")
    assert err.startswith("fastjac: the loss is nan in epoch 1")
    assert err.count("\n") == 1
    assert not (tmp_path / "runs" / "t" / "table.csv").exists()


@pytest.fixture
def finished(tmp_path):
    """A student that is done, as its folder says, and its cell of a table."""
    run = StudentOptions(output=str(tmp_path), experiment="a")
    folder = RunFolder(run.output, "a")
    folder.open(asdict(run))
    folder.write_metrics([{"epoch": 1, "seconds": 1.5}])
    write_text(folder.path / "config.json", '{"accuracy": 0.5}')
    write_text(folder.path / "noise.json", '{"0.0": 0.5, "0.5": 0.25}')
    return Cell("row", run), folder.path


def test_results_of_a_finished_student(finished):
    cell, _ = finished
    assert table._finished(cell.run)
    cpu = torch.device("cpu")
    (row,) = table._results(cell, [], cpu)
    assert (row["accuracy"], row["seconds"]) == (50, 1.5)
    assert [r["accuracy"] for r in table._results(cell, [0.0, 0.5], cpu)] == [50, 25]


@pytest.mark.parametrize(
    ("name", "contents", "advice"),
    [
        (
            "args.yaml",
            [None, b"", b"- 1", b"3", b"a: [", b"\xff", b"a: 2024-13-01"],
            "delete {}/config.json to have both made anew",
        ),
        (
            "metrics.jsonl",
            [None, b"\n", b"[]", b"3", b"{", b'{"seconds": "x"}', b'{"seconds": null}', b"\xff"],
            "delete {}/config.json to have both made anew",
        ),
        (
            "noise.json",
            [b"[]", b"3", b'{"0.5": "x"}', b'{"0.5": null}', b"{", b"", b"\xff"],
            "{}/noise.json",
        ),
        ("config.json", [b"[]", b"{}", b'{"accuracy": "x"}', b"{", b"\xff"], "{}/config.json"),
    ],
)
def test_a_damaged_file_of_a_finished_student(finished, name, contents, advice):
    """One line that names the file, and what makes it anew."""
    cell, folder = finished
    for content in contents:
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(FastjacError) as error:
            table._finished(cell.run) and table._results(cell, [0.5], torch.device("cpu"))
        assert str(folder / name) in str(error.value), content
        assert advice.format(folder) in str(error.value), content


def test_a_worker_that_is_killed(tmp_path, monkeypatch):
    class Pool:
        def submit(self, *args):
            raise BrokenProcessPool

    monkeypatch.setattr(table, "_workers", lambda jobs: contextlib.nullcontext(Pool()))
    cell = Cell("row", StudentOptions(output=str(tmp_path), experiment="a"))
    with pytest.raises(TrainingFailed, match="process that trains students was killed, maybe for"):
        table._train_all([cell], 1, [], "t", tmp_path)


def test_summary():
    data = [("b", 1, 50.0), ("a", 1, 10.0), ("b", 1, 70.0), ("a", 1, 13.0), ("b", 2, 90.0)]
    keys = ("method", "samples_per_class", "accuracy")
    means = summarize([dict(zip(keys, row, strict=True)) for row in data])
    assert means == [
        {"method": "b", "samples_per_class": 1, "mean": 60.0, "std": 14.1421, "n": 2},
        {"method": "b", "samples_per_class": 2, "mean": 90.0, "std": "", "n": 1},
        {"method": "a", "samples_per_class": 1, "mean": 11.5, "std": 2.1213, "n": 2},
    ]
    assert as_text(means[:2]).splitlines()[1].split() == ["b", "60.0", "±", "14.1", "90.0"]


def test_recipes_say_what_the_paper_says():
    fashion = [
        "",
        "-ablations",
        "-losses",
        "-robustness",
        "-transfer",
        "-transfer-weights",
        "-weights",
    ]
    assert known() == ["cifar100", "digits", *(f"fashion-mnist{name}" for name in fashion), "mit67"]
    cifar = parse("student", StudentOptions, ["--config", "cifar100"])
    assert (cifar.model, cifar.opt, cifar.lr, cifar.batch_size) == ("vgg4", "adam", 1e-3, 128)
    assert (cifar.epochs, cifar.decay_milestones, cifar.decay_rate) == (500, [400], 0.1)
    assert (cifar.ce, cifar.activations, cifar.jacobians, cifar.attention) == (1, 1, 1, 0)
    assert (cifar.target, cifar.normalize) == ("label-logit", False)
    assert parse("teacher", TeacherOptions, ["--config", "cifar100"]).model == "vgg9"
    mit = parse("student", StudentOptions, ["--config", "mit67"])
    assert (mit.opt, mit.momentum, mit.lr, mit.batch_size) == ("sgd", 0.9, 1e-3, 8)
    assert (mit.epochs, mit.decay_milestones, mit.decay_rate) == (75, [40, 60], 0.1)
    assert (mit.ce, mit.attention, mit.jacobians, mit.activations) == (1, 10, 10, 10 / 1000)
    assert (mit.target, mit.window, mit.level, mit.normalize) == ("attention-window", 0.2, 1, True)


@pytest.mark.parametrize("name", known())
@pytest.mark.parametrize("command", ["teacher", "student", "table"])
def test_every_recipe_is_one_for_every_command(name, command):
    cls = {"teacher": TeacherOptions, "student": StudentOptions, "table": TableOptions}[command]
    assert (
        parse(command, cls, ["--config", name]).num_classes
        == {"c": 100, "d": 10, "f": 10, "m": 67}[name[0]]
    )


def test_flags_override_the_recipe():
    words = ["--lr", "1e-4", "--no-augment", "--config", "cifar100", "--decay-milestones", "3", "5"]
    options = parse("student", StudentOptions, words)
    assert (options.lr, options.augment, options.decay_milestones) == (1e-4, False, [3, 5])
    assert options.batch_size == 128


def test_a_number_in_exponent_form(tmp_path):
    """YAML takes 1e-3 for a word; an option knows better."""
    path = tmp_path / "r.yaml"
    path.write_text("lr: 1e-3\nbatch_size: 7\n")
    options = parse("teacher", TeacherOptions, ["--config", str(path)])
    assert (options.lr, options.batch_size) == (1e-3, 7)


def test_the_digits_student_is_prepared_as_the_recipe_says(teacher, tmp_path):
    words = ["--config", "digits", "--teacher", str(teacher), "--output", str(tmp_path)]
    training = prepare(parse("student", StudentOptions, words))
    widths = [m.out_channels for m in training.model if isinstance(m, torch.nn.Conv2d)]
    assert widths == [16, 32, 64]
    assert training.batches.steps * training.options.epochs == 240
    assert feature_levels(training.model) == ["pool2", "pool3"]
