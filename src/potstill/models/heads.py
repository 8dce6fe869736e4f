"""A language model in two halves: the trunk up to its final norm, and the head from there to logits.

Shapes: B sequences, T positions, H hidden width, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from potstill.core.errors import ModelError
from potstill.models.encoder_decoder import decoder_start_id, decoder_states

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle

__all__ = [
    "OutputHead",
    "add_token_rows",
    "hidden_states",
    "isolates_packed_rows",
    "output_head",
    "output_projection",
    "plain_model",
    "removing",
    "trunk",
]


def plain_model(model: Any) -> Any:
    """The transformers model inside a PEFT one; its adapted layers stay adapted."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


@contextmanager
def removing(hooks: "Iterable[RemovableHandle]") -> Iterator[None]:
    """While open, some hooks are on a model; behind it none is, however it ends."""
    with ExitStack() as opened:
        for hook in hooks:
            opened.enter_context(hook)
        yield


def trunk(model: Any) -> Any:
    """What turns token ids into the hidden states that the head is given."""
    plain = plain_model(model)
    return getattr(plain, plain.base_model_prefix)


def output_projection(model: Any) -> Any:
    """The linear layer from hidden states to logits; where PEFT trains some of its rows, without these."""
    projection = plain_model(model).get_output_embeddings()
    tokens = getattr(projection, "token_adapter", None)
    return projection if tokens is None else tokens.base_layer


def add_token_rows(model: Any, new_ids: Iterable[int], known_ids: int) -> None:
    """Give ids rows of embedding and head (and its bias): the mean of the rows of the first `known_ids`.

    The matrices grow where they have no place for an id; tied ones stay tied.
    """
    import torch

    ids = sorted(new_ids)
    rows = model.get_input_embeddings().weight.shape[0]
    known_ids = min(known_ids, rows)
    if ids[-1] >= rows:
        with torch.random.fork_rng(devices=[]):  # it draws values that are overwritten here
            model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
        ids = sorted({*ids, *range(rows, ids[-1] + 1)})
    head = model.get_output_embeddings()
    parts = {id(part): part for part in (model.get_input_embeddings().weight, head.weight, head.bias)}
    with torch.no_grad():
        for part in parts.values():
            if part is not None:
                part[ids] = part[:known_ids].float().mean(0).to(part.dtype)


def hidden_states(
    model: Any,
    input_ids_BT: "torch.Tensor",
    attention_mask_BT: "torch.Tensor | None" = None,
    position_ids_BT: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """The trunk's output after the final norm (and OPT's projection out), [B, T, H]: what the head is given.

    Adapters take part. Right padding only: positions count from the left. Position ids that begin again pack
    several rows into one, without an attention mask, for a model of which `isolates_packed_rows` is true. Of
    an encoder-decoder's row, as `potstill.models.encoder_decoder` says, the states behind the source count.
    """
    if decoder_start_id(plain_model(model).config) is not None:
        assert position_ids_BT is None
        return decoder_states(plain_model(model), input_ids_BT)
    positions = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
    # Packed rows are kept apart by transformers only while there is no cache of keys and values.
    output = trunk(model)(
        input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False, **positions
    )
    hidden_BTH: torch.Tensor = output.last_hidden_state
    return hidden_BTH


def isolates_packed_rows(model: Any) -> bool:
    """Whether packed rows do not see one another, found out by packing two.

    The second row's hidden states must be those that it has alone, and must not change with the first row.
    """
    import torch

    if decoder_start_id(plain_model(model).config) is not None:
        return False
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


class OutputHead:
    """Hidden states [..., H] to logits [..., V], with the model's bias, scaling and final soft-capping.

    `parameters` are all those that the logits depend on beyond the hidden states: a tied embedding, an
    adapter.
    """

    def __init__(self, model: Any, vocabulary_size: int) -> None:
        plain = plain_model(model)
        config = plain.config.get_text_config()
        self.projection = output_projection(plain)
        # Rows that PEFT trains in the place of the layer's own: an adapter's added tokens.
        self._tokens: Any = getattr(plain.get_output_embeddings(), "token_adapter", None)
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
        if getattr(config, "scale_decoder_outputs", False):  # T5, but not its later versions
            self.scale *= float(config.d_model**-0.5)
        self.parameters: list[torch.nn.Parameter] = list(self.projection.parameters())
        if self._tokens is not None:
            self.parameters += self._tokens.trainable_tokens_delta.values()

    def __call__(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits [..., V] of hidden states [..., H]."""
        logits: torch.Tensor = self.projection(hidden)
        if self._tokens is not None and not self._tokens.disable_adapters:
            self._write_trained_rows(logits, hidden)
        logits = logits[..., : self.vocabulary_size]
        if not math.isclose(self.scale, 1.0):
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = (logits / self.soft_cap).tanh() * self.soft_cap
        return logits

    def _write_trained_rows(self, logits: "torch.Tensor", hidden: "torch.Tensor") -> None:
        # PEFT itself multiplies with a copy of the whole weight, whose gradient is as large.
        import torch

        for name in self._tokens.active_adapters:
            index = torch.tensor(self._tokens.token_indices[name], device=logits.device)
            rows = self._tokens.trainable_tokens_delta[name].to(self.projection.weight.dtype)
            trained = torch.nn.functional.linear(hidden, rows)
            logits.index_copy_(-1, index, trained.to(logits.dtype))


def output_head(model: Any, vocabulary_size: int) -> OutputHead:
    """The head of a model, cut to the first `vocabulary_size` ids; differentiable, right under autocast."""
    return OutputHead(model, vocabulary_size)
