"""References lead to steps, models or paths; what leads nowhere is refused with the nearest name."""

import pytest

from potstill.core.errors import RecipeError
from potstill.core.settings import DataRef, ModelRef, ModelsRef, Settings
from potstill.pipeline.graph import Graph, Node


class Makes(Settings):
    """Settings of a made-up step that needs data and a model."""

    data: DataRef | None = None
    model: ModelRef | None = None


def node(name: str, kind: str, values: dict[str, str] | None = None, **needs: str) -> Node:
    base = name.partition("[")[0]
    return Node(name, base, kind, Makes.model_validate(needs), values or {}, f"r.yaml:{len(name)}")


def graph(*nodes: Node, models: tuple[str, ...] = ()) -> Graph:
    return Graph({one.name: one for one in nodes}, {name: Settings() for name in models})


def test_steps_run_behind_what_they_need() -> None:
    made = graph(
        node("exam", "evaluate", model="student"),
        node("student", "train", data="traces"),
        node("traces", "generate"),
    )
    assert made.order == ["traces", "student", "exam"]
    assert made.ancestors("exam") == {"student", "traces"}


def test_a_circle_is_named() -> None:
    with pytest.raises(RecipeError, match="a -> b -> a"):
        graph(node("a", "train", model="b"), node("b", "train", model="a"))


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"data": "trace"}, "did you mean 'traces'"),
        ({"model": "studnet"}, "did you mean 'student'"),
        ({"data": "traces:held"}, "did you mean 'held_out'"),
        ({"data": "student"}, "wants prompts, traces or logits"),
        ({"model": "traces"}, "wants a model"),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused_with_a_hint(needs: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        graph(node("traces", "generate"), node("student", "train"), node("x", "train", **needs))


def test_a_path_needs_no_step() -> None:
    assert graph(node("x", "train", model="./somewhere", data="runs/a/traces")).needs == {"x": []}


def test_steps_with_the_same_each_key_pair_up_and_others_get_all() -> None:
    made = graph(
        node("traces[math]", "generate", {"category": "math"}),
        node("traces[science]", "generate", {"category": "science"}),
        node("expert[math]", "train", {"category": "math"}, data="traces"),
        node("expert[science]", "train", {"category": "science"}, data="traces"),
        node("student", "train", data="traces"),
        node("picked", "train", data="traces[science]"),
    )
    assert made.needs["expert[math]"] == ["traces[math]"]
    assert made.needs["expert[science]"] == ["traces[science]"]
    assert made.needs["student"] == ["traces[math]", "traces[science]"]
    assert made.needs["picked"] == ["traces[science]"]


def test_one_model_is_wanted_where_a_reference_means_several() -> None:
    with pytest.raises(RecipeError, match="means several models"):
        graph(
            node("expert[a]", "train", {"k": "a"}),
            node("expert[b]", "train", {"k": "b"}),
            node("x", "train", model="expert"),
        )


class Joins(Settings):
    """Settings of a made-up step that takes several models."""

    models: ModelsRef | list[ModelsRef]


def test_where_several_models_are_wanted_a_step_with_each_means_all_of_its_own() -> None:
    experts = [node(f"expert[{one}]", "train", {"k": one}) for one in "ab"]
    joined = Node("joined", "joined", "merge", Joins.model_validate({"models": "expert"}))
    one = Node("one", "one", "merge", Joins.model_validate({"models": ["expert[b]", "./a/folder"]}))
    own = Node("own[a]", "own", "merge", Joins.model_validate({"models": "expert"}), {"k": "a"})
    needs = graph(*experts, joined, one, own).needs
    assert needs["joined"] == ["expert[a]", "expert[b]"]
    assert needs["one"] == ["expert[b]"]
    assert needs["own[a]"] == ["expert[a]"]


class Trains(Makes):
    """Settings of a made-up step that keeps two epochs' models."""

    def refuses_view(self, view: str) -> str | None:
        return None if view in ("epoch1", "epoch2") else "the step trains 2 epochs"


def test_an_epoch_of_a_model_needs_the_step_that_keeps_it() -> None:
    trained = Node("student", "student", "train", Trains())
    assert graph(trained, node("exam", "evaluate", model="student:epoch2")).needs["exam"] == ["student"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("student:epoch3", "'student', and the step trains 2 epochs"),
        ("student:held_out", "asks for the view 'held_out' of a model"),
        ("student:epoch0", "asks for the view 'epoch0' of a model"),
        ("pruned:epoch1", "'pruned', and a step of kind init has none"),
        ("big:epoch1", "a declared model has none"),
    ],
)
def test_an_epoch_that_no_step_will_keep_is_refused(reference: str, message: str) -> None:
    steps = Node("student", "student", "train", Trains()), node("pruned", "init")
    with pytest.raises(RecipeError, match=message):
        graph(*steps, node("exam", "evaluate", model=reference), models=("big",))
