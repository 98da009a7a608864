"""Whatever is wrong: one line, the right status, no traceback, nothing written."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from fastjac.models import VGG

SIX = ["--batch-size", "6"]
LONG = 300 * "x"


@pytest.fixture
def refused(trainer, tmp_path):
    """Runs what must fail with status 2 and one line; the line. Nothing may be written."""

    def run(*words):
        status, out, err = trainer(*words)
        assert (status, out) == (2, "")
        assert err.startswith("fastjac: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "runs").exists()
        return err.removeprefix("fastjac: ").rstrip("\n")

    return run


@pytest.fixture
def images(tmp_path):
    """An ImageFolder of two classes."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20, 20), (80 * i, 9, 9)).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tech"], "unknown command 'tech'; nearest: 'teacher'"),
        (["teacher", "--dataset", "digit"], "unknown dataset 'digit'; nearest: 'digits', 'mit67'"),
        (["teacher", "--model", "vgg7"], "unknown model 'vgg7'; nearest: 'vgg', 'vgg9', 'vgg4'"),
        (["teacher", "--config", "cifar10"], "unknown recipe 'cifar10'; nearest: 'cifar100'"),
        (["teacher", "--config", "no.yaml"], "--config no.yaml: no such file"),
        (["teacher", "--batchsize", "3"], "unknown option '--batchsize'; nearest: '--batch-size'"),
        (["teacher", "extra"], "nrecognized arguments: extra"),
        (["teacher", "--epochs", "many"], "--epochs: expected a whole number; got many"),
        (["teacher", "--img-size", "big"], "--img-size: expected a whole number; got big"),
        (["teacher", "--clip-grad", "x"], "--clip-grad: expected a number; got x"),
        (
            ["teacher", "--decay-milestones", "1", "b"],
            "--decay-milestones: expected a whole number; got b",
        ),
        (["teacher", "--opt", "adm"], "--opt: expected 'adam', 'adamw', 'sgd'; got adm"),
        (["teacher", "--epochs", "0"], "--epochs: expected more than 0, got 0"),
        (["teacher", "--lr", "-1"], "--lr: expected more than 0, got -1"),
        (["teacher", "--workers", "-1"], "--workers: expected 0 or more, got -1"),
        (["teacher", "--sched", "multistep"], "--decay-milestones goes with --sched multistep"),
        (["teacher", "--device", "gpu"], "--device gpu is not to be had"),
        (["teacher", "--device", "meta"], "--device meta is not to be had"),
        (["teacher", "--threads", "100000"], "--threads: expected at most 1024, got 100000"),
        (
            ["teacher", "--seed", 2**70],
            "--seed: expected at most 9223372036854775807, got 11805916",
        ),
        (
            ["table", "--seeds", "0", 2**70],
            "--seeds: expected at most 9223372036854775807, got 1180",
        ),
        (["table", "--seeds", "-1"], "--seeds: expected 0 or more, got -1"),
        (["teacher", "--lr", "1e400"], "--lr: expected a finite number, up to 3.4e+38; got inf"),
        (
            ["teacher", "--weight-decay", "1e400"],
            "--weight-decay: expected a finite number, up to 3.4e+38; got inf",
        ),
        (
            ["table", "--test-noise", "1e400"],
            "--test-noise: expected a finite number, up to 3.4e+38; got inf",
        ),
        (["teacher", "--lr", "1e300"], "--lr: expected a finite number, up to 3.4e+38; got 1e+300"),
        (["teacher", "--width", "1e30"], "--width: expected at most 1000000, got 1e+30"),
        (["teacher", "--img-size", 10**9], "--img-size: expected at most 65536, got 1000000000"),
        (
            ["teacher", "--model", "vgg", "--plan", f"{10**20}"],
            "expected widths below 1000000 and M",
        ),
        (["teacher", "--input-noise", "-1"], "--input-noise: expected 0 or more, got -1"),
        (["teacher", "--plan", ""], "--plan: expected a text, got an empty one"),
        (["teacher", "--experiment", ""], "--experiment: expected a text, got an empty one"),
        (["student", "--teacher-cache", ""], "--teacher-cache: expected a text, got an empty one"),
        (["evaluate", "x", "--device", ""], "--device: expected a text, got an empty one"),
        (["evaluate", "x", "--batch-size", "0"], "--batch-size: expected more than 0, got 0"),
        (
            ["teacher", "--experiment", "\udce9"],
            "--experiment: expected text in UTF-8, got '\\udce9'",
        ),
        (
            ["teacher", "--experiment", LONG],
            "--experiment: expected names of at most 255 bytes, got",
        ),
        (["teacher", "--experiment", f"a/{LONG}"], "at most 255 bytes, got one of 300"),
        (["teacher", "--config", LONG], "xxx cannot be looked up: File name too long"),
        (["teacher", "--weights", LONG], "xxx cannot be looked up: File name too long"),
        (["teacher", "--data-dir", LONG], "xxx cannot be looked up: File name too long"),
        (
            ["student", "--kd", "1", "--teacher", LONG],
            "xxx cannot be looked up: File name too long",
        ),
        (["evaluate", LONG], "xxx cannot be looked up: File name too long"),
        (
            ["teacher", "--cuda-graphs", "--device", "cpu"],
            "--cuda-graphs needs a GPU; the device is cpu",
        ),
        (["teacher", "--cuda-graphs", "--torchcompile"], "--torchcompile: give one of them"),
        (
            ["teacher", "--cuda-graphs", "--amp", "--amp-dtype", "float16"],
            "--cuda-graphs does not go with --amp-dtype float16, whose loss scale is read on the host",
        ),
        (
            ["teacher", "--cuda-graphs", "--micro-batch", "4"],
            "--cuda-graphs replays a step on one batch: it does not go with --micro-batch or --grad-",
        ),
        (["teacher", "--cuda-graphs", "--grad-accum", "2"], "it does not go with --micro-batch or"),
        (["teacher", "--grad-accum", "0"], "--grad-accum: expected more than 0, got 0"),
        (["teacher", "--clip-grad", "0"], "--clip-grad: expected more than 0, got 0.0"),
        (["teacher", "--checkpoint-steps", "0"], "--checkpoint-steps: expected more than 0, got 0"),
        (["teacher", "--keep-checkpoints", "0"], "--keep-checkpoints: expected more than 0, got 0"),
        (["teacher", "--micro-batch", "0"], "--micro-batch: expected auto or more than 0, got 0"),
        (
            ["teacher", "--micro-batch", "half"],
            "--micro-batch: expected a whole number or 'auto'; got",
        ),
        (["teacher", "--flip"], "digits: a flipped digit is another digit"),
        (
            ["teacher", "--flip", "--augment"],
            "--augment flips the images as well: give it or --flip",
        ),
        (["teacher", "--mixup", "-1"], "--mixup: expected 0 or more, got -1.0"),
        (
            ["teacher", "--cutmix", "1", "--batch-size", "9"],
            "in pairs; expected an even --batch-size, got 9",
        ),
        (
            [
                "teacher",
                "--mixup",
                "1",
                "--samples-per-class",
                "1",
                "--grad-accum",
                "2",
                "--batch-size",
                "6",
            ],
            "--mixup and --cutmix mix the images of a batch in pairs; expected an even number of "
            "them, got 5",
        ),
        (["teacher", "--aux-weight", "1"], "vgg4 has no auxiliary heads (--aux-weight)"),
        (
            ["teacher", "--aux-weight", "1", "--model", "torchvision/googlenet", "--pretrained"],
            "--aux-weight does not go with --pretrained",
        ),
        (["teacher", "--label-smoothing", "1"], "expected 0 or more and less than 1, got 1.0"),
        (["teacher", "--model-ema-decay", "0.9"], "--model-ema-decay goes with --model-ema"),
        (
            ["teacher", "--model-ema", "--model-ema-decay", "1"],
            "--model-ema-decay: expected between 0 and 1, got 1.0",
        ),
        (["teacher", "--warmup-lr", "0.1"], "--warmup-lr goes with --warmup-epochs"),
        (
            ["teacher", "--warmup-epochs", "3", "--epochs", "3"],
            "--warmup-epochs: expected fewer than the 3 --epochs, got 3",
        ),
        (["teacher", "--num-classes", "5"], "--num-classes 5: digits has 10 classes"),
        (["teacher", "--model", "vgg9"], "1 x 16 x 16 images are too small: the 5 max-pools"),
        (["teacher", "--img-size", "4", "--model", "vgg4"], "need at least 8 x 8"),
        (["teacher", "--model", "torchvision/resnet18"], "takes 3 channels, the images have 1"),
        (["teacher", "--weights", "no.pth"], "no.pth: no such file; expected weights"),
        (
            ["teacher", "--weights", "/"],
            "/ is a folder; expected the file of weights (.safetensors",
        ),
        (["teacher", "--weights", "a\nb"], "a\\nb: no such file; expected weights"),
        (["teacher", "--ignore-head"], "--ignore-head goes with --weights"),
        (["teacher", "--samples-per-class", "500"], "asked for 500, class '0' has 128 training"),
        (
            ["teacher", "--dataset", "cifar100", "--data-dir", "/"],
            "/cifar-100-python/train is m",
        ),
        (["teacher", "--dataset", "mit67", "--data-dir", "/"], "/TrainImages.txt is missing"),
        (["teacher", "--dataset", "folder", "--data-dir", "/"], "/train is missing; expected"),
        (["teacher", "--dataset", "folder", "--data-dir", "no"], "--data-dir no: no such folder"),
        (["student", "--jacobians", "1"], "--teacher is missing; --jacobians needs one"),
        (["student", "--jacobians", "-1"], "--jacobians: expected 0 or more, got -1.0"),
        (["student", "--ce", "0"], "every weight is 0"),
        (["student", "--jacobians", "1", "--teacher", "no"], "no: no such file; expected"),
        (
            ["student", "--jacobians", "1", "--torchcompile"],
            "--torchcompile does not go with --jacobians of --target label-logit, a Jacobian of the",
        ),
        (
            ["table"],
            "method 'ce+activations': the weight --activations is 0; give it one, or leave the method",
        ),
        (
            ["table", "--methods", "ce+jacobians", "--jacobians", "1"],
            "--teacher is missing, and wit",
        ),
        (["table", "--methods", "ce+jacobian"], "unknown term 'jacobian' in method 'ce+jacobian'"),
        (["table", "--methods", "jacobians"], "method 'jacobians': the weight --jacobians is 0"),
        (["table", "--methods", "ce", "--seeds", "1", "1"], "--seeds: expected different values"),
        (["demo", "--samples", "1", "500"], "asked for 500, class '0' has 128 training images"),
        (["demo", "--model", "vgg9", "--plan", "4"], "a plan such as"),
        (["demo", "--resume"], "a table always goes on where it was"),
        (["demo", "--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (
            ["student", "--teacher", "timm/resnet18", "--teacher-weights", "no.pt"],
            "no.pt: no such file; expected weights",
        ),
        (["evaluate", "no"], "no: no such file; expected a checkpoint"),
        (["evaluate", "x", "--dataset", "digit"], "unknown dataset 'digit'; nearest: 'digits'"),
    ],
)
def test_command_lines(refused, words, message):
    assert message in refused(*words)


