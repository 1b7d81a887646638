"""``FusionClassifier``: a head as a scikit-learn estimator."""

import numbers
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ..cache.errors import MmcliError
from ..cache.features import Features
from .evaluation.metrics import softmax
from .model.fusions import Fusion, fusion_class
from .model.inputs import Batch, Rows
from .model.losses import fit_offsets
from .recipe import Recipe
from .training.loop import FitOptions, fit

_NOT_RECIPE = ("validation_fraction", "random_state", "image_columns")


# scikit-learn reads the parameters from __init__, which dataclass writes. It compares no estimators.
@dataclass(eq=False, repr=False)
class FusionClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A head over X = [image | text], for ``clone``, ``cross_val_score``, ``GridSearchCV`` and pipelines.

    The first ``image_columns`` columns are the image embedding, the others the text embedding. An MLP needs rows that
    decide when to stop, and offsets need rows to be fitted on: a tenth of the rows is held out for both. If some class
    has too few rows for that, training takes all ``epochs``.

    Parameters
    ----------
    fusion, modality, head, hidden, dropout, lr, weight_decay, batch_size, epochs, patience, class_weights, loss
        As in ``Recipe``. cross_attn does not work here, because it needs token states.
    focal_gamma, label_smoothing, logit_adjustment, offsets
        As in ``Recipe``.
    normalize
        Whether to scale each half of a row to length 1 first. Unlike in ``Recipe``, the default is False, because X may
        hold anything. For embeddings, True does what ``mmcli train-head`` does.
    image_columns
        Number of columns of X that are the image embedding. Default: half of them, so X must have an even number.
    validation_fraction
        Share of the rows that is held out.
    random_state
        Seed or generator for weights, shuffling, dropout and the rows held out.

    Attributes
    ----------
    classes_
        (C,) labels, in the order of the columns of ``predict_proba``.
    n_features_in_, image_columns_
        Number of columns of X, and how many of them are the image embedding.
    head_
        The trained ``Head``.
    offsets_
        (C,) float32, added to the logits; zeros unless ``offsets``.
    n_iter_
        Number of epochs trained.

    Examples
    --------
    >>> from sklearn.model_selection import cross_val_score                          # doctest: +SKIP
    >>> X = np.hstack(cache.embeddings(guids))                                       # doctest: +SKIP
    >>> cross_val_score(FusionClassifier(normalize=True), X, tags, scoring="f1_macro")  # doctest: +SKIP
    """

    fusion: str = "concat"
    modality: str = "both"
    head: str = "mlp"
    hidden: tuple[int, ...] = (256, 64)
    dropout: float = 0.5
    lr: float = 3e-4
    weight_decay: float = 0.05
    batch_size: int = 64
    epochs: int = 60
    patience: int = 8
    class_weights: str = "sqrt"
    loss: str = "ce"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    logit_adjustment: float = 0.0
    offsets: bool = False
    normalize: bool = False
    validation_fraction: float = 0.1
    random_state: Any = None
    image_columns: int | None = None

    def fit(self, X: Any, y: Any) -> "FusionClassifier":
        """Train on X, (n, columns), and y, (n,).

        Raises
        ------
        ValueError
            A setting is not allowed, the columns cannot be divided into image and text, or y holds a single class.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, classes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"FusionClassifier needs two classes, found one class: {self.classes_[0]!r}")
        try:
            self._train(X, classes.astype(np.int64))
        except MmcliError as error:
            raise ValueError(str(error)) from error
        return self

    def _train(self, X: NDArray[np.float64], classes: NDArray[np.int64]) -> None:
        settings = {name: value for name, value in self.get_params().items() if name not in _NOT_RECIPE}
        recipe = Recipe(**settings | {"hidden": tuple(self.hidden)})
        fusion = fusion_class(recipe.fusion, recipe.modality)
        self.image_columns_ = self._checked_image_columns(X.shape[1], fusion)
        rows, random = Rows(self._features(X), classes), check_random_state(self.random_state)
        train, stop = self._held_out(classes, random)
        recipe = replace(recipe, seed=int(random.randint(2**31)))
        val = None if stop is None else rows.take(stop)
        trained = fit(recipe, len(self.classes_), rows.take(train), val, FitOptions(score_train=False))
        # In float64, so that results do not depend on the batch.
        self.head_, self.n_iter_ = trained.head.double(), len(trained.history)
        self.offsets_ = np.zeros(len(self.classes_), dtype=np.float32)
        if self.offsets and val is not None:
            self.offsets_ = fit_offsets(self._raw_logits(val.features), val.classes)

    def _checked_image_columns(self, columns: int, fusion: type[Fusion]) -> int:
        """Return the number of image columns; raise a ValueError where X cannot be divided so."""
        if fusion.needs_tokens:
            raise ValueError(
                f"fusion {self.fusion!r} needs token states, which X does not hold: use `mmcli train-head --fusion "
                f"{self.fusion}`, or another fusion"
            )
        if self.image_columns is None and columns % 2:
            raise ValueError(
                f"X is [image | text], and {columns} feature(s) cannot be halved: give the number of image columns as "
                "image_columns"
            )
        cut = columns // 2 if self.image_columns is None else self.image_columns
        least, most = int(self.modality != "text"), columns - int(self.modality != "image")
        if not isinstance(cut, numbers.Integral) or isinstance(cut, bool) or not least <= cut <= most:
            raise ValueError(
                f"image_columns must be a whole number from {least} to {most} with modality {self.modality!r} and "
                f"{columns} feature(s), found {cut!r}"
            )
        if fusion.equal_halves and 2 * cut != columns:
            raise ValueError(
                f"fusion {self.fusion!r} combines image and text elementwise, so both must have the same number of "
                f"columns; found {cut} image columns of {columns} feature(s): take another fusion"
            )
        return int(cut)

    def _features(self, X: NDArray[np.float64]) -> Features:
        cut = self.image_columns_
        with np.errstate(over="ignore"):
            single = X.astype(np.float32)
        if not np.isfinite(single).all():
            raise ValueError("X has values beyond what float32 can hold, 3.4e38: scale it down")
        return Features(np.ascontiguousarray(single[:, :cut]), np.ascontiguousarray(single[:, cut:]))

    def _held_out(
        self, classes: NDArray[np.int64], random: np.random.RandomState
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Return rows to train on, and rows held out; None in place of these where a class has too few for both."""
        share, rows, rarest = self.validation_fraction, np.arange(len(classes)), np.bincount(classes).min()
        if not 0 <= share < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), found {share}")
        if self.offsets and share * rarest < 1:
            raise ValueError(
                f"offsets are fitted on a held-out share of {share:g} of the rows, and the rarest class ({rarest} rows)"
                " would have no row there: turn offsets off, or give more rows"
            )
        if share * rarest < 1 or not (self.head == "mlp" or self.offsets):
            return rows, None
        train, stop = train_test_split(rows, test_size=share, stratify=classes, random_state=random)
        return train, stop

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return logits, (n, C); with two classes the difference of their logits, second minus first, (n,)."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return probabilities, (n, C) float64; each row sums to 1."""
        return softmax(self._logits(X))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most likely class of each row, (n,)."""
        numbers = self._logits(X).argmax(axis=1)
        labels: NDArray[Any] = self.classes_[numbers]
        return labels

    def _logits(self, X: ArrayLike) -> NDArray[np.float64]:
        check_is_fitted(self)
        features = self._features(validate_data(self, X, dtype=np.float64, reset=False))
        return self._raw_logits(features) + self.offsets_

    def _raw_logits(self, features: Features) -> NDArray[np.float64]:
        with torch.inference_mode():
            image, text = (torch.from_numpy(side).double() for side in (features.image, features.text))
            logits: NDArray[np.float64] = self.head_(Batch(image, text)).numpy()
        return logits
