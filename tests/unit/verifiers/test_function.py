"""The user's own verifier: what it is given, what it may give, and that it can stall or break nothing."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.core.settings import meaning
from potstill.verifiers import Verifier, judge
from potstill.verifiers.settings import FunctionVerifier

VERIFIER: TypeAdapter[Any] = TypeAdapter(Verifier)

Written = Callable[..., FunctionVerifier]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """`written(source, **settings)`: the function `right` of a file with this text."""

    def write(source: str, **settings: Any) -> FunctionVerifier:
        (tmp_path / "checks.py").write_text(source, encoding="utf-8")
        found = VERIFIER.validate_python({"function": f"{tmp_path}/checks.py:right", **settings})
        assert isinstance(found, FunctionVerifier)
        return found

    return write


def row(reference: str | None = None, **meta: Any) -> Record:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Name a fruit."}]
    return Record("p", messages, reference=reference, task="math", meta=meta)


def test_it_sees_the_answer_without_its_reasoning_and_the_row(written: Written) -> None:
    verifier = written(
        "def right(answer, row):\n"
        "    assert row['messages'][0]['content'] == 'be brief'\n"
        "    return [answer, row['prompt'], row['reference'], row['meta']['level']] == "
        "['a plum', 'Name a fruit.', 'plum', 3]\n"
    )
    found = judge(row("plum", level=3), "<think>apple?</think>a plum", verifier)
    assert found.verdicts == {"well_formed": True, "correct": True, "judged": True}
    assert not judge(row("plum", level=4), "a plum", verifier).verdicts["correct"]


def test_it_stands_in_the_place_of_the_rows_own_verifier(written: Written) -> None:
    verifier = written("def right(answer, row):\n    return True\n")
    assert judge(row("7"), "8", verifier).verdicts["correct"]


@pytest.mark.parametrize(
    ("given", "correct", "scores"),
    [("1", True, {"score": 1.0}), ("0.5", False, {"score": 0.5}), ("False", False, {}), ("True", True, {})],
)
def test_a_number_is_a_score_of_which_one_is_right(
    written: Written, given: str, correct: bool, scores: dict[str, float]
) -> None:
    found = judge(row(), "?", written(f"def right(answer, row):\n    return {given}\n"))
    assert (found.verdicts["correct"], found.scores) == (correct, scores)


def test_numbers_of_numpy_count_as_numbers(written: Written) -> None:
    verifier = written("import numpy\ndef right(answer, row):\n    return numpy.float32(1) > 0\n")
    assert judge(row(), "?", verifier).verdicts["correct"]


@pytest.mark.parametrize(
    ("body", "note"),
    [
        ("raise KeyError('total')", "KeyError: 'total'"),
        ("return 3", "it gave 3; expected True, False or a number in 0..1"),
        ("return float('nan')", "it gave nan; expected"),
        ("return None", "it gave None; expected"),
        ("import sys; sys.exit(1)", "SystemExit: 1"),
        ("import os; os._exit(1)", "did not end within 10 s, or broke its process"),
        ("raise MemoryError", "MemoryError"),
        ("return type('Odd', (), {'__repr__': None})()", "broke its process"),
        ("return input()", "EOFError"),
    ],
)
def test_where_it_fails_the_row_says_so_and_the_next_row_is_judged(
    written: Written, body: str, note: str
) -> None:
    verifier = written(f"def right(answer, row):\n    if answer == 'ok':\n        return True\n    {body}\n")
    found = judge(row(), "bad", verifier)
    assert found.verdicts["correct"] is found.verdicts["judged"] is False
    assert found.note is not None
    assert note in found.note
    assert judge(row(), "ok", verifier).verdicts == {"well_formed": False, "correct": True, "judged": True}


def test_one_that_does_not_end_is_ended(written: Written) -> None:
    verifier = written("def right(answer, row):\n    while True:\n        pass\n", timeout_s=0.3)
    found = judge(row(), "?", verifier)
    assert found.note == "the verifier did not end within 0.3 s, or broke its process"


def test_its_memory_is_bounded(written: Written) -> None:
    verifier = written("def right(answer, row):\n    return len(bytearray(600 << 20)) > 0\n", memory_mb=512)
    assert judge(row(), "?", verifier).note == "MemoryError: "


def test_what_it_prints_does_not_get_between_the_verdicts(written: Written) -> None:
    verifier = written("print('loaded')\ndef right(answer, row):\n    print('{}')\n    return True\n")
    assert judge(row(), "?", verifier).verdicts["correct"]


def test_what_its_child_processes_print_and_read_does_not_either(written: Written) -> None:
    source = "import subprocess\ndef right(answer, row):\n    return subprocess.run({}).returncode == 0\n"
    for command in (["echo", "{}"], ["cat"]):
        verifier = written(source.format(command))
        assert [judge(row(), one, verifier).verdicts["correct"] for one in "ab"] == [True, True]


def test_one_that_does_not_end_is_ended_with_what_it_started(written: Written, tmp_path: Path) -> None:
    verifier = written(
        "import os, time\ndef right(answer, row):\n    os.fork()\n    time.sleep(60)\n", timeout_s=0.3
    )
    started = time.monotonic()
    assert not judge(row(), "?", verifier).verdicts["judged"]
    assert time.monotonic() - started < 30


def test_it_has_the_users_variables(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUIT", "plum")
    verifier = written("import os\ndef right(answer, row):\n    return os.environ['FRUIT'] == answer\n")
    assert judge(row(), "plum", verifier).verdicts["correct"]


def test_what_stands_beside_its_file_can_be_imported(written: Written, tmp_path: Path) -> None:
    (tmp_path / "fruits.py").write_text("KNOWN = ['plum']\n", encoding="utf-8")
    verifier = written("from fruits import KNOWN\ndef right(answer, row):\n    return answer in KNOWN\n")
    assert judge(row(), "plum", verifier).verdicts["correct"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nowhere\n", "cannot be imported: ModuleNotFoundError"),
        ("def right(:\n", "cannot be imported: SyntaxError"),
        ("def wrong(answer, row):\n    return True\n", "no function 'right'"),
    ],
)
def test_one_that_cannot_be_loaded_ends_the_step(written: Written, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        judge(row(), "?", written(source))


def test_a_missing_file_is_told_before_anything_runs(tmp_path: Path) -> None:
    verifier = VERIFIER.validate_python({"function": f"{tmp_path}/gone.py:right"})
    with pytest.raises(DataError, match="no such file of a verifier"):
        meaning(verifier)


def test_the_files_content_counts_and_its_place_does_not(written: Written, tmp_path: Path) -> None:
    first = meaning(written("def right(answer, row):\n    return True\n"))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "checks.py").rename(moved / "tests.py")
    assert meaning(VERIFIER.validate_python({"function": f"{moved}/tests.py:right"})) == first
    assert meaning(written("def right(answer, row):\n    return False\n")) != first


def test_the_file_is_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text("def right(answer, row):\n    return True\n", encoding="utf-8")
    found = VERIFIER.validate_python({"function": "checks.py:right"}, context={"folders": [tmp_path]})
    assert found.file == tmp_path / "checks.py"


def test_a_module_is_found_by_its_name() -> None:
    found = VERIFIER.validate_python({"function": "json.decoder:JSONDecoder"})
    assert found.file.name == "decoder.py"


@pytest.mark.parametrize("function", ["checks.py", "checks.py:", ":right", "checks.py:not a name"])
def test_a_name_without_file_or_function_is_refused(function: str) -> None:
    with pytest.raises(ValidationError, match=r"expected file\.py:name"):
        VERIFIER.validate_python({"function": function})


@pytest.mark.parametrize("value", [{}, {"allow_code": True, "fields": "all"}, {"unknown": 1}, "math"])
def test_what_is_no_verifier_is_told_what_one_is(value: Any) -> None:
    with pytest.raises(ValidationError, match=r"expected \{function"):
        VERIFIER.validate_python(value)


def test_code_is_allowed_by_saying_so_and_not_by_its_contrary() -> None:
    with pytest.raises(ValidationError, match="allow_code"):
        VERIFIER.validate_python({"allow_code": False})
