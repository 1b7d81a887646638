"""The command line. Every command is listed here; what it does is in the file of ``commands/`` that it comes from.

Heavy modules (torch, scikit-learn, matplotlib) are imported inside the commands, so that help is instant.
"""

import gc
import sys
from typing import Annotated

import typer

from . import __version__
from .commands import caches, comparisons, demo, predict, stage2, train
from .commands.options import Command, CommandGroup
from .report.streams import prepare_streams

app = typer.Typer(
    name="mmcli",
    cls=CommandGroup,
    help="Classify image-text pairs: featurize once with a frozen CLIP, then experiment in seconds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(
    cls=CommandGroup,
    help="Look at a feature cache: info, verify, export.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command("featurize", cls=Command)(caches.Featurize)
app.add_typer(cache_app, name="cache")
cache_app.command("info", cls=Command)(caches.Info)
cache_app.command("verify", cls=Command)(caches.Verify)
cache_app.command("export", cls=Command)(caches.Export)
app.command("train-head", cls=Command)(train.TrainHead)
app.command("finetune", cls=Command)(stage2.Finetune)
app.command("evaluate", cls=Command)(predict.Evaluate)
app.command("predict", cls=Command)(predict.Predict)
app.command("fusions", cls=Command)(train.Fusions)
app.command("compare", cls=Command)(comparisons.Compare)
app.command("ablate", cls=Command)(comparisons.Ablate)
app.command("sweep", cls=Command)(comparisons.Sweep)
app.command("demo", cls=Command)(demo.Demo)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmcli {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)]


@app.callback()
def _root(version: Version = False) -> None:
    pass


def main() -> None:
    """Run the command line. Exit code 0 done, 1 ``MmcliError`` (one line on stderr), 2 usage, 130 interrupted."""
    # PyTorch makes 160,000 objects that all stay until the end: looking for garbage among them, during the import and
    # at exit, would take a third of a second.
    gc.set_threshold(50_000)
    prepare_streams()
    try:
        app()
    except Exception as error:
        from .cache.errors import MmcliError  # here, because help must not wait for h5py
        from .report.terminal import note

        if isinstance(error, MmcliError):
            message = " ".join(str(error).split())
        elif isinstance(error, OSError) and error.errno is not None:  # no permission, a full disk
            message = f"{error.strerror}" if error.filename is None else f"{error.filename}: {error.strerror}"
        else:
            raise
        note(f"error: {message}")
        sys.exit(1)
    finally:
        gc.freeze()
