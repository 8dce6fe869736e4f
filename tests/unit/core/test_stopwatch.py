"""The seconds of a step are those of all attempts at it, however each of them ended."""

import subprocess
import sys
from pathlib import Path

import pytest

from potstill.core.stopwatch import Stopwatch

KILLED = """
import sys, time
from pathlib import Path
from potstill.core.stopwatch import Stopwatch

file = Path(sys.argv[1]) / "seconds"
watch = Stopwatch(file.parent, beat_seconds=0.01)
while not file.exists() or float(file.read_text()) < 0.2:
    pass
print("far enough", flush=True)
time.sleep(600)
"""


def test_an_attempt_goes_on_where_the_one_before_was_closed(tmp_path: Path) -> None:
    (tmp_path / "seconds").write_text("3600.5")
    first = Stopwatch(tmp_path)
    assert first.seconds >= 3600.5
    first.close()
    closed_at = float((tmp_path / "seconds").read_text())
    second = Stopwatch(tmp_path)
    assert second.seconds >= closed_at >= 3600.5
    second.close()


def test_a_kill_leaves_what_was_written_at_the_last_beat(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"far enough\n"
        process.kill()
    watch = Stopwatch(tmp_path)
    assert watch.seconds >= 0.2
    watch.close()


def test_a_closed_one_writes_nothing_more(tmp_path: Path) -> None:
    watch = Stopwatch(tmp_path, beat_seconds=0.001)
    watch.close()
    (tmp_path / "seconds").unlink()
    watch.close()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("left", ["", "nonsense", "nan", "inf", "-7", "\x00\x00"])
def test_what_is_no_number_of_seconds_counts_as_none(left: str, tmp_path: Path) -> None:
    (tmp_path / "seconds").write_text(left)
    watch = Stopwatch(tmp_path)
    assert 0 <= watch.seconds < 3600
    watch.close()


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    watch = Stopwatch(tmp_path / "gone", beat_seconds=0.001)
    watch.close()
    assert watch.seconds >= 0
