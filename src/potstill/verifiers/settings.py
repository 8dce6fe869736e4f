"""How a recipe says what judges the answers to its prompts; nothing heavy is imported here."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo

from potstill.core.errors import DataError
from potstill.core.hashing import hash_file
from potstill.core.settings import Settings, execution, resolve_path

__all__ = ["CodeVerifier", "FieldRule", "FieldsVerifier", "FunctionVerifier", "Tolerance", "Verifier"]


def _resolve_function(value: str, info: ValidationInfo) -> str:
    place, colon, name = value.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ValueError("expected file.py:name or package.module:name")
    if place.endswith(".py"):
        place = resolve_path(place, (info.context or {}).get("folders", ()))
    return f"{place}:{name}"


class FunctionVerifier(Settings):
    """A function of the user's own judges an answer.

    It is called as `name(answer, row)`: the answer's text, its reasoning left aside, and a dict with
    `prompt`, `messages`, `reference` and `meta` (the row's other columns). It gives True or False, or a
    number in 0..1 that is kept as a score, 1 being right. It runs in a process of its own, bounded in time
    and memory; it is the user's code and is kept from nothing else. An exception concerns its row alone.
    """

    function: Annotated[str, AfterValidator(_resolve_function)] = execution(
        ..., description="`file.py:name`, beside the recipe, or `package.module:name`"
    )
    timeout_s: float = Field(10.0, gt=0, le=100, description="of one call")
    memory_mb: int = Field(4096, ge=64, description="of the process, where the system can bound it")

    def content(self) -> Any:
        """The file's hash and the function's name; what the file imports is not looked into."""
        return {"file": hash_file(self.file), "name": self.function.rpartition(":")[2]}

    @property
    def file(self) -> Path:
        """The file that holds the function. DataError where there is none."""
        place = self.function.rpartition(":")[0]
        if place.endswith(".py"):
            found = Path(place)
        else:
            try:
                spec = importlib.util.find_spec(place)
            except (ImportError, ValueError):
                spec = None
            found = Path((spec.origin if spec is not None else None) or place)
        if not found.is_file():
            raise DataError(
                "there is no such file of a verifier",
                where=self.function,
                expected="file.py:name, relative to the recipe, or the name of an installed module",
            )
        return found


class Tolerance(Settings):
    """Numbers may differ by this much; the larger of the two bounds holds."""

    absolute: float = Field(0.0, ge=0)
    relative: float = Field(0.0, ge=0, description="share of the reference's value")


FieldRule = Literal["exact", "set"] | Tolerance


class FieldsVerifier(Settings):
    """The fields of a JSON object in the answer are compared with those of the reference.

    The object is the last one in the text that can be read, in a fence or not. Each named field has a verdict
    of its own, the share of right fields is the score `fields`, and an answer is right where all are.
    """

    fields: dict[str, FieldRule] | Literal["all"] = Field(
        description="by name, a.b inside another: exact, set (a list in any order), or {absolute, relative} "
        "for numbers; all compares every field of the reference exactly"
    )


class CodeVerifier(Settings):
    """The answer's Python code is run against the row's tests, shut in as far as the system allows.

    Rows are shaped as HumanEval's, MBPP's or APPS's. Nothing is run without this setting.
    """

    allow_code: Literal[True] = Field(description="run code that a model wrote on this machine")
    timeout_s: float = Field(10.0, gt=0, description="of one program, its tests included")
    memory_mb: int = Field(1024, ge=64, description="address space of one program")


_KEYS = {"function": FunctionVerifier, "fields": FieldsVerifier, "allow_code": CodeVerifier}


def _kind(value: Any) -> str | None:
    if isinstance(value, Mapping):
        kinds = [key for key in _KEYS if key in value]
        return kinds[0] if len(kinds) == 1 else None
    return next((key for key, kind in _KEYS.items() if isinstance(value, kind)), None)


Verifier = Annotated[
    Annotated[FunctionVerifier, Tag("function")]
    | Annotated[FieldsVerifier, Tag("fields")]
    | Annotated[CodeVerifier, Tag("allow_code")],
    Discriminator(
        _kind,
        custom_error_type="verifier",
        custom_error_message="expected {function: file.py:name}, {fields: ...} or {allow_code: true}",
    ),
]
"""What judges answers in the place of the rows' own verifiers."""
