"""The base of all settings, references between steps, and the part of settings that enters a fingerprint."""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

__all__ = [
    "DataRef",
    "InputPath",
    "ModelRef",
    "ModelsRef",
    "Part",
    "Reference",
    "Settings",
    "execution",
    "meaning",
    "references",
    "resolve_path",
]


class Settings(BaseModel):
    """Strict, immutable settings: unknown keys, wrong types and numbers that are not finite are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    def content(self) -> Any:
        """Hashes of whatever these settings read from outside (files, weights), or None.

        It enters the fingerprint; the path that leads there is an execution field, so that a moved file stays
        the same input. Raises PotstillError when the input is missing.
        """
        return None


class _Resolved(str):
    """A text of a recipe that becomes an absolute path where something lies there."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(
            cls._resolve,
            core_schema.str_schema(strict=True, min_length=1),
            serialization=core_schema.to_string_ser_schema(),
        )

    @classmethod
    def _resolve(cls, value: str, info: core_schema.ValidationInfo) -> Self:
        return cls(resolve_path(value, (info.context or {}).get("folders", ())))


class InputPath(_Resolved):
    """A path to a file or folder: relative to the recipe that names it, else to where the user stands."""


def resolve_path(value: str, folders: Sequence[Path] = ()) -> str:
    """An absolute path where `value` exists in one of the folders or the working folder, else `value`."""
    # What cannot be a path (too long, a NUL, an unknown user behind ~) leads nowhere.
    with suppress(OSError, RuntimeError, ValueError):
        for base in (*folders, Path.cwd()):
            if (found := base / Path(value).expanduser()).exists():
                return str(found.resolve())
    return value


class Reference(_Resolved):
    """A name in a recipe: `step`, `step[value]`, `step:view`, a declared model, or a path holding a `/`."""

    @classmethod
    def _resolve(cls, value: str, info: core_schema.ValidationInfo) -> Self:
        return super()._resolve(value, info) if "/" in value else cls(value)

    @property
    def target(self) -> str:
        """The name without its view."""
        return self if self.is_path else self.partition(":")[0]

    @property
    def view(self) -> str | None:
        """The part behind the colon: `prompts` or `held_out`."""
        return None if self.is_path else (self.partition(":")[2] or None)

    @property
    def is_path(self) -> bool:
        """Whether this names a file, folder or hub id instead of something declared."""
        return "/" in self


class ModelRef(Reference):
    """A reference to a declared model, to a step that makes one, or a path or hub id."""


class ModelsRef(ModelRef):
    """A reference to a model, or to a step with `each`, which means the models of all its values."""


class DataRef(Reference):
    """A reference to a step that makes prompts, traces or logits, or a path to such an artifact."""


class Part(Settings):
    """Settings that mean some of the rows a reference leads to: those rows are what a fingerprint holds."""

    step: DataRef = Field(description="the step whose rows these are, or a path to such an artifact")


def execution(default: Any, **field: Any) -> Any:
    """A field that says how to execute, not what to make: it never enters a fingerprint."""
    return Field(default, json_schema_extra={"execution": True}, **field)


def _is_execution(model: type[BaseModel], name: str) -> bool:
    extra = model.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("execution"))


def meaning(value: Any, identify: Callable[[Reference | Part], Any] | None = None) -> Any:
    """The JSON-able part of settings that decides what is made: everything but execution fields.

    `identify` says what stands in the place of a reference: in a fingerprint its content, not its name, which
    it is otherwise.
    """
    if isinstance(value, Reference | Part) and identify is not None:
        return identify(value)
    if isinstance(value, Reference):
        return str(value)
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        chosen = {
            field.alias or name: meaning(getattr(value, name), identify)
            for name, field in fields.items()
            if not _is_execution(type(value), name)
        }
        content = value.content() if isinstance(value, Settings) else None
        return chosen if content is None else {**chosen, "content": content}
    if isinstance(value, dict):
        return {str(key): meaning(item, identify) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [meaning(item, identify) for item in value]
    return copy.deepcopy(value)


def references(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Reference]]:
    """Every reference inside settings, with the keys that lead to it, in order of appearance."""
    if isinstance(value, Reference):
        return [(path, value)]
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        items: Any = ((field.alias or name, getattr(value, name)) for name, field in fields.items())
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return []
    return [found for key, item in items for found in references(item, (*path, str(key)))]
