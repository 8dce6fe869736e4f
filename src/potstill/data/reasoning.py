"""A response's reasoning apart from its answer, whatever marks stand between them.

There is one form inside: a <think> block, then the answer. Reading brings other marks into it, and a format
that a student has of its own is written out of it.
"""

from dataclasses import astuple, dataclass
from typing import Any

from potstill.models import THINK_CLOSE, THINK_OPEN, reasoning_format

__all__ = [
    "OPEN_THOUGHTS",
    "Marks",
    "ReasoningFormat",
    "split_reasoning",
    "tag_reasoning",
]


@dataclass(frozen=True, slots=True)
class Marks:
    """What stands around the reasoning and, where it is not empty, around the answer."""

    open: str
    close: str
    answer_open: str = ""
    answer_close: str = ""

    def removed_from(self, text: str) -> str:
        """The text without any of the marks."""
        for mark in filter(None, astuple(self)):
            text = text.replace(mark, "")
        return text.strip()


OPEN_THOUGHTS = Marks(
    "<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>"
)


def tag_reasoning(text: str, marks: Marks = OPEN_THOUGHTS) -> str:
    """`text` with its reasoning in <think> tags in the place of other marks, by default OpenThoughts'."""
    if not any(mark and mark in text for mark in astuple(marks)):
        return text
    before, opened, rest = text.partition(marks.open)
    thought, closed, answer = (rest if opened else before).partition(marks.close)
    if not closed and not opened:
        return marks.removed_from(text)
    reasoning = f"{THINK_OPEN}\n{marks.removed_from(thought)}"
    if opened and (said := marks.removed_from(before)):
        reasoning = f"{said}\n{reasoning}"
    if not closed:
        return reasoning
    return f"{reasoning}\n{THINK_CLOSE}\n\n{marks.removed_from(answer)}".rstrip()


def split_reasoning(text: str) -> tuple[str | None, str]:
    """The reasoning and the answer of a response: (None, text) where there is no think block.

    A text that starts inside the block (the template's generation prompt opened it) has only the closing tag;
    a text cut off inside the block has only the opening one, and its answer is empty.
    """
    text = tag_reasoning(text)
    before, opened, rest = text.partition(THINK_OPEN)
    if not opened or THINK_CLOSE in before:
        before, rest = "", text
    reasoning, closed, answer = rest.partition(THINK_CLOSE)
    if not opened and not closed:
        return None, text
    return reasoning.strip(), f"{before.strip()}\n{answer.strip()}".strip()


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model writes its reasoning. Without `marks` it writes none."""

    marks: Marks | None

    @classmethod
    def of(cls, tokenizer: Any) -> "ReasoningFormat | None":
        """The format that is saved with a tokenizer; None for think tags, the form inside."""
        stated = reasoning_format(tokenizer)
        if stated is None:
            return None
        if isinstance(stated, list):
            return cls(Marks(*stated))
        return cls(None if stated == "strip" else OPEN_THOUGHTS)

    def read(self, response: str) -> str:
        """The response in the form inside."""
        return response if self.marks is None else tag_reasoning(response, self.marks)

    def write(self, response: str, *, cut_off: bool = False) -> str:
        """The response, which is in the form inside or in this one, as the model writes it.

        One that was cut off stays open: in its reasoning, of which without marks nothing is left, or with
        `cut_off` in its answer.
        """
        # An answer may hold a mark as plain text, "Answer:" say: one in the form inside is not read again.
        is_inside = THINK_OPEN in response or THINK_CLOSE in response
        is_own = self.marks is not None and THINK_OPEN in (self.marks.open, self.marks.answer_open)
        text = response if is_inside and not is_own else self.read(response)
        reasoning, answer = split_reasoning(text)
        if reasoning is None:
            return response
        if self.marks is None:
            return answer
        thought = f"{self.marks.open}\n{reasoning}"
        if not answer and THINK_CLOSE not in text:
            return thought
        parts = filter(None, (self.marks.answer_open, answer, "" if cut_off else self.marks.answer_close))
        return f"{thought}\n{self.marks.close}\n\n{chr(10).join(parts)}"
