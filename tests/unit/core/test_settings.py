"""Settings are strict; a fingerprint sees meaning and content, never execution or names of inputs."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from potstill.core.settings import DataRef, InputPath, ModelRef, Settings, execution, meaning, references


class Inner(Settings):
    model: ModelRef
    workers: int = execution(2)


class Outer(Settings):
    data: DataRef
    models: dict[str, ModelRef] = Field({})
    inner: Inner | None = None
    lr: float = 1e-4


def test_unknown_keys_and_wrong_types_are_refused() -> None:
    for wrong in (
        {"data": "x", "rate": 1},
        {"data": "x", "lr": "fast"},
        {"data": "x", "lr": True},
        {"data": 3},
    ):
        with pytest.raises(ValidationError):
            Outer.model_validate(wrong)


def test_a_whole_number_serves_as_a_float() -> None:
    assert Outer.model_validate({"data": "x", "lr": 1}).lr == 1.0


def test_references_are_found_wherever_they_stand() -> None:
    settings = Outer.model_validate(
        {"data": "traces:held_out", "models": {"a": "base"}, "inner": {"model": "teacher"}}
    )
    assert references(settings) == [
        (("data",), "traces:held_out"),
        (("models", "a"), "base"),
        (("inner", "model"), "teacher"),
    ]


def test_a_reference_has_a_target_and_a_view_but_a_path_has_none() -> None:
    reference = DataRef("traces[math]:held_out")
    assert (reference.target, reference.view, reference.is_path) == ("traces[math]", "held_out", False)
    path = DataRef("./x:y/z")
    assert (path.target, path.view, path.is_path) == ("./x:y/z", None, True)


def test_execution_fields_do_not_enter_the_meaning() -> None:
    one = Inner.model_validate({"model": "m", "workers": 1})
    two = Inner.model_validate({"model": "m", "workers": 9})
    assert meaning(one) == meaning(two) == {"model": "m"}


def test_the_meaning_of_a_reference_is_what_it_leads_to() -> None:
    settings = Outer.model_validate({"data": "traces"})
    assert meaning(settings, lambda reference: f"content of {reference}")["data"] == "content of traces"


def test_content_stands_for_a_path(tmp_path: Path) -> None:
    class Source(Settings):
        path: InputPath = execution(...)

        def content(self) -> Any:
            return Path(self.path).read_text(encoding="utf-8")

    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("same", encoding="utf-8")
    first, second = (Source.model_validate({"path": str(tmp_path / name)}) for name in ("a.txt", "b.txt"))
    assert meaning(first) == meaning(second) == {"content": "same"}


def test_paths_resolve_beside_the_recipe_first_then_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Source(Settings):
        path: InputPath

    recipe, here = tmp_path / "recipe", tmp_path / "here"
    for folder in (recipe, here):
        folder.mkdir()
    (here / "x.txt").touch()
    monkeypatch.chdir(here)
    context = {"folders": [recipe]}
    assert Source.model_validate({"path": "x.txt"}, context=context).path == str(here / "x.txt")
    (recipe / "x.txt").touch()
    assert Source.model_validate({"path": "x.txt"}, context=context).path == str(recipe / "x.txt")
    assert Source.model_validate({"path": "gone.txt"}, context=context).path == "gone.txt"
