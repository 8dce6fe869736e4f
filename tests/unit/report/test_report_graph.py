import re
from collections.abc import Callable

import pytest

from potstill.report import RunView, StepView
from potstill.report.graph import draw_graph

Box = tuple[float, float, float, float]


def _run(*steps: tuple[str, list[str]]) -> RunView:
    return RunView(
        "run", "", [StepView(name, "train", needs, 1.0, False, None, None) for name, needs in steps]
    )


def _boxes(svg: str) -> dict[str, Box]:
    names = re.findall(r"<title>(.*?):", svg)
    rects = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)
    return {
        name: (float(x), float(y), float(w), float(h))
        for name, (x, y, w, h) in zip(names, rects, strict=True)
    }


def _curves(svg: str) -> list[list[tuple[float, float]]]:
    """Points along each edge."""
    edges = []
    for path in re.findall(r'class="edge" d="([^"]+)"', svg):
        numbers = [float(one) for one in re.findall(r"-?[\d.]+", path)]
        points = [(numbers[i], numbers[i + 1]) for i in range(0, len(numbers), 2)]
        along = []
        for start in range(0, len(points) - 1, 3):
            p0, p1, p2, p3 = points[start : start + 4]
            for t in (index / 40 for index in range(41)):
                weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
                along.append(
                    tuple(
                        sum(w * p[i] for w, p in zip(weights, (p0, p1, p2, p3), strict=True)) for i in (0, 1)
                    )
                )
        edges.append(along)
    return edges  # type: ignore[return-value]  # pairs


GRAPHS = {
    "quickstart": [
        ("traces", []),
        ("logits", ["traces"]),
        ("pruned", ["traces"]),
        ("student", ["pruned", "logits"]),
        ("exam", ["pruned", "student", "traces"]),
    ],
    "cascade": [
        ("a", []),
        ("b", []),
        ("c", []),
        ("s1", ["a"]),
        ("s2", ["b"]),
        ("s3", ["c"]),
        ("t", ["s1", "s2", "s3"]),
        ("x", ["a", "t", "s2"]),
    ],
    "chain": [("a", []), ("b", ["a"]), ("c", ["b"]), ("d", ["c", "a"]), ("e", ["d", "a", "b"])],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_steps_stand_right_of_what_they_need_and_no_two_overlap(name: str) -> None:
    run = _run(*GRAPHS[name])
    boxes = _boxes(draw_graph(run))
    assert list(boxes) == [step.name for step in run.steps]
    for step in run.steps:
        for need in step.needs:
            assert boxes[need][0] + boxes[need][2] < boxes[step.name][0]
    placed = list(boxes.values())
    for index, (x, y, _, h) in enumerate(placed):
        for other_x, other_y, _, _ in placed[:index]:
            assert x != other_x or abs(y - other_y) >= h


@pytest.mark.parametrize("name", GRAPHS)
def test_no_edge_runs_through_a_box(name: str) -> None:
    run = _run(*GRAPHS[name])
    svg = draw_graph(run)
    boxes, edges = _boxes(svg), _curves(svg)
    assert len(edges) == sum(len(step.needs) for step in run.steps)
    for along in edges:
        for x, y in along:
            for left, top, width, height in boxes.values():
                assert not (left + 0.5 < x < left + width - 0.5 and top < y < top + height), (x, y)


def test_a_long_name_is_shortened_and_whole_in_its_hint() -> None:
    name = "a-very-long-name-of-a-step-that-does-not-fit"
    svg = draw_graph(_run((name, [])))
    assert f"<title>{name}: train, not run, 1.0 s</title>" in svg
    assert re.search(r'class="name"[^>]*>a-very-long-name-…<', svg)


def test_a_need_outside_of_the_run_is_passed_over(build_run: Callable[..., RunView]) -> None:
    assert _curves(draw_graph(_run(("a", ["elsewhere"])))) == []


def test_a_short_name_with_markup_is_text() -> None:
    svg = draw_graph(_run(("<i>a</i>", [])))
    assert "<i>" not in svg
    assert svg.count("&lt;i&gt;a&lt;/i&gt;") == 2
