"""Small calls that launch every instantiation of every CUDA kernel once, and check what it gives.

The widest accesses that a call may use depend on its shape: :data:`ODD` allows one element at a time,
:data:`WHOLE` whole vectors in every dtype and layout. ``tests/cuda_executor`` proves that no
instantiation is left out, and compute-sanitizer runs these calls and no others: so all that is not the
call itself is done on the CPU.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from norm_act_pool_case import ACTIVATE, DTYPES, LAYOUTS, POOL, Case
from torch import Tensor

from fastjac.ops import (
    attention_window,
    attention_window_ref,
    attention_window_slope,
    attention_window_slope_ref,
    batch_norm_statistics,
    batch_norm_statistics_ref,
    channel_statistics,
    channel_statistics_ref,
    jacobian_match,
    jacobian_match_ref,
    window_crop,
    window_crop_ref,
)

ODD, WHOLE = (2, 3, 5, 7), (2, 8, 8, 16)
SHAPES = {"odd": ODD, "whole": WHOLE}
CROPS = {"odd": (3, 3), "whole": (4, 8)}  # of rows and columns; in `whole` vectors in every layout
SIDES = {"odd": 3, "whole": 8}  # of a window of attention
STARTS = [[1, 2], [-2, 5]]  # of crops: in the map, and over its edges
LENGTHS = {"odd": 37, "whole": 48}  # of a sample's Jacobian
POWERS = (2.0, 3.0)


class Call(NamedTuple):
    """One or several calls of an operator family, all in one dtype and with one width of access."""

    family: str
    dtype: torch.dtype
    accesses: str  # of SHAPES
    layout: str = "contiguous"  # of LAYOUTS
    option: str | float | bool = ""  # pool, power, or whether norms are taken

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.family}-{dtype}-{self.accesses}-{self.layout}-{self.option}"


def _calls() -> list[Call]:
    kinds = list(itertools.product(DTYPES, SHAPES, LAYOUTS))
    found = [Call("statistics", *kind) for kind in kinds]
    found += [Call("norm_act_pool", *kind, pool) for kind in kinds for pool in POOL]
    found += [Call("attention_window", *kind, power) for kind in kinds for power in POWERS]
    found += [Call("window_crop", *kind) for kind in kinds]
    lengths = itertools.product(DTYPES, LENGTHS)
    found += [
        Call("jacobian_match", *length, option=norms)
        for length in lengths
        for norms in (True, False)
    ]
    return found


CALLS = _calls()


def run(call: Call, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """What the native operators give on the device, and their references in float64 on a CPU."""
    return globals()[f"_{call.family}"](call, device)


def maps(call: Call) -> Tensor:
    """Random features of the call's dtype, shape and layout, on the CPU."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPES[call.accesses], generator=make).to(call.dtype)
    return x.contiguous(memory_format=LAYOUTS[call.layout])


def _beside(
    got: tuple[Tensor, ...], expected: tuple[Tensor, ...], *names: str
) -> dict[str, tuple[Tensor, Tensor]]:
    return dict(zip(names, zip(got, expected, strict=True), strict=True))


def _statistics(call: Call, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    u = maps(call)
    there, wide = u.to(device), u.double()
    found = _beside(channel_statistics(there), channel_statistics_ref(wide), "mean", "var")
    acc = torch.float64 if call.dtype == torch.float64 else torch.float32
    for training in (True, False):
        running = [torch.linspace(low, 2, u.shape[1], dtype=acc) for low in (-1, 0.5)]
        updated, exact = [x.to(device) for x in running], [x.double() for x in running]
        got = batch_norm_statistics(there, *updated, training, 0.1, 1e-5)
        expected = batch_norm_statistics_ref(wide, *exact, training, 0.1, 1e-5)
        names = (f"{n} {training}" for n in ("mean", "invstd", "running_mean", "running_var"))
        found |= _beside((*got, *updated), (*expected, *exact), *names)
    return found


def _norm_act_pool(call: Call, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Numbers that even float16 holds, so that every dtype makes the same choices."""
    found = {}
    activations = list(ACTIVATE)
    linear = activations[CALLS.index(call) % (len(activations) - 1)]
    for activation in (linear, "silu"):
        case, same = (
            Case(
                *SHAPES[call.accesses],
                with_residual=call.accesses == "whole",
                pool=call.option,
                device=place,
                dtype=call.dtype,
                layout=LAYOUTS[call.layout],
                grid=0.5,
            )
            for place in (device, "cpu")
        )
        got = case.everything(True, activation, call.option)
        expected = same.double().everything(False, activation, call.option)
        found |= {f"{activation} {name}": (x, expected[name]) for name, x in got.items()}
    return found


def _attention_window(call: Call, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    z, k = maps(call), SIDES[call.accesses]
    there = z.to(device)
    position, value = attention_window(there, k, call.option)
    at = position.cpu()
    slopes = attention_window_slope(there, position, k, call.option)
    expected = attention_window_slope_ref(z.double(), at, k, call.option)
    best = attention_window_ref(z.double(), k, call.option)
    found = {"position": (position, best[0]), "value": (value, best[1])}
    return found | _beside(slopes, expected, "grad", "hess_diag")


def _window_crop(call: Call, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    x, start = maps(call), torch.tensor(STARTS)
    args = (CROPS[call.accesses], -1.0)
    got = window_crop(x.to(device), start.to(device), *args)
    return {"crop": (got, window_crop_ref(x, start, *args).double())}


def _jacobian_match(call: Call, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    make = torch.Generator().manual_seed(0)
    pair = torch.randn(2, 3, LENGTHS[call.accesses], generator=make).to(call.dtype).unbind()
    got = jacobian_match(*(x.to(device) for x in pair), call.option)
    expected = jacobian_match_ref(*(x.double() for x in pair), call.option)
    return _beside(got, expected, "loss", "v")
