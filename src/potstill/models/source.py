"""What names a model in a recipe, where it leads, and what the model is known by."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo

from potstill.core.errors import ModelError, StoreError
from potstill.core.hashing import hash_bytes, hash_json
from potstill.core.settings import InputPath, ModelRef, Settings, execution, resolve_path
from potstill.core.store import ARTIFACTS_FOLDER, MANIFEST_FILE, Artifact
from potstill.models.chat_templates import chat_template_text
from potstill.models.embedded import EMBEDDED, convert_gguf, embedded_path, fetch_embedded
from potstill.models.files import cached_file_hash
from potstill.models.hub import cached_hub_folder, hub_commit

if TYPE_CHECKING:
    from potstill.core.step import StepContext

__all__ = [
    "ADAPTER_FILE",
    "Quantize",
    "Source",
    "TransformersModel",
    "adapter_base",
    "expert_share",
    "find_source",
    "identity",
    "is_encoder_decoder",
    "local_model",
    "original_model",
    "parameter_count",
    "quantization_scheme",
    "recorded_base",
    "shares_experts",
    "stored_configuration",
    "stored_dtype",
    "stored_quantization",
    "stored_vocabulary_size",
    "transformers_model",
]

Quantize = Literal["nf4", "nf4_single"]
"""4-bit NormalFloat; the scales of nf4 are quantised as well, those of nf4_single stay in float32."""

ADAPTER_FILE = "adapter_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_SHOWN_CHARACTERS = 200
_MARKS = (2, 4)  # around the reasoning, perhaps around the answer as well
# What bitsandbytes stores beside a weight: its scales, their codes, the layout.
_QUANTIZATION_PART = re.compile(r"\.weight\.|\.SCB$|\.weight_format$")
# Experts in a model's files, but for those that each token has, which are linear layers (`shared_experts`).
_EXPERT = re.compile(r"\.experts\.")
_NAMED_SIZES = re.compile(r"-(\d+(?:\.\d+)?)B-A(\d+(?:\.\d+)?)B(?![A-Za-z0-9])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def _check_marks(value: str | list[str]) -> str | list[str]:
    if isinstance(value, list) and (len(value) not in _MARKS or "" in value or len({*value}) < len(value)):
        raise ValueError(
            "expected two different marks around the reasoning, or four, the last two around the answer"
        )
    return value


def _check_tokens(value: list[str]) -> list[str]:
    if len({*value}) < len(value):
        raise ValueError("expected each token once")
    return value


def _resolve_model_path(value: str, info: ValidationInfo) -> str:
    return value if value in EMBEDDED else resolve_path(value, (info.context or {}).get("folders", ()))


class TransformersModel(Settings):
    """A causal language model, or an encoder-decoder of the T5 family, run by transformers.

    `path` is an embedded model's name, a .gguf file, a model or adapter folder, or a hub id
    (`organisation/name`, with `@revision` where one is meant). `identity` states what the model is known by,
    in place of a hash of its weights. `quantize` loads the linear layers in 4 bits (Dettmers et al. 2023):
    `nf4` with doubly quantised scales, 4.13 bits a weight, or `nf4_single`, 4.5 bits. The experts of a
    mixture are no linear layers and stay as they are. A checkpoint that is quantised already (bitsandbytes)
    is loaded as it is, without `quantize`.
    """

    engine: Literal["transformers"] = "transformers"
    path: Annotated[str, AfterValidator(_resolve_model_path)] = execution(..., min_length=1)
    quantize: Quantize | None = None
    identity: str | None = None
    trust_remote_code: bool = False
    chat_template: InputPath | None = execution(
        None,
        description="a Jinja file, or one that comes along: plain, chatml, or source, which is the messages "
        "without roles; by default the model's own, else plain, and source for an encoder-decoder",
    )
    add_tokens: Annotated[list[Annotated[str, Field(min_length=1)]], AfterValidator(_check_tokens)] = Field(
        [],
        description="tokens that the vocabulary is to have, such as `<think>`: new ones begin at the mean of "
        "all rows, and the rows of all of them are trained, with lora as well",
    )
    reasoning_format: (
        Annotated[Literal["strip", "openthoughts"] | list[str], AfterValidator(_check_marks)] | None
    ) = Field(
        None,
        description="how the model writes its reasoning: by default in a `<think>` block; strip: not at all; "
        "openthoughts: in the marks of that data set; or a list of two marks around the reasoning, or of "
        "four, the last two around the answer",
    )
    device: str | None = execution(None)
    dtype: Literal["float32", "bfloat16", "float16"] | None = execution(None)

    def content(self) -> dict[str, str]:
        """Return the model's identity, with the hashes of its tokenizer and of a stated chat template."""
        content = {"identity": identity(self)}
        if self.identity is None and (tokenizer := _tokenizer_files_hash(find_source(self.path))) is not None:
            content["tokenizer"] = tokenizer
        if self.chat_template is not None:
            content["chat_template"] = hash_bytes(chat_template_text(self.chat_template).encode())
        return content


