"""window_crop and its adjoint, to the bit, against their equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastjac import FastjacError
from fastjac.ops import (
    window_crop,
    window_crop_adjoint,
    window_crop_adjoint_ref,
    window_crop_ref,
)

OP = torch.ops.fastjac.window_crop
LAST = torch.channels_last
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FAR = 2**63 - 1
# Inside, over each edge and corner, touching from outside, far away, and at the ends of int64.
STARTS = [(0, 0), (2, 3), (-2, 1), (1, -3), (-1, -1), (5, 6), (-4, 0), (0, -5), (7, 0), (0, 9)]
STARTS += [(10**9, 0), (0, -(10**9)), (FAR, 1), (1, FAR), (-FAR - 1, 0), (0, -FAR - 1)]


def maps(*shape: int, device="cpu", dtype=torch.float32, seed=0) -> Tensor:
    """Numbers that tell every element from every other, made on the CPU."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=make, dtype=torch.float64).to(device, dtype)
    assert x.device.type == device
    return x


def starts(count: int = len(STARTS), device="cpu") -> Tensor:
    return torch.tensor(STARTS[:count], dtype=torch.int64, device=device).view(count, 2)


def same(got: Tensor, expected: Tensor) -> None:
    """The same bits, in the same order in memory."""
    assert got.dtype == expected.dtype
    assert got.device == expected.device
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def by_hand(x: Tensor, start: Tensor, size: tuple[int, int], fill: float) -> Tensor:
    out = torch.full((*x.shape[:2], *size), fill, dtype=x.dtype)
    for b, (top, left) in enumerate(start.tolist()):
        for i in range(size[0]):
            for j in range(size[1]):
                if 0 <= top + i < x.shape[2] and 0 <= left + j < x.shape[3]:
                    out[b, :, i, j] = x[b, :, top + i, left + j]
    return out


def adjoint_by_hand(crop: Tensor, start: Tensor, size: tuple[int, int]) -> Tensor:
    out = torch.zeros(*crop.shape[:2], *size, dtype=crop.dtype)
    for b, (top, left) in enumerate(start.tolist()):
        for i in range(crop.shape[2]):
            for j in range(crop.shape[3]):
                if 0 <= top + i < size[0] and 0 <= left + j < size[1]:
                    out[b, :, top + i, left + j] = crop[b, :, i, j]
    return out


@pytest.mark.parametrize("fill", [0.0, -math.inf, 1.5, math.nan])
def test_the_reference_is_the_equation(fill):
    x, start = maps(len(STARTS), 3, 7, 9), starts()
    same(window_crop_ref(x, start, (4, 5), fill), by_hand(x, start, (4, 5), fill))
    crop = x[:, :, :4, :5].contiguous()
    same(window_crop_adjoint_ref(crop, start, (7, 9)), adjoint_by_hand(crop, start, (7, 9)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "last"])
