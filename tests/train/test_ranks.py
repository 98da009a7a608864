"""Training by several real processes, which torchrun starts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastjac.train import ranks

dist = torch.distributed
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)


@pytest.fixture
def torchrun(tmp_path):
    """Starts ranks, of ``-m fastjac.train`` or of a script; what still runs at the end is ended."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    processes = []

    def begin(count, *words, program=("-m", "fastjac.train"), output=tmp_path / "runs"):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", count, *program, *words]
        command += ["--output", output] if words[0] != "evaluate" else []
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.terminate()
        process.communicate()


def ours(err):
    """What fastjac itself says, and not torchrun."""
    return [line for line in err.splitlines() if line.startswith("fastjac:")]


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert ours(err) == []
    return out


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_alike(folder, other):
    """The same run, but for float32's rounding: sums over ranks are taken in another order."""
    weights, expected = (load_file(f / "model.safetensors") for f in (folder, other))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            weights[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert len(lines(folder)) == len(lines(other))
    for row, wanted in zip(lines(folder), lines(other), strict=True):
        assert row.keys() == wanted.keys()
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(wanted[name], rel=1e-4), name


@pytest.fixture
def student(small, teacher):
    words = ["student", *small, "--batch-size", 8, "--teacher", teacher, "--jacobians", 0.3]
    return [*words, "--samples-per-class", 4, "--opt", "sgd", "--sync-bn"]


def test_two_ranks_train_what_one_process_trains(torchrun, trainer, student, tmp_path):
    words = [*student, "--batch-stats", "batch", "--grad-accum", 2, "--checkpoint-steps", 3]
    out = finish(torchrun(2, *words, "--experiment", "two"))
    assert trainer(*words, "--experiment", "one")[:2] == (0, out.replace("runs/two", "runs/one"))
    two, one = tmp_path / "runs" / "two", tmp_path / "runs" / "one"
    assert_alike(two, one)
    assert {f.name for f in two.iterdir()} == {f.name for f in one.iterdir()}
    assert (two / "subset.json").read_bytes() == (one / "subset.json").read_bytes()
    scored = finish(torchrun(2, "evaluate", one))
    assert trainer("evaluate", one)[:2] == (0, scored)


def test_images_without_labels_over_two_ranks(torchrun, trainer, student, tmp_path):
    """An unlabelled image counts once, on whichever rank; the two may hold different numbers of them."""
    (tmp_path / "more").mkdir()
    # The same ones each time: of some images, rounding turns a ReLU's gate, and the weights part.
    random = numpy.random.default_rng(0)
    for i in range(30):
        pixels = random.normal(128, 60, (16, 16)).clip(0, 255).astype(numpy.uint8)
        Image.fromarray(pixels).save(tmp_path / "more" / f"{i}.png")
    words = [*student, "--unlabelled", tmp_path / "more", "--epochs", 2]
    finish(torchrun(2, *words, "--experiment", "two"))
    assert trainer(*words, "--experiment", "one")[0] == 0
    assert_alike(tmp_path / "runs" / "two", tmp_path / "runs" / "one")


@pytest.mark.parametrize(("size", "processes"), [(12, 2), (12, 3), (6, 2), (4, 4)])
def test_a_batch_is_shared_out_with_its_mirrored_pairs(monkeypatch, size, processes):
    """--mixup mixes the images i and size - 1 - i, which an even share keeps, in places like these."""
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "count", lambda: processes)
        shares.append(ranks.share_of(list(range(size))))
    assert sorted(image for share in shares for image in share) == list(range(size))
    for share in shares:
        assert len(share) == size // processes
        if len(share) % 2 == 0:
            assert [size - 1 - i for i in share] == share[::-1]


def test_a_batch_that_the_ranks_do_not_divide(monkeypatch, trainer, small):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    assert trainer("teacher", *small)[::2] == (
        2,
        "fastjac: 3 processes cannot share a batch of 10 images evenly; expected a --batch-size that is "
        "a multiple of 3, and as many images\n",
    )


