"""Image models: CLIP through open_clip, classifiers through timm. A model takes pixels in [0, 1] and owns its normalisation.

`pocket` is the CLIP that ships with this package; what else has a name, `weights.find_model` says. Models come in evaluation mode.
Weights are safetensors where there is a choice, and nothing that is loaded can run code.
"""

from retrieve_or_generate.models.base import ImageModel, image_features, plain_attention
from retrieve_or_generate.models.clip import Clip, text_features
from retrieve_or_generate.models.loading import load_clip, load_model
from retrieve_or_generate.models.timm_model import TimmModel

__all__ = [
    "Clip",
    "ImageModel",
    "TimmModel",
    "image_features",
    "load_clip",
    "load_model",
    "plain_attention",
    "text_features",
]
