"""``--torchcompile``: compile of a run's networks what no term looks into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fastjac.errors import FastjacError, notice
from fastjac.features import find_layer
from fastjac.train.objective import Network


def compile_networks(networks: Sequence[Network], x: Tensor) -> None:
    """Compile each network in place, on the first batches that it gets; say which blocks, if not all.

    A network that no term looks into is compiled whole, of another the blocks that :func:`blocks`
    finds. Raises if that is nothing of any of them.
    """
    done = []
    for network in networks:
        if not network.read:
            network.model.compile()
            done.append(f"the {network.role}")
            continue
        for name in (found := list(blocks(network, x))):
            find_layer(network.model, name).compile()
        if found:
            done.append(f"of the {network.role} {', '.join(found)}")
    if not done:
        read = "; ".join(f"of the {n.role} {', '.join(n.read)}" for n in networks)
        where = "behind" if any(n.differentiated for n in networks) else "beside"
        raise FastjacError(
            f"--torchcompile: no network has a block of several layers {where} those that terms of the "
            f"loss read ({read}); leave the option out"
        )
    if any(network.read for network in networks):
        notice(f"--torchcompile compiles {'; '.join(done)}")


def blocks(network: Network, x: Tensor) -> Iterator[str]:
    """The largest modules of several layers that run on ``x``, and that no term looks into.

    Where there are Jacobians, these are modules that only run when the last of their layers has
    returned: nothing that a Jacobian passes through.
    """
    model = network.model
    closed = {find_layer(model, name) for name in network.read}
    waiting = {find_layer(model, name) for name in network.differentiated}
    called: set[nn.Module] = set()

    def enter(module: nn.Module, args: object) -> None:
        called.add(module)
        if waiting:
            closed.add(module)

    def leave(module: nn.Module, args: object, output: object) -> None:
        waiting.discard(module)

    mode = model.training
    with ExitStack() as hooks, torch.no_grad():
        for module in set(model.modules()):
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        model.eval()(x)
    model.train(mode)

    def open_blocks(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            inside = set(child.modules())
            if len(inside) > 1 and child in called and not inside & closed:
                yield prefix + name
            else:
                yield from open_blocks(child, f"{prefix}{name}.")

    return open_blocks(model, "")