@pytest.mark.parametrize("milestones", [[-5], [0], [5, 5], [7, 5]])
def test_milestones(refused, milestones):
    said = refused("teacher", "--sched", "multistep", "--decay-milestones", *milestones)
    given = " ".join(map(str, milestones))
    assert said == (
        f"--decay-milestones: expected epochs from 1 on, each once, in their order; got {given}"
    )


def test_layers(refused, small, teacher):
    words = ["student", *small, "--teacher", teacher, "--attention", 1]
    nearest = refused(*words, "--layer", "pool3")
    assert "unknown layer 'pool3' in the student; nearest: 'pool2'" in nearest
    assert "in the teacher" in refused(*words, "--teacher-layer", "pools")
    assert refused(*words, "--level", 2) == "level 2: VGG has levels 1 to 1 (pool2)"
    assert "unknown layer 'convs'" in refused(*words, "--layer", "convs", "--jacobians", 0)
    for layer in ("pool1", "fc"):
        assert "attention_match_loss (maps over h, w)" in refused(*words, "--layer", layer)
    matched = [*words, "--jacobians", 1, "--target", "attention-window"]
    assert "'fc' is not a feature map" in refused(*matched, "--layer", "fc")


def test_jacobians_with_attention_need_one_target(refused, small, teacher):
    words = ["student", *small, "--teacher", teacher, "--attention", 1, "--jacobians", 1]
    assert "needs --target attention-window" in refused(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown recipe key 'epoch' in {}; nearest: 'epochs'"),
        ("teacher: {ce: 1}", "unknown recipe key 'ce' in {}, section 'teacher'"),
        ("epochs: many", "recipe key 'epochs' in {}: expected a whole number; got many"),
        ("img_size: big", "recipe key 'img-size' in {}: expected a whole number; got big"),
        ("epochs: [1", "{} is not YAML: "),
        ("- epochs", "{}: expected a mapping of options to values"),
        ("from: !!timestamp 2024-13-01", "{} is not YAML: month must be in 1..12"),
        (2000 * "[", "{} is not YAML: "),
        ("decay-milestones: 3", "recipe key 'decay-milestones' in {}: expected a list, got 3"),
        ("amp: 1", "recipe key 'amp' in {}: expected true or false, got 1"),
        ("lr: 1\nlr: 2", "{} is not YAML: the key 'lr' stands there twice"),
        ("batch-size: 1\nbatch_size: 2", "{}: the key 'batch_size' stands there twice, with - and"),
        ("lr: null", "--lr: expected a value, got null"),
        ("model: null", "--model: expected a value, got null"),
        ("rows: &a {a: *a}", "{} is not YAML: Circular reference detected"),
    ],
)
def test_recipes(refused, tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert message.format(path) in refused("teacher", "--config", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# \xe9t\xe9\nlr: 0.1\n", "{} is not text in UTF-8: byte 2 is 0xe9; save it as UTF-8"),
        (b"\xff\xfel\0r\0:\0 \0001\0", "{} is not text in UTF-8: byte 0 is 0xff; save it as UTF-8"),
    ],
)
def test_recipes_in_another_encoding(refused, tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert refused("teacher", "--config", path) == message.format(path)


def test_a_teacher_of_other_images(refused, small, teacher, images):
    words = ["student", *small, "--teacher", teacher, "--dataset", "folder", "--data-dir", images]
    words += ["--img-size", 16]
    said = refused(*words, "--attention", 1)
    assert said.startswith(
        f"the teacher {teacher}, trained on digits, does not take the images of fo"
    )
    assert said.endswith("3 x 16 x 16 images: this VGG takes 1 channels")


def test_weights_of_another_model(refused, small, tmp_path):
    torch.save(VGG("4 M 9 M", 10, 1).state_dict(), tmp_path / "w.pth")
    message = refused("teacher", *small, "--weights", tmp_path / "w.pth")
    assert "w.pth holds another model than this VGG: conv2.weight is [9, 4, 3, 3]" in message


def test_weights_with_another_head(refused, trainer, small, tmp_path):
    torch.save({"net": VGG("4 M 8 M", 5, 1).state_dict()}, tmp_path / "w.pth")
    words = ["teacher", *small, "--weights", tmp_path / "w.pth"]
    assert "only the head differs, which --ignore-head leaves out of --weights" in refused(*words)
    assert trainer(*words, "--ignore-head")[0] == 0


def test_a_named_teacher_with_weights_from_elsewhere(refused, trainer, small, images, tmp_path):
    """Of as many classes as the file has; no head of a teacher is left at random."""
    words = ["student", *small, "--dataset", "folder", "--data-dir", images, "--img-size", 32]
    words += ["--teacher", "torchvision/resnet18", "--teacher-weights", tmp_path / "w.pth"]
    words += ["--kd", 1, "--batch-size", 2, "--epoch-steps", 1]
    for classes, message in (
        (5, "the teacher torchvision/resnet18 has 5 classes, folder has 2, which --kd cannot"),
        (1000, "has 1000 cl"),
    ):
        weights = resnet18(num_classes=classes).state_dict()
        torch.save({f"module.{k}": v for k, v in weights.items()}, tmp_path / "w.pth")
        assert message in refused(*words)
    without = {k: v for k, v in weights.items() if k != "fc.weight"}
    torch.save(without, tmp_path / "w.pth")
    assert "no fc.weight" in refused(*words)
    torch.save({"net": resnet18(num_classes=2).state_dict()}, tmp_path / "w.pth")
    assert trainer(*words)[0] == 0


def test_checkpoints_that_are_none(refused, trainer, teacher, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    for words in (["evaluate", tmp_path / "w.pt"], ["student", "--teacher", tmp_path / "w.pt"]):
        extra = ["--activations", 1] if words[0] == "student" else []
        said = refused(*words, *extra)
        assert "w.pt does not say what network it is of; weights from elsewhere are read by" in said
    (tmp_path / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes())
    assert "config.json is missing" in refused("evaluate", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in refused("evaluate", tmp_path)


@pytest.fixture
def edited(teacher, tmp_path):
    """Sets keys of the description of a copy of the teacher; the folder."""

    def edit(content=None, **changes):
        folder = tmp_path / "edited"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes())
        about = json.loads((teacher / "config.json").read_text())
        for name, value in changes.items():
            (about["spec"] if name in about["spec"] else about)[name] = value
        (folder / "config.json").write_bytes(content or json.dumps(about).encode())
        return folder

    return edit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": "x"}, "num_classes is 'x', not a number from 1 on"),
        ({"num_classes": 0}, "num_classes is 0, not a number from 1 on"),
        ({"in_channels": [1]}, "in_channels is [1], not a number from 1 on"),
        ({"model": 3}, "model is 3, not a name"),
        ({"width": "1"}, "width is '1', not a number"),
        ({"width": float("inf")}, "width: expected a factor above 0, got inf"),
        ({"width": 1e30}, "does not say what network it is of: "),
        ({"plan": 3}, "plan is 3, not a text or nothing"),
        ({"plan": ""}, "plan '' has no convolution"),
        ({"mean": ["x"]}, "mean or std is ['x'], not 1 numbers"),
        ({"std": None}, "mean or std is None, not 1 numbers"),
        ({"size": "16"}, "size is '16', not a number from 1 on"),
        ({"dataset": ["digits"]}, "dataset is ['digits'], not a name"),
        ({"classes": 10}, "classes is 10, not a list"),
        ({"spec": 3}, "does not say what network it is of: "),
        ({"content": b"[1]"}, "does not say what network it is of: "),
        ({"content": b"\xff\xfe{\0}\0"}, "is not text in UTF-8: byte 0 is 0xff; save it as UTF-8"),
        ({"content": 100000 * b"["}, "is not JSON: "),
    ],
)
def test_a_description_that_was_edited(refused, edited, changes, message):
    folder = edited(**changes)
    said = refused("evaluate", folder)
    assert said.startswith(str(folder / "config.json"))
    assert message in said
    assert refused("student", "--teacher", folder, "--kd", 1) == said


