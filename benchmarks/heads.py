"""A head on cached features, compared in one run with the same head in other libraries and with CLIP in the loop.

    pip install -e '.[benchmarks]'
    python benchmarks/heads.py features.h5 CLIP_FOLDER

The head is that of the published report: concat, [256, 64], twelve epochs in batches of 16, split 8:1:1, no class
weights. Ours is the whole process of `mmcli train-head --preset report`, with split, scores, intervals and figures. The
peers are whole processes, too; they read the same features and rows and print a macro-F1: scikit-learn's MLPClassifier
(which has neither dropout nor BatchNorm) and skorch's NeuralNetClassifier with the report's layers. Ours and a peer
take turns.

`CLIP in the loop` is the report's way: in every epoch, a frozen CLIP in float32 decodes and encodes every training pair
(texts padded to 77, batches of 16), then every validation pair. One epoch is timed and multiplied by twelve; with
--loop-pairs, the epoch is timed on that many pairs and scaled.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from common import MMCLI, spread, step

EPOCHS, BATCH, LAYERS = 12, 16, (256, 64)


def rows(cache_path):
    """Return features and classes of the training and the test rows, as train-head splits them."""
    import numpy as np
    from mmcli.cache import FeatureCache, read_labels
    from sklearn.model_selection import train_test_split

    with FeatureCache.open(cache_path) as cache:
        labels = {
            guid: tag for guid, tag in read_labels(cache.header.dataset["labels"]).items() if tag and guid in cache
        }
        tags = np.unique(list(labels.values()), return_inverse=True)[1]
        features = np.concatenate(cache.embeddings(list(labels)), axis=1)
    kept, rest = train_test_split(np.arange(len(tags)), train_size=0.8, random_state=42, stratify=tags)
    _, test = train_test_split(rest, test_size=0.5, random_state=42, stratify=tags[rest])
    mean, deviation = features[kept].mean(axis=0), features[kept].std(axis=0)
    features = (features - mean) / deviation
    return (features[kept], tags[kept]), (features[test], tags[test])


def scikit_learn(cache_path):
    import warnings

    from sklearn.metrics import f1_score
    from sklearn.neural_network import MLPClassifier

    warnings.simplefilter("ignore")  # it warns that twelve epochs are not enough to converge
    train, test = rows(cache_path)
    started = time.perf_counter()
    model = MLPClassifier(LAYERS, batch_size=BATCH, max_iter=EPOCHS, learning_rate_init=3e-4, n_iter_no_change=EPOCHS)
    model.fit(*train)
    return time.perf_counter() - started, f1_score(test[1], model.predict(test[0]), average="macro")


def skorch(cache_path):
    import torch
    from sklearn.metrics import f1_score
    from skorch import NeuralNetClassifier
    from torch import nn

    torch.set_num_threads(1)  # faster for skorch, too
    train, test = rows(cache_path)
    width, layers = train[0].shape[1], []
    for size in LAYERS:
        layers += [nn.Linear(width, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Dropout(0.5)]
        width = size
    started = time.perf_counter()
    model = NeuralNetClassifier(
        nn.Sequential(*layers, nn.Linear(width, 3)), lr=3e-4,
        criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW,
        optimizer__weight_decay=0.05, batch_size=BATCH, max_epochs=EPOCHS, train_split=None, verbose=0,
        iterator_train__shuffle=True, iterator_train__drop_last=len(train[0]) % BATCH == 1,
    )  # fmt: skip
    model.fit(train[0].astype("float32"), train[1].astype("int64"))
    seconds = time.perf_counter() - started
    return seconds, f1_score(test[1], model.predict(test[0].astype("float32")), average="macro")


def clip_in_the_loop(cache_path, folder, pairs):
    """Train one epoch with a frozen CLIP in the loop; return its seconds, and an estimate from each quarter."""
    import torch
    from mmcli.cache import FeatureCache, read_labels
    from mmcli.featurize import Dataset
    from mmcli.featurize.pairs.hashing import load_text
    from PIL import Image
    from torch import nn
    from transformers import CLIPModel, CLIPProcessor

    with FeatureCache.open(cache_path) as cache:
        where = cache.header.dataset
        labels = {guid: tag for guid, tag in read_labels(where["labels"]).items() if tag and guid in cache}
    there = {pair.guid: pair for pair in Dataset.open(where["data"]).pairs}
    names = sorted(set(labels.values()))
    training, total = int(0.8 * len(labels)), int(0.9 * len(labels))
    guids = list(labels)[: min(total, pairs or total)]
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    layers = [nn.Linear(1024, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.5)]
    head = nn.Sequential(*layers, nn.Linear(256, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-4, weight_decay=0.05)
    ends, quarter, started = [], len(guids) // 4, time.perf_counter()
    for start in range(0, 4 * quarter, BATCH):
        some = guids[start : start + BATCH]
        inputs = processor(
            text=[load_text(there[guid].read_text(), True)[0] for guid in some],
            images=[Image.open(there[guid].image).convert("RGB") for guid in some],
            return_tensors="pt", padding="max_length", truncation=True, max_length=77,
        )  # fmt: skip
        with torch.no_grad():
            image = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
            text = model.get_text_features(inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        if start >= training:
            with torch.no_grad():
                head.eval()(torch.cat([image, text], dim=1))
            continue
        classes = torch.tensor([names.index(labels[guid]) for guid in some])
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(torch.cat([image, text], dim=1)), classes).backward()
        optimizer.step()
        if start // quarter != (start + BATCH) // quarter:
            ends.append((time.perf_counter() - started) / (start + len(some)) * total)
    return (time.perf_counter() - started) / (4 * quarter) * total, ends


def our_fit(cache_path):
    from mmcli.heads import RunOptions, train_head
    from mmcli.heads.recipe import PRESETS, Recipe
    from mmcli.heads.runs import fit_store

    fit, seconds = fit_store.fit, []

    def timed(*given, **more):
        started = time.perf_counter()
        found = fit(*given, **more)
        seconds.append(time.perf_counter() - started)
        return found

    fit_store.fit = timed
    with tempfile.TemporaryDirectory() as runs:
        result = train_head(cache_path, recipe=Recipe().changed(**PRESETS["report"]), options=RunOptions(runs))
    return seconds[0], result.scores["test"].macro_f1


PEERS = {"scikit-learn MLPClassifier": scikit_learn, "skorch": skorch}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", help="of a CLIP model; default: CLIP is not timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loop-pairs", type=int)
    parser.add_argument("--step", choices=[*PEERS, "ours", "loop"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "loop":
        print(json.dumps(clip_in_the_loop(args.cache, args.folder, args.loop_pairs)))
        return
    if args.step:
        print(json.dumps((PEERS | {"ours": our_fit})[args.step](args.cache)))
        return
    all_of_ours = []
    with tempfile.TemporaryDirectory() as runs:
        command = [MMCLI, "train-head", "--cache", args.cache, "--preset", "report", "--runs", runs, "--json"]
        for name in PEERS:
            whole, fits, mine, our_fits, scores = [], [], [], [], []
            for _ in range(args.repeats):
                started = time.perf_counter()
                done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
                mine.append(time.perf_counter() - started)
                our_fits.append(step(__file__, args.cache, "--step", "ours")[1][0])
                seconds, (fitted, theirs) = step(__file__, args.cache, "--step", name)
                whole.append(seconds)
                fits.append(fitted)
                scores.append(theirs)
            ratios, fit_ratios = (
                [theirs / ours for theirs, ours in zip(*each, strict=True)]
                for each in ((whole, mine), (fits, our_fits))
            )
            score = json.loads(done.stdout)["test"]["macro_f1"]
            print(
                f"{name}: {spread(whole, 's', 2)}, of that fit {spread(fits, 's', 2)}, test macro-F1 "
                f"{statistics.median(scores):.3f}; ours {spread(mine, 's', 2)}, its fit {spread(our_fits, 's', 2)}, "
                f"{score:.3f}: whole {spread(ratios, 'times', 2)}, fit {spread(fit_ratios, 'times', 2)}",
                flush=True,
            )
            all_of_ours += mine
    if args.folder is not None:
        limited = [] if args.loop_pairs is None else ["--loop-pairs", args.loop_pairs]
        _, (epoch, ends) = step(__file__, args.cache, args.folder, "--step", "loop", *limited)
        ratios = [EPOCHS * epoch / ours for ours in all_of_ours]
        print(
            f"CLIP in the loop: {epoch:.0f} s an epoch (by its quarters {min(ends):.0f} to {max(ends):.0f}), "
            f"{EPOCHS * epoch:.0f} s for {EPOCHS}: {spread(ratios, 'times ours', 0)}"
        )


if __name__ == "__main__":
    main()
