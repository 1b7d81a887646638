"""compare and ablate: from a cache to a result folder."""

import csv
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import header, rewrite, synthetic_block, write_cache
from mmcli.cache import DataError, FeatureCache, Features, MmcliError, read_labels
from mmcli.heads import Recipe, Rows, RunOptions, evaluate, load_checkpoint, train_head
from mmcli.heads.evaluation.folds import repeated_folds
from mmcli.heads.evaluation.splits import SplitOptions
from mmcli.heads.experiments import Protocol, Setup, candidates_of, compare, modalities_of, single_split
from mmcli.heads.experiments import fits as fits_module
from mmcli.heads.experiments.comparison import out_of_fold as out_of_fold_logits
from mmcli.heads.experiments.comparison import score_candidates
from mmcli.heads.experiments.fits import Data, FoldFit
from mmcli.heads.experiments.results import Comparison, write_out_of_fold
from mmcli.report.comparison_tables import comparison_tables, single_split_tables, verdict
from mmcli.report.tables import score_tables
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, recall_score
from small_experiments import POOLED, QUICK, SMALL, out_of_fold


def test_the_scores_are_those_of_scikit_learn_on_the_written_probabilities(setup):
    result = compare(setup, candidates_of(["concat", "late", "linear"], QUICK), SMALL)
    rows = out_of_fold(result.folder)
    assert len(rows) == 3 * 2 * 400
    tags = read_labels(setup.labels)
    for entry in result.candidates:
        scores = []
        for repeat in ("0", "1"):
            of_repeat = [row for row in rows if (row["candidate"], row["repeat"]) == (entry.name, repeat)]
            assert [row["guid"] for row in of_repeat] == list(tags)
            true = [row["tag"] for row in of_repeat]
            assert true == list(tags.values())
            said = [max(result.data.classes, key=lambda name, row=row: float(row[name])) for row in of_repeat]
            scores.append(
                (
                    f1_score(true, said, average="macro"),
                    accuracy_score(true, said),
                    *f1_score(true, said, average=None),
                    *recall_score(true, said, average=None),
                )
            )
            folds = [
                f1_score(*zip(*[(t, s) for t, s, row in zip(true, said, of_repeat, strict=True) if row["fold"] == fold],
                              strict=True), average="macro")
                for fold in ("0", "1", "2")
            ]  # fmt: skip
            assert entry.fold_macro_f1[3 * int(repeat) : 3 * int(repeat) + 3] == pytest.approx(folds)
        macro, accuracy, *by_class = np.mean(scores, axis=0)
        assert entry.macro_f1 == pytest.approx(macro)
        assert entry.accuracy == pytest.approx(accuracy)
        found = [getattr(entry.per_class[name], what) for what in ("f1", "recall") for name in result.data.classes]
        assert found == pytest.approx(by_class)
        assert entry.macro_f1_ci[0] < entry.macro_f1 < entry.macro_f1_ci[1]
        if entry.difference:
            best = result.candidates[0]
            assert entry.difference.macro_f1 == pytest.approx(entry.macro_f1 - best.macro_f1)


