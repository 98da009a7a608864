"""What teacher and student compute and leave behind."""

import contextlib
import csv
import fcntl
import io
import json
import os
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import termios

import pytest
import timm
import torch
import yaml
from PIL import Image
from torch.nn.functional import cross_entropy

from fastjac import JacobianMatching, LabelLogit, activation_match_loss, attention_match_loss
from fastjac.data import load_data
from fastjac.features import forward_with_features
from fastjac.progress import _Lines, progress_bar
from fastjac.train.build import build_data, build_model, load_trained
from fastjac.train.commands import prepare
from fastjac.train.loop import evaluate
from fastjac.train.options import StudentOptions, TeacherOptions

FILES = {"args.yaml", "metrics.jsonl", "summary.csv", "last.pt", "best.pt"}
FILES |= {"last-1.pt", "model.safetensors", "config.json"}


def test_a_run_leaves_its_files(trainer, small, tmp_path):
    status, out, err = trainer("student", *small, "--samples-per-class", 3, "--experiment", "a/b")
    folder = tmp_path / "runs" / "a" / "b"
    assert (status, err) == (0, "")
    assert {p.name for p in folder.iterdir()} == FILES | {"subset.json"}
    assert len({oct(p.stat().st_mode & 0o777) for p in folder.iterdir()}) == 1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    with (folder / "summary.csv").open() as file:
        assert [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)] == rows
    assert out.startswith(f"{100 * rows[-1]['test_accuracy']:.2f} % of 500 test images right after")
    subset = json.loads((folder / "subset.json").read_text())
    labels = load_data("digits").labels
    assert sorted(labels[i] for i in subset["indices"]) == sorted([*range(10)] * 3)
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert (args["samples_per_class"], args["plan"]) == (3, "4 M 8 M")


