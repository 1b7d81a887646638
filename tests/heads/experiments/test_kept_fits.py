"""Finished fits are kept, shared and found again, whatever becomes of the processes that made them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mmcli
import numpy as np
import pytest
from conftest import rewrite, synthetic_block, write_cache
from mmcli.cache import FeatureCache, MmcliError
from mmcli.heads.experiments import Protocol, Setup, candidates_of, compare, modalities_of
from mmcli.heads.runs import fit_store, labelled
from mmcli.heads.runs.parallel import each_of
from mmcli.heads.training import training_rows
from small_experiments import QUICK, SMALL, out_of_fold

DIGESTS = ("row/image_sha256", "row/text_sha256", "row/cleaned_sha256")


def test_finished_fits_are_kept_and_shared(setup, fitted):
    first = compare(setup, candidates_of(["concat", "film"], QUICK), SMALL)
    assert len(fitted) == 12
    again = compare(setup, candidates_of(["concat", "film", "late"], QUICK), SMALL)
    assert fitted[12:] == ["late"] * 6
    old, new = ({each.name: each.macro_f1 for each in result.candidates} for result in (first, again))
    assert {name: new[name] for name in old} == old
    compare(setup, modalities_of(QUICK), SMALL, what="ablate")
    assert fitted[18:] == ["text"] * 6 + ["image"] * 6  # `both` is concat


@pytest.mark.parametrize("change", ["recipe", "labels", "features", "folds", "seed"])
def test_a_kept_fit_is_used_only_where_nothing_that_it_depends_on_has_changed(setup, fitted, change, learnable):
    compare(setup, candidates_of(["concat"], QUICK), SMALL)
    recipe, protocol = QUICK, SMALL
    if change == "recipe":
        recipe = QUICK.changed(dropout=0.1)
    elif change == "labels":
        lines = setup.labels.read_text().splitlines()
        swapped = [lines[0], lines[1].split(",")[0] + "," + lines[2].split(",")[1], *lines[2:]]
        assert swapped != lines
        setup.labels.write_text("\n".join(swapped) + "\n")
    elif change == "features":

        def nudge(columns):
            columns["image"][0, 0] += 0.01

        rewrite(learnable[0], nudge)
    elif change == "folds":
        protocol = Protocol(folds=4, repeats=1)
    else:
        recipe = QUICK.changed(seed=7)
    before = len(fitted)
    compare(setup, candidates_of(["concat"], recipe), protocol)
    assert len(fitted) - before == protocol.folds * protocol.repeats


def test_a_kept_fit_is_used_only_where_its_rows_were_read_in_the_same_order(setup, fitted, learnable, monkeypatch):
    """Rows that are left in the file are shuffled in blocks, so the memory for them decides what a fit gives."""
    monkeypatch.setattr(labelled, "_LEAST_BYTES", 0)
    monkeypatch.setattr(training_rows, "_STRETCH_ROWS", 64)
    candidates, protocol = candidates_of(["concat"], QUICK), Protocol(2, 1)

    def probabilities(for_features):
        with FeatureCache.open(learnable[0]) as cache:
            beside = labelled._PROCESS_BYTES + labelled._BYTES_PER_ROW * len(cache)
        limit = None if for_features is None else beside + for_features
        result = compare(replace(setup, max_bytes=limit), candidates, protocol)
        return [[row[name] for name in result.data.classes] for row in out_of_fold(result.folder)]

    in_memory = probabilities(None)
    assert len(fitted) == 2
    assert probabilities(60_000) == in_memory  # all 400 rows of 128 bytes fit
    assert len(fitted) == 2
    four_stretches = probabilities(40_000)
    assert len(fitted) == 4
    assert probabilities(39_000) == four_stretches
    assert len(fitted) == 4
    two_stretches = probabilities(20_000)
    assert len(fitted) == 6
    assert in_memory != four_stretches != two_stretches != in_memory
    with FeatureCache.open(learnable[0]) as cache:
        guids, (image, text) = list(cache.guids)[::-1], cache.embeddings()
        digests = {name: cache.read(name, np.arange(400))[::-1] for name in DIGESTS}
    block = synthetic_block(guids, image.shape[1])
    block.columns |= {"image": image[::-1].copy(), "text": text[::-1].copy(), **digests}
    write_cache(learnable[0], block)
    assert probabilities(None) == in_memory
    assert len(fitted) == 6
    assert probabilities(20_000) != two_stretches
    assert len(fitted) == 8


def test_a_kept_fit_does_not_outlive_a_change_of_the_code(setup, fitted, monkeypatch, tmp_path):
    compare(setup, candidates_of(["concat"], QUICK), SMALL)
    compare(setup, candidates_of(["concat"], QUICK), SMALL)
    assert len(fitted) == 6
    package = tmp_path / "package"
    for folder in ("cache", "featurize", "heads"):
        shutil.copytree(Path(mmcli.__file__).parent / folder, package / folder)
    unchanged = fit_store.code_digest(package)
    assert unchanged == fit_store.code_digest()
    for changed in (
        "heads/training/loop.py",
        "heads/model/losses.py",
        "featurize/encode.py",
        "cache/features.py",
    ):
        before = fit_store.code_digest(package)
        with (package / changed).open("a") as file:
            file.write("# another rule\n")
        assert fit_store.code_digest(package) != before
    monkeypatch.setattr(fit_store, "_digest_of_this_code", lambda: fit_store.code_digest(package))
    compare(setup, candidates_of(["concat"], QUICK), SMALL)
    assert len(fitted) == 12
    with pytest.raises(MmcliError, match="holds no source code"):
        fit_store.code_digest(tmp_path / "nothing")


def test_a_damaged_kept_fit_is_made_again(setup, fitted):
    compare(setup, candidates_of(["concat"], QUICK), SMALL)
    kept = sorted((setup.out / "fits").glob("*.pt"))
    assert len(kept) == 6
    kept[0].write_bytes(b"broken")
    kept[1].write_bytes(kept[1].read_bytes()[:100])
    compare(setup, candidates_of(["concat"], QUICK), SMALL)
    assert len(fitted) == 8


def test_the_result_does_not_depend_on_the_number_of_processes(setup, tmp_path):
    results = []
    for jobs in (1, 2):
        there = Setup(setup.cache, setup.labels, out=tmp_path / f"jobs{jobs}", jobs=jobs)
        results.append(compare(there, candidates_of(["concat", "late"], QUICK), SMALL))
    first, second = ([(each.name, each.macro_f1) for each in result.candidates] for result in results)
    assert first == second
    assert out_of_fold(results[0].folder) == out_of_fold(results[1].folder)


def test_killed_in_the_middle_an_experiment_goes_on_where_it_was(setup, fitted):
    code = (
        "import sys\n"
        "from mmcli.heads import Recipe\n"
        "from mmcli.heads.experiments import *\n"
        "show = lambda done, n: print(done, flush=True)\n"
        "setup = Setup(sys.argv[1], sys.argv[2], out=sys.argv[3], jobs=1, on_fit=show)\n"
        "recipe = Recipe(epochs=3, hidden=(8,), lr=5e-3)\n"
        "compare(setup, candidates_of(['concat', 'film'], recipe), Protocol(3, 2))\n"
    )
    command = [sys.executable, "-c", code, str(setup.cache), str(setup.labels), str(setup.out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == "5":
                os.kill(process.pid, signal.SIGKILL)
    kept = len(list((setup.out / "fits").glob("*.pt")))
    assert 5 <= kept < 12
    compare(setup, candidates_of(["concat", "film"], QUICK), SMALL)
    assert len(fitted) == 12 - kept


def test_a_process_that_is_killed_is_one_clear_error():

    with pytest.raises(
        MmcliError, match="killed, most likely for lack of memory: run the same command again with --jobs 1"
    ):
        list(each_of(os._exit, [(9,), (9,)], jobs=2))


def test_workers_leave_when_the_process_that_started_them_is_killed(setup):
    code = (
        "import os, sys, time\n"
        "from mmcli.heads.runs.parallel import each_of\n"
        "print(*each_of(os.getpid, [()] * 4, jobs=2), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        workers = {int(number) for number in process.stdout.readline().split()}
        assert workers
        assert process.pid not in workers
        process.kill()
    for _ in range(200):  # each looks once a second
        if not any(alive(worker) for worker in workers):
            return
        time.sleep(0.1)
    raise AssertionError("workers are still there")


def alive(pid):
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
