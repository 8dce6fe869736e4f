"""Artifacts that machines share, in a folder or behind a URL: put there whole, fetched whole.

    <place>/sealed/<kind>-<fingerprint>/manifest.json
    <place>/sealed/<kind>-<fingerprint>/<hash of the files>/...

A manifest is put last and alone says which files are meant, by their hash. So whoever writes at once, and
wherever it breaks off, what a manifest names is whole, and is what that manifest was written for.
"""

import hashlib
import math
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from potstill.core.checked_json import DamagedJsonError, read_checked_json
from potstill.core.errors import Interrupted, StoreError
from potstill.core.store import (
    MANIFEST_FILE,
    Artifact,
    FileEntry,
    Manifest,
    Store,
    content_hash,
    manifest_text,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["SharedArtifacts", "check_place", "open_shared"]

Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Hears how many bytes have gone."""

_PARTIAL = ".partial"
_BLOCK_BYTES = 8 << 20
_PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # before a further try
_HUB_PAUSES_S = (1.0, 2.0)  # whose client tries again by itself
_DOWNLOADS = 2  # of a file whose bytes are others than were sealed
_LASTING = (
    FileExistsError,
    FileNotFoundError,
    Interrupted,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    StoreError,
)
# By default s3fs has ten parts of 50 MB and more in memory. S3 takes 10,000 parts at most.
_S3_PART_BYTES, _S3_PARTS, _S3_PARTS_AT_ONCE = 16 << 20, 10_000, 4
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_SECRET_NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 8
_SHOWN_CHARACTERS = 300
_FORM = "s3://bucket/folder, gs://bucket/folder, hf://datasets/user/repository/folder or /a/shared/folder"


def check_place(place: object) -> str:
    """The place of shared artifacts as it was stated, `~` made whole; nothing is asked of it yet.

    Raises StoreError for what is neither an absolute path nor a URL, and for a URL with credentials. The
    message never holds what was given.
    """
    if not isinstance(place, str):
        raise StoreError("shared: is no text", expected=_FORM)
    scheme, is_url, rest = place.partition("://")
    if not is_url:
        try:
            path = Path(place).expanduser()
        except RuntimeError as error:
            raise StoreError(f"shared: {error}", expected=_FORM) from error
        if not path.is_absolute():
            raise StoreError(
                "shared: is no URL and no absolute path",
                expected=_FORM,
                mend="name the whole path, which other machines may see as well",
            )
        return str(path)
    if not _SCHEME.fullmatch(scheme) or not rest.strip("/"):
        raise StoreError("shared: is no URL of a place", expected=_FORM)
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
        raise StoreError(
            "shared: holds a user name, a key or a `?`, and would be written into files",
            expected=_FORM,
            mend="take it out; keys are read from where the provider's own tools read them: the environment "
            "(AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN) or their configuration",
        )
    if "::" in place or ".." in rest.split("/"):
        raise StoreError("shared: `::` and `..` are no part of a place", expected=_FORM)
    return place.rstrip("/")


def open_shared(place: str, stop: threading.Event | None = None) -> "SharedArtifacts":
    """The shared artifacts of a place. StoreError where it is not there, or cannot be opened.

    `stop` ends what is under way: Interrupted is raised.
    """
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    scheme = place.partition("://")[0] if "://" in place else "file"
    try:
        files, path = url_to_fs(place)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        raise StoreError(
            f"{scheme}:// cannot be opened here ({error})",
            where=place,
            mend="python -m pip install "
            + (f"'potstill[{extra}]'" if extra is not None else "the package that it names"),
        ) from error
    except Exception as error:  # each file system has its own for what it cannot be made of
        raise StoreError(f"cannot be opened ({_said(error)})", where=place, expected=_FORM) from error
    kind = SharedArtifacts
    if isinstance(files, LocalFileSystem):
        kind = _SharedFolder
    elif scheme == "hf" and not path.startswith("buckets/"):
        kind = _SharedOnHub
    shared = kind(place, files, path, stop or threading.Event())
    shared.check()
    return shared


def _said(error: BaseException) -> str:
    """What an error says, without what could be a secret in it."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    text = re.sub(r"//[^/\s@]+@", "//...@", text)
    text = re.sub(r"\?[^\s'\"]+", "?...", text)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "...")
    return text[:_SHOWN_CHARACTERS]


