"""The cotangent of a first layer's input, in blocks, against PyTorch's."""

import itertools

import pytest
import torch

from fastjac.ops import convolution

LAST = torch.channels_last


def expected(gy, weight, shape, stride, padding):
    """By autograd of PyTorch's convolution."""
    x = torch.zeros(shape, dtype=gy.dtype, requires_grad=True)
    y = torch.conv2d(x, weight, None, stride, padding)
    return torch.autograd.grad(y, x, gy)[0]


def case(size, kernel, stride, padding, dtype=torch.float64, filters=5, channels=3, batch=2):
    torch.manual_seed(0)
    out = [
        (n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)
    ]
    gy = torch.randn(batch, filters, *out).to(dtype)
    weight = torch.randn(filters, channels, *kernel).to(dtype)
    return gy, weight, (batch, channels, *size), stride, padding


@pytest.mark.parametrize("stride", [*itertools.product([1, 2, 3, 4], repeat=2)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 2), (4, 4), (5, 7), (7, 1)], ids=str)
def test_input_by_blocks(stride, kernel):
    """Every remainder of the sizes by the strides, with pixels at the end that no output sees."""
    sizes = [(k + rows, k + 4 - rows) for k in (7, 12) for rows in range(5)]
    for size, padding in itertools.product(sizes, [(0, 0), (1, 0), (0, 2), (2, 3)]):
        if any(p >= k for p, k in zip(padding, kernel, strict=True)):
            continue
        args = case(size, kernel, stride, padding)
        right = expected(*args)
        for form in (torch.contiguous_format, LAST):
            gy = args[0].contiguous(memory_format=form)
            got = convolution.input_by_blocks(gy, *args[1:])
            torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
            if gy[0, 0].numel() > 1:  # else it is in both layouts
                assert got.is_contiguous(memory_format=form)


@pytest.mark.parametrize("form", [torch.contiguous_format, LAST], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_layer_takes_blocks(monkeypatch, dtype, form):
    args = case((64, 64), (4, 4), (2, 2), (1, 1), dtype, filters=32, batch=4)
    gy, weight, shape, stride, padding = args
    gy = gy.contiguous(memory_format=form)
    wide = expected(gy.double(), weight.double(), *args[2:])
    plain = expected(*args).double()
    taken = []
    by_blocks = convolution.input_by_blocks
    monkeypatch.setattr(
        convolution, "input_by_blocks", lambda *args: taken.append(1) or by_blocks(*args)
    )
    monkeypatch.setattr(torch.nn.functional, "pad", None)  # a user may have put another there
    got = convolution.convolution_input(gy, weight, shape, stride, padding, [1, 1], 1)
    assert taken == [1]
    assert got.dtype == dtype
    assert (got.double() - wide).norm() <= 1.5 * (plain - wide).norm() + 1e-7 * wide.norm()


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 8},
        {"kernel": (1, 1), "padding": (0, 0)},
        {"batch": 1},
        {"dtype": torch.float64},
        {"dtype": torch.float16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_where_pytorchs_kernel_is_taken(monkeypatch, change):
    """Where blocks were slower, or gained nothing in some layers; float16 was both, by layer."""
    given = {"size": (64, 64), "kernel": (4, 4), "stride": (2, 2), "padding": (1, 1)}
    given |= {"dtype": torch.float32, "filters": 32, "batch": 4} | change
    args = case(**given)
    monkeypatch.delattr(convolution, "input_by_blocks")
    got = convolution.convolution_input(*args, [1, 1], 1)
    torch.testing.assert_close(got, expected(*args))
