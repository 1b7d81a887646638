"""train-head and fusions."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..heads.recipe import SETTINGS, Recipe
from .options import (
    CACHE,
    GO_ON,
    RUNS,
    DataOption,
    Device,
    HeadFusion,
    HeadModality,
    HeadOption,
    Options,
    Runs,
    TrainingOptions,
    parse_bytes,
)

if TYPE_CHECKING:
    from ..heads import RunOptions, RunResult

_NOT_WITH_FULL = (*SETTINGS, "preset", "seeds", "split_dir", "split_seed", "group_duplicates", "new", "rare")


@dataclass(frozen=True, kw_only=True)
class TrainHead(TrainingOptions):
    """Train a head on cached features, in seconds, and write a run folder.

    Example: mmcli train-head --fusion concat --modality both
    """

    cache: Annotated[
        Path | None, DataOption(help=f"Feature cache; default: {CACHE}, or with --full the cache of the run.")
    ] = None
    fusion: HeadFusion = Recipe.fusion
    modality: HeadModality = "both"
    seeds: Annotated[
        int,
        HeadOption(
            min=1, help="Number of heads to train, by --seed and the seeds after it; best.pt is their ensemble."
        ),
    ] = 1
    full: Annotated[
        bool, HeadOption("--full", help="Train the run of --from again on all labelled rows, for its best epochs.")
    ] = False
    source: Annotated[
        Path | None,
        HeadOption("--from", help="Run to repeat with --full: a best.pt or its folder; default: the latest of --runs."),
    ] = None
    data: Annotated[
        Path | None,
        DataOption(help="Folder or manifest of the raw pairs, if they were moved; for --full of a stage 2."),
    ] = None
    backbone: Annotated[
        str | None, DataOption(help="Hub id or folder of the backbone, if it was moved; for --full of a stage 2.")
    ] = None
    runs: Runs = RUNS
    device: Device = "auto"

    def interrupted(self) -> str:
        """Say what was kept: finished heads, if there may be several."""
        return GO_ON if self.seeds > 1 or self.full else "interrupted: nothing was written"

    def run(self) -> None:
        """Train, and show scores and what to type next."""
        result = self._train_on_all_rows() if self.full else self._train()
        from ..report.notes import note_about_run
        from ..report.tables import next_after_training, run_table, score_tables, seeds_table

        note_about_run(result, offsets=bool(result.offsets), full=self.full)
        over_seeds = [seeds_table(result)] if result.over_seeds else []
        next_command = next_after_training(None if self.runs == RUNS else self.runs)
        tables = [*score_tables(result.scores, result.classes), *over_seeds, run_table(result, next_command)]
        self.show(result.to_dict(), *tables)

    def _train(self) -> "RunResult":
        """Train on a split."""
        self.refuse(["source", "data", "backbone"], "needs --full")
        self.check_split()
        max_bytes = parse_bytes(self.max_memory)
        recipe = self.recipe()
        self.check_used([recipe])
        cache = self.cache or CACHE
        self.check_paths(cache=cache, out=self.runs)
        from ..heads import train_head
        from ..report.progress import ProgressLine

        split = self.split_options()
        counts_epochs = self.seeds == 1
        with ProgressLine("train", "epochs" if counts_epochs else "heads") as progress:
            on_fit = None if recipe.head == "linear" and counts_epochs else progress
            return train_head(cache, self.labels, recipe, split, self._options(self.seeds, max_bytes), on_fit)

    def _train_on_all_rows(self) -> "RunResult":
        """Train the run of --from again."""
        self.refuse(_NOT_WITH_FULL, "cannot go with --full, which takes the recipe of --from")
        max_bytes = parse_bytes(self.max_memory)
        source = self.source or self.runs / "latest"
        self.check_paths(best_pt=source, cache=self.cache, out=self.runs)
        from ..heads import Watch, open_best_pt, train_full
        from ..heads.runs.checkpoint import stage1_of
        from ..report.progress import ProgressLine

        options = self._options(None, max_bytes)
        model = open_best_pt(source, options.device, self.data, self.backbone)
        things = "epochs" if len(stage1_of(model.checkpoint).seeds) == 1 else "heads"
        with (
            ProgressLine("frozen part") as on_states,
            ProgressLine("train", things) as on_fit,
            ProgressLine("train stage 2", "steps") as on_step,
        ):
            watch = Watch(on_states=on_states, on_fit=on_fit, on_step=on_step)
            return train_full(model, self.cache, self.labels, options, watch)

    def _options(self, seeds: int | None, max_bytes: int | None) -> "RunOptions":
        """Return where and how to train; a head is too small for an accelerator, unless --device names it."""
        from ..featurize.backbones.opening import choose_device
        from ..heads import RunOptions

        device = choose_device("cpu" if self.device == "auto" else self.device)
        return RunOptions(self.runs, seeds, device, self.jobs, max_bytes)


@dataclass(frozen=True, kw_only=True)
class Fusions(Options):
    """List the fusions: formula, source, and counted parameters of the whole head.

    Example: mmcli fusions
    """

    cache: Annotated[
        Path | None, DataOption(help="Feature cache whose sizes count; default: the sizes of CLIP ViT-B/32.")
    ] = None
    classes: Annotated[int, DataOption(min=2, help="Number of classes.")] = 3

    def run(self) -> None:
        """Count the parameters, and list the fusions."""
        from ..cache import FeatureCache
        from ..heads.model.head import VIT_B32, describe_fusions, sizes_of
        from ..report.comparison_tables import fusions_table

        sizes = VIT_B32
        if self.cache is not None:
            with FeatureCache.open(self.cache) as cache:
                sizes = sizes_of(cache.features([], tokens=cache.has_tokens))
        fusions = describe_fusions(sizes, self.classes)
        result = {"sizes": sizes._asdict(), "classes": self.classes, "fusions": fusions}
        self.show(result, fusions_table(fusions, sizes._asdict(), self.classes))
