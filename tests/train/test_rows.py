"""Tables whose rows differ in any options; accuracies under noise; the report."""

import csv
import html.parser
import json
from pathlib import Path

import pytest
import torch
import yaml

from fastjac.data import NoisyImages, load_data
from fastjac.errors import FastjacError
from fastjac.train.build import load_trained
from fastjac.train.files import write_csv
from fastjac.train.loop import evaluate
from fastjac.train.options import TableOptions
from fastjac.train.parse import parse
from fastjac.train.plots import draw_table
from fastjac.train.report import write_report
from fastjac.train.tables import as_text

ROWS = {
    "plain": {},
    "window <1/5>": {"jacobians": 1, "target": "attention-window", "window": 0.5},
    "norm": {"jacobian-norm": 0.1, "lr": 0.01},
}


class Reader(html.parser.HTMLParser):
    """What a page says, and which tags and addresses it has."""

    def __init__(self):
        super().__init__()
        self.text, self.tags, self.addresses = [], set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "rows.yaml"
    content = {
        "dataset": "digits",
        "model": "vgg",
        "plan": "4 M 6 M",
        "epochs": 1,
        "epoch-steps": 3,
        "batch-size": 8,
        "threads": 1,
        "title": "Rows & options",
        "table": {
            "methods": [],
            "rows": ROWS,
            "samples": [2],
            "seeds": [0, 1],
            "test-noise": [0, 0.5],
        },
        "teacher": {"plan": "6 M 8 M"},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_rows_noise_and_report(trainer, recipe, teacher, tmp_path):
    words = ["table", "--config", recipe, "--teacher", teacher, "--jobs", 1, "--experiment", "t"]
    status, out, err = trainer(*words)
    assert (status, err) == (0, "")
    folder = tmp_path / "runs" / "t"
    with (folder / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [(r["method"], r["seed"], r["noise"]) for r in runs] == [
        (row, seed, noise) for seed in "01" for row in ROWS for noise in ("0.0", "0.5")
    ]
    # Each was trained with its own options, and scored with that noise.
    args = yaml.safe_load((folder / "students" / "window-1-5-2-seed0" / "args.yaml").read_text())
    assert (args["jacobians"], args["target"], args["jacobian_norm"]) == (1, "attention-window", 0)
    args = yaml.safe_load((folder / "students" / "norm-2-seed1" / "args.yaml").read_text())
    assert (args["jacobians"], args["lr"], args["jacobian_norm"]) == (0, 0.01, 0.1)
    model = load_trained(folder / "students" / "plain-2-seed1").model
    images = NoisyImages(load_data("digits").test, 0.5)
    found = next(r for r in runs if (r["method"], r["seed"], r["noise"]) == ("plain", "1", "0.5"))
    expected = 100 * evaluate(model, images, 10, 256)["accuracy"]
    assert float(found["accuracy"]) == pytest.approx(expected, abs=1e-3)
    assert "standard deviation of the noise" in out
    assert len(list(folder.glob("teacher-cache-*/*.sqlite"))) == 1

    page = (folder / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    text = " ".join(reader.text)
    for part in ("Rows & options", *ROWS, "python -m fastjac.train table --config", "MiB"):
        assert part in text
    with (folder / "table.csv").open() as file:
        for row in csv.DictReader(file):
            assert f"{float(row['mean']):.1f}" in text
    assert not reader.tags & {"script", "link", "iframe"}
    assert all(a.startswith(("data:", "#")) for a in reader.addresses)
    assert {"svg", "img", "table"} <= reader.tags

    status, again, err = trainer(*words)  # nothing is trained again
    assert (status, again, err) == (0, out, "")


def test_noise_is_the_same_at_each_reading():
    images = load_data("digits").test
    noisy = NoisyImages(images, 0.3)
    assert torch.equal(noisy[3][0], noisy[3][0])
    assert not torch.equal(noisy[3][0] - images[3][0], noisy[4][0] - images[4][0])
    spread = torch.stack([noisy[i][0] - images[i][0] for i in range(200)]).std()
    assert spread == pytest.approx(0.3, rel=0.05)
    assert torch.equal(NoisyImages(images, 0)[3][0], images[3][0])


def test_seeds_are_fewer_where_images_are_many(trainer, recipe, tmp_path):
    content = yaml.safe_load(recipe.read_text())
    content["table"] |= {"rows": {"plain": {}}, "samples": [1, 12], "fewer-seeds": 1}
    del content["table"]["test-noise"]
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    status, out, _ = trainer("table", "--config", recipe, "--jobs", 1, "--experiment", "t")
    assert status == 0
    found = sorted(p.parent.name for p in tmp_path.glob("runs/t/students/*/config.json"))
    assert found == ["plain-1-seed0", "plain-1-seed1", "plain-12-seed0"]
    accuracy = json.loads((tmp_path / "runs/t/students/plain-12-seed0/config.json").read_text())
    assert f"{100 * accuracy['accuracy']:.1f}\n" in out


REFUSED = {
    "unknown option": ({"a": {"windw": 1}}, "unknown option 'windw' in row 'a'; nearest: 'window'"),
    "an option of the table": ({"a": {"seed": 1}}, "unknown option 'seed' in row 'a'"),
    "a value": ({"a": {"temperature": 0}}, "row 'a': --temperature: expected more than 0, got 0"),
    "a pair": (
        {"a": {"jacobians": 1, "attention": 1}},
        "row 'a': --attention with --jacobians needs --target attention-window",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    rows, expected = REFUSED[case]
    with pytest.raises(FastjacError, match=expected):
        TableOptions(methods=[], rows=rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{lr: abc}", "recipe key 'lr' in row 'a': expected a number; got abc"),
        ("{opt: adm}", "'opt' in row 'a': expected 'adam', 'adamw', 'sgd'; got adm"),
        ("{model: 3}", "recipe key 'model' in row 'a': expected a text; got 3"),
        ("{augment: 1}", "recipe key 'augment' in row 'a': expected true or false, got 1"),
        ("{levels: 2}", "recipe key 'levels' in row 'a': expected a list, got 2"),
        ("{lr: null}", "row 'a': --lr: expected a value, got null"),
        ("{batch-size: 2, batch_size: 4}", "row 'a': an option stands there twice, with - and"),
        ("3", ": expected a mapping; got 3"),
    ],
)
def test_types_in_a_recipe(tmp_path, row, message):
    path = tmp_path / "r.yaml"
    path.write_text(f"methods: [ce]\nrows: {{a: {row}}}\n")
    with pytest.raises(FastjacError) as error:
        parse("table", TableOptions, ["--config", str(path)])
    assert message in str(error.value)


def test_values_of_a_row_are_read_as_those_of_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("methods: [ce]\nrows: {1: {lr: 1e-3, augment: 'no', batch-size: '8'}}\n")
    options = parse("table", TableOptions, ["--config", str(path)])
    assert options.rows == {"1": {"lr": 1e-3, "augment": False, "batch-size": 8}}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a b", "a-b"], "'a b' and 'a-b' would have one folder, a-b; expected names that differ"),
        ([300 * "x"], "--rows: expected names of at most 200 characters, got 'xxx"),
    ],
)
def test_rows_that_no_folder_can_tell_apart(trainer, small, tmp_path, names, message):
    """Else the second would be shown with the first one's students."""
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"rows": {name: {} for name in names}, "methods": []}))
    status, out, err = trainer("table", *small, "--config", path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_name_twice():
    with pytest.raises(FastjacError, match="'ce' stands there twice"):
        TableOptions(methods=["ce"], rows={"ce": {}})


def test_text_with_a_cell_that_is_not_there():
    table = [
        {"method": "a", "samples_per_class": 1, "mean": 50.0, "std": 1.0, "n": 2},
        {"method": "a", "samples_per_class": "all", "mean": 90.0, "std": "", "n": 1},
        {"method": "b", "samples_per_class": "all", "mean": 91.0, "std": "", "n": 1},
    ]
    lines = as_text(table).splitlines()
    assert lines[0].split()[-2:] == ["1", "all"]
    assert lines[2].split() == ["b", "91.0"]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", [r"$\frac$", "a$b$c", "_x", "été"])
def test_a_row_s_name_is_drawn_as_it_is(tmp_path, name):
    rows = [{"method": name, "samples_per_class": 1, "mean": 50.0, "std": "", "n": 1}]
    assert draw_table(rows, tmp_path / "t.svg") == "t.svg"
    assert name in (tmp_path / "t.svg").read_text("utf-8")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_files_of_a_table_are_in_utf_8(tmp_path, monkeypatch):
    """In any locale: else the first name that it lacks would end the table when all are trained."""
    opened = Path.open

    def in_ascii(self, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
        coding = None if "b" in mode else encoding or "ascii"
        return opened(self, mode, buffering, coding, errors, newline)

    monkeypatch.setattr(Path, "open", in_ascii)
    rows = [{"method": "漢", "samples_per_class": 1, "mean": 50.0, "std": "", "n": 1}]
    write_csv(tmp_path / "t.csv", rows)
    draw_table(rows, tmp_path / "t.svg")
    write_report(tmp_path / "t.html", "", "", rows, [], {}, "", {"": tmp_path / "t.svg"})
    for name in ("t.csv", "t.svg", "t.html"):
        assert "漢" in (tmp_path / name).read_text("utf-8")
