"""What makes training fast on a CPU; every choice here was measured on 2 cores with AVX512-BF16."""

from typing import Any

import torch

from potstill.models import plain_model
from potstill.models.attention import register_attention

__all__ = ["choose_attention"]

_EAGER_TOKENS = 256
_DROPOUTS = "attention_dropout", "attn_pdrop"


def choose_attention(model: Any, longest_row: int, *, packed: bool, bf16: bool) -> None:
    """Have a model run its attention in tiles; where these do not serve, short rows take eager attention.

    That is for rows of at most 256 tokens where products are in float32, of packs, of encoder-decoders, and
    of models with dropout of attention. The backward of torch's fused attention took 0.86 s of a 6.8 s step
    at 90 tokens a row; eager attention keeps every score instead, whose memory grows with the square of the
    length. A model in float64 keeps what it was loaded with: eager attention takes its softmax in float32.
    """
    register_attention()
    plain = plain_model(model)
    config = plain.config.get_text_config(decoder=True)
    drops = any(getattr(config, name, 0.0) for name in _DROPOUTS)
    is_tiled = bf16 and not (packed or drops or plain.config.is_encoder_decoder)
    if not is_tiled and longest_row <= _EAGER_TOKENS and model.dtype != torch.float64:
        plain.set_attn_implementation("eager")
