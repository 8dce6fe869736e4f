"""Records survive Parquet unchanged, in order and in constant memory."""

from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.alternatives import Alternatives
from potstill.core.errors import DataError
from potstill.core.records import Record, count_records, prompt_identity, read_records, write_records

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LOGPROB = st.floats(-50, 0, width=32) | st.just(float("-inf"))


def alternatives(token: st.SearchStrategy[object], *, as_ids: bool) -> st.SearchStrategy[Alternatives]:
    places = st.lists(st.lists(st.tuples(token, LOGPROB), max_size=3), max_size=3)
    return places.map(lambda found: Alternatives.of(found, as_ids=as_ids))


ALTERNATIVES = alternatives(st.integers(0, 2**31 - 1), as_ids=True) | alternatives(
    st.binary(max_size=4), as_ids=False
)
RECORDS = st.builds(
    Record,
    prompt_id=TEXT,
    messages=st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": TEXT}), max_size=2),
    held_out=st.booleans(),
    response=st.none() | TEXT,
    sample=st.integers(0, 100),
    response_token_ids=st.none() | st.lists(st.integers(0, 200_000), max_size=5),
    logprobs=st.none() | st.lists(st.floats(-50, 0, width=32), max_size=5),
    alternatives=st.none() | ALTERNATIVES,
    sampling=st.dictionaries(TEXT, st.integers() | st.floats(0, 2) | TEXT, max_size=3),
    verdicts=st.dictionaries(TEXT, st.booleans(), max_size=3),
)


@settings(max_examples=50)
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


def test_records_of_an_artifact_made_before_there_were_alternatives_are_read(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    write_records(path, [Record("p", [], response="x", logprobs=[-1.0])])
    table = pq.read_table(path)
    pq.write_table(table.drop_columns("alternatives"), path)
    [record] = read_records(path)
    assert (record.response, record.logprobs, record.alternatives) == ("x", [-1.0], None)


def test_alternatives_are_small_on_disk_and_never_many_in_memory_at_once(tmp_path: Path) -> None:
    place = [(id_, -float(id_)) for id_ in range(20)]
    many = Alternatives.of([place] * 1000, as_ids=True)
    path = tmp_path / "records.parquet"
    write_records(path, (Record(str(number), [], alternatives=many) for number in range(200)))
    file = pq.ParquetFile(path)
    assert file.metadata.num_row_groups == 4  # of a million alternatives each, not of all 200 rows
    assert path.stat().st_size < 200 * 1000 * 20  # a byte an alternative; as JSON they are 20
    assert all(record.alternatives == many for record in read_records(path))


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


def test_a_file_that_was_damaged_is_refused_wherever_its_values_are(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    write_records(
        path, (Record(f"p{n}", [{"role": "user", "content": f"q{n}"}], response="r") for n in range(9))
    )
    data, records = path.read_bytes(), list(read_records(path))
    found = 0
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with suppress(DataError):
            found += list(read_records(path)) != records
    assert found <= 0.01 * len(data) / 7, "but for headers of pages, which Parquet has no checksum of"
    path.write_bytes(data[:-20])
    with pytest.raises(DataError, match="cannot be read as records"):
        count_records(path)


def test_a_row_that_potstill_did_not_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    write_records(path, [Record("p", [])])
    table = pq.read_table(path)
    for damaged in (
        table.drop_columns(["meta"]),
        table.append_column("other", [["x"]]),
        table.set_column(table.schema.get_field_index("meta"), "meta", [["{"]]),
    ):
        pq.write_table(damaged, path)
        with pytest.raises(DataError, match=r"records\.parquet: cannot be read as records"):
            list(read_records(path))
