"""The load of a mixture's experts in a report: a map, a sentence, a table; nothing of a dense student."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potstill.report import RunView
from potstill.report.experts import expert_section, load_map
from potstill.report.page import write_report

BEFORE = {"model.layers.0.mlp.gate": [40, 40, 40, 40], "model.layers.3.mlp.gate": [160, 0, 0, 0]}
AFTER = {"model.layers.0.mlp.gate": [10, 20, 50, 80], "model.layers.3.mlp.gate": [120, 40, 0, 0]}


def with_load(run: RunView, *loads: Any) -> RunView:
    points = [{"step": 10 * place, "counts": load} for place, load in enumerate(loads)]
    steps = []
    for step in run.steps:
        if step.kind == "train":
            assert step.manifest is not None
            metrics = {**step.manifest.metrics, "expert_load": points}
            step = replace(step, manifest=step.manifest.model_copy(update={"metrics": metrics}))
        steps.append(step)
    return replace(run, steps=steps)


def section(run: RunView) -> Any:
    (step,) = [step for step in run.steps if step.kind == "train"]
    return expert_section(run, step)


def test_a_sentence_says_how_many_are_dead_how_even_the_load_is_and_which_is_the_busiest(
    build_run: Callable[..., RunView],
) -> None:
    said, note = section(with_load(build_run(), BEFORE, AFTER))["findings"]
    assert said == (
        "2 of 8 experts in 2 layers are dead after training, 3 before; the load's entropy is 0.615, 0.500 "
        "before, where 1 is even. The busiest, expert 0 of layer 3, has 3.0 times its even share."
    )
    assert "160 choices a layer" in note


def test_a_table_has_each_layer_before_and_after(build_run: Callable[..., RunView]) -> None:
    found = section(with_load(build_run(), BEFORE, AFTER))
    assert found["head"][:3] == ["layer", "entropy before training", "entropy after training"]
    assert found["rows"] == [
        ["0", "1.000", "0.825", "0 of 4", "0 of 4", "1.0", "2.0"],
        ["3", "0.000", "0.406", "3 of 4", "2 of 4", "4.0", "3.0"],
    ]


def squares(svg: str) -> dict[str, int]:
    """How many cells there are of each style, the legend's own left out."""
    found: dict[str, int] = {}
    for style, path in re.findall(r'<path style="([^"]+)" d="([^"]+)"', svg):
        found[style] = found.get(style, 0) + path.count("M")
    return {style: count - 1 for style, count in found.items() if count > 1}


def test_the_map_has_a_cell_an_expert_and_layer_darker_the_more_it_has_and_dead_ones_apart() -> None:
    # In multiples of an even share: 1, 1, 1, 1 and 4, dead, dead, dead.
    assert squares(load_map("title", BEFORE)) == {
        "fill:var(--series-1);fill-opacity:0.38": 4,
        "fill:var(--series-1);fill-opacity:0.8": 1,
        "fill:var(--series-2)": 3,
    }


def test_a_map_of_a_large_mixture_stays_small() -> None:
    load = {
        f"model.layers.{layer}.mlp.gate": [layer + expert for expert in range(128)] for layer in range(48)
    }
    svg = load_map("title", load)
    assert sum(squares(svg).values()) == 48 * 128
    assert len(svg) < 200_000
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())  # type: ignore[union-attr]
    assert height < 0.75 * width
    assert svg.count("<text") < 50


def test_the_map_is_escaped() -> None:
    assert "<b>" not in load_map("<b>", {"<b>": [1, 2]})


def test_the_page_shows_it_and_nothing_of_a_dense_student(
    build_run: Callable[..., RunView], tmp_path: Path
) -> None:
    def written(run: RunView) -> str:
        write_report(run, tmp_path / "report.html")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    run = build_run()
    assert section(run) is None
    assert "Load of the experts" not in written(run)
    page = written(with_load(run, BEFORE, AFTER))
    assert "Load of the experts before training" in page
    assert "Load of the experts after training" in page
    assert "2 of 8 experts in 2 layers are dead" in page


def test_an_unfinished_training_shows_what_its_events_tell(build_run: Callable[..., RunView]) -> None:
    run = build_run()
    name = next(step.name for step in run.steps if step.kind == "train")
    events = [
        {"event": "step_started", "step": name, "fingerprint": "a"},
        *(
            {"event": "expert_load", "step": name, "optimiser_step": step, "counts": load}
            for step, load in ((0, BEFORE), (5, BEFORE), (9, AFTER))
        ),
    ]
    steps = [replace(step, manifest=None) if step.name == name else step for step in run.steps]
    found = section(replace(run, steps=steps, events=events))
    assert "2 of 8 experts in 2 layers are dead so far, 3 before" in found["findings"][0]
    assert [chart["title"] for chart in found["charts"]] == [
        "Load of the experts before training",
        "Load of the experts so far",
    ]
    again = [*events, {"event": "step_started", "step": name, "fingerprint": "b"}]
    assert section(replace(run, steps=steps, events=again)) is None, "the settings are others now"


@pytest.mark.parametrize("counts", [[0, 0], [3]])
def test_a_router_of_which_nothing_is_known_breaks_nothing(
    build_run: Callable[..., RunView], counts: list[int]
) -> None:
    assert section(with_load(build_run(), {"gate": counts}))["rows"][0][0] == "0"
