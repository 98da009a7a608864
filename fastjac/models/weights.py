"""Weights from a file, for the network they belong to and no other."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastjac.errors import FastjacError, first_line, notice
from fastjac.models.create import find_head
from fastjac.models.efficientnet_pytorch import as_timm, is_efficientnet_pytorch

# The keys that other trainers save weights at.
_EMA = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "params_ema",
    "ema",
    "swa_model",
)
_PLAIN = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "params")
# Parts of a checkpoint that hold tensors and are no network.
_NO_NETWORK = ("optim", "sched", "scaler", "rng", "criterion")
# The names of modules that wrap another: DistributedDataParallel, compile, FSDP, checkpoints.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class _Opaque:
    """Stands for any class or function that a file names: what it would make is an empty mapping.

    A mapping, since torch's unpickler adds items to those alone; a module's state is in its __dict__.
    What is made of a module is that module, as torch.compile's wrapper is.
    """

    def __new__(cls, *args: Any) -> OrderedDict:
        modules = [each for each in args if "_modules" in getattr(each, "__dict__", {})]
        return modules[0] if modules else OrderedDict()


class _OpaqueNumpy:
    """The same for what else of NumPy a file names, a generator's state say, which may be a tuple."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _stand_in(name: str, arrays: bool) -> Any:
    """What torch's unpickler may make of the class or function ``name``; ``arrays``: NumPy's too."""
    package, _, last = name.rpartition(".")
    if package.partition(".")[0] != "numpy":
        return _Opaque
    if not arrays:
        return _OpaqueNumpy
    if package in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):  # of NumPy 1 and 2
        return _OF_ARRAYS.get(last, _OpaqueNumpy)
    return _OpaqueNumpy


# What arrays and scalars of numbers are pickled by.
_OF_ARRAYS = {
    "ndarray": numpy.ndarray,
    "dtype": numpy.dtype,
    "_reconstruct": numpy.zeros(1).__reduce__()[0],
    "scalar": numpy.float64(1).__reduce__()[0],
}
# The types of numbers: torch's unpickler sets no state of a class that it does not know.
_NUMPY_TYPES = [type(numpy.dtype(code)) for code in "?bhilqBHILQefdFD"]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a ``.pt`` or ``.pth`` file holds: tensors, arrays and plain data, on the CPU; no code is run.

    An object of any other class is replaced by an empty one.
    """
    path = Path(path)
    content = _load(path, _first_bytes(path))
    if not isinstance(content, dict):
        raise FastjacError(f"{path}: expected a state dict, got {type(content).__name__}")
    return content


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors``, ``.pth``, ``.pt`` or ``.npz`` file.

    It may lie at a key of a checkpoint (``state_dict``, ``model`` and the like), or be a whole module,
    of which only the tensors are read. An exponential moving average is preferred, with a notice.
    """
    path = Path(path)
    start = _first_bytes(path)
    if start[8:9] == b"{" or (path.suffix == ".safetensors" and start[:2] != b"PK"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise FastjacError(f"{path} is not a safetensors file: {error}") from error
    content = _load_numpy(path) if path.suffix == ".npz" else _load(path, start)
    weights = _state_dict(content, path)
    if not weights:
        got = type(content).__name__
        if isinstance(content, Mapping):
            got = f"no tensor under the keys {', '.join(repr(k)[:60] for k in list(content)[:4])}"
        raise FastjacError(
            f"{path}: expected a state dict, a mapping of names to plain tensors; got {got}"
        )
    return weights


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: str | Path, ignore_head: bool = True
) -> None:
    """Copy ``weights`` into ``model``; every name and shape must be the model's.

    Names lose what wrappers put before them (``module.``, ``_orig_mod.``, a LightningModule's
    ``model.``), and those of EfficientNet-PyTorch become timm's. Absent may be ``normalize.mean`` and
    ``normalize.std``, as they are from another library's file, and BatchNorm's counters, as from an old
    one: the model's stay. So does a head for another number of classes, with a notice, if
    ``ignore_head``. Weights of auxiliary heads that the model is built without are left out. ``source``
    is named in the error.
    """
    own = model.state_dict()
    head = find_head(model)[0] + "."
    _check_values(weights, source)
    weights = _renamed(weights, own, head, source)
    if is_efficientnet_pytorch(weights):
        weights = as_timm(weights, own)
    reshaped = [k for k in own if k in weights and weights[k].shape != own[k].shape]
    classes = own[f"{head}weight"].shape[:1] if f"{head}weight" in own else None
    heads = [head]  # and auxiliary ones
    heads += [k.removesuffix("weight") for k in reshaped if own[k].shape[:1] == classes]
    missing = [
        k for k in own if k not in weights and not k.startswith("normalize.")
        and not k.endswith(".num_batches_tracked")
    ]  # fmt: skip
    off = {k for k in weights if getattr(model, k.partition(".")[0], model) is None}
    surplus = [k for k in weights if k not in own and k not in off]
    _check_numbers(own, {k: weights[k] for k in own if k in weights}, source)
    if different := [*reshaped, *missing, *surplus]:
        in_head = all(k.startswith(tuple(heads)) for k in different) and all(
            weights[k].shape[1:] == own[k].shape[1:] for k in reshaped
        )
        if not (in_head and ignore_head):
            _refuse(model, weights, source, (reshaped, missing, surplus), in_head)
        kept = sorted({k.rpartition(".")[0] for k in different})
        notice(
            f"{source}: its head ({', '.join(kept)}) is left out, being of another size or absent"
        )
    model.load_state_dict({k: v for k, v in weights.items() if k not in different}, strict=False)


