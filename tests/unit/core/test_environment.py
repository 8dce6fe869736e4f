"""What libraries are told before they are imported."""

import logging
from pathlib import Path

import pytest

from potstill.models import TransformersModel, load


def test_bitsandbytes_asks_for_nothing_where_a_model_is_loaded_from_python(
    tiny_model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.setLevel(logging.NOTSET)
    load(TransformersModel(path=str(tiny_model_folder)))
    logger.warning("Failed to load CPU gemm_4bit_forward")
    assert not caplog.records
