"""What the figures of an evaluation allow a reader to conclude, in a sentence or two."""

from collections.abc import Sequence
from dataclasses import dataclass

from potstill.report.results import Aspect, Measure, Results, Verdict, clear_among

__all__ = ["Conclusion", "conclusion"]

_PHRASES: dict[tuple[Aspect, Verdict], str] = {
    ("closeness", "better"): "closer to its teacher than {base}",
    ("closeness", "worse"): "further from its teacher than {base}",
    ("closeness", "unclear"): "not clearly closer to its teacher than {base}",
    ("traces", "better"): "better at predicting the held-out traces than {base}",
    ("traces", "worse"): "worse at predicting the held-out traces than {base}",
    ("traces", "unclear"): "not clearly better at predicting the held-out traces than {base}",
    ("task", "better"): "right more often",
    ("task", "worse"): "right less often",
    ("task", "unclear"): "not clearly right more often",
}


@dataclass(frozen=True)
class Conclusion:
    """The headline, the figures that carry it, what was forgotten, and what a reader should know of both."""

    headline: str
    verdict: Verdict
    evidence: list[Measure]
    forgetting: str = ""
    note: str = ""


def conclusion(results: Results) -> Conclusion | None:
    """Is the student truly better than the baseline? None where the evaluation compares no such pair.

    Several tasks count as better only when none is worse and at least one is better, by differences that
    stay clear when their number is reckoned with (Holm 1979).
    """
    student, base = results.student, results.baseline
    if student is None or base is None:
        return None
    judged = [one for one in results.measures if one.verdict(student) is not None]
    tasks = [one for one in judged if one.aspect == "task"]
    # KL where it could be measured, else agreement, else perplexity.
    traces = [one for one in judged if one.aspect in ("closeness", "traces")][:1]
    forgotten = [one for one in judged if one.aspect == "forgetting"]
    verdicts: dict[Aspect, Verdict] = {one.aspect: one.verdict(student) or "unclear" for one in traces}
    of_tasks, of_forgotten = _corrected(tasks, student), _corrected(forgotten, student)
    if tasks:
        verdicts["task"] = _joint(of_tasks)
    forgetting = _forgetting(forgotten, of_forgotten)
    if not verdicts:
        return Conclusion(forgetting, _joint(of_forgotten), forgotten) if forgetting else None
    parts = [_PHRASES[aspect, verdict] for aspect, verdict in verdicts.items()]
    found = set(verdicts.values())
    joint = " and " if len(found) == 1 else ", but " if "better" in found else ", and "
    other = "the base" if base == "base" else base
    sentence = joint.join(parts).format(base=other)
    if not traces:
        sentence += f" than {other}"
    if len(tasks) > 1:
        sentence += f" (clearly so on {of_tasks.count('better')} of {len(tasks)} tasks)"
    subject = "The student" if student == "student" else student
    alone = [one.verdict(student) for one in tasks + forgotten]
    return Conclusion(
        f"{subject} is {sentence}.",
        _joint(list(verdicts.values())),
        traces + tasks + forgotten,
        forgetting,
        _CORRECTED if alone != of_tasks + of_forgotten else "",
    )


_CORRECTED = (
    "A difference that is clear by itself is not among so many, and the sentence above goes by the latter "
    "(Holm's correction)."
)


def _corrected(measures: Sequence[Measure], role: str) -> list[Verdict]:
    """Each measure's verdict; unclear where the interval is clear by itself, but not among so many (Holm)."""
    verdicts = [measure.verdict(role) or "unclear" for measure in measures]
    clear = clear_among(
        [
            (verdict != "unclear", measure.p_value(role))
            for measure, verdict in zip(measures, verdicts, strict=True)
        ]
    )
    return [one if is_clear else "unclear" for one, is_clear in zip(verdicts, clear, strict=True)]


def _forgetting(measures: Sequence[Measure], verdicts: Sequence[Verdict]) -> str:
    """What became of abilities that training did not touch."""
    if not measures:
        return ""
    by_set: dict[str, list[Verdict]] = {}
    for measure, verdict in zip(measures, verdicts, strict=True):
        by_set.setdefault(measure.task or "", []).append(verdict)
    worse = [name for name, found in by_set.items() if "worse" in found]
    better = [name for name, found in by_set.items() if "better" in found and name not in worse]
    if worse:
        said = f"Something was forgotten: worse on {', '.join(worse)}, which training did not touch"
    else:
        said = f"Nothing is clearly forgotten on {', '.join(by_set)}, which training did not touch"
    return said + (f"; better on {', '.join(better)}." if better else ".")


def _joint(verdicts: list[Verdict]) -> Verdict:
    found = set(verdicts) - {"unclear"}
    return found.pop() if len(found) == 1 else "unclear"
