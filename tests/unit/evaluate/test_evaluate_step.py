import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import DataError, Interrupted, ModelError
from potstill.core.records import RECORDS_FILE, Record, write_records
from potstill.core.settings import Settings
from potstill.core.step import StepContext, StepResult
from potstill.core.store import Artifact
from potstill.evaluate import EvaluateSettings, run
from potstill.models import TransformersModel

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
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
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
        assert set(json.loads(row["verdicts"])) == {"correct", "well_formed"}
        assert row["finish_reason"] in ("stop", "length")
        assert 1 <= row["response_tokens"] <= 6


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
        student["tasks"]["sums"]["mean_response_tokens"],
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
    from potstill.evaluate import step

    loads: list[str] = []
    load = step.load
    monkeypatch.setattr(step, "load", lambda settings: loads.append(settings.path) or load(settings))

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


def test_a_model_of_another_engine_is_refused_by_name(
    evaluate: Evaluate, models: dict[str, Settings]
) -> None:
    class Served(Settings):
        engine: str = "openai"

    models["big"] = Served()
    with pytest.raises(ModelError, match="big is a model of engine openai"):
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
        assert list(scores) == ["rouge1", "rouge2", "rougeL"]
        for figure in scores.values():
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    assert metrics["models"]["base"]["tasks"]["sums"]["scores"] == {}, "its rows have no responses"
    gaps = metrics["differences"]["student"]["tasks"]["held"]["scores"]
    base, student = (metrics["models"][role]["tasks"]["held"]["scores"] for role in ("base", "student"))
    for name, gap in gaps.items():
        assert gap["value"] == pytest.approx(student[name]["value"] - base[name]["value"])
    rows = [row for row in _rows(context.folder / "scores.parquet") if row["task"] == "held"]
    assert all(set(json.loads(row["scores"])) == {"rouge1", "rouge2", "rougeL"} for row in rows)


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
    path = tmp_path / "given.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    context, _ = evaluate(tasks={"given": {"path": str(path)}}, rouge=True)
    found = [json.loads(row["scores"]) for row in _rows(context.folder / "scores.parquet")]
    assert [bool(scores) for scores in found[:2]] == [False, True]
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
