"""Trace a network into a list of operations (torch.fx), and find a layer's output in it."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastjac.chains import Chain, fuse_chains, has_hooks
from fastjac.errors import FastjacError
from fastjac.features import find_layer
from fastjac.ops.winograd import pays, winograd
from fastjac.remaking import Maker, convolution_maker, recomputing

IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
VIEWS = {"view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "expand"}
VIEWS |= {"chunk", "split", "getitem", "narrow", "select", "t", "unbind"}


class _HookedError(FastjacError):
    """Hooks on a module that no trace keeps as one node."""


def refuse_hooks(module: nn.Module, place: str) -> None:
    """Raise for hooks on a module whose insides are traced: it is never called, so none would fire."""
    if has_hooks(module):
        raise _HookedError(
            f"{place} has a hook, which would not fire where the module is traced through: hook its "
            "last leaf module instead; strategy='autograd', or a model that is not fused, runs it"
        )


class _Tracer(fx.Tracer):
    """Symbolic tracing with torch.nn's own modules, and ``opaque`` ones, as leaves.

    Notes what every module returned.
    """

    proxy_buffer_attributes = True

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.outputs: dict[str, list[Any]] = {}
        self.path: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or super().is_leaf_module(
            m, module_qualified_name
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            refuse_hooks(m, f"module {path!r}")
        self.path.append(path)
        value = super().call_module(m, forward, args, kwargs)
        self.outputs.setdefault(self.path.pop(), []).append(value)
        return value

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise FastjacError("part of the forward runs under torch.no_grad()")
        return super().create_node(*args, **kwargs)


def target_name(node: fx.Node) -> str:
    """The name of what a node calls: a method's, a function's, a module's path."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")


def writes_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node overwrites its first argument."""
    if node.op == "call_module":
        return getattr(root.get_submodule(node.target), "inplace", False) is True
    name = target_name(node)
    return (
        node.target in IN_PLACE_OPERATORS
        or node.kwargs.get("inplace") is True
        or (name.endswith("_") and not name.endswith("__"))
        or name == "setitem"
    )


def _resolve_in_place(graph: fx.Graph, root: nn.Module) -> None:
    """Let whoever reads a value after it was overwritten read the operation that overwrote it."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        if not writes_in_place(node, root) or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if target_name(node) == "setitem" or (
            source.op != "call_module"
            and target_name(source) in VIEWS
            and any(order[user] > order[node] for user in source.all_input_nodes[0].users)
        ):
            raise FastjacError(f"{describe(node)} writes in place to a view of another value")
        for user in list(source.users):
            if order[user] > order[node]:
                user.replace_input_with(source, node)


def describe(node: fx.Node) -> str:
    """A node as an error names it."""
    if node.op == "call_module":
        return f"module {node.target!r}"
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack), "") if stack else ""
    return f"{target_name(node)} ({node.name}" + (f", in module {path!r})" if path else ")")


