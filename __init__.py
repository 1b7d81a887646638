"""mmcli: featurize image-text pairs once with a frozen encoder, then experiment in seconds.

``__init__.pyi`` lists the public names. Each is imported when it is first asked for, because PyTorch takes seconds.
``mmcli.featurize`` and ``mmcli.finetune`` are packages; to call one is to call its function of that name.
"""

from importlib import import_module
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    return import_module(f".{name}", __name__) if name in ("featurize", "finetune") else _lazy(name)
