"""Which layers carry a network's feature levels."""

from __future__ import annotations

from torch import nn

from fastjac.errors import FastjacError


def feature_levels(model: nn.Module) -> list[str]:
    """The layers of feature levels 1, 2, ..., as ``model.named_modules()`` names them.

    A VGG: its second max-pool and every later one. A ResNet and its kin: ``layer1`` to ``layer4``.
    Any other timm network that lists its feature modules: those of stride 4 and more. These agree
    in spatial size, level by level. Raises for a network with none of them.
    """
    modules = dict(model.named_modules())
    if any(cls.__name__ == "VGG" for cls in type(model).__mro__):
        pools = [name for name, module in modules.items() if isinstance(module, nn.MaxPool2d)]
        levels = pools[1:]
    elif "layer1" in modules:
        levels = [f"layer{i}" for i in range(1, 10) if f"layer{i}" in modules]
    else:
        info = [dict(entry) for entry in getattr(model, "feature_info", [])]
        levels = [entry["module"] for entry in info if entry["reduction"] >= 4]
    if not levels or any(name not in modules for name in levels):
        raise FastjacError(
            f"the feature levels of {type(model).__name__} are not known; name a layer of it"
        )
    return levels


def level_layer(model: nn.Module, level: int) -> str:
    """The layer of one level; an error that says how many there are."""
    levels = feature_levels(model)
    if not 1 <= level <= len(levels):
        raise FastjacError(
            f"level {level}: {type(model).__name__} has levels 1 to {len(levels)} "
            f"({', '.join(levels)})"
        )
    return levels[level - 1]
