"""Which recipe, on validation folds only: change one setting at a time, print out-of-fold macro-F1.

    python benchmarks/recipe.py artifacts/features.h5

The tenth of the rows that ``train-head`` keeps for testing (seed 42) is never looked at. Within each of 5 folds, a
tenth of the training rows is what the head is stopped by.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
from mmcli.cache import FeatureCache
from mmcli.heads import Recipe, Rows, fit, predict_logits, score, stratified_split
from mmcli.heads.run import labels_of
from sklearn.model_selection import StratifiedKFold, train_test_split

CHANGES = [
    {},
    *({"class_weights": kind} for kind in ("none", "inverse", "effective")),
    *({"lr": rate} for rate in (1e-4, 1e-3)),
    *({"dropout": share} for share in (0.3, 0.7)),
    *({"batch_size": size} for size in (16, 256)),
    *({"weight_decay": decay} for decay in (0.0, 0.2)),
    *({"hidden": hidden} for hidden in ((128,), (512, 128))),
]


def rows_to_choose_on(path):
    with FeatureCache.open(path) as cache:
        _, labels, _ = labels_of(cache, None)
        split = stratified_split(list(labels), list(labels.values()))
        guids = [*split.train, *split.val]
        classes = sorted(set(labels.values()))
        numbers = np.array([classes.index(labels[guid]) for guid in guids], dtype=np.int64)
        return Rows(*cache.embeddings(guids), numbers), classes


def out_of_fold(path, change):
    rows, classes = rows_to_choose_on(path)
    predicted = np.zeros_like(rows.classes)
    for inside, outside in StratifiedKFold(5, shuffle=True, random_state=0).split(rows.image, rows.classes):
        train, stop = train_test_split(inside, test_size=0.1, random_state=0, stratify=rows.classes[inside])
        parts = (Rows(rows.image[part], rows.text[part], rows.classes[part]) for part in (train, stop))
        head = fit(replace(Recipe(), **change), len(classes), *parts).head
        predicted[outside] = predict_logits(head, rows.image[outside], rows.text[outside]).argmax(axis=1)
    return score(rows.classes, predicted, classes)


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else "artifacts/features.h5"
    with ProcessPoolExecutor() as pool:
        results = pool.map(out_of_fold, [path] * len(CHANGES), CHANGES)
        for change, found in zip(CHANGES, results, strict=True):
            low, high = found["macro_f1_ci"]
            name = ", ".join(f"{key} {value}" for key, value in change.items()) or "defaults"
            print(f"{name:28} macro-F1 {found['macro_f1']:.3f} [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
    main()
