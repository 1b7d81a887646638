"""Raw pairs to cache: dataset on disk, text cleaning, image loading, backbones, the batched pass.

Imports ``cache`` only, and torch only when a model is loaded.
"""

from .backbone import Backbone, Encoder
from .dataset import Dataset
from .loading import open_backbone
from .pair import Pair
from .pipeline import FeaturizeOptions, FeaturizeSummary, featurize
from .text import clean_text, decode_text

__all__ = [
    "Backbone",
    "Dataset",
    "Encoder",
    "FeaturizeOptions",
    "FeaturizeSummary",
    "Pair",
    "clean_text",
    "decode_text",
    "featurize",
    "open_backbone",
]