def transformers_model(
    context: "StepContext", reference: ModelRef, *, device: str | None = None, why: str | None = None
) -> TransformersModel:
    """The settings of a model that a step needs transformers for, on the step's device where it states one.

    `why` says what for. Raises ModelError for a model of another engine.
    """
    return local_model(context, reference, context.model(reference), device=device, why=why)


def local_model(
    context: "StepContext", name: str, found: Settings, *, device: str | None = None, why: str | None = None
) -> TransformersModel:
    """`transformers_model` of a model whose settings were looked up already."""
    if not isinstance(found, TransformersModel):
        raise ModelError(
            f"{name} is a model of engine {getattr(found, 'engine', type(found).__name__)}",
            expected="a model that transformers loads" + ("" if why is None else f", because {why}"),
            mend="declare the same weights with a path (a folder, hub id or .gguf file), or name a step that "
            "makes a model",
        )
    return found if device is None else found.model_copy(update={"device": device})


@dataclass(frozen=True)
class Source:
    """Where a model comes from: one of five kinds of place, told apart without loading anything."""

    kind: Literal["embedded", "gguf", "folder", "adapter", "hub"]
    name: str
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """The local folder; an embedded model or a GGUF file is fetched and converted first."""
        if self.kind == "embedded":
            return convert_gguf(fetch_embedded(self.name))
        if self.kind == "gguf":
            return convert_gguf(Path(self.name))
        assert self.kind != "hub", "a hub model has no folder of ours"
        return Path(self.name)

    @property
    def folder_here(self) -> Path | None:
        """The folder, of a hub model that in the local cache; None where it is not cached."""
        return cached_hub_folder(self.name, self.revision) if self.kind == "hub" else self.folder

    def pretrained(self) -> tuple[str, dict[str, Any]]:
        """What transformers knows it by: a name or path, and the options with a revision of the hub."""
        if self.kind == "hub":
            return self.name, {"revision": hub_commit(self.name, self.revision)}
        return str(self.folder), {}

    @property
    def has_tokenizer(self) -> bool:
        """Whether a folder holds a tokenizer; other sources always bring theirs."""
        return self.kind not in ("folder", "adapter") or any(
            (Path(self.name) / f).exists() for f in _TOKENIZER_FILES
        )


def find_source(path: str) -> Source:
    """What a model's path leads to. Raises ModelError where it leads nowhere."""
    if path in EMBEDDED:
        return Source("embedded", path)
    place = _place(path)
    if place.is_file():
        if place.suffix.lower() != ".gguf":
            raise ModelError(
                "is not a model", where=path, expected="a .gguf file, or a folder with config.json"
            )
        return Source("gguf", str(place))
    if place.is_dir():
        if (place / ADAPTER_FILE).is_file():
            return Source("adapter", str(place))
        if (place / "config.json").is_file():
            return Source("folder", str(place))
        raise ModelError(
            "is no model folder",
            where=path,
            expected=f"config.json with weights, or {ADAPTER_FILE} with an adapter",
            mend="name the folder that save_pretrained wrote",
        )
    if "/" not in path and place.suffix.lower() != ".gguf":
        embedded_path(path)  # raises, naming the nearest
    if _HUB_ID.fullmatch(path) and place.suffix.lower() != ".gguf":
        name, _, revision = path.partition("@")
        return Source("hub", name, revision or None)
    raise ModelError(
        "no such model file or folder",
        where=path,
        expected=f"an existing path, a hub id (organisation/name) or one of: {', '.join(EMBEDDED)}",
        mend="check the spelling; a relative path is looked up beside the recipe, then in the working folder",
    )


