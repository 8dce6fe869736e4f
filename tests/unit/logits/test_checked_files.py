"""Files of arrays: whole or not there, read whole or in parts, refused when a single bit is another."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from potstill.core.errors import DataError
from potstill.core.spool import Spool
from potstill.logits import checked_files
from potstill.logits.checked_files import ColumnFile, read_arrays, write_arrays, write_columns
from potstill.logits.packing import Array

ARRAYS: dict[str, Array] = {
    "keys": np.arange(60, dtype=np.uint8).reshape(20, 3),
    "ends": np.arange(0, -20, -1, dtype=np.int64),
    "places": np.arange(40, dtype=np.uint32).reshape(20, 2) * 2**27,
    "none": np.zeros((0, 4), dtype=np.uint32),
}


def write_spooled(path: Path, arrays: dict[str, Array]) -> None:
    columns = {name: (one.dtype.str, one.shape, Spool()) for name, one in arrays.items()}
    for name, (_, _, spool) in columns.items():
        spool.append(arrays[name].tobytes())
    write_columns(path, columns)


def same(found: dict[str, Array], wanted: dict[str, Array]) -> bool:
    return found.keys() == wanted.keys() and all(
        (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
        and np.array_equal(found[name], values)
        for name, values in wanted.items()
    )


def test_what_is_written_is_read_by_us_and_by_safetensors_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_arrays(path, ARRAYS)
    assert same(read_arrays(path), ARRAYS)
    assert same(read_arrays(path, ["ends"]), {"ends": ARRAYS["ends"]})
    assert same(load_file(path), ARRAYS)


def test_columns_on_disk_become_the_file_that_whole_arrays_become(tmp_path: Path) -> None:
    whole, columns = tmp_path / "whole.safetensors", tmp_path / "columns.safetensors"
    write_arrays(whole, ARRAYS)
    write_spooled(columns, ARRAYS)
    assert columns.read_bytes() == whole.read_bytes()


def test_columns_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_files, "_READ_ROWS", 3)
    path = tmp_path / "a.safetensors"
    write_arrays(path, ARRAYS)
    file = ColumnFile(path)
    for name, values in ARRAYS.items():
        parts = [*file.parts(name)]
        assert len(parts) == -(-len(values) // 3)
        assert all(len(part) <= 3 for part in parts)
        assert np.array_equal(np.concatenate(parts) if parts else values, values)
        some = slice(4, 9) if len(values) else slice(0, 0)
        assert np.array_equal(file.read(name, some.start, some.stop), values[some])


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    path = tmp_path_factory.mktemp("flipped") / "a.safetensors"
    write_arrays(path, ARRAYS)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    for read in (read_arrays, ColumnFile):
        with pytest.raises(DataError, match=r"a\.safetensors: is damaged"):
            read(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.safetensors"
    write_arrays(path, ARRAYS)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for read in (read_arrays, ColumnFile):
        with pytest.raises(DataError, match=r"is damaged(.|\n)*run the cache step again"):
            read(path)


@pytest.mark.parametrize("write", [write_arrays, write_spooled], ids=["in memory", "on disk"])
def test_pitfall_17_a_file_has_its_name_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, dict[str, Array]], None]
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "a.safetensors"
    path.write_bytes(b"the old file")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(path, ARRAYS)
    assert path.read_bytes() == b"the old file"
