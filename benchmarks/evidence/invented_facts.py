"""Writes the invented facts and the questions on them that recipes/kard-small.yaml is about.

No model has met these things, so that a question is answered by finding its fact or not at all. Of each thing
there are four facts with a number, and the question's words are not the fact's: its words alone find the
thing, not which of its facts is asked for.
"""

import json
import random
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
THINGS = 100
SYLLABLES = (
    "bra",
    "dol",
    "fen",
    "gim",
    "hus",
    "jor",
    "kel",
    "lom",
    "mir",
    "nax",
    "pov",
    "rit",
    "sul",
    "tev",
    "zan",
)
ASPECTS = (
    ("A {thing} costs {number} coins.", "How much money does one pay for a {thing}?"),
    ("Dried, the {thing} weighs {number} grams.", "How heavy is a {thing}?"),
    ("Its leaf makes the {thing} {number} fingers tall.", "What height does a {thing} reach?"),
    ("Cooked for {number} minutes, the {thing} is soft.", "How long must a {thing} stay on the fire?"),
)


def rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Articles and questions, the same at every call."""
    draw = random.Random(7)
    things: list[str] = []
    while len(things) < THINGS:
        thing = "".join(draw.sample(SYLLABLES, 3))
        things += [thing] * (thing not in things)
    facts, questions = [], []
    for thing in things:
        for fact, question in ASPECTS:
            number = str(draw.randrange(11, 100))
            told = fact.format(thing=thing, number=number)
            facts.append({"title": thing, "text": told})
            response = f"<think>\n{told}\n</think>\n\n{number}"
            asked = question.format(thing=thing)
            questions.append({"prompt": asked, "response": response, "reference": number, "task": "math"})
    return facts, questions


def main() -> None:
    """Write both files beside the recipe."""
    for name, written in zip(("facts", "questions"), rows(), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in written)
        (RECIPES / f"invented-{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