def _place(path: str) -> Path:
    """The path as one of this machine, where it can be one."""
    try:
        place = Path(path).expanduser()
        place.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"cannot be a path ({error})", where=path[:_SHOWN_CHARACTERS]) from error
    return place


def identity(settings: TransformersModel, *, base: TransformersModel | None = None) -> str:
    """What a model is known by, wherever it lies; no weights are loaded.

    The hash of its weight files and configuration; of a GGUF file, that file's; of a hub model, its name and
    commit; of an adapter, its own together with its base's. A stated `identity` comes before all of these.
    Added tokens make another model of it. `base` is that of an adapter whose manifest is not written yet.
    """
    own = _own_identity(settings, base)
    return hash_json({"model": own, "add_tokens": settings.add_tokens}) if settings.add_tokens else own


def _own_identity(settings: TransformersModel, base: TransformersModel | None) -> str:
    if settings.identity is not None:
        return settings.identity
    source = find_source(settings.path)
    if source.kind == "embedded":
        return hash_json({"gguf": EMBEDDED[source.name].sha256})
    if source.kind == "gguf":
        return hash_json({"gguf": cached_file_hash(Path(source.name))})
    if source.kind == "hub":
        return hash_json({"hub": source.name, "commit": hub_commit(source.name, source.revision)})
    folder = Path(source.name)
    own: dict[str, Any] = {"weights": {file.name: cached_file_hash(file) for file in _weight_files(folder)}}
    if source.kind == "folder":
        return hash_json({**own, "config": _configuration(folder / "config.json")})
    base = adapter_base(folder) if base is None else base
    # The same adapter without potstill's manifest beside it is loaded on its base in full weights.
    packed = {} if base.quantize is None else {"quantize": base.quantize}
    return hash_json(
        {**own, "config": _configuration(folder / ADAPTER_FILE), "base": identity(base), **packed}
    )


def parameter_count(settings: TransformersModel) -> int | None:
    """How many parameters a model has, from its files' headers; None for a hub model that is not cached.

    An adapter counts as its base, a weight in 4 bits as one.
    """
    source = find_source(settings.path)
    if source.kind == "embedded":
        return EMBEDDED[source.name].parameters
    if source.kind == "gguf":
        from gguf import GGUFReader

        return sum(
            math.prod(int(size) for size in tensor.shape) for tensor in GGUFReader(source.name).tensors
        )
    if source.kind == "adapter":
        return parameter_count(adapter_base(source.folder))
    return sum(sum(one.values()) for one in _stored_weights(source)) or None


def expert_share(settings: TransformersModel) -> float:
    """What part of a model's weights are experts' in full, from its files' headers.

    `quantize` leaves these as they are. Of a hub model that is not cached, as its name says (Qwen3-30B-A3B):
    at least what a token does not use.
    """
    source = find_source(settings.path)
    if source.kind in ("embedded", "gguf"):
        return 0.0
    if source.kind == "adapter":
        return expert_share(adapter_base(source.folder))
    whole = experts = 0
    for weights in _stored_weights(source):
        whole += sum(weights.values())
        experts += sum(count for (name, is_packed), count in weights.items() if _is_expert(name, is_packed))
    if whole or source.kind != "hub":
        return experts / whole if whole else 0.0
    named = _NAMED_SIZES.search(source.name)
    return 0.0 if named is None else max(0.0, 1 - float(named[2]) / float(named[1]))


def _is_expert(name: str, is_packed: bool) -> bool:
    return not is_packed and _EXPERT.search(name) is not None


_Weights = dict[tuple[str, bool], int]
"""How many parameters each tensor of a file holds, by its name and whether they are in 4 or 8 bits."""


def _stored_weights(source: Source) -> Iterator[_Weights]:
    """Of a folder or a hub model, file by file; of one that is not cached nothing."""
    folder = source.folder_here
    yield from map(_safetensors_weights, sorted(folder.glob("*.safetensors")) if folder is not None else [])


