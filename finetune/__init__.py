"""Stage 2: back to the raw pairs, to train the last layers of the backbone together with a head.

``run.py`` is where to begin: it computes once what enters the unfrozen layers (``store.py``), trains what is above
(``training.py``), and keeps the better of both stages (``outcome.py``). Imports cache, featurize, heads, report.
"""

from .recipe import FinetuneRecipe
from .run import Watch, finetune
from .use import open_best_pt

__all__ = ["FinetuneRecipe", "Watch", "finetune", "open_best_pt"]
