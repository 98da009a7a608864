"""Real processes, really killed: what is left is whole, and resuming gives the same weights."""

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest
import torch
import yaml
from PIL import Image

from fastjac.errors import notice
from fastjac.train import interrupts
from fastjac.train.build import load_trained
from fastjac.train.changes import changed
from fastjac.train.commands import prepare
from fastjac.train.files import RunFolder
from fastjac.train.options import StudentOptions, TeacherOptions
from fastjac.train.parse import parse


@pytest.fixture
def long_run(small, teacher):
    """A student with all there is to restore: a cosine schedule, Adam, a subset, a teacher."""
    words = ["student", *small, "--epochs", 24, "--epoch-steps", 10, "--samples-per-class", 4]
    return [*words, "--sched", "cosine", "--teacher", teacher, "--jacobians", 0.1]


def wait_for(process, reached):
    """Until ``reached()``, while the process runs."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if reached():
            return
        time.sleep(0.001)
    pytest.fail(process.stderr.read() if process.poll() is not None else "not within 120 s")


def wait_for_epoch(folder, epoch, process):
    """Until ``metrics.jsonl`` has that epoch."""
    metrics = folder / "metrics.jsonl"
    wait_for(process, lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= epoch)


def lines(folder):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.check
def test_killed_and_resumed(start, trainer, long_run, tmp_path):
    assert trainer(*long_run, "--experiment", "whole")[0] == 0
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    process = start(*long_run, "--experiment", "cut")
    wait_for_epoch(cut, 3, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "model.safetensors").exists()
    reached = torch.load(cut / "last.pt", weights_only=True)["epoch"]
    assert 3 <= reached < 24
    status, _, err = trainer(*long_run, "--experiment", "cut", "--resume")
    assert (status, err) == (0, "")
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert lines(whole) == lines(cut)
    assert (whole / "subset.json").read_bytes() == (cut / "subset.json").read_bytes()
    assert not [p for p in cut.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.check
def test_ctrl_c(start, trainer, long_run, tmp_path):
    folder = tmp_path / "runs" / "x"
    process = start(*long_run, "--experiment", "x", "--epochs", 4000)
    wait_for_epoch(folder, 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    last = torch.load(folder / "last.pt", weights_only=True)
    assert err == (
        f"fastjac: interrupted; {folder / 'last.pt'} holds epoch {last['epoch']} of 4000, "
        "--resume goes on from there\n"
    )
    assert last["epoch"] >= 2
    assert len(lines(folder)) == last["epoch"]
    assert trainer("evaluate", folder)[0] == 0
    assert load_trained(folder).source == folder / "last.pt"


@pytest.fixture
def photographs(tmp_path):
    """A folder of a few images with something to crop and flip."""
    for part in ("train", "val"):
        for k, name in enumerate(("a", "b")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                image = Image.effect_noise((24, 24), 60 + 60 * k).convert("RGB")
                image.save(folder / f"{i}.png")
    return ["--dataset", "folder", "--data-dir", tmp_path / "images", "--img-size", 16]


EMA = ["--model-ema", "--model-ema-decay", "0.5"]
WARM = ["--sched", "cosine", "--warmup-epochs", "1"]


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        ("digits", ["--clip-grad", "0.1", *WARM]),
        ("digits", ["--grad-accum", "2", *EMA]),
        ("digits", ["--mixup", "0.4", "--cutmix", "1", "--label-smoothing", "0.1"]),
        ("digits", ["--micro-batch", "4", "--samples-per-class", "3"]),
        ("digits", ["--micro-batch", "auto"]),
        ("photographs", ["--augment"]),
        ("photographs", ["--augment", "--workers", "2", "--mixup", "1", "--grad-accum", "2", *EMA]),
        ("photographs", ["--augment", "--amp", "--amp-dtype", "float16", "--clip-grad", "1"]),
        (
            "photographs",
            ["--model", "torchvision/mobilenet_v3_small", "--channels-last"],
        ),  # drops out
    ],
)
def test_resumed_from_any_step(trainer, small, photographs, tmp_path, data, flags):
    """From checkpoints within epochs and between them: all that follows is what it was."""
    words = ["teacher", *small, *(photographs if data == "photographs" else ())]
    words += ["--batch-size", 2] if data == "photographs" else []
    if "--model" in flags:
        words = [w for w in words if w not in ("--model", "vgg", "--plan", "4 M 8 M")]
        words += ["--img-size", 32]
    words += ["--checkpoint-steps", 1, "--keep-checkpoints", 99, *flags]
    assert trainer(*words, "--experiment", "whole")[0] == 0
    whole = tmp_path / "runs" / "whole"
    for back in (1, 3, 4, 6, 8):
        cut = tmp_path / "runs" / f"cut{back}"
        cut.mkdir()
        shutil.copy(whole / f"last-{back}.pt", cut / "last.pt")
        state = torch.load(cut / "last.pt", weights_only=True)
        at = state["epoch"], (state["within_epoch"] or {"steps": 0})["steps"]
        assert at == divmod(8 - back, 4)
        assert trainer(*words, "--experiment", cut.name, "--resume")[0] == 0
        assert lines(whole) == lines(cut)
        weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, cut)]
        assert weights[0] == weights[1]


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.check)])
@pytest.mark.parametrize(
    ("data", "flags"),
    [
        ("digits", ["--sched", "cosine", "--clip-grad", "1"]),
        ("digits", ["--grad-accum", "2", *EMA]),
        ("digits", ["--mixup", "0.4", "--cutmix", "1", "--micro-batch", "6"]),
        ("photographs", ["--augment", "--workers", "1", *EMA]),
    ],
)
def test_killed_at_any_step(start, trainer, small, photographs, tmp_path, data, flags, kills):
    """Killed by SIGKILL at a random time, resumed, killed again; the end is that of a whole run."""
    words = ["teacher", *small, "--epoch-steps", 40, "--epochs", (epochs := 2 + 2 * kills), *flags]
    words += [*photographs, "--batch-size", 2] if data == "photographs" else []
    assert trainer(*words, "--experiment", "whole")[0] == 0
    words += ["--checkpoint-steps", 3, "--experiment", "cut"]
    whole, cut = (tmp_path / "runs" / name for name in ("whole", "cut"))
    last, reached = cut / "last.pt", []
    for kill in range(kills):
        before = last.stat().st_mtime_ns if kill else 0
        process = start(*words, *(["--resume"] if kill else []))
        wait_for(process, lambda t=before: last.is_file() and last.stat().st_mtime_ns > t)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        state = torch.load(last, weights_only=True)
        reached.append((state["epoch"], (state["within_epoch"] or {"steps": 0})["steps"]))
    assert reached == sorted(reached)
    assert (0, 0) <= reached[-1] < (epochs, 0)
    status, _, err = trainer(*words, "--resume")
    assert (status, err) == (0, ""), reached
    assert lines(whole) == lines(cut), reached
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, cut)]
    assert weights[0] == weights[1], reached
    assert not [p for p in cut.iterdir() if p.name.endswith(".tmp")]


def test_ctrl_c_within_an_epoch(start, trainer, small, tmp_path):
    folder = tmp_path / "runs" / "x"
    words = ["teacher", *small, "--epoch-steps", 100000, "--checkpoint-steps", 5]
    process = start(*words, "--experiment", "x")
    wait_for(process, lambda: (folder / "last-1.pt").is_file())
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # impatient: it is told all the same
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    within = torch.load(folder / "last.pt", weights_only=True)["within_epoch"]
    assert err == (
        f"fastjac: interrupted; {folder / 'last.pt'} holds step {within['steps']} of epoch 1 of 2, "
        "--resume goes on from there\n"
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--augment"],
        ["--augment", "--workers", "1"],
        ["--augment", "--amp", "--amp-dtype", "float16"],
        ["--opt", "sgd", "--sched", "multistep", "--decay-milestones", "1"],
    ],
)
def test_resumed_with_more_epochs(trainer, small, photographs, tmp_path, flags):
    """Augmentation, loaders, the scaler and the schedule go on as if nothing had been."""
    words = ["teacher", *small, *photographs, "--batch-size", 2, *flags]
    assert trainer(*words, "--epochs", 3, "--experiment", "whole")[0] == 0
    assert trainer(*words, "--epochs", 2, "--experiment", "cut")[0] == 0
    assert trainer(*words, "--epochs", 3, "--experiment", "cut", "--resume")[0] == 0
    whole, cut = (tmp_path / "runs" / name for name in ("whole", "cut"))
    assert lines(whole) == lines(cut)
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()


def test_a_lock_of_a_run_that_ends_meanwhile(tmp_path, monkeypatch):
    """The file that was locked is gone: what others would lock is another."""
    lockf, path = fcntl.lockf, tmp_path / "x" / ".lock"

    def lock(file, how):
        monkeypatch.undo()
        path.unlink()
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", lock)
    folder = RunFolder(tmp_path, "x")
    folder.lock()
    assert os.path.samestat(os.fstat(folder._lock), path.stat())
    folder.close()
    assert not path.exists()


def test_one_process_trains_in_a_folder(start, trainer, small, tmp_path):
    folder, words = tmp_path / "runs" / "x", ["teacher", *small, "--experiment", "x"]
    process = start(*words, "--epochs", 4000)
    wait_for_epoch(folder, 1, process)
    said = (
        f"fastjac: another process trains in {folder}; wait for its end, or name another folder by "
    )
    status, _, err = trainer(*words, "--epochs", 5000, "--resume")
    assert (status, err) == (2, said + "--experiment\n")
    process.kill()
    process.wait()
    reached = len(lines(folder))
    assert trainer(*words, "--epochs", reached + 1, "--resume")[0] == 0


def test_resume_of_another_command(trainer, small, teacher, tmp_path):
    assert trainer("student", *small, "--experiment", "x")[0] == 0
    status, _, err = trainer("teacher", *small, "--experiment", "x", "--epochs", 3, "--resume")
    last = tmp_path / "runs" / "x" / "last.pt"
    assert (status, err) == (
        2,
        f"fastjac: {last} is of a student, this is a teacher; --experiment names another folder\n",
    )


def test_a_teacher_without_a_term(trainer, small, teacher, caplog):
    assert trainer("student", *small, "--teacher", teacher)[0] == 0
    assert "--teacher is not used: the weights of its terms are all 0" in caplog.text


def test_resume_refuses_what_is_not_the_same_run(trainer, small, tmp_path):
    folder = tmp_path / "runs" / "x"
    status, _, err = trainer("teacher", *small, "--experiment", "x", "--resume")
    assert (status, err) == (2, f"fastjac: nothing to resume: {folder / 'last.pt'} is missing\n")
    assert not folder.exists()
    trainer("teacher", *small, "--experiment", "x")
    before = (folder / "last.pt").read_bytes()
    for flags, message in (
        ([], f"{folder} holds a run: --resume goes on with it, --experiment names another"),
        (["--resume", "--plan", "4 M"], "last.pt is of another model: plan (was 4 M 8 M, now 4 M)"),
        (
            ["--resume", "--lr", 1],
            "last.pt is of a run with other options: --lr (was 0.01, now 1.0)",
        ),
    ):
        status, _, err = trainer("teacher", *small, "--experiment", "x", *flags)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
    assert (folder / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("runs/t", "runs/t", True),
        ("runs/t", "/elsewhere/runs/t", True),
        ("/a/runs/t/model.safetensors", "b/t/model.safetensors", True),
        ("runs/t", "runs/u", False),
        ("runs/t", "other/t", False),
        ("runs/t", None, False),
        ("torchvision/resnet18", "/a/torchvision/resnet18", False),
    ],
)
def test_a_teacher_that_has_moved(monkeypatch, tmp_path, caplog, before, now, same):
    """With the folder that it is in: by its name and that folder's; another is another run."""
    notice.cache_clear()
    monkeypatch.chdir(tmp_path)
    runs = [asdict(StudentOptions(kd=1, teacher=teacher)) for teacher in (before, now)]
    found, other = changed(*runs), [f"--teacher (was {before}, now {now})"]
    assert found == ([] if same else other)
    said = [f"fastjac: --teacher {now} is taken for {before}, which the run began with"]
    assert caplog.messages == (said if same and before != now else [])
    if not os.path.isabs(before):
        os.makedirs(before)  # it has not moved
        assert changed(*runs) == ([] if before == now else other)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_resumed_where_no_epoch_is_left(trainer, small, tmp_path, caplog, epochs):
    """Stopped after epoch 3, before any evaluation: evaluated, exported, and nothing else changes."""
    words = ["teacher", *small, "--experiment", "x", "--val-interval", 5]
    folder = tmp_path / "runs" / "x"
    stopped = prepare(
        parse(
            "teacher",
            TeacherOptions,
            [*map(str, words[1:]), "--epochs", "9", "--output", str(tmp_path / "runs")],
        )
    )
    stopped.folder.open({"epochs": 9})
    with stopped._bar(False) as bar:
        for _ in range(3):
            stopped._epoch(bar)
    before = torch.load(folder / "last.pt", weights_only=True)
    (folder / "args.yaml").write_bytes(b"a: [\xff")  # and what was damaged is made anew
    (folder / "metrics.jsonl").unlink()
    status, out, err = trainer(*words, "--epochs", epochs, "--resume")
    assert (status, err) == (0, "")
    assert (
        f"nothing to train: {folder / 'last.pt'} holds epoch 3, --epochs is {epochs}" in caplog.text
    )
    assert "test images right after 3 epochs" in out
    trained = load_trained(folder)
    assert trained.source == folder / "model.safetensors"
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, before["model"][name])
    assert ["test_accuracy" in line for line in lines(folder)] == [False, False, True]
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert (args["epochs"], args["plan"]) == (3, "4 M 8 M")
    after = torch.load(folder / "last.pt", weights_only=True)
    assert after["best"] == lines(folder)[-1]["test_accuracy"]
    assert (folder / "best.pt").is_file()
    assert trainer(*words, "--epochs", epochs, "--resume")[:2] == (0, out)
    assert trainer(*words, "--epochs", 4, "--resume")[0] == 0
    assert len(lines(folder)) == 4