def test_a_result_folder_holds_everything(setup):
    result = compare(setup, candidates_of(["concat", "film"], QUICK), SMALL)
    folder = Path(result.folder)
    assert folder.name.endswith("-compare")
    assert (setup.out / "latest").resolve() == folder.resolve()
    assert {path.name for path in folder.iterdir()} == {
        "results.json", "results.csv", "results.png", "out_of_fold.csv",
    }  # fmt: skip
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["candidate"] for row in rows] == [entry.name for entry in result.candidates]
    assert float(rows[1]["difference"]) == pytest.approx(result.candidates[1].difference.macro_f1, abs=1e-6)
    assert (rows[0]["difference"], rows[0]["against"], rows[1]["against"]) == ("", "", rows[0]["candidate"])
    with Image.open(folder / "results.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_both_modalities_are_better_than_either_where_both_are_needed(setup):
    recipe = Recipe(epochs=15, hidden=(16,), lr=5e-3)
    result = compare(setup, modalities_of(recipe), SMALL, against="both", what="ablate")
    assert result.candidates[0].name == "both"
    for entry in result.candidates[1:]:
        assert entry.difference.high < 0
        assert entry.difference.p_bootstrap_holm < 0.05
    assert result.focus_class == min(
        result.data.classes, key=lambda name: result.data.counts[result.data.classes.index(name)]
    )


def test_the_seed_differs_from_fold_to_fold_and_is_the_same_for_all_candidates(setup, monkeypatch):
    seeds = {}
    original = fits_module.fit

    def spy(recipe, *rest, **more):
        seeds.setdefault(recipe.fusion, []).append(recipe.seed)
        return original(recipe, *rest, **more)

    monkeypatch.setattr(fits_module, "fit", spy)
    compare(setup, candidates_of(["concat", "gated"], QUICK), SMALL)
    assert sorted(seeds["concat"]) == sorted(seeds["gated"]) == list(range(42, 48))


def test_without_test_the_test_rows_are_left_out_of_compare(setup, learnable, tmp_path):
    run = train_head(*learnable, QUICK, split=SplitOptions(seed=5), options=RunOptions(tmp_path / "runs"))
    split = load_checkpoint(run.best_pt).split
    there = Setup(setup.cache, setup.labels, SplitOptions(seed=5), out=setup.out, jobs=1)
    result = compare(there, candidates_of(["concat"], QUICK), Protocol(3, 1, without_test=True))
    assert {row["guid"] for row in out_of_fold(result.folder)} == {*split.train, *split.val}


@pytest.mark.parametrize("name", POOLED)
def test_every_pooled_fusion_and_the_linear_heads_can_be_compared(setup, name):
    names = [name, f"{name}:linear"] if name in ("concat", "product", "late") else [name]
    result = compare(setup, candidates_of(names, QUICK), Protocol(2, 1))
    assert all(entry.macro_f1 > 0.3 for entry in result.candidates)


def test_decision_offsets_are_fitted_on_the_rows_to_stop_by(setup, monkeypatch):
    sizes = []
    original = fits_module.fit_offsets

    def spy(logits, classes):
        sizes.append(len(classes))
        return original(logits, classes)

    monkeypatch.setattr(fits_module, "fit_offsets", spy)
    compare(setup, candidates_of(["concat"], QUICK.changed(offsets=True)), Protocol(2, 1))
    assert sizes == [pytest.approx(20, abs=2)] * 2


@pytest.mark.parametrize(
    ("names", "protocol", "words"),
    [
        (["concat", "magic"], SMALL, "unknown fusion 'magic'"),
        (["concat", "concat"], SMALL, "a name is given twice"),
        ([], SMALL, "name at least one"),
        (["cross_attn"], SMALL, r"holds no token states: run `mmcli featurize .* --tokens`"),
        (
            ["gated:linear"],
            Protocol(2, 1),
            "the linear head cannot learn the weights of gated",
        ),
        (["concat:forest"], SMALL, "unknown head 'forest'"),
        (["concat"], Protocol(1, 1), "at least 2 folds"),
        (["concat"], Protocol(3, 0), "1 repeat"),
        (["concat"], Protocol(200, 1), "two classes with at least 200 rows each are needed"),
    ],
)
def test_comparisons_that_cannot_be(setup, names, protocol, words):
    with pytest.raises(MmcliError, match=words):
        compare(setup, candidates_of(names, QUICK), protocol)


def test_features_that_are_not_finite_are_named(setup, learnable):
    def spoil(columns):
        columns["text"][17, 3] = np.nan

    rewrite(learnable[0], spoil)
    with pytest.raises(
        MmcliError, match=r"1 rows of .* have text embeddings that are not finite or all zero, the first is '17'"
    ):
        compare(setup, candidates_of(["concat"], QUICK), SMALL)
    with pytest.raises(MmcliError, match="not finite"):
        train_head(setup.cache, setup.labels, QUICK, options=RunOptions(setup.out))


def test_one_class_only(setup):
    lines = setup.labels.read_text().splitlines()
    setup.labels.write_text("\n".join([lines[0], *(line.split(",")[0] + ",same" for line in lines[1:])]))
    with pytest.raises(DataError, match="all 400 labelled pairs are 'same': two classes are needed"):
        compare(setup, candidates_of(["concat"], QUICK), SMALL)


def test_differences_from_the_best_allow_for_every_pair(setup):
    names = ["concat", "film", "late", "product"]
    best = compare(setup, candidates_of(names, QUICK), SMALL)
    assert best.differences_tested == 6
    fixed = compare(setup, candidates_of(names, QUICK), SMALL, against=best.against)
    assert fixed.differences_tested == 3
    for one, other in zip(best.candidates, fixed.candidates, strict=True):
        if one.difference:
            assert one.difference.p_bootstrap == other.difference.p_bootstrap
            assert one.difference.p_bootstrap_holm >= other.difference.p_bootstrap_holm


def made_up_fits(n_candidates, hits, n=300, seed=0):
    """Data and fits of candidates that hit the given share of rows each, on twice five folds."""
    random = np.random.default_rng(seed)
    classes = random.choice(3, n, p=[0.3, 0.2, 0.5]).astype(np.int64)
    groups = np.arange(n)
    rows = Rows(Features(np.zeros((n, 2), np.float32), np.zeros((n, 2), np.float32)), classes)
    data = Data(rows, [f"guid{row}" for row in groups], groups, ["a", "b", "c"], "key")
    folds = repeated_folds(classes, groups, data.classes, 5, 2, seed=0)
    fits = []
    for number in range(n_candidates):
        said = np.where(random.random((2, n)) < hits[number], classes, random.integers(0, 3, (2, n)))
        logits = np.eye(3, dtype=np.float32)[said]
        fits += [FoldFit(str(number), fold, logits[fold.repeat, fold.test], 1.0, 1, 1) for fold in folds]
    return data, fits, folds


def test_among_twenty_candidates_one_that_is_far_better_is_called_different():
    """With 190 pairs, 5,000 replicates alone could never do so: 190 times their smallest p is .076."""
    data, fits, _ = made_up_fits(20, [0.95, *[0.3] * 19])
    candidates, against, tested = score_candidates(data, out_of_fold_logits(fits, 300, 3, 2), fits)
    assert (against, tested) == ("0", 190)
    adjusted = [entry.difference.p_bootstrap_holm for entry in candidates[1:]]
    assert max(adjusted) < 0.01
    result = Comparison("folder", "compare", None, "a", Protocol(5, 2), against, tested, candidates, recipes={})
    assert "Different from 0 by both tests" in verdict(result)


def test_among_twenty_equal_candidates_none_is_called_different():
    for seed in range(3):
        data, fits, _ = made_up_fits(20, [0.5] * 20, seed=seed)
        candidates, _, _ = score_candidates(data, out_of_fold_logits(fits, 300, 3, 2), fits)
        assert min(entry.difference.p_bootstrap_holm for entry in candidates[1:]) > 0.05


def test_the_probabilities_are_written_in_bounded_memory(tmp_path):
    """They took 157 MB for 100,000 rows, 14 times, as one string."""
    n = 20_000
    data, fits, folds = made_up_fits(2, [0.5, 0.6], n)
    logits = out_of_fold_logits(fits, n, 3, 2)
    path = tmp_path / "out_of_fold.csv"
    tracemalloc.start()
    write_out_of_fold(path, data, logits, folds)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20
    assert path.stat().st_size > 2 << 20
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["guid"] for row in rows] == data.guids * 4
    for number, row in list(enumerate(rows))[::7]:
        row_logits = logits[row["candidate"]][int(row["repeat"]), number % n].astype(np.float64)
        expected = np.exp(row_logits) / np.exp(row_logits).sum()
        assert [row[name] for name in "abc"] == [f"{prob:.6f}" for prob in expected]
        assert row["tag"] == data.classes[data.rows.classes[number % n]]
    assert {path.name for path in tmp_path.iterdir()} == {"out_of_fold.csv"}


