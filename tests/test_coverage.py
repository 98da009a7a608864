"""``python -m fastjac.coverage``: on real images, in real processes, against distances taken by hand."""

import csv
import errno
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy
import pytest
import torch

from fastjac import errors
from fastjac.coverage import main

pytest.importorskip("sklearn", reason="the images ship with scikit-learn")
pytest.importorskip("torchvision", reason="which reads and resizes them")

from PIL import Image
from scipy.spatial.distance import directed_hausdorff
from sklearn.datasets import load_digits
from torchvision.transforms import v2

from fastjac.models import ModelSpec, create_model
from fastjac.train.files import RunFolder

ROOT = Path(__file__).parents[1]
SIZE = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run's network, and three folders of digits, one of them in 16 bits, with hidden files."""
    place = tmp_path_factory.mktemp("coverage")
    torch.manual_seed(0)
    spec = ModelSpec("vgg", 10, in_channels=1, plan="4 M 8 M", mean=(0.3,), std=(0.4,))
    run = RunFolder(place, "run")
    run.path.mkdir()
    about = {"spec": asdict(spec), "dataset": "digits", "size": SIZE, "classes": list("0123456789")}
    run.save_model(create_model(spec).state_dict(), about)
    digits = load_digits().images
    for name, those in (("source", range(40)), ("near", range(10, 40)), ("far", range(50, 53))):
        for k in those:
            folder = place / name / str(k % 2)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = numpy.kron(digits[k], numpy.ones((3, 3)))
            if name == "near":
                image = Image.fromarray((pixels * 4095).astype("uint16"))
            else:
                image = Image.fromarray((pixels * 15.9375).astype("uint8"))
            image.save(folder / f"{k:03}.png")
    (place / "source" / ".hidden").mkdir()
    (place / "source" / ".hidden" / "x.png").write_bytes(b"no image")
    (place / "source" / "notes.txt").write_text("no image")
    return place


@pytest.fixture
def cover(place, monkeypatch, capfd):
    """Runs the command in ``place``; the status and both outputs."""
    monkeypatch.chdir(place)

    def run(*words):
        capfd.readouterr()
        return main([*map(str, words)]), *capfd.readouterr()

    return run


def features(place, name):
    """By hand: the run's network up to its last layer."""
    from fastjac.train.build import load_trained

    model = load_trained(place / "run").model.eval()
    to_tensor = v2.Compose(
        [v2.ToImage(), v2.Resize(18), v2.CenterCrop(16), v2.ToDtype(torch.float32)]
    )
    rows, paths = [], sorted((place / name).glob("[01]/*.png"))
    with torch.no_grad():
        for path in paths:
            pixels = numpy.asarray(Image.open(path)).astype(float)
            pixels = numpy.round(pixels / (257 if pixels.max() > 255 else 1)).astype("uint8")
            x = to_tensor(Image.fromarray(pixels))[None] / 255
            seen = []
            last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
            handle = last.register_forward_pre_hook(lambda m, args, to=seen: to.append(args[0]))
            model(x)
            handle.remove()
            rows.append(seen[0].flatten())
    return torch.stack(rows).double(), [str(p.relative_to(place)) for p in paths]


def test_candidates_are_ranked(place, cover, caplog):
    errors.notice.cache_clear()  # it speaks once per process
    status, out, err = cover("source", "far", "near", "--network", "run", "--csv", "table.csv")
    assert status == 0, err
    assert "source: 1 hidden files and folders skipped, such as .hidden" in caplog.text
    source, paths = features(place, "source")
    with (place / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["candidate"] for row in rows] == ["near", "far"]
    lines = out.splitlines()
    assert len(lines) == 3
    for row, line in zip(rows, lines[1:], strict=True):
        small, _ = features(place, row["candidate"])
        expected, point, _ = directed_hausdorff(source, small)
        assert float(row["hausdorff"]) == pytest.approx(expected, rel=1e-4)
        assert float(row["mean"]) == pytest.approx(
            torch.cdist(source, small).amin(1).mean().item(), rel=1e-2
        )
        assert row["farthest"] == paths[point]
        assert int(row["images"]) == len(small)
        assert line.split()[0] == f"{float(row['hausdorff']):.5g}"
        assert f"{row['candidate']} ({row['farthest']})" in line


