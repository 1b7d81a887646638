"""Small datasets and small models that the tests make for themselves."""

import json
import shutil
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from free_backbone import FreeBackbone
from mmcli.cache import FeatureCache
from mmcli.cache.parts import Block, merge, write_part
from mmcli.cache.schema import Header
from mmcli.featurize import pipeline, plan
from PIL import Image

WORDS = ["sun", "rain", "love", "hate", "tree", "house", "fine", "bad", "good", "day", "night", "the", "a", "is"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as numerical the tests of modules that import a bound from ``tolerances``."""
    for item in items:
        if {"close_rows", "EXACT", "HALF"} & vars(item.module).keys():
            item.add_marker("numerical")


def pytest_runtest_setup(item):
    """Skip tests of a device that is not here."""
    for name in ("cuda", "mps"):
        if item.get_closest_marker(name):
            torch = pytest.importorskip("torch")
            if not {"cuda": torch.cuda, "mps": torch.backends.mps}[name].is_available():
                pytest.skip(f"there is no {name} device here")


def write_pair(folder, guid, seed=None, size=(48, 40)):
    """Write one readable pair; its content depends on ``seed`` alone."""
    random = Random(f"pair {guid if seed is None else seed}")
    folder.mkdir(parents=True, exist_ok=True)
    coarse = np.array([[[random.randrange(256) for _ in range(3)] for _ in range(4)] for _ in range(4)], np.uint8)
    Image.fromarray(coarse).resize(size).save(folder / f"{guid}.jpg", quality=90)
    text = " ".join(random.choices(WORDS, k=random.randint(1, 12)))
    (folder / f"{guid}.txt").write_text(text, encoding="utf-8")


@pytest.fixture
def pairs(tmp_path):
    """Return a function that makes a folder of n pairs and a labels file."""

    def make(n=12, name="data"):
        folder = tmp_path / name
        for guid in range(1, n + 1):
            write_pair(folder, guid)
        labels = tmp_path / f"{name}.csv"
        rows = [f"{guid},{('negative', 'neutral', 'positive')[guid % 3]}" for guid in range(1, n + 1)]
        labels.write_text("guid,tag\n" + "\n".join(rows) + "\n")
        return folder, labels

    return make


def byte_vocabulary():
    """Return CLIP's vocabulary without merges: every byte, alone and as the end of a word."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(code) for code in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A CLIP folder with the real architecture, a byte tokenizer and small random weights."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("tiny-clip")
    vocabulary = byte_vocabulary()
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"vocab_size": len(vocabulary), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end, **small}
    vision = {"patch_size": 16, "image_size": 64, **small}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    model.eval().save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special |= {"pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", **size}))
    return folder


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Return a function that runs a command in an empty folder, as a user would: (exit code, stdout, stderr)."""
    from mmcli.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmcli", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def header(**identity):
    """Return a cache header for synthetic features."""
    made = {"backbone": {"kind": "none"}, "dtype": "float32", "image": {"resize": None}, "text": {"cleaning": 1}}
    return Header(made | identity, {"name": "synthetic", "revision": None}, {"data": "/none", "labels": None}, {})


def synthetic_block(guids, dim=8, seed=0, store=np.float32):
    """Return a block of random embeddings."""
    random = np.random.default_rng(seed)
    n = len(guids)
    return Block(
        list(guids),
        {
            "image": random.standard_normal((n, dim)).astype(store),
            "text": random.standard_normal((n, dim)).astype(store),
            "row/image_sha256": random.integers(0, 256, (n, 32), dtype=np.uint8),
            "row/text_sha256": random.integers(0, 256, (n, 32), dtype=np.uint8),
            "row/cleaned_sha256": random.integers(0, 256, (n, 32), dtype=np.uint8),
            "row/codec": np.array([b"utf-8"] * n, dtype="S8"),
            "row/truncated": np.zeros(n, dtype=bool),
        },
    )


def write_cache(path: Path, block, made=None):
    """Write a cache file that holds one block."""
    made = made or header()
    part = write_part(path.parent / "parts-of-test", 0, block, made)
    merge(path, [(guid, part, row) for row, guid in enumerate(block.guids)], made)
    return path


@pytest.fixture
def learnable(tmp_path):
    """A cache and labels in which text and image together tell the class, either alone only in part."""
    random = np.random.default_rng(0)
    n, dim = 400, 16
    sides = random.integers(-1, 2, (n, 2))
    classes = np.sign(sides.sum(axis=1)) + 1
    block = synthetic_block([str(guid) for guid in range(n)], dim)
    for name, side in (("image", 0), ("text", 1)):
        block.columns[name] = (0.7 * block.columns[name]).astype(np.float32)
        block.columns[name][:, 0] += 3 * sides[:, side]
        block.columns[name][:, 1] += 3 * (sides[:, side] == 0)
    path = write_cache(tmp_path / "features.h5", block)
    names = ("negative", "neutral", "positive")
    labels = tmp_path / "labels.csv"
    labels.write_text("guid,tag\n" + "".join(f"{guid},{names[classes[guid]]}\n" for guid in range(n)))
    return path, labels


@pytest.fixture
def free(monkeypatch):
    """Make every backbone the free one, and blocks small."""
    backbone = FreeBackbone()
    monkeypatch.setattr(pipeline, "open_backbone", lambda name, revision=None: backbone)
    monkeypatch.setattr(plan, "BLOCK_ROWS", 5)
    return backbone


def content(path):
    """Return {guid: all that the file holds of it}."""
    with FeatureCache.open(path) as cache:
        names = [*cache.embedding_names(), "row/image_sha256", "row/text_sha256", "row/codec"]
        rows = {guid: [cache.file[name][row].tobytes() for name in names] for row, guid in enumerate(cache.guids)}
        if cache.has_tokens:
            for row, guid in enumerate(cache.guids):
                rows[guid].append(cache.text_tokens(row).tobytes())
        return rows


def rewrite(path, change, target=None):
    """Write a cache of synthetic features again, its columns changed in place by ``change``."""
    with FeatureCache.open(path) as cache:
        image, text = cache.embeddings()
        block = synthetic_block(cache.guids, cache.dim)
    block.columns |= {"image": image, "text": text}
    change(block.columns)
    return write_cache(target or path, block)


def interrupt_at_third(monkeypatch, module, name):
    """Make the third call of ``module.name`` a Ctrl-C; return the function that makes it as it was."""
    original, made = getattr(module, name), []

    def interrupt(*arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(module, name, interrupt)
    return lambda: monkeypatch.setattr(module, name, original)


@pytest.fixture
def setup(learnable, tmp_path):
    """Return where experiments on ``learnable`` read and write."""
    from mmcli.heads.experiments import Setup

    path, labels = learnable
    return Setup(path, labels, out=tmp_path / "experiments", jobs=1)


@pytest.fixture
def fitted(monkeypatch):
    """Collect the candidates of the fits that are really made."""
    from mmcli.heads.experiments import fits

    names = []
    original = fits._fit_fold

    def spy(task, store):
        names.append(task.candidate.name)
        return original(task, store)

    monkeypatch.setattr(fits, "_fit_fold", spy)
    return names


@pytest.fixture(scope="session")
def raw_sixty(tmp_path_factory):
    """Sixty pairs of which the words and the colour tell the class, in part; and a labels file."""
    folder = tmp_path_factory.mktemp("sixty")
    random = Random("sixty")
    names = ("negative", "neutral", "positive")
    words = {"negative": ["hate", "bad", "rain"], "neutral": ["tree", "house", "day"], "positive": ["love", "good"]}
    for guid in range(60):
        write_pair(folder / "data", guid)
        chosen = random.choices([*words[names[guid % 3]], *WORDS], k=random.randint(2, 9))
        (folder / "data" / f"{guid}.txt").write_text(" ".join(chosen))
    rows = "".join(f"{guid},{names[guid % 3]}\n" for guid in range(60))
    (folder / "labels.csv").write_text("guid,tag\n" + rows)
    return folder / "data", folder / "labels.csv"


@pytest.fixture(scope="session")
def cached_sixty(raw_sixty, tiny_clip, tmp_path_factory):
    """The cache of those pairs by the small CLIP, in float32 and with tokens; copy it before you write beside it."""
    from mmcli.featurize import FeaturizeOptions, featurize

    out = tmp_path_factory.mktemp("cache-of-sixty") / "features.h5"
    featurize(*raw_sixty, out, FeaturizeOptions(backbone=str(tiny_clip), dtype="float32", tokens=True))
    return out


@pytest.fixture
def sixty(cached_sixty, tmp_path):
    """A copy of that cache, to work with."""
    return shutil.copy(cached_sixty, tmp_path / "sixty.h5")


@pytest.fixture
def stage1(sixty, tmp_path):
    """Return a function that trains a head on it and returns its best.pt."""
    from mmcli.heads import Recipe, RunOptions, train_head
    from mmcli.heads.evaluation.splits import SplitOptions

    def make(runs="runs", seeds=1, **settings):
        recipe = Recipe(epochs=3, hidden=(16,), lr=5e-3).changed(**settings)
        split, options = SplitOptions(group_duplicates=False), RunOptions(tmp_path / runs, seeds, jobs=1)
        return Path(train_head(sixty, recipe=recipe, split=split, options=options).best_pt)

    return make


@pytest.fixture
def tuned(stage1, tmp_path):
    """Return a function that does both stages and returns the result of the second."""
    from mmcli.finetune import FinetuneOptions, finetune
    from small_finetune import LEARNS

    def make(settings=None, seeds=None, of_stage1=1, **recipe):
        best_pt = stage1(seeds=of_stage1, **recipe)
        return finetune(best_pt, LEARNS | (settings or {}), options=FinetuneOptions(tmp_path / "runs", seeds=seeds))

    return make


@pytest.fixture
def decide(monkeypatch):
    """Return a function that says which stage is to be kept, whatever the scores."""
    from mmcli.heads.experiments import fits
    from mmcli.heads.runs import stages

    def patch(stage_2):
        for module in (stages, fits):
            monkeypatch.setattr(module, "stage2_is_better", lambda *scores: stage_2)

    return patch


@pytest.fixture
def kept_whatever(decide):
    """Keep stage 2 even where it is no better, so that its best.pt can be looked at."""
    decide(True)
