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


def test_a_date_stays_text_as_in_yaml_1_2() -> None:
    assert parse_value("2026-07-01") == "2026-07-01"
    assert parse_value("2026-99-99") == "2026-99-99", "and need not be one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "it has no end"),
        ("[" * 5000, "it has no end, or is too deep"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!timestamp 2026-07-01", "is not allowed"),
        ("a: !!binary aGk=", "is not allowed"),
        ("a: x\x00", "not valid YAML"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ('"\\udfff": 1', "half of a surrogate pair"),
    ],
)
def test_what_no_recipe_can_mean_is_refused_by_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        _read(tmp_path, text)
    assert "recipe.yaml" in str(refused.value)


def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path: Path) -> None:
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    with pytest.raises(RecipeError, match="more than 100,000 values"):
        _read(tmp_path, f"a0: &a0 x\n{levels}")
    value, _ = _read(tmp_path, "a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert value == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
