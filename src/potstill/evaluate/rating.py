"""A blinded sheet for human raters: answers shuffled and unlabelled, the key apart; and what raters wrote."""

import csv
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.core.errors import DataError
from potstill.core.hashing import hash_json
from potstill.core.records import Record
from potstill.core.store import write_atomically
from potstill.evaluate.agreement import krippendorff_alpha
from potstill.evaluate.intervals import (
    Estimate,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    clustered_share,
)
from potstill.evaluate.rows import AnswerRow

__all__ = ["RATING_KEY_FILE", "RATING_SHEET_FILE", "Rating", "rate", "write_sheet"]

RATING_SHEET_FILE, RATING_KEY_FILE = "rating_sheet.csv", "rating_key.json"
_LOWEST, _HIGHEST = 1.0, 5.0
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# What a spreadsheet takes for a formula when a cell begins with it; and the longest cell that it shows.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
_LONGEST_CELL = 32_000


def write_sheet(
    folder: Path,
    answers: Mapping[str, Mapping[str, Sequence[AnswerRow]]],
    prompts: Mapping[str, Sequence[Record]],
    *,
    baseline: str,
    count: int,
    seed: int,
) -> int:
    """Write the sheet and its key: the first `count` prompts of each task; returns how many there are.

    A row has an item's id, the prompt, each model's first answer without its reasoning in an order of the
    row's own, and an empty score behind each. `answers` are by model and task. Cells that a spreadsheet would
    take for a formula begin with an apostrophe.
    """
    chance = random.Random(seed)
    models = list(answers)
    rows: list[list[str]] = []
    key: dict[str, Any] = {"baseline": baseline, "items": {}}
    for task, records in prompts.items():
        given = {
            model: {
                row.prompt_id: row.final_answer for row in answers[model].get(task, ()) if row.sample == 0
            }
            for model in models
        }
        for record in records[:count]:
            shown = [model for model in models if record.prompt_id in given[model]]
            if len(shown) < 2:
                continue
            chance.shuffle(shown)
            item = hash_json([seed, task, record.prompt_id])[:10]
            key["items"][item] = {"task": task, "prompt_id": record.prompt_id, "models": shown}
            texts = [given[model][record.prompt_id] for model in shown]
            question = "\n\n".join(message["content"] for message in record.messages)
            cells = [cell for text in texts for cell in (_cell(text or "(no answer)"), "")]
            rows.append([item, _cell(question), *cells])
    chance.shuffle(rows)
    width = max((len(row) for row in rows), default=2)
    head = ["item", "prompt"]
    for letter in _LETTERS[: (width - 2) // 2]:
        head += [f"answer {letter}", f"score {letter} (1-5)"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([head, *rows])
    write_atomically(folder / RATING_KEY_FILE, json.dumps(key, indent=1))
    # The mark by which spreadsheets know UTF-8.
    write_atomically(folder / RATING_SHEET_FILE, "\ufeff" + text.getvalue())
    return len(rows)


def _cell(text: str) -> str:
    if len(text) > _LONGEST_CELL:
        text = f"{text[:_LONGEST_CELL]} … (cut)"
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


@dataclass(frozen=True)
class Rating:
    """What raters' sheets say, by task.

    `scores` are each model's mean (1-5), `differences` each model's paired difference to the baseline, both
    with a 95 % interval over prompts; `preferred` is the share of prompts where a model's mean score is the
    higher one of the two, ties counting half. `agreement` is Krippendorff's alpha of the scores (ordinal),
    None where no answer was rated twice.
    """

    task: str
    items: int
    raters: int
    agreement: float | None
    scores: dict[str, Estimate] = field(default_factory=dict)
    differences: dict[str, Estimate] = field(default_factory=dict)
    preferred: dict[str, Estimate] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        estimates = {
            name: {model: one.as_dict() for model, one in getattr(self, name).items()}
            for name in ("scores", "differences", "preferred")
        }
        return {
            "task": self.task,
            "items": self.items,
            "raters": self.raters,
            "agreement": self.agreement,
            **estimates,
        }


def rate(folder: Path, sheets: Sequence[Path]) -> list[Rating]:
    """Read raters' sheets, one a rater, against the key in an evaluate step's folder; a rating a task.

    Rows may be in any order, and scores may be missing. Raises DataError for a folder without a key, a sheet
    that is none of it or rates an answer twice, and a score that is no number in 1..5.
    """
    path = folder / RATING_KEY_FILE
    if not path.is_file():
        raise DataError(
            "there is no key of a rating sheet",
            where=str(folder),
            expected="the folder of an evaluate step with `rating_sheet`, such as runs/a/evaluation",
        )
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        key: dict[str, Any] = known["items"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the key of the rating sheet cannot be read ({error})",
            where=str(path),
            expected="the file as the step wrote it",
            mend="make the step again: `potstill run RECIPE --force STEP`",
        ) from error
    raters = [_read_sheet(sheet, key) for sheet in sheets]
    if not any(raters):
        raise DataError(
            "no sheet holds a score",
            where=", ".join(map(str, sheets)),
            expected="a number from 1 (bad) to 5 (good) behind each answer, in the columns `score`",
        )
    found = []
    for task in dict.fromkeys(entry["task"] for entry in key.values()):
        of_task = {item: entry["models"] for item, entry in key.items() if entry["task"] == task}
        found.append(_rating(task, of_task, known["baseline"], raters))
    return [one for one in found if one is not None]


_Scores = dict[tuple[str, str], float]
"""By item and model."""


def _rating(
    task: str, items: Mapping[str, list[str]], baseline: str, raters: Sequence[_Scores]
) -> Rating | None:
    """`items` are the task's, each with its models; None where no rater rated any of them."""
    own = [{place: score for place, score in rater.items() if place[0] in items} for rater in raters]
    places = [(item, model) for item, models in items.items() for model in models]
    places = [place for place in places if any(place in rater for rater in own)]
    if not places:
        return None
    units = [[rater.get(place) for rater in own] for place in places]
    means: _Scores = {}
    for place, unit in zip(places, units, strict=True):
        given = [score for score in unit if score is not None]
        means[place] = sum(given) / len(given)
    found = Rating(
        task,
        items=len({item for item, _ in places}),
        raters=sum(map(bool, own)),
        agreement=krippendorff_alpha(units, "ordinal"),
    )
    for model in sorted({model for _, model in places}, key=lambda one: (one != baseline, one)):
        having = [item for item in items if (item, model) in means]
        ours = [means[item, model] for item in having]
        found.scores[model] = bootstrap_ratio(
            ours, [1] * len(ours), having, seed=0, within=(_LOWEST, _HIGHEST)
        )
        both = [item for item in having if (item, baseline) in means]
        if model == baseline or not both:
            continue
        ours, theirs = [means[item, model] for item in both], [means[item, baseline] for item in both]
        ones = [1.0] * len(both)
        found.differences[model] = bootstrap_ratio_difference(
            (theirs, ones), (ours, ones), both, seed=0, within=(_LOWEST, _HIGHEST)
        )
        worth = [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]
        # Two votes a prompt, so that a tie is one for each.
        found.preferred[model] = clustered_share(worth, samples=2)
    return found


def _read_sheet(path: Path, key: Mapping[str, Any]) -> _Scores:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"the sheet cannot be read ({error})", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError(
            "the sheet is not in UTF-8", where=str(path), mend="save it as CSV UTF-8 (comma delimited)"
        ) from error
    head = text.partition("\n")[0]
    # A spreadsheet of another country writes semicolons or tabs.
    delimiter = max(",;\t", key=head.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [name.strip() for name in next(rows, [])]
    places = _places_of_scores(columns, path)
    found: _Scores = {}
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        where = f"{path}, line {rows.line_num}"
        item = "".join(row[columns.index("item") :][:1]).strip()
        if item not in key:
            raise DataError(
                f"the item {item!r} is none of this evaluation's",
                where=where,
                expected="the sheet of the same step's folder, its item column as it was",
            )
        for letter, model in zip(_LETTERS, key[item]["models"], strict=False):
            place = places.get(letter)
            cell = "" if place is None or place >= len(row) else row[place].strip()
            if cell and (item, model) in found:
                raise DataError(
                    f"the item {item!r} has two scores of answer {letter}",
                    where=where,
                    expected="one row an item",
                    mend="take one of its rows out; each rater has a sheet of their own",
                )
            if cell:
                found[item, model] = _score(cell, where=f"{where}, score {letter}")
    return found


def _places_of_scores(columns: list[str], path: Path) -> dict[str, int]:
    """The column of each letter's score."""
    places = {
        name[6]: number for number, name in enumerate(columns) if name.startswith("score ") and len(name) > 6
    }
    if "item" not in columns or not places:
        raise DataError(
            "this is no rating sheet",
            where=str(path),
            expected="the columns of rating_sheet.csv: item, prompt, answer A, score A (1-5), …",
        )
    unnamed = [
        name for name in columns if name.startswith("answer ") and name.removeprefix("answer ") not in places
    ]
    if unnamed:
        raise DataError(
            f"the scores of {unnamed[0]!r} have no column",
            where=str(path),
            expected=f"a column 'score {unnamed[0].removeprefix('answer ')} (1-5)', named as in the sheet",
        )
    return places


def _score(cell: str, *, where: str) -> float:
    try:
        value = float(cell.replace(",", "."))
    except ValueError:
        value = 0.0
    if not _LOWEST <= value <= _HIGHEST:
        raise DataError(
            f"{cell!r} is no score", where=where, expected="a number from 1 (bad) to 5 (good), or nothing"
        )
    return value
