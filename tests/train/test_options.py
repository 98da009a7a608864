"""What options are read as, on a command line and in a recipe."""

from pathlib import Path

import pytest

from fastjac.errors import FastjacError
from fastjac.train.options import EvaluateOptions, StudentOptions, TableOptions, TeacherOptions
from fastjac.train.parse import parse


@pytest.fixture
def read(tmp_path):
    def recipe(text, cls=TeacherOptions):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return parse("table" if cls is TableOptions else "teacher", cls, ["--config", str(path)])

    return recipe


@pytest.mark.parametrize(
    "text", ["no", "on", "007", "1.10", "1e5", "2024-01-01", "12:30", "0x10", "1_0"]
)
def test_a_text_is_what_stands_there(read, text):
    """YAML takes these for False, 7, 1.1, a date, 750, ..."""
    assert read(f"experiment: {text}").experiment == text
    words = ["--experiment", text]
    assert parse("teacher", TeacherOptions, words).experiment == text


def test_values_are_read_by_the_type_of_their_option(read):
    options = read(
        "epochs: 010\nlr: 1E-3\nclip-grad: null\nwidth: 1\nseed: '3'\nmodel: vgg\nplan: 16"
    )
    assert (options.epochs, options.lr, options.clip_grad, options.width) == (10, 1e-3, None, 1.0)
    assert (options.seed, options.plan) == (3, "16")
    rows = read(
        "{methods: [ce], rows: {1.10: {lr: 1e-3, augment: off, clip-grad: ~}}}", TableOptions
    )
    assert rows.rows == {"1.10": {"lr": 1e-3, "augment": False, "clip-grad": None}}


@pytest.mark.parametrize("word", ["yes", "on", "true", "True", "'on'"])
def test_switches_in_a_recipe(read, word):
    assert read(f"amp: {word}").amp
    assert not read("amp: off").amp


def test_switches_with_a_value():
    """As people write them: --amp=true, --amp False."""

    def amp(*words):
        return parse("student", StudentOptions, words).amp

    assert amp("--amp")
    assert amp("--amp=true")
    assert amp("--amp", "True", "--lr", "1")
    assert amp("--amp", "--channels-last", "no")
    assert not amp("--no-amp")
    assert not amp("--amp=False")
    assert not amp("--amp", "off", "--lr", "1")
    assert parse("student", StudentOptions, ["--normalize=no"]).normalize is False
    assert parse("evaluate", EvaluateOptions, ["--download", "no/on"]).checkpoint == "no/on"
    with pytest.raises(FastjacError, match="unrecognized arguments: maybe"):
        amp("--amp", "maybe")


def test_home(read, monkeypatch, tmp_path):
    """A shell does not expand ~ behind "=", nor in a recipe: a folder of that name would be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("teacher", TeacherOptions, ["--output=~/runs"]).output == str(tmp_path / "runs")
    assert read("data-dir: ~/images").data_dir == str(tmp_path / "images")
    Path(tmp_path, "home.yaml").write_text("rows: {a: {weights: ~/w.pth}}\nmethods: [ce]")
    options = parse("table", TableOptions, ["--config=~/home.yaml"])
    own = {"weights": options.contenders()["a"]["weights"]}
    assert StudentOptions(**own).weights == str(tmp_path / "w.pth")
