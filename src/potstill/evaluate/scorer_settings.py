"""Settings of scorers beside verifiers: BERTScore, a judge, lm-eval; nothing heavy is imported here."""

from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveInt, ValidationInfo, field_validator

from potstill.core.errors import DataError
from potstill.core.hashing import hash_bytes, hash_file
from potstill.core.settings import InputPath, ModelRef, Settings, execution, resolve_path

__all__ = ["BertScoreSettings", "HarnessSettings", "JudgeSettings", "harness_version"]

_NOT_INSTALLED = "not installed"


class BertScoreSettings(Settings):
    """Compare answers with the responses that rows come with, by a model's hidden states (BERTScore).

    Values are not rescaled to a baseline, and are to be compared only where model and layer are the same.
    """

    model: ModelRef = Field(description="a folder, hub id or declared model; an encoder serves best")
    layer: int | None = Field(
        None, ge=0, description="whose hidden states are compared; by default the last (roberta-large: 17)"
    )
    batch: int = execution(16, ge=1, description="texts at once")


def _resolve_rubric(value: str, info: ValidationInfo) -> str:
    return resolve_path(value, (info.context or {}).get("folders", ())) if _is_path(value) else value


def _is_path(rubric: str) -> bool:
    return "\n" not in rubric and rubric.endswith((".txt", ".md"))


class JudgeSettings(Settings):
    """A model judges each model's first answer to a prompt beside the baseline's, shown in both orders.

    It is any declared model: a server, llama.cpp, or one that transformers loads. What it says is kept in the
    request store, as every answer is; the step's `max_cost` and `max_failed_share` hold for it too.
    """

    model: ModelRef = Field(description="the judge")
    rubric: Annotated[str, AfterValidator(_resolve_rubric)] | None = execution(
        None, description="what makes an answer the better one: a text, or the path of a .txt or .md file"
    )
    tasks: list[str] = Field(
        [], description="tasks whose answers are judged; by default all that are written"
    )
    limit: PositiveInt | None = Field(
        None, description="at most so many prompts of each task; the first ones"
    )
    max_new_tokens: int = Field(1024, ge=1, description="tokens of a verdict with its reasons")

    def content(self) -> Any:
        """The hash of the rubric's text."""
        text = self.rubric_text()
        return None if text is None else {"rubric": hash_bytes(text.encode())}

    def rubric_text(self) -> str | None:
        """The rubric, None for the default one. DataError where its file cannot be read or holds nothing."""
        if self.rubric is None or not _is_path(self.rubric):
            return self.rubric
        try:
            text = Path(self.rubric).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the judge's rubric cannot be read ({error})",
                where=self.rubric,
                expected="a text file in UTF-8, or the text itself",
            ) from error
        if not text:
            raise DataError("the judge's rubric is empty", where=self.rubric, expected="some text")
        return text

    @field_validator("rubric")
    @classmethod
    def _check(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError(
                "a rubric says what makes an answer the better one; leave it out for the default"
            )
        return value


class HarnessSettings(Settings):
    """Benchmarks of lm-eval, on models that transformers loads; they are listed as `lm_eval:<task>`."""

    tasks: list[str] = Field(min_length=1, description="by lm-eval's names")
    include: InputPath | None = execution(None, description="a folder with tasks of your own, in YAML")
    shots: int | None = Field(None, ge=0, description="examples before a question; by default the task's own")
    limit: PositiveInt | None = Field(None, description="at most so many questions of each task")
    chat: bool = Field(False, description="put questions through the model's chat template")

    def content(self) -> Any:
        """The library's version, and the hashes of the included files."""
        found: dict[str, Any] = {"lm_eval": harness_version() or _NOT_INSTALLED}
        if self.include is not None:
            folder = Path(self.include)
            if not folder.is_dir():
                raise DataError(
                    "there is no such folder of lm-eval tasks",
                    where=self.include,
                    expected="YAML files in it",
                )
            files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".py"))
            found["files"] = {str(path.relative_to(folder)): hash_file(path) for path in files}
        return found


def harness_version() -> str | None:
    """The version of lm-eval, None where it is not installed."""
    try:
        return metadata.version("lm-eval")
    except metadata.PackageNotFoundError:
        return None
