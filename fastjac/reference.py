"""Every quantity by plain autograd: the oracle of tests and benchmarks, and ``strategy="autograd"``.

Independent of the engine. A loss of the Jacobian is differentiated by a double backward.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import CheckpointError

from fastjac.errors import FastjacError
from fastjac.features import capture
from fastjac.fusion.mode import takes_native_statistics, unfused
from fastjac.replaced import original
from fastjac.targets import Target, check_targets

_BATCH_NORM = F.batch_norm  # as PyTorch has it, whatever a user puts there later


class BatchStatistics(TorchFunctionMode):
    """Record the statistics of every batch norm in train mode, or replay them as given.

    Recording leaves the forward as it is, and notes mean and biased variance as functions of the
    parameters. Replaying normalises with them, updates no running statistics, and lets gradients
    through to them: batch norm with ``batch_stats="frozen"``, whose statistics count as constants in
    d/dx, but not in d/dtheta.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Tensor, Tensor]] = []
        self.replay: Iterator[tuple[Tensor, Tensor]] | None = None
        self.buffers: set[int] = set()  # of the second run, by identity

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, kwargs = original(func), kwargs or {}
        if func is _BATCH_NORM:
            return self._batch_norm(*args, **kwargs)
        if func in (torch.batch_norm, torch.ops.aten.batch_norm, torch.ops.aten.batch_norm.default):
            return self._torch_batch_norm(*args, **kwargs)
        if takes_native_statistics(func, args, kwargs):
            raise FastjacError(
                f"batch_stats='frozen' cannot hold the statistics of {func.__name__} constant; "
                "expected F.batch_norm, or batch_stats='batch'"
            )
        return func(*args, **kwargs)

    def check_replayed(self) -> None:
        """Raise unless every recorded pair was replayed."""
        if next(self.replay, None) is not None:
            raise _ran_differently()

    def _torch_batch_norm(
        self, input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
    ) -> Tensor:
        return self._batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        x = input
        if not training:
            return _BATCH_NORM(x, running_mean, running_var, weight, bias, False, momentum, eps)
        if self.replay is None:
            dims = [d for d in range(x.dim()) if d != 1]
            wide = x if x.dtype == torch.float64 else x.float()
            self.recorded.append(
                (wide.mean(dims, keepdim=True), wide.var(dims, correction=0, keepdim=True))
            )
            return _BATCH_NORM(x, running_mean, running_var, weight, bias, True, momentum, eps)
        if id(running_mean) in self.buffers:  # what a norm in eval mode may read after it
            _BATCH_NORM(
                x.detach(), running_mean, running_var, training=True, momentum=momentum, eps=eps
            )
        mean, var = next(self.replay, (None, None))
        if mean is None or mean.dim() != x.dim() or mean.shape[1] != x.shape[1]:
            raise _ran_differently()
        shape = [1, -1] + [1] * (x.dim() - 2)
        x = x if x.dim() > 3 else x.contiguous()  # as PyTorch lays out a norm of series
        y = (x - mean) * (var + eps).rsqrt()
        if weight is not None:
            y = y * weight.view(shape)
        if bias is not None:
            y = y + bias.view(shape)
        return y.to(x.dtype)


def _ran_differently() -> FastjacError:
    return FastjacError(
        'batch_stats="frozen" runs the model twice here, and the second run took other batch norms '
        'than the first: use random numbers of torch, random or numpy.random alone, or "batch"'
    )


def random_state(x: Tensor) -> tuple[Any, ...]:
    """The state of the global generators that a network on ``x`` draws from.

    They are PyTorch's for the CPU and for x's device, Python's, and numpy's where it is imported. The
    device's has no state to be read while a CUDA graph is captured.
    """
    numpy = sys.modules.get("numpy")
    module = _device_module(x)
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    device = None if module is None or capturing else module.get_rng_state(x.device)
    return (
        torch.get_rng_state(),
        device,
        random.getstate(),
        None if numpy is None else numpy.random.get_state(),
    )


