"""A look at the paths that were typed, before anything heavy is imported: a mistake is answered at once."""

from pathlib import Path


def look_at_inputs(
    *,
    best_pt: Path | None = None,
    cache: Path | None = None,
    labels: Path | None = None,
    ids: Path | None = None,
    data: Path | None = None,
    image: Path | None = None,
    split_dir: Path | None = None,
    result_folder: Path | None = None,
) -> None:
    """Check that each path that is given is there, and is a file or a folder as it should be.

    Raises
    ------
    MmcliError
        Naming the option, what it takes and what was found.
    """
    from ..cache import DataError, FeatureCache, MmcliError
    from ..heads.runs.folders import find_best_pt

    for option, path, what in (
        ("--labels", labels, "a CSV with the header guid,tag"),
        ("--ids", ids, "a CSV with the column guid"),
        ("--image", image, "an image file"),
    ):
        if path is not None and path.is_dir():
            raise DataError(f"{option} {path} is a folder: give {what}")
        if path is not None and not path.exists():
            raise DataError(f"no such file: {path}; {option} takes {what}")
    if data is not None and not data.exists():
        raise DataError(f"no such folder or manifest: {data}; --data takes a folder of pairs, or a table of them")
    if split_dir is not None and split_dir.is_file():
        raise DataError(f"--split-dir {split_dir} is a file: give a folder with train_split.csv and the others")
    if result_folder is not None and result_folder.exists() and not result_folder.is_dir():
        raise MmcliError(f"{result_folder} is a file: give a folder for the results")
    if best_pt is not None:
        find_best_pt(best_pt)
    if cache is not None:
        FeatureCache.open(cache).close()
