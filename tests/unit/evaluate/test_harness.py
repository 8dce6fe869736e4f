"""lm-eval's own figures under our tables: a task of local rows on a tiny model, and what its absence says."""

import copy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import DataError, Interrupted
from potstill.core.settings import meaning
from potstill.evaluate import harness
from potstill.evaluate.harness import HarnessRows, check_harness, harness_differences, run_harness
from potstill.evaluate.intervals import paired_share_difference, wilson_interval
from potstill.evaluate.scorer_settings import HarnessSettings, harness_version
from potstill.models import LoadedModel

from ...rows import write_rows

needs_lm_eval = pytest.mark.skipif(harness_version() is None, reason="lm-eval is not installed")

# What lm-eval gives for two questions, as its version 0.4.13 does.
RESULTS: dict[str, Any] = {
    "results": {
        "sums": {
            "alias": "sums",
            "acc,none": 0.5,
            "acc_stderr,none": 0.25,
            "exact_match,strict-match": 0.0,
            "exact_match_stderr,strict-match": "N/A",
            "word_perplexity,none": 20.0,
            "word_perplexity_stderr,none": 1.0,
        }
    },
    "higher_is_better": {"sums": {"acc": True, "exact_match": True, "word_perplexity": False}},
    "n-samples": {"sums": {"original": 9, "effective": 2}},
    "group_subtasks": {"sums": []},
    "samples": {
        "sums": [
            {"doc_id": 0, "filter": "none", "acc": 1.0, "word_perplexity": (1.0, 2)},
            {"doc_id": 1, "filter": "none", "acc": 0.0, "word_perplexity": (1.0, 2)},
            {"doc_id": 0, "filter": "strict-match", "exact_match": 0.0},
            {"doc_id": 1, "filter": "strict-match", "exact_match": 0.0},
        ]
    },
}


def test_right_and_wrong_questions_have_wilsons_interval_and_others_the_librarys_error() -> None:
    rows = harness._rows("sums", RESULTS, seed=0)
    assert rows.count == 2
    assert rows.figures["acc"] == wilson_interval(1, 2).as_dict()
    assert rows.figures["exact_match (strict-match)"] == wilson_interval(0, 2).as_dict()
    assert rows.figures["word_perplexity"] == {
        "value": 20.0,
        "low": pytest.approx(20 - 1.96, abs=1e-4),
        "high": pytest.approx(20 + 1.96, abs=1e-4),
    }
    assert rows.higher_is_better["word_perplexity"] is False


def test_only_means_over_questions_are_compared_question_by_question() -> None:
    rows = harness._rows("sums", RESULTS, seed=0)
    assert rows.questions == {"acc": [1.0, 0.0], "exact_match (strict-match)": [0.0, 0.0]}
    other = HarnessRows(2, {}, {"acc": [1.0, 1.0]})
    gaps = harness_differences({"sums": rows}, {"sums": other, "more": other}, seed=0)
    assert list(gaps) == ["sums"]
    assert gaps["sums"]["acc"]["value"] == 0.5


def test_a_benchmark_whose_questions_are_all_alike_is_not_certain() -> None:
    """Two questions right against none, and two that gain as much: neither is an improvement."""

    def gap(first: list[float], second: list[float]) -> dict[str, float]:
        rows = [{"sums": HarnessRows(2, {}, {"f1": one})} for one in (first, second)]
        return harness_differences(*rows, seed=0)["sums"]["f1"]

    shares = gap([0.0, 0.0], [1.0, 1.0])
    assert shares["mcnemar_p"] == 0.5
    assert shares["low"] == paired_share_difference([False] * 2, [True] * 2).low
    scores = gap([0.5, 0.5], [0.6, 0.6])
    assert -1 <= scores["low"] < 0 < scores["high"] <= 1
    assert "low" not in gap([50.0, 50.0], [60.0, 60.0])


