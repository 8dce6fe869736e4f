"""A cross-encoder that learns to find from a question the passages that its rationale finds."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from potstill.core.errors import DataError, TrainingError
from potstill.core.step import StepContext
from potstill.losses.ranking import ranking_kl
from potstill.models import load_encoder
from potstill.retrieval.settings import RerankerSettings, RetrieveSettings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Example", "Reranker", "open_reranker"]

_CLIP_NORM = 1.0
_RATIONALE_TEMPERATURES = {"bm25": 1.0, "dense": 0.05, "hybrid": 0.005}


class Example(NamedTuple):
    """A question, its candidates and what each of them is worth to the rationale."""

    question: str
    passages: list[str]
    relevance: list[float]


class Reranker:
    """An encoder of question and passage together, with one number as its answer."""

    def __init__(self, model: Any, tokenizer: Any, settings: RerankerSettings) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length = min(settings.max_length, tokenizer.model_max_length)

    def __call__(self, question: str, passages: Sequence[str]) -> "Tensor":
        """The passages' scores for a question, [C]; differentiable while the model is."""
        inputs = self.tokenizer(
            [question] * len(passages),
            list(passages),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.model.device)
        scores: Tensor = self.model(**inputs).logits[:, 0]
        return scores

    def best(self, question: str, passages: Sequence[str], count: int) -> list[int]:
        """The places of the best passages in what is given, best first; of equal ones the earlier."""
        import torch

        with torch.no_grad():
            scores = self(question, passages).tolist()
        return sorted(range(len(passages)), key=lambda place: -scores[place])[:count]

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as a Hugging Face folder, which `model` can name later."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def open_reranker(
    settings: RetrieveSettings, context: StepContext, examples: list[Example]
) -> tuple[Reranker, dict[str, Any]]:
    """The reranker, trained on examples unless it has no epochs, and its figures (loss in nats an epoch).

    Deterministic by the recipe's seed on one machine; an interrupted training begins again. Raises DataError
    where nothing is there to learn from, TrainingError for a loss that is not finite.
    """
    import torch

    stated = settings.reranker
    assert stated is not None
    with torch.random.fork_rng():
        torch.manual_seed(context.derive_seed("reranker"))
        model, tokenizer = load_encoder(stated.model, task="scoring", device=settings.device, say=context.say)
        reranker = Reranker(model, tokenizer, stated)
        if not stated.epochs:
            return reranker, {}
        if not examples:
            raise DataError(
                "no row teaches the reranker anything",
                expected="rows with a response that are not held out and bring up two passages at least",
                mend="give it traces, or a trained reranker: `reranker: {model: FOLDER, epochs: 0}`",
            )
        return reranker, {"loss": _train(reranker, examples, settings, context)}


def _train(
    reranker: Reranker, examples: list[Example], settings: RetrieveSettings, context: StepContext
) -> dict[str, float]:
    import torch

    stated = settings.reranker
    assert stated is not None
    temperature = stated.rationale_temperature or _RATIONALE_TEMPERATURES[settings.method]
    optimiser = torch.optim.AdamW(reranker.model.parameters(), lr=stated.lr)
    batches = list(_batches(len(examples), stated, context))
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=len(batches))
    losses: dict[str, list[float]] = {}
    reranker.model.train()
    with context.progress("training the reranker", total=stated.epochs * len(examples)) as progress:
        for epoch, batch in batches:
            for number in batch:
                context.check_stop()
                example = examples[number]
                scores_C = reranker(example.question, example.passages)
                loss = ranking_kl(
                    torch.tensor(example.relevance, device=scores_C.device),
                    scores_C,
                    relevance_temperature=temperature,
                    score_temperature=stated.question_temperature,
                )
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"the reranker's loss is {loss.item()} in epoch {epoch}",
                        mend=f"lower reranker.lr (it is {stated.lr:g}) or raise the temperatures",
                    )
                torch.autograd.backward(loss / len(batch))
                losses.setdefault(f"epoch {epoch}", []).append(loss.item())
                progress.advance(loss=f"{loss.item():.3f}")
            torch.nn.utils.clip_grad_norm_(reranker.model.parameters(), _CLIP_NORM)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
    reranker.model.eval()
    return {epoch: sum(values) / len(values) for epoch, values in losses.items()}


def _batches(rows: int, stated: RerankerSettings, context: StepContext) -> Iterator[tuple[int, list[int]]]:
    """Epoch (from 1) and rows of every optimiser step; each epoch in an order of its own."""
    import random

    for epoch in range(1, stated.epochs + 1):
        order = list(range(rows))
        random.Random(context.derive_seed("order", epoch)).shuffle(order)
        for start in range(0, rows, stated.batch):
            yield epoch, order[start : start + stated.batch]
