import importlib.util
import os
from pathlib import Path

import pytest

from potstill import doctor
from potstill.models import EMBEDDED, embedded_path

EMBEDDED_NAME = next(iter(EMBEDDED))


def check(name):
    return next(each for each in doctor.examine() if each.name == name)


def test_every_part_of_the_machine_is_looked_at():
    names = [each.name for each in doctor.examine()]
    assert len(set(names)) == len(names)
    expected = [
        "python",
        "torch",
        "bf16",
        "cpu cores",
        "memory",
        "store",
        "model hub",
        "terminal",
        "symbolic links",
    ]
    assert set(expected) <= set(names)


def test_whatever_is_not_well_has_a_hint():
    assert [each for each in doctor.examine() if not each.ok and not each.hint] == []


def test_an_unsupported_python_is_told(monkeypatch):
    assert check("python").ok
    monkeypatch.setattr("sys.version_info", (3, 14, 0))
    found = check("python")
    assert not found.ok
    assert "3.11 to 3.13" in str(found.hint)


def test_the_models_that_are_not_fetched_are_told(store_root):
    found = check(EMBEDDED_NAME)
    assert not found.ok
    assert f"potstill models fetch {EMBEDDED_NAME}" in str(found.hint)
    assert not store_root.exists()


def test_a_damaged_model_is_told():
    path = embedded_path(EMBEDDED_NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    found = check(EMBEDDED_NAME)
    assert not found.ok
    assert "is damaged" in found.finding
    assert "delete the file" in str(found.hint)


def test_a_full_disk_is_told(monkeypatch):
    usage = type("Usage", (), {"free": 1e9})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    found = check("store")
    assert not found.ok
    assert "1 GB free" in found.finding


def test_a_store_that_cannot_be_written_is_told(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in check("store").finding


def test_a_hub_that_is_switched_off_is_told(monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "models--someone--tiny").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not check("model hub").ok
    assert "1 models cached" in check("model hub").finding
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert check("model hub").ok


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [("bitsandbytes", "4-bit models", "bnb"), ("datasets", "hub datasets", "hub")],
)
def test_an_extra_that_is_missing_is_told(package, name, extra, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda wanted: None if wanted == package else found(wanted)
    )
    assert f"potstill[{extra}]" in str(check(name).hint)


def test_a_terminal_that_is_not_utf8_is_told(monkeypatch):
    monkeypatch.setattr("sys.stdout", type("Stream", (), {"encoding": "cp1252"})())
    assert not check("terminal").ok


def test_forbidden_links_are_told(monkeypatch):
    def refuse(self, target, *, target_is_directory=False):
        raise OSError("privilege not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    found = check("symbolic links")
    assert not found.ok
    assert "instead of linking" in found.finding
