"""The smallest model of every family in torchvision and timm: the engine against the double backward.

    python -m tests.zoo                                        # all families; hours on one core
    python -m tests.zoo --names timm/test_vit torchvision/resnet18
    python -m tests.zoo --shard 1/4 --json quarter.json

A family is a Python module of the library, its smallest model the one with the fewest parameters.
Random weights, train mode, float64, three images, the label's logit, both batch statistics. The
gradient that a nonlinear loss of J gives each parameter is compared between strategy="auto" and
strategy="autograd", whose attention runs with the math kernel and whose hard-sigmoid is spelt out:
PyTorch has no second derivative of either kernel. Each model has a process of its own; its verdict:

    exact            relative error of J, output, gradients and buffers under 1e-9 (1e-6 with a
                     hard-sigmoid or hard-swish, whose kernels hold 1/6 in float32, or where the
                     model itself computes something in float32)
    inexact          a larger error
    clear error      with_jacobian raised FastjacError
    raw error        any other exception, or the process ended early
    reference fails  PyTorch itself cannot run the model or its double backward
    too large        more parameters than --limit-parameters
    timed out        longer than --timeout

Exit status 1 if any model is inexact or raises a raw error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import fastjac

ROOT = Path(__file__).parents[1]
SIZES = (64, 96, 128, 160, 224)
BATCH = 3
TOLERANCE, SINGLE_PRECISION_TOLERANCE = 1e-9, 1e-6
FAILURES = ("inexact", "raw error")
# The verdict of a model is the first of these that one of its two batch statistics has.
VERDICTS = ("raw error", "inexact", "reference fails", "clear error", "exact")


@dataclasses.dataclass
class Result:
    """What was found for one model; ``pixels`` is the side of its square images."""

    name: str
    verdict: str
    detail: str = ""
    pixels: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        words = [f"{self.name:44} {self.verdict:15} {self.seconds:6.1f} s"]
        words += [f"{self.pixels} px"] if self.pixels else []
        return "  ".join([*words, self.detail]).rstrip()


# The models: which, and how they are made.


def smallest_models() -> list[tuple[int, str]]:
    """Parameters and name ("timm/..." or "torchvision/...") of each family's smallest model, sorted."""
    import timm
    import torchvision

    families = defaultdict(list)
    for model in timm.list_models():
        module = timm.models.model_entrypoint(model).__module__
        families[module].append(f"timm/{model}")
    for model in torchvision.models.list_models(module=torchvision.models):
        module = torchvision.models.get_model_builder(model).__module__
        families[module].append(f"torchvision/{model}")
    smallest = []
    for module, names in families.items():
        counted = [(count, name) for name in names if (count := _parameters(name)) is not None]
        if counted:
            smallest.append(min(counted))
        else:
            print(f"{module}: left out, none of its models could be counted", flush=True)
    return sorted(smallest)


def _parameters(name: str) -> int | None:
    """How many a model has, counted on the meta device: no memory, no initial values."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(p.numel() for p in make_model(name, None)[0].parameters())
    except Exception as error:  # of any kind: the constructors are not ours
        library, _, model = name.partition("/")
        if library == "torchvision":  # it computes widths with tensors; the weights name the count
            import torchvision

            return next(iter(torchvision.models.get_model_weights(model))).meta["num_params"]
        print(f"{name}: not counted: {_first_line(error)}", flush=True)
        return None


def make_model(name: str, size: int | None) -> tuple[nn.Module, bool]:
    """The model, and whether it was made for images of ``size`` (None: its own default)."""
    library, _, model = name.partition("/")
    if library == "timm":
        import timm

        make, sized, others = timm.create_model, "img_size", ({},)
    elif library == "torchvision":
        import torchvision

        make, sized = torchvision.models.get_model, "image_size"
        others = ({"init_weights": False}, {})  # GoogLeNet's own take a minute
    else:
        raise SystemExit(f"{name!r}: expected timm/<model> or torchvision/<model>")
    for options in ({} if size is None else {sized: size}, *others):
        with contextlib.suppress(TypeError):  # an unexpected keyword
            return make(model, **options), sized in options
    return make(model), False


def default_size(name: str) -> int | None:
    """The side of the images that the library's weights were trained on, if it says so."""
    library, _, model = name.partition("/")
    if library == "timm":
        import timm

        config = timm.models.get_pretrained_cfg(model)
        return config and config.input_size[-1]
    import torchvision

    weights = next(iter(torchvision.models.get_model_weights(model)))
    return weights.transforms().crop_size[0]


# One model.


