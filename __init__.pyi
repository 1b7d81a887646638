from .cache.errors import MmcliError as MmcliError
from .cache.store import FeatureCache as FeatureCache
from .featurize.identity import FeaturizeOptions as FeaturizeOptions
from .featurize.pipeline import featurize as featurize
from .finetune.run import FinetuneOptions as FinetuneOptions
from .finetune.run import finetune as finetune
from .heads.estimator import FusionClassifier as FusionClassifier
from .heads.evaluation.splits import SplitOptions as SplitOptions
from .heads.experiments.comparison import compare as compare
from .heads.experiments.setup import Protocol as Protocol
from .heads.experiments.setup import Setup as Setup
from .heads.recipe import Recipe as Recipe
from .heads.runs.predictor import Predictor as Predictor
from .heads.runs.predictor import predict as predict
from .heads.runs.run_folder import RunOptions as RunOptions
from .heads.runs.scorer import evaluate as evaluate
from .heads.runs.trainer import train_head as train_head

__version__: str