def test_args_yaml_makes_the_run_again(trainer, small, tmp_path):
    trainer("teacher", *small, "--experiment", "a")
    folder = tmp_path / "runs"
    status, *_ = trainer("teacher", "--config", folder / "a" / "args.yaml", "--experiment", "b")
    assert status == 0
    weights = [(folder / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_the_seed_counts(trainer, small, tmp_path):
    for seed in (0, 1):
        trainer("teacher", *small, "--experiment", seed, "--seed", seed)
    one, two = (load_trained(tmp_path / "runs" / str(seed)).model for seed in (0, 1))
    assert not torch.equal(one.conv1.weight, two.conv1.weight)


def test_the_teacher_learns(teacher):
    trained = load_trained(teacher)
    data = load_data("digits")
    score = evaluate(trained.model, data.test, 10, 100)
    assert score["accuracy"] > 0.8
    x, y = data.test.tensors
    with torch.no_grad():
        logits = trained.model.eval()(x)
    assert score["accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert score["loss"] == pytest.approx(cross_entropy(logits, y).item(), rel=1e-5)


@pytest.mark.parametrize("target", ["label-logit", "attention-window"])
@pytest.mark.parametrize("terms", [{"jacobians": 0.3}, {}])
def test_the_loss_is_the_weighted_sum(teacher, tmp_path, target, terms):
    """Each term by the library's own functions, on networks of the same weights."""
    weights = {"ce": 0.5, "activations": 0.2, **terms}
    if target == "attention-window" or not terms:
        weights["attention"] = 2.0
    options = StudentOptions(
        model="vgg", plan="4 M 6 M", teacher=str(teacher), target=target, **weights,
        output=str(tmp_path), experiment="x", normalize=True, strategy="autograd",
    )  # fmt: skip
    training = prepare(options)
    trained = load_trained(teacher).model.eval()
    x, y = load_data("digits").train[:6]
    step = training.objective(x, y)
    student = prepare(options).model.train()
    logits, features = forward_with_features(student, x, "pool2")
    logits_t, features_t = forward_with_features(trained, x, "pool2")
    expected = 0.5 * cross_entropy(logits, y) + 0.2 * activation_match_loss(logits, logits_t)
    if "attention" in weights:
        expected = expected + 2.0 * attention_match_loss(features, features_t)
    if terms:
        from fastjac import AttentionWindow

        goal = LabelLogit() if target == "label-logit" else AttentionWindow("pool2")
        twin = prepare(options).model
        matching = JacobianMatching(twin, trained, goal, True, strategy="autograd").train()
        expected = expected + 0.3 * matching(x, y).jacobian_loss
    assert set(step.terms) == set(weights)
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.logits, logits)


def test_a_step_moves_the_student_and_not_the_teacher(teacher, tmp_path):
    options = StudentOptions(
        model="vgg", plan="4 M 6 M", teacher=str(teacher), jacobians=1, activations=1,
        output=str(tmp_path), experiment="x", epochs=1, epoch_steps=3,
    )  # fmt: skip
    training = prepare(options)
    before = {k: v.clone() for k, v in training.objective.state_dict().items()}
    training.run()
    changed = {
        k for k, v in training.objective.state_dict().items() if not torch.equal(v, before[k])
    }
    assert {"student.conv1.weight", "student.norm2.running_mean", "student.fc.bias"} <= changed
    assert not any(k.startswith("teacher.") for k in changed)


@pytest.mark.parametrize(
    "flags",
    [
        ["--amp"],
        ["--amp", "--amp-dtype", "float16"],
        ["--channels-last"],
        ["--workers", "1"],
        ["--opt", "sgd", "--weight-decay", "1e-4"],
    ],
)
def test_ways_to_train(trainer, small, teacher, flags):
    words = ["student", *small, "--teacher", teacher, "--jacobians", 0.1, "--strategy", "autograd"]
    status, _, err = trainer(*words, "--epochs", 1, *flags)
    assert (status, err) == (0, "")


def test_compiles(trainer, small, tmp_path, monkeypatch):
    """One epoch, captured by torch.compile and not: the same loss, to rounding."""
    calls, losses, compile_in_place = [], [], torch.nn.Module.compile

    def compile(module):
        calls.append(module)
        compile_in_place(module, backend="aot_eager")  # without the minute of a C++ compiler

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    for flags in ([], ["--torchcompile"]):
        words = ["teacher", *small, "--epochs", 1, "--experiment", f"c{len(flags)}"]
        assert trainer(*words, *flags)[0] == 0
        text = (tmp_path / "runs" / f"c{len(flags)}" / "metrics.jsonl").read_text()
        losses.append(json.loads(text)["train_loss"])
    assert len(calls) == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        (["--sched", "none"], [0.01] * 4),
        (["--sched", "multistep", "--decay-milestones", 1, 3], [0.01, 0.001, 0.001, 0.0001]),
        (["--sched", "cosine"], [0.01, 0.0085355, 0.005, 0.0014645]),
    ],
)
def test_learning_rates(trainer, small, tmp_path, flags, rates):
    trainer("teacher", *small, "--epochs", 4, *flags, "--experiment", "x", "--epoch-steps", 2)
    lines = (tmp_path / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == pytest.approx(rates, rel=1e-4)


def test_evaluations_by_interval(trainer, small, tmp_path):
    trainer("teacher", *small, "--epochs", 5, "--val-interval", 2, "--experiment", "x")
    lines = (tmp_path / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if "test_accuracy" in line] == [2, 4, 5]


def test_best_is_the_best(trainer, small, tmp_path):
    """With a learning rate that ruins the network after the first epoch."""
    words = ["--opt", "sgd", "--lr", 1e-9, "--sched", "multistep", "--decay-milestones", 1]
    trainer("teacher", *small, "--epochs", 3, "--experiment", "x", *words, "--decay-rate", 1e10)
    folder = tmp_path / "runs" / "x"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [row["test_accuracy"] for row in rows]
    assert scores == [round(500 * score) / 500 for score in scores]
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["epoch"] == 1 + scores.index(max(scores))
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("name", ["", "last.pt", "best.pt", "model.safetensors"])
def test_evaluate(trainer, teacher, name):
    status, out, err = trainer("evaluate", teacher / name)
    rows = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    scores = [row["test_accuracy"] for row in rows]
    expected = max(scores) if name == "best.pt" else scores[-1]
    assert (status, err) == (0, "")
    assert out.startswith(f"{100 * expected:.2f} % of 500 test images right")


@pytest.mark.parametrize(("channels", "as_library"), [(3, True), (None, False)])
def test_weights_of_a_library_s_network_with_its_normalisation(tmp_path, channels, as_library):
    """As timm's own training has it, and --pretrained; that of one channel is the data set's."""
    theirs = timm.create_model("test_resnet", num_classes=10, in_chans=channels or 1).eval()
    assert theirs.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    torch.save(theirs.state_dict(), path := tmp_path / "w.pth")
    options = TeacherOptions(model="timm/test_resnet", weights=str(path), channels=channels)
    data = build_data(options)
    model, spec = build_model(options, data)
    x = torch.rand(2, channels or 1, 32, 32)
    mean, std = (0.5, 0.5) if as_library else (data.mean[0], data.std[0])
    assert spec.mean == pytest.approx((mean,) * (channels or 1))
    assert torch.allclose(model.eval()(x), theirs((x - mean) / std), atol=1e-5)


def test_weights_go_in(trainer, small, teacher, tmp_path):
    words = ["--weights", teacher / "model.safetensors", "--lr", 1e-12, "--plan", "8 M 16 M 32 M"]
    trainer("teacher", *small, *words, "--experiment", "x")
    model = load_trained(tmp_path / "runs" / "x").model
    torch.testing.assert_close(model.conv1.weight, load_trained(teacher).model.conv1.weight)


def test_broken_exif_data_is_no_news(start, small, tmp_path, monkeypatch):
    """Pillow warns of it, by the lines of its own code, and reads the image."""
    monkeypatch.delenv("PYTHONWARNINGS")
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        exif = b"Exif\0\0II*\0\x08\0\0\0"
        Image.new("RGB", (20, 20)).save(tmp_path / folder / "x.jpg", exif=exif)
    words = ["teacher", *small, "--dataset", "folder", "--data-dir", tmp_path, "--img-size", 16]
    process = start(*words, "--batch-size", 2, "--epochs", 1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "2 test images" in out
    assert "Corrupt EXIF" not in err


def test_a_teacher_by_name_with_other_classes(trainer, tmp_path, caplog):
    """Transfer at a layer needs no common classes: a torchvision network, its weights from a file."""
    import torchvision
    from PIL import Image

    for part in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 40), (90 * i, 50, 200)).save(folder / f"{i}.png")
    torch.save(torchvision.models.resnet18(num_classes=1000).state_dict(), tmp_path / "r.pth")
    words = ["student", "--dataset", "folder", "--data-dir", tmp_path / "images", "--img-size", 64]
    words += ["--model", "vgg4", "--width", 0.1, "--batch-size", 2, "--epochs", 1, "--threads", 1]
    words += ["--teacher", "torchvision/resnet18", "--teacher-weights", tmp_path / "r.pth"]
    words += ["--target", "attention-window", "--attention", 10, "--jacobians", 10]
    status, out, err = trainer(*words)
    assert (status, err) == (0, "")
    assert "4 test images" in out
    status, _, err = trainer(*words, "--kd", 1, "--experiment", "x")
    assert status == 2
    assert "the teacher torchvision/resnet18 has 1000 classes, folder has 2, which --kd" in err
    assert "--jacobians of --target attention-window" in err
    # The paper's transfer: a second head, in the teacher's classes, which a resumption finds again.
    words += ["--activations", 0.01, "--experiment", "heads"]
    assert trainer(*words)[0] == 0
    assert "a second head of the student" in caplog.text
    state = torch.load(tmp_path / "runs" / "heads" / "last.pt", weights_only=True)
    assert state["heads"]["logits.weight"].shape[0] == 1000
    assert trainer(*words, "--resume", "--epochs", 2)[0] == 0
    after = torch.load(tmp_path / "runs" / "heads" / "last.pt", weights_only=True)
    assert not torch.equal(after["heads"]["logits.weight"], state["heads"]["logits.weight"])


