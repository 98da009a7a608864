"""Networks by name, each with its input normalisation inside.

``vgg4``, ``vgg9`` and ``vgg`` (any plan) are here; ``torchvision/<name>`` and ``timm/<name>`` come
from those libraries, which are imported when such a name is asked for and not before.
"""

from fastjac.models.create import ModelSpec, check_image_size, create_model
from fastjac.models.levels import feature_levels
from fastjac.models.normalize import Normalize, normalized
from fastjac.models.vgg import VGG, vgg4, vgg9
from fastjac.models.weights import load_weights, read_weights

__all__ = [
    "VGG",
    "ModelSpec",
    "Normalize",
    "check_image_size",
    "create_model",
    "feature_levels",
    "load_weights",
    "normalized",
    "read_weights",
    "vgg4",
    "vgg9",
]
