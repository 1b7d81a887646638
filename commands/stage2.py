"""finetune."""

from pathlib import Path
from typing import Annotated

import typer

from .options import BEST, INTERRUPTED, RUNS, Device, From, Json, MaxMemory, parse_bytes, typed
from .paths import look_at_inputs

_SETTINGS = (
    "unfreeze_text_layers",
    "unfreeze_vision_layers",
    "lr_backbone",
    "lr_head",
    "epochs",
    "batch_size",
    "patience",
    "warmup",
)


def finetune(
    context: typer.Context,
    source: From = BEST,
    unfreeze_text_layers: Annotated[
        str, typer.Option(help="Last layers of the text tower to train, or `all`; of a head that sees images only, 0.")
    ] = "1",
    unfreeze_vision_layers: Annotated[
        str, typer.Option(help="Last layers of the image tower to train, or `all`; of a head that sees images only, 1.")
    ] = "0",
    lr_backbone: Annotated[float, typer.Option(help="Learning rate of those layers.")] = 5e-6,
    lr_head: Annotated[float, typer.Option(help="Learning rate of the head.")] = 1e-4,
    epochs: Annotated[int, typer.Option(min=1, help="At most this many.")] = 5,
    batch_size: Annotated[int, typer.Option(min=2, help="Rows per step.")] = 16,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a better validation macro-F1.")] = 2,
    warmup: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of the steps in which the rates rise; then they fall to 0.")
    ] = 0.1,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Train this many models; default: one for each head in best.pt.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, where an interrupted run of the same would go on.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Default: what the head was trained with.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Default: what the head was trained with.")] = None,
    data: Annotated[Path | None, typer.Option(help="Where the raw pairs are now; default: as recorded.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Where the backbone is now, if it was moved.")] = None,
    runs: Annotated[Path, typer.Option(help="Where the run folder goes.")] = RUNS,
    max_memory: MaxMemory = "4GB",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Stage 2: train the last layers of the backbone together with a trained head, from the raw pairs.

    Example: mmcli finetune --from artifacts/runs/latest/best.pt --lr-backbone 1e-5
    """
    look_at_inputs(best_pt=source, cache=cache, labels=labels, data=data, result_folder=runs)
    from ..cache.machine import keep_freed_memory
    from ..featurize.backbones.opening import choose_device
    from ..finetune import Watch
    from ..finetune import finetune as run
    from ..heads.finetune_recipe import parse_finetune_setting
    from ..report.notes import note_about
    from ..report.progress import ProgressLine
    from ..report.stage2_tables import stages_tables, stages_verdict
    from ..report.tables import run_table
    from ..report.terminal import note, print_json, print_parts

    settings = {
        name: parse_finetune_setting(name, str(context.params[name])) for name in _SETTINGS if typed(context, name)
    }
    keep_freed_memory()
    where, max_bytes = choose_device(device), parse_bytes(max_memory)
    try:
        with ProgressLine("frozen part") as of_states, ProgressLine("train", "steps") as of_steps:
            watch = Watch(of_states, of_steps, note)
            result = run(
                source, settings, cache, labels, data, backbone, runs, seeds, restart, where, max_bytes, watch=watch
            )
    except KeyboardInterrupt:
        note(INTERRUPTED)
        raise typer.Exit(130) from None
    note_about(result)
    if as_json:
        print_json(result)
        return
    place = "" if runs == RUNS else f"--from {runs / 'latest' / 'best.pt'} "
    next_command = f"mmcli predict {place}--ids FILE --out submission.txt"
    print_parts(*stages_tables(result), run_table(result, next_command), stages_verdict(result))