class Watch(TorchFunctionMode):
    """Notes what a forward calls; with ``spell_out``, runs hard-sigmoids as differentiable twice."""

    def __init__(self, spell_out: bool = False) -> None:
        super().__init__()
        self.spell_out = spell_out
        self.single_precision = False
        self.values_per_channel = float("inf")  # the fewest that a train-mode BatchNorm averages

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training")):
            values = args[0].numel() // args[0].shape[1]
            self.values_per_channel = min(self.values_per_channel, values)
        if func in (F.hardsigmoid, F.hardswish):
            self.single_precision = True
            if self.spell_out:
                return self._spelt_out(func, *args, **kwargs)
        # The model casts its own float64 values down: in float64 too, it is exact to float32 alone.
        self.single_precision |= func is Tensor.float
        return func(*args, **kwargs)

    @staticmethod
    def _spelt_out(func: Any, input: Tensor, inplace: bool = False) -> Tensor:
        x = input.clone() if inplace else input
        gate = F.relu6(x + 3) / 6
        out = gate if func is F.hardsigmoid else x * gate
        return input.copy_(out) if inplace else out


class Unsuitable(Exception):
    """The model cannot be run at any image size that was tried."""


@dataclasses.dataclass
class Trial:
    """A model with an input that it takes."""

    model: nn.Module
    x: Tensor
    y: Tensor
    output: Callable[[Any], Tensor]
    single_precision: bool

    @classmethod
    def of(cls, name: str, values: int = 2) -> Trial:
        """With the smallest images for which each BatchNorm averages more than ``values`` values."""
        default = default_size(name)
        problem, model, sized = "no size was tried", None, True
        for size in sorted({*SIZES} | ({default} if default else set())):
            _seed(0)
            try:
                if sized:
                    model, sized = make_model(name, size)
                    model = model.double().train()
                x = torch.rand(BATCH, 3, size, size, dtype=torch.float64)
                with torch.no_grad(), Watch() as watch:
                    logits = one_row_each(model(x))
            except Exception as error:  # of any kind: the models are not ours
                problem = f"at {size} pixels: {_first_line(error)}"
                continue
            if watch.values_per_channel <= values:
                problem = f"at {size} pixels: a BatchNorm averages {values} values or fewer"
                continue
            _perturb_constants(model)
            y = torch.randint(logits.shape[1], (BATCH,))
            return cls(model, x, y, one_row_each, watch.single_precision)
        raise Unsuitable(problem)

    def step(self, batch_stats: str, strategy: str) -> dict[str, Tensor]:
        """J, output, every parameter's gradient and every buffer, named as relative_error reads them.

        The model's buffers are restored.
        """
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.model.zero_grad(set_to_none=True)
        _seed(1)
        try:
            # Another attention kernel lays its result out differently: dropout behind it would draw
            # another mask.
            with sdpa_kernel(SDPBackend.MATH):
                out = fastjac.with_jacobian(
                    self.model,
                    self.x,
                    fastjac.LabelLogit(),
                    self.y,
                    output=self.output,
                    batch_stats=batch_stats,
                    strategy=strategy,
                )
        except fastjac.FastjacError as error:
            raise ClearError(str(error)) from error
        try:
            loss(out.jacobian).backward()
            found = {
                "loss J": out.jacobian.detach(),
                "loss output": self.output(out.output).detach(),
            }
            for name, p in self.model.named_parameters():
                found[f"gradient of {name}"] = torch.zeros_like(p) if p.grad is None else p.grad
            for name, buffer in self.model.named_buffers():
                found[f"buffer {name}"] = buffer.clone()
        finally:
            self.model.zero_grad(set_to_none=True)
            for name, buffer in buffers.items():
                owner, _, key = name.rpartition(".")
                self.model.get_submodule(owner)._buffers[key] = buffer
        return found

    def reference(self, batch_stats: str) -> dict[str, Tensor]:
        """The double backward's step."""
        with sdpa_kernel(SDPBackend.MATH), Watch(spell_out=True) as watch:
            found = self.step(batch_stats, "autograd")
        self.single_precision |= watch.single_precision
        return found

    def sensitivity(self, batch_stats: str, wanted: dict[str, Tensor]) -> float:
        """The reference's own error where x moves by a few units in the last place."""
        x = self.x
        self.x = x * (1 + 1e-15 * torch.randn_like(x))
        try:
            return relative_error(self.reference(batch_stats), wanted)[0]
        finally:
            self.x = x


class ClearError(Exception):
    """with_jacobian raised FastjacError."""


def loss(j: Tensor) -> Tensor:
    """Nonlinear in J: a distance of directions, and the squared norm scaled to 1."""
    j = j.flatten(1)
    w = torch.randn(j.shape, generator=torch.Generator().manual_seed(2), dtype=j.dtype)
    directions = (F.normalize(j) - F.normalize(w)).square().sum()
    squares = j.square().sum()
    return directions + squares / squares.detach()


