"""What names a model in a recipe, where it leads, and what the model is known by."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError, ValidationInfo

from potstill.core.errors import ModelError
from potstill.core.hashing import hash_json
from potstill.core.settings import InputPath, Settings, execution, resolve_path
from potstill.core.store import MANIFEST_FILE, Artifact
from potstill.models.embedded import EMBEDDED, convert_gguf, embedded_path, fetch_embedded
from potstill.models.files import cached_file_hash
from potstill.models.hub import cached_hub_folder, hub_commit

__all__ = [
    "ADAPTER_FILE",
    "Source",
    "TransformersModel",
    "adapter_base",
    "existing_template",
    "find_source",
    "identity",
    "parameter_count",
]

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
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def _resolve_model_path(value: str, info: ValidationInfo) -> str:
    return value if value in EMBEDDED else resolve_path(value, (info.context or {}).get("folders", ()))


class TransformersModel(Settings):
    """A causal language model run by transformers.

    `path` is an embedded model's name, a .gguf file, a model or adapter folder, or a hub id
    (`organisation/name`, with `@revision` where one is meant). `identity` states what the model is known by,
    in place of a hash of its weights.
    """

    engine: Literal["transformers"] = "transformers"
    path: Annotated[str, AfterValidator(_resolve_model_path)] = execution(..., min_length=1)
    quantize: Literal["nf4"] | None = None
    identity: str | None = None
    trust_remote_code: bool = False
    chat_template: InputPath | None = execution(None)
    device: str | None = execution(None)
    dtype: Literal["float32", "bfloat16", "float16"] | None = execution(None)

    def content(self) -> dict[str, str]:
        """Return the model's identity, with the hashes of its tokenizer and of a stated chat template."""
        content = {"identity": identity(self)}
        if self.identity is None and (tokenizer := _tokenizer_files_hash(find_source(self.path))) is not None:
            content["tokenizer"] = tokenizer
        if self.chat_template is not None:
            content["chat_template"] = cached_file_hash(existing_template(self.chat_template))
        return content


def existing_template(path: str) -> Path:
    """A chat template's file. Raises ModelError where there is none."""
    if not Path(path).is_file():
        raise ModelError("no such chat template", where=path, expected="a Jinja file", mend="check the path")
    return Path(path)


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
    def has_tokenizer(self) -> bool:
        """Whether a folder holds a tokenizer; other sources always bring theirs."""
        return self.kind not in ("folder", "adapter") or any(
            (Path(self.name) / f).exists() for f in _TOKENIZER_FILES
        )


def find_source(path: str) -> Source:
    """What a model's path leads to. Raises ModelError where it leads nowhere."""
    if path in EMBEDDED:
        return Source("embedded", path)
    place = Path(path).expanduser()
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


def identity(settings: TransformersModel) -> str:
    """What a model is known by, wherever it lies; no weights are loaded.

    The hash of its weight files and configuration; of a GGUF file, that file's; of a hub model, its name and
    commit; of an adapter, its own together with its base's. A stated `identity` comes before all of these.
    """
    if settings.identity is not None:
        return settings.identity
    source = find_source(settings.path)
    if source.kind == "embedded":
        return hash_json({"gguf": EMBEDDED[source.name].gguf_sha256})
    if source.kind == "gguf":
        return hash_json({"gguf": cached_file_hash(Path(source.name))})
    if source.kind == "hub":
        return hash_json({"hub": source.name, "commit": hub_commit(source.name, source.revision)})
    folder = Path(source.name)
    own: dict[str, Any] = {"weights": {file.name: cached_file_hash(file) for file in _weight_files(folder)}}
    if source.kind == "folder":
        return hash_json({**own, "config": _configuration(folder / "config.json")})
    base = identity(adapter_base(folder))
    return hash_json({**own, "config": _configuration(folder / ADAPTER_FILE), "base": base})


def parameter_count(settings: TransformersModel) -> int | None:
    """How many parameters a model has, from its files' headers; None for a hub model that is not cached.

    An adapter counts as its base.
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
    folder = cached_hub_folder(source.name, source.revision) if source.kind == "hub" else source.folder
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    return sum(map(_safetensors_parameters, files)) or None


def _safetensors_parameters(path: Path) -> int:
    """The sizes in a safetensors header: 8 bytes of its length, then JSON."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


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
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
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


def adapter_base(folder: Path) -> TransformersModel:
    """The settings of an adapter's base.

    The manifest's `extra["base"]` names it; PEFT's own note of a path is read only where potstill did not
    make the adapter. Raises ModelError where the base is itself an adapter, is not named, or is not what it
    was in training (`extra["base_identity"]`).
    """
    where = str(folder)
    if (folder / MANIFEST_FILE).is_file():
        extra = Artifact.open(folder).manifest.extra
        stated, expected_identity = extra.get("base"), extra.get("base_identity")
    else:
        stated, expected_identity = (
            {"path": _read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")},
            None,
        )
    try:
        base = TransformersModel.model_validate(stated)
    except ValidationError as error:
        raise ModelError(
            "does not name the model that it adapts", where=where, expected="a base model"
        ) from error
    try:
        source = find_source(base.path)
    except ModelError as error:
        raise ModelError(f"its base model is gone\n{error}", where=where) from error
    if source.kind == "adapter":
        raise ModelError(
            f"adapts {base.path}, which is an adapter itself",
            where=where,
            expected="a base with at most one adapter",
            mend="merge the first adapter into its base, then train the second on the result",
        )
    if expected_identity is not None and (found := identity(base)) != expected_identity:
        raise ModelError(
            f"was trained on another base: {base.path} is {found}",
            where=where,
            expected=str(expected_identity),
            mend="bring the base's weights back, or train the adapter again",
        )
    return base
