"""Normalise-activate-pool chains of a traced network, each made one node (DESIGN section 5).

BatchNorm, then an optional residual addition, activation and max-pool, each read by the next alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastjac.errors import FastjacError
from fastjac.ops import NormActPool
from fastjac.remaking import Maker, maker_of

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
PIECEWISE_LINEAR = frozenset({"none", "relu", "relu6", "leaky_relu"})
ALL_ACTIVATIONS = PIECEWISE_LINEAR | {"silu"}

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


def batch_norm_arguments(module: nn.modules.batchnorm._BatchNorm) -> Callable[..., tuple[Any, ...]]:
    """What ``module(x)`` gives to batch_norm after x; counts its batches, as ``module(x)`` does.

    Running mean and variance, weight, bias, training, momentum, eps.
    """

    def arguments(x: Tensor) -> tuple[Any, ...]:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if isinstance(module, nn.SyncBatchNorm) and module.training and distributed:
            raise FastjacError(
                "SyncBatchNorm in train mode under torch.distributed is not supported; "
                "expected BatchNorm2d, or the module in eval mode"
            )
        module._check_input_dim(x)
        momentum = 0.0 if module.momentum is None else module.momentum
        counts = module.track_running_stats and module.num_batches_tracked is not None
        if module.training and counts:
            module.num_batches_tracked.add_(1)
            if module.momentum is None:
                momentum = 1.0 / float(module.num_batches_tracked)
        mean, var = module.running_mean, module.running_var
        training = module.training or (mean is None and var is None)
        if module.training and not module.track_running_stats:
            mean = var = None
        return mean, var, module.weight, module.bias, training, momentum, module.eps

    return arguments


def batch_norm_function_arguments(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    """The same for a call of ``F.batch_norm``."""
    return running_mean, running_var, weight, bias, training, momentum, eps


@dataclass(frozen=True)
class Chain:
    """One chain: called as ``chain(residual, u, ...)``, the rest being BatchNorm's own arguments.

    ``nodes`` are the nodes that it replaced: BatchNorm's, then those of the addition, the activation
    and the pool, None where there is none.
    """

    arguments: Callable[..., tuple[Any, ...]]
    activation: str
    slope: float
    pool: str
    nodes: tuple[fx.Node | None, ...]

    __name__ = "norm_act_pool"

    def run(self, residual: Tensor | None, u: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """NormActPool's five results, BatchNorm's seven arguments, and residual and u as maps."""
        bound = self.arguments(u, *args, **kwargs)
        mean, var, weight, bias, training, momentum, eps = bound
        residual, u = self._maps(residual, u)
        results = NormActPool.apply(
            *(u, residual, weight, bias, mean, var, training, momentum, eps),
            *(self.activation, self.slope, self.pool, maker_of(u)),
        )
        return *results, bound, residual, u

    def _maps(self, residual: Tensor | None, u: Tensor) -> tuple[Tensor | None, Tensor]:
        """Both as ``[B, C, H, W]``, of the shape and dtype that their sum has."""
        if self.pool != "none" and u.dim() != 4:
            raise FastjacError(
                f"a BatchNorm that a max-pool follows needs [B, C, H, W]; got {list(u.shape)}"
            )
        if residual is not None and (residual.shape, residual.dtype) != (u.shape, u.dtype):
            if torch.broadcast_shapes(residual.shape, u.shape) != u.shape:
                raise FastjacError(
                    f"adding {list(residual.shape)} enlarges a BatchNorm's output, {list(u.shape)}: "
                    "expected one that broadcasts to it"
                )
            dtype = torch.promote_types(residual.dtype, u.dtype)
            residual, u = residual.to(dtype).expand(u.shape), u.to(dtype)
        return None if residual is None else as_map(residual), as_map(u)

    def maker(self, residual: fx.Node | None, y: Tensor) -> Maker | None:
        """How to make y, this chain's output, again from its BatchNorm's input, bit for bit.

        None for one that is pooled, and small, or has something added, which would have to be kept; and
        for one that ``torch.compile`` made, in a graph of its own.
        """
        node = y.grad_fn
        made = node.name() == "NormActPoolBackward"
        if self.pool != "none" or residual is not None or not made:
            return None

        def make() -> Tensor:
            with torch.no_grad():
                return NormActPool.again(node)

        return make

    def __call__(self, residual: Tensor | None, u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.run(residual, u, *args, **kwargs)[0]
        return y if u.dim() == 4 else y.view(u.shape)


def as_map(x: Tensor) -> Tensor:
    """``[B, C, ...]`` as ``[B, C, H, W]``."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], -1, 1)


