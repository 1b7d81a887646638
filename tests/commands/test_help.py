"""What --help says, and that it can be read on a narrow terminal."""

import re
from pathlib import Path

import pytest
import typer.main
from mmcli.cli import app
from mmcli.commands.options import PANELS


def commands():
    """Yield the words of every command, with the command."""
    for name, command in typer.main.get_command(app).commands.items():
        for inner, under in getattr(command, "commands", {"": command}).items():
            yield f"{name} {inner}".strip(), under


COMMANDS = dict(commands())


def squeezed(text):
    """Return ``text`` without white space, which wrapping changes."""
    return "".join(text.split())


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("name", ["", "cache", *COMMANDS])
def test_help_is_complete_on_a_narrow_terminal(cli, monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = cli(*name.split(), "--help")
    assert code == 0
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= columns
    if name in COMMANDS:
        for parameter in COMMANDS[name].params:
            opts = (*parameter.opts, *parameter.secondary_opts)
            assert {opt for opt in opts if opt.startswith("-")} <= set(out.split())
            assert squeezed(parameter.help) in squeezed(out), parameter.name
    else:
        for words, command in COMMANDS.items():
            if words.startswith(name) and (name or " " not in words):
                assert squeezed(command.help.split("\n\n")[0]) in squeezed(out), words


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_in_panels_and_their_texts_begin_with_a_noun_or_a_verb(name):
    for parameter in COMMANDS[name].params:
        assert parameter.rich_help_panel in PANELS, parameter.name
        first = parameter.help.split()[0]
        assert first not in ("Of", "That", "Those", "With", "For", "From", "At", "In", "And"), parameter.name
        assert first[0].isupper(), parameter.name
        assert parameter.help.endswith("."), parameter.name


def test_the_docs_name_no_option_that_does_not_exist():
    docs = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
    options = {"--help", "--install-completion"}
    for command in COMMANDS.values():
        options |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert set(re.findall(r"(?<!\w)--[a-z][a-z-]+", docs)) - options == set()


def test_panels_come_in_their_order(cli):
    out = cli("compare", "--help")[1]
    titles = [line.removesuffix(":") for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [panel for panel in PANELS if panel in titles]
    assert {"Data", "Candidates", "Recipe", "Stage 2", "Scoring", "Split", "Output", "Machine"} <= set(titles)


def test_a_usage_error_names_the_command(cli):
    code, _, err = cli("compare", "--single-split", "--folds", "3")
    assert (code, "mmcli compare" in err, "--folds has no meaning with --single-split" in err) == (2, True, True)
