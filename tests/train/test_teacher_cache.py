"""What is kept of a teacher: the same results, computed once, never stale, never damaged."""

import json
import os
import sqlite3
import subprocess
import sys

import numpy
import pytest
import torch
from PIL import Image
from test_terms import images, networks, objective

from fastjac import AttentionWindow, FastjacError, JacobianMatching, LabelLogit, Projection
from fastjac.models.levels import level_layer
from fastjac.train.teacher_cache import TeacherCache, teacher_key

TARGETS = {
    "label logit": {"jacobians": 1.0},
    "all logits": {"jacobians": 1.0, "target": "logits"},
    "window": {"jacobians": 1.0, "target": "attention-window", "window": 0.5},
    "own window": {"jacobians": 1.0, "target": "attention-window", "anchor": "own"},
    "levels, attention": {
        "jacobians": 1.0,
        "attention": 1.0,
        "target": "attention-window",
        "levels": [1, 2],
    },
    "activations": {"activations": 1.0},
    "attention": {"attention": 1.0, "kd": 1.0},
}


def rows(x, y):
    return [x.sum((1, 2, 3)), torch.stack([y, y + 1], 1)]


class Counted:
    def __init__(self):
        self.images = 0

    def __call__(self, x, y):
        self.images += len(x)
        return rows(x, y)


@pytest.mark.parametrize("case", TARGETS)
def test_the_same_step(case, tmp_path):
    x, y, _ = images()
    plain = objective(**TARGETS[case])
    cached = objective(**TARGETS[case], teacher_cache=str(tmp_path))
    expected = plain(x, y)
    for _ in range(2):  # computed, then found
        found = cached(x, y)
        assert found.terms.keys() == expected.terms.keys()
        for name, term in expected.terms.items():
            assert torch.allclose(found.terms[name], term, rtol=1e-9), name
    mine, theirs = (
        torch.autograd.grad(step.loss, list(plain.student.parameters()))
        for step in (found, expected)
    )
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-9 * other.abs().max())


@pytest.mark.parametrize("target", ["logit", "window"])
def test_the_teachers_part_of_a_step(target):
    x, y, _ = images()
    student, teacher = networks()
    layer = level_layer(student, 1)
    chosen = LabelLogit() if target == "logit" else AttentionWindow(layer, 0.5)
    for strategy in ("auto", "autograd"):
        matcher = JacobianMatching(student, teacher, chosen, strategy=strategy)
        known = matcher.teacher_forward(x, y)
        calls = []
        handle = teacher.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        loss = matcher(x, y, known).jacobian_loss
        handle.remove()
        assert not calls
        assert torch.allclose(loss, matcher(x, y).jacobian_loss, rtol=1e-12)
    with pytest.raises(FastjacError, match="Projection draws random numbers at each step"):
        JacobianMatching(student, teacher, Projection(1)).teacher_forward(x, y)


def test_an_image_is_computed_once(tmp_path):
    x, y, _ = images()
    compute = Counted()
    cache = TeacherCache(tmp_path, "k", compute)
    for order in ([0, 1, 1, 2], [2, 0, 3], [3, 3]):
        for one, other in zip(cache(x[order], y[order]), rows(x[order], y[order]), strict=True):
            assert torch.allclose(one, other)
    assert compute.images == 4
    cache(x[:1], y[:1] + 1)  # another label
    cache(x[:1] + 1e-7, y[:1])  # another image
    assert compute.images == 6
    again = Counted()
    assert torch.equal(TeacherCache(tmp_path, "k", again)(x[:3], y[:3])[1], rows(x[:3], y[:3])[1])
    assert again.images == 1  # for the shapes
    TeacherCache(tmp_path, "other", again)(x[:3], y[:3])
    assert again.images == 4


