"""Promises about the package itself: direction of imports, packaging, start-up, help."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import typer.main
from mmcli import cli
from mmcli.cli import app

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "cache": set(),
    "report": set(),
    "featurize": {"cache"},
    "heads": {"cache", "featurize", "report"},
    "finetune": {"cache", "featurize", "heads", "report"},
}


@pytest.mark.parametrize("folder", [name for name in MAY_IMPORT if (ROOT / name / "__init__.py").exists()])
def test_imports_go_one_way(folder):
    allowed = MAY_IMPORT[folder] | {folder}
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert (node.module or "").split(".")[0] in allowed, f"{path}: {ast.unparse(node)}"
            elif isinstance(node, ast.ImportFrom | ast.Import):
                assert "mmcli" not in ast.unparse(node), f"{path}: imports inside the package are relative"


def test_pyproject_lists_every_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {"mmcli"} | {f"mmcli.{path.parent.name}" for path in ROOT.glob("*/__init__.py")}
    assert set(listed) == there


def test_help_imports_no_heavy_module():
    code = (
        "import sys; sys.argv = ['mmcli', '--help']\n"
        "from mmcli.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'matplotlib', 'h5py', 'numpy', 'PIL'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("heavy: []")


def test_looking_at_a_cache_imports_no_torch(learnable):
    code = (
        "import sys\n"
        "from mmcli.cache import FeatureCache\n"
        "from mmcli.featurize import featurize, Dataset\n"
        f"FeatureCache.open({str(learnable[0])!r}).describe()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def commands():
    """Yield (words, command) for every command there is."""
    root = typer.main.get_command(app)
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            yield from ((f"{name} {each}", under) for each, under in inner.items())


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_a_place_in_the_docs(name):
    help_text = COMMANDS[name].help or ""
    assert f"Example: mmcli {name}" in help_text
    assert f"## mmcli {name}" in (ROOT / "docs" / "commands.md").read_text()
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{name}: {parameter.name} has no help"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json_on_demand(name):
    assert "--json" in {option for parameter in COMMANDS[name].params for option in parameter.opts}


def test_choices_of_the_command_line_are_those_of_the_code():
    from mmcli.featurize.backbone import DEFAULT_BACKBONE
    from mmcli.heads import Recipe
    from mmcli.heads.losses import ClassWeights
    from mmcli.heads.model import Modality

    parameters = inspect.signature(cli.train_head).parameters
    for name, choices in (("modality", Modality), ("class_weights", ClassWeights)):
        assert get_args(parameters[name].annotation)[0] == choices
    recipe = Recipe().to_dict()
    shared = set(recipe) & set(parameters)
    assert len(shared) > 8
    for name in shared:
        assert parameters[name].default == recipe[name], name
    backbone = get_args(inspect.signature(cli.featurize).parameters["backbone"].annotation)[1]
    assert DEFAULT_BACKBONE in backbone.help


def test_the_two_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    run = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[offline]' && .venv/bin/mmcli demo"
    test = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[offline,dev]' && .venv/bin/pytest"
    assert run in readme
    assert test in readme
    assert test in (ROOT / ".ci" / "run").read_text()
