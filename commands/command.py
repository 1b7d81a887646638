"""A command is a dataclass: each field is an option, and ``run`` does the work.

``typer`` reads the fields of the dataclass as it reads the parameters of a function. Commands that share options
inherit them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

# The panels of every --help, in order.
PANELS = ("Data", "Encoder", "Head", "Candidates", "Recipe", "Stage 2", "Scoring", "Split", "Output", "Machine", "Help")
DataOption = partial(typer.Option, rich_help_panel="Data")
EncoderOption = partial(typer.Option, rich_help_panel="Encoder")
HeadOption = partial(typer.Option, rich_help_panel="Head")
CandidateOption = partial(typer.Option, rich_help_panel="Candidates")
RecipeOption = partial(typer.Option, rich_help_panel="Recipe")
Stage2Option = partial(typer.Option, rich_help_panel="Stage 2")
ScoringOption = partial(typer.Option, rich_help_panel="Scoring")
SplitOption = partial(typer.Option, rich_help_panel="Split")
OutputOption = partial(typer.Option, rich_help_panel="Output")
MachineOption = partial(typer.Option, rich_help_panel="Machine")


@dataclass(frozen=True, kw_only=True)
class Options(ABC):
    """Base of every command: what was typed, and whether it was."""

    context: typer.Context
    as_json: Annotated[bool, OutputOption("--json", help="Print one JSON object instead of tables.")] = False

    @abstractmethod
    def run(self) -> None:
        """Do what the command is for, and print the answer."""

    def interrupted(self) -> str:
        """Return what to say after Ctrl-C."""
        return "interrupted"

    def typed(self, name: str) -> bool:
        """Whether the option of this field was given on the command line."""
        source = self.context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Raise a usage error that names the first of these options that was typed, and says ``why``."""
        for parameter in self.context.command.params:
            if parameter.name in set(names) and self.typed(parameter.name):
                raise typer.BadParameter(f"{parameter.opts[0]} {why}")


class Command(TyperCommand):
    """Makes the options of what was typed, and runs them. Prints help that fits a narrow screen."""

    def invoke(self, context: Any) -> None:
        """Run the command; Ctrl-C exits with 130."""
        options: Options = super().invoke(context)
        try:
            context.invoke(options.run)  # through the context, so that a usage error names the command
        except KeyboardInterrupt:
            from ..report.terminal import note

            note(options.interrupted())
            raise typer.Exit(130) from None

    def format_options(self, context: Any, formatter: Any) -> None:
        """Write the options by panel, as text that wraps: the tables of ``rich`` cut long names."""
        panels: dict[str, list[tuple[str, str]]] = {name: [] for name in PANELS}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                panels[getattr(parameter, "rich_help_panel", None) or "Help"].append(record)
        for name, records in panels.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


class CommandGroup(TyperGroup):
    """Lists its commands with the whole first paragraph of their help, which ``click`` would cut."""

    def format_commands(self, context: Any, formatter: Any) -> None:
        """Write the name and the first paragraph of each command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, (each.help or "").split("\n\n")[0]) for name, each in self.commands.items()])
