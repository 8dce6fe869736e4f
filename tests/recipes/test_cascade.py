"""A cascade by domain: another domain trains one more specialist, and a kill costs nothing that was done."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.core.events import read_events
from potstill.core.records import RECORDS_FILE, read_records
from potstill.core.store import Artifact
from potstill.recipe import load_recipe

from .conftest import Command, write_recipe

DOMAINS = {
    "arithmetic": {"task": "chain_sum", "parameters": {"min_terms": 2, "max_terms": 2, "max_digits": 1}},
    "bits": {"task": "count_bits", "parameters": {"max_n": 64}},
    "letters": {"task": "letter_counting", "parameters": {"min_words": 2, "max_words": 3}},
    "words": {"task": "spell_backward", "parameters": {"max_word_len": 4}},
    "divisors": {"task": "gcd", "parameters": {"max_value": 30}},
}
FOUR = [*DOMAINS][:4]
TIMEOUT_S = 900.0
UNFINISHED = "store/artifacts/train-*/scratch"
EVIDENCE = Path(__file__).parents[2] / "benchmarks" / "evidence"


def cascade(model_folder: Path, domains: list[str], **specialist: Any) -> dict[str, Any]:
    """A solver's traces, a specialist a domain, its own words, one student of all of them."""
    each = {"category": domains}
    of_domain = {"category": "{category}"}
    return {
        "name": "cascade",
        "seed": 3,
        "models": {
            "base": {"path": str(model_folder)},
            "solver": {"engine": "solver", "function": "potstill.teachers.solvers:worked"},
        },
        "steps": {
            "traces": {
                "do": "generate",
                "model": "solver",
                "data": [{**DOMAINS[one], "size": 12, "labels": {"category": one}} for one in domains],
                "held_out": 0.3,
            },
            "specialist": {
                "do": "train",
                "each": each,
                "student": "base",
                "data": {"step": "traces", "where": of_domain},
                "lora": {"rank": 2},
                "batch": 4,
                **specialist,
            },
            "retold": {
                "do": "generate",
                "each": each,
                "model": "specialist",
                "data": {"step": "traces:prompts", "where": of_domain},
                "temperature": 0.0,
                "max_new_tokens": 6,
            },
            "direct": {"do": "train", "student": "base", "data": "traces", "tokens": 3000, "batch": 4},
            "student": {"do": "train", "student": "base", "data": "retold", "tokens": 3000, "batch": 4},
            "exam": {
                "do": "evaluate",
                "models": {"direct": "direct", "student": "student"},
                "tasks": {"domains": "traces:held_out"},
                "by": "category",
                "max_new_tokens": 6,
            },
        },
    }


def made(folder: Path) -> dict[str, Artifact]:
    """The artifacts of a run's steps, by name."""
    return {path.parent.name: Artifact.open(path.parent.resolve()) for path in folder.glob("*/manifest.json")}


@pytest.mark.slow
def test_another_domain_trains_its_own_specialist_and_what_depends_on_it(
    potstill: Command, tiny_model_folder: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", cascade(tiny_model_folder, FOUR))
    assert potstill("run", recipe, "--output", "four").code == 0
    write_recipe(recipe, cascade(tiny_model_folder, [*DOMAINS]))
    outcome = potstill("run", recipe, "--output", "five")
    assert outcome.code == 0
    four, five = made(tmp_path / "four"), made(tmp_path / "five")
    same = {name for name, one in five.items() if name in four and one.folder == four[name].folder}
    assert same == {f"{step}[{domain}]" for step in ("specialist", "retold") for domain in FOUR}
    assert "specialist[arithmetic]: train already made" in outcome.err

    def held_out(run: str) -> set[str]:
        traces = read_records(tmp_path / run / "traces" / RECORDS_FILE)
        return {one.prompt_id for one in traces if one.held_out and one.meta["category"] in FOUR}

    assert held_out("four") == held_out("five")


@pytest.mark.slow
def test_arms_are_trained_on_as_many_tokens_and_shown_by_domain_with_their_costs(
    potstill: Command, tiny_model_folder: Path, tmp_path: Path
) -> None:
    domains = FOUR[:2]
    recipe = write_recipe(tmp_path / "recipe.yaml", cascade(tiny_model_folder, domains))
    assert potstill("run", recipe, "--output", "run").code == 0
    artifacts = made(tmp_path / "run")
    for name in ("direct", "student"):
        manifest = artifacts[name].manifest
        assert 3000 <= manifest.tokens < 3000 + 4 * 200
        assert manifest.metrics["flops"] > 0
    for domain in domains:
        told = [*read_records(artifacts[f"retold[{domain}]"].folder / RECORDS_FILE)]
        assert {one.meta["category"] for one in told} == {domain}
        assert {one.held_out for one in told} == {True, False}
    metrics = artifacts["exam"].manifest.metrics
    for role in ("direct", "student"):
        groups = metrics["models"][role]["tasks"]["domains"]["groups"]
        assert set(groups) == set(domains)
        assert sum(one["prompts"] for one in groups.values()) == metrics["tasks"]["domains"]["prompts"]
    assert set(metrics["differences"]["student"]["tasks"]["domains"]["groups"]) == set(domains)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for told in ("By group", "arithmetic, right answers", "What each arm cost", "training, in parallel"):
        assert told in page


@pytest.mark.slow
def test_a_run_killed_in_its_third_specialist_makes_nothing_before_it_again(
    shared_model_folder: Path, tmp_path: Path
) -> None:
    slow = {"epochs": 3, "checkpoint_minutes": 0.0}
    recipe = write_recipe(tmp_path / "recipe.yaml", cascade(shared_model_folder, FOUR, **slow))
    events = tmp_path / "run" / "events.jsonl"
    third, deadline = f"specialist[{FOUR[2]}]", time.monotonic() + TIMEOUT_S
    with _start(recipe, tmp_path) as process:
        try:
            # Steps run one after the other, so that a checkpoint behind the third one's start is its own.
            while not (_started(events, third) and [*tmp_path.glob(f"{UNFINISHED}/checkpoint-*")]):
                assert process.poll() is None, "the run ended before it could be stopped"
                assert time.monotonic() < deadline
                time.sleep(0.002)
        finally:
            process.kill()
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("store/artifacts/*/manifest.json")}
    assert len(before) == 3, "traces and two specialists"
    out, err = _start(recipe, tmp_path).communicate(timeout=TIMEOUT_S)
    for name in ("traces: generate", *(f"specialist[{domain}]: train" for domain in FOUR[:2])):
        assert f"{name} already made" in out + err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert set(made(tmp_path / "run")) >= {"student", "exam", *(f"specialist[{one}]" for one in FOUR)}


