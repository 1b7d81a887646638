"""Stage 2: back to the raw pairs, to train the last layers of the backbone together with a head.

``run.py`` is where to begin: it computes once what enters the unfrozen layers (``store.py``), trains what is above
(``training.py``), and keeps the better of both stages (``outcome.py``). ``__init__.pyi`` lists the public names.
"""

import sys
from types import ModuleType
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.finetune(*arguments, **options)


sys.modules[__name__].__class__ = _Callable  # `mmcli.finetune(...)` runs the function; the package stays in reach