def test_scores_of_questions_stay_within_their_bounds() -> None:
    results = copy.deepcopy(RESULTS)
    results["results"]["sums"] |= {"acc,none": 0.9, "acc_stderr,none": 0.2}
    for sample, value in zip(results["samples"]["sums"], (0.8, 1.0), strict=False):
        sample["acc"] = value
    found = harness._rows("sums", results, seed=0).figures["acc"]
    assert 0 <= found["low"] < 0.9 < found["high"] <= 1


def of_group(value: float, error: Any, of_one: list[Any], of_other: list[Any]) -> dict[str, Any]:
    """What lm-eval gives for a group within a group: the figure, and the questions of its two tasks."""
    tasks = {"sums": of_one, "words": of_other}
    return {
        "results": {"all": {"acc,none": value, "acc_stderr,none": error}},
        "n-samples": {task: {"effective": len(values)} for task, values in tasks.items()},
        "group_subtasks": {"all": ["part"], "part": ["sums", "words"], "sums": []},
        "samples": {
            task: [{"doc_id": number, "filter": "none", "acc": one} for number, one in enumerate(values)]
            for task, values in tasks.items()
        },
    }


def test_a_group_is_known_by_the_questions_of_its_tasks() -> None:
    first = harness._rows("all", of_group(0.6, 0.2, [1.0, 0.0], [1.0, 1.0, 0.0]), seed=0)
    second = harness._rows("all", of_group(0.8, 0.2, [1.0, 1.0], [1.0, 1.0, 0.0]), seed=0)
    assert first.count == 5
    assert first.figures["acc"] == wilson_interval(3, 5).as_dict()
    gap = harness_differences({"all": first}, {"all": second}, seed=0)["all"]["acc"]
    assert gap["value"] == pytest.approx(0.2)
    assert gap["mcnemar_p"] == 1.0


@pytest.mark.parametrize("questions", [([1.0, 1.0], [1.0, 0.0, 1.0, 1.0]), ([], [])])
def test_a_share_of_which_no_more_than_an_error_is_known_stays_within_its_bounds(
    questions: tuple[list[Any], list[Any]],
) -> None:
    """A group whose tasks count alike is no mean over its questions."""
    rows = harness._rows("all", of_group(0.875, 0.125, *questions), seed=0)
    assert rows.questions == {}
    found = rows.figures["acc"]
    assert 0.875 + 1.96 * 0.125 > 1
    assert 0 < found["low"] < 0.875 < found["high"] < 1
    # As many answers as have that error: 0.875 * 0.125 / 0.125² = 7.
    seven = wilson_interval(7, 8)
    assert found["high"] == pytest.approx(seven.high, abs=0.01)


@pytest.mark.parametrize(("value", "error"), [(20.0, 1.0), (1.0, 0.0), (0.5, "N/A")])
def test_a_figure_of_another_range_has_the_librarys_error_and_one_without_it_no_interval(
    value: float, error: Any
) -> None:
    found = harness._rows("all", of_group(value, error, [], []), seed=0).figures["acc"]
    if value == 20:
        assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, abs=1e-3)
    else:
        assert found == {"value": value}


def test_its_absence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "harness_version", lambda: None)
    with pytest.raises(DataError, match=r'pip install "potstill\[lm-eval\]"'):
        check_harness()


def test_the_users_own_tasks_count_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: a\n", encoding="utf-8")
    settings = HarnessSettings.model_validate({"tasks": ["a"], "include": str(tmp_path)})
    before = meaning(settings)
    assert meaning(settings) == before
    (tmp_path / "a.yaml").write_text("task: a\nnum_fewshot: 1\n", encoding="utf-8")
    assert meaning(settings) != before
    gone = HarnessSettings.model_validate({"tasks": ["a"], "include": str(tmp_path / "gone")})
    with pytest.raises(DataError, match="no such folder of lm-eval tasks"):
        meaning(gone)


