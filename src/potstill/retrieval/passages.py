"""Articles cut into passages by tokens, and passages fitted into a budget of tokens."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from potstill.core.errors import DataError, ModelError
from potstill.core.records import Record

__all__ = ["PASSAGES_FILE", "Passage", "Passages", "first_tokens", "joined_within", "split", "write_passages"]

PASSAGES_FILE = "passages.arrow"
_SEPARATOR = "\n\n"
_BATCH_ROWS = 1024
_PARTS_A_TITLE = 4
_LETTERS_A_TOKEN = 8  # more than most; a window that turns out too short is doubled


class Passage(NamedTuple):
    """A passage's number in the corpus, its text, and the article it is cut from."""

    number: int
    text: str
    article: str


def first_tokens(text: str, tokenizer: Any, most: int) -> str:
    """The longest beginning of a text that ends with a word and is at most so many tokens.

    A word that alone is more is cut within. Raises ModelError for a tokenizer that does not say where its
    tokens stand.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            "the tokenizer does not say where in a text its tokens stand",
            expected="a fast tokenizer (tokenizer.json)",
            mend="name as `student` a model that has one",
        )
    window = _LETTERS_A_TOKEN * (most + 8)
    while True:
        part = text[:window]
        offsets = backend.encode(part, add_special_tokens=False).offsets
        if len(offsets) > most or len(part) == len(text):
            break
        window *= 2
    if len(offsets) <= most:
        return text
    end = offsets[most][0]
    if not (text[end].isspace() or text[end - 1 : end].isspace()):
        words = text[:end].rsplit(maxsplit=1)
        end = len(text[:end].rstrip()) - len(words[1]) if len(words) == 2 else end
    # Text that ends elsewhere may be tokenised otherwise: a step back at a time until it is short enough.
    while end > 1 and len(backend.encode(text[:end].rstrip(), add_special_tokens=False).ids) > most:
        end -= 1
    return text[: max(end, 1)]


def split(text: str, tokenizer: Any, most: int, title: str = "") -> Iterator[str]:
    """A text's passages in order: whole words, at most so many tokens each, without space around them.

    Of a text of several passages each begins with a line of the title, since what it is about may be named in
    none of them; from a word on for which that leaves no room, none does. A title takes at most a quarter of
    the tokens.
    """
    rest, heading = text.strip(), ""
    if title.strip() and len(first_tokens(rest, tokenizer, most)) < len(rest):
        heading = f"{first_tokens(title.strip(), tokenizer, most // _PARTS_A_TITLE).rstrip()}\n"
    while rest:
        part = first_tokens(f"{heading}{rest}", tokenizer, most)
        if len(part) <= len(heading):  # a word for which the title leaves no room
            heading, part = "", first_tokens(rest, tokenizer, most)
        yield part.rstrip()
        rest = rest[len(part) - len(heading) :].lstrip()


def joined_within(texts: Iterable[str], tokenizer: Any, budget: int) -> tuple[str, int]:
    """As many passages as fit into a budget of tokens, the last perhaps cut, and how many they are."""
    joined, used = "", 0
    for text in texts:
        longer = f"{joined}{_SEPARATOR}{text}" if joined else text
        fitting = first_tokens(longer, tokenizer, budget).rstrip()
        if len(fitting) <= len(joined):
            break
        joined, used = fitting, used + 1
        if len(fitting) < len(longer):
            break
    return joined, used


def write_passages(path: Path, articles: Iterable[Record], tokenizer: Any, most: int) -> tuple[int, int]:
    """Cut articles into passages, in constant memory; returns how many articles and passages there are.

    An article is a row's text. Raises DataError where there is no passage.
    """
    import pyarrow as pa

    schema = pa.schema([("text", pa.string()), ("article", pa.string())])
    read = written = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        batch: list[dict[str, str]] = []
        for article in articles:
            read += 1
            title = str(article.meta.get("title") or "")
            for text in split(article.response or "", tokenizer, most, title):
                batch.append({"text": text, "article": title or article.prompt_id})
                if len(batch) == _BATCH_ROWS:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                    written, batch = written + len(batch), []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            written += len(batch)
    if not written:
        raise DataError(
            f"none of the {read:,} rows of the corpus has a text",
            expected="rows with a column `text`, or a step's responses",
            mend="name a file of articles as `corpus`",
        )
    return read, written


class Passages:
    """The passages of a file, read where they lie: the file is mapped, not loaded."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._file: pa.ipc.RecordBatchFileReader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._last = self._file.num_record_batches - 1
        rows = self._file.get_batch(self._last).num_rows
        self._count: int = self._last * _BATCH_ROWS + rows

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Passage:
        batch = self._file.get_batch(number // _BATCH_ROWS)
        row = number % _BATCH_ROWS
        return Passage(number, batch.column(0)[row].as_py(), batch.column(1)[row].as_py())

    def texts(self, start: int = 0) -> Iterator[str]:
        """The texts from a number on, in order."""
        for place in range(start // _BATCH_ROWS, self._last + 1):
            column = self._file.get_batch(place).column(0)
            yield from column.slice(max(0, start - place * _BATCH_ROWS)).to_pylist()
