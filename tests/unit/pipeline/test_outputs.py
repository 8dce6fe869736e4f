"""What a run hands out: files of the user's own, under names that hide nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import RecipeError, StoreError
from potstill.core.records import RECORDS_FILE, Record, write_records
from potstill.core.store import MANIFEST_FILE, MODEL_CARD_FILE, Artifact, Store
from potstill.pipeline.graph import Graph
from potstill.pipeline.outputs import Output, check_output, write_outputs
from potstill.recipe import load_recipe


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "models: {m: {path: some/model}}\n"
        "steps:\n"
        "  traces: {do: generate, model: m, data: {task: chain_sum, size: 4}}\n"
        "  student: {do: train, student: m, data: traces}\n"
        "  exam: {do: evaluate, models: {student: student}, data: traces}\n",
        encoding="utf-8",
    )
    return load_recipe(str(path)).graph


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("student", Output("x", "student", None)),
        ("exam:metrics", Output("x", "exam", "metrics")),
        ("student:settings", Output("x", "student", "settings")),
        ("traces:openthoughts", Output("x", "traces", "openthoughts")),
        ("run:log", Output("x", "run", "log")),
        ("run:recipe", Output("x", "run", "recipe")),
    ],
)
def test_a_step_a_view_of_it_and_the_run_can_be_handed_out(graph: Graph, source: str, output: Output) -> None:
    assert check_output("x", source, graph, "here") == output


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("x", "studnet", "did you mean 'student'"),
        ("x", "exam:metric", "did you mean 'metrics'"),
        ("x", "run", "run:log or recipe"),
        ("x", "run:metrics", "no view"),
        ("x", "student:question_answer", "a step of kind generate or select"),
        ("x", ["student"], "is no text"),
        ("student", "student", "stands in the run folder already"),
        ("report.html", "student", "stands in the run folder already"),
        ("run.log/x", "student", "stands in the run folder already"),
        ("../x", "student", "leads out of the run folder"),
        ("/x", "student", "leads out of the run folder"),
        ("", "student", "leads out of the run folder"),
        (1, "student", "the name 1 is no text"),
    ],
)
def test_a_wrong_output_is_told_with_its_place(graph: Graph, name: Any, source: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        check_output(name, source, graph, "recipe.yaml:7")
    assert "recipe.yaml:7" in str(caught.value)


@pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a"), ("a", "./a"), ("a/b/c", "a/b")])
def test_one_output_may_not_lie_in_another(tmp_path: Path, first: str, second: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "models: {m: {path: some/model}}\n"
        "steps:\n  traces: {do: generate, model: m, data: {task: chain_sum, size: 4}}\n"
        f"outputs:\n  {first}: traces\n  {second}: traces:settings\n",
        encoding="utf-8",
    )
    with pytest.raises(RecipeError, match="or one lies in the other") as caught:
        load_recipe(str(path))
    assert "recipe.yaml:6" in str(caught.value)
    path.write_text(
        path.read_text(encoding="utf-8").replace(f"  {second}: traces:", "  ab: traces:"), encoding="utf-8"
    )
    assert [one.name for one in load_recipe(str(path)).outputs] == [first, "ab"]


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    return _artifact(
        tmp_path / "store", "train", "a" * 64, {"model.safetensors": "weights", "sub/x.txt": "x"}
    )


def _artifact(
    root: Path, kind: str, fingerprint: str, files: dict[str, str], views: list[str] | None = None
) -> Artifact:
    store = Store(root)
    folder = store.prepare(kind, fingerprint)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return store.seal(
        folder,
        kind=kind,
        fingerprint=fingerprint,
        settings={"do": kind, "lr": 1e-4},
        seed=3,
        seconds=1.0,
        metrics={"loss": 0.5},
        extra={"views": views} if views else {},
    )


def write(folder: Path, made: dict[str, Artifact], **outputs: tuple[str, str | None]) -> None:
    declared = [Output(name, step, view) for name, (step, view) in outputs.items()]
    write_outputs(folder, declared, made, {"name": "small"})


def test_a_folder_is_a_copy_that_outlives_the_artifact_and_may_be_changed(
    tmp_path: Path, model: Artifact
) -> None:
    write(tmp_path / "run", {"student": model}, final_model=("student", None))
    copy = tmp_path / "run" / "final_model"
    (copy / "model.safetensors").write_text("changed", encoding="utf-8")
    assert (model.folder / "model.safetensors").read_text(encoding="utf-8") == "weights"
    assert not any(path.is_symlink() for path in [copy, *copy.rglob("*")])
    assert (copy / "sub" / "x.txt").read_text(encoding="utf-8") == "x"


def test_a_copy_that_is_up_to_date_is_left_alone_and_an_old_one_renewed(
    tmp_path: Path, model: Artifact
) -> None:
    folder = tmp_path / "run"
    write(folder, {"student": model}, final_model=("student", None))
    kept = folder / "final_model" / "of_the_user.txt"
    kept.write_text("mine", encoding="utf-8")
    write(folder, {"student": model}, final_model=("student", None))
    assert kept.is_file()
    (model.folder / MODEL_CARD_FILE).write_text("a new card", encoding="utf-8")
    write(folder, {"student": model}, final_model=("student", None))
    assert (folder / "final_model" / MODEL_CARD_FILE).read_text(encoding="utf-8") == "a new card"
    other = _artifact(tmp_path / "store", "train", "b" * 64, {"model.safetensors": "others"})
    write(folder, {"student": other}, final_model=("student", None))
    assert (folder / "final_model" / "model.safetensors").read_text(encoding="utf-8") == "others"
    assert sorted(path.name for path in folder.iterdir()) == ["final_model"], "no half copy is left"


def test_an_epoch_is_a_whole_model_and_another_epoch_takes_its_place(tmp_path: Path) -> None:
    files = {"model.safetensors": "last", "epoch1/model.safetensors": "1", "epoch2/model.safetensors": "2"}
    made = _artifact(tmp_path / "store", "train", "d" * 64, files, views=["epoch1", "epoch2"])
    weights = {}
    for view in ("epoch1", "epoch2", None):
        write(tmp_path / "run", {"student": made}, model=("student", view))
        copy = Artifact.open(tmp_path / "run" / "model")
        assert copy.damage() is None
        assert copy.views == []
        assert copy.manifest.content == made.content_of(view)
        weights[view] = (copy.folder / "model.safetensors").read_text(encoding="utf-8")
        assert sorted(path.name for path in copy.folder.iterdir()) == ["manifest.json", "model.safetensors"]
    assert weights == {"epoch1": "1", "epoch2": "2", None: "last"}


def test_a_folder_of_the_users_is_not_replaced(tmp_path: Path, model: Artifact) -> None:
    kept = tmp_path / "run" / "final_model" / "weights.bin"
    kept.parent.mkdir(parents=True)
    kept.write_text("precious", encoding="utf-8")
    with pytest.raises(StoreError, match="is there already"):
        write(tmp_path / "run", {"student": model}, final_model=("student", None))
    assert kept.read_text(encoding="utf-8") == "precious"


def test_what_was_not_made_is_not_handed_out(tmp_path: Path, model: Artifact) -> None:
    write(tmp_path / "run", {"student": model}, final_model=("student", None), results=("exam", "metrics"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["final_model"]


def test_views_are_json_and_rows(tmp_path: Path, model: Artifact) -> None:
    (tmp_path / "rows").mkdir()
    asked = [{"role": "user", "content": "3 * 2?"}]
    said = ["<think>\nthree twos\n</think>\n\n6", None, "cut off"]
    ends = ["stop", "stop", "length"]
    records = [
        Record(f"p{n}", asked, response=text, finish_reason=end)
        for n, (text, end) in enumerate(zip(said, ends, strict=True))
    ]
    store = Store(tmp_path / "store")
    place = store.prepare("generate", "c" * 64)
    write_records(place / RECORDS_FILE, records)
    traces = store.seal(place, kind="generate", fingerprint="c" * 64, settings={}, seed=3, seconds=1.0)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.log").write_text("2026-01-01 00:00:00  hello\n", encoding="utf-8")
    write(
        folder,
        {"student": model, "traces": traces},
        config=("student", "settings"),
        results=("student", "metrics"),
        recipe=("run", "recipe"),
        log=("run", "log"),
        rows=("traces", "question_answer"),
    )
    settings = json.loads((folder / "config").read_text(encoding="utf-8"))
    assert (settings["lr"], settings["seed"], settings["fingerprint"]) == (1e-4, 3, "a" * 64)
    assert json.loads((folder / "results").read_text(encoding="utf-8")) == {"loss": 0.5}
    assert json.loads((folder / "recipe").read_text(encoding="utf-8")) == {"name": "small"}
    assert (folder / "log").read_text(encoding="utf-8").endswith("hello\n")
    (row,) = map(json.loads, (folder / "rows").read_text(encoding="utf-8").splitlines())
    assert row == {"question": "3 * 2?", "answer": said[0]}


def test_a_disk_that_does_not_take_it_is_told(
    tmp_path: Path, model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    with pytest.raises(StoreError, match=r"final_model.*No space left on device"):
        write(tmp_path / "run", {"student": model}, final_model=("student", None))
    assert (model.folder / MANIFEST_FILE).is_file()
