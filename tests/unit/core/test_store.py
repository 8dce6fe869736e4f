"""Artifacts are sealed by a manifest written last; what is unfinished or damaged is never taken as done."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import StoreError
from potstill.core.store import (
    MANIFEST_FILE,
    MODEL_CARD_FILE,
    Artifact,
    Store,
    manifest_text,
    write_atomically,
)

FINGERPRINT = "ab" * 32


def _make(store: Store, **files: str) -> Artifact:
    folder = store.prepare("generate", FINGERPRINT)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return store.seal(folder, kind="generate", fingerprint=FINGERPRINT, settings={}, seed=1, seconds=0.5)


def test_an_artifact_exists_once_sealed_and_not_before(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.prepare("generate", FINGERPRINT)
    (folder / "rows").write_text("half", encoding="utf-8")
    assert store.find("generate", FINGERPRINT) is None
    with pytest.raises(StoreError, match="not a finished artifact"):
        Artifact.open(folder)
    sealed = _make(store, rows="whole")
    found = store.find("generate", FINGERPRINT)
    assert found is not None
    assert found.manifest == sealed.manifest


def test_a_missing_or_cut_file_makes_the_artifact_unmade(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = _make(store, rows="whole", index="i")
    (artifact.folder / "rows").write_text("wh", encoding="utf-8")
    assert artifact.damage() == "rows has 2 bytes, not 5"
    assert store.find("generate", FINGERPRINT) is None
    (artifact.folder / "rows").unlink()
    assert artifact.damage() == "rows is missing"


def test_preparing_again_keeps_what_an_interrupted_attempt_left_unless_told_to_discard(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    artifact = _make(store, rows="whole")
    folder = store.prepare("generate", FINGERPRINT)
    assert (folder / "rows").is_file()
    assert not (folder / MANIFEST_FILE).exists()
    assert artifact.folder == folder
    assert list(store.prepare("generate", FINGERPRINT, discard=True).iterdir()) == []


def test_content_is_the_hash_of_the_payload_and_nothing_else(tmp_path: Path) -> None:
    one, two, other = Store(tmp_path / "1"), Store(tmp_path / "2"), Store(tmp_path / "3")
    first, second = _make(one, rows="same"), _make(two, rows="same")
    (second.folder / MODEL_CARD_FILE).write_text("a by-product", encoding="utf-8")
    assert first.manifest.content == second.manifest.content == _make(two, rows="same").manifest.content
    assert first.manifest.content != _make(other, rows="else").manifest.content


def _hold(root: Path, ready: Any, release: Any) -> None:
    with Store(root).lock(FINGERPRINT, on_wait=lambda pid: None):
        ready.set()
        release.wait(30)


def test_a_second_maker_waits_and_hears_the_firsts_pid(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(30)
    heard: list[int | None] = []

    def on_wait(pid: int | None) -> None:
        heard.append(pid)
        release.set()

    with Store(tmp_path).lock(FINGERPRINT, on_wait=on_wait):
        assert heard == [holder.pid]
        assert (tmp_path / "locks" / f"{FINGERPRINT[:24]}.pid").read_text(encoding="utf-8") == str(
            os.getpid()
        )
    holder.join(30)
    assert holder.exitcode == 0


def test_who_does_not_wait_is_told_that_another_makes_it(tmp_path: Path) -> None:
    store, waited = Store(tmp_path), list[int | None]()
    with (
        store.lock(FINGERPRINT, on_wait=waited.append) as first,
        store.lock(FINGERPRINT, on_wait=waited.append, wait=False) as second,
    ):
        assert (first, second, waited) == (True, False, [])
    with store.lock(FINGERPRINT, on_wait=waited.append, wait=False) as third:
        assert third


def test_the_lock_of_a_killed_maker_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(30)
    holder.kill()
    holder.join(30)
    waited: list[int | None] = []
    with Store(tmp_path).lock(FINGERPRINT, on_wait=waited.append):
        assert waited == []


def test_a_flipped_bit_is_found_where_the_content_is_read_through(tmp_path: Path) -> None:
    artifact = _make(Store(tmp_path), rows="whole", index="i")
    artifact.check_content()
    (artifact.folder / "rows").write_text("whale", encoding="utf-8")
    assert artifact.damage() is None, "the size is the same"
    with pytest.raises(StoreError, match=r"rows: is damaged: its SHA-256 is"):
        artifact.check_content()
    artifact.check_content(lambda name: name == "rows")  # whose reader finds it
    (artifact.folder / "index").unlink()
    with pytest.raises(StoreError, match="index is missing"):
        artifact.check_content()


def test_every_flipped_bit_of_a_manifest_is_found_but_in_its_white_space(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = _make(store, rows="whole")
    path = artifact.folder / MANIFEST_FILE
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in (1, 32):
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            if (found := store.find("generate", FINGERPRINT)) is not None:
                assert found.manifest == artifact.manifest
            else:
                assert (store.damage("generate", FINGERPRINT) or "").startswith("manifest.json: unreadable")


def test_a_damaged_artifact_is_prepared_with_the_files_that_are_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = _make(store, rows="whole", index="i")
    (artifact.folder / "rows").write_text("wh", encoding="utf-8")
    assert store.damage("generate", FINGERPRINT) == "rows has 2 bytes, not 5"
    folder = store.prepare("generate", FINGERPRINT)
    assert [path.name for path in folder.iterdir()] == ["index"]
    assert store.damage("generate", FINGERPRINT) is None, "nothing is sealed any more"


def test_what_is_half_written_is_no_part_of_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    whole = _make(store, rows="whole")
    folder = store.prepare("generate", FINGERPRINT, discard=True)
    (folder / "deep").mkdir()
    for left in (".cache.json.17.partial", "deep/records.parquet.partial"):
        (folder / left).write_text("ha", encoding="utf-8")
    assert _make(store, rows="whole").manifest.content == whole.manifest.content

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "notes").mkdir()
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "notes" / "a.json", "text")
    assert list((tmp_path / "notes").iterdir()) == []


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b", "..\\b"])
def test_a_manifest_that_names_a_file_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    artifact = _make(Store(tmp_path), rows="whole")
    entry = artifact.manifest.files["rows"]
    written = artifact.manifest.model_copy(update={"files": {name: entry}})
    (artifact.folder / MANIFEST_FILE).write_text(manifest_text(written), encoding="utf-8")
    with pytest.raises(StoreError, match="unreadable manifest"):
        Artifact.open(artifact.folder)


def test_a_view_is_a_folder_of_the_artifact_and_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.prepare("generate", FINGERPRINT)
    for name in ("epoch1/rows", "other/rows", "rows"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x", encoding="utf-8")
    fields: Any = {"kind": "generate", "fingerprint": FINGERPRINT, "settings": {}, "seed": 1, "seconds": 0.5}
    sealed = store.seal(folder, **fields, extra={"views": ["epoch1", "..", "../other", "/etc"]})
    assert sealed.views == ["epoch1"]
    assert [*sealed.files_of("epoch1")] == ["epoch1/rows"]
    assert [*sealed.files_of(None)] == ["other/rows", "rows"]
