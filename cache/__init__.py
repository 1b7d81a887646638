"""The feature cache: one HDF5 file of embeddings, written atomically, rows matched by guid.

Imports no other package of mmcli. ``__init__.pyi`` lists the public names. Each is imported on first use, so that
errors and recipes do not need h5py.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
