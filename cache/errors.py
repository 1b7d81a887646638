"""Errors that a user can act on. The command line turns each into one line on stderr and exit code 1.

A message says what was expected, what was found, where, and what to do next. Anything that is not an
``MmcliError`` is a bug and keeps its traceback.
"""


class MmcliError(Exception):
    """Base of every error that is the input's or the machine's, not the program's."""


class DataError(MmcliError):
    """The dataset, a labels file or an ids file is not what it should be."""


class CacheError(MmcliError):
    """The feature cache cannot be used: foreign, cut off, other schema, other backbone, rows missing."""


class LockedError(CacheError):
    """Another process is writing this cache."""


class DiskFullError(MmcliError):
    """The disk (or a quota, or a file-size limit) had no room for what was being written."""


class BackboneError(MmcliError):
    """The backbone cannot be had, or is not the one that was asked for."""


class CheckpointError(MmcliError):
    """A best.pt cannot be read, cannot be trusted, or belongs to another backbone."""
