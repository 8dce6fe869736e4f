"""What a response shows of its reasoning: how much of it, in how many steps, in which form."""

from dataclasses import dataclass

from potstill.data.chat import THINK_CLOSE, THINK_OPEN, split_reasoning, tag_reasoning
from potstill.data.words import words
from potstill.select.repetition import repeated_share
from potstill.select.sentences import sentences
from potstill.verifiers import is_well_formed

__all__ = ["REPETITION_NGRAM", "Reasoning", "read_reasoning"]

REPETITION_NGRAM = 8
_WORDS_OF_A_STEP = 2
_WORDS_OF_A_STEP_WITHOUT_TAGS = 3
_STEPS_WITHOUT_TAGS = 2
_ENOUGH_STEPS, _ENOUGH_WORDS = 5, 100


@dataclass(frozen=True)
class Reasoning:
    """Figures of one response's reasoning; `quality` and `repetition` lie in 0..1.

    `tagged` says that there is a think block, perhaps an unfinished one.
    """

    present: bool
    tagged: bool
    steps: int
    words: int
    repetition: float
    quality: float


def read_reasoning(response: str) -> Reasoning:
    """The figures of a response, its think block opened where the chat template opened it.

    A step is a sentence, a line or a displayed equation of two words, numbers or signs at least, without a
    think block of three; one that was there before is none. The reasoning is the think block; without one,
    all but the last step, and it counts as reasoning from two steps on.

    quality = (1 - repetition) (0.4 form + 0.3 min(steps, 5) / 5 + 0.3 min(words, 100) / 100), 0 without
    reasoning; form is 1 for one think block and then an answer, else 1/2. It measures form, not rightness.
    """
    text = tag_reasoning(response)
    tagged = THINK_OPEN in text or THINK_CLOSE in text
    block, answer = split_reasoning(text)
    if block is None:
        steps = _steps(answer, _WORDS_OF_A_STEP_WITHOUT_TAGS)[:-1]
    else:
        steps = _steps(block, _WORDS_OF_A_STEP)
    present = len(steps) >= (1 if tagged else _STEPS_WITHOUT_TAGS)
    repetition = repeated_share(text, REPETITION_NGRAM)
    distinct = len({*steps}) if present else 0
    count = sum(map(len, steps)) if present else 0
    form = 1.0 if is_well_formed(text) else 0.5
    amount = 0.3 * min(distinct / _ENOUGH_STEPS, 1.0) + 0.3 * min(count / _ENOUGH_WORDS, 1.0)
    quality = (1 - repetition) * (0.4 * form + amount) if present else 0.0
    return Reasoning(present, tagged, distinct, count, repetition, quality)


def _steps(text: str, fewest_words: int) -> list[tuple[str, ...]]:
    """Each step as its words."""
    encoded = text.encode("utf-8", "surrogatepass")
    found = (
        tuple(words(encoded[start:end].decode("utf-8", "surrogatepass"))) for start, end in sentences(text)
    )
    return [step for step in found if len(step) >= fewest_words]
