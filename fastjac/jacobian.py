"""The input Jacobian of any model, as a tensor that any loss can be taken of."""

from __future__ import annotations

import functools
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastjac import engine, reference
from fastjac.errors import FastjacError, unknown
from fastjac.features import capture, find_layer
from fastjac.fusion import PIECEWISE_LINEAR
from fastjac.fusion.mode import eager_regions, runs_unfused, tensors_in
from fastjac.targets import AttentionWindow, Target, check_targets

STRATEGIES = ("auto", "local", "dense", "autograd")
BATCH_STATS = ("frozen", "batch")
Output = str | int | Callable[[Any], Any] | None


@dataclass
class JacobianOutput:
    """What :func:`with_jacobian` gives.

    For a tuple of targets, ``features`` and ``jacobian`` are tuples.
    ``output`` is what the model returned; ``features`` the output of the target's layer, or None;
    ``jacobian`` d(sum of phi)/dx, ``[B, ...]`` as x, or ``[B, K, ...]`` where phi is ``[B, K]``.
    """

    output: Any
    features: Any
    jacobian: Any


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep ``function`` an eager region of a compiled loop."""

    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        # Where it is not imported nothing is compiled, and importing it takes a second.
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=_EAGER)
            disabled = torch.compiler.disable(function, reason=_EAGER)
        return disabled(*args, **kwargs)

    return run


_EAGER = (
    "fastjac runs eagerly: it records the model's own Python, and its sweeps launch few, large "
    "operators; expected torch.compile without fullgraph=True"
)


@eager
def with_jacobian(
    model: nn.Module,
    x: Tensor,
    target: Target | tuple[Target, ...],
    y: Any = None,
    *,
    output: Output = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    batch_stats: str = "frozen",
    strategy: str = "auto",
) -> JacobianOutput:
    """Run ``model(x, *args, **kwargs)``, and take J = d(sum of phi)/dx of the target's scalar phi.

    J is an ordinary tensor of the autograd graph: any loss of it can be differentiated, once, in the
    model's parameters and in x. There is no double backward: the gradient is a forward sweep of
    tangents. The model's own Python runs, once, and what ran is what is differentiated.

    Args:
        model: any module; it runs in the mode it is in (train-mode BatchNorms update their statistics).
        x: ``[B, ...]``, floating-point: images, series, volumes, embeddings. Where it requires grad, the
            loss is differentiated in x too, through J as well, as PyTorch does it; that takes time, so
            detach an x that needs no gradient. The model sees a copy on write: until the backward has
            run, a write to x gives x new memory, and a write to a NumPy array of the same memory
            changes the gradient, unnoticed.
        target: a :class:`~fastjac.targets.Target`, or a tuple of them, all taken from one forward.
        y: what the target reads beside the output: labels, usually.
        output: which tensor the target reads, where the model returns a structure: a key or attribute,
            an index, or a function of what it returned.
        args: further arguments of the model, constants of the Jacobian.
        kwargs: likewise, by name.
        batch_stats: how a train-mode BatchNorm counts. ``"frozen"``: its statistics come from the
            batch, are constants in d/dx, and functions of the parameters in d/dtheta; J_i is then a
            function of sample i alone. ``"batch"``: as autograd has it, cross-sample terms included.
        strategy: ``"dense"`` and ``"local"`` run on full maps or on the crops that a window sees;
            ``"auto"``: local where the statistics allow it and the support is under half of x;
            ``"autograd"``: the double backward, the reference.

    Raises :class:`fastjac.FastjacError` for bad input, for a target that does not depend on x, for a
    value that was computed where PyTorch's Python functions do not reach, and for a second derivative
    of J. Deterministic where the model's operations are. Under ``torch.no_grad()`` and
    ``torch.inference_mode()`` all results are detached. In ``torch.compile`` it is an eager region.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> x, y = torch.rand(5, 4), torch.tensor([0, 2, 1, 0, 1])
    >>> out = fastjac.with_jacobian(model, x, fastjac.LabelLogit(), y)
    >>> loss = torch.nn.functional.cross_entropy(out.output, y) + out.jacobian.square().sum(1).mean()
    >>> loss.backward()
    >>> out.jacobian.shape
    torch.Size([5, 4])
    """
    targets = check_targets(target)
    check_options(batch_stats, strategy)
    _check_input(x, model, args, kwargs)
    with ordinary_tensors((x, y, args, kwargs), model) as (x, y, args, kwargs):
        if strategy == "autograd":
            result, features, jacobians = reference.forward_and_jacobian(
                *(model, x, targets, y),
                select=selector(output, model),
                args=args,
                kwargs=kwargs,
                batch_stats=batch_stats,
                create_graph=torch.is_grad_enabled(),
            )
            if not torch.is_grad_enabled():
                jacobians = tuple(j.detach() for j in jacobians)
        else:
            run = Forward(model, x, targets, output, args, kwargs, batch_stats)
            jacobians = tuple(run.jacobian(t, i, y, strategy).values for i, t in enumerate(targets))
            result, features = run.finish()
    if isinstance(target, tuple):
        return JacobianOutput(result, tuple(features), tuple(jacobians))
    return JacobianOutput(result, features[0], jacobians[0])


@eager
def input_jacobian(
    model: nn.Module,
    x: Tensor,
    target: Target | tuple[Target, ...],
    y: Any = None,
    position: Tensor | None = None,
    batch_stats: str = "frozen",
    strategy: str = "auto",
    *,
    output: Output = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """J of :func:`with_jacobian`, detached.

    ``position``: for :class:`~fastjac.AttentionWindow`, the window's first row and column, ``[B, 2]``
    (int64); None: the argmax of the model's own pooled attention map. Everything else as there.

    >>> import torch
    >>> fastjac.input_jacobian(torch.nn.Linear(4, 3), torch.rand(2, 4), fastjac.LabelLogit(),
    ...                        torch.tensor([0, 1])).shape
    torch.Size([2, 4])
    """
    if position is not None:
        if not isinstance(target, AttentionWindow):
            raise FastjacError(
                f"position is for AttentionWindow; the target is {type(target).__name__}"
            )
        target = target.at(position)
    options = {"args": args, "kwargs": kwargs, "batch_stats": batch_stats, "strategy": strategy}
    with torch.no_grad():
        return with_jacobian(model, x, target, y, output=output, **options).jacobian


@contextmanager
def errors_of_script() -> Iterator[None]:
    """TorchScript tells an error that is raised in what it calls as text, in an error of its own."""
    try:
        yield
    except RuntimeError as error:
        told = re.search(r"FastjacError: (.+)", str(error))
        if told is None:
            raise
        raise FastjacError(told[1]) from error


class Forward:
    """One recorded forward of a model, from which Jacobians are taken."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        targets: tuple[Target, ...],
        output: Output,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        batch_stats: str,
    ) -> None:
        self.differentiable = torch.is_grad_enabled()
        activations = frozenset() if runs_unfused(model) else PIECEWISE_LINEAR
        self.tape = engine.Tape(model, x, activations, batch_stats, self.differentiable)
        self.batch = len(x)
        layers = [t.layer for t in targets]
        self._reads_output = not all(t.features_alone for t in targets)
        with torch.enable_grad(), eager_regions(), ExitStack() as stack:
            features = stack.enter_context(capture(model, layers))
            stack.enter_context(engine.synchronised_batch_norms())
            if not self._reads_output:
                hook = _Stop(self.tape, features, set(layers))
                for layer in hook.layers:
                    handle = find_layer(model, layer).register_forward_hook(hook)
                    stack.callback(handle.remove)
            with self.tape, errors_of_script():
                self.result = model(self.tape.x, *args, **dict(kwargs or {}))
        self.features: list[Any] = [features.get(layer or "") for layer in layers]
        self._select = selector(output, model)
        self._read: Any = None

    @property
    def read(self) -> Any:
        """What the targets read of the model's output."""
        if self._read is None:
            if self._reads_output:
                self._read = self._recorded(self._select, self.result)
            else:
                self._read = self._select(self.result)
        return self._read

    def _recorded(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` as a part of the tape."""
        self.tape.recording = True
        with torch.enable_grad(), self.tape:
            return function(*args)

    def jacobian(
        self, target: Target, place: int, y: Any, strategy: str, whole: bool = True
    ) -> engine.InputJacobian:
        """J of the ``place``-th target."""
        rows, stacked = self.rows(target, place, y, strategy)
        return engine.input_jacobian(rows, stacked, whole)

    def rows(
        self, target: Target, place: int, y: Any, strategy: str
    ) -> tuple[list[engine.Linearization], bool]:
        """The derivative of each column of the target's phi, and whether phi is ``[B, K]``."""
        features, tape = self.features[place], self.tape
        tape.check_nodes()
        read: Any = None if target.features_alone else self.read
        with torch.no_grad():
            head = target.head(read, features, y)
            if head is not None:
                tensor = features if head.reads == "features" else read
                number = self._number(target, tensor)
                row = engine.linearize(tape, number, head.grad, head, tensor, strategy)
                return [row], False
        phi = self._recorded(target.scalar, read, features, y)
        target.check_scalar(phi, self.batch)
        number = self._number(target, phi)
        stacked = phi.dim() == 2
        if stacked and not phi.shape[1]:
            raise FastjacError(
                f"{type(target).__name__}: scalar must be [B] or [B, K] with K of at least 1; got "
                f"{list(phi.shape)}"
            )
        if strategy == "local":
            raise FastjacError(
                "strategy='local' needs a target with local support; global: "
                f"{type(target).__name__}"
            )
        seeds = [torch.ones_like(phi.detach())]
        if stacked:
            seeds = []
            for k in range(phi.shape[1]):
                seeds.append(torch.zeros_like(phi.detach()))
                seeds[-1][:, k].fill_(1)
        return [engine.linearize(tape, number, s, None, None, strategy) for s in seeds], stacked

    def _number(self, target: Target, tensor: Tensor) -> int:
        with torch.enable_grad():
            number = self.tape.number_of(tensor, f"the target {type(target).__name__}")
        if number is None:
            raise FastjacError(
                f"the target does not depend on the input x ({type(target).__name__}): no gradient "
                "of its scalar leads there (a detach, no_grad or integer operation on the way?)"
            )
        return number

    def selected(self, result: Any) -> Tensor:
        """What the targets read of a model's output."""
        return self._select(result)

    def finish(self) -> tuple[Any, list[Any]]:
        """What the model returned, and the features, with the graph of the parameters alone."""
        tape, self.tape.recording = self.tape, False

        def loose(tensor: Tensor) -> Tensor:
            known = tape.value(tensor)
            if not self.differentiable or (known is not None and not known.trainable):
                return tensor.detach()
            return tensor

        if self.differentiable and not any(
            (known := tape.value(t)) is not None and not known.trainable
            for t in tensors_in(self.result, self.features)
        ):
            return self.result, self.features
        return reference.map_structure(loose, self.result), [
            None if f is None else loose(f) for f in self.features
        ]


class _Stop:
    """A forward hook that ends the recording once every target's layer has run."""

    def __init__(
        self, tape: engine.Tape, features: Mapping[str, Tensor], layers: set[str | None]
    ) -> None:
        self.tape, self.features, self.layers = tape, features, layers
        self.thread = threading.get_ident()

    def __call__(self, module: nn.Module, args: Any, value: Any) -> Any:
        if threading.get_ident() != self.thread or not self.layers <= self.features.keys():
            return None
        self.tape.recording = False
        if not self.tape.differentiable:
            torch.set_grad_enabled(False)
        elif not self.tape.trains(value):
            return value.detach()  # the layers behind it need no gradient of x
        return None


def selector(output: Output, model: nn.Module) -> Callable[[Any], Tensor]:
    """The function from a model's output to the tensor that targets read."""

    def select(result: Any) -> Tensor:
        read = _pick(result, output, model)
        if isinstance(read, Tensor):
            return read
        name, kind = type(model).__name__, type(read).__name__
        if output is None:
            choices = ", ".join(map(repr, _keys(read)))
            raise FastjacError(
                f"{name} must return one tensor, or output= must say which; got {kind}"
                + (f" with {choices}" if choices else "")
            )
        raise FastjacError(f"output={output!r} of {name} must be a tensor; got {kind}")

    return select


def _keys(structure: Any) -> list[Any]:
    """What ``output=`` may be for a structure."""
    if isinstance(structure, Mapping):
        return list(structure)
    if isinstance(structure, tuple | list):
        return list(range(len(structure)))
    return sorted(getattr(structure, "__dict__", {}))


def _pick(result: Any, output: Output, model: nn.Module) -> Any:
    if output is None:
        return result
    if isinstance(output, str | int) and isinstance(result, Tensor):
        raise FastjacError(
            f"output={output!r}: {type(model).__name__} returned one tensor, {list(result.shape)}; "
            "expected a structure (in JacobianMatching, teacher_output= is for the teacher alone: "
            "lambda output: output takes its tensor)"
        )
    if isinstance(output, str) and not isinstance(result, Mapping):
        if hasattr(result, output):
            return getattr(result, output)
        raise unknown("output", output, getattr(result, "__dict__", {}), type(result).__name__)
    if callable(output):
        return output(result)
    if not isinstance(output, str | int):
        raise FastjacError(
            f"output: expected a key, an attribute, an index or a function; got {output!r}"
        )
    try:
        return result[output]
    except (KeyError, IndexError, TypeError) as error:
        raise FastjacError(
            f"output={output!r}: {type(model).__name__} returned {type(result).__name__}, which has "
            f"no such item ({error})"
        ) from None


def check_options(batch_stats: str, strategy: str) -> None:
    """Raise for an unknown name, with the nearest right ones."""
    for kind, value, known in (
        ("batch_stats", batch_stats, BATCH_STATS),
        ("strategy", strategy, STRATEGIES),
    ):
        if value not in known:
            raise unknown(kind, value, known)


def _check_input(x: Any, model: nn.Module, args: Any, kwargs: Any) -> None:
    check_input(x, model, "model")
    if not isinstance(args, tuple | list):
        raise FastjacError(
            "args: expected a tuple of the model's further inputs, got "
            f"{type(args).__name__}; of a single one, (value,)"
        )
    if not isinstance(kwargs, Mapping | None):
        raise FastjacError(
            f"kwargs: expected a dict of the model's further inputs, got {type(kwargs).__name__}"
        )
    for name, given in (("args", tensors_in(args)), ("kwargs", tensors_in(kwargs or {}))):
        if any(t is x for t in given):
            raise FastjacError(
                f"{name} has x itself, which would be a constant there; expected a model that "
                "reads x once"
            )


def check_module(model: Any, name: str) -> None:
    """Raise unless the model is a module."""
    if not isinstance(model, nn.Module):
        raise FastjacError(
            f"{name}: expected a torch.nn.Module, got {type(model).__name__}; of a function, a Module "
            "whose forward calls it, with the networks in attributes"
        )


def check_input(x: Any, model: nn.Module, name: str) -> None:
    """Raise unless x is a batch that the model can take."""
    check_module(model, name)
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
        came = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        advice = ""
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            advice = "; x.float() / 255 makes floats of pixels"
        elif isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64):
            advice = "; ids have no gradient, their embeddings have: let x be those"
        raise FastjacError(f"x: expected a floating-point batch [B, ...], got {came}{advice}")
    if x.is_nested or x.is_mkldnn:
        kind = "a nested tensor" if x.is_nested else "an MKL-DNN tensor"
        raise FastjacError(
            f"x: expected an ordinary tensor, padded where lengths differ; got {kind}"
        )
    if torch._C._are_functorch_transforms_active():
        raise FastjacError(
            "fastjac runs inside of a torch.func transform (grad, vmap, jvp, ...), which cannot pass "
            "through it; expected a backward of a loss of its outputs"
        )
    parameter = _first_parameter(model)
    if parameter is None:
        return
    if parameter.device != x.device:
        raise FastjacError(f"x is on {x.device}; the {name} is on {parameter.device}")
    other = parameter.is_floating_point() and all(p.dtype != x.dtype for p in model.parameters())
    if other and not torch.is_autocast_enabled(x.device.type):
        raise FastjacError(f"x is {x.dtype}; the {name} is {parameter.dtype}")


def _first_parameter(model: nn.Module) -> Tensor | None:
    return next((p for p in model.parameters() if not is_lazy(p)), None)


class ordinary_tensors:  # noqa: N801  used as a function
    """Outside of inference mode, whose tensors have no derivative: copies of what is one of them.

    ``models`` that were built in inference mode run on aliases of their parameters and buffers.
    """

    def __init__(self, values: Any, *models: nn.Module) -> None:
        self.values, self.models, self.stack = values, models, ExitStack()

    def __enter__(self) -> Any:
        inference = torch.is_inference_mode_enabled()
        if inference:
            self.stack.enter_context(torch.inference_mode(False))
            self.stack.enter_context(torch.no_grad())
        for model in self.models:
            first = _first_parameter(model)
            if first is not None and first.is_inference():
                self.stack.callback(_use_aliases(model))
        if not inference and not self.values[0].is_inference():
            return self.values
        return reference.map_structure(_ordinary, self.values)

    def __exit__(self, *error: Any) -> None:
        self.stack.close()


def _ordinary(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _use_aliases(model: nn.Module) -> Callable[[], None]:
    """Put ordinary tensors on the same memory in the place of inference tensors; gives the undoing."""
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is not None and not is_lazy(tensor) and tensor.is_inference():
                    geometry = (tensor.storage_offset(), tensor.shape, tensor.stride())
                    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                    tensors[name] = alias.set_(tensor.untyped_storage(), *geometry)
                    replaced.append((tensors, name, tensor))

    def undo() -> None:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor

    return undo