def _check_values(weights: dict[str, Tensor], source: str | Path) -> None:
    """Raise for tensors that a copy would fail for, or whose values are no weights."""
    for name, value in weights.items():
        if value.layout is not torch.strided:
            kind = str(value.layout).removeprefix("torch.")
        elif value.is_nested:
            kind = "nested"
        elif is_traceable_wrapper_subclass(value):  # a DTensor, a part of a weight perhaps
            kind = f"a {type(value).__name__}"
        elif value.is_quantized:
            kind = "quantised"
        elif value.is_meta:
            kind = "on the meta device"
        elif value.is_complex():
            kind = str(value.dtype).removeprefix("torch.")
        elif value.isnan().any():
            kind = "not a number in places"
        else:
            continue
        raise FastjacError(f"{source}: {name} is {kind}; expected a plain tensor of real numbers")


def _check_numbers(own: dict[str, Tensor], weights: dict[str, Tensor], source: str | Path) -> None:
    """Raise for numbers that are no longer themselves in the types of ``own``; tell of empty weights."""
    empty = [k for k, v in weights.items() if v.dim() > 1 and not v.any() and own[k].any()]
    if empty:
        notice(
            f"{source}: {len(empty)} weights are 0 everywhere, such as {empty[0]}: the end of the "
            "file may never have been written"
        )
    for k, value in weights.items():
        if own[k].is_floating_point() and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise FastjacError(f"{source}: {k} is {kind}, expected floating point; dequantise it")
        if value.to(own[k].dtype).isinf().any() and not own[k].isinf().any():
            raise FastjacError(f"{source}: {k} is infinite in places; expected finite numbers")


def _refuse(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str | Path,
    different: tuple[list[str], list[str], list[str]],
    in_head: bool,
) -> None:
    own, (reshaped, missing, surplus) = model.state_dict(), different
    problems = [f"{k} is {list(weights[k].shape)}, expected {list(own[k].shape)}" for k in reshaped]
    problems += [f"no {k}" for k in missing] + [f"unexpected {k}" for k in surplus]
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    advice = ""
    if in_head:
        advice = "; only the head differs, which --ignore-head leaves out of --weights"
    elif len(missing) == len(problems) and all(k.endswith(_STATISTICS) for k in missing):
        advice = "; only BatchNorm's statistics are absent: save state_dict(), not parameters()"
    raise FastjacError(
        f"{source} holds another model than this {type(model).__name__}: "
        f"{'; '.join(problems[:3])}{more}{advice}"
    )


