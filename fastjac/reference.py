"""Every quantity by plain autograd: the oracle of tests and benchmarks, and ``strategy="autograd"``.

Nothing here knows of the engine. The Jacobian term is differentiated by a double backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastjac.errors import FastjacError
from fastjac.features import forward_with_features
from fastjac.targets import LabelLogit, Target


class BatchStatistics(TorchFunctionMode):
    """Record the batch statistics of every train-mode BatchNorm, or replay them as given.

    Recording leaves the forward as it is, and notes mean and biased variance as functions of the
    parameters. Replaying normalises with them, updates no running statistics, and lets gradients
    through to them: BatchNorm with ``batch_stats="frozen"`` (DESIGN: "count as constants in d/dx, but
    not in d/dtheta").
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Tensor, Tensor]] = []
        self.replay: Iterator[tuple[Tensor, Tensor]] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        return self._batch_norm(*args, **kwargs)

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        if self.replay is None:
            dims = [d for d in range(x.dim()) if d != 1]
            wide = x if x.dtype == torch.float64 else x.float()
            self.recorded.append(
                (wide.mean(dims, keepdim=True), wide.var(dims, correction=0, keepdim=True))
            )
            return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
        mean, var = next(self.replay)
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = (x - mean) * (var + eps).rsqrt()
        if weight is not None:
            y = y * weight.view(shape)
        if bias is not None:
            y = y + bias.view(shape)
        return y.to(x.dtype)


@contextmanager
def same_random_numbers(x: Tensor, state: tuple[Tensor, ...]) -> Iterator[None]:
    """Run with the generators in ``state``, as :func:`random_state` gave it, then put them back."""
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(state[0])
        if devices:
            torch.cuda.set_rng_state(state[1], x.device)
        yield


def random_state(x: Tensor) -> tuple[Tensor, ...]:
    """The state of the random number generators that a network on ``x`` draws from."""
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(x.device)) if x.is_cuda else (cpu,)


def _uses_batch_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )


class _Forward(nn.Module):
    def __init__(self, model: nn.Module, layer: str | None) -> None:
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return forward_with_features(self.model, x, self.layer)


def _copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": buffer.clone() for name, buffer in model.named_buffers()}


def _without_trace(
    model: nn.Module, buffers: dict[str, Tensor], x: Tensor, layer: str | None
) -> tuple[Tensor, Tensor | None]:
    """Logits and features with ``buffers``; the model's own are left as they are."""
    return torch.func.functional_call(_Forward(model, layer), buffers, (x,))


def forward_and_jacobian(
    model: nn.Module,
    x: Tensor,
    target: Target,
    y: Tensor | None = None,
    place: Callable[[Tensor], Tensor] | None = None,
    batch_stats: str = "frozen",
    create_graph: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Logits, features and J = d(sum of phi)/dx of ``model`` at ``x``.

    ``place``: features to the window's position, ``[B, 2]``; None: the features' own argmax.
    With ``create_graph`` all three carry a graph to the parameters; without it J is detached.
    """
    graph = torch.is_grad_enabled()
    statistics = BatchStatistics()
    state = random_state(x)
    twice = batch_stats == "frozen" and any(map(_uses_batch_statistics, model.modules()))
    # The second run starts where the first did: a spectral norm's iteration gives the same weights.
    buffers = _copied_buffers(model) if batch_stats == "frozen" else {}
    leaf = x.detach().requires_grad_(not twice)
    with torch.enable_grad():
        with statistics:
            logits, features = forward_with_features(model, leaf, target.layer)
        differentiated = logits, features
        if batch_stats == "frozen" and statistics.recorded:
            # The statistics belong to the first run, whose own input is not differentiated.
            leaf = x.detach().requires_grad_()
            statistics.replay = iter(statistics.recorded)
            with statistics, same_random_numbers(x, state):
                differentiated = _without_trace(model, buffers, leaf, target.layer)
        if isinstance(target, LabelLogit):
            phi = target.scalar(differentiated[0], y)
        else:
            position = (place or target.position)(features)
            phi = target.scalar(differentiated[1], position)
        (jacobian,) = torch.autograd.grad(
            phi.sum(), leaf, create_graph=create_graph, retain_graph=graph
        )
    if not graph:
        logits, features = logits.detach(), None if features is None else features.detach()
    return logits, features, jacobian


def input_jacobian(
    model: nn.Module,
    x: Tensor,
    target: Target,
    y: Tensor | None = None,
    place: Callable[[Tensor], Tensor] | None = None,
    batch_stats: str = "frozen",
) -> Tensor:
    """J, of ``x``'s shape, detached."""
    with torch.no_grad():
        return forward_and_jacobian(model, x, target, y, place, batch_stats)[2].detach()


def jacobian_match_loss(js: Tensor, jt: Tensor, normalize: bool = True) -> Tensor:
    """The paper's loss as its equation stands; differentiable to any order."""
    if js.shape != jt.shape:
        raise FastjacError(f"Jacobians differ in shape: {list(js.shape)} and {list(jt.shape)}")
    wide = [j.flatten(1).to(torch.promote_types(j.dtype, torch.float32)) for j in (js, jt)]
    if normalize:
        wide = [j / j.norm(dim=1, keepdim=True).clamp_min(1e-12) for j in wide]
    return (wide[0] - wide[1]).square().sum(1).mean()