@pytest.mark.parametrize("interval", [1, 5])
def test_resumed_in_an_epoch_that_is_no_longer_wanted(
    start, trainer, small, tmp_path, caplog, interval
):
    """What is exported is what is scored; the checkpoint stays within its epoch."""
    words = ["teacher", *small, "--epoch-steps", 200, "--checkpoint-steps", 1, "--experiment", "x"]
    words += ["--val-interval", interval]
    last = tmp_path / "runs" / "x" / "last.pt"
    process, state = start(*words, "--epochs", 90), {"epoch": 0}
    while state["epoch"] < 2 or state["within_epoch"] is None:
        with contextlib.suppress(Exception):  # not yet there, or replaced
            state = torch.load(last, weights_only=True)
        assert process.poll() is None
    process.kill()
    process.wait()
    before = torch.load(last, weights_only=True)
    epoch, step = before["epoch"], before["within_epoch"]["steps"]
    status, out, err = trainer(*words, "--epochs", 1, "--resume")
    assert (status, err) == (0, "")
    assert f"{last} holds step {step} of epoch {epoch + 1}, --epochs is 1" in caplog.text
    for name, value in load_trained(last.parent).model.state_dict().items():
        assert torch.equal(value, before["model"][name])
    assert trainer("evaluate", last.parent)[1].split()[0] == out.split()[0]
    after = torch.load(last, weights_only=True)
    assert (after["history"], after["within_epoch"]) == (before["history"], before["within_epoch"])


