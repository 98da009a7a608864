"""The files of a run: none is half a file, the last few are kept, a full disk takes none away."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastjac.errors import TrainingFailed, notice
from fastjac.models.weights import read_checkpoint
from fastjac.train.checkpoint import _load_optimizer
from fastjac.train.files import CannotWrite, RunFolder, replacing, write_text
from fastjac.train.tally import Tally


@pytest.fixture
def folder(tmp_path):
    """A folder with checkpoints of the epochs 1 to 4, of which three are kept."""
    folder = RunFolder(tmp_path, "x")
    folder.open({})
    for epoch in (1, 2, 3, 4):
        folder.save_state({"epoch": epoch, "history": []}, best=epoch == 2, keep=3)
    return folder


def epochs(folder):
    """By file."""
    return {path.name: read_checkpoint(path)["epoch"] for path in folder.path.glob("*.pt")}


def test_the_last_ones_are_kept(folder):
    assert epochs(folder) == {"last.pt": 4, "last-1.pt": 3, "last-2.pt": 2, "best.pt": 2}
    names = [path.name for path in folder.checkpoints()]
    assert names == ["last.pt", "last-1.pt", "last-2.pt"]
    folder.save_state({"epoch": 5, "history": []}, best=False, keep=2)
    assert epochs(folder) == {"last.pt": 5, "last-1.pt": 4, "best.pt": 2}
    folder.save_state({"epoch": 6, "history": []}, best=False, keep=1)
    assert epochs(folder) == {"last.pt": 6, "best.pt": 2}


def test_keeping_many_takes_no_longer(folder):
    started = time.perf_counter()
    folder.save_state({"epoch": 5, "history": []}, best=False, keep=10**12)
    assert time.perf_counter() - started < 5
    assert epochs(folder)["last-3.pt"] == 2


def test_kept_without_hard_links(folder, monkeypatch):
    def refused(*args):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refused)
    folder.save_state({"epoch": 5, "history": []}, best=False, keep=3)
    assert epochs(folder) == {"last.pt": 5, "last-1.pt": 4, "last-2.pt": 3, "best.pt": 2}


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (done.append(os.fstat(n).st_ino), sync(n)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("moved"), replace(a, b)))
    write_text(tmp_path / "a", "text")
    assert done == [(tmp_path / "a").stat().st_ino, "moved", tmp_path.stat().st_ino]


def test_what_fails_leaves_the_file_before_it(tmp_path):
    write_text(tmp_path / "a", "before")
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "a")
    with pytest.raises(TrainingFailed, match=r"a cannot be written: No space left on device$"):
        write_half(tmp_path / "a", "/dev/full")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_folder_in_the_place_of_a_draft(tmp_path):
    (tmp_path / ".a.tmp").mkdir()
    with pytest.raises(TrainingFailed, match=r"a cannot be written: Is a directory$"):
        write_text(tmp_path / "a", "text")


def write_half(path, full=None):
    """Fail half-way, by a bug or by a device that has no space, ever."""
    with replacing(path) as draft:
        draft.write_text("half")
        if full is None:
            raise ZeroDivisionError
        with open(full, "w") as file:
            file.write("x")


@pytest.fixture
def run(trainer, small, tmp_path):
    """Runs an experiment of 3 epochs or what the flags say; its metrics, less the seconds."""
    notice.cache_clear()

    def begin(name, *flags):
        words = ["teacher", *small, "--epochs", 3, "--experiment", name, *flags]
        status, _, err = trainer(*words)
        assert (status, err) == (0, "")
        return metrics(tmp_path / "runs" / name)

    return begin


def metrics(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("share", [0, 0.3, 0.99, None])
def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, caplog, share):
    """Cut off at some place, or missing."""
    whole = run("whole")
    run("x", "--epochs", 2)
    folder = tmp_path / "runs" / "x"
    content = (folder / "last.pt").read_bytes()
    if share is None:
        (folder / "last.pt").unlink()
    else:
        (folder / "last.pt").write_bytes(content[: int(share * len(content))])
    caplog.clear()
    assert run("x", "--resume") == whole
    assert [r.message for r in caplog.records] == [caplog.records[0].message]
    assert caplog.messages[0].startswith(f"fastjac: {folder / 'last.pt'} is ")
    assert caplog.messages[0].endswith("; last-1.pt, the one before it, is used")
    assert epochs(RunFolder(tmp_path / "runs", "x"))["last.pt"] == 3


def test_what_is_held_is_what_can_be_read(trainer, small, run, tmp_path, monkeypatch):
    """Where a run that goes on from an older checkpoint ends at once."""
    run("x", "--epochs", 2)
    folder = tmp_path / "runs" / "x"
    for content in (b"", b"PK\3\4", (folder / "last.pt").read_bytes()[:200], None):
        if content is None:
            torch.save([1], folder / "last.pt")
        else:
            (folder / "last.pt").write_bytes(content)

        def full(*args):
            raise CannotWrite("no space")

        monkeypatch.setattr(RunFolder, "open", full)
        words = ["teacher", *small, "--epochs", 3, "--experiment", "x", "--resume"]
        said = f"fastjac: no space; {folder / 'last-1.pt'} holds epoch 1\n"
        assert trainer(*words) == (1, "", said)


def test_a_flipped_bit_is_found(run, tmp_path, caplog):
    whole = run("whole")
    run("x", "--epochs", 2)
    last = tmp_path / "runs" / "x" / "last.pt"
    content = bytearray(last.read_bytes())
    weight = torch.load(last, weights_only=True)["model"]["conv2.weight"].numpy().tobytes()
    content[content.index(weight) + 5] ^= 16
    last.write_bytes(content)
    assert run("x", "--resume") == whole
    assert "last.pt is damaged: the checksum of " in caplog.text


def without(key):
    return lambda part: part.pop(key)


def with_value(key, value):
    return lambda part: part.update({key: value})


@pytest.mark.parametrize(
    ("where", "edit", "problem"),
    [
        *(((), without(k), f"it has no {k!r}") for k in ("about", "options", "model", "optimizer")),
        *(((), without(k), f"it has no {k!r}") for k in ("scheduler", "scaler", "epoch", "best")),
        *(((), without(k), f"it has no {k!r}") for k in ("history", "rng")),
        *(((), with_value(k, "x"), "is of the type str") for k in ("about", "options", "model")),
        *(((), with_value(k, "x"), "is of the type str") for k in ("optimizer", "epoch", "best")),
        *(((), with_value(k, "x"), "is of the type str") for k in ("history", "rng", "heads")),
        *(((), with_value(k, "x"), "is of the type str") for k in ("micro_batch", "within_epoch")),
        (("scheduler",), with_value("base_lrs", [1, 2]), "its counts of epochs or rates are imp"),
        ((), with_value("epoch", 1), "its history is not of the epochs 1 to 1"),
        ((), with_value("within_epoch", {"steps": 2}), "it has no 'lr'"),
        (("about",), without("spec"), "it has no 'spec'"),
        (("model",), without("conv1.weight"), "holds another model"),
        (("scheduler",), without("last_epoch"), "it has no 'last_epoch'"),
        (("optimizer", "state", 0), without("exp_avg"), "is damaged: there is no 'exp_avg'"),
        (
            ("optimizer", "state", 0),
            with_value("exp_avg", None),
            "exp_avg of the optimizer is no t",
        ),
        (("optimizer", "param_groups", 0), without("lr"), "is damaged: there is no 'lr'"),
        (("rng",), without("order"), "is damaged: there is no 'order'"),
        (("rng",), with_value("torch", torch.zeros(3)), "is damaged: RNG state must be"),
    ],
)
def test_an_edited_checkpoint_is_passed_over(
    trainer, run, tmp_path, small, caplog, where, edit, problem
):
    """It is a file that can be read, of a run of these options, but for one thing in it."""
    whole = run("whole")
    run("x", "--epochs", 2)
    last = tmp_path / "runs" / "x" / "last.pt"
    state = torch.load(last, weights_only=True)
    part = state
    for key in where:
        part = part[key]
    edit(part)
    torch.save(state, last)
    alone = tmp_path / "runs" / "alone"
    alone.mkdir()
    shutil.copy(last, alone)
    caplog.clear()
    assert run("x", "--resume") == whole
    (said,) = caplog.messages
    assert said.startswith(f"fastjac: {last} ")
    assert problem in said
    assert said.endswith("; last-1.pt, the one before it, is used")
    status, _, err = trainer("teacher", *small, "--epochs", 3, "--experiment", "alone", "--resume")
    assert (status, err.count("\n")) == (2, 1)
    assert problem in err
    assert [path.name for path in alone.iterdir()] == ["last.pt"]


def test_the_state_of_an_optimizer():
    """Its settings are the run's, whatever the file says; what no step can take is an error."""
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([weight], 0.1, betas=(0.8, 0.9))
    weight.grad = torch.ones(2)
    adam.step()
    state = adam.state_dict()
    state["param_groups"][0] |= {"betas": 3, "eps": None, "maximize": True, "lr": 0.05}
    _load_optimizer(adam, state)
    (group,) = adam.param_groups
    assert [group[k] for k in ("betas", "eps", "maximize", "lr")] == [(0.8, 0.9), 1e-8, False, 0.05]
    for key, value, part, message in (
        ("lr", "x", state["param_groups"][0], "the learning rate is 'x'"),
        ("step", torch.tensor(-5.0), state["state"][0], "step of the optimizer is no count"),
    ):
        before = part[key]
        part[key] = value
        with pytest.raises((TypeError, ValueError), match=message):
            _load_optimizer(adam, state)
        part[key] = before


