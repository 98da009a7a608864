"""Weights from a file, for the network they belong to and no other."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.errors import FastjacError, existing_file


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a ``.pt`` or ``.pth`` file holds: tensors and plain data, on the CPU; no code is run."""
    path = existing_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise FastjacError(
            f"{path} is not a readable PyTorch file of plain tensors: "
            f"{str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(content, dict):
        raise FastjacError(f"{path}: expected a state dict, got {type(content).__name__}")
    return content


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors``, ``.pth`` or ``.pt`` file, a checkpoint's included."""
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise FastjacError(f"{path} is not a safetensors file: {error}") from error
    content = read_checkpoint(path)
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise FastjacError(f"{path}: expected a state dict, a mapping of names to tensors")
    return content


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy ``weights`` into ``model``; every name and shape must be the model's.

    Only ``normalize.mean`` and ``normalize.std`` may be absent, as they are from another library's
    file: the model's stay. ``source`` is named in the error.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in weights and not k.startswith("normalize.")]
    surplus = [k for k in weights if k not in own]
    shapes = [
        f"{k} is {list(weights[k].shape)}, expected {list(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    problems = shapes + [f"no {k}" for k in missing] + [f"unexpected {k}" for k in surplus]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise FastjacError(
            f"{source} holds another model than this {type(model).__name__}: "
            f"{'; '.join(problems[:3])}{more}"
        )
    model.load_state_dict(weights, strict=False)
