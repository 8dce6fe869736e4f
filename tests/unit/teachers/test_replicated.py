"""A generate step whose model has copies makes what one makes, and each goes on with the other's answers."""

import asyncio
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import EngineError
from potstill.core.hashing import hash_file
from potstill.core.records import RECORDS_FILE
from potstill.core.settings import Settings
from potstill.core.step import StepContext, StepResult
from potstill.data.chat import Renderer
from potstill.generate import GenerateSettings, run
from potstill.models import TransformersModel
from potstill.teachers import OpenAIModel, SolverModel
from potstill.teachers.replicated import TeacherReplica, is_replicated, open_copies

from ...copies import CopiesHere
from ...servers import running_server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": f"question {number}"}) for number in range(20)), encoding="utf-8"
    )
    return path


class Kitchen:
    def __init__(self, step_context: Any, model: Settings, prompts: Path) -> None:
        self.step_context, self.model, self.prompts = step_context, model, prompts
        self.context: StepContext

    def run(self, folder: str, copies: CopiesHere | None = None, **fields: Any) -> StepResult:
        self.context = self.step_context("generate", folder=folder, models={"big": self.model})
        self.context.replicas = copies
        data = {"path": str(self.prompts)}
        settings = {"do": "generate", "model": "big", "data": data, "max_new_tokens": 6, **fields}
        return run(GenerateSettings.model_validate(settings), self.context)

    def hash(self) -> str:
        return hash_file(self.context.folder / RECORDS_FILE)


@pytest.fixture
def local(step_context: Any, shared_model_folder: Path, prompts: Path) -> Kitchen:
    model = TransformersModel(path=str(shared_model_folder), device="cpu", dtype="float32")
    return Kitchen(step_context, model, prompts)


def test_copies_make_the_same_traces_as_one_model(local: Kitchen, tmp_path: Path) -> None:
    copies = CopiesHere(2)
    found = local.run("two", copies, temperature=0.8, concurrency=4)
    two = local.hash()
    assert sum(copies.jobs) == 20
    assert all(copies.jobs)
    assert (copies.opened, copies.closed) == (1, 1)
    for store in tmp_path.glob("store/requests/*.sqlite*"):
        store.unlink()
    one = local.run("one", temperature=0.8, concurrency=4)
    assert one.counts == found.counts
    assert (one.counts["reused"], one.tokenizer, one.model_identity) == (
        0,
        found.tokenizer,
        found.model_identity,
    )
    assert local.hash() == two


@pytest.mark.parametrize("copies_first", [True, False])
def test_one_goes_on_with_what_the_other_has_answered(local: Kitchen, copies_first: bool) -> None:
    first, second = (CopiesHere(2), None) if copies_first else (None, CopiesHere(3))
    local.run("some", first, limit=12)
    assert local.run("all", second).counts["reused"] == 12
    again = CopiesHere(2)
    assert local.run("again", again).counts["reused"] == 20
    assert sum(again.jobs) == 0


@pytest.mark.parametrize(("concurrency", "count", "each"), [(6, 2, [3, 3]), (2, 4, [1, 1]), (5, 2, [2, 2])])
def test_a_server_is_asked_through_copies_with_one_number_in_flight_for_all(
    step_context: Any, prompts: Path, concurrency: int, count: int, each: list[int]
) -> None:
    with running_server() as server:
        model = OpenAIModel(engine="openai", base_url=server.base_url, model="m")
        copies = CopiesHere(count)
        found = Kitchen(step_context, model, prompts).run("artifact", copies, concurrency=concurrency)
    assert found.counts["records"] == 20
    assert sum(map(bool, copies.jobs)) == len(each)
    assert server.most_under_way <= concurrency
    assert [one._teacher._settings.concurrency for one in copies.made] == each  # type: ignore[attr-defined]


def test_a_solver_has_no_copies() -> None:
    assert not is_replicated(SolverModel(engine="solver", function="some:function"))


def test_copies_of_another_model_than_this_machines_are_refused_and_ended(
    shared_model_folder: Path, tmp_path: Path, build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    other = tmp_path / "other"
    build_tiny_model("llama", seed=5).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    here = TransformersModel(path=str(shared_model_folder), device="cpu")

    def open_them(copies: CopiesHere, model: TransformersModel) -> None:
        asyncio.run(open_copies(copies, TeacherReplica, (model, None), here, Renderer(tiny_tokenizer)))

    copies = CopiesHere(2)
    open_them(copies, here)
    assert (copies.opened, copies.closed) == (1, 0)
    copies = CopiesHere(2)
    with pytest.raises(EngineError, match="model differ from this machine's"):
        open_them(copies, TransformersModel(path=str(other), device="cpu"))
    assert (copies.opened, copies.closed) == (1, 1)


@pytest.mark.parametrize("library", ["potstill", "transformers", "torch"])
@pytest.mark.parametrize(("there", "is_refused"), [("0.0.1", True), ("{here}+cu999", False)])
def test_copies_with_another_version_of_a_library_are_refused_and_another_build_of_it_is_not(
    shared_model_folder: Path,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    there: str,
    is_refused: bool,
) -> None:
    here = metadata.version
    version = here(library).partition("+")[0]

    class Elsewhere(CopiesHere):
        """On machines that have another version."""

        async def open(self, *arguments: Any, **options: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(
                    metadata,
                    "version",
                    lambda name: there.format(here=version) if name == library else here(name),
                )
                return await super().open(*arguments, **options)

    model, copies = TransformersModel(path=str(shared_model_folder), device="cpu"), Elsewhere(2)
    opening = open_copies(copies, TeacherReplica, (model, None), model, Renderer(tiny_tokenizer))
    if is_refused:
        told = rf"{library} differ from this machine's \({library} 0.0.1 there, {version} here\)"
        with pytest.raises(EngineError, match=told):
            asyncio.run(opening)
    else:
        asyncio.run(opening)
    assert copies.closed == is_refused
