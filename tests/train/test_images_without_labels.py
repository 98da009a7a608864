"""A folder of images without labels beside the data set: in runs, resumed ones, and tables."""

import json
from collections import Counter

import numpy
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from fastjac.train.commands import prepare
from fastjac.train.options import StudentOptions


@pytest.fixture
def extra(tmp_path):
    folder = tmp_path / "extra"
    folder.mkdir()
    for number, pixels in enumerate(load_digits().images[:12]):
        image = Image.fromarray((pixels * 255 / 16).round().astype("uint8"))
        image.save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def words(small, teacher, extra):
    few = ["--samples-per-class", 1, "--epoch-steps", 5, "--batch-size", 22]
    return ["student", *small, *few, "--teacher", teacher, "--jacobians", 0.1]


def test_each_batch_is_of_all_images(extra, teacher, small, tmp_path):
    options = StudentOptions(
        model="vgg",
        plan="4 M 8 M",
        batch_size=22,
        output=str(tmp_path),
        teacher=str(teacher),
        kd=1.0,
        samples_per_class=1,
        unlabelled=str(extra),
    )
    training = prepare(options)
    assert len(training.subset["indices"]) == 10  # of those that have a label
    ((batch,),) = training.batches.epoch()
    assert Counter(batch[1].tolist()) == {-1: 12} | dict.fromkeys(range(10), 1)
    step = training.objective(*batch)
    labelled = batch[1] >= 0
    few = training.objective(*(part[labelled] for part in batch))
    assert step.terms["kd"] > 0
    assert step.terms["ce"] != few.terms["ce"]  # train mode: the statistics are those of all
    training.model.eval()
    step, few = (training.objective(*b) for b in (batch, [part[labelled] for part in batch]))
    numpy.testing.assert_allclose(
        step.terms["ce"].item(), few.terms["ce"].item() * 10 / 22, rtol=1e-5
    )


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_resumed(trainer, words, extra, tmp_path, cache):
    """With the folder elsewhere by then; without it, the run would be another."""
    words += ["--teacher-cache", cache]
    assert trainer(*words, "--unlabelled", extra, "--experiment", "whole")[0] == 0
    first = [*words, "--unlabelled", extra, "--experiment", "cut", "--epochs", 1]
    assert trainer(*first)[0] == 0
    extra.rename(moved := tmp_path / "moved")
    resumed = [*words, "--experiment", "cut", "--resume"]
    status, _, err = trainer(*resumed)
    assert status == 2
    assert err.endswith(f"--unlabelled (was {extra}, now None)\n")
    status, _, err = trainer(*resumed, "--unlabelled", moved, "--workers", 1)
    assert (status, err) == (0, "")
    whole, cut = (tmp_path / "runs" / name for name in ("whole", "cut"))
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()


def test_tables(trainer, words, extra, tmp_path):
    """A row without a teacher goes without them; one may also have none of its own will."""
    recipe = tmp_path / "table.yaml"
    rows = {"alone": {"jacobians": 0.1, "unlabelled": None}, "norm": {"jacobian-norm": 0.1}}
    recipe.write_text(yaml.safe_dump({"table": {"rows": rows, "methods": ["ce", "ce+jacobians"]}}))
    words = ["table", "--config", recipe, *words[1:], "--samples", 1, "--seeds", 0]
    words = [w for k, w in enumerate(words) if "--samples-per-class" not in words[k - 1 : k + 1]]
    words += ["--unlabelled", extra, "--jobs", 1, "--experiment", "t"]
    status, _, err = trainer(*words)
    assert status == 0, err
    given = {
        path.parent.name: yaml.safe_load(path.read_text())["unlabelled"]
        for path in (tmp_path / "runs" / "t" / "students").glob("*/args.yaml")
    }
    students = dict.fromkeys(("alone", "ce", "norm"), None) | {"ce+jacobians": str(extra)}
    assert given == {f"{name}-1-seed0": folder for name, folder in students.items()}
    subset = tmp_path / "runs" / "t" / "students" / "ce+jacobians-1-seed0" / "subset.json"
    assert len(json.loads(subset.read_text())["indices"]) == 10


def test_refused(trainer, words, extra, tmp_path):
    def refused(*more):
        status, out, err = trainer(*words, *more)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert not (tmp_path / "runs").exists()
        return err.removeprefix("fastjac: ")

    assert refused("--unlabelled", "no") == "--unlabelled no: no such folder\n"
    (tmp_path / "empty").mkdir()
    expected = f"--unlabelled: {tmp_path / 'empty'} has no image; images end in .jpg"
    assert refused("--unlabelled", tmp_path / "empty").startswith(expected)
    assert "but from a teacher" in refused("--unlabelled", extra, "--jacobians", 0)
    (extra / "00.png").write_bytes(b"no image")
    status, _, err = trainer(*words, "--unlabelled", extra, "--experiment", "x")
    assert status == 2
    assert err.startswith(f"fastjac: {extra / '00.png'} is not a readable image: ")
    assert err.count("\n") == 1
    again = ["--unlabelled", extra, "--experiment", "x", "--resume", "--skip-damaged"]
    assert trainer(*words, *again)[0] == 0