class SharedArtifacts:
    """Sealed artifacts by fingerprint at a place that several machines reach.

    A request that fails is made again a few times; what fails then is a StoreError, and harms nothing.
    """

    _pauses_s: tuple[float, ...] = _PAUSES_S

    def __init__(self, place: str, files: "AbstractFileSystem", path: str, stop: threading.Event) -> None:
        self.place, self._files, self._path, self._stop = place, files, path.rstrip("/"), stop

    def check(self) -> None:
        """Raise StoreError where the bucket of the place is not there; the place itself need not be."""
        if self.place.partition("://")[0] not in _EXTRAS:
            return
        bucket = self._path.partition("/")[0]
        try:
            there = self._tried(lambda: self._files.exists(bucket))
        except PermissionError:  # who may read and write in it may not ask for it
            return
        except Exception as error:  # each file system has errors of its own
            raise self._failed("cannot be reached", error) from error
        if not there:
            raise StoreError(
                f"there is no bucket {bucket!r}, or it is not to be seen with these credentials",
                where=self.place,
                mend="make it, or correct the name or the credentials",
            )

    def find(
        self, kind: str, fingerprint: str, on_damage: Callable[[str], None] = lambda what: None
    ) -> Manifest | None:
        """The manifest of a shared artifact, or None; `on_damage` hears why one that is not whole is none.

        StoreError where the place cannot be asked.
        """
        try:
            self._files.invalidate_cache()
            data = self._tried(lambda: self._files.cat_file(self._manifest_path(kind, fingerprint)))
        except FileNotFoundError:
            return None
        except Exception as error:  # each file system has errors of its own
            raise self._failed("cannot be asked for what is made", error) from error
        try:
            manifest = Manifest.model_validate(read_checked_json(data))
        except (DamagedJsonError, ValidationError):
            on_damage(f"{MANIFEST_FILE} is unreadable")
            return None
        if (manifest.kind, manifest.fingerprint, manifest.content) != (
            kind,
            fingerprint,
            content_hash(manifest.files),
        ):
            on_damage(f"{MANIFEST_FILE} is of something else")
            return None
        if (name := next(self._lacking(manifest), None)) is not None:
            on_damage(f"{name} is missing or cut short")
            return None
        return manifest

    def fetch(self, manifest: Manifest, store: Store, advance: Advance = lambda size: None) -> Artifact:
        """The artifact of a manifest in a store, each file compared with its SHA-256 as it comes.

        What an interrupted fetch left goes on. StoreError for a file that is another than was sealed, twice.
        """
        folder = store.incoming(manifest.kind, manifest.fingerprint)
        for name, entry in manifest.files.items():
            target = folder / name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise StoreError(f"{name!r} leads out of the folder", where=self.place)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._fetch_file(f"{self._files_path(manifest)}/{name}", target, entry, advance)
        return store.take_in(folder, manifest)

    def put(
        self,
        artifact: Artifact,
        *,
        replace: bool = False,
        is_intact: bool = True,
        advance: Advance = lambda size: None,
    ) -> Manifest:
        """Put up a sealed artifact, its manifest last, and say which manifest stands there now.

        That of another maker stays, whole as it is, unless `replace`. Files that are there already are not
        put again. What is not known as intact is read through before. StoreError where it fails; the artifact
        is as it was, and so is what was shared.
        """
        manifest, damage = artifact.manifest, list[str]()
        there = self.find(manifest.kind, manifest.fingerprint, damage.append)
        if there is not None and not replace:
            return there
        if not is_intact:
            artifact.check_content()
        try:
            self._put_all(artifact, advance, anew=replace, instead=replace or bool(damage))
        except Exception as error:  # each file system has errors of its own
            if isinstance(error, FileExistsError | FileNotFoundError):
                # Another maker was there before this one was done, and has cleared up behind itself.
                there = self.find(manifest.kind, manifest.fingerprint)
            if there is None or replace:
                raise self._failed("did not take it", error) from error
            return there
        return manifest

    def _put_all(self, artifact: Artifact, advance: Advance, *, anew: bool, instead: bool) -> None:
        """Put the files, all of them where `anew`, then the manifest.

        FileExistsError where there is a manifest already, unless this one is put there `instead`.
        """
        manifest = artifact.manifest
        wanted = manifest.files if anew else list(self._lacking(manifest))
        for name in wanted:
            self._put_file(artifact.folder / name, f"{self._files_path(manifest)}/{name}", advance)
        if (lacking := next(self._lacking(manifest), None)) is not None:
            raise OSError(f"{lacking} is not whole there")
        self._put_manifest(manifest, instead=instead)

    def _put_file(self, source: Path, target: str, advance: Advance) -> None:
        watch, options = _watch(advance, self._stop), dict[str, int]()
        if self.place.startswith(("s3://", "s3a://")):
            part_bytes = max(_S3_PART_BYTES, math.ceil(source.stat().st_size / _S3_PARTS))
            options = {"chunksize": part_bytes, "max_concurrency": _S3_PARTS_AT_ONCE}

        def put() -> None:
            advance(-watch.value)  # of a try that failed
            watch.value = 0
            self._files.put_file(str(source), target, callback=watch, **options)

        self._tried(put)

    def _put_manifest(self, manifest: Manifest, *, instead: bool) -> None:
        path = self._manifest_path(manifest.kind, manifest.fingerprint)
        data = manifest_text(manifest).encode()
        mode = "overwrite" if instead else "create"
        self._tried(lambda: self._files.pipe_file(path, data, mode=mode))

    def _lacking(self, manifest: Manifest) -> Iterator[str]:
        """The files of a manifest that are not there in their size."""
        folder = self._files_path(manifest)
        self._files.invalidate_cache()
        found: dict[str, Any] = {}
        with suppress(FileNotFoundError):
            found = self._tried(lambda: self._files.find(folder, detail=True))
        sizes = {name.rpartition(f"{folder}/")[2]: one["size"] for name, one in found.items()}
        for name, entry in manifest.files.items():
            if sizes.get(name) != entry.size_bytes:
                yield name

    def _fetch_file(self, source: str, target: Path, entry: FileEntry, advance: Advance) -> None:
        for _ in range(_DOWNLOADS):
            if target.is_file() and target.stat().st_size > entry.size_bytes:
                target.unlink()
            digest, start = hashlib.sha256(), 0
            with target.open("a+b") as file:
                file.seek(0)
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    start += len(block)
                advance(start)
                for block in self._blocks(source, start, entry.size_bytes):
                    file.write(block)
                    digest.update(block)
                    advance(len(block))
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() == entry.sha256:
                return
            target.unlink()
            advance(-entry.size_bytes)
        raise StoreError(
            f"{target.name} is damaged there: its SHA-256 is {digest.hexdigest()[:12]}, and "
            f"{entry.sha256[:12]} was sealed",
            where=self.place,
            expected="the file as it was made",
            mend="--force with the step's name makes it again and puts it there instead; or take away "
            f"{source}, and whoever has the step puts it up again",
        )

    def _blocks(self, source: str, start: int, end: int) -> Iterator[bytes]:
        """A file's bytes from a place on, in pieces; a connection that breaks is taken up where it broke."""
        pauses = iter(self._pauses_s)
        while start < end:
            begun = start
            try:
                with self._files.open(source, "rb") as file:
                    file.seek(start)
                    while start < end:
                        if self._stop.is_set():
                            raise Interrupted
                        if not (block := file.read(min(_BLOCK_BYTES, end - start))):
                            raise OSError(f"it ends after {start} of {end} bytes")
                        start += len(block)
                        yield block
            except Interrupted:
                raise
            except Exception as error:  # each file system has errors of its own
                if start > begun:
                    pauses = iter(self._pauses_s)
                pause_s = None if isinstance(error, _LASTING) else next(pauses, None)
                if pause_s is None:
                    raise self._failed(f"{source} cannot be read", error) from error
                if self._stop.wait(pause_s):
                    raise Interrupted from error

    def _tried(self, action: Callable[[], Result]) -> Result:
        """What comes of an action, made again after a pause where it fails for a reason that may pass."""
        for pause_s in self._pauses_s:
            try:
                return action()
            except _LASTING:
                raise
            except Exception:  # each file system has errors of its own
                if self._stop.wait(pause_s):
                    raise Interrupted from None
        return action()

    def _manifest_path(self, kind: str, fingerprint: str) -> str:
        return f"{self._path}/sealed/{kind}-{fingerprint[:24]}/{MANIFEST_FILE}"

    def _files_path(self, manifest: Manifest) -> str:
        named = f"{manifest.kind}-{manifest.fingerprint[:24]}"
        return f"{self._path}/sealed/{named}/{content_hash(manifest.files)[:24]}"

    def _failed(self, what: str, error: BaseException) -> Exception:
        if isinstance(error, Interrupted | StoreError):
            return error
        return StoreError(
            f"{what} ({_said(error)})",
            where=self.place,
            expected="a place that can be reached, read and written",
            mend="look at the connection and at the credentials, which come from the environment or from the "
            "provider's own configuration; then give the same command again",
        )


