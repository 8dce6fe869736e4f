"""Settings of the `retrieve` step; nothing heavy is imported here."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from potstill.core.settings import InputPath, ModelRef, Settings, execution
from potstill.data.sources import Data
from potstill.data.templates import columns_of
from potstill.models import EMBEDDED_ENCODERS, encoder_identity

__all__ = ["DEFAULT_TEMPLATE", "QdrantServer", "RerankerSettings", "RetrieveSettings"]

DEFAULT_TEMPLATE = "Passages:\n\n{passages}\n\nQuestion:\n\n{question}"
_DEFAULT_ENCODER = InputPath(next(iter(EMBEDDED_ENCODERS)))
_ENCODER = f"{', '.join(EMBEDDED_ENCODERS)}; or a folder or hub id of an encoder"


class QdrantServer(Settings):
    """A Qdrant server, in the place of the one in this process."""

    url: str = Field(min_length=1)
    api_key_env: str | None = Field(None, description="the environment variable that holds its key")


class RerankerSettings(Settings):
    """A cross-encoder that learns to find from the question what the rationale finds.

    Its loss is KL(softmax(rho / t_rationale) || softmax(f / t_question)) over the passages that rationale or
    question bring up, where rho is the rationale's retrieval score and f the reranker's from the question.
    """

    model: InputPath = execution(_DEFAULT_ENCODER, description=_ENCODER)
    epochs: int = Field(3, ge=0, description="0 takes a trained one as it is")
    batch: int = Field(8, ge=1, description="questions an optimiser step")
    lr: float = Field(5e-5, gt=0)
    rationale_temperature: float | None = Field(
        None, gt=0, description="t_rationale; by default 1 for bm25, 0.05 for dense, 0.005 for hybrid"
    )
    question_temperature: float = Field(1.0, gt=0, description="t_question")
    max_length: int = Field(256, ge=8, description="tokens of question and passage together")

    def content(self) -> Any:
        """The encoder's identity."""
        return {"model": encoder_identity(self.model)}


class RetrieveSettings(Settings):
    """Put passages of a corpus into prompts (KARD, knowledge-augmented reasoning distillation).

    Rows to train on are searched for by their rationale, held-out rows and prompts without a response by
    their question, since a test has no rationale. Prompts keep their identity, so that held-out rows are the
    same with passages and without.
    """

    kind: ClassVar[str] = "retrieve"
    schema_version: ClassVar[int] = 2

    do: Literal["retrieve"]
    data: Data = Field(description="the prompts or traces")
    corpus: Data = Field(description="the articles: rows with a text, or a step's responses")
    student: ModelRef = Field(description="whose tokens passages and budget are counted in")
    passage_tokens: int = Field(100, ge=8, description="at most so many tokens a passage")
    query: Literal["rationale", "question"] = Field(
        "rationale", description="what rows to train on are searched for by; all others by their question"
    )
    method: Literal["bm25", "dense", "hybrid"] = Field(
        "bm25", description="by words, by an embedding, or both by reciprocal rank fusion"
    )
    k: int = Field(1, ge=1, description="passages a prompt")
    candidates: int = Field(
        8, ge=1, description="passages that a search brings up and the reranker chooses from"
    )
    document_tokens: int = Field(
        256, ge=8, description="budget: all passages of a prompt have at most so many tokens"
    )
    encoder: InputPath = execution(_DEFAULT_ENCODER, description=f"for dense and hybrid: {_ENCODER}")
    reranker: RerankerSettings | None = Field(
        None, description="trained on the rows to train on; chooses where the question is searched for"
    )
    template: str = Field(
        DEFAULT_TEMPLATE, description="the last user message, with {passages} and {question}"
    )
    qdrant: QdrantServer | None = execution(None, description="by default Qdrant runs in this process")
    device: str | None = execution(None, description="cpu, cuda, ...; by default the GPU where there is one")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.k > self.candidates:
            raise ValueError(f"k is {self.k}, more than the {self.candidates} candidates")
        if self.method == "bm25":
            for name in ("encoder", "qdrant"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} belongs to method dense or hybrid")
        if columns_of(self.template) != ["passages", "question"]:
            raise ValueError("template needs {passages} and {question}, and no other column")
        return self

    def content(self) -> Any:
        """The encoder's identity, where it embeds."""
        return None if self.method == "bm25" else {"encoder": encoder_identity(self.encoder)}