def _safetensors_weights(path: Path) -> _Weights:
    """The sizes in a safetensors header: 8 bytes of its length, then JSON. ModelError where it is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, path.stat().st_size))
    try:
        return _weights_in(json.loads(header))
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(
            f"has no header of a safetensors file ({error})",
            where=str(path),
            mend="make or copy the model folder again",
        ) from error


def _weights_in(header: dict[str, Any]) -> _Weights:
    return {
        # Two weights in 4 bits are packed in a byte.
        (name, entry["dtype"] in ("U8", "I8")): math.prod(entry["shape"]) * (1 + (entry["dtype"] == "U8"))
        for name, entry in header.items()
        if name != "__metadata__" and not _QUANTIZATION_PART.search(name)
    }


def stored_quantization(settings: TransformersModel) -> str | None:
    """The scheme in which a model's files hold its weights: nf4, fp4, int8, or as transformers calls it.

    An adapter has its base's. None for full weights, and of a hub model that is not cached.
    """
    source = find_source(settings.path)
    if source.kind in ("embedded", "gguf"):
        return None
    if source.kind == "adapter":
        return stored_quantization(adapter_base(source.folder))
    folder = source.folder_here
    return None if folder is None else quantization_scheme(_read_json(folder / "config.json"))


def stored_dtype(settings: TransformersModel) -> str:
    """The type that a model's files have, as its configuration states it; float32 where it states none."""
    source = find_source(settings.path)
    folder = source.folder_here
    found = {} if folder is None else _read_json(folder / "config.json")
    stated = found.get("dtype") or found.get("torch_dtype") or _of_text(found).get("dtype")
    return stated if stated in ("bfloat16", "float16") else "float32"


def stored_configuration(settings: TransformersModel) -> dict[str, Any]:
    """What a model's configuration says of its text model; empty where it is a file's, or is not here."""
    source = find_source(settings.path)
    if source.kind in ("embedded", "gguf"):
        return {}
    if source.kind == "adapter":
        return stored_configuration(adapter_base(source.folder))
    folder = source.folder_here
    found: dict[str, Any] = {} if folder is None else _read_json(folder / "config.json")
    return {**found, **_of_text(found)}


def stored_vocabulary_size(settings: TransformersModel) -> int | None:
    """How many ids a model's configuration states; None where it is a file's, or is not here."""
    stated = stored_configuration(settings).get("vocab_size")
    return stated if type(stated) is int else None


def shares_experts(folder: Path) -> bool:
    """Whether a folder holds a model whose experts share a core, which transformers alone does not load."""
    file = folder / "config.json"
    return file.is_file() and _read_json(file).get("compression_config") is not None


def is_encoder_decoder(folder: Path) -> bool:
    """Whether a folder holds an encoder-decoder, or an adapter for one."""
    adapter, model = folder / ADAPTER_FILE, folder / "config.json"
    if adapter.is_file():
        return _read_json(adapter).get("task_type") == "SEQ_2_SEQ_LM"
    return model.is_file() and bool(_read_json(model).get("is_encoder_decoder"))


def quantization_scheme(configuration: dict[str, Any]) -> str | None:
    """The scheme that a model's configuration states for its weights, as `stored_quantization` names it."""
    stated = configuration.get("quantization_config")
    if not isinstance(stated, dict) or not stated:
        return None
    if stated.get("load_in_4bit"):
        return str(stated.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if stated.get("load_in_8bit") else str(stated.get("quant_method"))


def _of_text(configuration: dict[str, Any]) -> dict[str, Any]:
    """The part of a multimodal model's configuration that is its language model's."""
    found = configuration.get("text_config")
    return found if isinstance(found, dict) else {}


def _weight_files(folder: Path) -> list[Path]:
    for pattern in ("*.safetensors", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise ModelError(
        "holds no weights",
        where=str(folder),
        expected="*.safetensors files beside the configuration",
        mend="copy the whole folder, or make it again",
    )


_PROVENANCE = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "base_model_name_or_path",
        "transformers_version",
        "peft_version",
    }
)


def _configuration(path: Path) -> dict[str, Any]:
    """A model's or adapter's configuration, less what tells only where it came from."""
    return {key: value for key, value in _read_json(path).items() if key not in _PROVENANCE}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it is {type(found).__name__}")
        hash_json(found)  # NaN is no JSON
        return found
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"is not a JSON object ({error})", where=str(path), mend="make or copy the model folder again"
        ) from error


