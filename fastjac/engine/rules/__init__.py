"""One rule for each kind of node, and the table that says which node has which."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastjac.chains import (
    BATCH_NORMS,
    Chain,
    batch_norm_arguments,
    batch_norm_function_arguments,
)
from fastjac.engine.rules.base import Rule
from fastjac.engine.rules.fused import Fused
from fastjac.engine.rules.generic import Generic, Pick, ReverseOverForward, SmoothPointwise
from fastjac.engine.rules.layers import BatchNorm, Convolution, Linear
from fastjac.engine.rules.pointwise import (
    PIECEWISE,
    Concatenation,
    Dropout,
    Gate,
    Negative,
    Product,
    Same,
    Scale,
    Sum,
    clipped_gate,
)
from fastjac.engine.rules.pools import AvgPool2d, Map, MaxPool2d

__all__ = ["GENERIC", "Rule", "rules_for"]

GENERIC = Generic()


def _gate(kind: str, slope: float = 0.0) -> Rule:
    return Gate(PIECEWISE[kind].gate(slope))


def _hardsigmoid(delta: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.hardsigmoid_backward(delta, 6 * y - 3)


def _clipped(low: float, high: float) -> Rule:
    return Gate(clipped_gate(low, high))


def _leaky(slope: float) -> Rule:
    # Of a negative slope's, the output does not tell the input's sign.
    return GENERIC if slope < 0 else _gate("leaky_relu", slope)


def _tuple(value: Any, axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else list(value)


def _convolution_module(module: nn.modules.conv._ConvNd) -> Rule:
    padding, axes = module.padding, len(module.kernel_size)
    if padding == "valid":
        padding = [0] * axes
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            return GENERIC
        padding = [t // 2 for t in total]
    if module.padding_mode != "zeros" and any(padding):
        return GENERIC
    geometry = (list(module.stride), list(padding), list(module.dilation), module.groups)
    return Convolution(lambda x: (module.weight, *geometry))


def _convolution_function(axes: int) -> Callable[[fx.Node], Rule]:
    def bind(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        return weight, *(_tuple(v, axes) for v in (stride, padding, dilation)), groups

    def rule(node: fx.Node) -> Rule:
        padding = node.args[4] if len(node.args) > 4 else node.kwargs.get("padding", 0)
        return GENERIC if isinstance(padding, str) else Convolution(bind)

    return rule


def _max_pool(
    kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    return kernel_size, kernel_size if stride is None else stride, padding, dilation, ceil_mode


def _avg_pool(
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    stride = kernel_size if stride is None else stride
    return kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override


def _max_pool_module(m: nn.MaxPool2d) -> Rule:
    geometry = _max_pool(m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)
    return GENERIC if m.return_indices else MaxPool2d(lambda x: geometry)


def _avg_pool_module(m: nn.AvgPool2d) -> Rule:
    geometry = _avg_pool(
        m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    )
    return AvgPool2d(lambda x: geometry)


def _dropout(function: Callable[..., Tensor]) -> Callable[[fx.Node], Rule]:
    def bind(x, p=0.5, training=True, inplace=False):
        return p, training

    return lambda node: Dropout(function, bind)


def _dropout_module(function: Callable[..., Tensor]) -> Callable[[nn.Module], Rule]:
    return lambda m: Dropout(function, lambda x: (m.p, m.training))


_ONE_BY_ONE = (nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.ELU, nn.CELU, nn.SELU)
_ONE_BY_ONE += (nn.Mish, nn.Hardswish, nn.LogSigmoid, nn.Softsign)
_LINEAR = (nn.Flatten, nn.Unflatten, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.PixelShuffle)
_LINEAR += (nn.AdaptiveAvgPool3d, nn.AvgPool1d, nn.AvgPool3d, nn.PixelUnshuffle, nn.ZeroPad2d)

MODULES: dict[type[nn.Module], Callable[[Any], Rule]] = {
    nn.Identity: lambda m: Same(),
    nn.ReLU: lambda m: _gate("relu"),
    nn.ReLU6: lambda m: _gate("relu6"),
    nn.Hardtanh: lambda m: _clipped(m.min_val, m.max_val),
    nn.Hardsigmoid: lambda m: Gate(_hardsigmoid),
    nn.GroupNorm: lambda m: ReverseOverForward(),
    nn.LeakyReLU: lambda m: _leaky(m.negative_slope),
    nn.Linear: lambda m: Linear(lambda x: m.weight),
    nn.MaxPool2d: _max_pool_module,
    nn.AvgPool2d: _avg_pool_module,
    nn.Dropout: _dropout_module(F.dropout),
    nn.Dropout1d: _dropout_module(F.dropout1d),
    nn.Dropout2d: _dropout_module(F.dropout2d),
    nn.Dropout3d: _dropout_module(F.dropout3d),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution_module),
    **dict.fromkeys(BATCH_NORMS, lambda m: BatchNorm(batch_norm_arguments(m))),
    **dict.fromkeys(_ONE_BY_ONE, lambda m: SmoothPointwise()),
    **dict.fromkeys(_LINEAR, lambda m: Map()),
}


def _always(rule: Rule) -> Callable[[fx.Node], Rule]:
    return lambda node: rule


def _hardtanh(node: fx.Node) -> Rule:
    def limits(x, min_val=-1.0, max_val=1.0, inplace=False):
        return min_val, max_val

    return _clipped(*limits(*node.args, **node.kwargs))


def _leaky_relu(node: fx.Node) -> Rule:
    def slope(x, negative_slope=0.01, inplace=False):
        return negative_slope

    return _leaky(slope(*node.args, **node.kwargs))


_RELU = _always(_gate("relu"))
_ADD, _SUB = _always(Sum(1)), _always(Sum(-1))
_MAP, _SAME, _SMOOTH = _always(Map()), _always(Same()), _always(SmoothPointwise())
_DIVIDE = _always(Scale(divide=True))

FUNCTIONS: dict[Any, Callable[[fx.Node], Rule]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), _RELU),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    F.relu6: _always(_gate("relu6")),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    **dict.fromkeys((F.conv1d, torch.conv1d), _convolution_function(1)),
    **dict.fromkeys((F.conv2d, torch.conv2d), _convolution_function(2)),
    **dict.fromkeys((F.conv3d, torch.conv3d), _convolution_function(3)),
    F.linear: lambda n: Linear(lambda x, weight, bias=None: weight),
    F.batch_norm: _always(BatchNorm(batch_norm_function_arguments)),
    **dict.fromkeys(
        (F.max_pool2d, torch.max_pool2d), lambda n: MaxPool2d(lambda x, *a, **k: _max_pool(*a, **k))
    ),
    F.avg_pool2d: lambda n: AvgPool2d(lambda x, *a, **k: _avg_pool(*a, **k)),
    F.dropout: _dropout(F.dropout),
    F.dropout1d: _dropout(F.dropout1d),
    F.dropout2d: _dropout(F.dropout2d),
    F.dropout3d: _dropout(F.dropout3d),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _ADD),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), _SUB),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), _DIVIDE),
    **dict.fromkeys((operator.neg, torch.neg), _always(Negative())),
    **dict.fromkeys((torch.cat, torch.concat), _always(Concatenation())),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.permute, torch.transpose), _MAP),
    **dict.fromkeys((torch.mean, torch.sum, torch.squeeze, torch.unsqueeze), _MAP),
    **dict.fromkeys((F.adaptive_avg_pool2d, F.pixel_shuffle, F.pixel_unshuffle), _MAP),
    **dict.fromkeys((F.silu, F.gelu, F.sigmoid, torch.sigmoid, F.tanh, torch.tanh), _SMOOTH),
    **dict.fromkeys((F.softplus, F.elu, F.celu, F.selu, F.mish, F.hardswish), _SMOOTH),
    **dict.fromkeys((F.logsigmoid, F.softsign), _SMOOTH),
    F.hardsigmoid: _always(Gate(_hardsigmoid)),
    F.group_norm: _always(ReverseOverForward()),
}

METHODS: dict[str, Callable[[fx.Node], Rule]] = {
    **dict.fromkeys(("relu", "relu_"), _RELU),
    **dict.fromkeys(("add", "add_"), _ADD),
    **dict.fromkeys(("sub", "sub_"), _SUB),
    **dict.fromkeys(("div", "div_"), _DIVIDE),
    "neg": _always(Negative()),
    **dict.fromkeys(("contiguous", "clone"), _SAME),
    **dict.fromkeys(("flatten", "view", "reshape", "permute", "transpose", "t"), _MAP),
    **dict.fromkeys(("mean", "sum", "squeeze", "unsqueeze", "expand", "narrow", "select"), _MAP),
    **dict.fromkeys(("sigmoid", "tanh"), _SMOOTH),
}

_MULTIPLY = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}


def rules_for(node: fx.Node, root: nn.Module) -> list[Rule]:
    """The rules that may cover a node, best first; the last covers everything."""
    found: list[Rule] = []
    if isinstance(node.target, Chain):
        return [Fused(node.target)]
    if node.target in _MULTIPLY:
        found = [Scale(divide=False), Product()]
    elif node.target is operator.getitem:
        found = [Pick()]
    elif node.op == "call_module":
        module = root.get_submodule(node.target)
        for kind, rule in MODULES.items():
            # A subclass may compute something else; a parametrised module is a subclass in name alone.
            if type(module) is kind or (
                torch.nn.utils.parametrize.is_parametrized(module)
                and type(module).__bases__[0] is kind
            ):
                found = [rule(module)]
    elif node.op == "call_function" and node.target in FUNCTIONS:
        found = [FUNCTIONS[node.target](node)]
    elif node.op == "call_method" and node.target in METHODS:
        found = [METHODS[node.target](node)]
    return [*found, GENERIC]
