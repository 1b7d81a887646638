"""Stage 2 as a candidate of `compare` and `sweep`, on the same folds as stage 1."""

import json

import numpy as np
import pytest
from mmcli.cache import FeatureCache, MmcliError
from mmcli.heads import Recipe
from mmcli.heads.evaluation.splits import SplitOptions
from mmcli.heads.experiments import Protocol, Setup, candidates_of, compare, fits, grid_of, modalities_of, sweep
from mmcli.heads.recipe import parse_setting
from small_experiments import SMALL, out_of_fold

HEAD = Recipe(epochs=3, hidden=(16,), lr=5e-3)
QUICK = {"epochs": 1, "lr_backbone": 1e-3, "lr_head": 1e-3}


@pytest.fixture
def setup(sixty, tmp_path):
    return Setup(sixty, out=tmp_path / "experiments", jobs=1)


def both(setup, recipe=HEAD, **settings):
    return candidates_of(["concat", "concat:finetune"], recipe, QUICK | settings)


def test_stage_2_is_scored_on_the_same_folds(setup, fitted):
    result = compare(setup, both(setup), SMALL)
    entries = {entry.name: entry for entry in result.candidates}
    assert set(entries) == {"concat", "concat:finetune"}
    rows = {name: [row for row in out_of_fold(result.folder) if row["candidate"] == name] for name in entries}
    of_fold = {name: [(row["repeat"], row["fold"], row["guid"]) for row in each] for name, each in rows.items()}
    assert of_fold["concat"] == of_fold["concat:finetune"]
    assert entries["concat:finetune"].parameters > entries["concat"].parameters
    difference = next(entry.difference for entry in result.candidates if entry.difference)
    assert difference.low <= difference.macro_f1 <= difference.high
    assert fitted == ["concat:finetune"] * 6 + ["concat"] * 6  # the long ones first


def test_finished_fits_of_stage_2_are_kept(setup, fitted, monkeypatch):
    first = compare(setup, both(setup), SMALL)
    fitted.clear()
    monkeypatch.setattr(fits, "open_last_layers", lambda *_: pytest.fail("nothing is to be fitted"))
    again = compare(setup, both(setup), SMALL)
    assert fitted == []
    assert [each.macro_f1 for each in again.candidates] == [each.macro_f1 for each in first.candidates]


def test_other_settings_are_other_fits(setup, fitted):
    compare(setup, both(setup), Protocol(2, 1))
    fitted.clear()
    compare(setup, both(setup, warmup=0.5), Protocol(2, 1))
    assert fitted == ["concat:finetune"] * 2


def test_processes_give_what_one_gives(setup, tmp_path):
    alone = compare(setup, both(setup), Protocol(2, 1))
    spread = Setup(setup.cache, out=tmp_path / "spread", jobs=2)
    together = compare(spread, both(spread), Protocol(2, 1))
    for one, other in zip(out_of_fold(alone.folder), out_of_fold(together.folder), strict=True):
        assert one["guid"] == other["guid"]
        for name in alone.data.classes:
            assert abs(float(one[name]) - float(other[name])) < 1e-3


@pytest.mark.parametrize(
    "recipe", [HEAD.changed(offsets=True), HEAD.changed(modality="image"), HEAD.changed(head="linear")]
)
def test_heads_of_all_kinds_go_on(setup, recipe):
    result = compare(setup, both(setup, recipe), Protocol(2, 1))
    assert all(np.isfinite(entry.macro_f1) for entry in result.candidates)


def test_where_it_is_no_better_stage_1_is_kept(setup):
    """Ruined by its rates, stage 2 is not better on the rows to stop by, and every row is predicted by stage 1."""
    result = compare(setup, both(setup, lr_backbone=1.0, lr_head=1.0), Protocol(2, 1))
    rows = {
        name: [row for row in out_of_fold(result.folder) if row["candidate"] == name]
        for name in ("concat", "concat:finetune")
    }
    same = [
        one["positive"] == other["positive"] for one, other in zip(rows["concat"], rows["concat:finetune"], strict=True)
    ]
    assert np.mean(same) >= 0.5  # at least one of two folds


