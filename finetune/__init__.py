"""Stage 2: back to the raw pairs, to train the last layers of the backbone together with a head.

``run.py`` is where to begin: it computes once what enters the unfrozen layers (``store.py``), trains what is above
(``training.py``), and keeps the better of both stages (``outcome.py``). Imports cache, featurize, heads, report. Names
are imported when they are asked for, as in ``heads``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe import FinetuneRecipe
    from .run import Watch, finetune
    from .use import open_best_pt

__all__ = ["FinetuneRecipe", "Watch", "finetune", "open_best_pt"]

_MODULE_OF = {"FinetuneRecipe": "recipe", "Watch": "run", "finetune": "run", "open_best_pt": "use"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return found