@pytest.mark.parametrize("channels", [1, 3, 8, 32])
@pytest.mark.parametrize("size", [(4, 5), (1, 1), (7, 9), (12, 16), (3, 64), (9, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(device, dtype, size, channels, layout):
    x = maps(len(STARTS), channels, 7, 9, device=device, dtype=dtype).to(memory_format=layout)
    start = starts(device=device)
    for fill in (0.0, -math.inf, 1e-3):
        same(window_crop(x, start, size, fill), window_crop_ref(x, start, size, fill))
    same(window_crop_adjoint(x, start, size), window_crop_adjoint_ref(x, start, size))


def test_larger_than_one_thread_takes(device):
    for layout in (torch.contiguous_format, LAST):
        x = maps(4, 24, 61, 56, device=device).to(memory_format=layout)
        start = torch.tensor([[3, 4], [-7, 50], [40, -9], [-30, -30]], device=device)
        same(window_crop(x, start, (50, 48)), window_crop_ref(x, start, (50, 48)))
        same(window_crop_adjoint(x, start, (130, 96)), window_crop_adjoint_ref(x, start, (130, 96)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_length(device, dtype):
    x = maps(2, 5, 9, 700, device=device, dtype=dtype)
    start = torch.tensor([[2, 3], [-1, -2]], device=device)
    for width in (*range(1, 70), 129, 257, 511, 600):
        same(window_crop(x, start, (6, width)), window_crop_ref(x, start, (6, width)))


def views(device: str) -> dict[str, Tensor]:
    x = maps(4, 6, 12, 10, device=device)
    last = x.to(memory_format=LAST)
    wide = torch.zeros(4, 2, 3, 1 << 18, device=device)
    wide[:, :, :, :: 1 << 15] = x[:, :2, :3, :8]
    odd_last = torch.zeros(1 + x.numel(), device=device)[1:].view(4, 12, 10, 6).permute(0, 3, 1, 2)
    odd_last.copy_(x)
    return {
        "crop": x[:, :, 2:9, 1:8],
        "crop, channels last": last[:, :, 2:9, 1:8],
        "every other channel": x[:, ::2],
        "half of the channels, channels last": last[:, 1:4],
        "every other channel, channels last": last[:, ::2],
        "one channel, channels last": last[:, 2:3],
        "every other pixel": x[:, :, ::2, ::3],
        "every other pixel, channels last": last[:, :, ::2, ::3],
        "far apart": wide[:, :, :, :: 1 << 15],
        "one pixel, channels last": last[:, :, 3:4, 2:3],
        "batch innermost": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "transposed": x.transpose(2, 3),
        "odd address": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        "odd address, channels last": odd_last,
        "a number": x.new_ones(()).expand(4, 1, 12, 10),
        "a number, channels": x.new_ones(()).expand(4, 6, 12, 10),
        "a map for all samples": x[:1].expand(4, -1, -1, -1),
        "a number per channel": x[:1, :, :1, :1].expand(4, -1, 12, 10),
        "a number per channel, channels last": last[:1, :, :1, :1].expand(4, -1, 12, 10),
    }


@pytest.mark.parametrize("view", views("cpu"))
def test_any_strides(device, view):
    x = views(device)[view]
    start = torch.tensor([[0, 0], [-2, 3], [5, -1], [3, 9]], device=device)
    for s in (start, start.t().contiguous().t(), start[:, :1].expand(4, 2)):
        same(window_crop(x, s, (6, 7), -1.0), window_crop_ref(x, s, (6, 7), -1.0))
        same(window_crop_adjoint(x, s, (15, 11)), window_crop_adjoint_ref(x, s, (15, 11)))


def test_an_expanded_map_is_not_copied():
    # 4 EiB, if it were.
    x = torch.ones(()).expand(2, 1, 1 << 29, 1 << 30)
    start = torch.tensor([[-1, 5], [(1 << 29) - 2, (1 << 30) - 1]])
    crop = window_crop(x, start, (3, 2))
    assert crop.tolist() == [[[[0, 0], [1, 1], [1, 1]]], [[[1, 0], [1, 0], [0, 0]]]]


def test_the_layout_is_the_inputs(device):
    x = maps(2, 6, 5, 4, device=device)
    start = starts(2, device)
    for y, layout in ((x, torch.contiguous_format), (x.to(memory_format=LAST), LAST)):
        assert window_crop(y, start, (3, 3)).is_contiguous(memory_format=layout)
        assert window_crop_adjoint(y, start, (9, 9)).is_contiguous(memory_format=layout)
        assert window_crop(y[:, :, 1:], start, (3, 3)).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "last"])
def test_adjointness(device, layout):
    """<crop(x), y> = <x, adjoint(y)>."""
    x = maps(len(STARTS), 5, 7, 9, device=device, dtype=torch.float64).to(memory_format=layout)
    y = maps(len(STARTS), 5, 4, 5, device=device, dtype=torch.float64, seed=1)
    start = starts(device=device)
    left = (window_crop(x, start, (4, 5)) * y).sum((1, 2, 3))
    right = (x * window_crop_adjoint(y, start, (7, 9))).sum((1, 2, 3))
    assert left[:6].count_nonzero() == 6
    torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 0, 4, 4), (3, 2, 0, 4), (3, 2, 4, 0)], ids=str)
def test_empty(device, shape):
    x, start = maps(*shape, device=device), starts(shape[0], device)
    same(window_crop(x, start, (2, 3), 7.0), window_crop_ref(x, start, (2, 3), 7.0))
    same(window_crop_adjoint(x, start, (5, 6)), window_crop_adjoint_ref(x, start, (5, 6)))
    assert window_crop(x, start, (2, 3), 7.0).eq(7).all()


def test_nan_inf_and_negative_zero_are_moved_as_they_are(device):
    for dtype in DTYPES:
        x = maps(2, 3, 5, 5, device=device, dtype=dtype)
        x[:, 0], x[:, 1], x[:, 2, ::2] = math.nan, -math.inf, -0.0
        crop = window_crop(x, starts(2, device), (2, 2))
        assert crop.isnan().sum() == 8
        signs = torch.signbit(window_crop_ref(x, starts(2, device), (2, 2)))
        assert torch.equal(torch.signbit(crop), signs)


def test_fill_is_rounded_to_the_dtype(device):
    for dtype in DTYPES:
        for fill in (0.1, 1e5, -1e-7, -0.0, 3e38):
            x = maps(1, 1, 2, 2, device=device, dtype=dtype)
            got = window_crop(x, torch.tensor([[9, 9]], device=device), (1, 1), fill)
            same(got, torch.full((1, 1, 1, 1), fill, dtype=dtype).to(device))
            assert torch.signbit(got).item() == (math.copysign(1, fill) < 0)


@pytest.mark.parametrize("adjoint", [False, True], ids=["crop", "adjoint"])
def test_opcheck(device, adjoint):
    for dtype in DTYPES:
        x = maps(3, 4, 5, 6, device=device, dtype=dtype)
        for y in (x, x.to(memory_format=LAST), x[:, :, 1:], x[:1, :1].expand(3, 4, 5, 6)):
            torch.library.opcheck(OP.default, (y, starts(3, device), 4, 3, 0.5, adjoint))


