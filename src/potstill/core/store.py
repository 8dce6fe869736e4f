"""The artifact store: one folder a fingerprint, sealed by a manifest that is written last."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from potstill.core.checked_json import DamagedJsonError, checked_json, read_checked_json
from potstill.core.errors import StoreError
from potstill.core.hashing import hash_file, hash_json

__all__ = [
    "ARTIFACTS_FOLDER",
    "MANIFEST_FILE",
    "MODEL_CARD_FILE",
    "SCRATCH_FOLDER",
    "Artifact",
    "FileEntry",
    "Manifest",
    "Store",
    "content_hash",
    "default_store_root",
    "manifest_text",
    "replacing",
    "wait_for_disk",
    "write_atomically",
]

ARTIFACTS_FOLDER = "artifacts"
MANIFEST_FILE = "manifest.json"
MODEL_CARD_FILE = "README.md"
SCRATCH_FOLDER = "scratch"
_FETCHED = "fetched"  # the folder of a store with a file for each artifact that another machine made
_PARTIAL = ".partial"  # what a file is called that is not whole yet
_MADE_AGAIN = (
    "give the same command again, which makes what is missing; or copy it again from where it came from"
)
_RECORDED_PACKAGES = ("potstill", "torch", "transformers", "peft", "pyarrow", "xllamacpp", "reasoning-gym")


class FileEntry(BaseModel):
    """One payload file's SHA-256 and size."""

    sha256: str
    size_bytes: int


class Manifest(BaseModel):
    """What an artifact is, how it was made and what its files must hash to.

    Seconds are those of all attempts at it; peaks are those of the run that sealed it, of its own part alone.
    `parameters` are those of each model that was run here, by what the settings call it.
    """

    model_config = ConfigDict(protected_namespaces=())

    kind: str
    fingerprint: str
    content: str
    settings: dict[str, Any]
    inputs: dict[str, Any] = Field(default_factory=dict)
    seed: int
    tokenizer: str | None = None
    model_identity: str | None = None
    counts: dict[str, int] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    extra: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileEntry]
    versions: dict[str, str]
    seconds: float
    tokens: int = 0
    parameters: dict[str, int] = Field(default_factory=dict)
    peak_memory_bytes: int | None = None
    peak_gpu_memory_bytes: int | None = None

    @field_validator("files")
    @classmethod
    def _check_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or not path.name:
                raise ValueError(f"{name!r} leads out of the folder")
            if "\0" in name or path.name == MANIFEST_FILE:
                raise ValueError(f"{name!r} names no payload")
        return files


def _fetched_mark(folder: Path) -> Path:
    return folder.parent.parent / _FETCHED / folder.name


def content_hash(files: Mapping[str, FileEntry]) -> str:
    """What files are known by: the hash of their names and their own hashes."""
    return hash_json({name: entry.sha256 for name, entry in files.items()})


def manifest_text(manifest: Manifest) -> str:
    """The text of a manifest's file, with its checksum."""
    return checked_json(manifest.model_dump(), indent=2)


@dataclass(frozen=True)
class Artifact:
    """A sealed artifact: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def kind(self) -> str:
        """The step kind that made it."""
        return self.manifest.kind

    @property
    def was_fetched(self) -> bool:
        """Whether another machine made it: its seconds say nothing of this one."""
        return _fetched_mark(self.folder).exists()

    @property
    def views(self) -> list[str]:
        """Folders in the artifact that are models of their own: those of single epochs."""
        folders = {name.partition("/")[0] for name in self.manifest.files if "/" in name}
        return [view for view in self.manifest.extra.get("views", []) if view in folders]

    def files_of(self, view: str | None) -> dict[str, FileEntry]:
        """A view's files; without one, all that belong to none."""
        views, found = self.views, {}
        for name, entry in self.manifest.files.items():
            folder = name.partition("/")[0]
            if folder not in views if view is None else folder == view:
                found[name] = entry
        return found

    def content_of(self, view: str | None) -> str:
        """The hash of a view's files; without one, of all that belong to none."""
        if view is None and not self.views:
            return self.manifest.content
        return content_hash(self.files_of(view))

    def damage(self) -> str | None:
        """What is wrong with the files on disk (missing, other size), or None."""
        return next((what for _, what in self.damaged_files()), None)

    def damaged_files(self) -> Iterator[tuple[Path, str]]:
        """Each file that is missing or of another size, and what is wrong with it."""
        for name, entry in self.manifest.files.items():
            file = self.folder / name
            if not file.is_file():
                yield file, f"{name} is missing"
            elif (size := file.stat().st_size) != entry.size_bytes:
                yield file, f"{name} has {size} bytes, not {entry.size_bytes}"

    def check_content(self, checked_when_read: Callable[[str], bool] | None = None) -> None:
        """Read every file and compare it with what was sealed, but for those that their reader checks.

        Raises StoreError, which names the first file that is another.
        """
        if (what := self.damage()) is not None:
            raise StoreError(what, where=str(self.folder), mend=_MADE_AGAIN)
        for name, entry in self.manifest.files.items():
            if checked_when_read is not None and checked_when_read(name):
                continue
            if (found := hash_file(self.folder / name)) != entry.sha256:
                raise StoreError(
                    f"is damaged: its SHA-256 is {found[:12]}, and {entry.sha256[:12]} was sealed",
                    where=str(self.folder / name),
                    expected="the file as it was made; a disk or a copy has changed it",
                    mend=f"delete it, and {_MADE_AGAIN}",
                )

    @classmethod
    def open(cls, folder: Path) -> "Artifact":
        """Read a sealed artifact's manifest; StoreError where there is none."""
        path = folder / MANIFEST_FILE
        try:
            return cls(folder, Manifest.model_validate(read_checked_json(path.read_bytes())))
        except FileNotFoundError:
            raise StoreError(
                "not a finished artifact: it has no manifest.json",
                where=str(folder),
                expected="a folder that a potstill step has sealed",
                mend="name a step of the recipe, a run's step folder, or run the step that makes it again",
            ) from None
        except (DamagedJsonError, ValidationError) as error:
            what = f"{error.error_count()} faults" if isinstance(error, ValidationError) else str(error)
            raise StoreError(
                f"unreadable manifest ({what})",
                where=str(path),
                expected="the file as a potstill step has written it",
                mend="run the step that makes it again, or copy the folder again from where it came from",
            ) from error


