"""Complex numbers between two layers: products conjugate, sums drop what a real term has not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_network import Apply, agrees, network
from torch import Tensor, nn

from fastjac import FastjacError


def spectrum(z: Tensor) -> Tensor:
    return torch.complex(z, z.flip(1) * 0.5)


def both(c: Tensor) -> Tensor:
    """Real and imaginary parts of a map of 4 channels, in as many."""
    return c.real + c.imag * torch.arange(4).view(4, 1, 1)


def real_part_scaled(z: Tensor) -> Tensor:
    c = spectrum(z) * 1
    c.real.mul_(z.sin())
    torch.view_as_real(c)[..., 1].mul_(2)
    return both(c * c)


def complex_view_of_a_real_map(z: Tensor) -> Tensor:
    y = z * 1
    torch.view_as_complex(y.unflatten(3, (-1, 2))).mul_(1 + 2j)
    return y * y


def offset_view(z: Tensor) -> Tensor:
    c = torch.cat([spectrum(z), spectrum(z)], 1)
    c[:, 1:].imag.mul_(z[:, :1])
    c = c[:, :4]
    return both(c * c)


FUNCTIONS = {
    "number added": lambda z: both((z + 1j) * (1j + z.sin())),
    "number subtracted": lambda z: both((z - 1j) * (1j - z.sin())),
    "complex alpha": lambda z: both(torch.add(spectrum(z), spectrum(z).sin(), alpha=2j)),
    "real part scaled": real_part_scaled,
    "complex view of a real map": complex_view_of_a_real_map,
    "offset view": offset_view,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    agrees(lambda: network(Apply(FUNCTIONS[name])))


class ComplexLinear(nn.Module):
    """A linear layer over spectra; ``double()`` would make its weight real."""

    def __init__(self) -> None:
        super().__init__()
        weight, bias = torch.randn(4, 4, 2).double(), torch.randn(4, 2).double()
        self.weight = nn.Parameter(torch.view_as_complex(weight))
        self.bias = nn.Parameter(torch.view_as_complex(bias))

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        return self

    def forward(self, z: Tensor) -> Tensor:
        return both(F.linear(spectrum(z), self.weight, self.bias))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_linear_layer_with_complex_weights(frozen):
    agrees(lambda: network(ComplexLinear().requires_grad_(not frozen)))


def test_a_write_to_a_conjugated_view_is_an_error():
    def conjugate(z: Tensor) -> Tensor:
        c = spectrum(z) * 1
        c.conj().mul_(2j)
        return both(c)

    with pytest.raises(FastjacError, match="writes in place to a conjugated view"):
        agrees(lambda: network(Apply(conjugate)))