def test_sums_of_an_epoch_that_are_no_numbers():
    tally = Tally(torch.device("cpu"))
    state = tally.state_dict() | {"sums": {"loss": torch.tensor(1.0)}}
    tally.load_state_dict(state)
    for part in ({"correct": torch.ones(2)}, {"sums": {"loss": torch.ones(1)}}):
        with pytest.raises(ValueError, match="a sum of the epoch's metrics is no single number"):
            tally.load_state_dict(state | part)


def test_memory_that_runs_out_is_no_damage(trainer, small, run, tmp_path, monkeypatch):
    """The newest checkpoint stays: an older one would take its place."""
    run("x", "--epochs", 2)
    folder = tmp_path / "runs" / "x"
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}

    def full(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("fastjac.train.checkpoint.set_states", full)
    words = ["teacher", *small, "--epochs", 3, "--experiment", "x", "--resume"]
    assert trainer(*words) == (1, "", "fastjac: out of memory: no room\n")
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == before


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "config.json", ".last.pt.tmp", "last-1.pt"])
def test_a_folder_in_the_place_of_a_file(trainer, small, tmp_path, name):
    place = tmp_path / "runs" / "x" / name
    place.mkdir(parents=True)
    for flags in ([], ["--resume"]):
        status, _, err = trainer("teacher", *small, "--experiment", "x", *flags)
        assert (status, err) == (2, f"fastjac: {place} is a folder; expected a file or nothing\n")
    assert [path.name for path in place.parent.iterdir()] == [name]