_STATISTICS = (".running_mean", ".running_var")


def _first_bytes(path: Path) -> bytes:
    """The start of the file; raises for what people take for weights and is something else."""
    expected = "expected weights (.safetensors, .pth, .pt or .npz)"
    if path.is_dir():
        raise FastjacError(f"{path} is a folder; {expected}")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError as error:
        raise FastjacError(f"{path}: no such file; {expected}") from error
    except OSError as error:
        raise FastjacError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise FastjacError(f"{path} is not a weights file: it is empty; {expected}")
    if start.startswith(b"version https://git-lfs"):
        raise FastjacError(f"{path} is a Git LFS pointer; 'git lfs pull' fetches the weights")
    if start[8:9] == b"{":  # of safetensors, after a number that may look like any of these
        return start
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise FastjacError(f"{path} is compressed; {expected}: unpack it")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise FastjacError(f"{path} is a web page; {expected}: download the file itself")
    return start


def _load(path: Path, start: bytes) -> Any:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file from before PyTorch 1.6, which cannot be searched, or a damaged one
        unknown = []
    try:
        content = _unpickle(path, unknown)
    except Exception as error:  # damaged bytes may raise anything
        if "TorchScript" in str(error):
            raise FastjacError(
                f"{path} is a TorchScript archive, which is code; expected a state dict: "
                "torch.save(torch.jit.load(...).state_dict(), ...) makes one"
            ) from error
        of_torch = start.startswith(b"\x80\x02") or b"/data.pkl" in start  # or from before 1.6
        reason = _reason(error) if of_torch else "it is not in the format of torch.save"
        raise FastjacError(
            f"{path} is not a readable PyTorch file of plain tensors: {reason}"
        ) from error
    _check_sums(path)
    return content


def _check_sums(path: Path) -> None:
    """Raise if a byte of the file is another than was written, which ``torch.load`` does not see."""
    if not zipfile.is_zipfile(path):  # from before 1.6
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            wrong = [name for name in names if not _sum_is_right(archive, name)]
    except Exception as error:  # as above
        raise FastjacError(f"{path} is damaged: {first_line(error)}") from error
    if wrong and len(wrong) < len(names):  # all: PyTorch was told to write none
        raise FastjacError(f"{path} is damaged: the checksum of {wrong[0]} in it is wrong")


def _sum_is_right(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as part:
            while part.read(1 << 24):
                pass
    except (zipfile.BadZipFile, EOFError):
        return False
    return True


def _reason(error: Exception) -> str:
    """What is wrong, in PyTorch's words, less its advice to run the code in the file."""
    if code := re.search(r"unsupported GLOBAL (\S+) whose module", str(error)):
        return f"it would run {code[1]}"
    if isinstance(error, OSError) or "central directory" in str(error):
        return "it is cut off or damaged"
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    first = (text.strip() or type(error).__name__).splitlines()[0]
    return re.split(r"\. (?:In PyTorch 2\.6|This is an internal miniz error)", first)[0]


def _unpickle(path: Path, unknown: list[str]) -> Any:
    """What the file holds, with stand-ins for the classes ``unknown`` and those found on the way."""
    arrays = True
    while True:
        safe = [(_stand_in(name, arrays), name) for name in unknown]
        try:
            with (
                torch.serialization.safe_globals([*_NUMPY_TYPES, *safe]),
                warnings.catch_warnings(),
                path.open("rb") as file,
            ):
                warnings.simplefilter("ignore")  # the error says what they announce
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            found = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
            if found and found[1] not in unknown:
                unknown = [*unknown, found[1]]
            elif arrays and "numpy.dtypes" in str(error):
                arrays = False  # of texts, records or objects: no weights
            else:
                raise


def _load_numpy(path: Path) -> dict[str, Tensor]:
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(_native(array)) for name, array in arrays.items()}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise FastjacError(f"{path} is not a readable .npz file of arrays: {error}") from error


