"""The feature cache: one HDF5 file of embeddings, written atomically, rows matched by guid.

Imports nothing else of mmcli.
"""

from .errors import (
    BackboneError,
    CacheError,
    CheckpointError,
    DataError,
    DiskFullError,
    LockedError,
    MmcliError,
)
from .labels import read_ids, read_labels
from .store import FeatureCache

__all__ = [
    "BackboneError",
    "CacheError",
    "CheckpointError",
    "DataError",
    "DiskFullError",
    "FeatureCache",
    "LockedError",
    "MmcliError",
    "read_ids",
    "read_labels",
]
