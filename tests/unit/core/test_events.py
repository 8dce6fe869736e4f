"""Events survive a kill mid-line; displays say what they should and nothing else."""

import io
import json
from datetime import datetime
from pathlib import Path

import pytest

from potstill.core.events import Display, Reporter, format_seconds, read_events


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reporter = Reporter("quiet", path)
    reporter.event("step_started", step="a")
    reporter.close()
    path.write_text(path.read_text(encoding="utf-8") + '{"event": "step_fin', encoding="utf-8")
    assert [event["event"] for event in read_events(path)] == ["step_started"]


@pytest.mark.parametrize("display", ["plain", "bar"])
def test_people_see_lines_and_progress(display: Display) -> None:
    stream = io.StringIO()
    reporter = Reporter(display, stream=stream)
    reporter.say("hello")
    with reporter.progress("train", 4, "steps") as progress:
        progress.advance(4, loss="0.5")
    assert "hello" in stream.getvalue()
    assert "train" in stream.getvalue()
    assert "0.5" in stream.getvalue()


@pytest.mark.parametrize("display", ["plain", "bar", "quiet", "json"])
def test_the_log_has_every_line_with_its_time_whatever_is_shown(display: Display, tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    for _ in range(2):  # as a second run does, which appends
        reporter = Reporter(display, stream=io.StringIO(), log_path=path)
        reporter.say("hello")
        with reporter.progress("train", 4, "steps") as progress:
            progress.advance(4, loss="0.5")
        reporter.log("for the log alone")
        reporter.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6
    assert lines[0].endswith("  hello")
    assert "train: 4/4 steps" in lines[1]
    assert lines[1].endswith("loss 0.5")
    assert lines[2].endswith("for the log alone")
    for line in lines:
        datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S").astimezone()


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    reporter = Reporter("quiet", stream=stream)
    reporter.say("hello")
    reporter.event("x")
    with reporter.progress("train", 4) as progress:
        progress.advance(4)
    assert (stream.getvalue(), capsys.readouterr().out) == ("", "")


def test_json_prints_events_only(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    reporter = Reporter("json", stream=stream)
    reporter.say("hello")
    reporter.event("step_started", step="a")
    assert json.loads(capsys.readouterr().out)["step"] == "a"
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(4.23, "4.2 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations_are_said_as_people_do(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_lines_that_are_no_events_are_left_out(tmp_path: Path) -> None:
    whole = [
        {"event": "run_started", "time": 1.0, "steps": [{"name": "a", "kind": "train", "needs": []}]},
        {"event": "step_started", "step": "a"},
    ]
    damaged = [
        b"\xff\xfe",
        b"[]",
        b"3",
        b'{"event": 3}',
        b'{"event": "x", "step": ["a"]}',
        b'{"event": "x", "time": "now"}',
        b'{"event": "x", "time": ' + b"9" * 400 + b"}",
        b'{"event": "run_started", "steps": [{"name": "../../etc", "kind": "train", "needs": []}]}',
        b'{"event": "run_started", "steps": [{"name": "a"}]}',
        b'{"event": "cut',
    ]
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\n".join([*(json.dumps(one).encode() for one in whole), *damaged]))
    assert read_events(path) == whole
