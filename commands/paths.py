"""A look at the paths that were typed, before anything heavy is imported: a mistake is answered at once."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class InputPaths:
    """Paths that a command is about to use, by what they should be. ``out`` is a folder to write into."""

    best_pt: Path | None = None
    cache: Path | None = None
    labels: Path | None = None
    ids: Path | None = None
    data: Path | None = None
    image: Path | None = None
    split_dir: Path | None = None
    out: Path | None = None

    def check(self) -> None:
        """Check that each path exists and is a file or a folder, as it should be.

        Raises
        ------
        MmcliError
            The message names the option, what it takes, and what was found.
        """
        from ..cache import DataError, FeatureCache, MmcliError
        from ..heads.runs.folders import find_best_pt

        for option, path, what in (
            ("--labels", self.labels, "a CSV with the header guid,tag"),
            ("--ids", self.ids, "a CSV with the column guid"),
            ("--image", self.image, "an image file"),
        ):
            if path is not None and path.is_dir():
                raise DataError(f"{option} {path} is a folder: give {what}")
            if path is not None and not path.exists():
                raise DataError(f"no such file: {path}; {option} takes {what}")
        if self.data is not None and not self.data.exists():
            raise DataError(f"no such folder or manifest: {self.data}; --data takes a folder of pairs, or a manifest")
        if self.split_dir is not None and self.split_dir.is_file():
            raise DataError(
                f"--split-dir {self.split_dir} is a file: give a folder with train_split.csv and the others"
            )
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise MmcliError(f"{self.out} is a file: give a folder for the results")
        if self.best_pt is not None:
            find_best_pt(self.best_pt)
        if self.cache is not None:
            FeatureCache.open(self.cache).close()
