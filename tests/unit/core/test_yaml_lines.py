"""YAML keeps its line numbers, refuses duplicates and reads numbers as YAML 1.2 does."""

from pathlib import Path

import pytest

from potstill.core.errors import RecipeError
from potstill.core.yaml_lines import parse_value, read_yaml


def _read(tmp_path: Path, text: str) -> tuple[dict[str, object], dict[tuple[str, ...], object]]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    value, origins = read_yaml(path)
    return value, {key: origin.line for key, origin in origins.items()}


def test_every_key_knows_its_line(tmp_path: Path) -> None:
    value, lines = _read(
        tmp_path, "name: x\nsteps:\n  a: {do: train,\n      lr: 1}\n  b:\n    list: [1,\n 2]\n"
    )
    assert value == {"name": "x", "steps": {"a": {"do": "train", "lr": 1}, "b": {"list": [1, 2]}}}
    assert lines[("steps", "a", "lr")] == 4
    assert lines[("steps", "b", "list", "1")] == 7


def test_a_name_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: steps\.a is given twice \(first on line 2\)"):
        _read(tmp_path, "steps:\n  a: 1\n  a: 2\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3.0e-4", 3e-4),
        ("3", 3),
        ("true", True),
        ("[a, 2]", ["a", 2]),
        ("1-2", "1-2"),
        ("", None),
    ],
)
def test_values_are_typed(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\t- x", "- a\n- b"])
def test_what_is_no_mapping_or_no_yaml_is_refused_by_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        _read(tmp_path, text)


def test_python_objects_are_never_built(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not allowed"):
        _read(tmp_path, "a: !!python/object/apply:os.system ['true']\n")