def test_a_finished_run_that_goes_on_and_is_killed(start, trainer, small, tmp_path, caplog):
    """It is no longer finished, and the network of its folder is that of the last epoch."""
    words = ["teacher", *small, "--experiment", "x"]
    folder = tmp_path / "runs" / "x"
    trainer(*words)
    process = start(*words, "--epochs", 90, "--resume")
    while len(lines(folder)) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder / "config.json").exists()
    assert load_trained(folder).source == folder / "last.pt"
    assert f"{folder} is not finished: its last checkpoint is taken" in caplog.text
    score = torch.load(folder / "last.pt", weights_only=True)["history"][-1]["test_accuracy"]
    assert trainer("evaluate", folder)[1].startswith(f"{100 * score:.2f} % of 500 test images")
    done = len(lines(folder))
    assert trainer(*words, "--epochs", done, "--resume")[0] == 0
    assert load_trained(folder).source == folder / "model.safetensors"


CTRL_C_IN_A_CALLBACK = """
import os, signal, time, weakref
from fastjac.train.__main__ import _watch_ctrl_c

def press(_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)

_watch_ctrl_c()
images = {1, 2}
alive = weakref.ref(images, press)
del images
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_within_a_callback():
    """Python drops what a weak reference's callback raises."""
    command = [sys.executable, "-c", CTRL_C_IN_A_CALLBACK]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=50,
        # Of what a shell runs in the background, children inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_ctrl_c_while_processes_start():
    """It comes when they have, and never to them, whatever else runs in this process."""
    elsewhere = threading.Thread(target=time.sleep, args=(0.5,))  # a thread that may take it
    elsewhere.start()
    found = []
    # A process that a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def begin():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        command = ["cat", "/proc/self/status"]
        found.append(subprocess.run(command, capture_output=True, text=True).stdout)

    try:
        with pytest.raises(KeyboardInterrupt), interrupts.put_off():
            begin()
    finally:
        elsewhere.join()
        after = signal.signal(signal.SIGINT, before)
    blocked = int(found[0].partition("SigBlk:")[2].split()[0], 16)
    assert blocked & 1 << signal.SIGINT - 1
    assert after is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_loader_that_is_killed(trainer, small, photographs, tmp_path, monkeypatch):
    """As by a system that is out of memory: one line that says so, and what is saved."""
    test = os.getpid()

    def end(self, keys):
        assert os.getpid() != test
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("fastjac.train.batches.SeededImages.__getitems__", end)
    words = ["teacher", *small, *photographs, "--batch-size", 2]
    status, out, err = trainer(*words, "--workers", 1, "--experiment", "x")
    assert (status, out, err.count("\n")) == (1, "", 1)
    said = "fastjac: a process that loads images has ended; fewer --workers take less memory: "
    assert err.startswith(said)
    last = tmp_path / "runs" / "x" / "last.pt"
    assert err.endswith(f"; {last} holds epoch 0 of 2, --resume goes on from there\n")