def test_flips_are_rows_of_their_own(trainer, small, tmp_path):
    """Two for each image, and no more after any number of epochs; the run is that without them."""
    noise = numpy.random.default_rng(0)
    for part in ("train", "val"):
        for number in range(6):
            path = tmp_path / "images" / part / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (20, 20, 3), "uint8")).save(path)
    words = [*small, "--dataset", "folder", "--data-dir", tmp_path / "images", "--img-size", 16]
    words += ["--batch-size", 6, "--epochs", 1]
    assert trainer("teacher", *words, "--epoch-steps", 2, "--experiment", "t")[0] == 0
    words += ["--teacher", tmp_path / "runs" / "t", "--jacobians", 1, "--epoch-steps", 20]
    for flags, name in (
        (["--flip", "--teacher-cache", tmp_path / "kept"], "kept"),
        (["--flip", "--teacher-cache", "off"], "off"),
        (["--teacher-cache", "off"], "plain"),
    ):
        assert trainer("student", *words, *flags, "--experiment", name)[0] == 0
    (path,) = (tmp_path / "kept").glob("*.sqlite")
    with sqlite3.connect(path) as file:
        # With the two test images on which a step is tried, as they are.
        assert file.execute("SELECT COUNT(*) FROM teacher").fetchone() == (6 * 2 + 2,)
    file.close()
    runs = (tmp_path / "runs" / name / "metrics.jsonl" for name in ("kept", "off", "plain"))
    kept, off, plain = (json.loads(run.read_text())["train_loss"] for run in runs)
    assert kept == pytest.approx(off, rel=1e-4)
    assert kept != pytest.approx(plain, rel=1e-3)


def test_a_norm_and_a_match_of_one_target_share_no_rows(tmp_path):
    """What is kept for them differs: a penalty takes no Jacobian of the teacher."""
    x, y, _ = images()
    for term in ("jacobians", "jacobian_norm"):
        given = {term: 1.0, "activations": 1.0}
        cached = objective(**given, teacher_cache=str(tmp_path))(x, y).loss
        assert torch.allclose(cached, objective(**given)(x, y).loss, rtol=1e-9)


def test_the_key_is_of_all_that_counts():
    student, teacher = networks()
    key = teacher_key(teacher, LabelLogit(), 32)
    assert key == teacher_key(teacher, LabelLogit(), 32)
    assert key != teacher_key(student, LabelLogit(), 32)
    assert key != teacher_key(teacher, LabelLogit(), 64)
    with torch.no_grad():
        teacher.fc.bias[0] += 1e-12
        assert key != teacher_key(teacher, LabelLogit(), 32)
        teacher.fc.bias[0] -= 1e-12


def test_damage_is_found(tmp_path, caplog):
    x, y, _ = images()
    expected = rows(x, y)
    TeacherCache(tmp_path, "k", rows)(x, y)
    path = tmp_path / "k.sqlite"
    with sqlite3.connect(path) as file:
        file.execute("UPDATE teacher SET value = zeroblob(length(value))")
    file.close()
    for one, other in zip(TeacherCache(tmp_path, "k", rows)(x, y), expected, strict=True):
        assert torch.allclose(one, other)
    assert "damaged rows" in caplog.text
    for damage in (b"", b"no database at all" * 100, path.read_bytes()[:5000]):
        path.write_bytes(damage)
        for one, other in zip(TeacherCache(tmp_path, "k", rows)(x, y), expected, strict=True):
            assert torch.allclose(one, other)


@pytest.mark.parametrize("value", ["NULL", "'text'", "3"])
def test_rows_that_were_edited(tmp_path, value):
    x, y, _ = images()
    cache = TeacherCache(tmp_path, "k", Counted())
    before = cache(x[:3], y[:3])
    with sqlite3.connect(tmp_path / "k.sqlite") as file:
        file.execute(f"UPDATE teacher SET value = {value}")
    again = Counted()
    for one, other in zip(TeacherCache(tmp_path, "k", again)(x[:3], y[:3]), before, strict=True):
        assert torch.equal(one, other)
    assert again.images == 3


def test_rows_that_cannot_be_written(tmp_path):
    x, y, _ = images()
    cache = TeacherCache(tmp_path, "k", Counted())
    with sqlite3.connect(tmp_path / "k.sqlite") as file:
        file.execute(
            "CREATE TRIGGER no BEFORE INSERT ON teacher BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    with pytest.raises(FastjacError, match=r"k.sqlite cannot be written: no; expected space"):
        cache(x[:3], y[:3])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        FastjacError, match=r"--teacher-cache: .* cannot be written: .*--teacher-cache off"
    ):
        TeacherCache(tmp_path / "file" / "below", "k", rows)


WRITER = """
import sys, torch
from pathlib import Path
from fastjac.train.teacher_cache import TeacherCache
cache = TeacherCache(Path(sys.argv[1]), "k", lambda x, y: [x * 2])
for start in range(0, 64, 8):
    x = torch.arange(start, start + 8.0).view(-1, 1)
    assert torch.equal(cache(x, torch.zeros(8).long())[0], x * 2)
"""


def test_processes_share_it(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    with sqlite3.connect(tmp_path / "k.sqlite") as file:
        assert file.execute("SELECT COUNT(*) FROM teacher").fetchone() == (64,)
    file.close()
