"""The scorers that an evaluate step's settings ask for, reached through the step."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from potstill.core.errors import BudgetError, DataError, EngineError, ModelError
from potstill.core.settings import Settings
from potstill.core.step import StepContext, StepResult
from potstill.evaluate import EvaluateSettings, run
from potstill.evaluate.rating import rate
from potstill.models import TransformersModel
from potstill.teachers import Answer, OpenAIModel

from ...rows import write_rows
from ...servers import Reply, ScriptedServer, completion, error, running_server

ROWS = [
    {"prompt": f"Give {number} as JSON.", "reference": {"n": number}, "response": f"It is {number}."}
    for number in range(4)
]
Evaluate = Callable[..., tuple[StepContext, StepResult]]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A server of three models: base is right on even numbers, student on all; judge takes the longer one."""

    def answer(body: dict[str, Any]) -> Reply:
        asked = body["messages"][-1]["content"]
        if body["model"] == "judge":
            first, _, second = asked.partition("answer A\n")[2].partition("answer B\n")
            first, second = first.partition("---")[0], second.partition("---")[0]
            return Reply(body=completion(f"Verdict: {'A' if len(first) > len(second) else 'B'}"))
        number = int(asked.split()[1])
        shown = number if body["model"] == "student" or number % 2 == 0 else 99
        text = f'```json\n{{"n": {shown}}}\n```' if body["model"] == "student" else f'{{"n": {shown}}}'
        return Reply(body=completion(text))

    with running_server() as running:
        running.always = answer
        yield running


@pytest.fixture
def evaluate(step_context: Callable[..., StepContext], server: ScriptedServer, tmp_path: Path) -> Evaluate:
    """`evaluate(folder, models=…, **settings)` of served models on the rows above."""
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)

    def start(
        folder: str = "artifact", *, models: dict[str, Settings] | None = None, **settings: Any
    ) -> tuple[StepContext, StepResult]:
        task = {"data": {"path": str(path)}, "verifier": {"fields": "all"}, **settings.pop("task", {})}
        served = {
            name: OpenAIModel(engine="openai", base_url=server.base_url, model=name, max_retries=0)
            for name in ("base", "student", "judge")
        }
        read = EvaluateSettings.model_validate(
            {
                "do": "evaluate",
                "models": settings.pop("listed", ["base", "student"]),
                "tasks": {"json": task},
                **settings,
            }
        )
        context = step_context("evaluate", folder=folder, models={**served, **(models or {})})
        return context, run(read, context)

    return start