def test_a_sweep_over_rates_of_stage_2(setup):
    grid = grid_of(["finetune.lr_backbone=1e-4,1e-3"])
    result = sweep(setup, HEAD.with_finetune(QUICK), grid, protocol=Protocol(2, 1))
    names = {entry.name for entry in result.candidates}
    # 1e-3 is what `QUICK` has, so it is the same candidate as stage 2 as it is.
    assert names == {"current settings", "finetune", "finetune.lr_backbone=0.0001"}
    assert result.against == "current settings"
    assert result.protocol.without_test
    winner = result.candidates[0].name
    assert result.best_goes_on == (winner != "current settings")
    assert result.best == ({"finetune.lr_backbone": 1e-4} if winner.endswith("0.0001") else {})


def test_each_candidate_of_a_sweep_is_trained_by_its_own_settings_of_stage_2(setup):
    """Candidates with the same layers share their states, and nothing else."""
    grid = grid_of(["finetune.epochs=1,3", "finetune.lr_backbone=1e-9,1e-2"])
    result = sweep(setup, HEAD.with_finetune(QUICK | {"patience": 3, "epochs": 2}), grid, protocol=Protocol(2, 1))
    epochs = {entry.name: entry.epochs for entry in result.candidates}
    assert epochs["finetune"] == 2
    for name, count in epochs.items():
        if name.startswith("finetune.epochs"):
            assert count == int(name[len("finetune.epochs=")])
    probs = {(row["candidate"], row["guid"]): row["positive"] for row in out_of_fold(result.folder)}
    small, large = (f"finetune.epochs=3 finetune.lr_backbone={rate}" for rate in ("1e-09", "0.01"))
    assert any(probs[small, guid] != probs[large, guid] for name, guid in probs if name == small)


def test_stage_1_of_a_candidate_sees_views_even_if_stage_2_trains_image_layers(raw_sixty, tiny_clip, tmp_path):
    from mmcli.featurize import FeaturizeOptions, featurize
    from mmcli.heads.training.training_rows import TrainingRows

    cache = tmp_path / "views.h5"
    featurize(*raw_sixty, cache, FeaturizeOptions(backbone=str(tiny_clip), dtype="float32", views=2))
    with_views = []
    original = TrainingRows.__init__

    def spy(rows, *arguments):
        original(rows, *arguments)
        with_views.append((bool(rows.head.tops), rows.with_views))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRows, "__init__", spy)
        setup = Setup(cache, out=tmp_path / "experiments", jobs=1)
        settings = QUICK | {"unfreeze_vision_layers": 1, "unfreeze_text_layers": 0}
        compare(setup, candidates_of(["concat:finetune"], HEAD.changed(views=True), settings), Protocol(2, 1))
    assert set(with_views) == {(False, True), (True, False)}  # stage 1 with views, stage 2 without


def test_the_test_rows_choose_nothing(setup, sixty, tmp_path, fitted):
    """With other labels of the test rows, no fit of a sweep is made anew: none depends on them."""
    from mmcli.heads.evaluation.splits import stratified_split
    from mmcli.heads.runs.labelled import labels_of

    with FeatureCache.open(sixty) as cache:
        _, labels, _ = labels_of(cache, None)
    split = stratified_split(list(labels), list(labels.values()))

    def run(chosen):
        path = tmp_path / "labels.csv"
        path.write_text("guid,tag\n" + "".join(f"{guid},{tag}\n" for guid, tag in chosen.items()))
        parts = tmp_path / "parts"
        parts.mkdir(exist_ok=True)
        for name, guids in split.named().items():
            rows = "".join(f"{guid},{chosen[guid]}\n" for guid in guids)
            (parts / f"{name}_split.csv").write_text("guid,tag\n" + rows)
        own = Setup(sixty, path, SplitOptions(parts), out=setup.out, jobs=1)
        return sweep(own, HEAD.with_finetune(QUICK), {}, protocol=Protocol(2, 1))

    first = run(labels)
    assert sorted(fitted) == ["current settings"] * 2 + ["finetune"] * 2
    fitted.clear()
    turned = {"negative": "neutral", "neutral": "positive", "positive": "negative"}
    second = run(labels | {guid: turned[labels[guid]] for guid in split.test})
    assert fitted == []
    assert [each.macro_f1 for each in first.candidates] == [each.macro_f1 for each in second.candidates]