def test_a_teacher_whose_classes_have_other_names(trainer, small, teacher, tmp_path, caplog):
    about = json.loads((teacher / "config.json").read_text())
    words = ["student", *small, "--jacobians", 0.1, "--epochs", 1]

    def run(name: str, classes: list[str]) -> tuple[int, str, str]:
        shutil.copytree(teacher, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(about | {"classes": classes}))
        source = tmp_path / name / "model.safetensors"
        return trainer(*words, "--teacher", source, "--experiment", f"of-{name}")

    status, _, err = run("reversed", about["classes"][::-1])
    assert status == 2
    assert "class 0 is '9', of digits it is '0'; expected a teacher that was trained on" in err
    assert not caplog.text
    assert run("renamed", [f"number {k}" for k in range(10)])[0] == 0
    assert "class 0 is 'number 0', of digits it is '0': they count as one class" in caplog.text


def test_a_teacher_of_another_size(trainer, small, teacher, caplog):
    words = ["student", *small, "--teacher", teacher, "--jacobians", 0.1, "--epochs", 1]
    assert trainer(*words)[0] == 0
    assert not caplog.text
    assert trainer(*words, "--img-size", 24, "--experiment", "x")[0] == 0
    said = f"the teacher {teacher} was trained on images of 16 x 16, and sees 24 x 24 here"
    assert said in caplog.text


def test_tensorboard(trainer, small, tmp_path):
    pytest.importorskip("tensorboard")
    assert trainer("teacher", *small, "--tensorboard", "--experiment", "x")[0] == 0
    assert list((tmp_path / "runs" / "x").glob("events.out.tfevents*"))


