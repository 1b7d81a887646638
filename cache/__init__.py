"""The feature cache: one HDF5 file of embeddings, written atomically, rows matched by guid.

Imports nothing else of mmcli. ``__init__.pyi`` lists the public names; each is imported when it is first asked for, so
that errors and recipes need no h5py.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
