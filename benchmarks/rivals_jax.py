"""The step with Jacobian matching in JAX: a gradient of a gradient, as one jitted function."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy
import torch
from jax import lax
from torch import Tensor, fx, nn

from benchmarks.contenders import Contender
from fastjac.models.normalize import Normalize

jax.config.update("jax_enable_x64", True)  # float32 stays what it is; float64 is there to validate


class JaxDoubleGradient(Contender):
    """The networks as JAX functions of their parameters, channels last; running statistics stay."""

    jacobians = True
    layouts = ("channels_last",)

    def prepare(self) -> None:
        self.networks = [Network(net, self.config.layer) for net in (self.student, self.teacher)]
        self.gradient = jax.jit(jax.value_and_grad(self.compute))
        self.values = {name: as_jax(p) for name, p in self.student.named_parameters()}

    def phi(self, logits: Any, features: Any, y: Any, place: Any) -> tuple[Any, Any]:
        """The sum of the target's scalar, and where its window stands (``place``, or the argmax)."""
        if features is None:
            return jnp.take_along_axis(logits, y[:, None], 1).sum(), None
        side = max(1, int(features.shape[1] * self.config.window + 1e-9))
        bright = (features**2).mean(3)
        pooled = lax.reduce_window(bright, 0.0, lax.add, (1, side, side), (1, 1, 1), "valid")
        pooled = pooled.reshape(len(pooled), -1) / side**2
        if place is None:
            place = lax.stop_gradient(pooled).argmax(1)[:, None]
        return jnp.take_along_axis(pooled, place, 1).sum(), place

    def jacobian(self, network: Network, values: Any, x: Any, y: Any, place: Any) -> Any:
        """J, and the logits, features and the window's place."""

        def phi(x: Any) -> Any:
            logits, features = network(values, x)
            phi, found = self.phi(logits, features, y, place)
            return phi, (logits, features, found)

        return jax.grad(phi, has_aux=True)(x)

    def compute(self, values: Any, x: Any, y: Any) -> Any:
        """The loss of a batch."""
        student, teacher = self.networks
        jt, (logits_t, features_t, place) = self.jacobian(teacher, {}, x, y, None)
        js, (logits, features, _) = self.jacobian(student, values, x, y, place)
        js, jt = (j.reshape(len(j), -1) for j in (js, jt))
        if features is not None:
            js, jt = unit(js), unit(jt)
        loss = ((js - jt) ** 2).sum(1).mean() + ((logits - logits_t) ** 2).sum(1).mean()
        loss -= jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()
        if features is not None:
            maps = [unit((f**2).mean(3).reshape(len(f), -1)) for f in (features, features_t)]
            loss += ((maps[0] - maps[1]) ** 2).sum(1).mean()
        return loss

    def take(self, x: Tensor, y: Tensor) -> Tensor:
        images = jnp.asarray(x.permute(0, 2, 3, 1).contiguous().numpy())
        loss, gradients = self.gradient(self.values, images, jnp.asarray(y.numpy()))
        for name, parameter in self.student.named_parameters():
            parameter.grad = torch.from_numpy(numpy.array(gradients[name]))
        return torch.tensor(float(loss))


class Network:
    """A traced PyTorch network as a function of parameters and images ``[B, H, W, C]``."""

    def __init__(self, net: nn.Module, layer: str) -> None:
        self.net, self.layer = net, layer
        self.graph = Tracer().trace(net)
        self.known = {name: as_jax(t) for name, t in net.state_dict().items()}

    def __call__(self, values: Any, x: Any) -> tuple[Any, Any]:
        values, found, features = {**self.known, **values}, {}, None
        for node in self.graph.nodes:
            args = fx.map_arg(node.args, lambda n: found[n])
            if node.op == "placeholder":
                found[node] = x
            elif node.op == "call_module":
                module = self.net.get_submodule(node.target)
                found[node] = call(module, node.target + ".", values, *args)
            elif node.op == "call_function" and node.target in (operator.add, torch.flatten):
                add = node.target is operator.add
                found[node] = args[0] + args[1] if add else args[0].reshape(len(args[0]), -1)
            elif node.op == "output":
                return args[0], features
            else:
                raise NotImplementedError(f"{node.op} {node.target}")
            if self.layer and f"{node.target}.".startswith(f"{self.layer}."):
                features = found[node]  # the last module in the layer gives its output
        raise AssertionError("a graph ends in its output")


class Tracer(fx.Tracer):
    """Takes fastjac's own layer as one call, as those of PyTorch."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Normalize) or super().is_leaf_module(module, name)


def call(module: nn.Module, name: str, values: dict[str, Any], x: Any) -> Any:
    """One layer."""
    if isinstance(module, nn.Conv2d):
        layout = ("NHWC", "OIHW", "NHWC")
        padding = [(p, p) for p in module.padding]
        weight, stride = values[name + "weight"], module.stride
        y = lax.conv_general_dilated(x, weight, stride, padding, dimension_numbers=layout)
        return y if module.bias is None else y + values[name + "bias"]
    if isinstance(module, nn.BatchNorm2d):
        mean, var = values[name + "running_mean"], values[name + "running_var"]
        if module.training:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        scale = values[name + "weight"] * lax.rsqrt(var + module.eps)
        return (x - mean) * scale + values[name + "bias"]
    if isinstance(module, nn.ReLU):
        return jax.nn.relu(x)
    if isinstance(module, nn.MaxPool2d):
        size, stride, padding = (
            (n, n) if isinstance(n, int) else n
            for n in (module.kernel_size, module.stride, module.padding)
        )
        pads = [(0, 0), *((p, p) for p in padding), (0, 0)]
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, *size, 1), (1, *stride, 1), pads)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return x.mean((1, 2))
    if isinstance(module, nn.Flatten):
        return x.reshape(len(x), -1)
    if isinstance(module, nn.Linear):
        return x @ values[name + "weight"].T + values[name + "bias"]
    if isinstance(module, Normalize):
        mean, std = (values[name + key].reshape(-1) for key in ("mean", "std"))
        return (x - mean) / std
    raise NotImplementedError(type(module).__name__)


def as_jax(tensor: Tensor) -> Any:
    """The same numbers in JAX."""
    return jnp.asarray(tensor.detach().contiguous().numpy())


def unit(rows: Any) -> Any:
    """Rows of unit norm."""
    return rows / jnp.sqrt((rows**2).sum(1, keepdims=True))