def fuse_chains(
    graph: fx.Graph, root: nn.Module, activations: frozenset[str], keep: fx.Node | None = None
) -> dict[fx.Node, fx.Node]:
    """Replace the chains of ``graph`` in place; the last node of each, and what stands for it.

    ``keep``: a node whose value is wanted, so that no chain runs across it. A module with hooks of its
    own stays a node of its own.
    """
    replaced: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        chain = _chain_from(node, root, activations, keep)
        if chain is None:
            continue
        norm, add, *_ = chain.nodes
        *earlier, last = (n for n in chain.nodes if n is not None)
        residual = None if add is None else next(a for a in add.args if a is not norm)
        with graph.inserting_before(last):
            fused = graph.call_function(chain, (residual, *norm.args), dict(norm.kwargs))
        fused.meta = dict(last.meta)
        last.replace_all_uses_with(fused)
        replaced[last] = fused
        graph.erase_node(last)
        for old in reversed(earlier):
            graph.erase_node(old)
    return replaced


def _chain_from(
    node: fx.Node, root: nn.Module, activations: frozenset[str], keep: fx.Node | None
) -> Chain | None:
    arguments = _normalises(node, root)
    if arguments is None:
        return None
    nodes: list[fx.Node | None] = [node, None, None, None]
    activation, slope, pool = "none", 0.0, "none"
    last = node
    while (reader := _sole_reader(last, keep)) is not None and not _hooked(reader, root):
        kind = _activation(reader, root)
        if nodes[1:] == [None] * 3 and _adds(reader):
            nodes[1] = reader
        elif nodes[2:] == [None] * 2 and kind is not None and kind[0] in activations:
            nodes[2] = reader
            activation, slope = kind
        elif nodes[3] is None and (size := _pool(reader, root)) is not None:
            nodes[3], pool = reader, size
        else:
            break
        last = reader
    if last is node:
        return None
    return Chain(arguments, activation, slope, pool, tuple(nodes))


def _normalises(node: fx.Node, root: nn.Module) -> Callable[..., tuple[Any, ...]] | None:
    if node.op == "call_function" and node.target is F.batch_norm:
        return batch_norm_function_arguments
    module = _module(node, root)
    if type(module) is nn.BatchNorm2d and not _hooked(node, root) and len(node.args) == 1:
        return batch_norm_arguments(module)
    return None


def _module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    return root.get_submodule(node.target) if node.op == "call_module" else None


def _hooked(node: fx.Node, root: nn.Module) -> bool:
    module = _module(node, root)
    return module is not None and has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is hooked to the module itself."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _sole_reader(node: fx.Node, keep: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 and node is not keep else None


def _adds(node: fx.Node) -> bool:
    both = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
    return (
        node.target in _ADDITIONS and both and not node.kwargs and node.args[0] is not node.args[1]
    )


def _activation(node: fx.Node, root: nn.Module) -> tuple[str, float] | None:
    """The activation that a node is, as norm_act_pool names it, and its slope."""
    module = _module(node, root)
    if type(module) is nn.LeakyReLU and module.negative_slope >= 0:
        return "leaky_relu", module.negative_slope
    modules = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}
    if type(module) in modules:
        return modules[type(module)], 0.0
    functions = {F.relu: "relu", torch.relu: "relu", F.relu_: "relu", torch.relu_: "relu"}
    functions |= {"relu": "relu", "relu_": "relu", F.relu6: "relu6", F.silu: "silu"}
    if node.op in ("call_function", "call_method") and node.target in functions:
        return functions[node.target], 0.0
    return None


def _pool(node: fx.Node, root: nn.Module) -> str | None:
    """The pool that a node is, as norm_act_pool names it."""
    module = _module(node, root)
    if type(module) is not nn.MaxPool2d or module.return_indices or module.ceil_mode:
        return None
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
    kernel, stride, padding, dilation = (
        value if isinstance(value, int) else value[0] if len(set(value)) == 1 else None
        for value in geometry
    )
    known = {(2, 2, 0, 1): "2x2", (3, 2, 1, 1): "3x3", (3, 2, 0, 1): "3x3-unpadded"}
    return known.get((kernel, stride, padding, dilation))
