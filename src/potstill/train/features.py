"""Feature distillation: a student's inner states beside those of a teacher in memory, layer by layer.

Layer l's state is what the block behind it reads, the last layer's what the head reads; so 0 are the
embeddings, as in transformers' `hidden_states`. The relations of layer l are between the queries, keys and
values of block l, as its projections give them, before rotary positions.

Shapes: B rows, T positions, N counted tokens, W the width of a state.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from potstill.core.errors import ModelError, TrainingError
from potstill.losses.feature import feature_sum
from potstill.losses.head import at_least_fp32
from potstill.models import hidden_states, plain_model, removing
from potstill.student.depth import block_input, decoder_blocks
from potstill.train.settings import FeatureSettings

if TYPE_CHECKING:
    from potstill.train.student import MicroBatch

__all__ = ["PROJECTIONS_FILE", "Counted", "FeatureLoss", "Passed", "States", "counted", "layer_map"]

PROJECTIONS_FILE = "feature/projections.safetensors"
"""In a folder of its own: what loads a model may take every safetensors file beside it for its weights."""

_SEPARATE = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_FUSED = frozenset({"qkv_proj", "c_attn"})

States = dict[tuple[int, str], Tensor]
"""By layer, and by "state" or "query", "key" and "value", the vectors of the counted tokens (NW)."""


Passed = dict[tuple[int, str], list[Tensor]]
"""Likewise what went through a model, whole: a tensor [B, T, W] a pass."""


class Counted(NamedTuple):
    """Which positions of a micro-batch a feature loss counts (BT), and how many of each of its rows."""

    mask_BT: Tensor
    row_tokens: list[int]


def counted(batch: "MicroBatch", tokens: str) -> Counted:
    """The positions that predict supervised tokens, or all real ones; padding never counts."""
    ids_BT, packed = batch.input_ids_BT, batch.position_ids_BT is not None
    lengths = list(batch.lengths)
    if tokens == "all":
        ends_B1 = torch.tensor([sum(lengths)] if packed else lengths, device=ids_BT.device)[:, None]
        mask_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < ends_B1
    else:
        mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        mask_BT[:, :-1] = batch.loss_mask_BT[:, 1:].bool()
    rows = torch.split(mask_BT[0, : sum(lengths)], lengths) if packed else list(mask_BT)
    return Counted(mask_BT, torch.stack([row.sum() for row in rows]).tolist())


def layer_map(settings: FeatureSettings, student_layers: int, teacher_layers: int) -> dict[int, int]:
    """The teacher's layer that each compared layer of the student has (Jiao et al. 2020, sec. 3.1).

    "uniform" gives the student's layer m of M the teacher's nearest to m / M of its depth. Raises
    TrainingError for a layer that a model does not have.
    """
    if isinstance(settings.layers, dict):
        pairs = dict(settings.layers)
    elif settings.layers == "uniform":
        pairs = {
            m: max(1, math.floor(m * teacher_layers / student_layers + 0.5))
            for m in range(1, student_layers + 1)
        }
    else:
        pairs = {1: 1} if settings.layers == "first_and_last" else {}
        pairs[student_layers] = teacher_layers
    if settings.embeddings:
        pairs[0] = 0
    for whose, layers, last in (
        ("student", pairs.keys(), student_layers),
        ("teacher", pairs.values(), teacher_layers),
    ):
        if max(layers) > last:
            raise TrainingError(
                f"feature.layers names the {whose}'s layer {max(layers)}, and its last is {last}",
                expected=f"layers 0 (the embeddings) to {last} (what the head reads)",
            )
    return dict(sorted(pairs.items()))


@contextmanager
def _listening(model: Any, layers: Mapping[int, object], *, relations: bool) -> Iterator[Passed]:
    """While open, what a model's passes give at some layers.

    Only while open: activations that are recomputed in the backward pass go through the same modules again.
    """
    plain, passed = plain_model(model), Passed()
    blocks = decoder_blocks(plain)
    hooks = []
    for layer in layers:
        if relations:
            hooks += [
                module.register_forward_hook(_keep_vectors(passed, layer, parts))
                for parts, module in _attention_projections(blocks[layer - 1], plain)
            ]
        elif layer < len(blocks):
            hooks.append(
                blocks[layer].register_forward_pre_hook(_keep_input(passed, layer), with_kwargs=True)
            )
        else:
            hooks.append(plain.get_decoder().register_forward_hook(_keep_last(passed, layer)))
    with removing(hooks):
        yield passed


def _keep_input(passed: Passed, layer: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed.setdefault((layer, "state"), []).append(block_input(args, kwargs))

    return hook


def _keep_last(passed: Passed, layer: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        passed.setdefault((layer, "state"), []).append(output.last_hidden_state)

    return hook


def _keep_vectors(passed: Passed, layer: int, widths: dict[str, int]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        pieces = [output] if len(widths) == 1 else torch.split(output, list(widths.values()), dim=-1)
        for part, vectors_BTW in zip(widths, pieces, strict=True):
            passed.setdefault((layer, part), []).append(vectors_BTW)

    return hook


def _attention_projections(block: nn.Module, model: Any) -> list[tuple[dict[str, int], nn.Module]]:
    """The modules of a block that give queries, keys and values, with the widths of what each gives."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * head
    others = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head
    widths = {"query": queries, "key": others, "value": others}
    named = {name.rpartition(".")[2]: module for name, module in reversed(list(block.named_modules()))}
    fused = [named[name] for name in _FUSED & named.keys()]
    if fused:
        return [(widths, fused[0])]
    if not _SEPARATE.keys() <= named.keys():
        raise ModelError(
            f"the queries, keys and values of a {model.config.model_type} model are not known by name",
            expected=f"blocks with {', '.join(_SEPARATE)}, or one of {', '.join(sorted(_FUSED))}",
            mend="choose another feature.kind: hidden states and CKA are known for every decoder",
        )
    return [({part: widths[part]}, named[name]) for name, part in _SEPARATE.items()]


