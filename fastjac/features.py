"""Run a network and take a layer's output on the way."""

from __future__ import annotations

from torch import Tensor, nn

from fastjac.errors import FastjacError, unknown


def find_layer(model: nn.Module, layer: str, where: str = "the model") -> nn.Module:
    """The module that ``model.named_modules()`` calls ``layer``, or an error with the nearest names."""
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        raise unknown("layer", layer, modules, where)
    return modules[layer]


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


def forward_with_features(
    model: nn.Module, x: Tensor, layer: str | None
) -> tuple[Tensor, Tensor | None]:
    """``model(x)`` and what ``layer`` returned in it (None for no layer).

    Differentiable as the model is. Raises for a layer that does not exist, does not run or runs more
    than once, does not return one tensor, or whose output a later operation overwrites.
    """
    if layer is None:
        return check_logits(model(x), model), None
    caught: list[tuple[Tensor, int]] = []

    def catch(module: nn.Module, args: object, output: object) -> None:
        if not isinstance(output, Tensor):
            raise FastjacError(
                f"layer {layer!r} is not a feature map: it returns {type(output).__name__}"
            )
        caught.append((output, 0 if output.is_inference() else output._version))

    handle = find_layer(model, layer).register_forward_hook(catch)
    try:
        logits = check_logits(model(x), model)
    finally:
        handle.remove()
    if len(caught) != 1:
        raise FastjacError(
            f"layer {layer!r} runs {len(caught)} times in one forward; expected once"
        )
    features, version = caught[0]
    if not features.is_inference() and features._version != version:
        raise overwritten(layer)
    return logits, features
