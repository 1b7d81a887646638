"""Stage 2: back to the raw pairs, to train the last layers of the backbone together with a head.

Start reading at ``run.py``. The states that enter the unfrozen layers are computed once
(``featurize/state_store.py``), the layers and the head are trained together (``heads/runs/last_layers.py``,
``heads/training``), and the better stage is kept (``heads/runs/stages.py``). ``__init__.pyi`` lists the public names.
"""

import sys
from types import ModuleType
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.finetune(*arguments, **options)


sys.modules[__name__].__class__ = _Callable  # `mmcli.finetune` is a package that can be called like the function