def test_copies_are_drawn_together(setup, learnable):
    """Five copies of 80 pairs say no more than the 80 do."""

    def repeat(columns):
        for name in ("image", "text", "row/image_sha256", "row/text_sha256", "row/cleaned_sha256"):
            columns[name][:] = np.repeat(columns[name][:80], 5, axis=0)

    tags = list(read_labels(setup.labels).values())
    rewrite(learnable[0], repeat)
    setup.labels.write_text("guid,tag\n" + "".join(f"{row},{tags[row // 5]}\n" for row in range(400)))
    result = compare(setup, candidates_of(["linear"], QUICK), SMALL)
    assert result.data.copies == 320
    (entry,) = result.candidates
    low, high = entry.accuracy_ci
    error = np.sqrt(entry.accuracy * (1 - entry.accuracy) / 80)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert "400 rows in 80 groups of copies" in comparison_tables(result)[0].title
    run = train_head(
        *learnable, QUICK, split=SplitOptions(group_duplicates=True), options=RunOptions(setup.out / "runs")
    )
    for scores in (run.scores["test"], evaluate(run.best_pt, on="test").scores["test"]):
        assert (scores.n, scores.n_groups) == (len(load_checkpoint(run.best_pt).split.test), scores.n // 5)
        assert scores.accuracy_ci == run.scores["test"].accuracy_ci
    split = single_split(
        Setup(*learnable, SplitOptions(group_duplicates=True), setup.out, jobs=1), candidates_of(["concat"], QUICK)
    )
    assert split.candidates[0].test.n_groups == run.scores["test"].n_groups
    assert "copies drawn together" in single_split_tables(split, "compare")[0].title
    overall = score_tables({"test": run.scores["test"]}, result.data.classes)[0]
    assert "copies drawn together" in overall.title
    assert [row[1] for row in overall.rows] == [f"{run.scores['test'].n} in {run.scores['test'].n_groups} groups"]


def test_the_largest_seeds_there_are(setup):
    recipe = QUICK.changed(seed=2**32 - 1)
    assert compare(setup, candidates_of(["concat"], recipe), Protocol(2, 2, seed=2**32 - 1)).protocol.repeats == 2


def test_fusions_can_be_given_by_name_and_the_cache_by_its_path(setup, monkeypatch, tmp_path):
    with FeatureCache.open(setup.cache) as cache:
        image, text = cache.embeddings()
        block = synthetic_block(cache.guids, cache.dim)
    block.columns |= {"image": image, "text": text}
    made_of = header()
    made_of.dataset["labels"] = str(setup.labels)
    path = write_cache(tmp_path / "with-labels.h5", block, made_of)
    monkeypatch.chdir(tmp_path)
    names = ["concat", "linear"]
    result = compare(path, names, Protocol(2, 1))
    expected = compare(Setup(path, setup.labels, jobs=1), candidates_of(names, Recipe()), Protocol(2, 1))
    assert {entry.name: entry.macro_f1 for entry in result.candidates} == {
        entry.name: entry.macro_f1 for entry in expected.candidates
    }


def test_classes_with_few_scored_rows_are_named(learnable, tmp_path, cli):
    path, labels = learnable
    rows = labels.read_text().splitlines()
    rows[1:5] = [f"{line.split(',')[0]},odd" for line in rows[1:5]]
    labels.write_text("\n".join(rows) + "\n")
    options = ["--cache", path, "--labels", labels, "--epochs", "1", "--jobs", "1", "--out", tmp_path / "out"]
    code, _, err = cli("compare", "--fusions", "concat", "--folds", "2", "--repeats", "1", *options)
    assert code == 0, err
    assert "fewer than 5 scored rows of 'odd': the F1 is unreliable" in err
