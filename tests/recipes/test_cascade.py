"""A cascade by domain: another domain trains one more specialist, and a kill costs nothing that was done."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from potstill.core.events import read_events
from potstill.core.records import RECORDS_FILE, read_records
from potstill.core.store import Artifact
from potstill.logits.logit_cache import LogitCache
from potstill.losses.types import Sparse
from potstill.models import TransformersModel, load
from potstill.recipe import load_recipe
from potstill.train.rows import read_caches

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
RECIPES = Path(__file__).parents[2] / "recipes"
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


def own_domain(domains: list[str]) -> dict[str, Any]:
    """Each specialist on the held-out problems of its domain, beside its base."""
    return {
        "do": "evaluate",
        "each": {"category": domains},
        "models": {"base": "base", "specialist": "specialist"},
        "tasks": {"own": {"step": "traces:held_out", "where": {"category": "{category}"}}},
        "max_new_tokens": 6,
    }


def made(folder: Path) -> dict[str, Artifact]:
    """The artifacts of a run's steps, by name."""
    return {path.parent.name: Artifact.open(path.parent.resolve()) for path in folder.glob("*/manifest.json")}


@pytest.mark.slow
def test_a_cascade_may_be_three_deep(potstill: Command, tiny_model_folder: Path, tmp_path: Path) -> None:
    recipe = cascade(tiny_model_folder, FOUR[:2])
    again = {"do": "generate", "model": "student", "data": "traces:prompts", "max_new_tokens": 6}
    recipe["steps"] |= {
        "told-again": again,
        "smaller": {**recipe["steps"]["student"], "data": "told-again"},
        "last": {**recipe["steps"]["exam"], "models": {"direct": "direct", "smaller": "smaller"}},
    }
    assert potstill("run", write_recipe(tmp_path / "recipe.yaml", recipe), "--output", "deep").code == 0
    steps = made(tmp_path / "deep")
    told, retold = (
        [record for name in names for record in read_records(steps[name].folder / RECORDS_FILE)]
        for names in (["told-again"], [f"retold[{domain}]" for domain in FOUR[:2]])
    )
    assert {one.prompt_id for one in told} == {one.prompt_id for one in retold}
    assert {one.meta["category"] for one in told} == {*FOUR[:2]}
    assert steps["smaller"].manifest.tokens >= 3000
    groups = steps["last"].manifest.metrics["models"]["smaller"]["tasks"]["domains"]["groups"]
    assert {*groups} == {*FOUR[:2]}


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
    steps = cascade(tiny_model_folder, domains)
    steps["steps"]["own-domain"] = own_domain(domains)
    recipe = write_recipe(tmp_path / "recipe.yaml", steps)
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
    held_out = metrics["tasks"]["domains"]["prompts"]
    assert sum(artifacts[f"own-domain[{one}]"].manifest.counts["task_prompts"] for one in domains) == held_out
    together = page.partition("<h3>own-domain, all together</h3>")[2]
    assert f"own, right answers<small>{held_out} prompts" in together
    row = re.search(r"<th scope=\"row\">specialist</th><td>(\d)</td>", together)
    assert row is not None
    assert row[1] == "2", "both specialists were trained for it"


@pytest.mark.slow
def test_specialists_are_joined_by_their_traces_their_logits_or_their_weights(
    potstill: Command, tiny_model_folder: Path, tmp_path: Path
) -> None:
    domains = FOUR[:2]
    recipe = cascade(tiny_model_folder, domains, lr=0.05)
    recipe["steps"]["own-domain"] = own_domain(domains)
    shipped = yaml.safe_load((RECIPES / "cmoe-small.yaml").read_text(encoding="utf-8"))["variants"]
    shipped = {way: shipped[way] for way in ("traces", "logits", "ties")}
    shipped["logits"]["steps"]["cached"]["each"] = {"category": domains}
    shipped["logits"]["steps"]["student"] = shipped["logits"]["steps"].pop("cascade")
    path = write_recipe(tmp_path / "recipe.yaml", {**recipe, "variants": shipped})
    outcome = potstill("run", path, "--output", "run", "--sweep", ",".join(shipped))
    assert outcome.code == 0, outcome.err
    ways = {way: made(tmp_path / "run" / way) for way in shipped}
    for way, artifacts in ways.items():
        for domain in domains:
            specialist = f"specialist[{domain}]"
            assert artifacts[specialist].folder == ways["traces"][specialist].folder, "trained anew"
        assert 3000 <= artifacts["student"].manifest.tokens < 3000 + 4 * 200
        if way == "ties":
            merged = artifacts["merged"].manifest
            assert [*merged.extra["merged"]["weights"]] == [f"specialist[{one}]" for one in domains]
            assert "merged" not in artifacts["exam"].manifest.metrics["models"], "of the specialists' size"
            assert "merged" in artifacts[f"own-domain[{domains[0]}]"].manifest.metrics["models"]
            told = [*read_records(artifacts["retold"].folder / RECORDS_FILE)]
            assert {one.meta["category"] for one in told} == {*domains}
            assert {one.model for one in told} == {merged.model_identity}
    assert len({artifacts["student"].manifest.model_identity for artifacts in ways.values()}) == len(ways)
    # The comparison is of models that every way has.
    assert "own, right answers (specialist)" in outcome.out
    assert "merged" not in outcome.out.partition("\n")[0]


