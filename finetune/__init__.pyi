from .recipe import FinetuneRecipe as FinetuneRecipe
from .run import Watch as Watch
from .run import finetune as finetune
from .use import open_best_pt as open_best_pt