def test_no_checkpoint_can_be_read(trainer, small, run, tmp_path):
    run("x", "--epochs", 1)
    folder = tmp_path / "runs" / "x"
    for path in (folder / "last.pt", folder / "last-1.pt"):
        path.write_bytes(path.read_bytes()[:100])
    status, _, err = trainer("teacher", *small, "--experiment", "x", "--resume")
    assert status == 2
    assert "last-1.pt is not a readable PyTorch file" in err
    assert err.count("\n") == 1
    status, _, err = trainer("teacher", *small, "--experiment", "x")
    assert "holds a run: --resume goes on with it" in err


def test_a_finished_run_without_checkpoints_is_not_overwritten(trainer, small, run, tmp_path):
    """They are the largest files, and may have been removed."""
    run("x")
    folder = tmp_path / "runs" / "x"
    for path in folder.glob("*.pt"):
        path.unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status, _, err = trainer("teacher", *small, "--experiment", "x")
    said = f"fastjac: {folder} holds a finished run; --experiment names another folder\n"
    assert (status, err) == (2, said)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_teacher_is_known_by_its_weights(trainer, small, teacher, tmp_path):
    """The same one may be elsewhere under any name; another one at its place is another run."""
    old, new = tmp_path / "t", tmp_path / "other" / "name"
    shutil.copytree(teacher, old)
    words = ["student", *small, "--kd", 1, "--experiment", "x"]
    assert trainer(*words, "--teacher", old, "--epochs", 1)[0] == 0
    shutil.copytree(old, new)
    shutil.rmtree(old)
    assert trainer(*words, "--teacher", new, "--resume")[0] == 0
    weights = load_file(new / "model.safetensors")
    save_file(weights | {"fc.bias": weights["fc.bias"] + 1}, new / "model.safetensors")
    status, _, err = trainer(*words, "--teacher", new, "--resume", "--epochs", 3)
    assert status == 2
    assert f"last.pt is of a run with another teacher: the weights of {new} are not those" in err


