"""Errors that a user can act on. The command line prints each as one line on stderr and exits with code 1.

A message says what was expected, what was found, where, and what to do next. Any other exception is a bug and keeps its
traceback.
"""


class MmcliError(Exception):
    """Base class of all errors that are caused by the input or the machine, not by a bug."""


class DataError(MmcliError):
    """The dataset, a labels file or an ids file is missing or malformed."""


class CacheError(MmcliError):
    """The feature cache cannot be used: not a cache, damaged, other schema, other backbone, or missing rows."""


class LockedError(CacheError):
    """Another process is writing this cache."""


class DiskFullError(MmcliError):
    """The disk, a quota or a file-size limit is too small for the output."""


class BackboneError(MmcliError):
    """The backbone cannot be loaded, or is not the requested one."""


class CheckpointError(MmcliError):
    """A best.pt cannot be read or trusted, or belongs to another backbone."""
