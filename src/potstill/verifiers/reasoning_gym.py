"""reasoning-gym's tasks: the library's own scorer on the answer taken out of a text."""

import re

from potstill.core.records import Record
from potstill.data.answers import NUMBER_PATTERN, last_boxed, parse_number
from potstill.data.tasks import TASK_PREFIX
from potstill.verifiers.bounded import call_bounded

__all__ = ["answer_candidates", "is_right_task_answer"]

_TAG_OPEN, _TAG_CLOSE = "<answer>", "</answer>"
_ANNOUNCED = re.compile(r"\banswer(?:\s+is|\s*:)[ \t]*:?\**[ \t]*", re.IGNORECASE)
_NUMBER = re.compile(rf"(?<![\w.])(?:{NUMBER_PATTERN})")
_LONGEST_ANSWER = 10_000
_SCORE_TIMEOUT_S = 10.0


def is_right_task_answer(record: Record, answer: str) -> bool:
    """Whether one of the answer's candidates gets full marks (1.0) from the task's scorer."""
    name = (record.task or "").removeprefix(TASK_PREFIX)
    candidates = answer_candidates(answer, numeric=parse_number(record.reference or "") is not None)
    if record.reference is not None and record.reference in candidates:
        return True
    return any(
        call_bounded("score", name, one, record.reference, record.meta, timeout_s=_SCORE_TIMEOUT_S)
        for one in candidates
    )


def answer_candidates(text: str, *, numeric: bool) -> list[str]:
    r"""What may be meant as the answer of a text, for scorers that compare with all of it.

    `<answer>…</answer>` or else `\boxed{…}` is the answer where there is one. Otherwise: the whole text, its
    last line, what follows the last `answer is`, and, when the gold answer is a number, the last number.
    """
    text = text.strip()[-_LONGEST_ANSWER:]
    _, opened, tagged = text.rpartition(_TAG_OPEN)
    if opened and _TAG_CLOSE in tagged:
        return [tagged.partition(_TAG_CLOSE)[0].strip()]
    if (boxed := last_boxed(text)) is not None:
        return [boxed]
    found = [text, text.splitlines()[-1].strip() if text else ""]
    found += [text[match.end() :].strip().rstrip(".") for match in [*_ANNOUNCED.finditer(text)][-1:]]
    if numeric:
        found += _NUMBER.findall(text)[-1:]
    return [one for one in dict.fromkeys(found) if one]
