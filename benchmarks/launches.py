"""How many kernels a step launches, counted without a GPU: what the host does, and a GPU waits for.

Every operator that PyTorch dispatches counts as one kernel, but for views and allocations, which launch
none, and convolutions' gradients, one for each; fastjac's as their CUDA sources launch them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operators that launch nothing and are no views.
_NO_KERNEL = {
    *(
        "_lazy_clone",
        "as_strided",
        "empty",
        "empty_like",
        "empty_strided",
        "is_same_size",
        "new_empty",
    ),
    *("new_empty_strided", "promote_types", "resize_", "set_", "_reshape_alias", "_unsafe_view"),
}


def _statistics(u: Any, mean: Any, var: Any, training: bool, *_: Any) -> int:
    return 2 if training else 1  # the chunks', and one that ends all; or that alone


def _backward(*arguments: Any) -> int:
    training, mask = arguments[10], arguments[13]
    sums = (training and mask[0]) or mask[2] or mask[3]
    return 2 * bool(sums) + bool(mask[0] or mask[1])


def _pushforward(*arguments: Any) -> int:
    return 3 if arguments[11] == "batch" else 2


# What the launches in csrc/cuda are, by an operator's arguments.
_OURS: dict[str, Callable[..., int]] = {
    "attention_window": lambda *_: 4,
    "attention_window_slope": lambda *_: 1,
    "batch_norm_statistics": _statistics,
    "channel_statistics": lambda *_: 2,
    "jacobian_match": lambda js, jt, normalize, eps: 3 if normalize else 2,
    "norm_act_pool": lambda *_: 1,
    "norm_act_pool_backward": _backward,
    "norm_act_pool_backward_": _backward,
    "norm_act_pool_pushforward": _pushforward,
    "window_crop": lambda *_: 1,
}


class Launches(TorchDispatchMode):
    """Counts the kernels that would be launched while it is active, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if op.namespace == "fastjac":
            self.counts[name] += _OURS[name](*args)
        elif name == "convolution_backward":
            self.counts[name] += sum(args[-1])
        elif not op.is_view and name not in _NO_KERNEL:
            self.counts[name] += 1
        return op(*args, **(kwargs or {}))


def launches(step: Callable[[], Any]) -> Counter[str]:
    """The kernels of ``step()``, by operator; it has run before.

    On a CPU, of contiguous tensors: their convolutions are PyTorch's, as on a GPU.
    """
    with Launches() as counted:
        step()
    return counted.counts
