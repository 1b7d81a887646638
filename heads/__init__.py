"""From cached embeddings to a trained head, its scores and its predictions.

Read in the order of the imports: ``recipe``, ``evaluation``, ``model``, ``training``, ``runs``, ``experiments``.
``__init__.pyi`` lists the public names; each is imported when it is first asked for, because PyTorch takes seconds.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
