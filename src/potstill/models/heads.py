"""A causal language model in two halves: the trunk up to its final norm, and the head from there to logits.

Shapes: B sequences, T positions, H hidden width, V vocabulary.
"""

import math
from typing import TYPE_CHECKING, Any

from potstill.core.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = [
    "OutputHead",
    "can_share_prefix",
    "hidden_states",
    "hidden_states_after",
    "isolates_packed_rows",
    "output_head",
]

_SHARES_PREFIX = frozenset({"gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3"})


def _plain(model: Any) -> Any:
    """The transformers model inside a PEFT one; its adapted layers stay adapted."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def _trunk(model: Any) -> Any:
    plain = _plain(model)
    return getattr(plain, plain.base_model_prefix)


def hidden_states(
    model: Any,
    input_ids_BT: "torch.Tensor",
    attention_mask_BT: "torch.Tensor | None" = None,
    position_ids_BT: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """The trunk's output after the final norm (and OPT's projection out), [B, T, H]: what the head is given.

    Adapters take part. Right padding only: positions count from the left. Position ids that begin again pack
    several rows into one, without an attention mask, for a model of which `isolates_packed_rows` is true.
    """
    trunk = _trunk(model)
    positions = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
    # Packed rows are kept apart by transformers only while there is no cache of keys and values.
    output = trunk(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False, **positions)
    hidden_BTH: torch.Tensor = output.last_hidden_state
    return hidden_BTH


def can_share_prefix(model: Any) -> bool:
    """Whether `hidden_states_after` is right for a model: full causal attention, nothing recomputed."""
    config = _plain(model).config
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    recomputes = bool(getattr(_plain(model), "is_activation_checkpointing", False))
    return config.model_type in _SHARES_PREFIX and set(layers) == {"full_attention"} and not recomputes


def isolates_packed_rows(model: Any) -> bool:
    """Whether packed rows do not see one another, found out by packing two.

    The second row's hidden states must be those that it has alone, and must not change with the first row.
    """
    import torch

    rows = model.config.get_text_config().vocab_size // 2
    ids_BT = torch.arange(rows - 12, rows, device=model.device)[None]
    positions_BT = torch.cat([torch.arange(7), torch.arange(5)]).to(model.device)[None]
    changed_BT = ids_BT.clone()
    changed_BT[0, :7] = ids_BT[0, :7].flip(0)
    was_training = model.training
    model.eval()  # dropout would differ from pass to pass
    try:
        with torch.no_grad():
            one, other = (
                hidden_states(model, ids, position_ids_BT=positions_BT)[0, 7:].float()
                for ids in (ids_BT, changed_BT)
            )
            alone = hidden_states(model, ids_BT[:, 7:])[0].float()
    except (TypeError, RuntimeError):  # a trunk without position ids, an attention that refuses the pack
        return False
    finally:
        model.train(was_training)
    spread = alone.std()
    return bool((one - other).abs().max() <= 1e-4 * spread and (one - alone).abs().max() <= 0.05 * spread)


def hidden_states_after(model: Any, input_ids_BT: "torch.Tensor", prefix_tokens: int) -> "torch.Tensor":
    """`hidden_states` behind a prefix that all rows share, [B, T - P, H], running the prefix once for all.

    Rows meet a shared prefix only through its keys and values, so these are computed for one row and
    repeated; gradients flow back through the repetition. For models of which `can_share_prefix` is true.
    """
    from transformers import DynamicCache

    trunk, rows = _trunk(model), len(input_ids_BT)
    once, repeated = DynamicCache(), DynamicCache()
    trunk(input_ids=input_ids_BT[:1, :prefix_tokens], past_key_values=once, use_cache=True)
    for index, layer in enumerate(once.layers):
        repeated.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
    output = trunk(input_ids=input_ids_BT[:, prefix_tokens:], past_key_values=repeated, use_cache=True)
    hidden_BTH: torch.Tensor = output.last_hidden_state
    return hidden_BTH


class OutputHead:
    """Hidden states [..., H] to logits [..., V], with the model's bias, scaling and final soft-capping.

    `parameters` are all those that the logits depend on beyond the hidden states: a tied embedding, an
    adapter.
    """

    def __init__(self, model: Any, vocabulary_size: int) -> None:
        plain = _plain(model)
        config = plain.config.get_text_config()
        self.projection = plain.get_output_embeddings()
        self.vocabulary_size = vocabulary_size
        rows = self.projection.out_features
        if vocabulary_size > rows:
            raise ModelError(
                f"the output head has {rows} rows, fewer than the {vocabulary_size} ids asked for",
                expected="a tokenizer and a model that belong together",
                mend="use the tokenizer that was saved with the model",
            )
        self.soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies, Granite divides; Falcon-H1 calls its factor after the head.
        self.scale = float(
            getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
        )
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        self.parameters: list[torch.nn.Parameter] = list(self.projection.parameters())

    def __call__(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits [..., V] of hidden states [..., H]."""
        logits: torch.Tensor = self.projection(hidden)[..., : self.vocabulary_size]
        if not math.isclose(self.scale, 1.0):
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = (logits / self.soft_cap).tanh() * self.soft_cap
        return logits


def output_head(model: Any, vocabulary_size: int) -> OutputHead:
    """The head of a model, cut to the first `vocabulary_size` ids; differentiable, right under autocast."""
    return OutputHead(model, vocabulary_size)
