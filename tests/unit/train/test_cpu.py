"""On a CPU a student's attention runs in tiles, or eagerly where rows are short and tiles do not serve."""

from typing import Any

import pytest
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from potstill.models.attention import attention
from potstill.train.cpu import choose_attention


def attention_of(model: Any) -> str:
    return str(model.config._attn_implementation)


def test_short_rows_too_run_in_tiles(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    choose_attention(tiny_llama, 90, packed=False, bf16=True)
    assert attention_of(tiny_llama) == "sdpa"
    assert AttentionInterface()["sdpa"] is attention


@pytest.mark.parametrize(("longest", "expected"), [(256, "eager"), (257, "sdpa")])
@pytest.mark.parametrize("why", ["packed", "float32", "dropout", "gpt2's dropout"])
def test_short_rows_that_tiles_do_not_serve_take_eager_attention(
    build_tiny_model: Any, why: str, longest: int, expected: str
) -> None:
    model = {
        "packed": build_tiny_model,
        "float32": build_tiny_model,
        "dropout": lambda: build_tiny_model(attention_dropout=0.1),
        "gpt2's dropout": lambda: build_tiny_model("gpt2", attn_pdrop=0.1),
    }[why]()
    choose_attention(model, longest, packed=why == "packed", bf16=why != "float32")
    assert attention_of(model) == expected


def test_so_do_those_of_an_encoder_decoder(build_tiny_t5: Any) -> None:
    model = build_tiny_t5()
    choose_attention(model, 90, packed=False, bf16=True)
    assert attention_of(model) == "eager"


def test_float64_is_kept_whole(tiny_llama: Any) -> None:
    choose_attention(tiny_llama.double(), 90, packed=True, bf16=False)
    assert attention_of(tiny_llama) == "sdpa"
