from .run import FinetuneOptions as FinetuneOptions
from .run import Watch as Watch
from .run import finetune as finetune