@pytest.mark.slow
def test_each_row_s_logits_are_those_of_its_own_domain_s_specialist(
    potstill: Command, tiny_model_folder: Path, tmp_path: Path
) -> None:
    domains = FOUR[:2]
    recipe = cascade(tiny_model_folder, domains, lr=0.05)
    recipe["steps"]["cached"] = {
        "do": "cache",
        "each": {"category": domains},
        "model": "specialist",
        "data": "retold",
        "top_k": 4,
    }
    recipe["steps"]["student"] |= {"data": "cached", "alpha": 1.0}
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    assert potstill("run", path, "--output", "run").code == 0
    artifacts = made(tmp_path / "run")
    specialists = [
        load(TransformersModel(path=str(artifacts[f"specialist[{one}]"].folder))) for one in domains
    ]
    caches = [LogitCache.open(artifacts[f"cached[{one}]"].folder) for one in domains]
    manifest = artifacts["student"].manifest
    assert manifest.counts["rows"] == sum(len(one) - one.held_out.sum() for one in caches)
    assert manifest.metrics["history"][-1]["eval_kl"] > 0
    rows, teacher = read_caches(
        [(one, None) for one in caches],
        vocabulary_size=specialists[0].vocabulary_size,
        temperature=1.0,
        top_k=None,
        max_length=10_000,
    )
    for place, own, other in ((0, 0, 1), (len(rows.train) - 1, 1, 0)):
        signal, row = teacher(rows.train, [place]), rows.train[place]
        assert isinstance(signal, Sparse)
        first = row.mask.index(1)
        found = []
        for specialist in (specialists[own], specialists[other]):
            logits = specialist.model(torch.tensor([row.ids]), use_cache=False).logits[0, first - 1 : -1]
            log_probs = logits[:, : specialist.vocabulary_size].float().log_softmax(-1)
            found.append((log_probs.gather(-1, signal.ids_NK.long()) - signal.log_probs_NK).abs().max())
        assert found[0] < 0.1
        assert found[1] > 3 * found[0]


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


@pytest.mark.parametrize("way", ["traces", "logits", "linear", "ties", "dare"])
def test_each_way_to_join_specialists_is_a_variant_that_can_run(potstill: Command, way: str) -> None:
    recipe = yaml.safe_load((RECIPES / "cmoe-small.yaml").read_text(encoding="utf-8"))
    assert way in recipe["variants"]
    graph = load_recipe("cmoe-small", variant=way).graph
    domains = recipe["steps"]["specialist"]["each"]["category"]
    behind = {"traces": "retold", "logits": "cached"}.get(way)
    if behind is None:
        assert graph.needs["merged"] == [f"specialist[{one}]" for one in domains]
        assert graph.needs["cascade"] == ["small", "retold"]
        assert graph.needs["retold"] == ["merged", "traces"]
    else:
        assert {*graph.needs["cascade"]} == {"small", *(f"{behind}[{one}]" for one in domains)}


def test_teachers_and_families_of_students_are_swept_apart_and_together() -> None:
    variants = yaml.safe_load((RECIPES / "cmoe.yaml").read_text(encoding="utf-8"))["variants"]
    graphs = [load_recipe("cmoe", variant=name).graph for name in variants]
    pairs = {(graph.models["teacher"].model, str(graph.models["base"].path)) for graph in graphs}  # type: ignore[union-attr]
    teachers, students = (set(one) for one in zip(*pairs, strict=True))
    assert pairs == {(teacher, student) for teacher in teachers for student in students}
    assert (len(teachers), len(students), len(pairs)) == (2, 2, len(variants))
    assert all(graph.models["teacher"].price for graph in graphs)  # type: ignore[union-attr]


@pytest.mark.parametrize("exam", ["exam", "exam-smaller"])
def test_each_student_is_compared_with_a_direct_one_of_its_size(exam: str) -> None:
    graph = load_recipe("cmoe").graph
    judged = graph.nodes[exam].settings.models  # type: ignore[attr-defined]
    arms = [graph.nodes[judged[role].target].settings for role in ("direct", "cascade")]
    direct, cascade = (one.model_dump(exclude={"data"}) for one in arms)
    assert direct == cascade
    assert next(iter(judged)) == "direct"


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
    text = (RECIPES / "mmlu-categories.csv").read_text(encoding="utf-8")
    subjects = [line.rpartition(",") for line in text.splitlines()[1:]]
    declared = yaml.safe_load((RECIPES / "cmoe.yaml").read_text(encoding="utf-8"))
    assert {category for *_, category in subjects} == {*declared["steps"]["specialist"]["each"]["category"]}
    assert len({subject for subject, *_ in subjects}) == 57