def rows_of(context: StepContext, name: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(context.folder / name).to_pylist()
    return found


class TestVerifier:
    def test_a_task_has_a_verifier_of_its_own(self, evaluate: Evaluate) -> None:
        context, result = evaluate()
        models = result.metrics["models"]
        assert models["base"]["tasks"]["json"]["verdicts"]["correct"]["value"] == 0.5
        assert models["student"]["tasks"]["json"]["verdicts"]["correct"]["value"] == 1
        assert models["base"]["tasks"]["json"]["scores"]["fields"]["value"] == 0.5
        gap = result.metrics["differences"]["student"]["tasks"]["json"]["verdicts"]["correct"]
        assert gap["value"] == 0.5
        notes = [row["note"] for row in rows_of(context, "scores.parquet") if row["model"] == "base"]
        assert notes == [None, "wrong: n", None, "wrong: n"]

    def test_the_users_function_judges_and_its_failures_are_counted(
        self, evaluate: Evaluate, tmp_path: Path
    ) -> None:
        (tmp_path / "mine.py").write_text(
            "def right(answer, row):\n    return 1 / ('99' not in answer) == 1\n", encoding="utf-8"
        )
        context, result = evaluate(task={"verifier": {"function": f"{tmp_path}/mine.py:right"}})
        verdicts = result.metrics["models"]["base"]["tasks"]["json"]["verdicts"]
        assert verdicts["correct"]["value"] == verdicts["judged"]["value"] == 0.5
        notes = [row["note"] for row in rows_of(context, "scores.parquet") if row["model"] == "base"]
        assert notes[1] == "ZeroDivisionError: division by zero"
        said = "base: 2 of 4 answers to json could not be judged and count as wrong, the first: ZeroDivision"
        assert any(line.startswith(said) for line in context.reporter.said)

    def test_a_function_that_cannot_be_loaded_is_told_before_anything_is_asked(
        self, evaluate: Evaluate, server: ScriptedServer, tmp_path: Path
    ) -> None:
        (tmp_path / "mine.py").write_text("import nowhere\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"tasks\.json, prompt 1.*cannot be imported"):
            evaluate(task={"verifier": {"function": f"{tmp_path}/mine.py:right"}})
        assert server.requests == []

    def test_code_is_run_where_it_is_allowed_and_refused_before_anything_is_asked_where_not(
        self, evaluate: Evaluate, server: ScriptedServer, tmp_path: Path
    ) -> None:
        row = {"text": "Add 2 and 3 as add().", "test_list": ["assert add(2, 3) == 5"]}
        (tmp_path / "code.jsonl").write_text(json.dumps(row), encoding="utf-8")
        data = {"data": {"path": str(tmp_path / "code.jsonl")}}
        with pytest.raises(DataError, match=r"(?s)not run unless the recipe says so.*to mend"):
            evaluate(tasks={"code": data})
        assert server.requests == []
        server.always = lambda body: Reply(
            body=completion(f"```python\ndef add(a, b):\n    return a {'+-'[body['model'] == 'base']} b\n```")
        )
        context, result = evaluate(tasks={"code": {**data, "verifier": {"allow_code": True}}})
        assert any("what shuts them in: limits" in line for line in context.reporter.said)
        shares = [
            result.metrics["models"][name]["tasks"]["code"]["verdicts"]["correct"]["value"]
            for name in ("base", "student")
        ]
        assert shares == [0, 1]

    def test_options_that_are_scored_have_no_verifier(self, evaluate: Evaluate) -> None:
        with pytest.raises(ValidationError, match="verifier is for answers that are written"):
            evaluate(task={"choose_by": "letter"})


class TestJudge:
    def test_it_compares_each_model_with_the_baseline_in_both_orders(
        self, evaluate: Evaluate, server: ScriptedServer
    ) -> None:
        context, result = evaluate(judge={"model": "judge", "rubric": "The longer one."})
        asked = [body for body in server.requests if body["model"] == "judge"]
        assert len(asked) == 8
        assert all("The longer one." in body["messages"][0]["content"] for body in asked)
        assert all(body["temperature"] == 0 for body in asked)
        figures = result.metrics["models"]["student"]["tasks"]["json"]["judge"]
        assert figures["win_rate"]["value"] == 1
        assert figures["order_agreement"]["value"] == 1
        assert result.metrics["differences"]["student"]["tasks"]["json"]["judge"]["win_rate"]["value"] == 0.5
        assert result.metrics["judge"]["rubric"] == "The longer one."
        assert (result.metrics["judge"]["asked"], result.metrics["judge"]["unread"]) == (8, 0)
        rows = rows_of(context, "judged.parquet")
        assert [row["choice"] for row in rows] == ["model"] * 8
        assert "judge" not in result.metrics["models"]["base"]["tasks"]["json"]

    def test_its_verdicts_are_bought_once(self, evaluate: Evaluate, server: ScriptedServer) -> None:
        evaluate(judge={"model": "judge"})
        count = len(server.requests)
        evaluate("again", judge={"model": "judge"})
        assert len(server.requests) == count

    def test_one_answer_of_two_models_is_judged_once(
        self, evaluate: Evaluate, server: ScriptedServer
    ) -> None:
        twin = OpenAIModel(engine="openai", base_url=server.base_url, model="student", identity="twin")
        listed = {"base": "base", "student": "student", "twin": "twin"}
        _, result = evaluate(models={"twin": twin}, judge={"model": "judge"}, listed=listed)
        assert sum(body["model"] == "judge" for body in server.requests) == 8
        for name in ("student", "twin"):
            assert result.metrics["models"][name]["tasks"]["json"]["judge"]["win_rate"]["value"] == 1

    def test_a_limit_and_a_list_of_tasks_bound_what_is_asked(
        self, evaluate: Evaluate, server: ScriptedServer
    ) -> None:
        evaluate(judge={"model": "judge", "limit": 1, "tasks": ["json"]})
        assert sum(body["model"] == "judge" for body in server.requests) == 2
        with pytest.raises(ValidationError, match="'sums' is no task"):
            evaluate(judge={"model": "judge", "tasks": ["sums"]})

    def test_what_it_says_may_be_unreadable_and_is_counted(
        self, evaluate: Evaluate, server: ScriptedServer
    ) -> None:
        usual = server.always
        server.always = lambda body: (
            Reply(body=completion("Hm.")) if body["model"] == "judge" else usual(body)
        )
        context, result = evaluate(judge={"model": "judge"})
        assert result.metrics["judge"]["unread"] == 8
        assert "win_rate" not in result.metrics["models"]["student"]["tasks"]["json"]["judge"]
        assert any("8 of 8 verdicts could not be read" in said for said in context.reporter.said)

    def test_failing_requests_are_bounded_as_everywhere(
        self, evaluate: Evaluate, server: ScriptedServer
    ) -> None:
        usual = server.always
        server.always = lambda body: Reply(400, error("no")) if body["model"] == "judge" else usual(body)
        with pytest.raises(EngineError, match="8 of 8 requests failed"):
            evaluate(judge={"model": "judge"})

    def test_a_model_under_evaluation_that_is_the_judge_too_has_its_failures_in_two_files(
        self, evaluate: Evaluate, server: ScriptedServer
    ) -> None:
        usual = server.always

        def answer(body: dict[str, Any]) -> Reply:
            asked = body["messages"][-1]["content"]
            if "Verdict" in asked:
                unjudged = "Give 1 " in asked
                return Reply(400, error("no verdict")) if unjudged else Reply(body=completion("Verdict: A"))
            unanswered = body["model"] == "student" and "Give 3 " in asked
            return Reply(400, error("no answer")) if unanswered else usual(body)

        server.always = answer
        context, _ = evaluate(judge={"model": "student"}, max_failed_share=0.5)
        found = {
            path.name: {json.loads(line)["reason"] for line in path.read_text(encoding="utf-8").splitlines()}
            for path in context.folder.glob("*failures*.jsonl")
        }
        assert found == {
            "failures-student-1.jsonl": {"HTTP 400: no answer"},
            "judge-failures-1.jsonl": {"HTTP 400: no verdict"},
        }

    def test_its_cost_is_bounded_before_anything_is_asked(
        self, evaluate: Evaluate, server: ScriptedServer
    ) -> None:
        priced = {"input": 1.0, "output": 1.0}
        models = {
            name: OpenAIModel.model_validate(
                {"engine": "openai", "base_url": server.base_url, "model": name, "price": priced}
            )
            for name in ("base", "student")
        }
        with pytest.raises(BudgetError, match="price is unknown"):
            evaluate(models=models, judge={"model": "judge"}, max_cost=1.0)
        assert server.requests == []

    def test_its_missing_key_is_told_before_anything_is_asked(
        self, evaluate: Evaluate, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        keyed = OpenAIModel(engine="openai", base_url=server.base_url, model="judge", api_key_env="JUDGE_KEY")
        with pytest.raises(EngineError, match="JUDGE_KEY is not set"):
            evaluate(models={"judge": keyed}, judge={"model": "judge"})
        assert server.requests == []

    def test_a_local_model_may_judge(
        self, evaluate: Evaluate, tmp_path: Path, build_tiny_model: Callable[..., Any], tiny_tokenizer: Any
    ) -> None:
        build_tiny_model("llama").save_pretrained(tmp_path / "tiny")
        tiny_tokenizer.save_pretrained(tmp_path / "tiny")
        tiny = TransformersModel(path=str(tmp_path / "tiny"), device="cpu")
        settings = {"model": "tiny", "limit": 1, "max_new_tokens": 3, "rubric": "Be kind."}
        # The tiny model's context is 512 tokens, and its tokenizer makes many of a prompt.
        with pytest.raises(DataError, match="2 of 2 comparisons are longer than the judge's context"):
            evaluate(models={"tiny": tiny}, judge={**settings, "rubric": "long " * 600})
        _, result = evaluate(
            "allowed",
            models={"tiny": tiny},
            judge={**settings, "rubric": "long " * 600},
            max_failed_share=1.0,
        )
        assert result.metrics["models"]["student"]["tasks"]["json"]["judge"]["failed_requests"] == 2
        build_tiny_model("llama", max_position_embeddings=4096).save_pretrained(tmp_path / "tiny")
        _, result = evaluate("local", models={"tiny": tiny}, judge=settings)
        assert result.metrics["judge"]["verdicts"] == 2

    def test_what_a_local_judge_thinks_in_an_open_block_is_no_verdict(
        self,
        evaluate: Evaluate,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        build_tiny_model: Callable[..., Any],
        tiny_tokenizer: Any,
    ) -> None:
        build_tiny_model("llama", max_position_embeddings=4096).save_pretrained(tmp_path / "tiny")
        tiny_tokenizer.save_pretrained(tmp_path / "tiny")
        template = tmp_path / "tiny" / "chat_template.jinja"
        text = template.read_text(encoding="utf-8")
        opened = text.replace("assistant\\n'", "assistant\\n<think>\\n'").replace(
            "assistant\n'", "assistant\n<think>\n'"
        )
        assert opened != text
        template.write_text(opened, encoding="utf-8")
        written = Answer(response="Verdict: A would be my first guess, but", finish_reason="length")
        monkeypatch.setattr(
            "potstill.evaluate.subjects.generate_batch",
            lambda model, renderer, ids, **_: [written] * len(ids),
        )
        tiny = TransformersModel(path=str(tmp_path / "tiny"), device="cpu")
        _, result = evaluate(models={"tiny": tiny}, judge={"model": "tiny", "limit": 1})
        assert result.metrics["judge"]["unread"] == result.metrics["judge"]["asked"] == 2

    def test_a_rubric_may_be_a_file_whose_content_counts(self, evaluate: Evaluate, tmp_path: Path) -> None:
        from potstill.core.settings import meaning
        from potstill.evaluate.scorer_settings import JudgeSettings

        rubric = tmp_path / "rubric.md"
        rubric.write_text("Kindness first.\n", encoding="utf-8")
        _, result = evaluate(judge={"model": "judge", "rubric": str(rubric)})
        assert result.metrics["judge"]["rubric"] == "Kindness first."
        inline = JudgeSettings.model_validate({"model": "judge", "rubric": "Kindness first."})
        file = JudgeSettings.model_validate({"model": "judge", "rubric": str(rubric)})
        assert meaning(inline) == meaning(file)
        with pytest.raises(DataError, match="rubric cannot be read"):
            meaning(JudgeSettings.model_validate({"model": "judge", "rubric": "gone.md"}))

    @pytest.mark.parametrize("scorer", [{"judge": {"model": "judge"}}, {"rating_sheet": 3}])
    def test_a_comparison_needs_two_models(self, scorer: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match="it needs two models"):
            EvaluateSettings.model_validate(
                {"do": "evaluate", "models": ["base"], "tasks": {"json": {"path": "x.jsonl"}}, **scorer}
            )


def test_a_rating_sheet_is_written_and_read_back(evaluate: Evaluate, tmp_path: Path) -> None:
    context, result = evaluate(rating_sheet=3)
    assert result.counts["rating_items"] == 3
    rows = list(
        csv.reader(io.StringIO((context.folder / "rating_sheet.csv").read_text("utf-8-sig"), newline=""))
    )
    for row in rows[1:]:
        row[3], row[5] = ("5", "1") if "json" in row[2] else ("1", "5")
    with (tmp_path / "mine.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    [found] = rate(context.folder, [tmp_path / "mine.csv"])
    assert (found.task, found.preferred["student"].value) == ("json", 1)


class TestBertScore:
    def test_answers_are_compared_with_the_given_responses(
        self, evaluate: Evaluate, tmp_path: Path, build_tiny_model: Callable[..., Any], tiny_tokenizer: Any
    ) -> None:
        build_tiny_model("llama").save_pretrained(tmp_path / "tiny")
        tiny_tokenizer.save_pretrained(tmp_path / "tiny")
        tiny = TransformersModel(path=str(tmp_path / "tiny"), device="cpu")
        context, result = evaluate(models={"tiny": tiny}, bertscore={"model": "tiny", "layer": 1})
        for name in ("base", "student"):
            figure = result.metrics["models"][name]["tasks"]["json"]["scores"]["bertscore_f1"]
            assert 0 <= figure["low"] < figure["value"] < figure["high"] <= 1
        assert "bertscore_f1" in result.metrics["differences"]["student"]["tasks"]["json"]["scores"]
        scores = [json.loads(row["scores"]) for row in rows_of(context, "scores.parquet")]
        assert all({"bertscore_precision", "bertscore_recall", "bertscore_f1"} <= set(one) for one in scores)
        assert not any("rouge1" in one for one in scores)

    def test_a_served_model_cannot_be_its_model(self, evaluate: Evaluate) -> None:
        with pytest.raises(ModelError, match="judge is a model of engine openai"):
            evaluate(bertscore={"model": "judge"})

    def test_it_needs_responses_to_compare_with(self, evaluate: Evaluate, tmp_path: Path) -> None:
        (tmp_path / "bare.jsonl").write_text('{"prompt": "Give 1"}', encoding="utf-8")
        tiny = TransformersModel(path="HuggingFaceTB/none")
        with pytest.raises(DataError, match="no task have responses"):
            evaluate(
                models={"tiny": tiny},
                tasks={"bare": {"path": str(tmp_path / "bare.jsonl")}},
                bertscore={"model": "tiny"},
            )


class TestBenchmarks:
    def test_without_lm_eval_the_step_says_what_to_install_before_anything_is_asked(
        self, evaluate: Evaluate, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from potstill.evaluate import harness

        monkeypatch.setattr(harness, "harness_version", lambda: None)
        with pytest.raises(DataError, match=r'pip install "potstill\[lm-eval\]"'):
            evaluate(lm_eval={"tasks": ["arc_easy"]})
        assert server.requests == []

    def test_figures_stand_beside_those_of_other_tasks_with_paired_differences(
        self,
        evaluate: Evaluate,
        tmp_path: Path,
        build_tiny_model: Callable[..., Any],
        tiny_tokenizer: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from potstill.evaluate import harness, scorers
        from potstill.evaluate.harness import HarnessRows

        models: dict[str, Settings] = {}
        for seed, name in enumerate(("base", "student")):
            build_tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
            tiny_tokenizer.save_pretrained(tmp_path / name)
            models[name] = TransformersModel(path=str(tmp_path / name), device="cpu")
        runs: list[str] = []

        def counted(model: Any, *_: Any, **__: Any) -> dict[str, HarnessRows]:
            runs.append(model.identity)
            right = float(len(runs) > 1)
            figures = {"acc": {"value": right, "low": right, "high": right}}
            return {"arc_easy": HarnessRows(2, figures, {"acc": [right, right]}, {"acc": True})}

        monkeypatch.setattr(harness, "harness_version", lambda: "0")
        monkeypatch.setattr(scorers, "run_harness", counted)
        settings = {"lm_eval": {"tasks": ["arc_easy"]}, "max_new_tokens": 3}
        _, result = evaluate(models=models, **settings)
        found = result.metrics["models"]["student"]["tasks"]["lm_eval:arc_easy"]
        assert (found["prompts"], found["benchmark"]["acc"]["value"]) == (2, 1.0)
        gap = result.metrics["differences"]["student"]["tasks"]["lm_eval:arc_easy"]["benchmark"]["acc"]
        assert gap["value"] == 1
        assert len(runs) == 2
        evaluate(models=models, **settings)
        assert len(runs) == 2, "finished parts outlive an interruption"

    def test_a_served_model_has_none_and_it_is_said(
        self, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from potstill.evaluate import harness

        monkeypatch.setattr(harness, "harness_version", lambda: "0")
        context, result = evaluate(lm_eval={"tasks": ["arc_easy"]})
        assert any("base: no lm_eval" in said for said in context.reporter.said)
        assert "lm_eval:arc_easy" not in result.metrics["models"]["base"]["tasks"]
