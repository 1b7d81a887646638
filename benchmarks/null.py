"""How often equal candidates are called different at 5 %: whether the p values are honest.

    python benchmarks/null.py [--simulations 400] [--copies 2] [--folds 5] [--repeats 2]
    python benchmarks/null.py made-up [--fit-deviation 0.2] [--rows-per-group 1] [--folds 5] [--repeats 2]
    python benchmarks/null.py tails

The first command trains copies of one head that differ in their seeds, by the protocol of ``mmcli compare``, on a new
dataset each time, and applies each test. The second makes up how much each row and each fit moves a difference; fits
vary as much as ``--fit-deviation`` says. The third counts how often computed p values (see ``tail_p``) are below small
levels, over rows alone. An honest test says "different" about as often as its level, at most. Rates have 95 % intervals
(Wilson).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from mmcli.cache import Features
from mmcli.heads import Recipe, Rows
from mmcli.heads.evaluation.folds import repeated_folds
from mmcli.heads.evaluation.metrics import quick_scores
from mmcli.heads.evaluation.statistics import FitSpread, bootstrap_p, fit_spread, influence, tail_p, with_fits
from mmcli.heads.experiments.candidates import Candidate
from mmcli.heads.experiments.comparison import out_of_fold, score_candidates
from mmcli.heads.experiments.fits import fit_all
from mmcli.heads.experiments.setup import Data, Setup

ROWS, DIM = 400, 16
RECIPE = Recipe(hidden=(16,), epochs=12, patience=12, lr=3e-3, dropout=0.3)


def simulate(number, options):
    random = np.random.default_rng(number)
    classes = random.choice(3, ROWS, p=[0.3, 0.2, 0.5]).astype(np.int64)
    image, text = random.standard_normal((2, ROWS, DIM)).astype(np.float32)
    image[:, 0] += 0.8 * classes
    text[:, 0] -= 0.8 * classes
    groups = np.arange(ROWS)
    names = ["a", "b", "c"]
    data = Data(Rows(Features(image, text), classes), [str(row) for row in groups], groups, names, str(number))
    folds = repeated_folds(classes, groups, names, options.folds, options.repeats, seed=number)
    copies = [Candidate(f"copy {copy}", RECIPE.changed(seed=1000 * copy)) for copy in range(options.copies)]
    with tempfile.TemporaryDirectory() as out:
        fits = fit_all(data, copies, folds, Setup(out=Path(out), jobs=1))
    candidates, _, _ = score_candidates(data, out_of_fold(fits, ROWS, 3, options.repeats), fits, against="best")
    differences = [candidate.difference for candidate in candidates if candidate.difference]
    return [min(getattr(each, f"{name}_holm") for each in differences) for name in ("p_bootstrap", "p_corrected_t")]


def made_up(options):
    """Count how often two equal candidates are called different.

    There are 400 rows of variance 1; seven tenths of the variance is the same in all repeats.
    """
    random, n_groups = np.random.default_rng(0), ROWS // options.rows_per_group
    groups = np.repeat(np.arange(n_groups), options.rows_per_group)
    hits = 0
    for number in range(options.simulations):
        fold_of = np.stack([random.permutation(np.arange(n_groups) % options.folds) for _ in range(options.repeats)])
        effects = options.fit_deviation * random.standard_normal((options.repeats, options.folds))
        moves = np.sqrt(0.7) * random.standard_normal(n_groups) + np.take_along_axis(effects, fold_of, axis=1)
        moves += np.sqrt(0.3) * random.standard_normal(fold_of.shape)
        deviation = moves.mean(axis=0).std() / np.sqrt(n_groups)
        over_rows = moves.mean() + deviation * random.standard_normal(2000)
        centred = (moves - moves.mean(axis=1, keepdims=True))[:, groups]
        hits += bootstrap_p(with_fits(over_rows, fit_spread(centred, fold_of[:, groups], groups), number)) < 0.05
    return hits


def tails(n, prior, simulations, right=0.6, alike=0.5, levels=(0.05, 0.01, 0.001)):
    """Return the share of p below each level, for two candidates that are right on 60 % of n rows each.

    For half of the rows, both candidates always say the same.
    """
    says = np.where(np.eye(3), right, (1 - right) / 2)
    both = (1 - alike) * says[:, :, None] * says[:, None, :] + alike * says[:, :, None] * np.eye(3)
    cells = (np.array(prior)[:, None, None] * both).ravel()
    true, one, other = np.indices((3, 3, 3)).reshape(3, -1)
    no_fits, p_values = FitSpread(0.0, 0.0, 8), []
    random = np.random.default_rng(0)
    for _ in range(simulations):
        rows = np.repeat(np.arange(27), random.multinomial(n, cells))
        moves, scores = 0, 0
        for sign, said in ((1, one), (-1, other)):
            moves = moves + sign * influence(true[rows], said[rows], 3)
            scores += sign * quick_scores(true[rows], said[rows], 3)["macro_f1"]
        error = moves.std() / np.sqrt(n)  # what the bootstrap would estimate with endless replicates
        p_values.append(
            tail_p(np.array([scores - error, scores + error]), no_fits, np.count_nonzero(one[rows] != other[rows]))
        )
    return [float((np.array(p_values) < level).mean()) for level in levels]


def wilson(hits, n, z=1.96):
    share = hits / n
    middle, spread = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def show(name, hits, simulations):
    low, high = wilson(hits, simulations)
    print(f"{name:18} {hits}/{simulations} = {hits / simulations:.3f} [{max(low, 0):.3f}, {high:.3f}]")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", choices=("heads", "made-up", "tails"), default="heads")
    for name, default in (("copies", 2), ("folds", 5), ("repeats", 2), ("rows-per-group", 1), ("simulations", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--fit-deviation", type=float, default=0.2)
    options = parser.parse_args()
    options.simulations = options.simulations or {"heads": 400, "made-up": 1000, "tails": 10_000}[options.mode]
    if options.mode == "made-up":
        show("paired bootstrap", made_up(options), options.simulations)
    elif options.mode == "tails":
        for prior in ((0.3, 0.2, 0.5), (0.02, 0.38, 0.6)):
            for n in (100, 400):
                print(f"classes {prior}, {n} rows: share of p below .05, .01, .001:", end=" ")
                print(*(f"{share:.5f}" for share in tails(n, prior, options.simulations)), flush=True)
    else:
        tasks = (delayed(simulate)(number, options) for number in range(options.simulations))
        p_values = np.array(Parallel(n_jobs=-1)(tasks))
        for name, column in zip(("paired bootstrap", "corrected t"), p_values.T, strict=True):
            show(name, int((column < 0.05).sum()), options.simulations)


if __name__ == "__main__":
    main()
