import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import EngineError
from potstill.core.records import Record
from potstill.core.settings import meaning
from potstill.teachers import Answer, Request, RequestError, SolverModel, check_teacher, open_teacher

SOURCE = """
def double(record):
    return str(2 * int(record.messages[-1]["content"]))

def broken(record):
    raise KeyError(record.prompt_id)

def silent(record):
    return None

constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module beside the user, who stands in a folder that Python does not import from."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "house_solvers.py"
    path.write_text(SOURCE, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "house_solvers", raising=False)
    return path


def solver(function: str) -> SolverModel:
    return SolverModel(engine="solver", function=function)


def ask(settings: SolverModel, question: str) -> Answer:
    async def run() -> Answer:
        teacher = open_teacher(settings)
        try:
            messages = [{"role": "user", "content": question}]
            return await teacher.answer(Request(messages, record=Record("p", messages)))
        finally:
            await teacher.close()

    return asyncio.run(run())


def test_a_function_of_the_working_folder_answers(module):
    before = list(sys.path)
    assert ask(solver("house_solvers:double"), "21") == Answer("42", "stop")
    assert sys.path == before


def test_what_the_function_raises_is_a_failure_of_the_row(module):
    with pytest.raises(RequestError, match=r"house_solvers:broken failed: KeyError: 'p'") as caught:
        ask(solver("house_solvers:broken"), "1")
    assert caught.value.blames_row
    with pytest.raises(RequestError, match="returned NoneType, not text"):
        ask(solver("house_solvers:silent"), "1")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("house_solvers:gone", "has no function 'gone'"),
        ("house_solvers:constant", "has no function 'constant'"),
        ("no_such_module_here:f", "there is no module"),
        ("no_such_package_here.inner:f", "cannot be imported"),
    ],
)
def test_a_function_that_is_not_there_is_named(module, function, expected):
    with pytest.raises(EngineError, match=expected):
        open_teacher(solver(function))
    assert expected in (check_teacher(solver(function))[0] or "")


def test_a_module_that_fails_on_import_says_how(module):
    module.write_text("import this_module_is_not_there\n", encoding="utf-8")
    with pytest.raises(EngineError, match="ModuleNotFoundError: No module named 'this_module_is_not_there'"):
        open_teacher(solver("house_solvers:double"))


@pytest.mark.parametrize("function", ["double", "a:b:c", "a.b:", "/x/y.py:f"])
def test_only_module_and_function_are_taken(function):
    with pytest.raises(ValueError, match="function"):
        solver(function)


def test_the_fingerprint_changes_with_the_source(module):
    settings = solver("house_solvers:double")
    before: Any = meaning(settings)
    identity = open_teacher(settings).identity
    module.write_text(SOURCE + "# changed\n", encoding="utf-8")
    assert meaning(settings) != before
    assert open_teacher(settings).identity != identity
