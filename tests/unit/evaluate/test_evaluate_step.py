import copy
import dataclasses
import gc
import json
import os
import re
import select
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import BudgetError, DataError, EngineError, Interrupted, ModelError
from potstill.core.records import RECORDS_FILE, Record, read_records, write_records
from potstill.core.settings import Settings
from potstill.core.step import StepContext, StepResult
from potstill.core.store import Artifact
from potstill.data.chat import Renderer
from potstill.evaluate import EvaluateSettings, run
from potstill.evaluate.subjects import LocalSubject
from potstill.models import TransformersModel, load_tokenizer, loading
from potstill.teachers import LlamaCppModel, OpenAIModel, SolverModel, VllmModel

from ...conftest import PADDED_VOCABULARY
from ...rows import write_rows
from ...servers import Reply, ScriptedServer, completion, error, running_server
from ..models.test_embedded import to_gguf

Evaluate = Callable[..., tuple[StepContext, StepResult]]

QUESTIONS = [{"question": f"What is {number} + 1?", "answer": f"#### {number + 1}"} for number in range(5)]
FILES = ("scores.parquet", "held_out.parquet", "samples.json")


@pytest.fixture
def models(tmp_path: Path, build_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> dict[str, Settings]:
    """Three tiny models of one tokenizer."""
    found: dict[str, Settings] = {}
    for seed, name in enumerate(("base", "student", "big")):
        build_tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        found[name] = TransformersModel(path=str(tmp_path / name), device="cpu", dtype="float32")
    return found


@pytest.fixture
def settings(tmp_path: Path) -> EvaluateSettings:
    write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    return EvaluateSettings.model_validate(
        {
            "do": "evaluate",
            "models": {"base": "base", "student": "student", "teacher": "big"},
            "teacher": "big",
            "data": "traces:held_out",
            "tasks": {"sums": {"path": str(tmp_path / "questions.jsonl")}},
            "max_new_tokens": 6,
            "samples_shown": 2,
            "batch": 2,
            "max_tokens": 60,
        }
    )


@pytest.fixture
def evaluate(
    step_context: Callable[..., StepContext],
    traces: Callable[..., Artifact],
    models: dict[str, Settings],
    settings: EvaluateSettings,
) -> Evaluate:
    """`evaluate(folder, **changes of the settings)`: the context and the result of one evaluation."""
    data = {"traces": [traces(20)]}

    def start(folder: str = "artifact", **changes: Any) -> tuple[StepContext, StepResult]:
        changed = EvaluateSettings.model_validate({**settings.model_dump(), **changes})
        context = step_context("evaluate", folder=folder, models=models, data=data)
        return context, run(changed, context)

    return start


def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_every_model_is_measured_on_the_same_traces_and_prompts(evaluate: Evaluate) -> None:
    context, result = evaluate()

    assert result.counts == {"models": 3, "held_out_rows": 4, "task_prompts": 5}
    held_out, scores = _rows(context.folder / "held_out.parquet"), _rows(context.folder / "scores.parquet")
    for role in ("base", "student", "teacher"):
        assert [row["record_id"] for row in held_out if row["model"] == role] == ["r04", "r09", "r14", "r19"]
        asked = [json.loads(row["prompt"])[-1]["content"] for row in scores if row["model"] == role]
        assert asked == [one["question"] for one in QUESTIONS]
    for row in scores:
        assert row["task"] == "sums"
        assert set(json.loads(row["verdicts"])) == {
            "correct",
            "well_formed",
            "handed_in",
            "reasons",
            "tagged",
        }
        assert set(json.loads(row["scores"])) == {"reasoning_quality", "repetition"}
        assert set(json.loads(row["counts"])) == {"reasoning_steps", "reasoning_words"}
        assert row["finish_reason"] in ("stop", "length")
        assert 1 <= row["response_tokens"] <= 6


def test_a_model_that_takes_the_plain_template_is_told_once(evaluate: Evaluate, tmp_path: Path) -> None:
    for name in ("base", "big"):
        (tmp_path / name / "chat_template.jinja").unlink()
    context, _ = evaluate(tasks={})
    said = [line for line in context.reporter.said if "takes the one called plain" in line]  # type: ignore[attr-defined]
    assert [line.split()[0] for line in said] == [str(tmp_path / "base"), str(tmp_path / "big")]


def test_figures_come_with_intervals_and_differences_to_the_baseline(evaluate: Evaluate) -> None:
    _, result = evaluate()

    metrics = json.loads(json.dumps(result.metrics, allow_nan=False))
    assert (metrics["baseline"], metrics["teacher"]) == ("base", "big")
    student = metrics["models"]["student"]
    assert student["reference"] == "student"
    for figure in (
        student["held_out"]["kl_nats_per_token"],
        student["held_out"]["top1_agreement"],
        student["held_out"]["perplexity"],
        student["tasks"]["sums"]["verdicts"]["correct"],
    ):
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert student["held_out"]["kl_nats_per_token"]["value"] > 0.05
    assert sum(student["tasks"]["sums"]["finish_reasons"].values()) == 5
    assert student["speed"]["decoding_tokens_per_s"] > 0
    gap = metrics["differences"]["student"]
    base = metrics["models"]["base"]
    for name in ("kl_nats_per_token", "top1_agreement"):
        expected = student["held_out"][name]["value"] - base["held_out"][name]["value"]
        assert gap["held_out"][name]["value"] == pytest.approx(expected)
    ratio = student["held_out"]["perplexity"]["value"] / base["held_out"]["perplexity"]["value"]
    assert gap["held_out"]["perplexity"]["value"] == pytest.approx(ratio)
    assert 0 <= gap["tasks"]["sums"]["verdicts"]["correct"]["mcnemar_p"] <= 1


def test_the_teacher_is_not_compared_with_itself(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    from potstill.evaluate import subjects

    loads: list[str] = []
    load = subjects.load
    monkeypatch.setattr(
        subjects, "load", lambda settings, **kinds: loads.append(settings.path) or load(settings, **kinds)
    )

    _, result = evaluate()

    teacher = result.metrics["models"]["teacher"]
    assert teacher["is_teacher"]
    assert "kl_nats_per_token" not in teacher["held_out"]
    assert teacher["held_out"]["perplexity"]["value"] > 1
    assert "teacher" not in result.metrics["differences"]
    assert len(loads) == len(set(loads)) == 3


def test_samples_hold_every_models_answer_beside_the_trace(evaluate: Evaluate) -> None:
    context, _ = evaluate()

    samples = json.loads((context.folder / "samples.json").read_text(encoding="utf-8"))
    assert [sample["source"] for sample in samples] == ["held_out", "held_out", "sums", "sums"]
    assert samples[0]["trace"] == "The answer is 4."
    assert samples[2]["trace"] is None
    assert samples[2]["reference"] == "1"
    scores = _rows(context.folder / "scores.parquet")
    for sample in samples:
        assert list(sample["answers"]) == ["base", "student", "teacher"]
    first = next(row for row in scores if row["model"] == "student")
    assert samples[2]["answers"]["student"]["response"] == first["response"]


@pytest.mark.parametrize(("of_task", "twice"), [({}, False), ({"max_new_tokens": 5}, True)])
def test_held_out_prompts_that_a_task_asks_as_well_are_decoded_once(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, of_task: dict[str, int], twice: bool
) -> None:
    decoded: list[str] = []
    decode = LocalSubject.decode

    def counted(self: LocalSubject, records: Sequence[Record], *rest: Any, **options: Any) -> Any:
        decoded.extend(record.prompt_id for record in records)
        return decode(self, records, *rest, **options)

    monkeypatch.setattr(LocalSubject, "decode", counted)
    context, result = evaluate(
        models={"base": "base"},
        teacher=None,
        tasks={"mine": {"data": "traces:held_out", "limit": 3, **of_task}},
    )
    samples = json.loads((context.folder / "samples.json").read_text(encoding="utf-8"))
    assert [one["source"] for one in samples] == ["held_out"] * 2 + ["mine"] * 2 * twice
    assert all(one["trace"] for one in samples[:2])
    assert len(decoded) == 3 + 2 * twice
    rows = {row["prompt"]: row for row in _rows(context.folder / "scores.parquet")}
    for sample in samples[: 2 * (not twice)]:
        row = rows[json.dumps(sample["messages"])]
        assert row["response"] == sample["answers"]["base"]["response"]
    tokens = sum(row["response_tokens"] for row in rows.values())
    assert (result.tokens == tokens) is not twice


def test_a_sample_shows_the_answer_to_its_own_prompt_and_not_to_one_of_the_same_identity(
    step_context: Callable[..., StepContext],
    traces: Callable[..., Artifact],
    seal: Callable[..., Artifact],
    models: dict[str, Settings],
    settings: EvaluateSettings,
    tmp_path: Path,
) -> None:
    """As rows with passages and without have it."""
    alone = traces(10)
    found = [
        dataclasses.replace(
            one,
            id="",
            messages=[{"role": "user", "content": f"A sum is a number. {one.messages[0]['content']}"}],
        )
        for one in read_records(alone.folder / RECORDS_FILE)
    ]
    (tmp_path / "found").mkdir()
    write_records(tmp_path / "found" / RECORDS_FILE, found)
    context = step_context(
        "evaluate",
        models=models,
        data={"traces": [alone], "found": [seal(tmp_path / "found", "retrieve")]},
    )
    changes = {
        "models": {"base": "base"},
        "teacher": None,
        "data": "found:held_out",
        "tasks": {"passages": "found:held_out", "alone": "traces:held_out"},
    }
    result = run(EvaluateSettings.model_validate({**settings.model_dump(), **changes}), context)
    rows = {row["prompt"]: row for row in _rows(context.folder / "scores.parquet")}
    samples = json.loads((context.folder / "samples.json").read_text(encoding="utf-8"))
    assert [one["source"] for one in samples] == ["held_out"] * 2 + ["alone"] * 2
    for sample in samples:
        row = rows[json.dumps(sample["messages"])]
        assert sample["answers"]["base"]["response"] == row["response"]
    assert len({row["response"] for row in rows.values()}) > 1, "else nothing tells the answers apart"
    assert result.tokens == sum(row["response_tokens"] for row in rows.values())


def test_the_same_evaluation_gives_the_same_files_whatever_the_batch(evaluate: Evaluate) -> None:
    one, _ = evaluate("one")
    other, _ = evaluate("other", batch=2, max_tokens=60)
    for name in FILES:
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
    wide, _ = evaluate("wide", batch=5, max_tokens=10_000)
    assert (one.folder / "samples.json").read_bytes() == (wide.folder / "samples.json").read_bytes()


def test_an_interrupted_evaluation_goes_on_where_it_was_and_ends_as_an_uninterrupted_one(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.evaluate import step

    whole, _ = evaluate("whole")
    compare, measured = step.compare_on_traces, []

    def broken_off(model: Any, *args: Any, **options: Any) -> Any:
        if len(measured) == 1:
            raise Interrupted
        measured.append(model.identity)
        return compare(model, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(step, "compare_on_traces", broken_off)
        with pytest.raises(Interrupted):
            evaluate("broken")

    again: list[str] = []

    def watched(model: Any, *args: Any, **options: Any) -> Any:
        again.append(model.identity)
        return compare(model, *args, **options)

    monkeypatch.setattr(step, "compare_on_traces", watched)
    resumed, result = evaluate("broken")
    assert len(again) == 2
    assert measured[0] not in again
    for name in FILES:
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert result.metrics["models"]["base"]["speed"]["decoding_tokens_per_s"] > 0


def test_it_stops_between_batches_when_the_user_asks(
    step_context: Callable[..., StepContext],
    traces: Callable[..., Artifact],
    models: dict[str, Settings],
    settings: EvaluateSettings,
) -> None:
    context = step_context("evaluate", models=models, data={"traces": [traces(20)]})
    context.stop.set()
    with pytest.raises(Interrupted):
        run(settings, context)


def test_traces_alone_and_tasks_alone_are_enough(evaluate: Evaluate) -> None:
    context, result = evaluate("traces-only", tasks={})
    assert "tasks" not in result.metrics["models"]["student"]
    assert _rows(context.folder / "scores.parquet") == []
    context, result = evaluate("tasks-only", data=None, teacher=None)
    assert "held_out" not in result.metrics["models"]["student"]
    assert not (context.folder / "held_out.parquet").exists()


def test_limit_takes_the_first_traces_and_prompts(evaluate: Evaluate) -> None:
    context, result = evaluate(limit=2)
    assert result.counts == {"models": 3, "held_out_rows": 2, "task_prompts": 2}
    assert {row["record_id"] for row in _rows(context.folder / "held_out.parquet")} == {"r04", "r09"}


def test_another_tokenizer_is_named_and_gets_its_perplexity_but_no_kl(
    evaluate: Evaluate, models: dict[str, Settings], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<other>"])
    other.save_pretrained(tmp_path / "student")

    context, result = evaluate()

    held_out = result.metrics["models"]["student"]["held_out"]
    assert "kl_nats_per_token" not in held_out
    assert held_out["perplexity"]["value"] > 1
    assert "the vocabularies of big and student do not match" in held_out["kl_refused"]
    assert any("student: no KL and no agreement" in line for line in context.reporter.said)  # type: ignore[attr-defined]
    assert "held_out" not in result.metrics["differences"]["student"]
    assert "tasks" in result.metrics["differences"]["student"]
    assert "kl_nats_per_token" in result.metrics["models"]["base"]["held_out"]


def test_prompts_without_responses_are_refused_as_traces(
    step_context: Callable[..., StepContext],
    seal: Callable[..., Artifact],
    models: dict[str, Settings],
    settings: EvaluateSettings,
    tmp_path: Path,
) -> None:
    (tmp_path / "prompts").mkdir()
    record = Record("p", [{"role": "user", "content": "Why?"}], held_out=True)
    write_records(tmp_path / "prompts" / RECORDS_FILE, [record])
    data = {"traces": [seal(tmp_path / "prompts", "generate")]}
    with pytest.raises(DataError, match="no responses to measure models on"):
        run(settings, step_context("evaluate", models=models, data=data))


def test_a_teacher_of_another_engine_is_refused_by_name(
    evaluate: Evaluate, models: dict[str, Settings]
) -> None:
    models["big"] = SolverModel(engine="solver", function="potstill.teachers.solvers:chain_sum")
    with pytest.raises(ModelError, match="big is a model of engine solver"):
        evaluate()


def test_sampling_draws_the_same_for_a_prompt_in_any_batch(evaluate: Evaluate) -> None:
    one, _ = evaluate("one", temperature=1.0, batch=1, data=None, teacher=None)
    other, _ = evaluate("other", temperature=1.0, batch=5, data=None, teacher=None)
    greedy, _ = evaluate("greedy", temperature=0.0, batch=5, data=None, teacher=None)
    responses = [
        [row["response"] for row in _rows(one_.folder / "scores.parquet")] for one_ in (one, other, greedy)
    ]
    assert responses[0] == responses[1]
    assert responses[0] != responses[2]


def test_answers_are_compared_with_the_responses_of_the_traces_by_rouge(
    evaluate: Evaluate, prompts_alone: dict[str, str]
) -> None:
    pytest.importorskip("rouge_score")
    tasks = {"held": "traces:held_out", "sums": prompts_alone}
    context, result = evaluate(tasks=tasks, rouge=True)
    metrics = json.loads(json.dumps(result.metrics, allow_nan=False))
    for role in ("base", "student", "teacher"):
        scores = metrics["models"][role]["tasks"]["held"]["scores"]
        assert set(scores) == {"reasoning_quality", "repetition", "rouge1", "rouge2", "rougeL"}
        for figure in scores.values():
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    assert "rouge1" not in metrics["models"]["base"]["tasks"]["sums"]["scores"], "its rows have no responses"
    gaps = metrics["differences"]["student"]["tasks"]["held"]["scores"]
    base, student = (metrics["models"][role]["tasks"]["held"]["scores"] for role in ("base", "student"))
    for name, gap in gaps.items():
        assert gap["value"] == pytest.approx(student[name]["value"] - base[name]["value"])
    rows = [row for row in _rows(context.folder / "scores.parquet") if row["task"] == "held"]
    assert all({"rouge1", "rouge2", "rougeL"} <= set(json.loads(row["scores"])) for row in rows)


@pytest.fixture
def prompts_alone(tmp_path: Path) -> dict[str, str]:
    """A task whose rows have no responses."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "What is 1 + 1?"}), encoding="utf-8")
    return {"path": str(tmp_path / "prompts.jsonl")}


def test_a_response_cut_off_in_its_reasoning_is_no_reference_of_rouge(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    pytest.importorskip("rouge_score")
    rows = [
        {"prompt": "What is 1 + 1?", "response": "<think>\none and one"},
        {"prompt": "What is 1 + 2?", "response": "<think>\none and two\n</think>\n\nIt is three."},
    ]
    path = write_rows(tmp_path / "given.jsonl", rows)
    context, _ = evaluate(tasks={"given": {"path": str(path)}}, rouge=True)
    found = [json.loads(row["scores"]) for row in _rows(context.folder / "scores.parquet")]
    assert ["rouge1" in scores for scores in found[:2]] == [False, True]
    assert any("given: 1 of 2 prompts have no answer" in said for said in context.reporter.said)


def test_rouge_without_responses_to_compare_with_is_refused(
    evaluate: Evaluate, prompts_alone: dict[str, str]
) -> None:
    pytest.importorskip("rouge_score")
    with pytest.raises(DataError, match="no task have responses"):
        evaluate(tasks={"sums": prompts_alone}, rouge=True)


def test_rouge_without_its_library_says_what_to_install(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "potstill\[rouge\]"'):
        evaluate(rouge=True)


QUIZ = [
    {"question": f"What is {number} + 1?", "choices": [str(number), str(number + 1), "none"], "answer": 1}
    for number in range(4)
]


@pytest.fixture
def quiz(tmp_path: Path) -> dict[str, str]:
    """Multiple-choice questions."""
    path = write_rows(tmp_path / "quiz.jsonl", QUIZ)
    return {"path": str(path)}


@pytest.mark.parametrize(("choose_by", "normalise"), [("letter", "none"), ("text", "byte"), ("text", "none")])
def test_multiple_choice_is_judged_by_likelihood_where_the_task_says_so(
    evaluate: Evaluate, quiz: dict[str, str], choose_by: str, normalise: str
) -> None:
    task = {"data": quiz, "choose_by": choose_by, "normalise": normalise}
    context, result = evaluate(tasks={"quiz": task}, data=None, teacher=None)
    rows = _rows(context.folder / "scores.parquet")
    assert len(rows) == 3 * len(QUIZ)
    for row in rows:
        assert row["finish_reason"] == "scored"
        assert len(row["choice_logprobs"]) == 3
        lengths = [
            len(text) for text in json.loads(row["prompt"])[-1]["content"].split("\n\n")[1].splitlines()
        ]
        scores = [
            logprob / (length - len("A. ") if (choose_by, normalise) == ("text", "byte") else 1)
            for logprob, length in zip(row["choice_logprobs"], lengths, strict=True)
        ]
        assert row["response"][0] == "ABC"[scores.index(max(scores))]
        assert json.loads(row["verdicts"]) == {"correct": row["response"][0] == "B"}
    figures = result.metrics["models"]["student"]["tasks"]["quiz"]
    assert figures["verdicts"]["correct"]["low"] <= figures["verdicts"]["correct"]["value"]
    assert result.metrics["tasks"]["quiz"]["chance"] == pytest.approx(1 / 3)
    assert set(result.metrics["differences"]["student"]["tasks"]["quiz"]["verdicts"]["correct"]) == {
        "value",
        "low",
        "high",
        "mcnemar_p",
    }


def test_multiple_choice_is_written_out_otherwise(evaluate: Evaluate, quiz: dict[str, str]) -> None:
    context, _ = evaluate(tasks={"quiz": quiz}, data=None, teacher=None)
    rows = _rows(context.folder / "scores.parquet")
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert all(row["choice_logprobs"] is None for row in rows)


def test_a_task_that_scores_options_needs_rows_with_options(
    evaluate: Evaluate, settings: EvaluateSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"data": settings.model_dump()["tasks"]["sums"], "choose_by": "letter"}
    with pytest.raises(DataError, match="no options to choose from"):
        evaluate(tasks={"sums": task})


def test_several_samples_a_prompt_are_decoded_with_seeds_of_their_own(
    evaluate: Evaluate, settings: EvaluateSettings
) -> None:
    options = {"samples": 3, "temperature": 1.0, "pass_at": [1, 2], "data": None, "teacher": None}
    context, result = evaluate("one", batch=2, **options)
    rows = [row for row in _rows(context.folder / "scores.parquet") if row["model"] == "student"]
    assert [row["sample"] for row in rows] == [0, 1, 2] * len(QUESTIONS)
    assert [row["prompt_id"] for row in rows[::3]] == [row["prompt_id"] for row in rows[2::3]]
    assert len({row["response"] for row in rows[:3]}) > 1
    figures = result.metrics["models"]["student"]["tasks"]["sums"]
    assert (figures["prompts"], figures["samples"]) == (len(QUESTIONS), 3)
    assert list(figures["pass_at"]) == ["1", "2"]
    assert result.metrics["tasks"]["sums"]["temperature"] == 1.0
    again, _ = evaluate("other", batch=7, **options)
    assert _rows(again.folder / "scores.parquet") == _rows(context.folder / "scores.parquet")


def test_a_nucleus_of_almost_nothing_is_the_likeliest_token(evaluate: Evaluate) -> None:
    greedy, _ = evaluate("greedy", data=None, teacher=None)
    narrow, _ = evaluate("narrow", temperature=1.0, top_p=1e-9, data=None, teacher=None)
    assert [row["response"] for row in _rows(greedy.folder / "scores.parquet")] == [
        row["response"] for row in _rows(narrow.folder / "scores.parquet")
    ]


def test_a_task_can_have_limits_of_its_own(evaluate: Evaluate, settings: EvaluateSettings) -> None:
    data = settings.model_dump()["tasks"]["sums"]
    tasks = {"sums": data, "short": {"data": data, "limit": 2, "max_new_tokens": 2}}
    context, result = evaluate(tasks=tasks, data=None, teacher=None)
    rows = _rows(context.folder / "scores.parquet")
    short = [row for row in rows if row["task"] == "short"]
    assert len(short) == 3 * 2
    assert max(row["response_tokens"] for row in short) <= 2
    assert max(row["response_tokens"] for row in rows if row["task"] == "sums") > 2
    assert result.metrics["tasks"]["short"]["max_new_tokens"] == 2


def test_what_was_cut_off_is_told(evaluate: Evaluate) -> None:
    context, result = evaluate(data=None, teacher=None, max_new_tokens=1)
    cut = result.metrics["models"]["student"]["tasks"]["sums"]["finish_reasons"]["length"]
    said = f"student: {cut} of 5 answers to sums were cut off at max_new_tokens (1)"
    assert any(said in line for line in context.reporter.said)  # type: ignore[attr-defined]
    assert (
        result.metrics["models"]["student"]["tasks"]["sums"]["verdicts"]["handed_in"]["value"] == 1 - cut / 5
    )


def test_answers_that_do_not_fit_into_memory_together_are_decoded_in_smaller_batches(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.evaluate import subjects

    def answers(name: str) -> Any:
        context, _ = evaluate(name, batch=4, models={"student": "student"}, teacher=None, baseline=None)
        return context, _rows(context.folder / "scores.parquet")

    _, whole = answers("whole")
    decode, tried = subjects.generate_batch, list[int]()

    def small_memory(loaded: Any, renderer: Any, prompts: Any, **options: Any) -> Any:
        tried.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(loaded, renderer, prompts, **options)

    monkeypatch.setattr(subjects, "generate_batch", small_memory)
    context, found = answers("small")
    assert found == whole
    assert tried[:4] == [4, 2, 1, 1]
    assert {*tried[2:]} == {1}, "a batch that does not fit was tried again"
    said = [line for line in context.reporter.said if "out of memory" in line]
    assert said == [
        "student: out of memory: 2 answers are decoded at once from here on",
        "student: out of memory: 1 answers are decoded at once from here on",
    ]

    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(subjects, "generate_batch", no_memory)
    with pytest.raises(
        ModelError, match=r"student: an answer of up to \d+ tokens, prompt included, does not fit"
    ):
        answers("none")


def test_answers_that_may_reason_have_more_tokens_by_default(
    evaluate: Evaluate, settings: EvaluateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.evaluate import subjects

    asked: list[int] = []

    def watched(*args: Any, max_new_tokens: int, **options: Any) -> Any:
        asked.append(max_new_tokens)
        return decode(*args, max_new_tokens=2, **options)

    decode = subjects.generate_batch
    monkeypatch.setattr(subjects, "generate_batch", watched)
    changes = {"max_new_tokens": None, "data": None, "teacher": None, "models": {"student": "student"}}
    evaluate("plain", baseline=None, **changes)
    assert {*asked} == {512}
    asked.clear()
    row = {
        "prompt": "What is 1 + 1?",
        "response": "<think>\none and one\n</think>\n\n2",
        "reference": "2",
        "task": "math",
    }
    (tmp_path / "given.jsonl").write_text(json.dumps(row), encoding="utf-8")
    context, _ = evaluate(
        "given", baseline=None, **{**changes, "tasks": {"given": {"path": str(tmp_path / "given.jsonl")}}}
    )
    assert {*asked} == {4096}
    assert any("may reason" in line for line in context.reporter.said)  # type: ignore[attr-defined]
    asked.clear()
    config = tmp_path / "student" / "chat_template.jinja"
    text = config.read_text(encoding="utf-8")
    config.write_text(
        text.replace("assistant\\n'", "assistant\\n<think>\\n'").replace(
            "assistant\n'", "assistant\n<think>\n'"
        ),
        encoding="utf-8",
    )
    assert config.read_text(encoding="utf-8") != text
    evaluate("template", baseline=None, **changes)
    assert {*asked} == {4096}


def test_a_set_for_forgetting_is_measured_by_answers_and_by_the_perplexity_of_its_responses(
    evaluate: Evaluate, settings: EvaluateSettings
) -> None:
    old = settings.model_dump()["tasks"]["sums"]
    context, result = evaluate(
        tasks={}, forgetting={"old": {"data": old, "limit": 3}, "said": "traces:held_out"}
    )
    student = result.metrics["models"]["student"]
    assert "tasks" not in student
    assert student["forgetting"]["old"]["prompts"] == 3
    assert student["forgetting"]["old"]["given"]["perplexity"]["value"] > 1
    assert "prompts" not in student["forgetting"]["said"], "its rows have no verifier"
    held_out = student["held_out"]["perplexity"]["value"]
    assert student["forgetting"]["said"]["given"]["perplexity"]["value"] == pytest.approx(held_out)
    gap = result.metrics["differences"]["student"]["forgetting"]
    assert gap["old"]["verdicts"]["correct"]["low"] <= 0 <= gap["old"]["verdicts"]["correct"]["high"]
    assert gap["said"]["given"]["perplexity"]["low"] > 0
    rows = _rows(context.folder / "forgetting.parquet")
    assert {(row["model"], row["task"]) for row in rows} == {
        (model, name) for model in ("base", "student", "teacher") for name in ("old", "said")
    }
    assert {row["task"] for row in _rows(context.folder / "scores.parquet")} == {"old"}


def test_a_set_that_cannot_tell_what_was_forgotten_is_refused(
    evaluate: Evaluate, prompts_alone: dict[str, str]
) -> None:
    with pytest.raises(DataError, match=r"nothing tells what was forgotten") as caught:
        evaluate(forgetting={"old": prompts_alone})
    assert "forgetting.old" in str(caught.value)


def test_a_task_without_a_verifier_that_is_known_is_refused_before_a_model_is_loaded(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.evaluate import subjects

    monkeypatch.setattr(subjects, "load", lambda settings: pytest.fail("a model was loaded"))
    row = {"prompt": "What is 1 + 1?", "reference": "2", "task": "oracle"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match="no verifier is called 'oracle'") as caught:
        evaluate(tasks={"odd": {"path": str(tmp_path / "odd.jsonl")}})
    assert "tasks.odd, prompt 1" in str(caught.value)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running_server() as running:
        running.always = lambda body: Reply(body=completion(_served_answer(body["messages"][-1]["content"])))
        yield running


def _served_answer(question: str) -> str:
    found = re.search(r"(\d+) \+ 1", question)
    return f"<think>\nOne more than that is counted on.\n</think>\n\n{int(found[1]) + 1 if found else 0}"


@pytest.fixture
def served(models: dict[str, Settings], server: ScriptedServer) -> OpenAIModel:
    """A server that is right, declared as the model `oracle`."""
    model = OpenAIModel(
        engine="openai",
        base_url=server.base_url,
        model="oracle",
        max_retries=0,
        price={"input": 1.0, "output": 1.0},  # type: ignore[arg-type]
    )
    models["oracle"] = model
    return model


SERVED = {"base": "base", "oracle": "oracle"}


def test_a_served_model_stands_beside_one_that_is_loaded(
    evaluate: Evaluate, served: OpenAIModel, server: ScriptedServer
) -> None:
    context, result = evaluate(models=SERVED, baseline="base", max_new_tokens=7, temperature=0.5, top_p=0.9)
    oracle = result.metrics["models"]["oracle"]
    assert oracle["tasks"]["sums"]["verdicts"]["correct"]["value"] == 1.0
    assert oracle["tasks"]["sums"]["verdicts"]["well_formed"]["value"] == 1.0
    assert oracle["tasks"]["sums"]["seconds_per_response"] > 0
    assert result.metrics["differences"]["oracle"]["tasks"]["sums"]["verdicts"]["correct"]["value"] > 0
    assert list(oracle["held_out"]) == ["kl_refused"]
    assert "no KL and no perplexity: the openai engine" in oracle["held_out"]["kl_refused"]
    assert any("oracle: no KL and no perplexity" in line for line in context.reporter.said)  # type: ignore[attr-defined]
    asked = [body for body in server.requests if body["model"] == "oracle"]
    assert {(body["max_tokens"], body["temperature"], body["top_p"]) for body in asked} == {(7, 0.5, 0.9)}
    assert len(asked) == 5 + 2, "each prompt of the task once, and the two that are shown"
    rows = [row for row in _rows(context.folder / "scores.parquet") if row["model"] == "oracle"]
    assert [json.loads(row["prompt"])[-1]["content"] for row in rows] == [
        one["question"] for one in QUESTIONS
    ]


def test_a_served_models_answers_are_bought_once(
    evaluate: Evaluate, served: OpenAIModel, server: ScriptedServer
) -> None:
    _, first = evaluate("one", models=SERVED, baseline="base")
    bought = len(server.requests)
    _, second = evaluate("two", models=SERVED, baseline="base")
    assert len(server.requests) == bought
    one, two = (found.metrics["models"]["oracle"]["tasks"]["sums"] for found in (first, second))
    assert one.pop("seconds_per_response") > 0
    assert one == two, "known answers, whose time nobody took"


def test_a_served_model_has_no_choice_by_likelihood(
    evaluate: Evaluate, served: OpenAIModel, quiz: dict[str, str]
) -> None:
    tasks = {"quiz": {"data": quiz, "choose_by": "letter"}}
    context, result = evaluate(models=SERVED, baseline="base", tasks=tasks)
    assert "tasks" not in result.metrics["models"]["oracle"]
    refusal = "no choice by letter: the openai engine gives no probabilities of a given text"
    assert result.metrics["models"]["oracle"]["not_measured"] == {"quiz": refusal}
    assert any(f"oracle, quiz: {refusal}" in line for line in context.reporter.said)  # type: ignore[attr-defined]
    assert "quiz" in result.metrics["models"]["base"]["tasks"]


def test_answers_that_a_server_refuses_stop_the_evaluation_or_count_as_wrong(
    evaluate: Evaluate, served: OpenAIModel, server: ScriptedServer
) -> None:
    def sometimes(body: Any) -> Reply:
        question = body["messages"][-1]["content"]
        return Reply(400, error("not this one")) if "3 + 1" in question else right(body)

    right, server.always = server.always, sometimes
    options = {"models": SERVED, "baseline": "base", "data": None, "teacher": None}
    with pytest.raises(EngineError, match="1 of 5 requests failed"):
        evaluate(**options)
    context, result = evaluate("other", max_failed_share=0.2, **options)
    figures = result.metrics["models"]["oracle"]["tasks"]["sums"]
    assert figures["verdicts"]["correct"]["value"] == 0.8
    assert figures["finish_reasons"] == {"failed": 1, "stop": 4}
    (failures,) = context.folder.glob("failures-oracle-*.jsonl")
    assert "not this one" in failures.read_text(encoding="utf-8")


def test_a_served_model_is_kept_within_its_budget(
    evaluate: Evaluate, served: OpenAIModel, models: dict[str, Settings], server: ScriptedServer
) -> None:
    with pytest.raises(BudgetError, match="the budget is used up"):
        evaluate(models=SERVED, baseline="base", max_cost=1.5e-5)
    assert len(server.requests) < 5
    models["oracle"] = served.model_copy(update={"price": None})
    with pytest.raises(BudgetError, match="max_cost bounds what answers cost"):
        evaluate("unpriced", models=SERVED, baseline="base", max_cost=1.0)


def test_vllm_answers_the_same_prompts_in_a_process_that_ends_with_the_evaluation(
    evaluate: Evaluate, models: dict[str, Settings], tmp_path: Path, stub_python: str
) -> None:
    family = tmp_path / "family"
    os.mkfifo(family)
    alive = os.open(family, os.O_RDONLY | os.O_NONBLOCK)  # at its end when no process of vLLM's is left
    arguments = {"conduct": "answers", "vocabulary": PADDED_VOCABULARY, "together": 1, "family": str(family)}
    models["oracle"] = VllmModel(
        engine="vllm", path=str(tmp_path / "big"), python=stub_python, engine_arguments=arguments
    )
    context, result = evaluate(models=SERVED, baseline="base", max_new_tokens=400)
    renderer = Renderer(load_tokenizer(TransformersModel(path=str(tmp_path / "big"))))
    likeliest = len(renderer.tokenizer) - 1
    rows = [row for row in _rows(context.folder / "scores.parquet") if row["model"] == "oracle"]
    for row, question in zip(rows, QUESTIONS, strict=True):
        prompt_ids = renderer.prompt_ids([{"role": "user", "content": question["question"]}])
        assert row["response"] == renderer.tokenizer.decode([likeliest, *reversed(prompt_ids)])
        assert (row["finish_reason"], row["response_tokens"]) == ("stop", len(prompt_ids) + 2)
    found = result.metrics["models"]["oracle"]
    assert "no KL and no perplexity: the vllm engine" in found["held_out"]["kl_refused"]
    assert found["tasks"]["sums"]["seconds_per_response"] > 0
    assert "correct" in result.metrics["differences"]["oracle"]["tasks"]["sums"]["verdicts"]
    assert select.select([alive], [], [], 20)[0]
    assert os.read(alive, 1) == b""
    os.close(alive)


def test_llama_cpp_answers_the_same_prompts(
    evaluate: Evaluate,
    models: dict[str, Settings],
    tmp_path: Path,
    build_tiny_model: Any,
    tiny_tokenizer: Any,
) -> None:
    path = tmp_path / "tiny.gguf"
    to_gguf(path, build_tiny_model("llama", seed=1), tiny_tokenizer, pre="gpt-2")
    models["embedded"] = LlamaCppModel(
        engine="llama_cpp", model=str(path), context_tokens=256, slots=1, threads=1
    )
    context, _ = evaluate(
        models={"student": "student", "embedded": "embedded"}, baseline="student", data=None, teacher=None
    )
    rows = _rows(context.folder / "scores.parquet")
    ours, theirs = ([row for row in rows if row["model"] == role] for role in ("student", "embedded"))
    assert [row["prompt_tokens"] for row in ours] == [row["prompt_tokens"] for row in theirs]
    assert [row["response"] for row in ours] == [row["response"] for row in theirs], "the same weights"


def test_an_interrupted_choice_is_not_scored_again(
    evaluate: Evaluate, quiz: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.evaluate import step

    options = {"tasks": {"quiz": {"data": quiz, "choose_by": "text"}}, "data": None, "teacher": None}
    score, scored = step.score_choices, []

    def broken_off(model: Any, *args: Any, **given: Any) -> Any:
        if len(scored) == 2:
            raise Interrupted
        scored.append(model.identity)
        return score(model, *args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(step, "score_choices", broken_off)
        with pytest.raises(Interrupted):
            evaluate("broken", **options)
    again: list[str] = []

    def watched(model: Any, *args: Any, **given: Any) -> Any:
        again.append(model.identity)
        return score(model, *args, **given)

    monkeypatch.setattr(step, "score_choices", watched)
    resumed, _ = evaluate("broken", **options)
    assert len(again) == 1
    assert again[0] not in scored
    monkeypatch.undo()
    whole, _ = evaluate("whole", **options)
    assert (resumed.folder / "scores.parquet").read_bytes() == (whole.folder / "scores.parquet").read_bytes()


def test_a_prompt_that_a_models_context_does_not_hold_is_named(evaluate: Evaluate, tmp_path: Path) -> None:
    rows = [QUIZ[0], {**QUIZ[1], "question": "word " * 600}]
    path = write_rows(tmp_path / "long.jsonl", rows)
    task = {"data": {"path": str(path)}, "choose_by": "letter"}
    with pytest.raises(DataError, match="the context holds 512") as caught:
        evaluate(tasks={"long": task}, data=None, teacher=None)
    assert caught.value.where == "base, long, row 2"


def test_right_answers_are_given_by_a_column_of_the_rows(evaluate: Evaluate, tmp_path: Path) -> None:
    rows = [{**one, "category": "even" if n % 2 == 0 else "odd"} for n, one in enumerate(QUESTIONS)]
    path = write_rows(tmp_path / "labelled.jsonl", rows)
    _, result = evaluate(tasks={"sums": {"path": str(path)}}, by="category")
    groups = result.metrics["models"]["student"]["tasks"]["sums"]["groups"]
    assert {value: one["prompts"] for value, one in groups.items()} == {"even": 3, "odd": 2}
    assert set(result.metrics["differences"]["student"]["tasks"]["sums"]["groups"]) == {"even", "odd"}


@pytest.mark.parametrize(
    ("rows", "then"),
    [
        ([*QUESTIONS[:2], {"question": "Why is the sky blue?"}], "right answers are counted on the others"),
        ([{"question": "Why?"}], "right answers cannot be counted"),
    ],
)
def test_questions_without_an_answer_that_can_be_checked_are_told(
    evaluate: Evaluate, tmp_path: Path, rows: list[dict[str, str]], then: str
) -> None:
    path = write_rows(tmp_path / "some.jsonl", rows)
    context, result = evaluate(tasks={"mine": {"path": str(path)}}, data=None, teacher=None, samples_shown=0)
    said = [line for line in context.reporter.said if line.startswith("mine: ")]  # type: ignore[attr-defined]
    assert said[0] == f"mine: 1 of {len(rows)} questions have no answer that can be checked; {then}"
    assert result.metrics["tasks"]["mine"]["unchecked"] == 1
    assert ("correct" in result.metrics["models"]["student"]["tasks"]["mine"]["verdicts"]) is (len(rows) > 1)


def test_a_column_that_no_row_has_is_refused_with_those_that_there_are(evaluate: Evaluate) -> None:
    with pytest.raises(DataError, match="no prompt has the column 'topic'") as caught:
        evaluate(by="topic")
    assert "the rows of the tasks have none" in str(caught.value)


def test_adapters_and_their_base_are_measured_on_weights_that_are_read_once(
    evaluate: Evaluate, models: dict[str, Settings], adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = adapter(name="one"), adapter(name="two", seed=2)
    base = TransformersModel(path=str(Path(one.path).parent / "base"), device="cpu")
    models |= {"plain": base, "one": one, "two": two}
    read: list[str] = []
    models_read: list[Any] = []
    still_there: list[bool] = []
    read_weights = loading.read_weights

    def reading(name: str, **options: Any) -> Any:
        read.append(Path(name).name)
        gc.collect()
        still_there.append(any(each() is not None for each in models_read))
        model = read_weights(name, **options)
        models_read.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "read_weights", reading)
    changes = {"samples_shown": 0, "tasks": {}}
    roles = {"plain": "plain", "one": "one", "two": "two"}
    _, together = evaluate("together", models=roles, baseline="plain", teacher="two", **changes)
    assert read == ["base"]
    for name in ("one", "two"):
        _, alone = evaluate(f"alone-{name}", models={name: name}, baseline=name, teacher=None, **changes)
        found, expected = (
            result.metrics["models"][name]["held_out"]["perplexity"] for result in (together, alone)
        )
        assert found == expected
    kl = {
        name: one["held_out"]["kl_nats_per_token"]["value"]
        for name, one in together.metrics["models"].items()
        if name != "two"
    }
    assert all(value > 0.001 for value in kl.values()), kl
    read.clear()
    still_there.clear()
    roles = {"one": "one", "student": "student", "two": "two"}
    evaluate("apart", models=roles, baseline="one", teacher=None, **changes)
    assert read == ["base", "student", "base"]
    assert not any(still_there), "what the next model does not need is still in memory"
