"""Are the p values honest: how often are copies of one head, with other seeds, found different at 5 %?

    python benchmarks/null.py [simulations, default 400] [copies, default 2]

Each simulation draws a new dataset, trains the copies by the protocol of ``mmcli compare`` and asks each test. An
honest test says "different" about one time in twenty. Prints the rates with their 95 % intervals (Wilson).
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from mmcli.cache import Features
from mmcli.heads import Recipe, Rows
from mmcli.heads.experiments.compare import out_of_fold, score_candidates
from mmcli.heads.experiments.fits import Candidate, Data, fit_all
from mmcli.heads.folds import repeated_folds

ROWS, DIM, FOLDS, REPEATS = 400, 16, 5, 2
RECIPE = Recipe(hidden=(16,), epochs=12, patience=12, lr=3e-3, dropout=0.3)


def simulate(number, n_copies):
    random = np.random.default_rng(number)
    classes = random.choice(3, ROWS, p=[0.3, 0.2, 0.5]).astype(np.int64)
    image, text = random.standard_normal((2, ROWS, DIM)).astype(np.float32)
    image[:, 0] += 0.8 * classes
    text[:, 0] -= 0.8 * classes
    groups = np.arange(ROWS)
    names = ["a", "b", "c"]
    data = Data(Rows(Features(image, text), classes), [str(row) for row in groups], groups, names, str(number))
    folds = repeated_folds(classes, groups, names, FOLDS, REPEATS, seed=number)
    copies = [Candidate(f"copy {copy}", RECIPE.changed(seed=1000 * copy)) for copy in range(n_copies)]
    with tempfile.TemporaryDirectory() as kept:
        fits = fit_all(data, copies, folds, Path(kept), jobs=1)
    scored = score_candidates(data, out_of_fold(fits, ROWS, 3, REPEATS), fits, against="best")
    found = [entry["difference"] for entry in scored["candidates"] if entry["difference"]]
    return [min(each[f"{name}_holm"] for each in found) for name in ("p_bootstrap", "p_corrected_t")]


def wilson(hits, n, z=1.96):
    share = hits / n
    middle, spread = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def main():
    simulations = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    n_copies = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    p_values = np.array(Parallel(n_jobs=-1)(delayed(simulate)(number, n_copies) for number in range(simulations)))
    for name, column in zip(("paired bootstrap", "corrected t"), p_values.T, strict=True):
        hits = int((column < 0.05).sum())
        low, high = wilson(hits, simulations)
        print(f"{name:18} {hits}/{simulations} = {hits / simulations:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
