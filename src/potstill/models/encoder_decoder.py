"""Encoder-decoders (T5 and its kin): how one row of tokens is both what is read and what is written.

A row is the source with its end, the token that a decoder starts with, and the target, one behind the other,
as prompt and response are of other models. The first start token is where the decoder's own input begins, so
that a hidden state stands where its token does and predicts the next one.

Shapes: B rows, T tokens, S tokens of a source, D tokens of a decoder's input, H hidden width.
"""

from typing import TYPE_CHECKING, Any

from potstill.core.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["decoder_start_id", "decoder_states", "forward_inputs"]


def decoder_start_id(config: Any) -> int | None:
    """The id that a decoder's input begins with; None for a model that is no encoder-decoder.

    Raises ModelError where it cannot be told from others: none is stated, or it is the one that ends a text.
    """
    if not getattr(config, "is_encoder_decoder", False):
        return None
    stated = getattr(config, "decoder_start_token_id", None)
    start = config.pad_token_id if stated is None else stated
    if start is None or start == config.eos_token_id:
        raise ModelError(
            f"the decoder of a {config.model_type} model starts with "
            + ("no token that its configuration states" if start is None else "the token that ends a text"),
            expected="an encoder-decoder of the T5 family, whose decoder starts with a token of its own",
            mend="set decoder_start_token_id in its config.json, or use a model of another family",
        )
    return int(start)


def forward_inputs(model: Any, ids_BT: "torch.Tensor") -> dict[str, "torch.Tensor"]:
    """What a whole model's forward takes to give logits at ids; an encoder-decoder reads and writes them.

    The first id of what it writes is the one that its decoder starts with.
    """
    start = decoder_start_id(model.config)
    if start is None:
        return {"input_ids": ids_BT}
    written_BT = ids_BT.clone()
    written_BT[:, 0] = start
    return {"input_ids": ids_BT, "decoder_input_ids": written_BT}


def decoder_states(model: Any, input_ids_BT: "torch.Tensor") -> "torch.Tensor":
    """The decoder's output after its final norm, [B, T, H]; of no meaning where the source stands.

    The encoder runs on each row up to its start token, the decoder on the rest. No mask is needed behind the
    target: the decoder is causal. Raises ModelError for a row without a source or a start token.
    """
    import torch

    start, (rows, tokens) = decoder_start_id(model.config), input_ids_BT.shape
    assert start is not None
    starts_B1 = input_ids_BT.eq(start).int().argmax(1, keepdim=True)
    longest, shortest = int(starts_B1.max()), int(starts_B1.min())
    if shortest == 0:
        raise ModelError(
            f"a row has nothing for the encoder of a {model.config.model_type} model to read",
            expected=f"the source, the token with id {start}, and the target",
            mend="render it with the tokenizer that potstill.models.load_tokenizer gives for this model",
        )
    places_1T = torch.arange(tokens, device=input_ids_BT.device)[None]
    source_mask_BS = (places_1T[:, :longest] < starts_B1).long()
    places_BD = (starts_B1 + places_1T[:, : tokens - shortest]).clamp(max=tokens - 1)
    source_BSH = model.get_encoder()(
        input_ids=input_ids_BT[:, :longest], attention_mask=source_mask_BS
    ).last_hidden_state
    hidden_BDH: torch.Tensor = model.get_decoder()(
        input_ids=input_ids_BT.gather(1, places_BD),
        encoder_hidden_states=source_BSH,
        encoder_attention_mask=source_mask_BS,
        use_cache=False,
    ).last_hidden_state
    own_BT = (places_1T - starts_B1).clamp(min=0)
    return hidden_BDH.gather(1, own_BT[..., None].expand(rows, tokens, hidden_BDH.shape[-1]))