def test_picks_bring_the_distance_down(place, cover):
    status, out, err = cover("source", "far", "--network", "run", "--pick", 5, "--csv", "picks.csv")
    assert status == 0, err
    picks = out.splitlines()
    source, paths = features(place, "source")
    have, _ = features(place, "far")
    with (place / "picks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == picks
    assert len(set(picks)) == 5
    for pick, row in zip(picks, rows, strict=True):
        assert paths.index(pick) == directed_hausdorff(source, have)[1]
        have = torch.cat([have, source[[paths.index(pick)]]])
        assert float(row["hausdorff"]) == pytest.approx(
            directed_hausdorff(source, have)[0], rel=1e-4
        )
    assert f"to {float(rows[-1]['hausdorff']):.6g}" in err


def test_all_may_be_picked_from_nothing(cover):
    status, out, err = cover("source", "--network", "run", "--pick", 40, "--metric", "angular")
    assert status == 0, err
    assert len(set(out.splitlines())) == 40
    assert "H from inf to 0\n" in err


def test_a_named_network_and_layer(place, cover):
    torch.manual_seed(0)
    model = create_model(ModelSpec("torchvision/resnet18"))
    torch.save(model.state_dict(), place / "resnet.pt")
    words = ["near", "far", "--network", "torchvision/resnet18", "--weights", "resnet.pt"]
    words += ["--img-size", 32, "--batch-size", 9]
    tables = [cover(*words, *more) for more in ([], ["--layer", "avgpool"], ["--layer", "layer2"])]
    assert [status for status, _, _ in tables] == [0, 0, 0], tables
    texts = [out for _, out, _ in tables]
    assert texts[0] == texts[1]  # what the last layer reads
    assert texts[2] != texts[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("source near --network run --pik 3", "unknown option '--pik'; nearest: '--pick'"),
        ("source near", "--network is missing; expected a run's folder"),
        ("source --network run", "no CANDIDATE to rank"),
        ("", "source"),
        ("nowhere near --network run", "nowhere: no such folder"),
        ("source nowhere --network run", "nowhere: no such folder"),
        ("source source/ --network run", "source is named twice"),
        ("source near --network no", "no: no such file; expected a checkpoint"),
        ("source near --network run --weights w.pt", "--weights goes with torchvision/NAME"),
        ("source near --network timm/resnet18 --weights w.pt", "w.pt: no such file"),
        ("source near --network run --metric l2", "unknown metric 'l2'; nearest"),
        ("source near --network run --pick 0", "--pick: expected 1 or more, got 0"),
        ("source near --network run --pick many", "argument --pick: invalid int value: 'many'"),
        ("source near --network run --batch-size 0", "--batch-size: expected 1 or more"),
        ("source near --network run --csv no/t.csv", "no folder no to write it to"),
        ("source near --network run --csv near", "--csv near is a folder; expected a file to write"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_pytorch(place, words, message):
    command = [sys.executable, "-X", "importtime", "-m", "fastjac.coverage", *words.split()]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=place, capture_output=True, text=True, env=env)
    said = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert run.returncode == 2
    assert len(said) == 1
    assert said[0].startswith("fastjac: ")
    assert message in said[0]
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in run.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "fastjac" in imported
    assert not imported & {"torch", "torchvision", "sklearn", "numpy", "scipy", "PIL"}


def test_help():
    command = [sys.executable, "-X", "importtime", "-m", "fastjac.coverage", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0
    assert "python -m fastjac.coverage imagenet/train" in run.stdout
    assert "| torch\n" not in run.stderr


def test_mistakes_that_need_the_images(place, cover):
    (place / "empty").mkdir(exist_ok=True)
    (place / "damaged").mkdir(exist_ok=True)
    (place / "damaged" / "a.png").write_bytes(b"no image")
    for words, message in (
        (["source", "empty", "--network", "run"], "empty has no image; images end in .jpg"),
        (["source", "damaged", "--network", "run"], "damaged/a.png is not a readable image"),
        (["source", "--network", "run", "--pick", "41"], "--pick 41: source has 40 images"),
        (
            ["source", "near", "--network", "run", "--layer", "feature"],
            "unknown layer 'feature' in run",
        ),
        (["source", "near", "--network", "run", "--img-size", "2"], "too small"),
    ):
        status, out, err = cover(*words)
        assert (status, out) == (2, "")
        lines = [line for line in err.splitlines() if "hidden files" not in line]
        assert message in lines[-1]
        assert lines[-1].startswith("fastjac: ")


def test_damaged_images_are_left_out(place, cover, caplog):
    table = cover("source", "far", "--network", "run")[1]
    folder = place / "partly"
    shutil.copytree(place / "far", folder)
    (folder / "a.png").write_bytes(b"no image")
    words = ["source", "partly", "--network", "run"]
    assert cover(*words)[2].endswith("; --skip-damaged leaves out what cannot be read\n")
    assert cover(*words, "--skip-damaged")[:2] == (0, table.replace("far (", "partly ("))
    assert "1 of 4 images left out; partly/a.png is not a readable image" in caplog.text


def test_a_table_that_cannot_be_written_is_printed(place, cover, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    status, out, err = cover("source", "near", "--network", "run", "--csv", "table.csv")
    assert status == 1
    assert "candidate (farthest image of the source)\n" in out
    assert err.splitlines()[-1] == "fastjac: table.csv cannot be written: No space left on device"


def test_the_standard_output_may_be_closed(place):
    words = ["source", "--network", "run", "--pick", "1"]
    command = [sys.executable, "-m", "fastjac.coverage", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            command, cwd=place, env=env, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert run.returncode == 1
    assert "fastjac: the standard output cannot be written to: No space left" in run.stderr
    assert "Traceback" not in run.stderr


def test_features_that_are_not_finite(place, cover):
    from safetensors.torch import load_file, save_file

    folder = place / "broken"
    folder.mkdir(exist_ok=True)
    weights = load_file(place / "run" / "model.safetensors")
    first = next(k for k, v in weights.items() if v.dim() == 4)
    weights[first] = torch.full_like(weights[first], 3e38)  # sums of it overflow
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text((place / "run" / "config.json").read_text())
    status, _, err = cover("far", "near", "--network", "broken")
    assert status == 2
    assert err.splitlines()[-1] == "fastjac: far/0/050.png: its features have a NaN or an infinity"