@pytest.fixture
def local_task(tmp_path: Path) -> HarnessSettings:
    """A multiple-choice task whose rows lie in a file beside it, and a group of that and another."""
    rows = [
        {"question": f"{one} + 1 =", "choices": [str(one + 1), str(one)], "label": one % 2}
        for one in range(6)
    ]
    data = tmp_path / "rows.jsonl"
    write_rows(data, rows)
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("local_sums", "local_more"):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            "test_split: test\n"
            "output_type: multiple_choice\n"
            "doc_to_text: '{{question}}'\n"
            "doc_to_choice: '{{choices}}'\n"
            "doc_to_target: label\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
            encoding="utf-8",
        )
    (folder / "local_all.yaml").write_text(
        "group: local_all\n"
        "task: [local_sums, local_more]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n",
        encoding="utf-8",
    )
    return HarnessSettings.model_validate({"tasks": ["local_sums"], "include": str(folder), "limit": 4})


def test_a_stop_is_heeded_within_a_benchmark_which_leaves_the_terminal_alone(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    build_tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
) -> None:
    """In the place of lm-eval its loop: pass after pass through the model, with a bar and git's complaint."""
    passes: list[int] = []

    def evaluated(model: Any, **_: Any) -> None:
        subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('fatal')"], check=True)
        for number in range(100):
            print("bar", file=sys.stderr)
            model(input_ids=torch.tensor([[1, 2]]))
            passes.append(number)

    class Library(types.ModuleType):
        HFLM = staticmethod(lambda pretrained, **_: pretrained)
        TaskManager = staticmethod(lambda **_: None)
        simple_evaluate = staticmethod(evaluated)

    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, Library(name))

    def check_stop() -> None:
        if len(passes) == 3:
            raise Interrupted

    weights = build_tiny_model("llama")
    with pytest.raises(Interrupted):
        run_harness(
            LoadedModel(weights, tiny_tokenizer, "tiny"),
            HarnessSettings(tasks=["sums"]),
            batch=1,
            seed=0,
            check_stop=check_stop,
        )
    assert passes == [0, 1, 2]
    weights(input_ids=torch.tensor([[1, 2]]))
    print("heard again", file=sys.stderr)
    assert capfd.readouterr().err == "heard again\n"


@needs_lm_eval
def test_a_local_task_runs_on_a_loaded_model(
    local_task: HarnessSettings, build_tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = LoadedModel(build_tiny_model("llama"), tiny_tokenizer, "tiny")
    rows = run_harness(model, local_task, batch=2, seed=1)["local_sums"]
    assert rows.count == 4
    assert rows.figures["acc"]["low"] <= rows.figures["acc"]["value"] <= rows.figures["acc"]["high"]
    assert len(rows.questions["acc"]) == 4
    assert run_harness(model, local_task, batch=4, seed=1)["local_sums"] == rows
    group = local_task.model_copy(update={"tasks": ["local_all"]})
    both = run_harness(model, group, batch=4, seed=1)["local_all"]
    assert both.count == 8
    assert both.questions["acc"] == rows.questions["acc"] * 2
    assert both.figures["acc"] == wilson_interval(int(sum(both.questions["acc"])), 8).as_dict()


@needs_lm_eval
def test_a_stop_leaves_a_local_task_unfinished(
    local_task: HarnessSettings, build_tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    passes: list[int] = []

    def check_stop() -> None:
        passes.append(len(passes))
        if len(passes) == 2:
            raise Interrupted

    model = LoadedModel(build_tiny_model("llama"), tiny_tokenizer, "tiny")
    with pytest.raises(Interrupted):
        run_harness(model, local_task, batch=1, seed=1, check_stop=check_stop)
    assert len(passes) == 2


@needs_lm_eval
def test_an_unknown_task_is_told(build_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = LoadedModel(build_tiny_model("llama"), tiny_tokenizer, "tiny")
    with pytest.raises(DataError, match="lm-eval could not carry out no_such_task"):
        run_harness(model, HarnessSettings(tasks=["no_such_task"]), batch=1, seed=0)