def _watch(advance: Advance, stop: threading.Event) -> Any:
    """A callback of fsspec that tells bytes on as they go, and ends a transfer that is to stop."""
    from fsspec.callbacks import Callback

    class Watch(Callback):  # type: ignore[misc]  # fsspec brings no types
        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            advance(inc)
            if stop.is_set():
                raise Interrupted

    return Watch()


class _SharedFolder(SharedArtifacts):
    """A folder of a file system that several machines mount."""

    def check(self) -> None:
        """Raise StoreError where the folder is not there: a share that is not mounted is not made anew."""
        if not Path(self._path).is_dir():
            raise StoreError(
                "is no folder here",
                where=self.place,
                expected="a folder that is there, on every machine that shares",
                mend="mount it, or make it: mkdir",
            )

    def _put_file(self, source: Path, target: str, advance: Advance) -> None:
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PARTIAL}")
        try:
            with source.open("rb") as reading, partial.open("wb") as writing:
                while block := reading.read(_BLOCK_BYTES):
                    if self._stop.is_set():
                        raise Interrupted
                    writing.write(block)
                    advance(len(block))
                writing.flush()
                os.fsync(writing.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _put_manifest(self, manifest: Manifest, *, instead: bool) -> None:
        path = Path(self._manifest_path(manifest.kind, manifest.fingerprint))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PARTIAL}")
        try:
            with partial.open("wb") as file:
                file.write(manifest_text(manifest).encode())
                file.flush()
                os.fsync(file.fileno())
            if instead or not _link(partial, path):
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        for left_by_a_kill in path.parent.rglob(f".*{_PARTIAL}"):
            left_by_a_kill.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> bool:
    """Give a file its name unless another has it (FileExistsError); False where links cannot be made."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


class _SharedOnHub(SharedArtifacts):
    """A repository of the Hugging Face hub, where an artifact is one commit: all of it, or nothing."""

    _pauses_s = _HUB_PAUSES_S

    def check(self) -> None:
        """Raise StoreError where the repository is not there."""
        try:
            self._tried(lambda: self._files.resolve_path(self._path))
        except FileNotFoundError as error:
            raise StoreError(
                "there is no such repository, or it is not to be seen with this token",
                where=self.place,
                mend="make it (hf repo create), or correct the name or HF_TOKEN",
            ) from error
        except Exception as error:  # each file system has errors of its own
            raise self._failed("cannot be reached", error) from error

    def _is_there(self, path: str) -> bool:
        try:
            self._files.info(path)
        except FileNotFoundError:  # `exists` says so of any error
            return False
        return True

    def _put_all(self, artifact: Artifact, advance: Advance, *, anew: bool, instead: bool) -> None:
        from huggingface_hub import CommitOperationAdd, HfApi

        files: Any = self._files
        manifest, place = artifact.manifest, files.resolve_path(self._path)
        hub = HfApi(endpoint=files.endpoint, token=files.token)
        manifest_path = self._manifest_path(manifest.kind, manifest.fingerprint)

        def addition(path: str, content: str | bytes) -> CommitOperationAdd:
            return CommitOperationAdd(str(files.resolve_path(path).path_in_repo), content)

        def commit() -> None:
            if self._stop.is_set():
                raise Interrupted
            head = hub.repo_info(place.repo_id, revision=place.revision, repo_type=place.repo_type).sha
            wanted = manifest.files if anew else list(self._lacking(manifest))
            if not instead and self._is_there(manifest_path):
                raise FileExistsError
            additions = [
                addition(f"{self._files_path(manifest)}/{name}", str(artifact.folder / name))
                for name in wanted
            ]
            hub.create_commit(
                place.repo_id,
                [*additions, addition(manifest_path, manifest_text(manifest).encode())],
                commit_message=f"{manifest.kind} {manifest.fingerprint[:24]}",
                repo_type=place.repo_type,
                revision=place.revision,
                # Refused where anything has been put there since the manifest was looked for.
                parent_commit=head,
            )

        self._tried(commit)
        if (name := next(self._lacking(manifest), None)) is not None:
            raise OSError(f"{name} is not whole there; the repository's .gitignore may leave it out")
        advance(sum(entry.size_bytes for entry in manifest.files.values()))
