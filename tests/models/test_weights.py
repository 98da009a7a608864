"""Weights from files: the right ones go in, any other is refused by name."""

import argparse
import collections
import copy
import datetime
import gzip
import json
import os
import pathlib
import pickle
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch.testing._internal.two_tensor import TwoTensor

from fastjac import FastjacError
from fastjac.errors import notice
from fastjac.models import VGG, ModelSpec, create_model, load_weights, read_weights
from fastjac.models.weights import read_checkpoint


@pytest.fixture
def donor():
    return VGG("4 M", 3, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}])
def test_pth(tmp_path, donor, wrap):
    torch.save(wrap(donor.state_dict()), tmp_path / "w.pth")
    check(donor, tmp_path / "w.pth")


def test_safetensors(tmp_path, donor):
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    check(donor, tmp_path / "w.safetensors")


def check(donor, path):
    model = VGG("4 M", 3)
    load_weights(model, read_weights(path), path)
    for name, value in donor.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_normalisation_may_be_absent(donor):
    weights = {k: v for k, v in donor.state_dict().items() if not k.startswith("normalize")}
    model = VGG("4 M", 3, mean=[0.5] * 3, std=[0.5] * 3)
    load_weights(model, weights, "file")
    assert torch.equal(model.conv1.weight, donor.conv1.weight)
    assert model.normalize.mean.flatten().tolist() == [0.5] * 3


def test_another_model_is_refused_and_nothing_is_copied(donor):
    other = VGG("4 M 4", 5)
    before = other.fc.weight.clone()
    with pytest.raises(FastjacError) as caught:
        load_weights(other, donor.state_dict(), "w.pth")
    assert str(caught.value) == (
        "w.pth holds another model than this VGG: fc.weight is [3, 4], expected [5, 4]; "
        "fc.bias is [3], expected [5]; no conv2.weight and 4 more"
    )
    assert torch.equal(other.fc.weight, before)


