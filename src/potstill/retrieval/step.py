"""The `retrieve` step: search the corpus for every row, and write the row with its passages in the prompt."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from potstill.core.errors import DataError
from potstill.core.records import RECORDS_FILE, Record, read_records, write_records
from potstill.core.step import StepContext, StepResult
from potstill.data.sources import label_names, read
from potstill.data.templates import fill
from potstill.models import load_tokenizer, tokenizer_hash, transformers_model
from potstill.retrieval.index import Retriever, open_retriever
from potstill.retrieval.passages import Passage, joined_within
from potstill.retrieval.reranker import Example, Reranker, open_reranker
from potstill.retrieval.settings import RetrieveSettings

__all__ = ["RERANKER_FOLDER", "retrieve"]

RERANKER_FOLDER = "reranker"
_ROWS_FILE = "rows.parquet"


def retrieve(settings: RetrieveSettings, context: StepContext) -> StepResult:
    """Carry out a retrieve step. Raises DataError for a row that is no prompt and for an empty corpus."""
    student = transformers_model(context, settings.student, why="its tokens are counted")
    tokenizer = load_tokenizer(student, say=context.say)
    rows = _kept_rows(settings, context)
    retriever = open_retriever(settings, context, tokenizer)
    reranker, trained = None, dict[str, Any]()
    if settings.reranker is not None:
        examples = list(_examples(settings, context, retriever, rows)) if settings.reranker.epochs else []
        reranker, trained = open_reranker(settings, context, examples)
        reranker.save(context.folder / RERANKER_FOLDER)
    writing = _Writing(settings, context, tokenizer, retriever, reranker)
    written = write_records(context.folder / RECORDS_FILE, writing.records(rows))
    return StepResult(
        counts={"records": written, **writing.counts, "passages": len(retriever.passages)},
        metrics=writing.metrics() | ({"reranker": trained} if trained else {}),
        extra={"index": retriever.described, "labels": label_names(settings.data, context)},
        tokenizer=tokenizer_hash(tokenizer),
        tokens=writing.tokens,
    )


def _kept_rows(settings: RetrieveSettings, context: StepContext) -> Path:
    """The rows, read once; later passes take constant memory."""
    path = context.scratch / _ROWS_FILE
    if not path.exists():
        write_records(path, map(_checked, read(settings.data, context)))
    return path


def _checked(record: Record) -> Record:
    if not record.messages or record.messages[-1]["role"] != "user":
        raise DataError(
            "the row is no prompt that ends with a question",
            where=f"record {record.id}",
            expected="messages, the last of them the user's",
            mend="name plain text as `corpus`, and prompts or traces as `data`",
        )
    return record


def _rationale(record: Record) -> str:
    """What of a response tells how the answer is found: its reasoning, else all of it."""
    return record.reasoning or record.response or ""


def _examples(
    settings: RetrieveSettings, context: StepContext, retriever: Retriever, rows: Path
) -> Iterator[Example]:
    """For each row to train on the passages that rationale or question bring up, with the former's scores."""
    for record in read_records(rows):
        context.check_stop()
        rationale, question = _rationale(record), record.messages[-1]["content"]
        if record.held_out or not rationale.strip():
            continue
        found = [*retriever.search(rationale, settings.candidates)]
        found += retriever.search(question, settings.candidates)
        numbers = list(dict.fromkeys(number for number, _ in found))
        if len(numbers) > 1:
            texts = [retriever.passages[number].text for number in numbers]
            yield Example(question, texts, retriever.scores(rationale, numbers))


@dataclass
class _Recall:
    """The share of the passages found by the rationale that the question finds."""

    found: int = 0
    wanted: int = 0

    def count(self, wanted: set[int], numbers: list[int]) -> None:
        self.found += len(wanted & {*numbers})
        self.wanted += len(wanted)


class _Writing:
    """Writes the rows and counts what is reported of them."""

    def __init__(
        self,
        settings: RetrieveSettings,
        context: StepContext,
        tokenizer: Any,
        retriever: Retriever,
        reranker: Reranker | None,
    ) -> None:
        self.settings, self.context, self.tokenizer = settings, context, tokenizer
        self.retriever, self.reranker = retriever, reranker
        self.counts = {"held_out": 0, "by_rationale": 0, "by_question": 0, "without_passage": 0}
        self.tokens = self.document_tokens = self.placed = self.rows = 0
        self.recall = {"question": _Recall(), "reranked": _Recall()}

    def records(self, rows: Path) -> Iterator[Record]:
        """Every row with its passages, in the order of the data."""
        with self.context.progress("retrieving") as progress:
            for record in read_records(rows):
                self.context.check_stop()
                yield self._with_passages(record)
                progress.advance()

    def metrics(self) -> dict[str, Any]:
        """Passages and their tokens a prompt; recall of the rationale's passages on held-out rows."""
        metrics: dict[str, Any] = {
            "passages_a_prompt": self.placed / self.rows,
            "document_tokens_a_prompt": self.document_tokens / self.rows,
        }
        shares = {name: one.found / one.wanted for name, one in self.recall.items() if one.wanted}
        return metrics | ({"recall": shares} if shares else {})

    def _with_passages(self, record: Record) -> Record:
        settings, question = self.settings, record.messages[-1]["content"]
        by_rationale = (
            settings.query == "rationale" and not record.held_out and bool(_rationale(record).strip())
        )
        if by_rationale:
            found = self._passages(self.retriever.search(_rationale(record), settings.k))
        else:
            found = self._by_question(record, question)
        documents, used = joined_within([one.text for one in found], self.tokenizer, settings.document_tokens)
        asked = fill(settings.template, {"passages": documents, "question": question}) if used else question
        self._count(record, documents, used, asked, by_rationale=by_rationale)
        # Ids of the prompt and log-probabilities behind it were those of another prompt.
        return replace(
            record,
            id="",
            messages=[*record.messages[:-1], {**record.messages[-1], "content": asked}],
            prompt_token_ids=None,
            logprobs=None,
            token_bytes=None,
            alternatives=None,
            meta={**record.meta, "passages": [one.number for one in found[:used]]},
        )

    def _by_question(self, record: Record, question: str) -> list[Passage]:
        settings, reranker = self.settings, self.reranker
        found = self._passages(self.retriever.search(question, settings.candidates))
        best = found[: settings.k]
        if reranker is not None and found:
            places = reranker.best(question, [one.text for one in found], settings.k)
            best = [found[place] for place in places]
        if record.held_out and _rationale(record).strip():
            wanted = {number for number, _ in self.retriever.search(_rationale(record), settings.k)}
            self.recall["question"].count(wanted, [one.number for one in found[: settings.k]])
            if reranker is not None:
                self.recall["reranked"].count(wanted, [one.number for one in best])
        return best

    def _passages(self, found: list[tuple[int, float]]) -> list[Passage]:
        return [self.retriever.passages[number] for number, _ in found]

    def _count(self, record: Record, documents: str, used: int, asked: str, *, by_rationale: bool) -> None:
        self.rows += 1
        self.counts["held_out"] += record.held_out
        self.counts["by_rationale" if by_rationale else "by_question"] += 1
        self.counts["without_passage"] += not used
        self.placed += used
        self.document_tokens += self._length(documents)
        self.tokens += self._length(asked) + self._length(record.response or "")

    def _length(self, text: str) -> int:
        return len(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
