"""Rows through a model and its chunked head: what training, evaluation and selection ask of every token.

Shapes: B rows, T tokens, N supervised tokens, H hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from potstill.core.errors import ModelError
from potstill.core.memory import is_out_of_memory
from potstill.data.batches import collate, micro_batches
from potstill.data.chat import Rendered
from potstill.data.prefixes import batches_by_prefix, prefix_tree, shared_prefix
from potstill.losses.head import CHUNK_TOKENS, TokenFunction, per_token, supervised_pairs
from potstill.losses.metrics import comparison
from potstill.losses.response import cross_entropy, response_loss
from potstill.losses.types import Live
from potstill.models import LoadedModel, hidden_states, output_head
from potstill.models.prefixes import Prefix, can_share_prefix, hidden_states_after, run_prefixes

__all__ = [
    "Pieces",
    "RowFunction",
    "TraceFigures",
    "compare_on_traces",
    "hidden_of_rows",
    "micro_batch_tokens",
    "run_prefix",
    "run_shared_prefix",
    "score_rows",
    "supervised_hidden",
    "token_logprobs",
]

RowFunction = Callable[[Sequence[Rendered], Tensor], TokenFunction]
"""From rows and their supervised tokens (N) to what is asked of each of these tokens."""

Row = TypeVar("Row")
Result = TypeVar("Result")

# Below this a second pass through the layers costs more than the tokens it saves.
_WORTH_SHARING = 8
_CPU_TOKENS, _GPU_TOKENS = 2048, 16384
# About what a forward pass costs beside its tokens, in tokens: reading the weights, starting the kernels.
_CPU_PASS_TOKENS, _GPU_PASS_TOKENS = 16, 256
# Keys and values that a pass may hold of one layer, prefixes included, in multiples of its tokens: a hundred
# answers of a few tokens behind a long prompt are few tokens, and a hundred times its keys and values.
_KEYS_A_TOKEN = 64


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
        (shared,) = run_prefixes(model, input_ids_BT[:1, :prefix], [prefix], [None])
        hidden_BTH = hidden_states_after(model, input_ids_BT[:, prefix:], [shared] * len(input_ids_BT))
    else:
        hidden_BTH = hidden_states(model, input_ids_BT, position_ids_BT=position_ids_BT)
    return supervised_pairs(hidden_BTH, input_ids_BT[:, prefix:], loss_mask_BT[:, prefix:])


def run_shared_prefix(model: Any, rows: Sequence[Rendered]) -> Prefix | None:
    """The prefix that all rows share, run once; None where that is not worth it or the model cannot."""
    return run_prefix(model, rows[0].ids[: shared_prefix(rows)] if rows else [])


def run_prefix(model: Any, token_ids: Sequence[int]) -> Prefix | None:
    """A prefix of rows, run once; None where that is not worth it or the model cannot."""
    if len(token_ids) < _WORTH_SHARING or not can_share_prefix(model):
        return None
    with torch.no_grad():
        ids_1T = torch.tensor([token_ids], device=model.device)
        return run_prefixes(model, ids_1T, [len(token_ids)], [None])[0]


def hidden_of_rows(
    model: Any, rows: Sequence[Rendered], *, max_tokens: int | None = None, prefix: Prefix | None = None
) -> tuple[Tensor, Tensor]:
    """The trunk's hidden states that predict the rows' supervised tokens (NH), and those tokens (N).

    What several rows begin with is run once for all of them, and rows of like length share a pass of at most
    `max_tokens` padded tokens, fewer behind long prefixes. All rows begin with `prefix`, where it is given.
    """
    device = model.device
    max_tokens = max_tokens or micro_batch_tokens(device)
    pass_tokens = _CPU_PASS_TOKENS if device.type == "cpu" else _GPU_PASS_TOKENS
    prefixes = _prefixes_of_rows(model, rows, prefix, max_tokens, pass_tokens)
    starts = [0 if one is None else one.tokens for one in prefixes]
    own = [_width(len(row.ids) - start, start) for row, start in zip(rows, starts, strict=True)]
    found: list[Tensor | None] = [None] * len(rows)
    for is_behind in (True, False):
        alike = [number for number, one in enumerate(prefixes) if (one is not None) == is_behind]
        for batch in micro_batches(own, alike, max_tokens, pass_tokens=pass_tokens):
            parts = [Rendered(rows[n].ids[starts[n] :], rows[n].mask[starts[n] :]) for n in batch]
            tensors = {name: one.to(device) for name, one in collate(parts, pad_id=0).items()}
            before = [one for one in map(prefixes.__getitem__, batch) if one is not None]
            if before:
                hidden_BTH = hidden_states_after(model, tensors["input_ids"], before)
            else:
                hidden_BTH = hidden_states(model, tensors["input_ids"])
            hidden_NH, _ = supervised_pairs(hidden_BTH, tensors["input_ids"], tensors["loss_mask"])
            counts = [part.supervised_tokens for part in parts]
            for number, states_NH in zip(batch, torch.split(hidden_NH, counts), strict=True):
                found[number] = states_NH
    targets = [id_ for row in rows for id_, supervised in zip(row.ids, row.mask, strict=True) if supervised]
    return torch.cat([one for one in found if one is not None]), torch.tensor(targets, device=device)


def _prefixes_of_rows(
    model: Any, rows: Sequence[Rendered], prefix: Prefix | None, max_tokens: int, pass_tokens: int
) -> list[Prefix | None]:
    """The part of each row that is run before its own pass, because other rows begin with it too.

    The longest way through the tree of what rows share is walked in as many rounds, each of batched passes.
    """
    found: list[Prefix | None] = [None] * len(rows)
    if not can_share_prefix(model):
        return found
    sharing = [number for number, row in enumerate(rows) if _may_share(model, row)]
    kept = [rows[number] for number in sharing]
    segments, behind = prefix_tree(kept, start=0 if prefix is None else prefix.tokens, worth=pass_tokens)
    lengths = [one.end - one.start for one in segments]
    widths = [_width(one.end - one.start, one.start) for one in segments]
    rounds: list[int] = []
    for one in segments:
        rounds.append(0 if one.behind is None else rounds[one.behind] + 1)
    run: dict[int | None, Prefix | None] = {None: prefix}
    for current in range(max(rounds, default=-1) + 1):
        due = [number for number, its_round in enumerate(rounds) if its_round == current]
        for batch in micro_batches(widths, due, max_tokens, pass_tokens=pass_tokens):
            some = [segments[number] for number in batch]
            ids_BT = pad_sequence(
                [torch.tensor(kept[one.row].ids[one.start : one.end]) for one in some], batch_first=True
            ).to(model.device)
            before = [run[one.behind] for one in some]
            made = run_prefixes(model, ids_BT, [lengths[number] for number in batch], before)
            run.update(zip(batch, made, strict=True))
    for number, last in zip(sharing, behind, strict=True):
        found[number] = run[last]
    return found


def _width(tokens: int, before: int) -> int:
    """The tokens that a row takes the room of, with its keys and values behind so many tokens before."""
    return max(tokens, math.ceil((before + tokens) / _KEYS_A_TOKEN))


def _may_share(model: Any, row: Rendered) -> bool:
    """Whether tokens that are spared cost more than what attention behind a prefix takes in addition.

    Such attention has a mask, and computes the half that causal attention leaves out: 2 T^2 H operations a
    layer for T tokens, where its weights cost a token about 24 H^2.
    """
    own, width = row.supervised_tokens, int(model.config.get_text_config().hidden_size)
    return own**2 <= 12 * width * (len(row.ids) - own)


def score_rows(
    model: LoadedModel,
    rows: Sequence[Rendered],
    quantities: RowFunction,
    *,
    vocabulary_size: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    max_tokens: int | None = None,
    prefix: Prefix | None = None,
) -> list[dict[str, Tensor]]:
    """The quantities of each row's supervised tokens; `hidden_of_rows` says how rows share forward passes.

    In float64 on the CPU; the first axis of each is the row's supervised tokens. The head is cut to the first
    `vocabulary_size` ids, by default those that tokenizer and model both know. Rows that do not fit into
    memory together are scored in pieces. Raises ModelError for one that does not fit alone.
    """

    def score(rows: Sequence[Rendered]) -> list[dict[str, Tensor]]:
        hidden_NH, targets_N = hidden_of_rows(model.model, rows, max_tokens=max_tokens, prefix=prefix)
        head = output_head(model.model, vocabulary_size or model.vocabulary_size)
        values = per_token(hidden_NH, head, quantities(rows, targets_N), chunk_tokens=chunk_tokens)
        counts = [row.supervised_tokens for row in rows]
        parts = {name: torch.split(value.double().cpu(), counts) for name, value in values.items()}
        return [{name: part[number] for name, part in parts.items()} for number in range(len(rows))]

    def too_large(row: Rendered) -> ModelError:
        return ModelError(
            f"a row of {len(row.ids):,} tokens does not fit into memory",
            mend="leave such rows out, or use a machine or device with more memory",
        )

    with torch.no_grad():
        return list(Pieces().run(score, rows, too_large))


def token_logprobs(
    model: LoadedModel,
    rows: Sequence[Rendered],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    max_tokens: int | None = None,
    prefix: Prefix | None = None,
) -> list[Tensor]:
    """Log q(token | what stands before it) of each row's supervised tokens, in nats at temperature 1."""

    def quantities(rows: Sequence[Rendered], targets_N: Tensor) -> TokenFunction:
        return lambda logits_CV, part: {"logprob": -cross_entropy(logits_CV, targets_N[part])}

    scored = score_rows(
        model, rows, quantities, chunk_tokens=chunk_tokens, max_tokens=max_tokens, prefix=prefix
    )
    return [one["logprob"] for one in scored]


