"""A causal language model in two halves: the trunk up to its final norm, and the head from there to logits.

Shapes: B sequences, T positions, H hidden width, V vocabulary.
"""

import math
from typing import TYPE_CHECKING, Any

from potstill.core.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["OutputHead", "hidden_states", "output_head"]


def _plain(model: Any) -> Any:
    """The transformers model inside a PEFT one; its adapted layers stay adapted."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def hidden_states(
    model: Any, input_ids_BT: "torch.Tensor", attention_mask_BT: "torch.Tensor | None" = None
) -> "torch.Tensor":
    """The trunk's output after the final norm (and OPT's projection out), [B, T, H]: what the head is given.

    Adapters take part. Right padding only: positions count from the left.
    """
    plain = _plain(model)
    trunk = getattr(plain, plain.base_model_prefix)
    output = trunk(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
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
