"""Images with labels, by the name of the data set.

Every image comes as ``[C, H, W]`` float32 in [0, 1], not normalised (the networks do that), with
its class as an int. Needs torchvision, and scikit-learn for ``digits``.
"""

from fastjac.data.batches import epoch_batches
from fastjac.data.image_files import read_image
from fastjac.data.sets import (
    DATASETS,
    ImageData,
    NoisyImages,
    add_unlabelled,
    evaluation_transform,
    load_data,
)
from fastjac.data.subset import class_balanced

__all__ = [
    "DATASETS",
    "ImageData",
    "NoisyImages",
    "add_unlabelled",
    "class_balanced",
    "epoch_batches",
    "evaluation_transform",
    "load_data",
    "read_image",
]