def _started(events: Path, step: str) -> bool:
    if not events.is_file():
        return False
    return any(one["event"] == "step_started" and one.get("step") == step for one in read_events(events))


def _start(recipe: Path, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from potstill.cli import main; main()", "run", str(recipe)]
    options = ["--store", str(folder / "store"), "--output", str(folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_five_hundred_questions_of_mmlu_go_the_same_way(
    potstill: Command, build_tiny_model: Any, tiny_tokenizer: Any, shared_data: Path, tmp_path: Path
) -> None:
    # Its questions are longer than the context of other tests' models.
    build_tiny_model("llama", max_position_embeddings=16_384).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    train = {"lora": {"rank": 2}, "epochs": 0.2}
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        {
            "extends": str(EVIDENCE / "cmoe-mmlu.yaml"),
            "models": {"base": {"path": str(tmp_path / "model")}},
            "steps": {
                "traces": {"data": {"path": str(shared_data / "mmlu" / "train.jsonl")}},
                "specialist": train,
                "undivided": train,
                "small": {"layers": 1, "samples": 2},
                **{name: {"tokens": 4000} for name in ("direct", "undivided-cascade", "cascade")},
                "retold": {"max_new_tokens": 2, "limit": 20},
                "undivided-retold": {"max_new_tokens": 2, "limit": 20},
                "own-domain": {"max_new_tokens": 2, "limit": 4},
                "exam": {"max_new_tokens": 2, "limit": 40},
            },
        },
    )
    outcome = potstill("run", recipe, "--output", "run")
    assert outcome.code == 0, outcome.err
    artifacts = made(tmp_path / "run")
    traces = [*read_records(artifacts["traces"].folder / RECORDS_FILE)]
    assert len(traces) == 500
    assert {trace.response for trace in traces} == set("ABCD")
    categories = {trace.meta["category"] for trace in traces}
    groups = artifacts["exam"].manifest.metrics["models"]["cascade"]["tasks"]["domains"]["groups"]
    assert set(groups) == categories
    assert all(0 <= one["correct"]["low"] <= one["correct"]["high"] <= 1 for one in groups.values())


@pytest.mark.parametrize("name", ["cmoe", "cmoe-small"])
def test_shipped_cascades_pair_each_specialist_with_its_domain(name: str) -> None:
    graph = load_recipe(name).graph
    domains = [node.values["category"] for node in graph.nodes.values() if node.base == "specialist"]
    assert len(domains) == 4
    for domain in domains:
        assert graph.needs[f"specialist[{domain}]"] == ["traces"]
        assert set(graph.needs[f"retold[{domain}]"]) == {f"specialist[{domain}]", "traces"}
    assert set(graph.needs["cascade"]) >= {f"retold[{domain}]" for domain in domains}


def test_the_categories_of_mmlu_are_those_of_the_recipe() -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    text = (recipes / "mmlu-categories.csv").read_text(encoding="utf-8")
    subjects = [line.rpartition(",") for line in text.splitlines()[1:]]
    declared = yaml.safe_load((recipes / "cmoe.yaml").read_text(encoding="utf-8"))
    assert {category for *_, category in subjects} == {*declared["steps"]["specialist"]["each"]["category"]}
    assert len({subject for subject, *_ in subjects}) == 57
