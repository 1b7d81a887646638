"""Promises about the package itself: direction of imports, packaging, start-up, help."""

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import get_args

import mmcli
import pytest
import typer.main
from mmcli.cli import app
from mmcli.commands import features

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "cache": set(),
    "report": set(),
    "featurize": {"cache"},
    "heads": {"cache", "featurize", "report"},
    "finetune": {"cache", "featurize", "heads", "report"},
    "commands": {"cache", "featurize", "heads", "finetune", "report"},
}
RECIPES = {"settings", "finetune_recipe", "recipe"}
MAY_IMPORT_WITHIN = {  # what is not listed here, files of its own, may import all of its folder
    "featurize": {"backbones": set(), "identity": {"backbones"}, "pairs": {"identity"}},
    "heads": {
        "settings": set(),
        "finetune_recipe": {"settings"},
        "recipe": {"settings", "finetune_recipe"},
        "evaluation": set(),
        "model": RECIPES,
        "training": RECIPES | {"evaluation", "model"},
        "runs": RECIPES | {"evaluation", "model", "training"},
        "experiments": RECIPES | {"evaluation", "model", "training", "runs"},
    },
}
SOURCES = sorted(path.relative_to(ROOT) for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imports_of(path):
    """Yield what a module imports from this package, as parts of a dotted name, with the statement."""
    folder = path.parts[:-1]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
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


def test_choices_and_defaults_of_the_command_line_are_those_of_the_code():
    from mmcli.commands import comparisons as experiments
    from mmcli.commands import options
    from mmcli.commands import stage2 as finetune
    from mmcli.commands import train as heads
    from mmcli.featurize.backbones.base import DEFAULT_BACKBONE
    from mmcli.heads import recipe
    from mmcli.heads.experiments import Protocol, Setup
    from mmcli.heads.finetune_recipe import SETTINGS
    from mmcli.heads.finetune_recipe import parse_finetune_setting as parse_of_stage2

    parameters = inspect.signature(options._recipe_options).parameters
    for name, choices in (
        ("class_weights", recipe.ClassWeights),
        ("head", recipe.HeadKind),
        ("loss", recipe.Loss),
        ("preset", recipe.Preset),
    ):
        assert get_args(parameters[name].annotation)[0] == choices
    assert set(get_args(recipe.Preset)) == set(recipe.PRESETS)
    defaults = recipe.SETTINGS | {"hidden": [256, 64]}
    not_typed = {"fusion", "modality", "lr_factor", "lr_patience"}
    assert set(parameters) - {"preset"} == set(defaults) - not_typed
    for name in set(parameters) - {"preset", "hidden"}:
        assert parameters[name].default == defaults[name], name
    assert recipe.parse_setting("hidden", parameters["hidden"].default) == recipe.Recipe().hidden
    modality = inspect.signature(heads.train_head).parameters["modality"]
    assert get_args(modality.annotation)[0] == recipe.Modality
    for name in ("cache", "labels", "split_dir", "split_seed", "out", "jobs"):
        assert str(inspect.signature(options._setup_options).parameters[name].default) == str(getattr(Setup(), name))
    typed = inspect.signature(experiments._scoring_options).parameters
    for name, field in (("folds", "folds"), ("repeats", "repeats"), ("fold_seed", "seed"), ("without_test",) * 2):
        assert typed[name].default == getattr(Protocol(), field)
    of_stage2 = inspect.signature(finetune.finetune).parameters
    assert set(finetune._SETTINGS) == set(SETTINGS)
    for name, value in SETTINGS.items():
        assert parse_of_stage2(name, str(of_stage2[name].default)) == value, name
    backbone = get_args(inspect.signature(features.featurize).parameters["backbone"].annotation)[1]
    assert DEFAULT_BACKBONE in backbone.help


def test_the_two_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    run = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[offline]' && .venv/bin/mmcli demo"
    test = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[offline,dev]' && .venv/bin/pytest"
    assert run in readme
    assert test in readme
    assert test in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "words", ["mmcli.heads.recipe", "mmcli.heads.finetune_recipe", "mmcli.heads", "mmcli.finetune"]
)
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
