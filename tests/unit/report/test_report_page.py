import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from potstill.report import RunView, StepView, write_comparison, write_report

PAYLOAD = "</pre></style><script>alert(1)</script><img src=x onerror=alert(2)>'\"<svg/onload=alert(3)>"

RunBuilder = Callable[..., RunView]


class _Page(HTMLParser):
    """Every tag and attribute of a page, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def _written(run: RunView, folder: Path) -> str:
    write_report(run, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def _assert_inert(text: str) -> None:
    page = _Page(text)
    assert len(page.tags) > 50
    for tag, attributes in page.tags:
        assert tag not in ("script", "img", "iframe", "object", "embed", "link", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action"):
                assert (value or "").startswith("#"), (tag, name, value)
    policy = [one["content"] for tag, one in page.tags if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(
    build_run: RunBuilder, tmp_path: Path
) -> None:
    _assert_inert(_written(build_run(), tmp_path))


def _hostile(build_run: RunBuilder, payload: str) -> RunView:
    """A run with the payload in everything that it shows."""
    run = build_run(payload.replace("/", "_"))
    for step in run.steps:
        assert step.manifest is not None
        step.manifest.settings["note"] = payload
        step.manifest.versions[payload] = payload
    metrics = run.steps[-1].manifest.metrics  # type: ignore[union-attr]  # asserted above
    metrics["models"][payload] = {
        **metrics["models"].pop("student"),
        "tasks": {payload: metrics["models"]["base"]["tasks"]["chain_sum"]},
    }
    metrics["differences"][payload] = metrics["differences"].pop("student")
    metrics["models"][payload]["held_out"]["kl_refused"] = payload
    metrics["machine"][payload] = payload
    samples = [
        {
            "source": payload,
            "record_id": payload,
            "messages": [{"role": payload, "content": payload}],
            "reference": payload,
            "trace": payload,
            "answers": {
                payload: {
                    "response": payload,
                    "finish_reason": payload,
                    "response_tokens": 3,
                    "verdicts": {payload: True, "correct": False},
                }
            },
        }
    ]
    assert run.folder is not None
    (run.folder / "exam" / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    steps = [replace(step, name=f"{step.name}{payload}", kind=step.kind) for step in run.steps]
    events = [
        *run.events[:-1],
        {"event": "step_failed", "step": steps[2].name, "error": payload, "time": 2000.0},
    ]
    return replace(run, steps=steps, recipe_text=run.recipe_text + payload, events=events)


def test_model_text_names_and_settings_are_shown_and_never_become_markup(
    build_run: RunBuilder, tmp_path: Path
) -> None:
    run = _hostile(build_run, PAYLOAD)
    text = _written(run, tmp_path)

    _assert_inert(text)
    shown = _Page(text).text
    assert shown.count("<script>alert(1)</script>") > 15
    write_comparison([run, replace(run, name=PAYLOAD)], tmp_path / "comparison.html")
    _assert_inert((tmp_path / "comparison.html").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_that_opens_it_runs_no_script_of_what_is_shown(
    build_run: RunBuilder, tmp_path: Path
) -> None:
    act = "document.title=1"
    probe = f"</pre></style><script>{act}</script><img src=x onerror={act}>"

    def opened(page: Path) -> str:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command = ["chromium", *options, "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout

    run = _hostile(build_run, probe)
    text = _written(run, tmp_path)
    write_comparison([run, replace(run, name=probe)], tmp_path / "comparison.html")
    for name in ("report.html", "comparison.html"):
        assert "<title>1</title>" not in opened(tmp_path / name)
    unsafe = re.sub(r"<meta[^>]*Content-Security-Policy[^>]*>", "", text).replace(
        "</body>", f"{probe}</body>"
    )
    (tmp_path / "unsafe.html").write_text(unsafe, encoding="utf-8")
    assert "<title>1</title>" in opened(tmp_path / "unsafe.html"), "or else nothing was shown here"


def test_the_same_run_gives_the_same_bytes(build_run: RunBuilder, tmp_path: Path) -> None:
    run = build_run()
    assert _written(run, tmp_path) == _written(run, tmp_path)


def test_ids_are_unique_and_every_reference_inside_the_page_leads_somewhere(
    build_run: RunBuilder, tmp_path: Path
) -> None:
    text = _written(build_run(), tmp_path)
    ids = [attributes["id"] for _, attributes in _Page(text).tags if "id" in attributes]
    assert ids
    assert len(ids) == len(set(ids))
    referred = {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)}
    assert referred
    assert referred <= set(ids)


def test_traces_their_tokens_and_how_they_ended_are_told_of_each_step_that_a_teacher_wrote(
    build_run: RunBuilder, tmp_path: Path
) -> None:
    page = _written(build_run(), tmp_path)
    table = page[page.index("What the teachers wrote") : page.index("How the student was made")]
    [row] = re.findall(r'<tr><th scope="row">traces</th>(.*?)</tr>', table)
    columns, cells = re.findall(r'<th scope="col">([^<]+)</th>', table), re.findall(r"<td>([^<]*)</td>", row)
    told = dict(zip(columns, cells, strict=True))
    expected = {
        "rows": "180",
        "prompts": "180",
        "mean response tokens": "85.1",
        "finish reasons: stop": "63",
        "finish reasons: length": "117",
        "tokens spent": "15,321",
    }
    assert expected.items() <= told.items()


def test_the_answer_comes_first_then_steps_training_results_samples_and_settings(
    build_run: RunBuilder, tmp_path: Path
) -> None:
    text = _Page(_written(build_run(), tmp_path)).text
    order = [
        "The student is closer to its teacher than the base, but not clearly right more often.",
        "KL to the teacher: 6.61 → 1.18 nats (−5.43, 95 % interval −5.71 to −5.16)",
        "Steps",
        "Training",
        "Before and after",
        "Samples side by side",
        "What the teachers wrote",
        "How the student was made",
        "Settings and provenance",
        "Resolved recipe",
    ]
    places = [text.index(one) for one in order]
    assert places == sorted(places)
    assert "8 min 10 s in all" in text
    assert "55,680 tokens" in text


def test_parameter_groups_are_a_table_where_rates_differ(build_run: RunBuilder, tmp_path: Path) -> None:
    run = build_run()
    trained = next(step for step in run.steps if step.kind == "train")
    assert trained.manifest is not None
    line = {"match": r"embed|<norm>", "tensors": 1, "parameters": 28_311_552, "lr": 0.0, "weight_decay": 0.0}
    others = {**line, "match": "(all others)", "tensors": 162, "lr": 3e-4}
    for groups, shown in (([line, others], True), ([others], False)):
        trained.manifest.metrics["parameter_groups"] = groups
        write_report(run, tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert ("peak rate" in page) is shown
        assert ("<code>embed|&lt;norm&gt;</code>" in page) is shown
        assert ("frozen" in page) is shown


def test_samples_show_every_model_beside_the_trace(build_run: RunBuilder, tmp_path: Path) -> None:
    text = _written(build_run(), tmp_path)
    page = _Page(text)
    for said in ("the the the the of of", "The answer is -11.", "So her brother has 12 + 5 = 17 pencils."):
        assert said in page.text
    assert text.count("<details open>") == 1
    assert "96 tokens, cut off, wrong" in page.text


def test_a_very_long_answer_is_cut_with_a_count(build_run: RunBuilder, tmp_path: Path) -> None:
    run = build_run()
    assert run.folder is not None
    path = run.folder / "exam" / "samples.json"
    samples = json.loads(path.read_text(encoding="utf-8"))
    samples[0]["answers"]["base"]["response"] = "x" * 16_000
    path.write_text(json.dumps(samples), encoding="utf-8")
    assert "… (10,000 more characters)" in _written(run, tmp_path)


@pytest.mark.parametrize("kept", range(5))
def test_a_run_that_stopped_early_still_has_a_page(build_run: RunBuilder, tmp_path: Path, kept: int) -> None:
    run = build_run()
    steps = [
        *run.steps[:kept],
        *(replace(one, manifest=None, folder=None, seconds=None) for one in run.steps[kept:]),
    ]
    events = [
        *run.events[: kept + 1],
        {"time": 1500.0, "event": "step_interrupted", "step": steps[kept].name},
        {"time": 1501.0, "event": "run_interrupted"},
    ]
    text = _Page(_written(replace(run, steps=steps, events=events), tmp_path)).text
    assert (
        "The run was interrupted before any model was evaluated; the same command takes it up again." in text
    )
    assert f"{kept} of 5 steps" in text
    assert "Before and after" not in text


def test_a_failed_step_shows_its_message_and_what_training_logged_until_then(
    build_run: RunBuilder, tmp_path: Path
) -> None:
    run = build_run()
    steps = [
        *run.steps[:3],
        *(replace(one, manifest=None, folder=None, seconds=None) for one in run.steps[3:]),
    ]
    logged = [
        {
            "event": "train_log",
            "step": "student",
            "optimiser_step": number,
            "loss": 7.0 - number,
            "time": 1200.0 + number,
        }
        for number in range(1, 4)
    ]
    events = [
        *run.events[:4],
        {"event": "step_started", "step": "student", "fingerprint": "old", "time": 1199.0},
        {"event": "train_log", "step": "student", "optimiser_step": 900, "loss": 1.0, "time": 1199.5},
        {"event": "step_started", "step": "student", "fingerprint": "new", "time": 1200.0},
        *logged,
        {
            "event": "step_failed",
            "step": "student",
            "error": "the loss is nan\n  to mend:  a smaller lr",
            "time": 1300.0,
        },
        {"event": "run_failed", "time": 1301.0},
    ]
    text = _Page(_written(replace(run, steps=steps, events=events), tmp_path)).text
    assert "student failed" in text
    assert "to mend:  a smaller lr" in text
    assert "3 optimiser steps · unfinished" in text
    assert "The run failed before any model was evaluated." in text


def test_a_run_without_steps_or_events_has_a_page(tmp_path: Path) -> None:
    text = _written(RunView("empty", "name: empty\n", []), tmp_path)
    assert "No model was evaluated in this run." in text


def test_metrics_of_an_unknown_shape_do_not_break_the_page(build_run: RunBuilder, tmp_path: Path) -> None:
    run = build_run()
    for step in run.steps:
        assert step.manifest is not None
        step.manifest.metrics = {}
    (run.steps[-1].folder or tmp_path).joinpath("samples.json").unlink()
    text = _Page(_written(run, tmp_path)).text
    assert "Settings and provenance" in text


def test_a_reused_step_is_drawn_as_such_with_the_time_it_once_took(
    build_run: RunBuilder, tmp_path: Path
) -> None:
    run = build_run()
    steps = [replace(run.steps[0], reused=True), *run.steps[1:]]
    text = _written(replace(run, steps=steps), tmp_path)
    assert '<g class="step reused">' in text
    assert "reused (2 min 08 s)" in text
    assert "2 min 08 s of earlier work reused" in text


def _chart_texts(text: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", text)


def test_charts_have_axis_labels_with_units_and_follow_the_colour_scheme(
    build_run: RunBuilder, tmp_path: Path
) -> None:
    text = _written(build_run(), tmp_path)
    labels = " ".join(_chart_texts(text))
    for label in ("optimiser step", "loss, nats per token", "1 − cos(input, output)", "block", "held-out"):
        assert label in labels
    charts = re.findall(r'<svg class="chart".*?</svg>', text, flags=re.DOTALL)
    assert len(charts) == 3
    for chart in charts:
        assert "var(--series-1)" in chart
        assert not re.search(r"#0102", chart)


def test_many_training_steps_are_drawn_as_means_of_neighbours(build_run: RunBuilder, tmp_path: Path) -> None:
    run = build_run()
    manifest: Any = run.steps[3].manifest
    manifest.metrics["history"] = [
        {"step": step, "loss": float(step % 2), "tokens": 1} for step in range(1, 20_001)
    ]
    text = _written(run, tmp_path)
    assert "20,000 optimiser steps" in text
    assert len(text) < 120_000


def test_traces_and_right_answers_are_shown_by_label_and_what_each_makes_in_one_row(
    build_run: RunBuilder, tmp_path: Path
) -> None:
    run = build_run()
    traces = next(step for step in run.steps if step.kind == "generate")

    def writing(name: str, **groups: tuple[int, int, int]) -> StepView:
        assert traces.manifest is not None
        found = {
            value: {"traces": written, "judged": judged, "right": right}
            for value, (written, judged, right) in groups.items()
        }
        manifest = traces.manifest.model_copy(update={"metrics": {"groups": {"category": found}}})
        return replace(traces, name=name, manifest=manifest)

    steps = [
        writing("answers", math=(1200, 1200, 900), words=(50, 0, 0)),
        writing("retold[math]", math=(40, 40, 30)),
        writing("retold[words]", words=(10, 0, 0)),
        *(step for step in run.steps if step is not traces),
    ]
    text = _written(replace(run, steps=steps), tmp_path)
    shown = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    assert "By category traces of math words" in shown
    assert "answers 1,200, 75.0 % right 50" in shown
    assert "retold 40, 75.0 % right 10" in shown
    assert "groups: category" not in shown


def test_predicted_labels_are_shown_with_how_sure_they_are(build_run: RunBuilder, tmp_path: Path) -> None:
    run = build_run()
    step = {"step": run.steps[0].name}
    events: list[dict[str, Any]] = [
        {
            "event": "labels_learnt",
            **step,
            "label": "subject",
            "accuracy": 0.912,
            "rows": 200,
            "confidence": 0.84,
        },
        {
            "event": "labels_predicted",
            **step,
            "source": "questions.jsonl",
            "label": "subject",
            "rows": {PAYLOAD: 12, "physics": 30},
            "confidence": {PAYLOAD: 0.5, "physics": 0.92},
            "unsure": 3,
        },
    ]
    assert "Labels that were predicted" not in _written(run, tmp_path)
    # A step that reads the same source again says the same again.
    text = _written(replace(run, events=[*run.events, *events, *events]), tmp_path)
    _assert_inert(text)
    shown = _Page(text).text.partition("Labels that were predicted")[2]
    assert (
        shown.count("right for 91 % of 200 labelled rows that were left out, at a mean confidence of 0.84")
        == 1
    )
    assert shown.count("physics 30 (confidence 0.92), too unsure 3") == 1
    # What an attempt at other settings said is no more of the step as it is.
    again = {"event": "step_started", "time": run.events[-1]["time"], **step, "fingerprint": "another"}
    assert "Labels that were predicted" not in _written(
        replace(run, events=[*run.events, *events, again]), tmp_path
    )
