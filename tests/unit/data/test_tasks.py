"""reasoning-gym's entries survive JSON for the library's own scorers, which run no text as a program."""

import json
import subprocess
import sys
from typing import Any

import pytest

from potstill.core.errors import DataError
from potstill.data.tasks import check_task, score_task_answer, task_rows

# Their scorers compare numbers, text, or what JSON has no word for: tuples.
TASKS = ("chain_sum", "leg_counting", "rearc", "knights_knaves", "rotate_matrix")


def rows(name: str, **parameters: Any) -> list[dict[str, Any]]:
    return list(task_rows(name, parameters, 3, 5))


@pytest.mark.parametrize("name", TASKS)
def test_the_gold_answer_gets_full_marks_after_json_and_another_does_not(name: str) -> None:
    for row in rows(name):
        meta = json.loads(json.dumps(row["meta"]))
        assert score_task_answer(name, row["answer"], row["answer"], meta)
        assert not score_task_answer(name, "no idea", row["answer"], meta)


def test_a_task_with_many_right_answers_is_scored_without_a_gold_one() -> None:
    [row, *_] = rows("graph_color")
    meta = json.loads(json.dumps(row["meta"]))
    assert row["answer"] is None
    right = json.dumps({str(vertex): colour for vertex, colour in meta["possible_answer"]["__items__"]})
    assert score_task_answer("graph_color", right, None, meta)
    assert not score_task_answer("graph_color", "{}", None, meta)


def test_scores_use_the_parameters_that_made_the_problem() -> None:
    for row in rows("decimal_arithmetic", min_num_decimal_places=2, max_num_decimal_places=2):
        assert row["meta"]["task_parameters"] == {"min_num_decimal_places": 2, "max_num_decimal_places": 2}
        assert score_task_answer("decimal_arithmetic", row["answer"], row["answer"], row["meta"])


@pytest.mark.parametrize("name", ["countdown", "string_insertion", "polynomial_multiplication", "n_queens"])
@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w')",
        "__import__('pathlib').Path({path!r}).touch()",
        "[open({path!r}, 'w')]",
        "().__class__.__bases__[0].__subclasses__()",
        "exec(chr(49))",
    ],
)
def test_no_answer_is_run_as_a_program(tmp_path: Any, name: str, program: str) -> None:
    path = tmp_path / "made"
    [row, *_] = rows(name)
    assert not score_task_answer(name, program.format(path=str(path)), row["answer"], row["meta"])
    assert not path.exists()


def test_formulas_are_still_scored() -> None:
    for row in rows("countdown"):
        assert score_task_answer("countdown", row["answer"], None, row["meta"])


def test_an_unknown_task_is_met_with_the_nearest() -> None:
    with pytest.raises(DataError, match="no task 'countdwn'") as caught:
        check_task("countdwn", {}, 1)
    assert "did you mean countdown" in str(caught.value)
    with pytest.raises(DataError, match="no task 'countdwn'"):
        score_task_answer("countdwn", "1", "1", {})


def test_without_pycosat_only_the_task_that_solves_with_it_fails() -> None:
    code = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pycosat" else found(name, *rest)
sys.modules.pop("pycosat", None)
from potstill.core.errors import DataError
from potstill.data.tasks import task_rows
assert len(list(task_rows("chain_sum", {}, 2, 1))) == 2
assert "pycosat" not in sys.modules
try:
    list(task_rows("zebra_puzzles", {}, 1, 1))
except DataError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert "needs pycosat" in done.stdout
