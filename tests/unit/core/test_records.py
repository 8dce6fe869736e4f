"""Records survive Parquet unchanged, in order and in constant memory."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.errors import DataError
from potstill.core.records import Record, count_records, prompt_identity, read_records, write_records

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
RECORDS = st.builds(
    Record,
    prompt_id=TEXT,
    messages=st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": TEXT}), max_size=2),
    held_out=st.booleans(),
    response=st.none() | TEXT,
    sample=st.integers(0, 100),
    response_token_ids=st.none() | st.lists(st.integers(0, 200_000), max_size=5),
    logprobs=st.none() | st.lists(st.floats(-50, 0, width=32), max_size=5),
    sampling=st.dictionaries(TEXT, st.integers() | st.floats(0, 2) | TEXT, max_size=3),
    verdicts=st.dictionaries(TEXT, st.booleans(), max_size=3),
)


@settings(max_examples=50, deadline=None)
@given(records=st.lists(RECORDS, max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> None:
    path = tmp_path_factory.mktemp("records") / "records.parquet"
    assert write_records(path, iter(records)) == len(records) == count_records(path)
    assert list(read_records(path)) == records


def test_many_records_are_read_a_row_group_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    write_records(path, (Record(prompt_id=str(i), messages=[]) for i in range(3000)))
    assert pq.ParquetFile(path).metadata.num_row_groups > 1
    assert [record.prompt_id for record in read_records(path)] == [str(i) for i in range(3000)]


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_records(tmp_path / name, [Record(prompt_id="p", messages=[], meta={"b": 1, "a": 2})])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_id_tells_samples_and_responses_of_a_prompt_apart() -> None:
    base = {"prompt_id": prompt_identity("q"), "messages": [{"role": "user", "content": "q"}]}
    records = [Record(**base, response=text, sample=n) for text, n in (("a", 0), ("a", 1), ("b", 0))]  # type: ignore[arg-type]
    assert len({record.id for record in records}) == 3


def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    path.write_text("hello", encoding="utf-8")
    with pytest.raises(DataError, match=r"records\.parquet"):
        list(read_records(path))