def test_evaluate_on_images_that_do_not_fit(refused, edited, images):
    assert "need at least 8 x 8" in refused("evaluate", edited(size=7))
    folder = edited(classes=["a", "b"])
    words = ["evaluate", folder, "--dataset", "folder", "--data-dir", images]
    assert refused(*words) == "3 x 16 x 16 images: this VGG takes 1 channels"


def test_evaluate_on_other_classes(refused, teacher, images):
    words = ["evaluate", teacher, "--dataset", "folder", "--data-dir", images]
    said = "knows 10 classes, folder has 2; the first to differ is '0' and 'a'"
    assert said in refused(*words)


def test_folders_of_numbers_and_a_library_s_teacher(refused, small, tmp_path, monkeypatch):
    """Folders are sorted as texts, as ImageFolder sorts them; the classes of a library are not."""
    for part in ("train", "val"):
        for number in range(11):
            folder = tmp_path / "images" / part / str(number)
            folder.mkdir(parents=True)
            Image.new("RGB", (20, 20), (20 * number, 9, 9)).save(folder / "a.png")
    own = [str(number) for number in range(11)]
    found = (VGG("4 M", 11), own)
    monkeypatch.setattr("fastjac.train.objective.find_teacher", lambda *args: found)
    words = ["student", *small, "--dataset", "folder", "--data-dir", tmp_path / "images"]
    words += ["--img-size", 16, "--teacher", "torchvision/resnet18", "--kd", 1]
    said = "of the teacher torchvision/resnet18, class 2 is '2', of folder it is '10'; expected a teach"
    assert said in refused(*words)