def on_a_terminal(*words):
    """What a process shows on a terminal of 24 x 120."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "-m", "fastjac.train", *map(str, words)]
    process = subprocess.Popen(command, stderr=follower, stdout=subprocess.DEVNULL)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
        while part := os.read(leader, 4096):
            shown += part
    os.close(leader)
    assert process.wait() == 0
    return shown.decode()


def test_a_bar_on_a_terminal(small, tmp_path):
    text = on_a_terminal("teacher", *small, "--output", tmp_path)
    for part in ("8/8", "loss=", "train=", "test=", "epoch=2", "step/s"):
        assert part in text


@pytest.fixture
def shell(small, tmp_path):
    """Runs a teacher ``x`` in a process, with what a shell has after the words; it, ended."""

    def run(redirection, *words):
        interpreter = [sys.executable, "-m", "fastjac.train"]
        command = shlex.join([*interpreter, *map(str, words or ["teacher", *small])])
        more = "" if words else f" --experiment x --output {shlex.quote(str(tmp_path))}"
        return subprocess.run(
            f"{command}{more} {redirection}", shell=True, capture_output=True, text=True
        )

    return run


def test_no_standard_error(shell, tmp_path):
    """It is trained without a bar, to the end; and no other file is in its place."""
    done = shell("2>&-")
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    assert (tmp_path / "x" / "config.json").is_file()
    done = shell("2>&-", "tech")
    assert (done.returncode, done.stdout) == (2, "")


def test_a_bar_without_a_standard_error(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert list(progress_bar([1, 2])) == [1, 2]


def test_progress_in_a_log(monkeypatch, capsys):
    """A line when it is time for one, without a terminal's control characters."""
    clock = iter([0.0, 29.0, 31.0, 32.0, 60.0, 61.0])
    monkeypatch.setattr("fastjac.progress.time.monotonic", lambda: next(clock))
    lines = _Lines()
    for text in ("\r0 of 9", "\r1 of 9", "\n", "\r3 of 9", "\r4 of 9  "):
        lines.write(text)
    assert capsys.readouterr().err == "1 of 9\n4 of 9\n"
    monkeypatch.undo()
    monkeypatch.setattr("fastjac.progress.LINE_EVERY", 0.0)
    with progress_bar(total=4, desc="run", unit="step") as bar:
        bar.update(3)
        bar.set_postfix(loss="0.5")
    assert "run: 3 of 4 steps [00:00<00:00, loss=0.5]\n" in capsys.readouterr().err


def test_a_log_that_nobody_reads_any_more(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr("fastjac.progress.LINE_EVERY", 0.0)
    with open(writer, "wb", 0) as pipe:
        monkeypatch.setattr("sys.stderr", io.TextIOWrapper(pipe, write_through=True))
        assert list(progress_bar([1, 2])) == [1, 2]
        with pytest.raises(BrokenPipeError):
            sys.stderr.write("x")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_standard_output_that_is_full(shell, tmp_path):
    """All is saved by then, and the line is said all the same."""
    done = shell(">/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "fastjac: the standard output cannot be written to: No space left on device: "
    )
    assert done.stderr.endswith(f"test images right after 2 epochs; results in {tmp_path / 'x'}\n")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "x" / "config.json").is_file()
    for words in (["--help"], ["teacher", "--help"]):
        done = shell(">/dev/full", *words)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_a_name_that_the_output_cannot_show(trainer, small, monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", written)
    assert trainer("teacher", *small, "--experiment", "\u00e9")[0] == 0
    assert written.buffer.getvalue().endswith(b"\\xe9\n")


@pytest.mark.check
def test_a_table_has_one_bar(small, tmp_path):
    words = ["--methods", "ce", "--samples", 1, "--seeds", 0, 1, "--jobs", 1]
    text = on_a_terminal("table", *small, *words, "--output", tmp_path)
    assert "2/2" in text
    assert "ce-1-seed" in text
    assert "step/s" not in text


def test_trying_once_changes_nothing(trainer, tmp_path, monkeypatch):
    """A network with dropout and running statistics: the same weights with and without the trial."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(2):
                image = Image.effect_noise((32, 32), 60).convert("RGB")
                image.save(tmp_path / "images" / part / name / f"{i}.png")
    words = ["teacher", "--dataset", "folder", "--data-dir", tmp_path / "images", "--img-size", 32]
    words += ["--model", "torchvision/mobilenet_v3_small", "--epochs", 1, "--batch-size", 2]
    assert trainer(*words, "--threads", 1, "--experiment", "tried")[0] == 0
    monkeypatch.setattr("fastjac.train.loop.Training.try_once", lambda self: None)
    assert trainer(*words, "--threads", 1, "--experiment", "not")[0] == 0
    tried, untried = (tmp_path / "runs" / name / "model.safetensors" for name in ("tried", "not"))
    assert tried.read_bytes() == untried.read_bytes()
