"""Growth of time and memory with the number of pairs: caches of 10^4, 10^5 and 10^6 rows of random features.

    python benchmarks/scale.py --rows 10000 100000 1000000

Each step is a process of its own, so its peak memory is its own. `open` reads the header and every guid. `split` reads
labels, finds copies and splits 8:1:1. `train-head` trains for three epochs; the third epoch with its validation score
is also timed alone. `evaluate` scores the test rows, `predict` every row. `train-head --max-memory` leaves features in
the file if they do not fit. `featurize` does all of its steps on tiny pictures around a backbone that costs nothing.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import MMCLI, ended

DIM, BLOCK, CLASSES = 512, 20_000, ("negative", "neutral", "positive")
IDENTITY = {"backbone": {"kind": "random"}, "dtype": "bfloat16", "image": {"resize": None}, "text": {"cleaning": 1}}


def make_cache(path, rows):
    """Write a cache of random features, and labels that depend weakly on them."""
    from mmcli.cache.parts import Block, merge, write_part
    from mmcli.cache.schema import Header

    labels = path.with_suffix(".csv")
    header = Header(IDENTITY, {"name": "random", "revision": None}, {"data": "/nowhere", "labels": str(labels)}, {})
    rng = np.random.default_rng(0)
    merged, tags = [], []
    for number, start in enumerate(range(0, rows, BLOCK)):
        guids = [str(guid) for guid in range(start, min(start + BLOCK, rows))]
        shape = (len(guids), DIM)
        image, text = (rng.standard_normal(shape, np.float32) for _ in range(2))
        tags += [CLASSES[each] for each in np.digitize(image[:, 0] + text[:, 0] + image[:, 1] * text[:, 1], [-1, 0])]
        columns = {"image": image.astype(np.float16), "text": text.astype(np.float16)}
        for name in ("image", "text", "cleaned"):
            columns[f"row/{name}_sha256"] = rng.integers(0, 256, (len(guids), 32), np.uint8)
        columns["row/codec"] = np.array([b"utf-8"] * len(guids), "S8")
        columns["row/truncated"] = np.zeros(len(guids), bool)
        part = write_part(path.parent / "parts", number, Block(guids, columns), header)
        merged += [(guid, part, row) for row, guid in enumerate(guids)]
    merge(path, merged, header)
    subprocess.run(["rm", "-r", path.parent / "parts"], check=True)
    labels.write_text("guid,tag\n" + "".join(f"{guid},{tag}\n" for guid, tag in enumerate(tags)))


def make_pairs(folder, pairs):
    """Write tiny pictures, all different, and short texts."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for guid in range(pairs):
        picture = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(picture, "PNG")
        (folder / f"{guid}.png").write_bytes(picture.getvalue())
        (folder / f"{guid}.txt").write_text(f"text number {guid}")


def step(name, cache, max_memory):
    """Do one step on ``cache``; for training, print the seconds of the last epoch."""
    from mmcli.cache import FeatureCache

    if name == "make":
        make_cache(cache, int(cache.stem))
    elif name == "import":
        import mmcli.heads  # noqa: F401
    elif name == "open":
        with FeatureCache.open(cache) as opened:
            print(len(opened.guids))
    elif name == "split":
        from mmcli.heads.evaluation.folds import groups_by_guid
        from mmcli.heads.evaluation.splits import SplitOptions, divide
        from mmcli.heads.runs.labelled import labels_of

        with FeatureCache.open(cache) as opened:
            _, labels, _ = labels_of(opened, None)
            divide(labels, groups_by_guid(opened, list(labels)), SplitOptions())
    elif name == "train-head":
        train(cache, max_memory)
    elif name == "pairs":
        make_pairs(cache, int(cache.name.split("-")[1]))
    elif name == "featurize":
        featurize_for_free(cache)


def train(cache, max_memory):
    """Train a head for three epochs."""
    from mmcli.commands.options import parse_bytes
    from mmcli.heads import Recipe, RunOptions, train_head

    ends = []
    options = RunOptions(cache.with_suffix(".runs"), max_bytes=parse_bytes(max_memory))
    result = train_head(
        cache, recipe=Recipe(epochs=3), options=options, on_fit=lambda *epochs: ends.append(time.perf_counter())
    )
    test = result.scores["test"].macro_f1
    print(json.dumps({"epoch": ends[3] - ends[2], "best_pt": result.best_pt, "test": test}))


