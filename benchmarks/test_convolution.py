"""The cotangent of a first layer's input, in blocks, against PyTorch's kernel, on a CPU.

The first layers of ResNet-18, VGG-9, a DCGAN discriminator, AlexNet, ViT and ConvNeXt, and of VGG-9
and ResNet-18 on a window's crop. The time is that of the products, not of the bytes moved: gy, the
weight and the cotangent, once each.
"""

from __future__ import annotations

import pytest
import torch

from fastjac.ops.convolution import input_by_blocks

LAYERS = {  # batch, filters, side of the input, kernel, stride, padding
    "resnet": (8, 64, 224, 7, 2, 3),
    "resnet, crop": (8, 64, 69, 7, 2, 0),
    "vgg": (8, 64, 224, 3, 1, 1),
    "vgg, crop": (8, 64, 66, 3, 1, 0),
    "vgg, 32 pixels": (128, 64, 32, 3, 1, 1),
    "dcgan": (64, 64, 64, 4, 2, 1),
    "alexnet": (8, 64, 224, 11, 4, 2),
    "vit": (8, 192, 224, 16, 16, 0),
    "convnext": (8, 40, 224, 4, 4, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_input_by_blocks(measure, layer, dtype):
    torch.manual_seed(0)
    batch, filters, side, kernel, stride, padding = LAYERS[layer]
    x = torch.empty(batch, 3, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(filters, 3, kernel, kernel, dtype=dtype)
    gy = torch.randn_like(torch.conv2d(x, weight, None, stride, padding))
    args = (gy, weight, x.shape, [stride] * 2, [padding] * 2)

    def kernel_of_pytorch():
        return torch.ops.aten.convolution_backward.default(
            *(gy, x, weight, None, args[3], args[4], [1, 1], False, [0, 0], 1),
            [True, False, False],
        )[0]

    got, expected = input_by_blocks(*args), kernel_of_pytorch()
    assert (got - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()
    bytes_moved = x.nbytes + weight.nbytes + gy.nbytes
    measure("cpu", bytes_moved, lambda: input_by_blocks(*args), {"pytorch": kernel_of_pytorch})