def ranks_of(launcher):
    """The processes that torchrun has started, by their rank."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            if entry.startswith("RANK="):
                found[int(entry[5:])] = int(pid)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads Linux's /proc")
def test_killed_and_resumed_by_as_many_and_by_one(torchrun, trainer, student, tmp_path):
    words = [*student, "--epochs", 300, "--checkpoint-steps", 1]
    folder = tmp_path / "runs" / "cut"
    # Torchrun ends the other process while it still reads what is saved, as on a slow disk.
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, time\n"
        "from fastjac.train import loop\n"
        "from fastjac.train.__main__ import main\n"
        "read = loop.position\n"
        "loop.position = lambda folder: (time.sleep(2), read(folder))[1]\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    process = torchrun(2, *words, "--experiment", "cut", program=[script])
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").is_file() or len(lines(folder)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    (line,) = ours(err)
    assert line.startswith(
        f"fastjac: another process of the run has ended; {folder}/last.pt holds "
    )
    assert line.endswith(" of 300, --resume goes on from there")
    epochs = torch.load(folder / "last.pt", weights_only=True)["epoch"] + 2
    words += ["--epochs", epochs]
    shutil.copytree(folder, tmp_path / "runs" / "cut-one")
    finish(torchrun(2, *words, "--experiment", "cut", "--resume"))
    assert trainer(*words, "--experiment", "cut-one", "--resume")[0] == 0
    assert trainer(*words, "--experiment", "whole")[0] == 0
    assert_alike(folder, tmp_path / "runs" / "whole")
    assert_alike(tmp_path / "runs" / "cut-one", tmp_path / "runs" / "whole")


@pytest.fixture
def photographs(tmp_path):
    """Two folders of images, of one of which a label differs."""
    for rank in range(2):
        for k, name in enumerate(["train/a", "train/b", "val/a", "val/b"]):
            folder = tmp_path / f"images{rank}" / name
            folder.mkdir(parents=True)
            for i in range(4 + (rank == 1 and k == 1)):
                Image.new("RGB", (16, 16), (40 * k, 9 * i, 0)).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_ranks_that_have_other_data(torchrun, small, photographs, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        "from fastjac.train.__main__ import main\n"
        f"sys.exit(main([*sys.argv[1:], '--data-dir', '{photographs}' + os.environ['RANK']]))\n"
    )
    words = ["teacher", *small, "--batch-size", 4, "--dataset", "folder", "--img-size", 16]
    process = torchrun(2, *words, "--experiment", "x", program=[script])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert ours(err) == [
        "fastjac: process 1 has other labels than process 0; expected the same on all"
    ]
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_the_first_rank_cannot_make(torchrun, small, tmp_path):
    (tmp_path / "file").touch()
    process = torchrun(2, "teacher", *small, "--experiment", "x", output=tmp_path / "file")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert ours(err) == [f"fastjac: {tmp_path}/file/x cannot be made: Not a directory"]


@pytest.fixture
def first_of_two(monkeypatch):
    """This process is started as one of two, but alone."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
        for name, value in (env | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, str(value))
        handler = signal.getsignal(signal.SIGTERM)
        yield port
        signal.signal(signal.SIGTERM, handler)


def test_a_port_in_use(first_of_two, trainer, small):
    status, out, err = trainer("teacher", *small)
    assert (status, out) == (2, "")
    assert "".join(ours(err)).startswith(
        f"fastjac: the processes cannot meet at localhost:{first_of_two}: "
    )


@pytest.mark.parametrize(
    ("count", "rank"), [("abc", "0"), ("", "0"), ("2", ""), ("2", "x"), ("2", "2"), ("-3", "0")]
)
def test_an_environment_that_torchrun_does_not_make(monkeypatch, trainer, small, count, rank):
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setenv("RANK", rank)
    status, out, err = trainer("teacher", *small)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"the environment has WORLD_SIZE='{count}', RANK='{rank}'; expected a RANK below" in err


@pytest.mark.parametrize("command", ["table", "demo"])
def test_a_table_is_not_for_ranks(first_of_two, trainer, command):
    status, _, err = trainer(command)
    assert status == 2
    assert ours(err) == [
        f"fastjac: {command} does not run under torchrun: its runs are independent; expected --jobs, "
        "and on several machines the same command on each, with one --output that they share"
    ]


def test_a_device_of_another_rank(first_of_two, trainer, small):
    status, _, err = trainer("teacher", *small, "--device", "cuda:1")
    assert status == 2
    assert ours(err) == ["fastjac: --device cuda:1: each process takes its own GPU; expected cuda"]