def test_a_network_that_evaluates_and_cannot_be_trained(refused, trainer, small, images):
    """BatchNorm of one pixel of one image has no variance; in eval mode it needs none."""
    words = ["teacher", "--dataset", "folder", "--data-dir", images, "--img-size", 32]
    words += ["--model", "torchvision/resnet18", "--epochs", 1, "--threads", 1]
    message = refused(*words, "--batch-size", 1)
    assert message.startswith(
        "torchvision/resnet18 cannot be trained on a batch [1, 3, 32, 32]: Ex"
    )
    for name in ("a", "b"):  # one test image per class is enough to try a batch of two
        for i in (1, 2):
            (images / "val" / name / f"{i}.png").unlink()
    assert trainer(*words, "--batch-size", 2, "--experiment", "x")[0] == 0


def test_a_network_of_several_outputs(refused, small, images, monkeypatch):
    class Several(VGG):
        def forward(self, x):
            logits = super().forward(x)
            return (logits, logits) if self.training else logits

    monkeypatch.setattr("fastjac.models.create.VGG", Several)
    assert refused("teacher", *small) == "vgg returns tuple in training; expected logits"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_turns_out_corrupt(trainer, small, images, tmp_path, workers):
    """Found on the way, in this process or in a loader's: one line that names it."""
    bad = images / "train" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:50])
    words = ["teacher", *small, "--dataset", "folder", "--data-dir", images, "--img-size", 16]
    status, _, err = trainer(*words, "--workers", workers, "--batch-size", 2, "--experiment", "x")
    assert status == 2
    assert err.startswith(f"fastjac: {bad} is not a readable image: ")
    last = tmp_path / "runs" / "x" / "last.pt"
    said = "; --skip-damaged leaves out what cannot be read"
    assert err.endswith(f"{said}; {last} holds epoch 0\n")
    assert err.count("\n") == 1
    assert torch.load(last, weights_only=True)["epoch"] == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_test_image_that_turns_out_corrupt(trainer, small, images, tmp_path, workers):
    """The epoch before the evaluation is kept, and the run goes on once the image is away."""
    bad = images / "val" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:50])
    words = ["teacher", *small, "--dataset", "folder", "--data-dir", images, "--img-size", 16]
    words += ["--workers", workers, "--batch-size", 2, "--experiment", "x"]
    last = tmp_path / "runs" / "x" / "last.pt"
    for epoch in (1, 2):
        status, _, err = trainer(*words, *(["--resume"] if epoch == 2 else []))
        assert status == 2
        assert err.startswith(f"fastjac: {bad} is not a readable image: ")
        assert err.endswith(f"; {last} holds epoch {epoch}\n")
    bad.unlink()
    assert trainer(*words, "--resume")[0] == 0
    history = torch.load(last, weights_only=True)["history"]
    assert ["test_accuracy" in row for row in history] == [False, True]


