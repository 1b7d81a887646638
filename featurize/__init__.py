"""From raw pairs to the cache: datasets on disk, text cleaning, image decoding, backbones and the encoding pass.

Imports no other package than ``cache``, and torch only when a model is loaded.
"""

import sys
from types import ModuleType
from typing import Any

from .backbones.base import Backbone, Encoder
from .backbones.opening import open_backbone
from .identity import FeaturizeOptions
from .pairs.dataset import Dataset
from .pairs.pair import Pair
from .pairs.text import clean_text, decode_text
from .pipeline import featurize
from .summary import FeaturizeSummary

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


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> FeaturizeSummary:
        return featurize(*arguments, **options)


sys.modules[__name__].__class__ = _Callable  # `mmcli.featurize(...)` calls the function
