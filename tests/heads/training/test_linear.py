"""The linear head against scikit-learn."""

import csv
from pathlib import Path

import numpy as np
from mmcli.cache import FeatureCache, read_labels
from mmcli.heads import Recipe, RunOptions, load_checkpoint, predict_logits, train_head
from mmcli.heads.model.losses import class_weights
from sklearn.linear_model import LogisticRegression


def test_a_linear_head_is_the_logistic_regression_of_scikit_learn(learnable, tmp_path):

    path, labels = learnable
    run = train_head(path, labels, Recipe(head="linear"), options=RunOptions(tmp_path / "runs"))
    checkpoint, tags = load_checkpoint(run.best_pt), read_labels(labels)
    with open(Path(run.run) / "history.csv", newline="") as file:
        chosen = float(next(csv.DictReader(file))["C"])

    def inputs(cache, guids):
        halves = []
        for rows in cache.embeddings(guids):
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            halves.append(unit)
        return np.hstack(halves).astype(np.float64)

    with FeatureCache.open(path) as cache:
        train, test = (inputs(cache, guids) for guids in (checkpoint.split.train, checkpoint.split.test))
        mean, deviation = train.mean(axis=0), train.std(axis=0)
        classes = np.array([checkpoint.classes.index(tags[guid]) for guid in checkpoint.split.train])
        weights = dict(enumerate(class_weights(np.bincount(classes), "sqrt").tolist()))
        model = LogisticRegression(C=chosen, class_weight=weights, max_iter=1000, tol=1e-8)
        theirs = model.fit((train - mean) / deviation, classes).predict_proba((test - mean) / deviation)
        logits = predict_logits(checkpoint.head, cache.features(checkpoint.split.test)).astype(np.float64)
    ours = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(ours, theirs, atol=0.02)  # ours stops at a tolerance of 1e-4
    assert run.scores["test"].macro_f1 > 0.6


def test_a_linear_head_of_two_classes(learnable, tmp_path):
    path, labels = learnable
    labels.write_text(labels.read_text().replace("neutral", "negative"))
    run = train_head(path, labels, Recipe(head="linear"), options=RunOptions(tmp_path / "runs"))
    assert run.classes == ["negative", "positive"]
    assert run.scores["test"].macro_f1 > 0.8
