import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from potstill.core.errors import StoreError
from potstill.models import writing
from potstill.train.checkpoints import complete, newest


def checkpoint(folder: Path, step: int, text: str = "weights") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "weights").write_text(text, encoding="utf-8")
    return path


def test_there_is_none_in_an_empty_folder(tmp_path: Path) -> None:
    assert newest(tmp_path) is None


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    complete(checkpoint(tmp_path, 9))
    last = checkpoint(tmp_path, 10)
    complete(last)
    assert newest(tmp_path) == last
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_a_half_written_one_is_removed_and_the_whole_one_before_it_is_found(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 9)
    complete(whole)
    half = checkpoint(tmp_path, 10)
    assert newest(tmp_path) == whole
    assert not half.exists()


@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_one_whose_files_are_not_what_they_were_counts_as_half_written(tmp_path: Path, harm: str) -> None:
    path = checkpoint(tmp_path, 3)
    complete(path)
    if harm == "changed":
        (path / "weights").write_text("Weights", encoding="utf-8")
    else:
        (path / "weights").unlink()
    assert newest(tmp_path) is None
    assert not path.exists()


def test_other_files_of_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("", encoding="utf-8")
    complete(checkpoint(tmp_path, 1))
    assert (tmp_path / "notes").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("unexpected pos"),
        SafetensorError("IoError"),
    ],
)
def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(StoreError, match="make room and run again"), writing(tmp_path):
        raise error
