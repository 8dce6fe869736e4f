"""What an evaluation adds to verdicts: benchmarks, likeness to references, a judge, a sheet for raters."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from potstill.core.errors import DataError, ModelError
from potstill.core.records import Record
from potstill.core.step import StepContext
from potstill.evaluate.bertscore import BertScorer
from potstill.evaluate.harness import HarnessRows, harness_differences, run_harness
from potstill.evaluate.judge import DEFAULT_RUBRIC, Judged, compare_by_judge, judge_figures
from potstill.evaluate.rating import write_sheet
from potstill.evaluate.rows import JUDGED_FILE, AnswerRow, write_judged
from potstill.evaluate.settings import Decoding, EvaluateSettings
from potstill.evaluate.subjects import LocalSubject, Subject, open_subject
from potstill.evaluate.summary import ModelRows
from potstill.evaluate.tasks import TaskData
from potstill.models import TransformersModel
from potstill.teachers import OpenAIModel
from potstill.teachers.transformers import context_tokens
from potstill.verifiers.sandbox import confinement
from potstill.verifiers.settings import CodeVerifier

__all__ = ["Scorers"]

_Answers = Mapping[str, Mapping[str, Sequence[AnswerRow]]]
"""By model and task."""


class Scorers:
    """The scorers that a step's settings ask for; those that are not asked for do nothing.

    `kept` gives what an earlier attempt left of a part (owner, name, how it is made). Models are found and
    their settings checked at once, and loaded when they are needed.
    """

    def __init__(
        self,
        settings: EvaluateSettings,
        context: StepContext,
        tasks: Mapping[str, TaskData],
        kept: Callable[[str, str, Callable[[], Any]], Any],
    ) -> None:
        self._settings, self._context, self._tasks, self._kept = settings, context, tasks, kept
        self._benchmarks: dict[str, dict[str, HarnessRows]] = {}
        self._judge_figures: dict[str, dict[str, dict[str, Any]]] = {}
        self._judge: Subject | None = None
        self._scored_by: TransformersModel | None = None
        if any(isinstance(task.settings.verifier, CodeVerifier) for task in tasks.values()):
            context.say(f"code answers are run; what shuts them in: {', '.join(confinement())}")
        if settings.judge is not None:
            judge = context.model(settings.judge.model)
            if isinstance(judge, OpenAIModel):
                judge.api_key()  # told now, and not when all answers are there
            self._judge = open_subject(
                "judge", settings.judge.model, settings, context, failures="judge-failures"
            )
        if settings.bertscore is not None:
            model = context.model(settings.bertscore.model)
            if not isinstance(model, TransformersModel):
                raise ModelError(
                    f"{settings.bertscore.model} is a model of engine {getattr(model, 'engine', '?')}",
                    where="bertscore",
                    expected="a model that transformers loads, because its hidden states are compared",
                )
            device = {} if settings.device is None else {"device": settings.device}
            self._scored_by = model.model_copy(update=device)

    def run_benchmarks(self, subject: Subject) -> None:
        """lm-eval's benchmarks on a model that is loaded here; of another it is said that there are none."""
        settings, context = self._settings.lm_eval, self._context
        if settings is None:
            return
        if not isinstance(subject, LocalSubject):
            context.say(f"{subject.name}: no lm_eval, which needs a model that transformers loads")
            return

        def make() -> dict[str, Any]:
            context.check_stop()
            context.say(f"{subject.name}: lm_eval {', '.join(settings.tasks)}")
            found = run_harness(
                subject.loaded,
                settings,
                batch=self._settings.batch,
                seed=context.derive_seed("lm_eval"),
                check_stop=context.check_stop,
            )
            return {task: dataclasses.asdict(one) for task, one in found.items()}

        kept = self._kept(subject.name, "lm_eval", make)
        self._benchmarks[subject.name] = {task: HarnessRows(**one) for task, one in kept.items()}

    def say_unjudged(self, name: str, rows: ModelRows) -> None:
        """Say how many answers the user's own verifier failed on, and why the first."""
        for task, of_task in {**rows.tasks, **rows.forgetting}.items():
            failed = [answer for answer in of_task.answers if answer.verdicts.get("judged") is False]
            if failed:
                self._context.say(
                    f"{name}: {len(failed):,} of {len(of_task.answers):,} answers to {task} could not be "
                    f"judged and count as wrong, the first: {failed[0].note}"
                )

    def compare_with_references(self, rows: Mapping[str, ModelRows]) -> None:
        """Add BERTScore to the answers whose rows come with responses."""
        settings = self._settings.bertscore
        if settings is None or self._scored_by is None:
            return
        model, scorer = self._scored_by, None
        for role, of_model in rows.items():
            for name, task in of_model.tasks.items():
                references = self._tasks[name].references
                having = [number for number, row in enumerate(task.answers) if row.prompt_id in references]
                if not having:
                    continue

                def make(
                    chosen: Sequence[AnswerRow] = tuple(task.answers[number] for number in having),
                    known: Mapping[str, Sequence[str]] = references,
                    what: str = f"{role}: {name}, BERTScore",
                ) -> list[dict[str, float]]:
                    nonlocal scorer
                    scorer = scorer or BertScorer(model, layer=settings.layer, batch=settings.batch)
                    with self._context.progress(what, total=len(chosen), unit="answers") as progress:

                        def on_batch(answers: int) -> None:
                            progress.advance(answers)
                            self._context.check_stop()

                        return scorer.scores(
                            [row.final_answer for row in chosen],
                            [known[row.prompt_id] for row in chosen],
                            on_batch=on_batch,
                        )

                found = self._kept(role, f"bertscore {name}", make)
                for number, scores in zip(having, found, strict=True):
                    answer = task.answers[number]
                    task.answers[number] = dataclasses.replace(answer, scores={**answer.scores, **scores})
        if scorer is not None and scorer.cut:
            self._context.say(
                f"BERTScore: {scorer.cut:,} texts were longer than the model's {scorer.context:,} tokens; "
                "their ends were left out"
            )

    def judge(self, answers: _Answers) -> dict[str, Any] | None:
        """Have a judge compare every model's answers with the baseline's; what the manifest says of it."""
        settings, baseline, judge = self._settings.judge, self._settings.baseline, self._judge
        if settings is None or judge is None:
            return None
        assert baseline is not None  # filled when the settings were read
        tasks = settings.tasks or self._settings.written
        prompts = {name: self._tasks[name].prompts[: settings.limit] for name in tasks}
        rubric = settings.rubric_text() or DEFAULT_RUBRIC
        decoding = Decoding(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=settings.max_new_tokens)

        def ask(records: Sequence[Record]) -> list[str | None]:
            # Two models may have given the same answer, which is judged once.
            different = [*{record.id: record for record in records}.values()]
            fitting = [record for record in different if _fits(judge, record)]
            self._check_fitting(len(different) - len(fitting), len(different))
            found = judge.decode(fitting, decoding, description=f"judge: {settings.model}").answers
            said = {
                record.id: None if one is None else judge.read_response(record, one.response)
                for record, one in zip(fitting, found, strict=True)
            }
            return [said.get(record.id) for record in records]

        def make() -> list[dict[str, Any]]:
            try:
                judged = compare_by_judge(answers, prompts, baseline=baseline, rubric=rubric, ask=ask)
            finally:
                judge.close()
            return [dataclasses.asdict(one) for one in judged]

        judged = [Judged(**one) for one in self._kept("judge", "verdicts", make)]
        write_judged(self._context.folder / JUDGED_FILE, map(dataclasses.asdict, judged))
        unread = sum(one.choice is None for one in judged)
        if unread:
            self._context.say(f"judge: {unread:,} of {len(judged):,} verdicts could not be read")
        self._judge_figures = judge_figures(judged, seed=self._context.derive_seed("bootstrap"))
        return {
            "model": str(settings.model),
            "identity": judge.identity,
            "rubric": rubric,
            "verdicts": len(judged),
            "asked": sum(one.asked for one in judged),
            "unread": unread,
        }

    def _check_fitting(self, too_long: int, count: int) -> None:
        """Raise DataError where more comparisons are too long for the judge than requests may fail."""
        if too_long > self._settings.max_failed_share * count:
            raise DataError(
                f"{too_long:,} of {count:,} comparisons are longer than the judge's context",
                where="judge",
                expected="prompts, two answers and the rubric together within it",
                mend="take a judge with a longer context, or allow such failures with max_failed_share",
            )

    def write_rating_sheet(self, answers: _Answers) -> int | None:
        """The sheet for human raters and its key; how many items it has, None where none is asked for."""
        count, baseline = self._settings.rating_sheet, self._settings.baseline
        if count is None or baseline is None:
            return None
        prompts = {name: self._tasks[name].prompts for name in self._settings.written}
        seed = self._context.derive_seed("rating")
        return write_sheet(self._context.folder, answers, prompts, baseline=baseline, count=count, seed=seed)

    def add_figures(
        self, models: Mapping[str, dict[str, Any]], differences: Mapping[str, dict[str, Any]]
    ) -> None:
        """Put the benchmarks' figures and the judge's beside those of the tasks, and the differences."""
        seed = self._context.derive_seed("bootstrap")
        baseline = self._benchmarks.get(self._settings.baseline or "", {})
        for role, benchmarks in self._benchmarks.items():
            tasks = models[role].setdefault("tasks", {})
            tasks |= {f"lm_eval:{name}": rows.as_figures() for name, rows in benchmarks.items()}
            if role in differences:
                gaps = harness_differences(baseline, benchmarks, seed=seed)
                differences[role].setdefault("tasks", {}).update(
                    {f"lm_eval:{name}": {"benchmark": one} for name, one in gaps.items()}
                )
        for role, of_task in self._judge_figures.items():
            for name, figures in of_task.items():
                models[role].setdefault("tasks", {}).setdefault(name, {})["judge"] = figures
                if (rate := figures.get("win_rate")) is not None and role in differences:
                    gap = {"win_rate": {end: value - 0.5 for end, value in rate.items()}}
                    differences[role].setdefault("tasks", {}).setdefault(name, {})["judge"] = gap


def _fits(judge: Subject, record: Record) -> bool:
    """Whether a prompt leaves room in the context of a model that is loaded here; a server says so itself."""
    if not isinstance(judge, LocalSubject):
        return True
    room = context_tokens(judge.loaded)
    return room is None or len(judge.renderer.prompt_ids(record.messages)) < room
