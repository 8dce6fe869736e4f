"""Files in a folder of the test's own, and the real data where it is at hand."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """`write(name, text)`: a UTF-8 file in the recipe's folder."""

    def write_text(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8", newline="")
        return path

    return write_text


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: POTSTILL_SHARED_DATA, or shared/data beside the repository."""
    stated = os.environ.get("POTSTILL_SHARED_DATA")
    folder = Path(stated) if stated else Path(__file__).parents[4] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data is not at hand")
    return folder