def forward_of(module: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    """``plain``, PyTorch's way to compute ``module``; a convolution by winograd, where that pays."""
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
        return plain
    if isinstance(module.padding, str):
        return plain

    def convolve(x: Tensor) -> Tensor:
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        if pays(x, module.weight, *geometry):
            return winograd(x, module.weight, module.bias, module.padding)
        return plain(x)

    return convolve


Call = Callable[[fx.Node, Any, Any, dict[fx.Node, Any]], Any]


@dataclass
class Program:
    """A traced network: its nodes in order, with the modules still in ``root``."""

    root: nn.Module
    graph: fx.Graph
    input: fx.Node
    output: fx.Node
    layers: dict[str, list[Any]]
    rules: dict[fx.Node, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = list(self.root.modules())  # alive, so that none's id is used again
        self._leading: dict[fx.Node, set[fx.Node]] = {}
        self.live = live = set(self.leading_to(self.output))
        for node in self.graph.nodes:
            called = node.op in ("call_function", "call_method")
            if node.op == "call_module" or (called and writes_in_place(node, self.root)):
                live |= self.leading_to(node)
        self.nodes = [n for n in self.graph.nodes if n in live]
        last = {source: node for node in self.nodes for source in node.all_input_nodes}
        self.last_read: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            if source is not self.output:
                self.last_read.setdefault(node, []).append(source)

    def run(self, x: Tensor, call: Call | None = None) -> Any:
        """The output's value for ``x``; each value is let go of after its last reader.

        ``call(node, args, kwargs, values)`` evaluates an operation; None: as the node says.
        """
        values: dict[fx.Node, Any] = {}
        with torch.nn.utils.parametrize.cached():
            for node in self.nodes:
                if node is self.input:
                    values[node] = x
                elif node.op == "placeholder":
                    values[node] = node.args[0]
                elif node.op == "get_attr":
                    values[node] = _attribute(self.root, node.target)
                else:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                    with recomputing(self._makers(node, values)):
                        if call is None:
                            values[node] = self.callable(node)[1](*args, **kwargs)
                        else:
                            values[node] = call(node, args, kwargs, values)
                for done in self.last_read.get(node, ()):
                    del values[done]
        return values[self.output]

    def _makers(self, node: fx.Node, values: dict[fx.Node, Any]) -> list[tuple[Tensor, Maker]]:
        """Those of what the node reads that can be made again, and how."""
        found = ((values[n], self._maker(n, values[n])) for n in node.all_input_nodes)
        return [(value, make) for value, make in found if make is not None]

    def _maker(self, node: fx.Node, value: Any) -> Maker | None:
        if not isinstance(value, Tensor) or value.dim() != 4 or value.grad_fn is None:
            return None
        if torch.compiler.is_compiling():  # which chooses itself what to recompute
            return None
        if isinstance(node.target, Chain):
            return node.target.maker(node.args[0], value)
        module = self.root.get_submodule(node.target) if node.op == "call_module" else None
        if type(module) is nn.Conv2d and not has_hooks(module):
            return convolution_maker(module, value)
        return None

    def callable(self, node: fx.Node) -> tuple[nn.Module | None, Callable[..., Any]]:
        """What a node calls: the module, if it is one, and the callable."""
        if node.op == "call_module":
            module = self.root.get_submodule(node.target)
            return module, module if has_hooks(module) else forward_of(module, module)
        if node.op == "call_method":
            name = node.target
            return None, lambda first, *args, **kwargs: getattr(first, name)(*args, **kwargs)
        return None, node.target

    def find(self, layer: str | None) -> fx.Node:
        """The node whose value ``layer`` returns; the logits' for None."""
        if layer is None:
            return self.output
        find_layer(self.root, layer)
        values = self.layers.get(layer, [])
        if len(values) != 1:
            raise FastjacError(
                f"layer {layer!r} runs {len(values)} times in one forward; expected once"
            )
        if not isinstance(values[0], fx.Node):
            raise FastjacError(
                f"layer {layer!r} is not a feature map: it returns {type(values[0]).__name__}"
            )
        if values[0] not in self.live:
            raise FastjacError(f"layer {layer!r} has no influence on the model's output")
        return values[0]

    def leading_to(self, node: fx.Node) -> set[fx.Node]:
        """``node`` and every node that its value depends on."""
        if node not in self._leading:
            found, todo = set(), [node]
            while todo:
                current = todo.pop()
                if current not in found:
                    found.add(current)
                    todo.extend(current.all_input_nodes)
            self._leading[node] = found
        return self._leading[node]


def trace(model: nn.Module) -> Program:
    """Trace ``model`` as it stands (its modes are read now).

    A submodule whose forward cannot be traced (control flow on values, ``torch.no_grad``) becomes one
    node.
    Raises :class:`FastjacError` naming the place that cannot be traced.
    """
    opaque: set[str] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            with torch.enable_grad():
                graph = tracer.trace(model)
            _resolve_in_place(graph, model)
            break
        except _HookedError:
            raise
        except Exception as err:
            # A module whose own code cannot be traced becomes one node, differentiated as a whole.
            if not tracer.path or tracer.path[-1] in opaque:
                raise FastjacError(_why_untraceable(model, tracer, err)) from err
            opaque.add(tracer.path[-1])
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    if not inputs or any(not n.args for n in inputs[1:]):
        raise FastjacError(
            f"{type(model).__name__}.forward takes {len(inputs)} inputs; expected one, x"
        )
    output = next(n for n in graph.nodes if n.op == "output").args[0]
    if not isinstance(output, fx.Node):
        kind = type(output).__name__.removeprefix("immutable_")  # torch.fx's own dict and list
        raise FastjacError(f"{type(model).__name__} must return one tensor of logits; got {kind}")
    layers = {
        path: [v.node if isinstance(v, fx.Proxy) else v for v in values]
        for path, values in tracer.outputs.items()
    }
    return Program(model, graph, inputs[0], output, layers)


def _why_untraceable(model: nn.Module, tracer: _Tracer, err: Exception) -> str:
    place = f"module {tracer.path[-1]!r}" if tracer.path else type(model).__name__
    frames = [f for f in traceback.extract_tb(err.__traceback__) if "/torch/" not in f.filename]
    own = [f for f in frames if not f.filename.endswith("fastjac/graph.py")]
    line = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    reason = str(err).strip().split("\n")[0]
    return (
        f"cannot trace {type(model).__name__}: {place}{line}: {reason}; "
        "strategy='autograd' needs no trace"
    )


class Network:
    """A model and its traces, one for each way that its modules are set (train, eval, replaced).

    ``activations``: those of the normalise-activate-pool chains that become one node.
    """

    def __init__(self, model: nn.Module, activations: frozenset[str]) -> None:
        self.model = model
        self.activations = activations
        self._programs: dict[Any, Program] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": {}}

    def program(self, layer: str | None = None) -> Program:
        """The trace of the model as it is set now, with the value of ``layer`` in it."""
        modules = tuple((id(m), m.training, has_hooks(m)) for m in self.model.modules())
        key = layer, modules
        if key not in self._programs:
            if len(self._programs) >= 8:
                self._programs.clear()
            self._programs[key] = self._trace(layer)
        return self._programs[key]

    def _trace(self, layer: str | None) -> Program:
        program = trace(self.model)
        if not self.activations:
            return program
        graph = program.graph
        replaced = fuse_chains(graph, self.model, self.activations, program.find(layer))
        layers = {
            path: [replaced.get(v, v) if isinstance(v, fx.Node) else v for v in values]
            for path, values in program.layers.items()
        }
        output = replaced.get(program.output, program.output)
        return Program(self.model, graph, program.input, output, layers)


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def active(value: Any) -> bool:
    """Whether a value can carry a derivative."""
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, tuple | list) and any(active(v) for v in value)
