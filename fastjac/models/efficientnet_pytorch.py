"""Names of the package EfficientNet-PyTorch and its kin, as timm has them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_SEPARABLE = {  # a block that does not expand its channels
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
} | _SQUEEZE
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
} | _SQUEEZE


def is_efficientnet_pytorch(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of EfficientNet-PyTorch."""
    return "_conv_stem.weight" in weights and "_blocks.0._project_conv.weight" in weights


def as_timm(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` by the names of timm's EfficientNet with the state dict ``own``.

    Blocks are numbered through there, and by stage and block in timm. A name without a counterpart stays
    as it is.

    >>> import torch
    >>> own = {"blocks.0.0.conv_dw.weight": 0, "blocks.1.0.conv_pw.weight": 0}
    >>> list(as_timm({"_blocks.1._expand_conv.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}, own))
    ['blocks.1.0.conv_pw.weight', 'classifier.bias']
    """
    found = {m[0] for name in own if (m := re.match(r"blocks\.\d+\.\d+\.", name))}
    blocks = sorted(found, key=lambda block: [int(n) for n in block.split(".")[1:3]])
    expands = {m[1] for name in weights if (m := re.match(r"_blocks\.(\d+)\._expand_conv", name))}
    renamed = {}
    for name, value in weights.items():
        block = re.match(r"_blocks\.(\d+)\.(.*)", name)
        head, table, rest = "", _TOP, name
        if block and int(block[1]) < len(blocks):
            head, rest = blocks[int(block[1])], block[2]
            table = _INVERTED if block[1] in expands else _SEPARABLE
        module, _, tensor = rest.partition(".")
        new = f"{head}{table[module]}.{tensor}" if module in table else name
        renamed[new] = value
    return renamed
