"""Artifacts are sealed by a manifest written last; what is unfinished or damaged is never taken as done."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import StoreError
from potstill.core.store import MANIFEST_FILE, MODEL_CARD_FILE, Artifact, Store

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