def test_settings_that_only_stage_2_of_a_linear_head_depends_on_are_other_fits(setup, fitted):
    linear = HEAD.changed(head="linear")
    compare(setup, both(setup, linear)[1:], Protocol(2, 1))
    for changes in ({"weight_decay": 50.0}, {"loss": "focal"}):
        fitted.clear()
        compare(setup, both(setup, linear.changed(**changes))[1:], Protocol(2, 1))
        assert fitted == ["concat:finetune"] * 2
    fitted.clear()
    compare(setup, both(setup, linear.changed(epochs=9))[1:], Protocol(2, 1))
    assert fitted == []  # that is of the training loop of an MLP, which a linear head has not


def test_settings_of_stage_2_need_stage_2(setup):
    with pytest.raises(MmcliError, match=r"finetune\.warmup is a setting of stage 2: add --with-finetune"):
        sweep(setup, HEAD, {"finetune.warmup": [0.1]}, protocol=Protocol(2, 1))
    with pytest.raises(MmcliError, match="no setting of stage 2 is called 'rate'"):
        parse_setting("finetune.rate", "1")
    with pytest.raises(MmcliError, match="epochs cannot be 'many'"):
        parse_setting("finetune.epochs", "many")


def test_an_ablation_goes_through_both_stages(setup, fitted):
    """Each candidate trains the layers that it sees: the text layer, or for images alone one layer of theirs."""
    candidates = modalities_of(HEAD, QUICK | {"unfreeze_text_layers": 2})
    layers = {each.name: each.recipe.finetune.layers() for each in candidates if each.recipe.finetune is not None}
    assert layers == {"both:finetune": {"text": 2}, "text:finetune": {"text": 2}, "image:finetune": {"image": 1}}
    result = compare(setup, candidates, Protocol(2, 1))
    assert {entry.name for entry in result.candidates} == {"both", "text", "image", *layers}
    assert len(fitted) == 12


def test_on_the_command_line(cli, sixty, tmp_path):
    options = ["--cache", sixty, "--epochs", "2", "--folds", "2", "--jobs", "1"]
    stage2 = ["--finetune", "epochs=1", "--finetune", "lr-backbone=1e-3"]
    code, out, err = cli(
        "compare", *options, "--repeats", "1", "--fusions", "film,concat", "--with-finetune", *stage2, "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert {entry["name"] for entry in result["candidates"]} == {"film", "concat", "film:finetune"}
    assert result["recipes"]["film:finetune"]["finetune"]["epochs"] == 1
    code, out, err = cli("sweep", *options, "--with-finetune", *stage2, "--grid", "finetune.lr_head=1e-3")
    assert code == 0, err
    assert "finetune.lr_head=0.001" in out
    code, out, err = cli("ablate", *options, "--repeats", "1", "--with-finetune", *stage2, "--json")
    assert code == 0, err
    assert {"both:finetune", "text:finetune", "image:finetune"} < set(json.loads(out)["recipes"])
    assert cli("compare", *options, "--finetune", "epochs")[0] == 2
    code, _, err = cli("compare", *options, *stage2)
    assert (code, "--finetune has no effect without --with-finetune" in err) == (2, True)
    code, _, err = cli("sweep", *options, "--backbone", "x", "--grid", "lr=1e-3")
    assert (code, "--backbone has no effect without --with-finetune" in err) == (2, True)
    code, _, err = cli("compare", *options, "--finetune", "epochs=x")
    assert (code, err.strip()) == (1, "error: epochs cannot be 'x': it is a whole number")