def _state_dict(content: Any, path: Path, depth: int = 0) -> dict[str, Tensor]:
    """The state dict in ``content``, empty if there is none."""
    if "_modules" in (state := getattr(content, "__dict__", {})):
        return _module_tensors(state)
    if not isinstance(content, Mapping) or depth > 3:
        return {}
    inside = {
        key: found
        for key, value in content.items()
        if isinstance(key, str)
        and not any(word in key.lower() for word in _NO_NETWORK)
        and (found := _state_dict(value, path, depth + 1))
    }
    for key in (*_EMA, *_PLAIN):
        if key in inside:
            if key in _EMA:
                notice(f"{path}: the averaged weights are taken, those at {key!r}")
            return inside[key]
    tensors = {k: v for k, v in map(_as_tensor, content.items()) if v is not None}
    if inside and all(v.dim() == 0 for v in tensors.values()):  # an accuracy beside the network
        tensors = {}
    if not tensors and len(inside) > 1:
        raise FastjacError(
            f"{path} holds several networks: {', '.join(map(repr, inside))}; expected one; save "
            "it alone"
        )
    return tensors or next(iter(inside.values()), {})


def _native(values: Any) -> numpy.ndarray:
    """``values`` in this machine's order of bytes."""
    array = numpy.asarray(values)
    return array.astype(array.dtype.newbyteorder("="))


def _as_tensor(item: tuple[Any, Any]) -> tuple[Any, Tensor | None]:
    """A name and its tensor, also of an array of numbers; None for all else."""
    name, value = item
    if isinstance(value, numpy.ndarray) and value.dtype.char in "?bhilqBefdFD":
        value = torch.from_numpy(_native(value))
    return name, value if isinstance(name, str) and isinstance(value, Tensor) else None


def _module_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a pickled module, from the __dict__ of what stands for it."""
    tensors = {
        name: value
        for kind in ("_parameters", "_buffers")
        for name, value in state.get(kind, {}).items()
        if isinstance(value, Tensor) and name not in state.get("_non_persistent_buffers_set", ())
    }
    for name, module in state["_modules"].items():
        if "_modules" in (inner := getattr(module, "__dict__", {})):
            tensors |= {f"{name}.{key}": value for key, value in _module_tensors(inner).items()}
    return {name: value.detach() for name, value in tensors.items()}


def _renamed(
    weights: dict[str, Tensor], own: dict[str, Tensor], head: str, source: str | Path
) -> dict[str, Tensor]:
    """``weights`` by the names in ``own``, where wrappers had changed them."""
    wrappers = _WRAPPERS - {part for name in own for part in name.split(".")}
    plain = {".".join(p for p in k.split(".") if p not in wrappers): v for k, v in weights.items()}
    if len(plain) < len(weights):
        raise FastjacError(
            f"{source} holds a network twice, with and without a wrapper ({', '.join(wrappers)})"
        )
    if "n_averaged" not in own:  # torch.optim.swa_utils.AveragedModel's counter
        plain.pop("n_averaged", None)
    body = [
        k for k in own
        if not k.startswith(("normalize.", head)) and not k.endswith(".num_batches_tracked")
    ]  # fmt: skip
    if not body or any(k in plain for k in body):
        return plain
    ends = [k.removesuffix(body[0]) for k in plain if k.endswith(f".{body[0]}")]
    prefixes: list[str] = []
    for p in (p for p in ends if all(p + k in plain for k in body)):
        # An attribute of two modules, as robustness saves one, is there twice and is one network.
        if not any(all(torch.equal(plain[p + k], plain[q + k]) for k in body) for q in prefixes):
            prefixes.append(p)
    if len(prefixes) > 1:
        raise FastjacError(
            f"{source} holds several networks: {', '.join(prefixes)}; expected one; save it alone"
        )
    if not prefixes:
        return plain
    cut = len(prefixes[0])
    inside = {k[cut:]: v for k, v in plain.items() if k.startswith(prefixes[0])}
    outside = {}  # where a head may be, under a prefix of its own
    for k in (k for k in own if k.startswith(head) and k not in inside):
        named = [name for name in plain if f".{name}".endswith(f".{k}")]
        if len(named) == 1:
            outside[k] = plain[named[0]]
    return outside | inside
