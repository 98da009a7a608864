"""The step with Jacobian matching as it is written without fastjac, eager and compiled.

Every rival computes the loss of :func:`jacobian_term` with PyTorch alone. Some of these recipes are
silently wrong for a BatchNorm in train mode: ``benchmarks.step`` compares each with the reference before
anything is timed, and reports the error in place of a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.contenders import Contender, distillation_loss


class DoubleBackward(Contender):
    """``autograd.grad(create_graph=True)``, then ``backward``: the usual code."""

    jacobians = True

    def phi(
        self, logits: Tensor, features: Tensor | None, y: Tensor, place: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of the target's scalar, and where its window stands (``place``, or the argmax)."""
        if features is None:
            return logits.gather(1, y[:, None]).sum(), None
        side = max(1, int(features.shape[2] * self.config.window + 1e-9))
        pooled = F.avg_pool2d(features.square().mean(1, True), side, 1).flatten(1)
        if place is None:
            place = pooled.detach().argmax(1, keepdim=True)
        return pooled.gather(1, place).sum(), place

    def jacobian_term(self, js: Tensor, jt: Tensor) -> Tensor:
        """The mean squared distance of Jacobians, of unit norm where the target is a window."""
        wide = torch.promote_types(js.dtype, torch.float32)
        js, jt = js.flatten(1).to(wide), jt.flatten(1).to(wide)
        if self.config.layer:
            js, jt = F.normalize(js), F.normalize(jt)
        return (js - jt).square().sum(1).mean()

    def compute(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch; ``x`` is a leaf that requires a gradient."""
        student, teacher = self.networks
        # No leaf: of one, autocast keeps the cast for both networks, which torch.compile refuses.
        x_t = x.view_as(x)
        logits_t, features_t = teacher(x_t)
        phi_t, place = self.phi(logits_t, features_t, y, None)
        (jt,) = torch.autograd.grad(phi_t, x_t)
        logits, features = student(x)
        phi, _ = self.phi(logits, features, y, place)
        (js,) = torch.autograd.grad(phi, x, create_graph=True)
        features_t = None if features_t is None else features_t.detach()
        plain = distillation_loss(logits, logits_t.detach(), features, features_t, y)
        return plain + self.jacobian_term(js, jt)

    def take(self, x: Tensor, y: Tensor) -> Tensor:
        self.student.zero_grad(set_to_none=True)
        x = x.detach().requires_grad_()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            loss = self.loss(x, y)
        loss.backward(inputs=list(self.student.parameters()))
        return loss.detach()


class DoubleBackwardCompiled(DoubleBackward):
    """The double backward under ``torch.compile``: one graph that returns the loss."""

    layouts = ("channels_last",)

    def prepare(self) -> None:
        super().prepare()
        torch._dynamo.config.trace_autograd_ops = True
        self.loss = torch.compile(self.compute, fullgraph=True, dynamic=False)


class Functional(DoubleBackward):
    """The student as a function of its parameters, for ``torch.func``."""

    def prepare(self) -> None:
        super().prepare()
        self.parameters = dict(self.networks[0].named_parameters())
        self.buffers = dict(self.networks[0].named_buffers())

    def run(
        self, parameters: dict[str, Tensor], x: Tensor
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The student's logits, features and new buffers."""
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        return *functional_call(self.networks[0], {**parameters, **buffers}, (x,)), buffers

    def teachers(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """The teacher's Jacobian, and its logits, features and window's place."""

        def phi(x: Tensor) -> Any:
            logits, features = self.networks[1](x)
            phi, place = self.phi(logits, features, y, None)
            return phi, (logits, *without_none(features, place))

        jt, (logits_t, *rest) = grad(phi, has_aux=True)(x)
        return jt, (logits_t, *(rest or (None, None)))

    def students(
        self, parameters: dict[str, Tensor], x: Tensor, y: Tensor, place: Tensor | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The student's Jacobian, and its logits, features and new buffers."""

        def phi(x: Tensor) -> Any:
            logits, features, buffers = self.run(parameters, x)
            kept = (logits, buffers, *without_none(features))
            return self.phi(logits, features, y, place)[0], kept

        js, (logits, buffers, *rest) = grad(phi, has_aux=True)(x)
        return js, (logits, *(rest or [None]), buffers)

    def functional_loss(
        self, parameters: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the new buffers."""
        jt, (logits_t, features_t, place) = self.teachers(x, y)
        js, (logits, features, buffers) = self.students(parameters, x, y, place)
        plain = distillation_loss(logits, logits_t, features, features_t, y)
        return plain + self.jacobian_term(js, jt), buffers

    def keep(self, gradients: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        """Give the student its gradients and buffers."""
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
        for name, buffer in self.buffers.items():
            buffer.copy_(buffers[name])


class FunctionalCompiled(Functional):
    """``torch.func.grad`` of a loss with ``torch.func.grad`` inside, compiled."""

    layouts = ("channels_last",)

    def prepare(self) -> None:
        super().prepare()
        gradient = grad_and_value(self.functional_loss, has_aux=True)
        self.gradient = torch.compile(gradient, fullgraph=True, dynamic=False)

    def take(self, x: Tensor, y: Tensor) -> Tensor:
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            gradients, (loss, buffers) = self.gradient(parameters, x, y)
        self.keep(gradients, buffers)
        return loss


class ForwardOverReverse(Functional):
    """``jvp`` of the parameters' gradient of phi, along the loss's slope in J; eager."""

    def take(self, x: Tensor, y: Tensor) -> Tensor:
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            jt, (logits_t, features_t, place) = self.teachers(x, y)
            js, (_, _, buffers) = self.students(parameters, x, y, place)
            slope, term = grad_and_value(self.jacobian_term)(js, jt)

            def plain(parameters: dict[str, Tensor]) -> Tensor:
                logits, features, _ = self.run(parameters, x)
                return distillation_loss(logits, logits_t, features, features_t, y)

            def phi(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
                logits, features, _ = self.run(parameters, x)
                return self.phi(logits, features, y, place)[0]

            gradients, loss = grad_and_value(plain)(parameters)
            more = self.along(phi, parameters, x, slope)
        self.keep({name: g + more[name] for name, g in gradients.items()}, buffers)
        return loss + term

    def along(
        self, phi: Callable[..., Tensor], parameters: dict[str, Tensor], x: Tensor, v: Tensor
    ) -> dict[str, Tensor]:
        """The parameters' gradient of the derivative of phi along ``v``."""
        return jvp(lambda x: grad(phi)(parameters, x), (x,), (v,))[1]


class ReverseOverForward(ForwardOverReverse):
    """``grad`` of ``jvp``, whose BatchNorm in train mode counts the statistics as constants."""

    def along(
        self, phi: Callable[..., Tensor], parameters: dict[str, Tensor], x: Tensor, v: Tensor
    ) -> dict[str, Tensor]:
        return grad(lambda p: jvp(lambda x: phi(p, x), (x,), (v,))[1])(parameters)


def without_none(*values: Any) -> tuple[Any, ...]:
    """The values that are there: ``torch.func`` takes no None beside a gradient."""
    return tuple(value for value in values if value is not None)


class Traced(DoubleBackward):
    """``make_fx`` of the loss with the parameters as inputs, compiled; the backward outside."""

    layouts = ("channels_last",)

    def prepare(self) -> None:
        super().prepare()
        student = self.networks[0]
        values = {**dict(student.named_parameters()), **dict(student.named_buffers())}

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            self.networks[0] = lambda x: functional_call(student, values, (x,))
            return self.compute(x, y)

        before = {name: buffer.clone() for name, buffer in student.named_buffers()}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            x = self.x.detach().requires_grad_()
            traced = make_fx(loss, self.decompositions())(values, x, self.y)
        for name, buffer in student.named_buffers():  # the trace has run the student
            buffer.copy_(before[name])
        # What a backward saves of a forward's output is detached in a trace: it would be a constant.
        detach = torch.ops.aten.detach.default
        for node in traced.graph.find_nodes(op="call_function", target=detach):
            node.replace_all_uses_with(node.args[0])
        traced.recompile()
        compiled = torch.compile(traced, dynamic=False)
        self.loss = lambda x, y: compiled(values, x.detach(), y)

    def decompositions(self) -> dict[Any, Any]:
        """Operators that the trace replaces."""
        return {}


class TracedDecomposed(Traced):
    """The same after ``core_aten_decompositions``, whose BatchNorm saves its statistics as constants."""

    def decompositions(self) -> dict[Any, Any]:
        return torch._decomp.core_aten_decompositions()


class Cropped(DoubleBackward):
    """The double backward, compiled, of the layers up to the target's on the part that its window sees.

    Statistics are frozen: the crops are normalised by those of the whole images. The crop of every
    sample has one size, and is moved into the image where the window stands near an edge.
    """

    batch_stats = "frozen"
    layouts = ("channels_last",)

    def prepare(self) -> None:
        from torchvision.models.feature_extraction import create_feature_extractor

        layer = self.config.layer
        self.fronts = [
            create_feature_extractor(net, {layer: "features"}).train(net.training)
            for net in (self.student, self.teacher)
        ]
        for module in self.fronts[0].modules():  # the student's own
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = SharedStatistics
        super().prepare()
        torch._dynamo.config.trace_autograd_ops = True
        self.teacher_forward = torch.compile(self.networks[1], fullgraph=True, dynamic=False)
        self.loss = torch.compile(self.compute_on_crops, fullgraph=True, dynamic=False)

    def take(self, x: Tensor, y: Tensor) -> Tensor:
        self.student.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            with torch.no_grad():
                logits_t, features_t = self.teacher_forward(x)
                crop, inside = self.crop(x, features_t)
            teacher = (logits_t.clone(), features_t.clone())
            loss = self.loss(x, crop.requires_grad_(), inside, y, *teacher)
        loss.backward(inputs=list(self.student.parameters()))
        return loss.detach()

    def crop(self, x: Tensor, features_t: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher's windows see ``[B, 3, s, s]``, and the windows' places on its features."""
        config = self.config
        side = max(1, int(features_t.shape[2] * config.window + 1e-9))
        pooled = F.avg_pool2d(features_t.square().mean(1), side, 1)
        place = pooled.flatten(1).argmax(1)
        first = torch.stack([place // pooled.shape[2], place % pooled.shape[2]], 1)
        size = min(side * config.stride + config.before + config.after, config.size)
        start = (first * config.stride - config.before).clamp(0, config.size - size)
        inside = first - start // config.stride
        rows, columns = (start[:, :, None] + torch.arange(size, device=x.device)).unbind(1)
        images = torch.arange(len(x), device=x.device)[:, None, None]
        crop = x.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]]
        width = size // config.stride - side + 1
        return crop.permute(0, 3, 1, 2), inside[:, :1] * width + inside[:, 1:]

    def compute_on_crops(
        self,
        x: Tensor,
        crop: Tensor,
        inside: Tensor,
        y: Tensor,
        logits_t: Tensor,
        features_t: Tensor,
    ) -> Tensor:
        """The loss; ``crop`` is a leaf that requires a gradient."""
        logits, features = self.networks[0](x)
        side = max(1, int(features_t.shape[2] * self.config.window + 1e-9))
        jacobians = []
        for front, create_graph in zip(self.fronts, (True, False), strict=True):
            map_ = front(crop)["features"]
            phi = F.avg_pool2d(map_.square().mean(1, True), side, 1).flatten(1).gather(1, inside)
            jacobians += torch.autograd.grad(phi.sum(), crop, create_graph=create_graph)
        for net in self.networks:
            net.caught.clear()  # the fronts' layers are the networks' own, with their hooks
        plain = distillation_loss(logits, logits_t, features, features_t, y)
        return plain + self.jacobian_term(jacobians[0], jacobians[1].detach())


class SharedStatistics(nn.BatchNorm2d):
    """In train mode, a call normalises by its batch, and the call behind it by the same statistics."""

    known: tuple[Tensor, Tensor] | None = None

    def forward(self, u: Tensor) -> Tensor:
        if self.known is None:
            wide = u.to(torch.promote_types(u.dtype, torch.float32))
            var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
            count = u.numel() / u.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
                self.num_batches_tracked.add_(1)
            self.known = mean, var
        else:
            mean, var = self.known
            self.known = None
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (u * scale[:, None, None] + shift[:, None, None]).to(u.dtype)