def featurize_for_free(folder):
    """Featurize ``folder`` with a backbone that computes nothing."""
    import mmcli.featurize.pipeline as pipeline
    from mmcli.featurize.backbones.base import Backbone, Encoded, Encoder
    from mmcli.featurize.identity import FeaturizeOptions

    class Free(Encoder):
        def prepare_image(self, image):
            return np.asarray(image, np.float32).transpose(2, 0, 1)

        def tokenize(self, texts):
            return [[1, 2, 3] for _ in texts], [False for _ in texts]

        def encode_images(self, pixels, tokens=False):
            return Encoded(np.resize(pixels.reshape(len(pixels), -1), (len(pixels), DIM)))

        def encode_texts(self, ids, tokens=False):
            return Encoded(np.ones((len(ids), DIM), np.float32))

        text_layers = vision_layers = images_below = texts_below = image_top = text_top = None

    class FreeBackbone(Backbone):
        name = "free"

        def identity(self):
            return {"kind": "free"}

        def load(self, device, dtype, resize):
            return Free()

    pipeline.open_backbone = lambda name, revision=None: FreeBackbone()
    out = folder.with_suffix(".h5")
    print(pipeline.featurize(folder, None, out, FeaturizeOptions(dtype="float32")).rows)


def measured(command):
    """Run a command; return (seconds, peak memory in bytes, what it printed)."""
    started = time.perf_counter()
    child = subprocess.Popen([str(each) for each in command], stdout=subprocess.PIPE, text=True)
    printed = child.stdout.read()
    return *ended(child, command, started), printed


def heads(folder, rows, max_memory):
    """Measure every step on a cache of ``rows``; yield (step, seconds, peak bytes)."""
    cache = folder / f"{rows}.h5"
    own = [sys.executable, __file__, "--step"]
    # In its own process, too, because a process starts with the peak of its parent.
    yield ("(making the cache)", *measured([*own, "make", cache])[:2])
    for name in ("import", "open", "split"):
        yield (name, *measured([*own, name, cache])[:2])
    for name, budget in (("train-head", "1TB"), (f"train-head --max-memory {max_memory}", max_memory)):
        seconds, memory, printed = measured([*own, "train-head", cache, "--max-memory", budget])
        yield name, seconds, memory
        found = json.loads(printed)
        yield f"  an epoch (test F1 {found['test']:.3f})", found["epoch"], memory
    best_pt = found["best_pt"]
    yield ("evaluate", *measured([MMCLI, "evaluate", "--from", best_pt, "--on", "test", "--json"])[:2])
    ids = folder / "ids.txt"
    ids.write_text("guid,tag\n" + "".join(f"{guid},\n" for guid in range(rows)))
    out = ["--out", folder / "predicted.txt"]
    yield ("predict", *measured([MMCLI, "predict", "--from", best_pt, "--ids", ids, *out])[:2])
    cache.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--pairs", type=int, nargs="*", default=[10_000, 100_000], help="for featurize")
    parser.add_argument("--max-memory", default="2GB")
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the system's temporary folder")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step(args.step[0], Path(args.step[1]), args.max_memory)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        print(f"{'rows':>9} {'step':<28} {'seconds':>9} {'GB':>6} {'of feature bytes':>17}")
        for rows in args.rows:
            for name, seconds, memory in heads(folder, rows, args.max_memory):
                share = memory / (rows * 2 * DIM * 2)
                print(f"{rows:>9} {name:<28} {seconds:>9.2f} {memory / 1e9:>6.2f} {share:>17.2f}", flush=True)
        for pairs in args.pairs:
            measured([sys.executable, __file__, "--step", "pairs", folder / f"pairs-{pairs}"])
            for name in ("featurize", "featurize again"):
                command = [sys.executable, __file__, "--step", "featurize", folder / f"pairs-{pairs}"]
                seconds, memory, _ = measured(command)
                print(f"{pairs:>9} {name:<28} {seconds:>9.2f} {memory / 1e9:>6.3f}", flush=True)


if __name__ == "__main__":
    main()