@contextmanager
def same_random_numbers(x: Tensor, state: tuple[Any, ...]) -> Iterator[None]:
    """Run with the generators in ``state``, as :func:`random_state` gave it, then put them back."""
    now = random_state(x)
    _set_random_state(x, state)
    try:
        yield
    finally:
        _set_random_state(x, now)


def _device_module(x: Tensor) -> Any:
    """PyTorch's module for x's type of device, if each of those has a generator; else None."""
    module = getattr(torch, x.device.type, None)
    return module if hasattr(module, "get_rng_state_all") else None


def _set_random_state(x: Tensor, state: tuple[Any, ...]) -> None:
    cpu, device, python, numpy = state
    torch.set_rng_state(cpu)
    if device is not None:
        _device_module(x).set_rng_state(device, x.device)
    random.setstate(python)
    if numpy is not None:
        sys.modules["numpy"].random.set_state(numpy)


def _uses_batch_statistics(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return module.training and "BatchNorm" in module.original_name
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )


class _Forward(nn.Module):
    """A model's output and the features of its layers, as a module for ``functional_call``."""

    def __init__(self, model: nn.Module, targets: tuple[Target, ...]) -> None:
        super().__init__()
        self.model = model
        self.layers = [target.layer for target in targets]

    def forward(self, x: Tensor, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        with capture(self.model, self.layers) as features:
            output = self.model(x, *args, **kwargs)
        return output, [features.get(layer) for layer in self.layers]


def forward_and_jacobian(
    model: nn.Module,
    x: Tensor,
    target: Target | tuple[Target, ...],
    y: Any = None,
    *,
    select: Callable[[Any], Any] | None = None,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    batch_stats: str = "frozen",
    create_graph: bool = False,
) -> tuple[Any, Any, Any]:
    """Output, features and J = d(sum of phi)/dx of ``model(x, *args, **kwargs)``.

    J is ``[B, ...]`` as x, or ``[B, K, ...]`` where phi is ``[B, K]``. For a tuple of targets, features
    and J are tuples. ``select`` gives the tensor that targets read from the model's output; None: the
    output itself. The output is what the model returned.

    With ``create_graph`` all three carry a graph to the parameters, and attention runs PyTorch's math
    kernel, the only one with a second derivative; without it J is detached. Under ``torch.no_grad()``
    output and features are detached as well.

    With frozen statistics, a model with batch norm in train mode runs twice, hooks included: the
    second time with the statistics of the first, the same random numbers and copies of the buffers.

    Deterministic where the model's operations are. Raises :class:`fastjac.errors.FastjacError` for a
    phi of another shape or one that does not depend on x, for a layer that :func:`capture` refuses, and
    for batch norms that the second run cannot repeat.

    >>> import torch
    >>> from fastjac.targets import Scalar
    >>> x, phi = torch.tensor([[1.0, 2.0]]), Scalar(lambda output, y: output.square().sum(1))
    >>> forward_and_jacobian(torch.nn.Identity(), x, phi)[2]
    tensor([[2., 4.]])
    """
    targets, kwargs = check_targets(target), dict(kwargs or {})
    graph = torch.is_grad_enabled()
    frozen = batch_stats == "frozen"
    twice = frozen and any(map(_uses_batch_statistics, model.modules()))
    statistics = BatchStatistics()
    run = _Forward(model, targets)
    if frozen:  # what the second run starts from, where there is one
        state = random_state(x)
        buffers = {
            f"model.{name}": buffer.clone()
            for name, buffer in model.named_buffers()
            if not is_lazy(buffer)
        }
        args_again, kwargs_again = tree_map_only(Tensor, torch.clone, (args, kwargs))
    attention = sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext()
    with torch.enable_grad(), attention, unfused():
        # J's and the loss's gradient both belong to x where it requires one.
        differentiable = graph and x.requires_grad
        leaf = x.clone() if differentiable else x.detach().requires_grad_(not twice)
        # A clone: the model may change its input in place.
        with statistics if frozen else nullcontext():
            output, features = run(leaf.clone(), args, kwargs)
        if twice and not statistics.recorded:
            raise FastjacError(
                'batch_stats="frozen": the batch statistics of a BatchNorm in train mode were not seen '
                "(it is scripted, compiled or replicated, or does not run): pass the module inside, or "
                'batch_stats="batch"'
            )
        output_again, features_again = output, features
        if statistics.recorded:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                raise FastjacError(
                    "strategy='autograd' with batch_stats='frozen' runs the model twice with the same "
                    "random numbers, which a CUDA graph cannot capture; expected strategy='auto'"
                )
            # The statistics belong to the first run, whose own input is not differentiated.
            leaf = x.clone() if differentiable else x.detach().requires_grad_()
            statistics.replay = iter(statistics.recorded)
            statistics.buffers = set(map(id, buffers.values()))
            with statistics, same_random_numbers(x, state):
                output_again, features_again = torch.func.functional_call(
                    run, buffers, (leaf.clone(), args_again, kwargs_again)
                )
            statistics.check_replayed()
        read = output_again if select is None else select(output_again)
        # The window stands where the first run's features, the ones that are returned, have it.
        placed = [each.placed(z) for each, z in zip(targets, features, strict=True)]
        phis = [
            each.check_scalar(each.scalar(read, z, y), len(x))
            for each, z in zip(placed, features_again, strict=True)
        ]
        if differentiable:
            _check_routes(phis, x, [leaf, *itertools.chain(*statistics.recorded)])
        try:
            jacobians = _gradients(targets, phis, leaf, create_graph, keep_graph=graph)
        except CheckpointError as error:
            if not statistics.recorded:
                raise
            raise FastjacError(
                "strategy='autograd' with batch_stats='frozen' cannot hold a BatchNorm's statistics "
                "constant where torch.utils.checkpoint runs it again; expected strategy='auto', or "
                "batch_stats='batch'"
            ) from error
    if not graph:
        output, features = map_structure(Tensor.detach, (output, features))
    if isinstance(target, tuple):
        return output, tuple(features), tuple(jacobians)
    return output, features[0], jacobians[0]


def input_jacobian(
    model: nn.Module,
    x: Tensor,
    target: Target | tuple[Target, ...],
    y: Any = None,
    *,
    select: Callable[[Any], Any] | None = None,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    batch_stats: str = "frozen",
) -> Any:
    """J of :func:`forward_and_jacobian`, detached."""
    with torch.no_grad():
        _, _, jacobian = forward_and_jacobian(
            model, x, target, y, select=select, args=args, kwargs=kwargs, batch_stats=batch_stats
        )
    return jacobian


def jacobian_match_loss(js: Tensor, jt: Tensor, normalize: bool = True) -> Tensor:
    """The paper's loss as its equation stands; differentiable to any order."""
    if js.shape != jt.shape:
        raise FastjacError(f"Jacobians differ in shape: {list(js.shape)} and {list(jt.shape)}")
    wide = [j.flatten(1).to(torch.promote_types(j.dtype, torch.float32)) for j in (js, jt)]
    if normalize:
        wide = [j / j.norm(dim=1, keepdim=True).clamp_min(1e-12) for j in wide]
    return (wide[0] - wide[1]).square().sum(1).mean()


def cross_entropy_jacobian_loss(
    ls: Tensor, lt: Tensor, js: Tensor, jt: Tensor | None = None, terms: str = "all"
) -> Tensor:
    """Proposition 2's sigma^2 term by derivatives of softmax and cross-entropy that autograd takes.

    ``"all"`` is half of the trace of ``J^T H J``, H the Hessian of the cross-entropy in both logits; the
    others are written in the probabilities' gradients, as in the paper. To any order, but slow.
    """
    labels = None if lt.is_floating_point() else F.one_hot(lt, ls.shape[1]).to(ls.dtype)
    if labels is not None:
        lt, jt = ls.detach(), torch.zeros_like(js)  # of which nothing is read

    def of_sample(s: Tensor, t: Tensor, js: Tensor, jt: Tensor, label: Tensor) -> Tensor:
        def cross_entropy(s: Tensor, t: Tensor) -> Tensor:
            p = t.softmax(0) if labels is None else label
            return -(p * s.log_softmax(0)).sum()

        if terms == "all":
            j = torch.stack([js, jt])
            (ss, st), (ts, tt) = torch.func.hessian(cross_entropy, (0, 1))(s, t)
            hessian = torch.stack([torch.stack([ss, st]), torch.stack([ts, tt])])  # [2, 2, K, K]
            return torch.einsum("abkl,akn,bln->", hessian, j, j) / 2
        softmax = functools.partial(torch.softmax, dim=0)
        q, grad_q = softmax(s), torch.func.jacrev(softmax)(s) @ js
        p, grad_p = softmax(t), torch.func.jacrev(softmax)(t) @ jt
        if labels is not None:
            p, grad_p = label, torch.zeros_like(js)
        loss = -((grad_p * grad_q).sum(1) / q).sum()
        if terms == "logarithm":
            loss = loss + (p * grad_q.square().sum(1) / q.square()).sum() / 2
        return loss

    rows = zip(ls, lt, js.flatten(2), jt.flatten(2), ls if labels is None else labels, strict=True)
    return torch.stack([of_sample(*row) for row in rows]).mean()


def _check_routes(phis: list[Tensor], x: Tensor, expected: list[Tensor]) -> None:
    """Raise if phi depends on x past these tensors: J would be without that."""
    origin = tuple(get_gradient_edge(x)[:2])
    todo = [(phi.grad_fn, phi.output_nr) for phi in phis]
    seen = {None, *(t.grad_fn for t in expected)}
    while todo:
        edge = node, _ = todo.pop()
        if edge == origin:
            raise FastjacError(
                "the target depends on x, not through the model's argument alone, and J would be "
                "without the rest; expected a value computed inside of the model, or a detached one"
            )
        if node not in seen:
            seen.add(node)
            todo += node.next_functions


def _gradients(
    targets: tuple[Target, ...],
    phis: list[Tensor],
    leaf: Tensor,
    create_graph: bool,
    keep_graph: bool,
) -> list[Tensor]:
    """d(sum of phi)/d(leaf) for each phi; for ``[B, K]``, one gradient per column, on dimension 1."""
    columns = [[phi] if phi.dim() == 1 else phi.unbind(1) for phi in phis]
    left = sum(map(len, columns))
    jacobians = []
    for target, phi, these in zip(targets, phis, columns, strict=True):
        rows = []
        for column in these:
            left -= 1
            row = None
            if column.requires_grad:
                (row,) = torch.autograd.grad(
                    column.sum(),
                    leaf,
                    create_graph=create_graph,
                    retain_graph=create_graph or keep_graph or left > 0,
                    allow_unused=True,
                )
            if row is None:
                raise FastjacError(
                    f"the target does not depend on the input x ({type(target).__name__}): no "
                    "gradient of its scalar leads there (a detach, no_grad or integer operation on "
                    "the way?)"
                )
            rows.append(row)
        if phi.dim() == 1:
            jacobians.append(rows[0])
        else:
            empty = leaf.detach().new_zeros(len(leaf), 0, *leaf.shape[1:])
            jacobians.append(torch.stack(rows, 1) if rows else empty)
    return jacobians


def map_structure(function: Callable[[Tensor], Tensor], structure: Any) -> Any:
    """``function`` of every tensor in containers that PyTorch has registered, and in dataclasses."""

    def each(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        result = copy.copy(leaf)
        for item in dataclasses.fields(leaf):
            value = map_structure(function, getattr(leaf, item.name))
            object.__setattr__(result, item.name, value)
        return result

    return tree_map(each, structure)
