"""The command line. What is typed is listed here; what it does is in the file of ``commands/`` that it is from.

Heavy modules (torch, scikit-learn, matplotlib) are imported inside the commands, so that help is instant.
"""

import gc
import sys
from typing import Annotated

import typer

from . import __version__
from .commands import comparisons, features, stage2, train
from .report.streams import prepare_streams

app = typer.Typer(
    name="mmcli",
    help="Classify image-text pairs: featurize once with a frozen CLIP, then experiment in seconds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Look at a feature cache: info, verify, export.", no_args_is_help=True)

app.command("featurize")(features.featurize)
app.add_typer(cache_app, name="cache")
cache_app.command("info")(features.info)
cache_app.command("verify")(features.verify)
cache_app.command("export")(features.export)
app.command("train-head")(train.train_head)
app.command("finetune")(stage2.finetune)
app.command("evaluate")(train.evaluate)
app.command("predict")(train.predict)
app.command("fusions")(train.fusions)
app.command("compare")(comparisons.compare)
app.command("ablate")(comparisons.ablate)
app.command("sweep")(comparisons.sweep)
app.command("demo")(train.demo)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = (
        False
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line. Exit code 0 done, 1 ``MmcliError`` (one line on stderr), 2 usage, 130 interrupted."""
    # Importing PyTorch makes 160,000 objects, of which none goes before the end. To look for garbage among them, again
    # and again while they are made and once more at the end, would take a third of a second.
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


if __name__ == "__main__":
    main()
