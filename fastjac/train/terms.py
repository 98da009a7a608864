"""The terms of a distillation loss that are not of Jacobians; each averaged over the batch.

Logits are ``[B, classes]``; labels below 0 stand for images without one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac.errors import FastjacError


def label_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with labels ``[B]`` or probabilities ``[B, classes]``.

    Images without a label count in the mean's number, not in its sum.

    >>> import torch
    >>> label_cross_entropy(torch.zeros(2, 4), torch.tensor([1, -1]))
    tensor(0.6931)
    """
    if y.is_floating_point():
        return F.cross_entropy(logits, y)
    return F.cross_entropy(logits, y.clamp_min(-1), ignore_index=-1, reduction="sum") / len(y)


def knowledge_distillation_loss(ls: Tensor, lt: Tensor, temperature: float) -> Tensor:
    """``T^2 mean_i KL(softmax(lt_i / T) || softmax(ls_i / T))`` (Hinton, Vinyals & Dean, 2015).

    >>> import torch
    >>> lt = torch.tensor([[2.0, 0.0]])
    >>> knowledge_distillation_loss(lt, lt, 4.0)
    tensor(0.)
    """
    log_s, log_t = F.log_softmax(ls / temperature, 1), F.log_softmax(lt / temperature, 1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


def decoupled_distillation_loss(
    ls: Tensor, lt: Tensor, y: Tensor, temperature: float, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """``T^2 (alpha TCKD + beta NCKD)`` (Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022).

    TCKD is the divergence of (the label's probability, all others'), NCKD that of the distributions over
    the other classes. Labels ``y`` ``[B]`` from 0.

    >>> import torch
    >>> ls, lt = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[3.0, 1.0, 0.0]])
    >>> y = torch.tensor([0])  # weights of 1 and 1 - p_t(y) give the plain divergence
    >>> weight = 1 - lt.softmax(1)[0, 0].item()
    >>> torch.allclose(decoupled_distillation_loss(ls, lt, y, 1.0, 1.0, weight),
    ...                knowledge_distillation_loss(ls, lt, 1.0))
    True
    """
    label = F.one_hot(y, ls.shape[1]).bool()
    log_s, log_t = F.log_softmax(ls / temperature, 1), F.log_softmax(lt / temperature, 1)
    binary = [
        torch.stack([p[label], p.masked_fill(label, -torch.inf).logsumexp(1)], 1)
        for p in (log_s, log_t)
    ]
    others = [F.log_softmax(p[~label].view(len(y), -1), 1) for p in (log_s, log_t)]
    target, rest = (
        F.kl_div(s, t, reduction="batchmean", log_target=True) for s, t in (binary, others)
    )
    return (alpha * target + beta * rest) * temperature**2


def relational_distillation_loss(ls: Tensor, lt: Tensor) -> Tensor:
    """Distances (weight 1) and angles (weight 2) among a batch's outputs, by the package torchdistill.

    (Park et al., "Relational Knowledge Distillation", CVPR 2019.)
    """
    try:
        from torchdistill.losses.mid_level import RKDLoss
    except ImportError as error:
        raise FastjacError("--rkd needs the package torchdistill") from error
    loss = RKDLoss("logits", "logits", dist_factor=1.0, angle_factor=2.0, reduction="mean")
    return loss({"logits": {"output": ls}}, {"logits": {"output": lt}})


class Hint(nn.Module):
    """Squared error of a layer's features, the student's through a 1x1 convolution.

    ``mean((conv(fs) - ft)^2)`` (Romero et al., "FitNets", ICLR 2015). ``fs`` ``[B, Cs, h, w]`` is
    resized to ``ft``'s size where they differ.

    >>> import torch
    >>> Hint(4, 8)(torch.rand(2, 4, 6, 6), torch.rand(2, 8, 3, 3)).shape
    torch.Size([])
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.regressor = nn.Conv2d(student, teacher, 1)

    def forward(self, fs: Tensor, ft: Tensor) -> Tensor:
        if fs.shape[2:] != ft.shape[2:]:
            fs = F.interpolate(fs, size=ft.shape[2:], mode="bilinear", align_corners=False)
        return F.mse_loss(self.regressor(fs), ft)