def default_store_root() -> Path:
    """`POTSTILL_STORE`, else `~/.cache/potstill`."""
    return Path(os.environ.get("POTSTILL_STORE") or Path.home() / ".cache" / "potstill")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its place when it is whole: readers see the old one or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def wait_for_disk(path: Path) -> None:
    """Return once a file's content is on the disk, so that what is written later cannot outlive it."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file so that a reader sees the old one or the whole new one."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
        wait_for_disk(partial)


class Store:
    """Artifacts by fingerprint under one root folder, with a lock a fingerprint."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, kind: str, fingerprint: str) -> Path:
        """Where an artifact lives, made or not."""
        return self.root / ARTIFACTS_FOLDER / f"{kind}-{fingerprint[:24]}"

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        """The sealed, undamaged artifact of a fingerprint, or None."""
        with suppress(StoreError):
            artifact = Artifact.open(self.folder(kind, fingerprint))
            if artifact.manifest.fingerprint == fingerprint and artifact.damage() is None:
                return artifact
        return None

    def damage(self, kind: str, fingerprint: str) -> str | None:
        """What is wrong with an artifact that was sealed and is not found any more; None where none was."""
        folder = self.folder(kind, fingerprint)
        if not (folder / MANIFEST_FILE).is_file():
            return None
        try:
            return Artifact.open(folder).damage()
        except StoreError as error:
            return f"{MANIFEST_FILE}: {error.what}"

    @contextmanager
    def lock(
        self, fingerprint: str, *, on_wait: Callable[[int | None], None], wait: bool = True
    ) -> Iterator[bool]:
        """Hold the one right to make a fingerprint; `on_wait` hears the holder's pid before a wait begins.

        Gives False, and no right, where another has it and `wait` is not set.
        """
        from filelock import FileLock, Timeout

        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock, owner = FileLock(folder / f"{fingerprint[:24]}.lock"), folder / f"{fingerprint[:24]}.pid"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                yield False
                return
            pid = owner.read_text(encoding="utf-8") if owner.exists() else ""
            on_wait(int(pid) if pid.isdigit() else None)
            lock.acquire()
        try:
            owner.write_text(str(os.getpid()), encoding="utf-8")
            yield True
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def prepare(self, kind: str, fingerprint: str, *, discard: bool = False) -> Path:
        """The folder a step writes into; what an interrupted attempt left stays unless `discard`.

        Of a damaged artifact the files of the sealed size stay; their content is not compared.
        """
        folder = self.folder(kind, fingerprint)
        with suppress(StoreError):
            for file, _ in Artifact.open(folder).damaged_files():
                file.unlink(missing_ok=True)
        # Without its manifest the artifact is unfinished, whatever happens from here on.
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        if discard and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def incoming(self, kind: str, fingerprint: str) -> Path:
        """A folder for the files of an artifact that was made elsewhere, apart from what a step writes.

        What an interrupted copy left is still there.
        """
        place = self.folder(kind, fingerprint)
        folder = place.with_name(f"{place.name}{_PARTIAL}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def take_in(self, incoming: Path, manifest: Manifest) -> Artifact:
        """Put what came in where the artifact lives, in the place of what a step has left there."""
        for path in incoming.rglob("*"):
            if path.is_file() and path.relative_to(incoming).as_posix() not in manifest.files:
                path.unlink()
        write_atomically(incoming / MANIFEST_FILE, manifest_text(manifest))
        folder = self.folder(manifest.kind, manifest.fingerprint)
        # Without its manifest an artifact is unfinished, wherever its removal breaks off.
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        mark = _fetched_mark(folder)
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
        os.replace(incoming, folder)
        return Artifact(folder, manifest)

    def seal(self, folder: Path, **fields: Any) -> Artifact:
        """Hash every payload file, then write the manifest by rename.

        The scratch folder is removed first, and what a kill or a full disk has left half written.

        The model card is a by-product of whichever run wrote it last and is no payload.
        """
        shutil.rmtree(folder / SCRATCH_FOLDER, ignore_errors=True)
        _fetched_mark(folder).unlink(missing_ok=True)
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.name.endswith(_PARTIAL) and path.is_file():
                path.unlink()
            elif path.is_file() and path.name not in (MANIFEST_FILE, MODEL_CARD_FILE):
                entry = FileEntry(sha256=hash_file(path), size_bytes=path.stat().st_size)
                files[path.relative_to(folder).as_posix()] = entry
        content = content_hash(files)
        manifest = Manifest(files=files, content=content, versions=_versions(), **fields)
        write_atomically(folder / MANIFEST_FILE, manifest_text(manifest))
        return Artifact(folder, manifest)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
