"""Run a network and take its layers' outputs on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from fastjac.errors import FastjacError, unknown


def find_layer(model: nn.Module, layer: str | None, where: str = "the model") -> nn.Module:
    """The module that ``model.named_modules()`` calls ``layer``, or an error with the nearest names."""
    try:
        return model.get_submodule(layer or "?")
    except AttributeError:
        names = [name for name, _ in model.named_modules()]
        raise unknown("layer", layer or "", names, where) from None


def check_logits(logits: object, model: nn.Module) -> Tensor:
    """``logits`` if they are one tensor; an error that names the model otherwise."""
    if not isinstance(logits, Tensor):
        raise FastjacError(
            f"{type(model).__name__} must return one tensor of logits; got {type(logits).__name__}"
        )
    return logits


def overwritten(layer: str) -> FastjacError:
    """The error for features that a later in-place operation changed."""
    return FastjacError(
        f"the output of layer {layer!r} is overwritten in place by a later operation "
        "(a ReLU(inplace=True)?): name the layer after it, or use inplace=False"
    )


@contextmanager
def capture(model: nn.Module, layers: Iterable[str | None]) -> Iterator[dict[str, Tensor]]:
    """Collect what ``layers`` return in the one forward of ``model`` that runs inside.

    Gives a dict that is filled as the layers run, and checked at the end. The tensors, of any shape,
    are those of the forward, with its graph. None among the layers is skipped, so that
    ``features.get(target.layer)`` serves every target. Threads may share the model.

    Raises for a layer that does not exist, does not run or runs more than once, does not return one
    tensor, or whose output a later operation overwrites.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    >>> with capture(model, ["1", None]) as features:
    ...     output = model(torch.ones(5, 2))
    >>> features["1"].shape, features.get(None)
    (torch.Size([5, 3]), None)
    """
    features: dict[str, Tensor] = {}
    versions: dict[str, int] = {}
    counts = {layer: 0 for layer in layers if layer is not None}
    thread = threading.get_ident()

    def catch(layer: str) -> Any:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if threading.get_ident() != thread:  # which runs a forward of its own
                return
            if not isinstance(output, Tensor):
                raise FastjacError(
                    f"layer {layer!r} is not a feature map: it returns {type(output).__name__}"
                )
            features[layer], versions[layer] = output, _version(output)
            counts[layer] += 1

        return hook

    with ExitStack() as hooks:
        for layer in counts:
            handle = find_layer(model, layer).register_forward_hook(catch(layer))
            hooks.callback(handle.remove)
        yield features
    for layer, count in counts.items():
        if count != 1:
            raise FastjacError(f"layer {layer!r} runs {count} times in one forward; expected once")
        if _version(features[layer]) != versions[layer]:
            raise overwritten(layer)


def forward_with_features(
    model: nn.Module, x: Tensor, layer: str | None
) -> tuple[Tensor, Tensor | None]:
    """``model(x)``, one tensor, and what ``layer`` returned in it (None for no layer).

    Differentiable as the model is. Raises as :func:`capture` does.
    """
    with capture(model, [layer]) as features:
        logits = check_logits(model(x), model)
    return logits, features.get(layer)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
