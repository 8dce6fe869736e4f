"""Rows through a model and its chunked head: what training, evaluation and selection ask of every token.

Shapes: B rows, T tokens, N supervised tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.core.errors import ModelError
from potstill.data.batches import collate
from potstill.data.chat import Rendered
from potstill.losses.head import CHUNK_TOKENS, TokenFunction, per_token, supervised_pairs
from potstill.losses.response import cross_entropy
from potstill.models import LoadedModel, can_share_prefix, hidden_states, hidden_states_after, output_head

__all__ = [
    "RowFunction",
    "hidden_of_rows",
    "is_out_of_memory",
    "micro_batch_tokens",
    "score_rows",
    "shared_prefix",
    "supervised_hidden",
    "token_logprobs",
]

RowFunction = Callable[[Sequence[Rendered], Tensor], TokenFunction]
"""From rows and their supervised tokens (N) to what is asked of each of these tokens."""

# Below this a second pass through the layers costs more than the tokens it saves.
_WORTH_SHARING = 8
_CPU_TOKENS, _GPU_TOKENS = 2048, 16384


def shared_prefix(rows: Sequence[Rendered]) -> int:
    """How many first tokens all rows share, short of the first that predicts a supervised token."""
    first, others = rows[0].ids, [row.ids for row in rows[1:]]
    end = min(row.mask.index(1) if 1 in row.mask else len(row.mask) for row in rows) - 1
    if not others:
        return 0
    return next((i for i in range(end) if any(ids[i] != first[i] for ids in others)), max(end, 0))


def supervised_hidden(
    model: Any,
    input_ids_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    prefix_tokens: int = 0,
    position_ids_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The trunk's hidden states that predict supervised tokens (NH), and those tokens (N).

    A prefix that all rows share (a system prompt, say) is run once for all of them. No attention mask is
    needed, because causal attention never looks at the padding on the right.
    """
    prefix = prefix_tokens if can_share_prefix(model) and prefix_tokens >= _WORTH_SHARING else 0
    if prefix:
        hidden_BTH = hidden_states_after(model, input_ids_BT, prefix)
    else:
        hidden_BTH = hidden_states(model, input_ids_BT, position_ids_BT=position_ids_BT)
    return supervised_pairs(hidden_BTH, input_ids_BT[:, prefix:], loss_mask_BT[:, prefix:])


def hidden_of_rows(model: Any, rows: Sequence[Rendered]) -> tuple[Tensor, Tensor]:
    """`supervised_hidden` of rows, padded together in one forward pass."""
    tensors = {name: tensor.to(model.device) for name, tensor in collate(rows, pad_id=0).items()}
    return supervised_hidden(
        model, tensors["input_ids"], tensors["loss_mask"], prefix_tokens=shared_prefix(rows)
    )


def score_rows(
    model: LoadedModel,
    rows: Sequence[Rendered],
    quantities: RowFunction,
    *,
    vocabulary_size: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[dict[str, Tensor]]:
    """The quantities of each row's supervised tokens, rows padded together in one forward pass.

    In float64 on the CPU; the first axis of each is the row's supervised tokens. The head is cut to the first
    `vocabulary_size` ids, by default those that tokenizer and model both know. Rows that do not fit into
    memory together are scored in halves. Raises ModelError for one that does not fit alone.
    """
    try:
        return _score_rows(
            model, rows, quantities, vocabulary_size or model.vocabulary_size, chunk_tokens=chunk_tokens
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            raise ModelError(
                f"a row of {len(rows[0].ids):,} tokens does not fit into memory",
                mend="leave such rows out, or use a machine or device with more memory",
            ) from error
    # Outside of the handler, whose traceback would keep the failed pass's tensors alive.
    half = len(rows) // 2
    return [
        scored
        for part in (rows[:half], rows[half:])
        for scored in score_rows(
            model, part, quantities, vocabulary_size=vocabulary_size, chunk_tokens=chunk_tokens
        )
    ]


@torch.no_grad()
def _score_rows(
    model: LoadedModel,
    rows: Sequence[Rendered],
    quantities: RowFunction,
    vocabulary_size: int,
    *,
    chunk_tokens: int,
) -> list[dict[str, Tensor]]:
    hidden_NH, targets_N = hidden_of_rows(model.model, rows)
    head = output_head(model.model, vocabulary_size)
    values = per_token(hidden_NH, head, quantities(rows, targets_N), chunk_tokens=chunk_tokens)
    counts = [row.supervised_tokens for row in rows]
    parts = {name: torch.split(value.double().cpu(), counts) for name, value in values.items()}
    return [{name: part[number] for name, part in parts.items()} for number in range(len(rows))]


def token_logprobs(
    model: LoadedModel, rows: Sequence[Rendered], *, chunk_tokens: int = CHUNK_TOKENS
) -> list[Tensor]:
    """Log q(token | what stands before it) of each row's supervised tokens, in nats at temperature 1."""

    def quantities(rows: Sequence[Rendered], targets_N: Tensor) -> TokenFunction:
        return lambda logits_CV, part: {"logprob": -cross_entropy(logits_CV, targets_N[part])}

    return [scored["logprob"] for scored in score_rows(model, rows, quantities, chunk_tokens=chunk_tokens)]


def micro_batch_tokens(device: torch.device) -> int:
    """Padded tokens that a forward pass without gradients has by default on a device."""
    return _CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that memory ran out, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
