"""Stage 2 compared with the same epochs with both towers in the loop, in one run on the same pairs.

    mmcli featurize DATA --labels LABELS --backbone CLIP_FOLDER --out features.h5
    python benchmarks/finetune.py features.h5

Ours is the whole process of `mmcli finetune --epochs 5`: three times with nothing kept beside the cache, then with
other learning rates, when the frozen part is already there. The peer is the usual loop: every pair goes through the
whole CLIP in every step, with all but the last text layer frozen. Its pictures are decoded and resized beforehand, to
its advantage. `float32, padded to 77` is the plain version, `bfloat16, padded to the longest` a careful one. One epoch
of each is timed and multiplied by the number of epochs. Neither looks at the test rows.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import MMCLI, ended, spread

TRAIN, HELD_OUT, EPOCHS, BATCH = 3200, 200, 5, 16


def make_split(cache_path, folder):
    """Write a random split with 3,200 training rows."""
    from mmcli.cache import FeatureCache
    from mmcli.heads.runs.labelled import labels_of

    with FeatureCache.open(cache_path) as cache:
        _, labels, _ = labels_of(cache, None)
    guids = list(labels)
    random.Random(0).shuffle(guids)
    if len(guids) < TRAIN + 2 * HELD_OUT:
        raise SystemExit(f"{len(guids)} labelled rows, {TRAIN + 2 * HELD_OUT} are needed")
    ends = {"val": HELD_OUT, "test": 2 * HELD_OUT, "train": 2 * HELD_OUT + TRAIN}
    start = 0
    folder.mkdir()
    for name, end in ends.items():
        rows = "".join(f"{guid},{labels[guid]}\n" for guid in guids[start:end])
        (folder / f"{name}_split.csv").write_text("guid,tag\n" + rows)
        start = end


def watched(command, log):
    """Run a command; return (seconds, seconds to the first step, peak memory in GB)."""
    started, first = time.perf_counter(), None
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE, text=True)
        for line in child.stderr:
            if first is None and re.match(r"train: 1/", line):
                first = time.perf_counter() - started
    seconds, memory = ended(child, command, started)
    return seconds, first, memory / 1e9


def loop(best_pt, dtype, pad_to):
    """Time one epoch with both towers in the loop; print seconds of each quarter of it, and peak memory."""
    import contextlib
    import resource

    import numpy as np
    import torch
    from mmcli.cache import FeatureCache, read_labels
    from mmcli.featurize import Dataset, open_backbone
    from mmcli.featurize.pairs.hashing import load_text
    from mmcli.featurize.pairs.image import decode_image
    from mmcli.heads import load_checkpoint
    from mmcli.heads.model.inputs import Batch
    from transformers import AutoModel, AutoTokenizer

    checkpoint = load_checkpoint(best_pt)
    head, guids = checkpoint.head.heads[0].train(), checkpoint.split.train
    labels = read_labels(checkpoint.made_from["labels"])
    classes = torch.tensor([checkpoint.classes.index(labels[guid]) for guid in guids])
    folder = open_backbone(checkpoint.backbone["name"]).folder
    encoder = open_backbone(checkpoint.backbone["name"]).load("cpu", "float32", None)
    with FeatureCache.open(checkpoint.made_from["cache"]) as cache:
        pairs = {pair.guid: pair for pair in Dataset.open(cache.header.dataset["data"]).pairs}
    texts = [load_text(pairs[guid].read_text(), True)[0] for guid in guids]
    pixels = np.stack([encoder.prepare_image(decode_image(pairs[guid].read_image())) for guid in guids])
    model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    unfrozen = [model.text_model.encoder.layers[-1], model.text_model.final_layer_norm]
    parameters = [each for module in unfrozen for each in module.requires_grad_(True).parameters()]
    groups = [{"params": parameters, "lr": 5e-6}, {"params": list(head.parameters()), "lr": 1e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    order = np.random.default_rng(0).permutation(len(guids))
    steps, quarters, started = len(guids) // BATCH, [], time.perf_counter()
    for step in range(steps):
        rows = order[step * BATCH : (step + 1) * BATCH]
        tokens = tokenizer(
            [texts[row] for row in rows], return_tensors="pt", padding=pad_to, truncation=True, max_length=77
        )
        low = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
        with low:
            with torch.no_grad():
                image = model.get_image_features(pixel_values=torch.from_numpy(pixels[rows])).pooler_output
            text = model.get_text_features(**tokens).pooler_output
        logits = head(Batch(image.float(), text.float()))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, classes[rows]).backward()
        optimizer.step()
        if (step + 1) % (steps // 4) == 0:
            quarters.append(time.perf_counter() - started)
            started = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"quarters": quarters, "memory": memory}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loop", nargs=2, metavar=("DTYPE", "PAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        loop(args.cache, *args.loop)
        return
    with tempfile.TemporaryDirectory(dir=args.cache.resolve().parent) as made:
        folder = Path(made)
        cache = folder / "features.h5"
        os.link(args.cache.resolve(), cache)
        make_split(cache, folder / "parts")
        runs, log = folder / "runs", folder / "log.txt"
        command = [MMCLI, "train-head", "--cache", cache, "--split-dir", folder / "parts", "--runs", runs]
        subprocess.run(command, check=True, capture_output=True)
        best_pt = (runs / "latest").resolve() / "best.pt"
        ours = [MMCLI, "finetune", "--from", best_pt, "--runs", runs, "--epochs", EPOCHS, "--patience", EPOCHS]
        ours = [str(each) for each in ours]
        cold = []
        for _ in range(args.repeats):
            subprocess.run(["rm", "-rf", f"{cache}.states"], check=True)
            cold.append(watched(ours, log))
        warm = [watched([*ours, "--lr-backbone", f"{rate}e-6"], log) for rate in range(6, 6 + args.repeats)]
        for name, found in (("first finetune", cold), ("second finetune", warm)):
            seconds, first, memory = zip(*found, strict=True)
            whole, begun = (spread(each, "s") for each in (seconds, first))
            print(f"{name}: {whole}, first step after {begun}, peak {max(memory):.2f} GB")
        for name, dtype, pad in (
            ("float32, padded to 77", "float32", "max_length"),
            ("bfloat16, padded to the longest", "bfloat16", "longest"),
        ):
            looped = [sys.executable, __file__, str(best_pt), "--loop", dtype, pad]
            done = subprocess.run(looped, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            whole = EPOCHS * sum(found["quarters"])
            low, high = (4 * EPOCHS * each for each in (min(found["quarters"]), max(found["quarters"])))
            ratios = [whole / each[0] for each in cold]
            print(
                f"both towers in the loop, {name}: {whole:.0f} s for {EPOCHS} epochs (by its quarters {low:.0f} to "
                f"{high:.0f}), peak {found['memory']:.2f} GB; {spread(ratios, 'times ours')}"
            )


if __name__ == "__main__":
    main()