def one_row_each(output: Any) -> Tensor:
    """Of a model's output, ``[B, K]``: the first tensor of a structure, its pixels averaged."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output.flatten(2).mean(2) if output.dim() > 2 else output


def relative_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error, and of which entry; gradients weighed as in comparison.py."""
    largest = max(v.norm().item() for k, v in wanted.items() if k.startswith("gradient"))
    floors = {"loss": 0.0, "gradient": 1e-4 * largest, "buffer": 1.0}
    worst = (0.0, "")
    for name, expected in wanted.items():
        error = (got[name].double() - expected.double()).norm().item()
        scale = expected.double().norm().item() + floors[name.split()[0]]
        error = error / scale if scale else error
        if not error <= worst[0]:  # NaN is the worst of all
            worst = (error, name)
            if error != error:
                break
    return worst


def examine(name: str) -> Result:
    """The verdict on one model, in this process."""
    start = time.perf_counter()
    with warnings.catch_warnings(), _threads_and_random_numbers_restored():
        warnings.simplefilter("ignore")
        try:
            trial = Trial.of(name)
        except Unsuitable as problem:
            return Result(name, "reference fails", f"the forward fails {problem}")
        found = {b: _examine(trial, b) for b in ("frozen", "batch")}
        if "inexact" in {verdict for verdict, _ in found.values()}:
            # BatchNorms of few values amplify rounding: in larger images they have more.
            with contextlib.suppress(Unsuitable):
                trial = Trial.of(name, values=BATCH * 4)
                found = {b: _examine(trial, b) for b in ("frozen", "batch")}
    worst = min((verdict for verdict, _ in found.values()), key=VERDICTS.index)
    details = [f"{b}: {detail}" for b, (v, detail) in found.items() if v == worst]
    if len(details) == 2 and len({detail for _, detail in found.values()}) == 1:
        details = [found["frozen"][1]]
    seconds = time.perf_counter() - start
    return Result(name, worst, "; ".join(details), trial.x.shape[-1], round(seconds, 1))


def _examine(trial: Trial, batch_stats: str) -> tuple[str, str]:
    try:
        wanted = trial.reference(batch_stats)
    except Exception as error:  # of any kind: the models are not ours
        return "reference fails", _first_line(error)
    if not all(v.isfinite().all() for v in wanted.values()):
        return "reference fails", "its values are not finite"
    if not wanted["loss J"].norm():
        return "reference fails", "J is zero"
    try:
        got = trial.step(batch_stats, "auto")
    except ClearError as error:
        return "clear error", _first_line(error)
    except Exception as error:
        return "raw error", _first_line(error)
    error, where = relative_error(got, wanted)
    if error < (SINGLE_PRECISION_TOLERANCE if trial.single_precision else TOLERANCE):
        return "exact", f"{error:.0e}" + (" (float32 in it)" if trial.single_precision else "")
    moved = trial.sensitivity(batch_stats, wanted)
    return "inexact", f"{error:.1e} in {where} (with x moved by 1e-15: {moved:.0e})"


def _perturb_constants(model: nn.Module) -> None:
    """Random numbers for parameters that are constant: a gamma of zero hides the branch behind it."""
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() and p.std(correction=0) < 1e-3:
                p.add_(torch.randn_like(p), alpha=0.1)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the generator that a model would draw from)


@contextlib.contextmanager
def _threads_and_random_numbers_restored() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, ClearError) else f"{type(error).__name__}: {text}"


# All of them.


def examine_in_process(name: str, timeout: float) -> Result:
    """The verdict on one model, from a process of its own with one thread."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "tests.zoo", "--in-process", name]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return Result(name, "timed out", seconds=round(time.perf_counter() - start, 1))
    if run.returncode != 0:
        said = (run.stderr.strip() or f"no message, exit status {run.returncode}").splitlines()[-1]
        seconds = round(time.perf_counter() - start, 1)
        return Result(name, "raw error", f"the process ended: {said}", seconds=seconds)
    return Result(**json.loads(run.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.zoo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--names", nargs="+", metavar="NAME", help="these models, not all families")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--limit-parameters", type=float, default=60, metavar="N", help="in millions"
    )
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="for one model")
    parser.add_argument("--in-process", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        print(json.dumps(dataclasses.asdict(examine(options.in_process))))
        return 0
    index, parts = map(int, options.shard.split("/"))
    if options.names:
        models = [(_parameters(name) or 0, name) for name in options.names]
    else:
        models = smallest_models()
    results = []
    for count, name in models[index - 1 :: parts]:
        if count > 1e6 * options.limit_parameters:
            result = Result(name, "too large", f"{count / 1e6:.0f} million parameters")
        else:
            result = examine_in_process(name, options.timeout)
        results.append(result)
        print(result, flush=True)
        if options.json:
            rows = [dataclasses.asdict(r) for r in results]
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    counts = Counter(r.verdict for r in results)
    print(f"{len(results)} models: " + ", ".join(f"{n} {v}" for v, n in counts.most_common()))
    return int(any(counts[v] for v in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
