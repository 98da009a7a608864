"""What accumulation, pieces, clipping, averages, warm-up and soft labels compute: each by formula."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import timm.scheduler
import torch
from safetensors.torch import load_file
from timm.data import Mixup
from torch import nn
from torch.nn.functional import cross_entropy

from fastjac.errors import TrainingFailed, notice
from fastjac.models import VGG
from fastjac.train.batches import Batches
from fastjac.train.build import build_optimizer, load_trained, lr_factor
from fastjac.train.commands import prepare
from fastjac.train.loop import evaluate
from fastjac.train.objective import Classification
from fastjac.train.options import TeacherOptions
from fastjac.train.step import Step

CPU = torch.device("cpu")


@pytest.fixture
def options(tmp_path):
    """Makes the options of a small run by plain gradient descent."""
    notice.cache_clear()  # else a test is told only what no test before it was

    def make(**more):
        plain = {"model": "vgg", "plan": "4 M 8 M", "batch_size": 10, "epochs": 1, "opt": "sgd"}
        plain |= {"momentum": 0, "lr": 0.1, "threads": 1, "output": str(tmp_path)}
        return TeacherOptions(**{**plain, "experiment": "x", **more})

    return make


def gradients(training, batches):
    """Of the mean loss over ``batches``, by autograd, on a copy of the network in train mode."""
    model = copy.deepcopy(training.model).train()
    sum(cross_entropy(model(x), y) / len(batches) for x, y in batches).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
def test_a_step_on_several_batches(options, clip):
    """The gradient of the mean over three batches, clipped to a norm where it is larger."""
    training = prepare(options(grad_accum=3, epoch_steps=1, clip_grad=clip))
    twin = prepare(options(grad_accum=3, epoch_steps=1))
    (batches,) = twin.batches.epoch()
    assert [len(y) for _, y in batches] == [10, 10, 10]
    wanted = gradients(training, batches)
    norm = torch.stack([g.norm() for g in wanted]).norm().item()
    assert 0.01 < norm < 1e6
    before = [p.detach().clone() for p in training.model.parameters()]
    training.run(bar=False)
    factor = 0.1 * min(1, (clip or norm) / norm)
    for p, start, g in zip(training.model.parameters(), before, wanted, strict=True):
        torch.testing.assert_close(start - p, factor * g, atol=1e-6, rtol=1e-3)


def test_steps_on_several_batches_make_up_an_epoch(options):
    """1297 images: 43 steps of 3 batches of 10, of which each image is in one at most."""
    batches = prepare(options(grad_accum=3)).batches
    sizes = [[len(y) for _, y in step] for step in batches.epoch()]
    assert sizes == [[10, 10, 10]] * 43
    assert batches.steps == 43
    few = prepare(options(grad_accum=3, samples_per_class=2, batch_size=8)).batches
    assert [[len(y) for _, y in step] for step in few.epoch()] == [[7, 7, 6]]


class Counted(nn.Module):
    """A network in float64 with dropout, whose steps have no more memory than for some images."""

    def __init__(self, most=99, norm=True):
        super().__init__()
        torch.manual_seed(3)
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Tanh()]
        self.net, self.most = (
            nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(8, 4)).double(),
            most,
        )
        self.sizes = []

    def forward(self, x):
        logits = self.net(x)
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("no more of it")
        return logits


def one_step(options, model, images=10):
    """Takes one step; the batch that it took."""
    torch.manual_seed(1)
    x, y = torch.randn(images, 6, dtype=torch.float64), torch.randint(4, (images,))
    optimizer = build_optimizer(options, model)
    step = Step(options, Classification(model), model, optimizer, CPU)
    pieces = step([(x, y)], lambda x, y, number: (x, y))
    assert torch.equal(torch.cat([piece.y for piece in pieces]), y)
    return x, y


def test_pieces_have_the_gradient_of_the_batch(options):
    """10 images in pieces of at most 4: of 4, 3 and 3, of which each weighs by its share."""
    model, whole = Counted(norm=False).eval(), Counted(norm=False).eval()
    x, y = one_step(options(micro_batch=4), model)
    assert model.sizes == [4, 3, 3]
    cross_entropy(whole(x), y).backward()
    for p, w in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, w - 0.1 * w.grad, rtol=1e-12, atol=1e-14)


def test_pieces_with_batch_norm_are_told_of(options, caplog):
    for _ in range(2):
        training = prepare(options(micro_batch=4, epoch_steps=1))
        training.try_once()
    assert caplog.text.count("BatchNorm takes the statistics of each piece") == 1


def test_memory_that_runs_out_halves_the_pieces(options, caplog):
    """10 -> 5 -> 3 images; then all is as if it had been 3 from the start: dropout, statistics too."""
    auto, fixed = Counted(most=3), Counted()
    one_step(options(micro_batch="auto"), auto)
    one_step(options(micro_batch=3), fixed)
    assert auto.sizes == [10, 5, 3, 3, 2, 2]
    assert fixed.sizes == [3, 3, 2, 2]
    for one, other in zip(auto.state_dict().values(), fixed.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    told = [r.message for r in caplog.records if "--micro-batch auto goes on with" in r.message]
    assert [text.split("with ")[1] for text in told] == ["pieces of 5", "pieces of 3"]


def test_memory_too_small_for_one_image(options):
    for size, most, advice in ((None, 3, "; try --micro-batch auto"), ("auto", 0, "")):
        with pytest.raises(TrainingFailed, match=f"^out of memory: no more of it{advice}$"):
            one_step(options(micro_batch=size), Counted(most=most, norm=False))


def test_a_run_that_does_not_fit(trainer, small, tmp_path, monkeypatch):
    """One line, that says what to try and what is saved."""
    forward = VGG.forward

    def limited(self, x):
        if self.training and len(x) > 4:
            raise torch.OutOfMemoryError("no more of it")
        return forward(self, x)

    monkeypatch.setattr(VGG, "forward", limited)
    status, out, err = trainer("teacher", *small, "--experiment", "x")
    last = tmp_path / "runs" / "x" / "last.pt"
    assert (status, out) == (1, "")
    assert err == (
        f"fastjac: out of memory: no more of it; try --micro-batch auto; {last} holds epoch 0\n"
    )
    words = ["teacher", *small, "--experiment", "x", "--resume", "--micro-batch", "auto"]
    status, out, err = trainer(*words)
    assert (status, err) == (0, "")
    assert torch.load(last, weights_only=True)["micro_batch"] == 3


def test_an_update_is_not_tried_again(options, monkeypatch):
    """Memory that runs out there may leave some weights moved."""
    updates = []

    def update(self, closure=None):
        updates.append(self)
        raise torch.OutOfMemoryError("no more of it")

    monkeypatch.setattr(torch.optim.SGD, "step", update)
    with pytest.raises(TrainingFailed, match="out of memory"):
        one_step(options(micro_batch="auto"), Counted())
    assert len(updates) == 1


def test_an_error_that_is_not_of_memory_is_a_bug(options):
    def broken(x, y):
        raise RuntimeError("another")

    optimizer = build_optimizer(options(), model := Counted())
    for size in (None, "auto"):
        step = Step(options(micro_batch=size), broken, model, optimizer, CPU)
        with pytest.raises(RuntimeError, match="another"):
            step([(torch.zeros(2, 6), torch.zeros(2))], lambda x, y, number: (x, y))


REAL = """
import resource, torch
from fastjac.train.build import build_optimizer
from fastjac.train.objective import Classification
from fastjac.train.options import TeacherOptions
from fastjac.train.step import Step
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(64, 1 << 16), torch.nn.Flatten())
options = TeacherOptions(micro_batch="auto", opt="sgd", momentum=0)
step = Step(options, Classification(model), model, build_optimizer(options, model), torch.device("cpu"))
batch = (torch.randn(512, 64), torch.zeros(512, dtype=torch.int64))
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (250 << 20),) * 2)  # the logits have 128 MiB
step([batch], lambda x, y, number: (x, y))
print(step.size)
"""


def test_memory_that_really_runs_out():
    """A process that may have little memory: logits of 512 x 2^16 do not fit thrice."""
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) <= 256
    assert "out of memory; --micro-batch auto goes on with pieces of 256" in done.stderr


@pytest.mark.parametrize("decay", [0.9998, 0.3])
def test_the_average_of_the_weights(trainer, small, tmp_path, decay):
    """a_n = d a_(n-1) + (1 - d) w_n, d = min(decay, 1 - n^(-2/3)); evaluated, exported, and saved."""
    words = ["teacher", *small, "--epochs", 2, "--checkpoint-steps", 1, "--keep-checkpoints", 99]
    words += ["--model-ema", "--experiment", "x"]
    words += ["--model-ema-decay", decay] if decay != 0.9998 else []
    assert trainer(*words)[0] == 0
    folder = tmp_path / "runs" / "x"
    states = [torch.load(folder / f"last-{k}.pt", weights_only=True) for k in range(7, 0, -1)]
    states.append(torch.load(folder / "last.pt", weights_only=True))
    average = None
    for n, state in enumerate(states, 1):
        d = min(decay, 1 - n ** (-2 / 3))
        weight = state["model"]["conv1.weight"]
        average = weight if average is None else d * average + (1 - d) * weight
        torch.testing.assert_close(state["model_ema"]["conv1.weight"], average)
    exported = load_file(folder / "model.safetensors")
    for name, value in states[-1]["model_ema"].items():
        assert torch.equal(exported[name], value)
    trained = load_trained(folder / "last.pt")
    assert torch.equal(trained.model.conv1.weight, exported["conv1.weight"])
    score = evaluate(trained.model, prepare(TeacherOptions()).data.test, 10, 256)
    assert score["accuracy"] == states[-1]["history"][-1]["test_accuracy"]


@pytest.mark.parametrize("sched", ["cosine", "multistep"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_schedules_are_those_of_timm(sched, warmup):
    steps, epochs = 7, 6
    more = {"warmup_epochs": warmup, "warmup_lr": 1e-3} if warmup else {}
    more |= {"decay_milestones": [3, 5]} if sched == "multistep" else {}
    options = TeacherOptions(epochs=epochs, sched=sched, lr=0.1, **more)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    same = {"warmup_t": warmup * steps, "warmup_lr_init": 1e-3, "t_in_epochs": False}
    if sched == "cosine":
        reference = timm.scheduler.CosineLRScheduler(optimizer, epochs * steps, **same)
    else:  # whose milestones come a step early
        reference = timm.scheduler.MultiStepLRScheduler(
            optimizer, [3 * steps + 1, 5 * steps + 1], 0.1, warmup_prefix=False, **same
        )
    rates = []
    for step in range(epochs * steps):
        reference.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    factor = lr_factor(options, steps)
    assert [0.1 * factor(step) for step in range(epochs * steps)] == pytest.approx(rates, rel=1e-9)
    assert len(set(rates)) > 2


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 0.7}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_is_that_of_timm(options, mix, smoothing):
    """By the epoch's seed and the batch's number; nothing else draws from it, or it from anything."""
    training = prepare(options(**mix, label_smoothing=smoothing, epoch_steps=3))
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    batches = training.batches
    reference = Mixup(
        mix.get("mixup", 0.0), mix.get("cutmix", 0.0), label_smoothing=smoothing, num_classes=10
    )
    shares, changed = set(), []
    for number, ((x, y),) in enumerate(batches.epoch()):
        got = training.batches.soften(x.clone(), y, number)
        changed.append(not torch.equal(got[0], x))
        kept = np.random.get_state()  # noqa: NPY002
        np.random.seed((batches.seed - 1 - number) % 2**32)  # noqa: NPY002
        wanted = reference(x.clone(), y)
        np.random.set_state(kept)  # noqa: NPY002
        assert all(map(torch.equal, got, wanted))
        torch.testing.assert_close(got[1].sum(1), torch.ones(10))
        shares.add(got[1].max().item())
    assert len(shares) == 3
    assert any(changed)
    assert np.random.get_state()[1].tolist() == before[0]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


def test_smoothed_labels(options):
    """As cross_entropy smoothes; the accuracy is that of the labels."""
    training = prepare(options(label_smoothing=0.2, epoch_steps=1))
    ((batch,),) = prepare(options(epoch_steps=1)).batches.epoch()
    model = copy.deepcopy(training.model).train()
    logits = model(batch[0])
    row = training.run(bar=False)
    wanted = cross_entropy(logits, batch[1], label_smoothing=0.2).item()
    assert row["train_loss"] == pytest.approx(wanted, rel=1e-5)
    right = (logits.argmax(1) == batch[1]).float().mean().item()
    assert row["train_accuracy"] == pytest.approx(right)


class Unlabelled(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(1, 16, 16), -1 if index == 5 else 1


def test_soft_labels_need_labels(options):
    for flags in ({"mixup": 1.0}, {"label_smoothing": 0.1}):
        batches = Batches(options(batch_size=4, **flags), Unlabelled(), 10, False)
        with pytest.raises(ValueError, match="need a label for every image; got unlabelled ones"):
            list(batches.epoch())
    assert len(list(Batches(options(batch_size=4), Unlabelled(), 10, False).epoch())) == 2


class Noise(torch.utils.data.Dataset):
    """Images that draw from every generator that an augmentation may draw from."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        import random

        draws = [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002
        return torch.tensor([index, *draws], dtype=torch.float64), index


def test_augmentation_is_by_image(options):
    """Whatever the workers, the step to start at, and what is drawn meanwhile."""
    wanted = None
    for workers, first in ((0, 0), (1, 0), (2, 0), (0, 1), (2, 2)):
        batches = Batches(options(batch_size=3, workers=workers), Noise(), 10, False)
        for epoch in range(2):
            got = []
            for ((x, _),) in batches.epoch(first):
                torch.rand(workers + first)
                got.append(x)
            if wanted is None:
                first_epoch, wanted = got, []
            if epoch == 0:
                assert all(map(torch.equal, got, first_epoch[first:]))
            elif not wanted:
                wanted = got
            assert len(got) == 4 - first
        assert all(map(torch.equal, got, wanted[first:]))
    drawn = torch.cat(first_epoch + wanted)[:, 1:]
    assert all(len(column.unique()) == 24 for column in drawn.T)
