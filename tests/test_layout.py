"""Promises about the package itself: direction of imports, packaging, start-up, help."""

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import mmcli
import pytest
import typer.main
from mmcli.cli import app
from mmcli.commands import comparisons

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "cache": set(),
    "report": set(),
    "featurize": {"cache"},
    "heads": {"cache", "featurize", "report"},
    "finetune": {"cache", "featurize", "heads", "report"},
    "commands": {"cache", "featurize", "heads", "finetune", "report"},
}
MAY_IMPORT_WITHIN = {  # what is not listed here, files of its own, may import all of its folder
    "featurize": {"backbones": set(), "pairs": set()},
    "heads": {
        "recipe": set(),
        "evaluation": set(),
        "model": {"recipe"},
        "training": {"recipe", "evaluation", "model"},
        "runs": {"recipe", "evaluation", "model", "training"},
        "experiments": {"recipe", "evaluation", "model", "training", "runs"},
    },
}
SOURCES = sorted(path.relative_to(ROOT) for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imports_of(path):
    """Yield what a module imports from this package, as parts of a dotted name, with the statement.

    ``report`` runs without the other folders, and names their types; such imports under ``TYPE_CHECKING`` do not count.
    """
    folder = path.parts[:-1]
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text())))
    for_types = {
        inner
        for node in nodes
        if folder[0] == "report" and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level and node not in for_types:
            base = folder[: len(folder) - node.level + 1]
            for alias in node.names:
                yield (*base, *(node.module or alias.name).split(".")), f"{path}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom | ast.Import):
            assert "mmcli" not in ast.unparse(node), f"{path}: imports inside the package are relative"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_one_way(path):
    top, within = path.parts[0], path.with_suffix("").parts[1]
    for target, statement in imports_of(path):
        assert target[0] in MAY_IMPORT[top] | {top}, statement
        allowed = MAY_IMPORT_WITHIN.get(top, {}).get(within)
        if target[0] == top and len(target) > 1 and allowed is not None:
            assert target[1] in allowed | {within}, statement


def test_no_two_modules_have_one_name():
    names = [path.stem for path in SOURCES if path.stem != "__init__"]
    names += {path.parent.name for path in SOURCES}
    assert sorted(name for name, times in Counter(names).items() if times > 1) == []


def test_pyproject_lists_every_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {"mmcli"} | {".".join(["mmcli", *path.parts[:-1]]) for path in SOURCES}


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


def defaults_of(name):
    return {parameter.name: parameter.default for parameter in COMMANDS[name].params}


def test_every_setting_is_an_option_with_its_default():
    from mmcli.heads import recipe

    typed = defaults_of("train-head")
    for name in set(recipe.SETTINGS) - {"lr_factor", "lr_patience"}:
        assert recipe.parse_setting(name, str(typed[name])) == recipe.SETTINGS[name], name
    typed = defaults_of("finetune")
    for name, default in recipe.FINETUNE_SETTINGS.items():
        assert recipe.parse_finetune_setting(name, str(typed[name])) == default, name
    assert set(get_args(recipe.Preset)) == set(recipe.PRESETS)


def test_defaults_of_the_command_line_are_those_of_the_code():
    from mmcli.featurize.backbones.base import DEFAULT_BACKBONE
    from mmcli.heads.evaluation.splits import New, Rare, SplitOptions
    from mmcli.heads.experiments import Protocol, Setup

    typed = defaults_of("compare")
    for field in set(Setup.__dataclass_fields__) - {"split", "max_bytes", "on_fit", "on_states"}:
        assert str(typed[field]) == str(getattr(Setup(), field)), field
    for field in SplitOptions.__dataclass_fields__:
        assert typed[{"seed": "split_seed"}.get(field, field)] == getattr(SplitOptions(), field), field
    for field in Protocol.__dataclass_fields__:
        assert typed[{"seed": "fold_seed"}.get(field, field)] == getattr(Protocol(), field), field
    types = get_type_hints(comparisons.Compare)
    assert (types["new"], types["rare"]) == (New, Rare)
    (backbone,) = [parameter for parameter in COMMANDS["featurize"].params if parameter.name == "backbone"]
    assert DEFAULT_BACKBONE in backbone.help


def test_the_two_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    run = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[offline]' && .venv/bin/mmcli demo"
    test = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[offline,dev]' && .venv/bin/pytest"
    assert run in readme
    assert test in readme
    assert test in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("words", ["mmcli.heads.recipe", "mmcli.heads", "mmcli.finetune"])
def test_a_recipe_needs_no_torch(words):
    code = f"import sys, {words}\nfrom mmcli.heads import Recipe\nRecipe()\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["mmcli", "mmcli.heads", "mmcli.finetune"])
def test_every_public_name_can_be_imported_and_is_no_module(name):
    """Whatever was imported before: a module with the name of a function would take its place."""
    for path in SOURCES:
        importlib.import_module(".".join(["mmcli", *path.with_suffix("").parts]).removesuffix(".__init__"))
    package = importlib.import_module(name)
    for each in package.__all__:
        assert callable(getattr(package, each)) or each == "FUSIONS", each
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing


def test_a_package_is_called_like_its_function(tmp_path):
    with pytest.raises(mmcli.MmcliError, match="no such folder or manifest"):
        mmcli.featurize(tmp_path / "nothing")
    with pytest.raises(mmcli.MmcliError, match="no such checkpoint"):
        mmcli.finetune(tmp_path / "nothing")
    assert inspect.ismodule(mmcli.featurize)
    assert inspect.ismodule(mmcli.finetune)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, mmcli\ndir(mmcli)\nprint({'torch', 'numpy', 'h5py', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
