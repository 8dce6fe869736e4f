"""Bytes on disk: what was added is read by place, in this process and in others, and goes with its maker."""

import gc
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.spool import Spool


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.integers(2**17, 2**19).map(bytes)), max_size=12), st.data()
)
def test_what_was_added_is_read_by_place(parts, data):
    spool, whole = Spool(), b""
    for part in parts:
        spool.append(part)
        whole += part
        assert spool.size == len(whole)
        start = data.draw(st.integers(0, len(whole)))
        size = data.draw(st.integers(0, len(whole) - start))
        assert spool.read(start, size) == whole[start : start + size]
    assert b"".join(spool.chunks()) == whole


def test_a_write_of_which_the_disk_takes_a_part_is_gone_on_with(tmp_path, monkeypatch):
    class Slow:
        def __init__(self, file):
            self.file, self.seek, self.read = file, file.seek, file.read

        def write(self, data):
            return self.file.write(data[:7])

    whole = Spool._file
    monkeypatch.setattr(Spool, "_file", lambda self: Slow(whole(self)))
    spool = Spool(tmp_path)
    spool.append(bytes(range(100)))
    assert spool.read(0, 100) == bytes(range(100))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_it_and_leave_it_there(tmp_path, method):
    spool = Spool(tmp_path)
    spool.append(b"first")
    assert spool.read(0, 5) == b"first"
    spool.append(b"later")  # not on disk yet
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as others:
        assert others.submit(Spool.read, spool, 0, 10).result() == b"firstlater"
    spool.append(b"last")
    assert spool.read(0, 14) == b"firstlaterlast"


def test_the_file_goes_with_the_object_that_made_it_and_not_with_a_copy(tmp_path):
    spool = Spool(tmp_path)
    spool.append(b"text")
    copy = pickle.loads(pickle.dumps(spool))  # what workers of a data loader get
    assert copy.read(0, 4) == b"text"
    del copy
    gc.collect()
    assert spool.read(0, 4) == b"text"
    assert len([*tmp_path.iterdir()]) == 1
    del spool
    gc.collect()
    assert not [*tmp_path.iterdir()]