def _tokenizer_files_hash(source: Source) -> str | None:
    """The hash of a folder's tokenizer files; None where the identity fixes the tokenizer already."""
    if source.kind not in ("folder", "adapter"):
        return None
    return hash_json({file.name: cached_file_hash(file) for file in _tokenizer_files(Path(source.name))})


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    for name in (*_TOKENIZER_FILES, *_TOKENIZER_EXTRAS):
        if (folder / name).is_file():
            yield folder / name
    yield from sorted(folder.glob("*.jinja"))


def _artifact_of(folder: Path) -> Artifact | None:
    """The sealed artifact that an adapter's folder is, or is a view of."""
    if (folder / MANIFEST_FILE).is_file():
        return Artifact.open(folder)
    with suppress(StoreError):  # what lies above may be anything
        artifact = Artifact.open(folder.parent)
        return artifact if folder.name in artifact.views else None
    return None


def adapter_base(folder: Path) -> TransformersModel:
    """The settings of an adapter's base.

    The manifest's `extra["base"]` names it, for the adapters of single epochs as well, which lie in folders
    of their own; PEFT's own note of a path is read only where potstill did not make the adapter. Raises
    ModelError where the base is itself an adapter, is not named, or is not what it was in training
    (`extra["base_identity"]`).
    """
    if (artifact := _artifact_of(folder)) is not None:
        base = _stated_base(artifact.manifest.extra, folder)
    else:
        path = _read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
        base = _stated_base({"base": {"path": path}}, folder)
    if find_source(base.path).kind == "adapter":
        raise ModelError(
            f"adapts {base.path}, which is an adapter itself",
            where=str(folder),
            expected="a base with at most one adapter",
            mend="merge the first adapter into its base, then train the second on the result",
        )
    return base


def original_model(settings: TransformersModel) -> TransformersModel:
    """What a model of full weights was before train steps made it, by their manifests; itself where none did.

    Raises ModelError where that model is gone or another than it was.
    """
    recorded = recorded_base(settings)
    if recorded is None:
        return settings
    # Its weights are asked for: the file of a template that it was rendered by may be gone.
    given = {"device": settings.device, "chat_template": None}
    return _stated_base(recorded, Path(settings.path)).model_copy(update=given)


def recorded_base(settings: TransformersModel) -> dict[str, Any] | None:
    """What the manifest of a trained model of full weights says of its base, as `extra` has it; or None."""
    source = find_source(settings.path)
    if source.kind != "folder":
        return None
    with suppress(StoreError):  # a manifest.json of somebody else's
        artifact = _artifact_of(source.folder)
        if artifact is not None and artifact.kind == "train" and "base" in artifact.manifest.extra:
            return {key: artifact.manifest.extra[key] for key in ("base", "base_identity")}
    return None


def _stated_base(extra: dict[str, Any], folder: Path) -> TransformersModel:
    """The base that the manifest of a folder names in its `extra`, as it was in training."""
    expected_identity, where = extra.get("base_identity"), str(folder)
    try:
        base = TransformersModel.model_validate(extra.get("base"))
    except ValidationError as error:
        raise ModelError(
            "does not name the model that it was trained on", where=where, expected="a base model"
        ) from error
    try:
        find_source(base.path)
    except ModelError as error:
        if (beside := _in_the_same_store(base.path, folder)) is None:
            raise ModelError(f"its base model is gone\n{error}", where=where) from error
        base = base.model_copy(update={"path": str(beside)})
    if expected_identity is not None and (found := identity(base)) != expected_identity:
        raise ModelError(
            f"was trained on another base: {base.path} is {found}",
            where=where,
            expected=str(expected_identity),
            mend="bring the base's weights back, or train the adapter again",
        )
    return base


def _in_the_same_store(path: str, folder: Path) -> Path | None:
    """Where what a path named in another store lies in the one that a folder is in, if it does."""
    parts, here = PurePath(path).parts, folder.resolve()
    stores = [one for one in here.parents if one.name == ARTIFACTS_FOLDER]
    if ARTIFACTS_FOLDER not in parts or ".." in parts or not stores:
        return None
    last = len(parts) - parts[::-1].index(ARTIFACTS_FOLDER)
    found = stores[0].joinpath(*parts[last:])
    return found if found.is_dir() else None
