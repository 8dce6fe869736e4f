"""BERTScore: how alike an answer's and a reference's tokens are to a model (Zhang et al. 2020).

Shapes: N and M tokens of the two texts, H hidden size, B texts of a batch, T positions.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from potstill.core.errors import ModelError
from potstill.models import TransformersModel, choose_device, find_source, load_tokenizer
from potstill.models.pretrained import quiet_transformers, read_pretrained

if TYPE_CHECKING:
    import torch

__all__ = ["BertScorer"]

_KINDS = ("precision", "recall", "f1")


class BertScorer:
    """A model whose hidden states behind one layer stand for tokens; the last layer where none is stated.

    Any model that gives hidden states serves, encoders above all. `cut` counts texts that were longer than
    the model's context. Raises ModelError for a model that cannot be read, and for a layer that it has not.
    """

    def __init__(self, settings: TransformersModel, *, layer: int | None = None, batch: int = 16) -> None:
        self.tokenizer, self.batch, self.cut = load_tokenizer(settings), batch, 0
        self._model = _read_trunk(settings)
        config = self._model.config.get_text_config()
        layers = int(config.num_hidden_layers)
        if layer is not None and layer > layers:
            raise ModelError(
                f"the model has {layers} layers, and BERTScore is to read layer {layer}",
                where=settings.path,
                expected=f"a layer from 0 (the embeddings) to {layers}",
            )
        self.layer = layers if layer is None else layer
        self.context = _context(self._model, config, self.tokenizer)

    def scores(
        self,
        answers: Sequence[str],
        references: Sequence[Sequence[str]],
        *,
        on_batch: Callable[[int], None] = lambda answers: None,
    ) -> list[dict[str, float]]:
        """Precision, recall and F1 of each answer; of several references that with the greatest F1.

        Each token is matched with the most alike one of the other text, by cosine; special tokens take no
        part, tokens are not weighted, and nothing is rescaled. A text without any token scores 0.
        """
        found: list[dict[str, float]] = []
        for start in range(0, len(answers), self.batch):
            part = slice(start, start + self.batch)
            texts = dict.fromkeys(
                text
                for answer, known in zip(answers[part], references[part], strict=True)
                for text in (answer, *known)
            )
            states = dict(zip(texts, self._states(list(texts)), strict=True))
            for answer, known in zip(answers[part], references[part], strict=True):
                each = [_match(states[answer], states[text]) for text in known]
                found.append(max(each, key=lambda one: one["bertscore_f1"]))
            on_batch(len(answers[part]))
        return found

    def _states(self, texts: list[str]) -> list["torch.Tensor"]:
        """[N, H] of each text: unit vectors of its tokens."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        found: dict[int, torch.Tensor] = {}
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            found.update(zip(chosen, self._encode([texts[number] for number in chosen]), strict=True))
        return [found[number] for number in range(len(texts))]

    def _encode(self, texts: list[str]) -> list["torch.Tensor"]:
        import torch

        rows = [self.tokenizer(text.strip(), return_special_tokens_mask=True) for text in texts]
        if self.context is not None:
            self.cut += sum(len(row["input_ids"]) > self.context for row in rows)
        rows = [
            {key: row[key][: self.context] for key in ("input_ids", "special_tokens_mask")} for row in rows
        ]
        width = max(1, *(len(row["input_ids"]) for row in rows))
        padding = self.tokenizer.pad_token_id or 0
        ids_BT = torch.tensor(
            [row["input_ids"] + [padding] * (width - len(row["input_ids"])) for row in rows]
        )
        mask_BT = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        )
        device = self._model.device
        with torch.no_grad():
            states_BTH = self._model(
                input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), output_hidden_states=True
            ).hidden_states[self.layer]
        states_BTH = torch.nn.functional.normalize(states_BTH.float(), dim=-1).cpu()
        return [
            states_BTH[number][: len(row["input_ids"])][torch.tensor(row["special_tokens_mask"]) == 0]
            for number, row in enumerate(rows)
        ]


def _match(answer_NH: "torch.Tensor", reference_MH: "torch.Tensor") -> dict[str, float]:
    """Precision is over the answer's tokens, recall over the reference's (eq. 1-3)."""
    if not len(answer_NH) or not len(reference_MH):
        return dict.fromkeys((f"bertscore_{kind}" for kind in _KINDS), 0.0)
    cosine_NM = answer_NH.double() @ reference_MH.double().T
    precision, recall = float(cosine_NM.amax(1).mean()), float(cosine_NM.amax(0).mean())
    f1 = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
    return {"bertscore_precision": precision, "bertscore_recall": recall, "bertscore_f1": f1}


def _read_trunk(settings: TransformersModel) -> Any:
    """The model without a head, in float32; a head's weights in the files are left there."""
    import torch
    from transformers import AutoModel

    source = find_source(settings.path)
    if source.kind == "adapter":
        raise ModelError(
            "BERTScore takes whole models", where=settings.path, mend="name the base, or merge the adapter"
        )
    name, options = source.pretrained()
    options |= {"trust_remote_code": settings.trust_remote_code, "dtype": torch.float32}
    with quiet_transformers():
        model, info = read_pretrained(
            AutoModel.from_pretrained, name, where=settings.path, output_loading_info=True, **options
        )
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing from the files and would be random, such as {missing[0]}",
            where=settings.path,
            expected="weights and config.json of one model",
        )
    return model.eval().to(choose_device(settings))


def _context(model: Any, config: Any, tokenizer: Any) -> int | None:
    """How many positions the model has, those before the first word's left out (RoBERTa counts from 2)."""
    positions = getattr(config, "max_position_embeddings", None)
    offset = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    known = [] if positions is None else [int(positions) - (0 if offset is None else int(offset) + 1)]
    known += [int(tokenizer.model_max_length)]
    return min(known) if min(known) < 10**6 else None
