from .cache.errors import MmcliError as MmcliError
from .cache.store import FeatureCache as FeatureCache
from .featurize.pipeline import featurize as featurize
from .finetune.run import finetune as finetune
from .heads.estimator import FusionClassifier as FusionClassifier
from .heads.experiments.comparison import compare as compare
from .heads.recipe import Recipe as Recipe
from .heads.runs.predictor import Predictor as Predictor
from .heads.runs.predictor import predict as predict
from .heads.runs.scorer import evaluate as evaluate
from .heads.runs.trainer import train_head as train_head

__version__: str