def test_parameters_without_statistics(resnet):
    """What is saved by parameters() alone is not taken for another model."""
    with pytest.raises(FastjacError, match=r"only BatchNorm's statistics are absent: save state_d"):
        load_weights(create_model(SPEC), dict(resnet.named_parameters()), "f")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_unreadable(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    with pytest.raises(FastjacError, match=rf"w\.{suffix}: no such file"):
        read_weights(path)
    path.write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00{}junk and more")
    with pytest.raises(FastjacError, match=rf"w\.{suffix} is not a "):
        read_weights(path)


def test_truncated(tmp_path, donor):
    path = tmp_path / "w.pth"
    torch.save(donor.state_dict(), path)
    whole = path.read_bytes()
    for size in range(3, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(
            FastjacError, match=r"w\.pth is not a readable PyTorch file of plain ten"
        ):
            read_weights(path)
    with pytest.raises(FastjacError, match=r"plain tensors: it is cut off or damaged$"):
        read_weights(path)


def test_not_a_state_dict(tmp_path):
    for content in ([1, 2], {"a": 1}, {}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(FastjacError, match="expected a state dict"):
            read_weights(tmp_path / "w.pth")


def test_a_file_that_would_run_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"a": Bomb()}, tmp_path / "w.pth")
    with pytest.raises(FastjacError, match="plain tensors"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_a_file_that_would_run_code_is_not_advised_to(tmp_path):
    """PyTorch's own words name weights_only=False."""

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save(Bomb(), tmp_path / "w.pth")
    with pytest.raises(FastjacError, match=r"plain tensors: it would run posix\.system$"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"hello\nworld", b"Rar!\x1a\x07", bytes(999), "zip"])
def test_what_torch_did_not_write(tmp_path, content):
    """PyTorch's own words are "101", "pop from empty list", and the like."""
    path = tmp_path / "w.pth"
    if content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("w.pth", b"weights")
    else:
        path.write_bytes(content)
    with pytest.raises(FastjacError, match=r"tensors: it is not in the format of torch\.save$"):
        read_weights(path)


def test_a_header_whose_length_reads_as_another_format(tmp_path):
    """A length of 60 is the byte "<", with which web pages begin."""
    path = tmp_path / "w.safetensors"
    for length in (60, 0x8B1F):
        header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
        path.write_bytes(length.to_bytes(8, "little") + header.ljust(length).encode() + b"\7")
        assert read_weights(path)["a"].tolist() == [7]


SPEC = ModelSpec("torchvision/resnet18", num_classes=3)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return create_model(SPEC)


@pytest.fixture
def arrives(resnet, tmp_path):
    """Saves the content, loads it into a new network, and compares that with ``resnet``."""

    def check(content, save=torch.save, name="w.pth", shift=0.0):
        save(content, tmp_path / name)
        model = create_model(SPEC)
        load_weights(model, read_weights(tmp_path / name), name, ignore_head=False)
        for key, value in resnet.state_dict().items():
            if value.is_floating_point() and not key.startswith("normalize"):
                assert torch.equal(model.state_dict()[key], value + shift), key

    return check


def plain(model, prefix=""):
    return {prefix + k: v for k, v in model.state_dict().items() if not k.startswith("normalize.")}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_wrappers_changed(arrives, resnet, prefix):
    arrives(plain(resnet, prefix))
    arrives({"state_dict": plain(resnet, prefix), "epoch": 1})


@pytest.mark.parametrize("prefix", ["model.", "net.", "model._orig_mod.", "model.module.student."])
def test_an_attribute_of_a_larger_module(arrives, resnet, prefix):
    """As a LightningModule saves its network, beside a loss with weights of its own."""
    arrives({"state_dict": plain(resnet, prefix) | {"criterion.weight": torch.ones(3)}})


def test_wrappers_inside_a_network_and_real_ones(arrives, resnet):
    arrives({k.replace("layer1.", "layer1.module."): v for k, v in plain(resnet).items()})
    net = copy.deepcopy(resnet)
    arrives(torch.optim.swa_utils.AveragedModel(net).state_dict())
    arrives(torch.nn.DataParallel(net).state_dict())
    arrives(torch.compile(net).state_dict())


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "net", "network", "my_resnet"]
)
def test_wrapped_in_a_checkpoint(arrives, resnet, key):
    optimizer = torch.optim.Adam(resnet.parameters())
    checkpoint = {key: plain(resnet), "optimizer": optimizer.state_dict(), "acc": 91.2}
    arrives(checkpoint | {"args": argparse.Namespace(lr=0.1), "path": pathlib.Path("a")})
    arrives({"epoch": 3, "state": {key: plain(resnet)}})


@pytest.mark.parametrize(
    "key", ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "swa_model"]
)
def test_the_average_is_preferred_and_said_so(arrives, resnet, caplog, tmp_path, key):
    average = {k: v + 1 for k, v in plain(resnet).items()}
    arrives({"state_dict": plain(resnet), key: average}, shift=1)
    expected = f"{tmp_path / 'w.pth'}: the averaged weights are taken, those at '{key}'"
    assert expected in caplog.text
    arrives({"ema": {"decay": 0.9, "shadow": average}}, shift=1)
    arrives({"state_dict": plain(resnet), key: None})


def test_other_formats(arrives, resnet):
    arrives(resnet)  # a whole module, of a class that this file's reader never imports
    arrives({"epoch": 1, "model": torch.nn.DataParallel(copy.deepcopy(resnet))})
    arrives(torch.compile(copy.deepcopy(resnet)))
    arrives(plain(resnet), save_file)  # safetensors under the name of another format
    arrives(plain(resnet), name="w.safetensors")
    arrives(plain(resnet), lambda c, p: torch.save(c, p, _use_new_zipfile_serialization=False))
    arrives(
        plain(resnet), lambda c, p: numpy.savez(p, **{k: v.numpy() for k, v in c.items()}), "w.npz"
    )
    counters = {k: v for k, v in plain(resnet).items() if "num_batches" not in k}
    arrives(counters | {"best": numpy.float64(3), "when": datetime.datetime.now()})
    hyper = collections.defaultdict(list, {"lr": [0.1]})
    arrives({"state_dict": counters, "hyper_parameters": hyper, "loops": collections.Counter("ab")})


