import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer

import potstill

MODULES = [
    module.name
    for module in pkgutil.walk_packages(potstill.__path__, "potstill.")
    if module.name != "potstill.__main__"
]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_lists_its_public_names(name):
    if name.endswith("_triton"):
        pytest.importorskip("triton", reason="triton, which only `make check` installs, is not there")
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert len(set(listed)) == len(listed)
    missing = [public for public in listed if not hasattr(module, public)]
    assert not missing, f"{name}.__all__ names what is not there"
    # A command's function is reached through its app.
    apps = [value for value in vars(module).values() if isinstance(value, typer.Typer)]
    commands = {command.callback for app in apps for command in app.registered_commands}
    defined = {
        public
        for public, value in vars(module).items()
        if not public.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == name
        and value not in commands
    }
    assert not defined - set(listed), f"{name}.__all__ leaves out what {name} defines"


def test_every_module_is_walked():
    assert {"potstill.core.store", "potstill.models.loading", "potstill.cli"} <= set(MODULES)


def test_the_packages_public_names_exist():
    assert set(potstill.__all__) == {"__version__", *potstill._HOMES}
    for name in potstill.__all__:
        assert getattr(potstill, name) is not None
        assert name in dir(potstill)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        potstill.nothing  # noqa: B018 - reading it is the test


def test_the_version_is_the_installed_distributions():
    assert potstill.__version__ == metadata.version("potstill")


def modules_after(statement: str) -> set[str]:
    """What a fresh interpreter has imported after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_else():
    own = {name for name in modules_after("import potstill") if name.partition(".")[0] == "potstill"}
    assert own == {"potstill"}


HEAVY = (
    "torch",
    "transformers",
    "peft",
    "pyarrow",
    "httpx2",
    "matplotlib",
    "reasoning_gym",
    "numpy",
    "datasets",
)


@pytest.mark.parametrize("name", ["potstill", "potstill.recipe", "potstill.cli"])
def test_recipes_are_read_without_heavy_libraries(name):
    loaded = modules_after(f"import {name}")
    assert name in loaded
    assert sorted(set(HEAVY) & loaded) == []


def test_no_script_hides_a_module_of_the_standard_library():
    """A script's folder comes first on the path of all that lie in it."""
    scripts = {path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py")}
    assert "selection" in scripts
    assert not scripts & sys.stdlib_module_names
