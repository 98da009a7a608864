"""The hooks that a model registers on what depends on x."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fastjac.errors import FastjacError

# Autograd functions that give their arguments back: of a module's backward hooks, of
# DistributedDataParallel that looks for unused parameters, and of fully_shard. Their nodes have hooks.
HOOKED = {
    "BackwardHookFunctionBackward",
    "_DDPSinkBackward",
    "RegisterPostBackwardFunctionBackward",
}


class Hooks:
    """Those of tensors run in the reverse sweep, too, as PyTorch runs them in the backward that gives J.

    Those of autograd nodes would not: an error. ``by_value``: hooks by a value's number and their id;
    ``nodes``: the nodes that the model has read, with the tensors that keep them.
    """

    def __init__(self) -> None:
        self.by_value: dict[int, OrderedDict[int, Any]] = {}
        self.nodes: list[tuple[Tensor, Any]] = []

    def register(self, tensor: Tensor, number: int, hook: Any) -> Any:
        """Register a hook on the value ``number``."""
        owner = type(getattr(hook, "__self__", None)).__module__
        of_several = getattr(hook, "__module__", None) == "torch.autograd.graph"
        if of_several or owner.startswith("torch.distributed.fsdp"):
            # It asks for the ordinary backward; or it prepares parameters for that.
            return tensor.register_hook(hook)
        observed = _Observed(hook)
        handle = tensor.register_hook(observed)
        hooks = self.by_value.setdefault(number, OrderedDict())
        hooks[handle.id] = observed.in_sweep
        handle.extra_dict_ref = (weakref.ref(hooks),)  # where its remove() looks, too
        return handle

    def check_nodes(self, recorded: Callable[[Any], Any]) -> None:
        """Raise if a node that has been read, or one behind it, is ``recorded`` and has hooks."""
        for node in nodes_behind([node for _, node in self.nodes]):
            here = recorded(node) and node.name() not in HOOKED
            if here and _has_hooks(node):
                raise FastjacError(
                    f"the model registers a hook on the autograd node {node.name()} of what depends on "
                    "x, which would not see the input Jacobian; expected the tensor's register_hook, or "
                    "strategy='autograd'"
                )


class _Observed:
    """A tensor's hook, which may replace a cotangent of the loss where J does not pass through."""

    def __init__(self, hook: Any) -> None:
        self.hook, self.swept = hook, False

    def in_sweep(self, cotangent: Tensor) -> None:
        """Run it in the reverse sweep, which comes before a backward."""
        self.swept = True
        self(cotangent)

    def __call__(self, cotangent: Tensor) -> Any:
        replaced = self.hook(cotangent)
        if self.swept and replaced is not None:
            raise FastjacError(
                "a hook that the model registers on a tensor replaces its gradient, and so the input "
                "Jacobian; expected a hook that returns None, or strategy='autograd'"
            )
        return replaced


def _has_hooks(node: Any) -> bool:
    for register in (node.register_hook, node.register_prehook):
        handle = register(lambda *_: None)
        others = len(handle.hooks_dict_ref()) > 1
        handle.remove()
        if others:
            return True
    return False


def nodes_behind(nodes: list[Any]) -> Iterator[Any]:
    """These autograd nodes and all that lie behind them, each once."""
    todo, seen = [*nodes], {None}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo += [following for following, _ in node.next_functions]


def leads_to(tensor: Any, edge: Any) -> bool:
    """Whether the graph of a tensor has this edge: one output of a node, not all that it gives."""
    node, output, *_ = edge
    return (tensor.grad_fn is node and tensor.output_nr == output) or any(
        (node, output) in behind.next_functions for behind in nodes_behind([tensor.grad_fn])
    )
