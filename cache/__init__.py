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
from .features import Features, PaddedTokens, StoredRows, StoredTokens, Tokens
from .labels import read_ids, read_labels
from .store import FeatureCache

__all__ = [
    "BackboneError",
    "CacheError",
    "CheckpointError",
    "DataError",
    "DiskFullError",
    "FeatureCache",
    "Features",
    "LockedError",
    "MmcliError",
    "PaddedTokens",
    "StoredRows",
    "StoredTokens",
    "Tokens",
    "read_ids",
    "read_labels",
]
