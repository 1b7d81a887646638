"""One split, as the published report has it."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import synthetic_block, write_cache
from mmcli.cache import FeatureCache
from mmcli.heads import RunOptions, load_checkpoint, train_head
from mmcli.heads.evaluation.splits import SplitOptions
from mmcli.heads.experiments import Setup, candidates_of, single_split
from small_experiments import QUICK


def test_the_single_split_is_that_of_train_head(setup, learnable, tmp_path):
    run = train_head(*learnable, QUICK, options=RunOptions(tmp_path / "runs"))
    result = single_split(setup, candidates_of(["concat", "film"], QUICK))
    written = json.loads((Path(result.folder) / "results.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    entry = result.candidates[0]
    assert result.n_rows == {"train": 320, "val": 40, "test": 40}
    for part in ("val", "test"):
        assert getattr(entry, part).macro_f1 == pytest.approx(run.scores[part].macro_f1)
    assert entry.gap == pytest.approx(run.scores["val"].macro_f1 - run.scores["test"].macro_f1)
    assert entry.parameters == run.parameters


def test_a_single_split_of_some_classes_only_and_its_notes(setup, learnable, tmp_path, cli):
    run = train_head(*learnable, QUICK, options=RunOptions(tmp_path / "runs"))
    seen = load_checkpoint(run.best_pt).split
    path, labels = learnable
    with FeatureCache.open(path) as cache:
        image, text = cache.embeddings()
        block = synthetic_block([*cache.guids, "400"], image.shape[1])
    block.columns |= {"image": np.vstack([image, image[:1]]), "text": np.vstack([text, text[:1]])}
    block.columns["row/image_sha256"][seen_rows(seen.train[:5])] = block.columns["row/image_sha256"][
        seen_rows(seen.test[:5])
    ]
    write_cache(path, block)
    labels.write_text(labels.read_text() + "400,furious\n")
    there = Setup(path, labels, SplitOptions(Path(run.run) / "splits", new="none"), setup.out, jobs=1)
    result = single_split(there, candidates_of(["concat"], QUICK.changed(offsets=True)))
    assert result.data.classes == ["negative", "neutral", "positive"]
    assert (result.data.rows.duplicates_separated, result.offsets) == (5, True)
    arguments = (
        "--cache",
        path,
        "--labels",
        labels,
        "--split-dir",
        Path(run.run) / "splits",
        "--epochs",
        "1",
        "--new",
        "none",
    )
    code, _, err = cli("compare", "--single-split", "--fusions", "concat", "--offsets", "--jobs", "1", *arguments)
    assert code == 0, err
    assert "5 validation and test pairs have a copy" in err
    assert "the offsets were fitted on the validation rows" in err
    assert "1 labelled pairs are in no part of --split-dir: left out" in err


def seen_rows(guids):
    return [int(guid) for guid in guids]
