"""Benchmarks of lm-eval on a loaded model: its own figures, and each question's for paired differences."""

import copy
import functools
import importlib
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

from potstill.core.errors import DataError, Interrupted
from potstill.evaluate.intervals import (
    Z_95,
    Estimate,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    mcnemar_exact,
    paired_share_difference,
    share_of_error,
    wilson_interval,
)
from potstill.evaluate.scorer_settings import HarnessSettings, harness_version
from potstill.models import LoadedModel, plain_model
from potstill.models.pretrained import quiet_transformers

__all__ = ["HarnessRows", "check_harness", "harness_differences", "run_harness"]

# lm-eval's own figures between 0 and 1; others are perplexities, BLEU in 0..100, or of a task's own making.
_SHARES = frozenset(
    {"acc", "acc_all", "acc_bytes", "acc_mutual_info", "acc_norm", "exact_match", "f1", "likelihood"}
)


@dataclass(frozen=True)
class HarnessRows:
    """One benchmark: figures by metric, with the ends of their 95 % intervals.

    `questions` holds each question's value by metric, where the metric is their mean; `higher_is_better` is
    lm-eval's word.
    """

    count: int
    figures: dict[str, dict[str, float]]
    questions: dict[str, list[float]] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)

    def as_figures(self) -> dict[str, Any]:
        """The form used in metrics, beside those of other tasks."""
        return {
            "prompts": self.count,
            "benchmark": self.figures,
            "higher_is_better": self.higher_is_better,
        }


def check_harness() -> None:
    """Raise DataError where lm-eval is not installed."""
    if harness_version() is None:
        raise DataError(
            "benchmarks of lm_eval need lm-eval, which is not installed",
            mend='install it with `pip install "potstill[lm-eval]"`, or leave `lm_eval` out',
        )


def run_harness(
    model: LoadedModel,
    settings: HarnessSettings,
    *,
    batch: int,
    seed: int,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, HarnessRows]:
    """A model's figures by benchmark. Raises DataError for a task that lm-eval does not know or cannot run.

    `check_stop` is called before every pass through the model, where an Interrupted that it raises ends the
    benchmarks. Tasks that run code which a model wrote are refused, as lm-eval does it without a sandbox.
    """
    library = importlib.import_module("lm_eval")  # without types, and slow to import
    wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    weights = plain_model(model.model)  # as in decoding
    # Their loop is lm-eval's own, and can be left from within the model alone.
    with weights.register_forward_pre_hook(lambda *_: check_stop()), quiet_transformers(), _quiet():
        try:
            results = library.simple_evaluate(
                model=wrapper(pretrained=weights, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch),
                tasks=list(settings.tasks),
                num_fewshot=settings.shots,
                limit=settings.limit,
                apply_chat_template=settings.chat,
                task_manager=_task_manager(settings.include),
                bootstrap_iters=1000,
                **dict.fromkeys(
                    ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"),
                    seed % 2**31,
                ),
            )
        except Interrupted:
            raise
        except Exception as error:  # tasks, data sets, metrics: each raises what it likes
            raise DataError(
                f"lm-eval could not carry out {', '.join(settings.tasks)}: {type(error).__name__}: {error}",
                expected="tasks that lm-eval knows (lm-eval ls tasks), and data that can be loaded here",
                mend="correct the name, or include the folder of your own tasks with `include`",
            ) from error
    return {task: _rows(task, results, seed) for task in settings.tasks}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and log lines off the terminal, those of programs that lm-eval starts as well."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@functools.cache
def _task_manager(include: str | None) -> Any:
    """What knows the tasks; it reads thousands of files."""
    return importlib.import_module("lm_eval.tasks").TaskManager(include_path=include)


def _rows(task: str, results: Mapping[str, Any], seed: int) -> HarnessRows:
    counts: Mapping[str, Any] = results.get("n-samples", {})
    members = _members(task, results)
    found = HarnessRows(sum(int(counts.get(one, {}).get("effective", 0)) for one in members), {})
    for key, value in results["results"][task].items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if filter_ == "none" else f"{metric} ({filter_})"
        error = results["results"][task].get(f"{metric}_stderr,{filter_}")
        found.higher_is_better[name] = bool(
            results.get("higher_is_better", {}).get(task, {}).get(metric, True)
        )
        values = [
            float(sample[metric])
            for member in members
            for sample in results.get("samples", {}).get(member, ())
            if sample["filter"] == filter_ and isinstance(sample.get(metric), int | float)
        ]
        # Perplexities and the like are no means over questions, nor are groups whose tasks count alike.
        if values and math.isclose(sum(values) / len(values), value, rel_tol=1e-9, abs_tol=1e-12):
            found.questions[name] = values
        is_share = _in_bounds(values) if values else metric in _SHARES
        found.figures[name] = _estimate(
            float(value), error, found.questions.get(name, ()), seed, is_share=is_share
        )
    return found


def _members(task: str, results: Mapping[str, Any]) -> list[str]:
    """The tasks with questions of their own that a group consists of, its groups' among them; else itself."""
    below = results.get("group_subtasks", {}).get(task)
    return [leaf for one in below for leaf in _members(one, results)] if below else [task]


def _estimate(
    value: float, error: Any, questions: Sequence[float], seed: int, *, is_share: bool
) -> dict[str, float]:
    """A figure by its questions' values; where those are not known, or not in 0..1, by lm-eval's error."""
    if questions and {*questions} <= {0.0, 1.0}:
        return wilson_interval(int(sum(questions)), len(questions)).as_dict()
    if questions and is_share:
        ones, names = [1] * len(questions), _names(questions)
        return bootstrap_ratio(questions, ones, names, seed=seed, within=(0.0, 1.0)).as_dict()
    if not isinstance(error, int | float) or not math.isfinite(error) or error == 0:
        return {"value": value}
    if is_share and 0 < value < 1:
        return share_of_error(value, error).as_dict()
    return Estimate(value, value - Z_95 * error, value + Z_95 * error).as_dict()


def _in_bounds(questions: Sequence[float]) -> bool:
    return all(0 <= one <= 1 for one in questions)


def _names(questions: Sequence[float]) -> list[str]:
    return [str(number) for number in range(len(questions))]


def harness_differences(
    base: Mapping[str, HarnessRows], model: Mapping[str, HarnessRows], *, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """A model's differences to the baseline by benchmark and metric, paired on the same questions."""
    return {
        task: {
            name: _difference(base[task].questions[name], values, seed)
            for name, values in rows.questions.items()
            if len(base[task].questions.get(name, ())) == len(values)
        }
        for task, rows in model.items()
        if task in base
    }


def _difference(first: Sequence[float], second: Sequence[float], seed: int) -> dict[str, float]:
    if {*first, *second} <= {0.0, 1.0}:
        right = [value == 1 for value in first], [value == 1 for value in second]
        return {**paired_share_difference(*right).as_dict(), "mcnemar_p": mcnemar_exact(*right)}
    ones, within = [1] * len(first), (0.0, 1.0) if _in_bounds([*first, *second]) else (-math.inf, math.inf)
    return bootstrap_ratio_difference(
        (first, ones), (second, ones), _names(first), seed=seed, within=within
    ).as_dict()
