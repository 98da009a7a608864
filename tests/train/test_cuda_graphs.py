"""On a GPU: a run whose steps are replayed is the run, and goes on after an interruption."""

import json

import pytest
import torch

pytestmark = pytest.mark.cuda


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def exact():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("opt", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("target", ["label-logit", "attention-window"])
def test_replays_are_the_eager_steps(trainer, small, teacher, tmp_path, target, opt):
    words = ["student", *small, "--teacher", teacher, "--target", target, "--jacobians", 0.1]
    words += ["--device", "cuda", "--opt", opt, "--sched", "cosine", "--epoch-steps", 8]
    for name, flags in (("eager", []), ("replayed", ["--cuda-graphs"])):
        status, _, err = trainer(*words, *flags, "--experiment", name)
        assert (status, err) == (0, "")
    eager, replayed = (rows(tmp_path / "runs" / name) for name in ("eager", "replayed"))
    assert len(eager) == len(replayed) == 2
    for one, other in zip(eager, replayed, strict=True):
        del one["seconds"], other["seconds"]
        assert other == pytest.approx(one, rel=1e-2)
    assert replayed[0]["train_jacobians"] > 0


def test_resumes(trainer, small, tmp_path):
    words = ["teacher", *small, "--device", "cuda", "--cuda-graphs", "--epoch-steps", 8]
    for more in (("whole", "--epochs", 2), ("halves", "--epochs", 1)):
        status, _, err = trainer(*words, "--experiment", *more)
        assert (status, err) == (0, "")
    status, _, err = trainer(*words, "--experiment", "halves", "--epochs", 2, "--resume")
    assert (status, err) == (0, "")
    whole, halves = (rows(tmp_path / "runs" / name) for name in ("whole", "halves"))
    assert len(halves) == 2
    assert halves[1]["test_loss"] == pytest.approx(whole[1]["test_loss"], rel=1e-3)
    assert halves[1]["lr"] == pytest.approx(0.01)