NUMPY = {
    "best_acc": numpy.float64(91.2),
    "loss": numpy.float32(0.1),
    "epoch": numpy.int64(3),
    "improved": numpy.bool_(True),
    "confusion": numpy.eye(3, dtype="int32"),
    "rng": numpy.random.RandomState(0).get_state(),
}
OTHER_NUMPY = {
    "generator": numpy.random.default_rng(0),
    "names": numpy.array(["a", "b"]),
    "args": numpy.array([argparse.Namespace(lr=1)]),
    "rows": numpy.zeros(2, dtype=[("a", "f4")]),
    "day": numpy.datetime64("2020-01-01"),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("numpy_1", [False, True])
def test_numbers_of_numpy(tmp_path, old, numpy_1):
    """As trainers save them beside the weights; texts, records, objects and generators are left out."""
    path = tmp_path / "w.pth"
    for more in ({}, OTHER_NUMPY):
        content = {"state_dict": {"a": torch.ones(2)}, **NUMPY, **more}
        torch.save(content, path, _use_new_zipfile_serialization=not old)
        if numpy_1:  # its modules had other names
            rename(path, b"numpy._core.", b"numpy.core.", old)
        found = read_checkpoint(path)
        assert torch.equal(read_weights(path)["a"], torch.ones(2))
        assert found.keys() == content.keys()
    torch.save({"state_dict": {"a": torch.ones(2)}, **NUMPY}, path)
    found = read_checkpoint(path)
    for name, value in NUMPY.items():
        assert type(found[name]) is type(value)
        parts = zip(found[name], value, strict=True) if name == "rng" else [(found[name], value)]
        assert all(numpy.array_equal(one, other) for one, other in parts)


def rename(path, before, after, old):
    """Change names in the pickle of a file of ``torch.save``."""
    if old:
        path.write_bytes(path.read_bytes().replace(before, after))
        return
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            assert not name.endswith("data.pkl") or before in data
            archive.writestr(name, data.replace(before, after) if name[-3:] == "pkl" else data)


def test_weights_in_arrays(arrives, resnet, tmp_path):
    """Also big-endian ones, and the tensors of a network beside a number that is one."""
    arrives({k: v.numpy() for k, v in plain(resnet).items()})
    arrives(
        {
            "model": {
                k: v.numpy().astype(v.numpy().dtype.newbyteorder())
                for k, v in plain(resnet).items()
            }
        }
    )
    arrives({"my_weights": plain(resnet), "best": torch.tensor(91.2)})


def test_two_networks_are_not_guessed_at(resnet, tmp_path):
    torch.save({"generator": plain(resnet), "discriminator": plain(resnet)}, tmp_path / "w.pth")
    with pytest.raises(FastjacError, match=r"holds several networks: 'generator', 'discriminator'"):
        read_weights(tmp_path / "w.pth")
    other = {k: v + 1 for k, v in plain(resnet, "teacher.").items()}
    with pytest.raises(FastjacError, match=r"f holds several networks: student\., teacher\.; exp"):
        load_weights(create_model(SPEC), plain(resnet, "student.") | other, "f")
    with pytest.raises(FastjacError, match="holds a network twice, with and without a wrapper"):
        load_weights(create_model(SPEC), plain(resnet) | plain(resnet, "module."), "f")


@pytest.mark.parametrize(
    "name", ["torchvision/resnet18", "torchvision/squeezenet1_1", "timm/vit_tiny_patch16_224"]
)
def test_another_head(name, caplog):
    theirs = plain(create_model(ModelSpec(name, num_classes=7)))
    model = create_model(ModelSpec(name, num_classes=3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FastjacError, match="only the head differs, which --ignore-head leaves out"):
        load_weights(model, theirs, "f", ignore_head=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    load_weights(model, theirs, f"{name}.pth")
    assert f"{name}.pth: its head (" in caplog.text
    same = [k for k, v in theirs.items() if torch.equal(model.state_dict()[k], v)]
    assert len(same) == len(theirs) - 2
    headless = {k: v for k, v in theirs.items() if k in same}
    with pytest.raises(FastjacError, match="only the head differs"):
        load_weights(model, headless, "f", ignore_head=False)
    load_weights(model, headless, "f")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page; expected weights"),
        (b"\n<html>", "is a web page; expected weights"),
        (b"\xef\xbb\xbf<!-- a --><html>", "is a web page; expected weights"),
        (b"<Error><Code>NoSuchKey</Code></Error>", "is a web page; expected weights"),
        (gzip.compress(b"weights", mtime=0), r"is compressed; expected weights .*: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer; 'git"),
        (b"", "is not a weights file: it is empty"),
        (b"PK\x03\x04 and no more", "is not a "),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is not a "),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors", "npz"])
def test_what_is_taken_for_weights(tmp_path, content, message, suffix):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(FastjacError, match=rf"w\.{suffix} {message}") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_what_holds_no_state_dict(tmp_path, donor):
    path = tmp_path / "w.pt"
    numpy.savez(tmp_path / "w.npz", a=numpy.ones(2, ">f4"))  # of another machine
    assert read_weights(tmp_path / "w.npz")["a"].tolist() == [1, 1]
    adam = torch.optim.Adam(donor.parameters()).state_dict()
    for content, message in (
        (list(donor.parameters()), "expected a state dict, .*; got list"),
        (torch.ones(3), "expected a state dict, .*; got Tensor"),
        (adam, "expected a state dict, .*; got no tensor under the keys 'state', 'param_groups'"),
        ({"fc.weight": numpy.array(["a"])}, "got no tensor under the keys 'fc.weight'"),
    ):
        torch.save(content, path)
        with pytest.raises(FastjacError, match=message):
            read_weights(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(FastjacError, match=r"w.pt is a TorchScript archive, which is code; expec"):
        read_weights(path)
    path.write_bytes(pickle.dumps(donor.state_dict(), protocol=4))
    with pytest.raises(FastjacError, match=r"tensors: it is not in the format of torch\.save"):
        read_weights(path)


def test_a_folder(tmp_path):
    with pytest.raises(FastjacError, match="is a folder; expected weights"):
        read_weights(tmp_path)


def test_damaged_anywhere(tmp_path, donor):
    """Bytes cut or changed at many places: read whole, or refused in one line."""
    path, lines = tmp_path / "w.pth", []
    torch.save({"state_dict": donor.state_dict(), "args": argparse.Namespace(a=1)}, path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 41):
        for content in (whole[:at], whole[:at] + b"\xff" + whole[at + 1 :]):
            path.write_bytes(content)
            try:
                read_weights(path)
            except FastjacError as error:
                lines.append(str(error))
    assert len(lines) > len(whole) // 41
    assert all(str(path) in line and "\n" not in line for line in lines)


@pytest.mark.parametrize("sums", [True, False])
def test_a_flipped_bit_is_found(tmp_path, donor, sums):
    """By the checksums, where the file has them."""
    path = tmp_path / "w.pth"
    torch.serialization.set_crc32_options(sums)
    try:
        torch.save(donor.state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    check(donor, path)
    content = bytearray(path.read_bytes())
    content[content.index(donor.fc.weight.detach().numpy().tobytes()) + 5] ^= 16
    path.write_bytes(content)
    if sums:
        with pytest.raises(FastjacError, match=r"w\.pth is damaged: the checksum of w/"):
            read_weights(path)


def test_a_file_whose_end_was_never_written(tmp_path, donor, caplog):
    """As some downloads leave it: of the right length, with zeros behind what has arrived."""
    path = tmp_path / "w.safetensors"
    save_file(donor.state_dict(), path)
    check(donor, path)
    assert not caplog.messages
    whole = path.read_bytes()
    path.write_bytes(whole[: -4 * 12] + bytes(4 * 12))
    load_weights(VGG("4 M", 3), read_weights(path), path)
    assert "1 weights are 0 everywhere, such as normalize.std: the end" in caplog.text


def test_no_code_of_a_file_is_run(tmp_path, donor):
    """What calls a function in the file is an empty object here, and the weights beside it arrive."""

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"state_dict": donor.state_dict(), "args": Bomb()}, tmp_path / "w.pth")
    check(donor, tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_auxiliary_heads_are_left_out(caplog):
    """They give GoogLeNet three outputs in training; a file with them fits the network without."""
    from torchvision.models import googlenet

    notice.cache_clear()  # another test may have built one

    theirs = googlenet(num_classes=3, init_weights=False)
    model = create_model(ModelSpec("torchvision/googlenet", num_classes=3))
    assert "torchvision/googlenet is built without its auxiliary heads" in caplog.text
    assert model.train()(torch.rand(2, 3, 64, 64)).shape == (2, 3)
    load_weights(model, theirs.state_dict(), "f", ignore_head=False)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(model.eval()(x), theirs.eval()(model.normalize(x)))


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v * torch.nan, "fc.weight is not a number in places; expected a plain tensor"),
        (lambda v: v / 0, "fc.weight is infinite in places; expected finite numbers"),
        (lambda v: v.double() * 1e300, "fc.weight is infinite in places; expected finite numbers"),
        (lambda v: v.to(torch.int8), "fc.weight is int8, expected floating point; dequantise it"),
        (lambda v: v > 0, "fc.weight is bool, expected floating point"),
        (lambda v: v.to_sparse(), "fc.weight is sparse_coo; expected a plain tensor"),
        (lambda v: torch.nested.nested_tensor([v]), "fc.weight is nested; expected a plain"),
        (lambda v: TwoTensor(v, v), "fc.weight is a TwoTensor; expected a plain tensor"),
        (lambda v: v.to("meta"), "fc.weight is on the meta device; expected a plain tensor"),
        (lambda v: v.to(torch.complex64), "fc.weight is complex64; expected a plain tensor"),
        (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "fc.weight is quantised; ex"),
    ],
)
def test_values_that_are_no_weights(tmp_path, donor, change, message):
    weights = donor.state_dict()
    torch.save(weights | {"fc.weight": change(weights["fc.weight"])}, tmp_path / "w.pth")
    model = VGG("4 M", 3)
    before = model.fc.weight.clone()
    with torch.serialization.safe_globals([TwoTensor]):
        weights = read_weights(tmp_path / "w.pth")
    with pytest.raises(FastjacError, match=f"f: {message}"):
        load_weights(model, weights, "f")
    assert torch.equal(model.fc.weight, before)


def test_one_network_under_two_names(arrives, resnet):
    arrives({"model": plain(resnet, "module.model.") | plain(resnet, "module.attacker.model.")})


@pytest.mark.parametrize("prefix", ["encoder.", "module.backbone."])
def test_a_head_beside_its_prefixed_body(arrives, resnet, prefix):
    weights = plain(resnet)
    for other in ("", "head.", "module.classifier."):
        arrives({(other if k.startswith("fc.") else prefix) + k: v for k, v in weights.items()})
    heads = {f"{h}.{k}": v for h in ("h1", "h2") for k, v in weights.items() if "fc." in k}
    body = {prefix + k: v for k, v in weights.items() if "fc." not in k}
    with pytest.raises(FastjacError, match=r"no fc\.weight; no fc\.bias; only the head differs"):
        load_weights(create_model(SPEC), body | heads, "f", ignore_head=False)
