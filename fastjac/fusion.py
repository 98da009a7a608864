"""Run a network with its normalise-activate-pool chains fused."""

from __future__ import annotations

from torch import Tensor, nn

from fastjac.chains import ALL_ACTIVATIONS
from fastjac.errors import FastjacError
from fastjac.features import check_logits
from fastjac.graph import Network


def fuse(model: nn.Module) -> FusedModel:
    """``model`` with each BatchNorm -> (add) -> activation -> (max-pool) as one operator.

    What it saves, in training: PyTorch keeps BatchNorm's input u, the activation's output, the pool's
    output and its int64 indices, 11 bytes for each fp32 element of u with a 2x2 pool; fused, u and the
    pool's output stay, 5 bytes. Without a pool or an addition, u alone stays, 4 bytes instead of 8: what
    follows (a convolution, for its weight's gradient) has the activation made again in the backward. So
    is u itself where a first convolution gives it, of at most 160 products for an output and at least
    twice as large as the image: nothing of it stays.
    Forward and backward read and write u-sized maps half as often.

    On a CPU, maps of a MiB and more lie in memory of malloc's own, of which glibc's heap can give the
    same place again, and ask Linux for huge pages, which cost fewer page faults. PyTorch's profiler does
    not count it; such a tensor's storage cannot be resized.

    On a CPU, in float32 or float64 and channels-last layout, its 3x3 convolutions of stride 1 and at
    least 32 channels, a multiple of 32, take 2.25 times fewer products
    (:func:`fastjac.ops.winograd`), in the forward and the backward.

    Shares the model's modules, parameters and buffers: the same state dict, training either trains
    both. The same outputs and gradients (to rounding), in train and eval mode; running statistics are
    updated alike. Fuses BatchNorm2d with ReLU, ReLU6, LeakyReLU or SiLU, max-pools of 2x2 (stride 2) and
    3x3 (stride 2, padding 0 or 1); a chain that branches, or has a module with hooks in it, runs as it
    is. Differentiable once. Deterministic where the rest of the network is.
    :meth:`FusedModel.unfuse` gives the model back.

    Raises :class:`fastjac.errors.FastjacError` for a network that ``torch.fx`` cannot trace, and for
    hooks on a container in it, which would not fire.
    """
    if isinstance(model, FusedModel):
        raise FastjacError("fuse: the model is fused already")
    fused = FusedModel(model)
    fused.network.program()
    return fused


class FusedModel(nn.Module):
    """What :func:`fuse` gives; see there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # The very dictionaries of the model, so that whatever is assigned to one is the other's too.
        self.__dict__.update(model.__dict__)
        self.__dict__["network"] = Network(model, ALL_ACTIVATIONS)

    def forward(self, x: Tensor) -> Tensor:
        self.network.model.training = self.training
        program = self.network.program()
        return check_logits(program.run(x), self.network.model)

    def unfuse(self) -> nn.Module:
        """The model that was fused, with the parameters it has now."""
        self.network.model.training = self.training
        return self.network.model
