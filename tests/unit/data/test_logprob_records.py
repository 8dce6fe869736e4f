"""Released log-probabilities find their responses by id."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.source_settings import LogprobRecords
from potstill.data.sources import FileSource, read
from potstill.models import tokenizer_hash

from ...rows import write_rows

ANSWER = "<think>\nFirst 12 + 7 = 19\n</think>\n\nThe answer is 19."


def record(number: int, ids: list[int], logprob: float = -1.0) -> dict[str, Any]:
    """What is released beside a row: its response's ids, each as probable as the others."""
    return {"sample_uuid": f"u{number}", "token_ids": ids, "logprobs": [logprob] * len(ids)}


@pytest.fixture
def samples(tmp_path: Path) -> str:
    """Rows in the columns of the released data."""
    rows = [
        {
            "uuid": f"u{number}",
            "input": f"question {number}",
            "output": ANSWER,
            "domain": "math",
            "meta": "{}",
        }
        for number in range(3)
    ]
    return write_rows(tmp_path / "stage1.jsonl", rows)


@pytest.fixture
def ids(tiny_tokenizer: Any) -> list[int]:
    found: list[int] = tiny_tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    return found


def read_with(context: Any, samples: str, logprobs: str, tokenizer: Path, **fields: Any) -> list[Record]:
    settings = {
        "path": samples,
        "logprobs": {"file": logprobs, "tokenizer": str(tokenizer), **fields},
    }
    return list(read(FileSource.model_validate(settings), context("read")))


def test_they_join_by_id_whatever_their_order(
    step_context: Any,
    samples: str,
    tmp_path: Path,
    tiny_model_folder: Path,
    tiny_tokenizer: Any,
    ids: list[int],
) -> None:
    records = [record(number, ids, -0.25 * (number + 1)) for number in (2, 0, 1)]
    found = read_with(
        step_context, samples, write_rows(tmp_path / "l.jsonl", records), tiny_model_folder, temperature=1.0
    )
    assert [one.logprobs for one in found] == [[-0.25 * (number + 1)] * len(ids) for number in range(3)]
    assert [one.messages[-1]["content"] for one in found] == ["question 0", "question 1", "question 2"]
    for one in found:
        assert one.response == ANSWER
        assert (one.reasoning, one.answer) == ("First 12 + 7 = 19", "The answer is 19.")
        assert (one.response_token_ids, one.tokenizer) == (ids, tokenizer_hash(tiny_tokenizer))
        assert one.sampling == {"logprob_temperature": 1.0}
        assert one.meta["domain"] == "math"
        assert sum(one.token_bytes or []) == len(ANSWER.encode())


def test_ids_that_spell_something_else_are_left_aside(
    step_context: Any, samples: str, tmp_path: Path, tiny_model_folder: Path, tiny_tokenizer: Any
) -> None:
    # As channel marks stand where the text has think tags.
    said = "analysis:First 12 + 7 = 19<|im_end|><|im_start|>final:The answer is 19."
    other = tiny_tokenizer(said, add_special_tokens=False)["input_ids"]
    path = write_rows(tmp_path / "l.jsonl", [record(number, other) for number in range(3)])
    for one in read_with(step_context, samples, path, tiny_model_folder):
        assert (one.response_token_ids, one.tokenizer) == (None, None)
        assert one.logprobs == [-1.0] * len(other)
        assert one.sampling == {"logprob_temperature": None}
        assert sum(one.token_bytes or []) == len(ANSWER.encode()), "every token has its place in the text"


def test_the_end_of_the_turn_is_no_part_of_the_response(
    step_context: Any,
    samples: str,
    tmp_path: Path,
    tiny_model_folder: Path,
    tiny_tokenizer: Any,
    ids: list[int],
) -> None:
    ended = [*ids, tiny_tokenizer.eos_token_id]
    path = write_rows(tmp_path / "l.jsonl", [record(number, ended) for number in range(3)])
    for one in read_with(step_context, samples, path, tiny_model_folder):
        assert one.response_token_ids == ids
        assert len(one.logprobs or []) == len(ids)


def test_a_row_without_a_record_is_left_out_and_counted(
    step_context: Any, samples: str, tmp_path: Path, tiny_model_folder: Path, ids: list[int]
) -> None:
    path = write_rows(tmp_path / "l.jsonl", [record(1, ids)])
    context = step_context("read")
    settings = {"path": samples, "logprobs": {"file": path, "tokenizer": str(tiny_model_folder)}}
    assert len(list(read(FileSource.model_validate(settings), context))) == 1
    assert any("2 malformed rows left out" in one for one in context.reporter.said)
    assert any("there are no log-probabilities for uuid 'u0'" in one for one in context.reporter.said)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ({"sample_uuid": "u0", "token_ids": [1, 2]}, "lacks logprobs"),
        ({"sample_uuid": "u0", "token_ids": [1, 2], "logprobs": [-1.0]}, "2 ids and 1 log-probabilities"),
        ({"sample_uuid": "u0", "token_ids": ["a"], "logprobs": [-1.0]}, "cannot be used"),
        ({"sample_uuid": "u0", "token_ids": None, "logprobs": [-1.0]}, "cannot be used"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(
    step_context: Any,
    samples: str,
    tmp_path: Path,
    tiny_model_folder: Path,
    damaged: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_with(step_context, samples, write_rows(tmp_path / "l.jsonl", [damaged]), tiny_model_folder)
    assert "l.jsonl, line 1" in str(caught.value)


def test_a_sample_has_one_record(
    step_context: Any, samples: str, tmp_path: Path, tiny_model_folder: Path, ids: list[int]
) -> None:
    first = record(0, ids)
    same = write_rows(tmp_path / "same.jsonl", [first, first])
    assert len(read_with(step_context, samples, same, tiny_model_folder)) == 1
    other = record(0, ids, -2.0)
    with pytest.raises(DataError, match=r"l\.jsonl, line 2: .*'u0' has other .* in l\.jsonl, line 1"):
        read_with(step_context, samples, write_rows(tmp_path / "l.jsonl", [first, other]), tiny_model_folder)


def test_a_column_that_rows_do_not_have_is_named_with_those_they_have(
    step_context: Any, samples: str, tmp_path: Path, tiny_model_folder: Path, ids: list[int]
) -> None:
    path = write_rows(tmp_path / "l.jsonl", [record(0, ids)])
    with pytest.raises(DataError, match="no column 'id'") as caught:
        read_with(step_context, samples, path, tiny_model_folder, key="id")
    assert "uuid, input, output" in str(caught.value)


@pytest.mark.parametrize("where", [{}, {"file": "./a.jsonl", "hub": "a/b"}])
def test_records_lie_in_one_place(where: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="a file or a data set on the hub"):
        LogprobRecords.model_validate({"tokenizer": "a/b", **where})


def test_another_file_of_records_is_another_meaning(samples: str, tmp_path: Path) -> None:
    from potstill.core.settings import meaning

    def meant(logprob: float) -> Any:
        path = write_rows(
            tmp_path / "l.jsonl", [{"sample_uuid": "u", "token_ids": [1], "logprobs": [logprob]}]
        )
        settings = {"path": samples, "logprobs": {"file": path, "tokenizer": "a/b"}}
        return meaning(FileSource.model_validate(settings))

    assert meant(-1.0) != meant(-2.0)
    assert "l.jsonl" not in json.dumps(meant(-1.0))
