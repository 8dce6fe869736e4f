"""Retrieval between traces and training, through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.core.records import Record, read_records
from potstill.recipe import load_recipe

from ..rows import write_rows
from .conftest import Command, write_recipe

THINGS = ("zindle", "florp", "marn", "tovik", "quess", "brell", "ondar", "lisk", "hobb", "vint")


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path, tiny_encoder: str) -> Path:
    """The shipped recipe on ten facts and tiny models."""
    facts = [{"title": thing, "text": f"A {thing} costs {n + 11} coins."} for n, thing in enumerate(THINGS)]
    questions = [
        {
            "prompt": f"What is the price of a {thing}?",
            "response": f"<think>\n{facts[n]['text']}\n</think>\n\n{n + 11}",
            "reference": str(n + 11),
            "task": "math",
        }
        for n, thing in enumerate(THINGS)
    ]
    corpus = {"path": write_rows(tmp_path / "facts.jsonl", facts)}
    steps: dict[str, Any] = {
        "traces": {"data": {"path": write_rows(tmp_path / "questions.jsonl", questions), "held_out": 0.3}},
        "bm25": {"corpus": corpus},
        "reranked": {"corpus": corpus, "reranker": {"model": tiny_encoder, "epochs": 1}},
        "without": {"epochs": 1},
        "with": {"epochs": 1},
        "exam": {"max_new_tokens": 4},
    }
    changes = {"extends": "kard-small", "models": {"base": {"path": str(tiny_model_folder)}}, "steps": steps}
    return write_recipe(tmp_path / "recipe.yaml", changes)


def records(run: Path, step: str) -> list[Record]:
    return list(read_records(run / step / "records.parquet"))


@pytest.mark.slow
def test_kard_small_trains_with_and_without_passages_on_one_split(
    potstill: Command, recipe: Path, tmp_path: Path
) -> None:
    done = potstill("run", recipe, "--output", "runs/kard")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "kard"
    sides = {
        step: [(one.prompt_id, one.held_out) for one in records(run, step)]
        for step in ("traces", "bm25", "reranked")
    }
    assert sides["traces"] == sides["bm25"] == sides["reranked"]
    assert {held_out for _, held_out in sides["traces"]} == {True, False}
    for one in records(run, "reranked"):
        if not one.held_out:
            assert one.reasoning is not None
            assert one.reasoning in one.messages[-1]["content"]
    page = (run / "report.html").read_text(encoding="utf-8")
    for task in ("no passages", "by BM25", "reranked", "recall: question", "with − without"):
        assert task in page
    together = page.partition("The same questions in several tasks")[2]
    assert "their difference to without on no passages, paired by question" in together
    again = potstill("run", recipe, "--output", "runs/kard")
    assert "reranked: retrieve already made" in again.err


def test_the_shipped_recipe_is_planned_without_problems(potstill: Command, tmp_path: Path) -> None:
    done = potstill("plan", "kard-small", "--json")
    plan = json.loads(done.out)
    assert plan["problems"] == []
    rows = {step["name"]: step["rows"] for step in plan["steps"]}
    assert rows["traces"] == rows["bm25"] == rows["reranked"] == 400


def test_the_shipped_facts_are_those_that_their_script_writes() -> None:
    import runpy

    root = Path(__file__).parents[2]
    made = runpy.run_path(str(root / "benchmarks" / "evidence" / "invented_facts.py"))["rows"]()
    for name, rows in zip(("facts", "questions"), made, strict=True):
        lines = (root / "recipes" / f"invented-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert list(map(json.loads, lines)) == rows


def test_an_encoder_that_is_not_there_is_told_before_anything_runs(
    potstill: Command, recipe: Path, tmp_path: Path
) -> None:
    done = potstill("plan", recipe, "bm25.method=dense", "bm25.encoder=minilm")
    assert "no embedded encoder of the name 'minilm'" in done.out + done.err


def test_a_step_of_retrieve_gives_data_and_no_model(recipe: Path) -> None:
    graph = load_recipe(str(recipe)).graph
    assert graph.needs["with"] == ["reranked"]
    assert graph.needs["exam"] == ["without", "with", "traces", "bm25", "reranked"]