def test_one_class(refused, small, images):
    """As of a folder too deep or too high."""
    for part in ("train", "val"):
        (images / part / "b").rename(images / part / "a" / "b")
    words = ["teacher", *small, "--dataset", "folder", "--data-dir", images, "--img-size", 16]
    assert refused(*words) == f"folder: {images} has one class, 'a'; expected two or more"


def test_damaged_images_left_out(trainer, small, images, caplog):
    (images / "train" / "b" / "1.png").write_bytes(b"not an image")
    words = ["teacher", *small, "--dataset", "folder", "--data-dir", images, "--img-size", 16]
    words += ["--batch-size", 2, "--experiment", "x"]
    assert trainer(*words)[0] == 2
    assert trainer(*words, "--resume", "--skip-damaged")[0] == 0
    assert "1 of 6 images left out" in caplog.text
    assert "last.pt is of a run on 6 training images; now there are 5" in caplog.text


def test_an_output_that_cannot_be(trainer, small, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = trainer("teacher", *small, output=tmp_path / "file")
    assert status == 2
    assert "cannot be made: Not a directory" in err
    assert err.count("\n") == 1


def test_a_loss_that_is_not_finite(trainer, small, tmp_path):
    """Status 1; the last checkpoint is from before."""
    status, out, err = trainer(
        "teacher", *small, "--opt", "sgd", "--lr", 1e30, "--experiment", "x", "--epoch-steps", 40
    )
    folder = tmp_path / "runs" / "x"
    assert (status, out) == (1, "")
    assert err.startswith("fastjac: the loss is nan in epoch 1, by step ")
    assert err.endswith(f"; {folder / 'last.pt'} holds epoch 0; try a lower --lr\n")
    state = torch.load(folder / "last.pt", weights_only=True)
    assert all(v.isfinite().all() for v in state["model"].values())
    assert not (folder / "config.json").exists()


def test_tensorboard_that_is_not_there(refused, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = "--tensorboard needs the package tensorboard"
    assert refused("teacher", *small, "--tensorboard") == message


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "fastjac.train", *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_exit_status_of_the_process():
    done = command("teacher", "--dataset", "digit")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "fastjac: unknown dataset 'digit'; nearest: 'digits', 'mit67'\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "[Errno 13] Permission denied: 'a/b'"),
        (OSError(24, "Too many open files"), "[Errno 24] Too many open files"),
        (MemoryError(), "out of memory: MemoryError"),
    ],
)
def test_what_the_system_says_is_one_line(trainer, small, monkeypatch, error, said):
    def broken(*args):
        raise error

    monkeypatch.setattr("fastjac.train.batches.epoch_batches", broken)
    assert trainer("teacher", *small) == (1, "", f"fastjac: {said}\n")


def test_an_error_of_the_system_within_a_run(trainer, small, tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("fastjac.train.loop.evaluate", broken)
    last = tmp_path / "runs" / "x" / "last.pt"
    said = (
        f"fastjac: [Errno 5] Input/output error; {last} holds epoch 0 of 2, --resume goes on from"
    )
    status, out, err = trainer("teacher", *small, "--experiment", "x")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(said)


def test_a_bug_keeps_its_traceback(trainer, small, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("fastjac.train.batches.epoch_batches", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        trainer("teacher", *small)