def test_a_run_of_an_older_version_goes_on(run, tmp_path):
    """Without the options and the parts of a checkpoint that are newer."""
    whole = run("whole")
    run("x", "--epochs", 2)
    last = tmp_path / "runs" / "x" / "last.pt"
    state = torch.load(last, weights_only=True)
    for name in ("grad_accum", "clip_grad", "mixup", "cutmix", "label_smoothing", "model_ema"):
        del state["options"][name]
    for name in ("warmup_epochs", "warmup_lr", "model_ema_decay", "micro_batch"):
        del state["options"][name]
    del state["micro_batch"], state["within_epoch"]
    torch.save(state, last)
    assert run("x", "--resume") == whole


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB, where the system lets one mount it."""
    disk = tmp_path / "runs"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk):
    """Leave no space on it."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def ended(process):
    """The line of a process that fails, with status 1."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1), err
    return err


def test_a_full_disk(start, trainer, small, small_disk, tmp_path):
    """It fills while a process trains: what is saved stays, and the run goes on when there is room."""
    words = ["teacher", *small, "--experiment", "x"]
    process = start(*words, "--epochs", 100000)
    last = small_disk / "x" / "last.pt"
    while process.poll() is None and not (small_disk / "x" / "last-1.pt").is_file():
        pass
    fill(small_disk)
    err = ended(process)
    state = torch.load(last, weights_only=True)
    assert "cannot be written: No space left on device; " in err
    assert err.startswith(f"fastjac: {small_disk / 'x'}/")
    assert err.endswith(f"; {last} holds epoch {state['epoch']}\n")
    assert torch.load(last.with_name("last-1.pt"), weights_only=True)["epoch"] < state["epoch"]
    (small_disk / "filler").unlink()
    words += ["--epochs", state["epoch"] + 1]
    assert trainer(*words, "--resume")[0] == 0
    assert trainer(*words, output=tmp_path / "other")[0] == 0
    assert metrics(small_disk / "x") == metrics(tmp_path / "other" / "x")


def test_a_file_that_may_not_be_as_large(run, small, tmp_path):
    """As by a quota: the system refuses to write on where half of a checkpoint is written."""
    whole = run("whole")
    run("x", "--epochs", 2)
    folder = tmp_path / "runs" / "x"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    size = (folder / "last.pt").stat().st_size
    words = ["teacher", *small, "--experiment", "x", "--epochs", 3, "--resume"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastjac.train", *map(str, words), "--output", tmp_path / "runs"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size)),
    )
    err = ended(process)
    assert "pt cannot be written: File too large; " in err
    assert err.endswith(f"; {folder / 'last.pt'} holds epoch 2\n")
    checkpoints = [path for path in before if path.suffix in (".pt", ".safetensors")]
    assert {path: path.read_bytes() for path in checkpoints} == {
        path: before[path] for path in checkpoints
    }
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    assert run("x", "--resume") == whole
