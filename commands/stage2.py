"""finetune."""

from dataclasses import dataclass
from typing import Annotated

from ..heads.recipe import FINETUNE_SETTINGS, FinetuneRecipe, parse_finetune_setting
from .options import RUNS, LabelledOptions, RecordedData, Runs, Stage2Option, parse_bytes


@dataclass(frozen=True, kw_only=True)
class Finetune(LabelledOptions):
    """Stage 2: train the last layers of the backbone together with a trained head, from the raw pairs.

    Example: mmcli finetune --from artifacts/runs/latest/best.pt --lr-backbone 1e-5
    """

    goes_on = True
    data: RecordedData = None
    unfreeze_text_layers: Annotated[
        str, Stage2Option(help="Last layers of the text tower to train, or `all`; 0 for a head that sees images only.")
    ] = str(FinetuneRecipe.unfreeze_text_layers)
    unfreeze_vision_layers: Annotated[
        str, Stage2Option(help="Last layers of the image tower to train, or `all`; 1 for a head that sees images only.")
    ] = str(FinetuneRecipe.unfreeze_vision_layers)
    lr_backbone: Annotated[float, Stage2Option(help="Learning rate of those layers.")] = FinetuneRecipe.lr_backbone
    lr_head: Annotated[float, Stage2Option(help="Learning rate of the head.")] = FinetuneRecipe.lr_head
    epochs: Annotated[int, Stage2Option(min=1, help="Largest number of epochs.")] = FinetuneRecipe.epochs
    batch_size: Annotated[int, Stage2Option(min=2, help="Rows per step.")] = FinetuneRecipe.batch_size
    patience: Annotated[
        int, Stage2Option(min=1, help="Stop after this many epochs without a better validation macro-F1.")
    ] = FinetuneRecipe.patience
    warmup: Annotated[
        float, Stage2Option(min=0, max=0.99, help="Share of the steps in which the rates rise; then they fall to 0.")
    ] = FinetuneRecipe.warmup
    seeds: Annotated[
        int | None, Stage2Option(min=1, help="Number of models to train; default: one for each head in best.pt.")
    ] = None
    restart: Annotated[
        bool, Stage2Option("--restart", help="Begin anew instead of going on with an interrupted run.")
    ] = False
    runs: Runs = RUNS

    def run(self) -> None:
        """Train stage 2, and show both stages side by side."""
        self.check_paths(best_pt=self.source, cache=self.cache, out=self.runs)
        from ..cache.machine import keep_freed_memory
        from ..featurize.backbones.opening import choose_device
        from ..finetune import FinetuneOptions, Watch, finetune
        from ..report.notes import note_about_run
        from ..report.progress import ProgressLine
        from ..report.stage2_tables import stages_tables, stages_verdict
        from ..report.tables import next_after_training, run_table
        from ..report.terminal import note

        settings = {
            name: parse_finetune_setting(name, str(getattr(self, name)))
            for name in FINETUNE_SETTINGS
            if self.typed(name)
        }
        options = FinetuneOptions(
            runs=self.runs,
            seeds=self.seeds,
            device=choose_device(self.device),
            max_bytes=parse_bytes(self.max_memory),
            data=self.data,
            backbone=self.backbone,
            restart=self.restart,
        )
        keep_freed_memory()
        with ProgressLine("frozen part") as on_states, ProgressLine("train", "steps") as on_steps:
            watch = Watch(on_states=on_states, on_step=on_steps, on_note=note)
            result = finetune(self.source, settings, self.cache, self.labels, options, watch)
        note_about_run(result, offsets=bool(result.offsets))
        assert result.stages is not None
        next_command = next_after_training(None if self.runs == RUNS else self.runs)
        verdict = stages_verdict(result.stages, len(result.seeds) > 1)
        tables = stages_tables(result.stages, result.classes)
        self.show(result.to_dict(), *tables, run_table(result, next_command), verdict)
