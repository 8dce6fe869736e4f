"""What the README tells a newcomer to do, to the letter: own questions, own API, a student at the end."""

import csv
import io
import re
import sys
from pathlib import Path

import pytest

from potstill.models import TransformersModel, load

from ..servers import Body, Reply, completion, running_server
from .conftest import Command

README = Path(__file__).parents[2] / "README.md"
_SECTION = re.compile(r"^## Your own questions, your own API\n(.*?)^## ", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README's section."""
    section = _SECTION.search(README.read_text(encoding="utf-8"))
    assert section is not None
    return re.findall(rf"^```{language}\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)


def _answer(body: Body) -> Reply:
    if "model" not in body:  # what the server has is asked by `plan`
        return Reply(body={"object": "list", "data": [{"id": "big-reasoner"}]})
    first, second = re.findall(r"\d+", body["messages"][-1]["content"])
    return Reply(body=completion(f"<think>\n{first} and {second}\n</think>\n\n{int(first) + int(second)}"))


@pytest.mark.slow
def test_the_readmes_recipe_makes_a_student_of_own_questions_and_an_own_api(
    potstill: Command, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", "sk-newcomer-123")
    with (tmp_path / "questions.csv").open("w", encoding="utf-8-sig", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "answer"])
        rows.writerows([f"What is {n} + 7, please?", n + 7] for n in range(30))
    [recipe] = blocks("yaml")
    [commands] = blocks("bash")
    with running_server() as server:
        server.always = _answer
        for placeholder, own in {
            "https://api.example.com/v1": server.base_url,
            "smollm2-135m-instruct": str(tiny_model_folder),
        }.items():
            assert placeholder in recipe
            recipe = recipe.replace(placeholder, own)
        # A tiny model says little and slowly finds an end.
        assert recipe.count("max_new_tokens: 1024}") == 1, "the exam's"
        recipe = recipe.replace("max_new_tokens: 1024}", "max_new_tokens: 8}")
        (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
        export, plan, run, chat = (line.split() for line in commands.strip().splitlines())
        assert export[0] == "export"
        printed = ""
        for _, *arguments in (plan, run):
            outcome = potstill(*arguments)
            assert outcome.code == 0, outcome.err + outcome.out
            printed += outcome.err + outcome.out
        asked = [body for body in server.requests if "model" in body]
        assert len(asked) == 30, "each question once, by the run alone"
        assert {body["model"] for body in asked} == {"big-reasoner"}
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-newcomer-123"}
    student = tmp_path / chat[-1]
    assert student.is_dir()
    assert not student.is_symlink()
    assert load(TransformersModel(path=str(student))).model is not None
    assert "right answers" in outcome.out
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 3 + 7, please?\n/quit\n"))
    outcome = potstill(*chat[1:], "--max-new-tokens", 8)
    assert outcome.code == 0, outcome.err + outcome.out
    assert outcome.out.strip(), "an answer"
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20, "artifacts, answers, events, log, report, cards"
    assert all(b"sk-newcomer" not in text for text in [*written, printed.encode()])