@torch.no_grad()
def _probe(model: Any, layers: Mapping[int, object], *, relations: bool) -> States:
    """The states of one token, whose widths and types those of all others have."""
    was_training = model.training
    model.eval()  # dropout would draw numbers that training then misses
    try:
        with _listening(model, layers, relations=relations) as passed:
            hidden_states(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
    finally:
        model.train(was_training)
    return {key: state_BTW[0] for key, (state_BTW,) in passed.items()}


class FeatureLoss(nn.Module):
    """The distance of a student's inner states from its teacher's, and the projections that go with it.

    A projection is a linear layer without bias from the student's width to the teacher's, one a pair of
    layers, trained with the student. To a greater width it begins as an isometry: states keep their sizes and
    angles. Where widths are equal there is none (as in DistilBERT): a student made from its teacher already
    has its coordinates, which a projection would let go of. CKA and relations need none at any widths.

    Raises TrainingError for layers that a model does not have and for heads that do not divide its vectors,
    ModelError for relations in a model whose projections are not known.
    """

    def __init__(self, settings: FeatureSettings, student: Any, teacher: Any, seed: int) -> None:
        super().__init__()
        self.settings = settings
        self.relations = settings.kind == "relations"
        self.pairs = layer_map(
            settings, *(len(decoder_blocks(plain_model(one))) for one in (student, teacher))
        )
        self._teacher_layers = dict.fromkeys(self.pairs.values())
        of_student = _probe(student, self.pairs, relations=self.relations)
        of_teacher = _probe(teacher, self._teacher_layers, relations=self.relations)
        self.heads = self._relation_heads(student, of_student, of_teacher) if self.relations else 1
        self.projections = nn.ModuleDict()
        if settings.kind in ("hidden_mse", "hidden_cosine"):
            generator = torch.Generator().manual_seed(seed)
            for layer, other in self.pairs.items():
                state, wanted = of_student[layer, "state"], of_teacher[other, "state"].shape[-1]
                if state.shape[-1] != wanted:
                    dtype = at_least_fp32(state.dtype)
                    # Its usual first values would be drawn from everybody's generator.
                    empty = nn.Linear(state.shape[-1], wanted, bias=False, dtype=dtype, device="meta")
                    made = empty.to_empty(device="cpu")
                    nn.init.orthogonal_(made.weight, generator=generator)
                    self.projections[str(layer)] = made.to(state.device)

    def _relation_heads(self, student: Any, of_student: States, of_teacher: States) -> int:
        widths = sorted({one.shape[-1] for one in (*of_student.values(), *of_teacher.values())})
        common = math.gcd(*widths)
        stated = self.settings.relation_heads
        if stated is None:
            most = plain_model(student).config.get_text_config().num_attention_heads
            return max(heads for heads in range(1, most + 1) if common % heads == 0)
        if common % stated:
            raise TrainingError(
                f"feature.relation_heads is {stated}, which does not divide the vectors of "
                f"{', '.join(map(str, widths))} entries that queries, keys and values have",
                expected=f"a divisor of {common}",
            )
        return stated

    @contextmanager
    def listening(self, model: Any, *, teacher: bool = False) -> Iterator[Passed]:
        """While open, what student or teacher gives at its compared layers; `joined` makes states of it."""
        layers = self._teacher_layers if teacher else self.pairs
        with _listening(model, layers, relations=self.relations) as passed:
            yield passed

    def joined(self, passed: Passed, tokens: Counted) -> States:
        """The states of the counted tokens, row by row in order.

        A prefix that all rows share went through the model once, in a pass before theirs.
        """
        rows, states = len(tokens.mask_BT), States()
        for key, passes in passed.items():
            whole = [one.expand(rows, -1, -1) for one in passes]
            states[key] = (torch.cat(whole, dim=1) if len(whole) > 1 else whole[0])[tokens.mask_BT]
        return states

    def forward(self, of_student: States, of_teacher: States, row_tokens: list[int]) -> Tensor:
        """The feature loss, summed over tokens: the mean over layers, of relations the sum of their three.

        Raises TrainingError where no state of the student's has a gradient.
        """
        states = list(of_student.values())
        if torch.is_grad_enabled() and not self.projections and not any(one.requires_grad for one in states):
            raise TrainingError(
                "feature has nothing to train: no compared state of the student's has a gradient",
                expected="trained weights at or before the compared layers, and activations that are "
                "recomputed with use_reentrant: false, if at all",
                mend="compare later layers, or train more of the student",
            )
        total = states[0].new_zeros((), dtype=at_least_fp32(states[0].dtype))
        for (layer, part), state_NW in of_student.items():
            key = str(layer)
            total = total + feature_sum(
                self.settings.kind,
                self.projections[key](state_NW) if key in self.projections else state_NW,
                of_teacher[self.pairs[layer], part],
                row_tokens,
                relation_heads=self.heads,
            )
        return total / len(self.pairs)

    def optimiser_group(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The projections as torch's optimisers take them; none where there are none."""
        some = list(self.projections.parameters())
        rate = lr * self.settings.projection_lr_multiplier
        return [{"params": some, "lr": rate, "weight_decay": weight_decay}] if some else []

    def as_json(self) -> dict[str, Any]:
        """What is compared, for a manifest."""
        weights = self.projections.state_dict()
        shapes = {name.partition(".")[0]: list(weight.shape) for name, weight in weights.items()}
        return {
            "kind": self.settings.kind,
            "layers": {str(one): other for one, other in self.pairs.items()},
            **({"relation_heads": self.heads} if self.relations else {}),
            **({"projections": shapes} if shapes else {}),
        }

    def as_text(self) -> str:
        """What is compared, for a terminal."""
        pairs = ", ".join(f"{one} to {other}" for one, other in self.pairs.items())
        text = f"feature {self.settings.kind}: the student's layer {pairs} of the teacher"
        if self.relations:
            text += f", {self.heads} relation heads"
        if self.projections:
            size = sum(one.numel() for one in self.projections.parameters())
            text += f"; {size:,} parameters of projections, saved apart in {PROJECTIONS_FILE}"
        return text