def test_derivatives_are_errors(device):
    x, start = maps(3, 2, 5, 5, device=device), starts(3, device)
    for op in (window_crop, window_crop_adjoint):
        tracked = x.clone().requires_grad_()
        with pytest.raises(FastjacError, match="window_crop: its derivative is not supported; det"):
            op(tracked, start, (3, 3)).sum().backward()
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.grad(lambda y, op=op: op(y, start, (3, 3)).sum())(x)
        with pytest.raises(FastjacError, match="window_crop: its derivative is not supported; det"):
            torch.func.vmap(lambda y, op=op: op(y, start, (3, 3)))(tracked[None]).sum().backward()
        with torch.no_grad():
            assert not op(tracked, start, (3, 3)).requires_grad
        with pytest.raises(FastjacError, match=op.__name__ + r": forward-mode derivatives \(jvp\)"):
            torch.func.jvp(lambda y, op=op: op(y, start, (3, 3)), (x,), (x,))


def test_what_overrides_the_call_can_differentiate():
    x, start = maps(3, 2, 5, 5), starts(3)

    class Differentiates(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is OP.default:
                y = x.clone().requires_grad_()
                return torch.autograd.grad(y.square().sum(), y)[0]
            return function(*args, **(kwargs or {}))

    with Differentiates():
        got = window_crop(x, start, (3, 3))
    torch.testing.assert_close(got, 2 * x)


BAD = {
    "{x} must be a tensor, got list": lambda x, s: ([1.0], s, (2, 2)),
    r"{x} must be one of torch\.float64, .*, got torch\.int32": lambda x, s: (x.int(), s, (2, 2)),
    r"{x} must be \[B, C, H, W\], got \[4, 5\]": lambda x, s: (x[0, 0], s, (2, 2)),
    "start must be a tensor, got list": lambda x, s: (x, [[0, 0]], (2, 2)),
    r"start must be torch\.int64, got torch\.int32": lambda x, s: (x, s.int(), (2, 2)),
    r"start must be \[3, 2\], got \[2, 2\]": lambda x, s: (x, s[:2], (2, 2)),
    "start must have {x}'s device, cpu, got meta": lambda x, s: (x, s.to("meta"), (2, 2)),
    r"size must be two integers, at least 0, got \(2, -1\)": lambda x, s: (x, s, (2, -1)),
    r"size must be two integers, at least 0, got \(2,\)": lambda x, s: (x, s, (2,)),
    r"size must be two integers, at least 0, got \(2\.0, 2\)": lambda x, s: (x, s, (2.0, 2)),
    r"{x} must be a strided tensor, got torch\.sparse_coo": lambda x, s: (
        *(x.to_sparse(), s),
        (2, 2),
    ),
    r"start must be a strided tensor, got torch\.sparse_coo": lambda x, s: (
        *(x, s.to_sparse()),
        (2, 2),
    ),
}


@pytest.mark.parametrize(("op", "name"), [(window_crop, "x"), (window_crop_adjoint, "crop")])
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message, op, name):
    with pytest.raises(FastjacError, match=f"^{op.__name__}: " + message.replace("{x}", name)):
        op(*BAD[message](maps(3, 2, 4, 5), starts(3)))


NATIVE_BAD = {
    "x must be Double, Float, BFloat16 or Half, got Int": lambda x, s: (x.int(), s, 2, 2),
    r"x must be \[B, C, H, W\], got \[4, 5\]": lambda x, s: (x[0, 0], s, 2, 2),
    "start must be Long, got Int": lambda x, s: (x, s.int(), 2, 2),
    r"start must be \[3, 2\], got \[3, 1\]": lambda x, s: (x, s[:, :1], 2, 2),
    "size must not be negative, got -1x2": lambda x, s: (x, s, -1, 2),
}


@pytest.mark.parametrize("message", NATIVE_BAD)
def test_the_operator_itself_names_bad_input(device, message):
    args = NATIVE_BAD[message](maps(3, 2, 4, 5, device=device), starts(3, device))
    with pytest.raises(RuntimeError, match="window_crop: " + message):
        OP(*args, 0.0, False)


@pytest.mark.parametrize("op", [window_crop, window_crop_adjoint])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "last"])
def test_any_thread_count(op, layout):
    x, start = maps(len(STARTS), 20, 33, 31).to(memory_format=layout), starts()
    expected, threads = op(x, start, (40, 40)), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            same(op(x, start, (40, 40)), expected)
    finally:
        torch.set_num_threads(threads)


def test_compiles_into_one_graph(device):
    x, start = maps(3, 4, 5, 6, device=device).to(memory_format=LAST), starts(3, device)

    def step(x: Tensor) -> Tensor:
        return window_crop_adjoint(window_crop(x * 2, start, (4, 4), 1.0), start, (5, 6)) + x

    same(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_captures_into_a_cuda_graph(device):
    x, start = maps(5, 3, 33, 31, device=device), starts(5, device)
    expected = window_crop(x, start, (9, 9), -1.0), window_crop_adjoint(x, start, (40, 40))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails on a synchronisation, and on a launch on another stream
        got = window_crop(x, start, (9, 9), -1.0), window_crop_adjoint(x, start, (40, 40))
    graph.replay()
    for a, b in zip(got, expected, strict=True):
        same(a, b)
