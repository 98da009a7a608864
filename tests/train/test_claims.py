"""Runs that several processes would train: each has one that does."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fastjac.errors import FastjacError
from fastjac.train import claims
from fastjac.train.claims import claim, claim_in_turn


def test_one_has_it_and_gives_it_back(tmp_path):
    folder = tmp_path / "students" / "a"
    with claim(folder) as mine, claim(folder) as second, claim(folder.with_name("b")) as other:
        assert (mine, second, other) == (True, False, True)
        about = json.loads((tmp_path / "students" / "a.claim").read_text())
        assert about["pid"] == os.getpid()
    assert list((tmp_path / "students").iterdir()) == []
    with pytest.raises(KeyError), claim(folder):
        raise KeyError
    with claim(folder) as mine:
        assert mine


def killed_holder(folder):
    """The claim of a process that was killed while it had it."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fastjac.train.claims import claim\n"
        "with claim(Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, folder]).returncode == -9
    return folder.with_name(f"{folder.name}.claim")


def test_a_claim_of_a_killed_process_is_taken_over(tmp_path):
    path = killed_holder(tmp_path / "a")
    assert path.is_file()
    with claim(tmp_path / "a") as mine:
        assert mine
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads Linux's /proc")
def test_a_process_of_the_same_number_is_another(tmp_path):
    path = killed_holder(tmp_path / "a")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": os.getppid()}))
    with claim(tmp_path / "a") as mine:
        assert mine


@pytest.mark.parametrize("text", ["", None])
def test_a_claim_that_another_host_has_or_that_is_being_written_stands(tmp_path, text):
    path = killed_holder(tmp_path / "a")
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"host": "x"}) if text is None else ""
    )
    with claim(tmp_path / "a") as mine:
        assert not mine
    assert path.exists()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"host": 3}', b"\xff", 2000 * b"["])
def test_a_claim_that_says_nothing_is_taken_over_in_the_end(tmp_path, text):
    """As of a process that was killed, or whose disk was full, before it wrote who it is."""
    path = tmp_path / "a.claim"
    path.write_bytes(text)
    with claim(tmp_path / "a") as mine:
        assert not mine
    os.utime(path, (0, time.time() - claims.LONG - 1))
    with claim(tmp_path / "a") as mine:
        assert mine
    assert not path.exists()


def test_a_claim_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    def full(file, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(claims.os, "write", full)
    with (
        pytest.raises(FastjacError, match=r"a\.claim cannot be made: No space left on device"),
        claim(tmp_path / "a"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_waited_for_is_said(tmp_path, caplog, monkeypatch):
    path = killed_holder(tmp_path / "a")
    about = json.loads(path.read_text()) | {"host": "elsewhere", "pid": 7, "time": time.time() - 99}
    path.write_text(json.dumps(about))

    def clear(seconds):
        assert seconds == claims.POLL
        path.unlink()

    monkeypatch.setattr(claims.time, "sleep", clear)
    with claim_in_turn(tmp_path / "a"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "waiting for a, which process 7 on elsewhere has had since 20" in caplog.text
    assert f"if that is gone, remove {path}" in caplog.text


def test_a_folder_without_a_name(tmp_path, monkeypatch):
    """As with --output . --experiment . of a table."""
    monkeypatch.chdir(tmp_path)
    with claim(Path()) as mine, claim(Path()) as second:
        assert (mine, second) == (True, False)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    message = "file/a.claim cannot be made: File exists"
    with pytest.raises(FastjacError, match=message), claim(tmp_path / "file" / "a"):
        pass


def test_two_processes_train_each_student_of_a_table_once(start, small, tmp_path):
    words = ["table", *small, "--samples", 1, 2, "--seeds", 0, 1]
    words += ["--methods", "ce", "--jobs", 1, "--experiment", "x"]
    students = tmp_path / "runs" / "x" / "students"
    held = students / "ce-1-seed0"
    with claim(held):
        processes = [start(*words) for _ in range(2)]
        deadline = time.monotonic() + 120
        while len(list(students.glob("*/config.json"))) < 3:
            assert [process.poll() for process in processes] == [None, None]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not held.exists()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0] == outputs[1]
    assert len(list(students.iterdir())) == 4  # and no claim
    for student in students.iterdir():
        assert len((student / "metrics.jsonl").read_text().splitlines()) == 2
        assert yaml.safe_load((student / "args.yaml").read_text())["resume"] is False
    assert list(tmp_path.rglob("*.tmp")) == []