@dataclass(frozen=True)
class TraceFigures:
    """Sums over one trace's supervised tokens; KL(teacher || model) and agreement only with a teacher."""

    supervised_tokens: int
    cross_entropy_nats: float
    kl_nats: float | None = None
    agreed_tokens: int | None = None


def compare_on_traces(
    model: LoadedModel,
    teacher: LoadedModel | None,
    rows: Sequence[Rendered],
    *,
    max_tokens: int,
    chunk_tokens: int = CHUNK_TOKENS,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[TraceFigures]:
    """The figures of each row, in order.

    Both models read the same token ids. Their hidden states of one batch (about `max_tokens` tokens) go
    through the two heads chunk by chunk, so that no more than `chunk_tokens` rows of logits exist a model;
    both heads are cut to the ids that both models know. Sums are taken in float64. The caller has made sure
    that the tokenizers are equal. `on_batch` hears how many rows are done and may raise to stop.
    """
    size = min(one.vocabulary_size for one in (model, teacher) if one is not None)
    found: list[TraceFigures | None] = [None] * len(rows)
    for batch in batches_by_prefix(rows, max_tokens):
        scored = score_rows(
            model,
            [rows[number] for number in batch],
            partial(_quantities, teacher, size, max_tokens),
            vocabulary_size=size,
            chunk_tokens=chunk_tokens,
            max_tokens=max_tokens,
        )
        for number, values in zip(batch, scored, strict=True):
            sums = {name: float(value_N.sum()) for name, value_N in values.items()}
            found[number] = TraceFigures(
                rows[number].supervised_tokens,
                sums["cross_entropy"],
                sums.get("kl"),
                round(sums["agreement"]) if "agreement" in sums else None,
            )
        on_batch(len(batch))
    return [one for one in found if one is not None]


def _quantities(
    teacher: LoadedModel | None, size: int, max_tokens: int, rows: Sequence[Rendered], targets_N: Tensor
) -> TokenFunction:
    if teacher is None:
        return response_loss(targets_N)
    hidden_NH, _ = hidden_of_rows(teacher.model, rows, max_tokens=max_tokens)
    return comparison(targets_N, Live(hidden_NH, output_head(teacher.model, size)))


class Pieces:
    """Into how many pieces batches are cut to fit into memory: more of them each time that it runs out.

    `more` hears of each new number.
    """

    def __init__(self, count: int = 1, more: Callable[[int], None] = lambda count: None) -> None:
        self.count, self._more = count, more

    def run(
        self,
        work: Callable[[Sequence[Row]], Sequence[Result]],
        batch: Sequence[Row],
        too_large: Callable[[Row], ModelError],
    ) -> Iterator[Result]:
        """What `work` gives for each row, in order. Raises `too_large` for one that does not fit alone."""
        start = 0
        while start < len(batch):
            rows = max(1, -(-len(batch) // self.count))
            try:
                done = work(batch[start : start + rows])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if rows == 1:
                    raise too_large(batch[start]) from error
                self.count *= 2
                self._more(self.count)
                continue  # out of the handler, whose traceback keeps the failed pass's tensors alive
            yield from done
            start += len(done)


def micro_batch_tokens(device: torch.device) -> int:
    """Padded tokens that a forward pass without gradients has by default on a device."""
    return _CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS
