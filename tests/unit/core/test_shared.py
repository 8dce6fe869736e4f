"""What is shared is whole at all times: whoever writes at once, and wherever a transfer breaks off."""

import json
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from potstill.core import shared as sharing
from potstill.core.errors import Interrupted, StoreError
from potstill.core.shared import SharedArtifacts, check_place, open_shared
from potstill.core.store import MANIFEST_FILE, Artifact, Manifest, Store, content_hash, manifest_text

from ...hub import REPOSITORY, Hub, running_hub
from ...s3 import HAS_S3, NEEDS_S3, make_bucket, s3_environment, s3_server

FINGERPRINT = "ab" * 32
FAULTY = "faulty://team/distil"
SECRET = "sk-canary-0815"


class FaultyFiles(MemoryFileSystem):
    """Files in memory, of which any request can be made to go wrong; `told` has the requests in order."""

    protocol: ClassVar[str] = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[dict[str, list[BaseException | None]]] = {}
    told: ClassVar[list[tuple[str, str]]] = []
    cut_after: ClassVar[list[int | None]] = []  # bytes that each file opened next gives before it breaks off

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("faulty://", "memory://"))

    def _meet(self, request: str, path: str) -> BaseException | None:
        self.told.append((request, path.rpartition("/")[2]))
        planned = self.faults.get(request, [])
        return planned.pop(0) if planned else None

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        if (fault := self._meet("read", path)) is not None:
            raise fault
        found: bytes = super().cat_file(path, *arguments, **options)
        return found

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **options: Any) -> None:
        fault = self._meet("put", rpath)
        data = Path(lpath).read_bytes()
        super().pipe_file(rpath, data if fault is None else data[: len(data) // 2])
        callback.relative_update(len(data))
        if fault is not None:
            raise fault

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if (fault := self._meet("put", path)) is not None:
            raise fault
        super().pipe_file(path, value, mode=mode, **options)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, **options)
        if (fault := self._meet("open", path)) is not None:
            raise fault
        data = super().cat_file(path)
        return _Breaking(data, self.cut_after.pop(0) if self.cut_after else None)


class _Breaking(BytesIO):
    def __init__(self, data: bytes, left: int | None) -> None:
        super().__init__(data)
        self.left = left

    def read(self, size: int | None = -1, /) -> bytes:
        if self.left == 0:
            raise ConnectionResetError("the connection broke")
        block = super().read(size if self.left is None else min(size or 0, self.left))
        if self.left is not None:
            self.left -= len(block)
        return block


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (SharedArtifacts, sharing._SharedOnHub):
        monkeypatch.setattr(place, "_pauses_s", (0.0,) * 4)


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    fsspec.register_implementation("faulty", FaultyFiles, clobber=True)
    yield
    for files in (FaultyFiles, MemoryFileSystem):
        files.store.clear()
        files.pseudo_dirs[:] = [""]
    FaultyFiles.faults.clear()
    FaultyFiles.told.clear()
    FaultyFiles.cut_after.clear()


@pytest.fixture(scope="module")
def s3_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server of these tests."""
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub on this machine."""
    with running_hub() as one:
        yield one


@pytest.fixture
def hub_place(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in its repository, where huggingface_hub looks for the hub."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return f"hf://datasets/{REPOSITORY}/distil"


@pytest.fixture(
    params=[
        "folder",
        "memory",
        "faulty",
        "hub",
        pytest.param("s3", marks=pytest.mark.skipif(not HAS_S3, reason=NEEDS_S3)),
    ]
)
def shared(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SharedArtifacts:
    """A place of each kind."""
    (tmp_path / "team").mkdir()
    places = {"folder": str(tmp_path / "team"), "memory": "memory://team/distil", "faulty": FAULTY}
    if request.param == "hub":
        return open_shared(request.getfixturevalue("hub_place"))
    if request.param == "s3":
        address = request.getfixturevalue("s3_address")
        for name, value in s3_environment(address).items():
            monkeypatch.setenv(name, value)
        bucket = f"team-{secrets.token_hex(8)}"
        make_bucket(address, bucket)
        places["s3"] = f"s3://{bucket}/distil"
    return open_shared(places[request.param])


@pytest.fixture
def faulty() -> SharedArtifacts:
    """A place whose requests go wrong as the test says."""
    return open_shared(FAULTY)


def _make(store: Store, text: str = "rows", size: int = 1000) -> Artifact:
    folder = store.prepare("train", FINGERPRINT)
    (folder / "epoch1").mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes((text * size).encode())
    (folder / "epoch1" / "model.safetensors").write_bytes((text[::-1] * size).encode())
    (folder / "config.json").write_text(json.dumps({"text": text}), encoding="utf-8")
    return store.seal(folder, kind="train", fingerprint=FINGERPRINT, settings={}, seed=1, seconds=0.5)


def _bytes(artifact: Artifact) -> dict[str, bytes]:
    return {
        path.relative_to(artifact.folder).as_posix(): path.read_bytes()
        for path in sorted(artifact.folder.rglob("*"))
        if path.is_file()
    }


def _found(shared: SharedArtifacts) -> Manifest:
    found = shared.find("train", FINGERPRINT)
    assert found is not None
    return found


def _manifest_path(shared: SharedArtifacts) -> str:
    return f"{shared._path}/sealed/train-{FINGERPRINT[:24]}/{MANIFEST_FILE}"


def test_what_one_store_put_up_another_fetches_to_the_byte(shared: SharedArtifacts, tmp_path: Path) -> None:
    made = _make(Store(tmp_path / "a"))
    assert shared.find("train", FINGERPRINT) is None
    assert shared.put(made) == made.manifest
    other, gone = Store(tmp_path / "b"), list[int]()
    fetched = shared.fetch(_found(shared), other, gone.append)
    assert _bytes(fetched) == _bytes(made)
    assert sum(gone) == sum(one.size_bytes for one in made.manifest.files.values())
    found = other.find("train", FINGERPRINT)
    assert found is not None
    assert found.manifest == made.manifest
    assert [path.name for path in fetched.folder.parent.iterdir()] == [fetched.folder.name], "nothing is left"


def test_the_manifest_is_put_last_and_what_is_there_is_not_put_again(
    faulty: SharedArtifacts, tmp_path: Path
) -> None:
    made = _make(Store(tmp_path))
    faulty.put(made)
    put = [name for request, name in FaultyFiles.told if request == "put"]
    assert sorted(put[:-1]) == sorted(name.rpartition("/")[2] for name in made.manifest.files)
    assert put[-1] == MANIFEST_FILE
    faulty.put(made)
    assert [name for request, name in FaultyFiles.told if request == "put"] == put


@pytest.mark.parametrize("number", range(4))
def test_an_upload_that_breaks_off_leaves_nothing_to_be_found_and_goes_on(
    faulty: SharedArtifacts, tmp_path: Path, number: int
) -> None:
    made = _make(Store(tmp_path / "a"))
    FaultyFiles.faults["put"] = [None] * number + [ConnectionResetError("gone")] * 5
    with pytest.raises(StoreError, match=r"faulty://team/distil: did not take it \(ConnectionResetError"):
        faulty.put(made)
    assert faulty.find("train", FINGERPRINT) is None
    made.check_content()
    FaultyFiles.told.clear()
    faulty.put(made)
    assert sum(request == "put" for request, _ in FaultyFiles.told) == 4 - number
    fetched = faulty.fetch(_found(faulty), Store(tmp_path / "b"))
    assert _bytes(fetched) == _bytes(made)


def test_a_request_is_made_again_a_few_times_and_not_where_that_is_no_use(
    faulty: SharedArtifacts, tmp_path: Path
) -> None:
    FaultyFiles.faults["read"] = [TimeoutError()] * 4
    assert faulty.find("train", FINGERPRINT) is None
    FaultyFiles.faults["read"] = [TimeoutError()] * 5
    with pytest.raises(StoreError, match=r"cannot be asked for what is made \(TimeoutError\)"):
        faulty.find("train", FINGERPRINT)
    FaultyFiles.told.clear()
    FaultyFiles.faults["read"] = [PermissionError("no")]
    with pytest.raises(StoreError, match="look at the connection and at the credentials"):
        faulty.find("train", FINGERPRINT)
    assert len(FaultyFiles.told) == 1


def test_a_download_goes_on_where_the_connection_broke(faulty: SharedArtifacts, tmp_path: Path) -> None:
    made = _make(Store(tmp_path / "a"))
    faulty.put(made)
    FaultyFiles.cut_after.extend([3, 0, 1000])
    gone = list[int]()
    fetched = faulty.fetch(_found(faulty), Store(tmp_path / "b"), gone.append)
    assert _bytes(fetched) == _bytes(made)
    assert sum(gone) == sum(one.size_bytes for one in made.manifest.files.values()), "no byte came twice"


def test_a_download_that_was_given_up_is_taken_up_by_the_next(
    faulty: SharedArtifacts, tmp_path: Path
) -> None:
    made, store = _make(Store(tmp_path / "a")), Store(tmp_path / "b")
    faulty.put(made)
    (size,) = {one.size_bytes for name, one in made.manifest.files.items() if name == "model.safetensors"}
    FaultyFiles.cut_after.extend([None, size // 2] + [0] * 4)
    with pytest.raises(StoreError, match=r"cannot be read \(ConnectionResetError"):
        faulty.fetch(_found(faulty), store)
    assert store.find("train", FINGERPRINT) is None
    kept = sum(path.stat().st_size for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert kept > 0
    FaultyFiles.cut_after.clear()
    assert _bytes(faulty.fetch(_found(faulty), store)) == _bytes(made)


def test_a_file_of_other_bytes_is_refused_and_force_puts_it_right(
    shared: SharedArtifacts, tmp_path: Path
) -> None:
    made, store = _make(Store(tmp_path / "a")), Store(tmp_path / "b")
    shared.put(made)
    path = f"{shared._files_path(made.manifest)}/model.safetensors"
    data = shared._files.cat_file(path)
    shared._files.pipe_file(path, b"!" + data[1:])
    with pytest.raises(
        StoreError, match=r"model\.safetensors is damaged there: its SHA-256 is (.|\n)*--force"
    ):
        shared.fetch(_found(shared), store)
    assert store.find("train", FINGERPRINT) is None
    assert store.damage("train", FINGERPRINT) is None, "nothing looks like an artifact"
    shared.put(made)
    assert shared._files.cat_file(path) != data, "of the same size, so it counts as there"
    shared.put(made, replace=True)
    assert _bytes(shared.fetch(_found(shared), store)) == _bytes(made)


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest", "foreign"])
def test_what_is_not_whole_there_is_told_not_fetched_and_put_again(
    shared: SharedArtifacts, tmp_path: Path, damage: str
) -> None:
    made = _make(Store(tmp_path / "a"))
    shared.put(made)
    path, manifest = f"{shared._files_path(made.manifest)}/config.json", _manifest_path(shared)
    if damage == "cut":
        shared._files.pipe_file(path, b"{")
    elif damage == "gone":
        shared._files.rm(path)
    elif damage == "manifest":
        shared._files.pipe_file(manifest, shared._files.cat_file(manifest)[:-20])
    else:
        of_another = made.manifest.model_copy(update={"fingerprint": "cd" * 32})
        shared._files.pipe_file(manifest, manifest_text(of_another).encode())
    told = list[str]()
    assert shared.find("train", FINGERPRINT, told.append) is None
    assert len(told) == 1
    assert shared.put(made) == made.manifest
    assert _bytes(shared.fetch(_found(shared), Store(tmp_path / "b"))) == _bytes(made)


@pytest.mark.parametrize(
    "name", ["../out", "/out", "epoch1/../../out", "a\\b", "", ".", "manifest.json", "a\0b"]
)
def test_a_manifest_whose_names_lead_elsewhere_is_none(
    shared: SharedArtifacts, tmp_path: Path, name: str
) -> None:
    made = _make(Store(tmp_path / "a"))
    shared.put(made)
    files = {name: made.manifest.files["config.json"]}
    evil = made.manifest.model_copy(update={"files": files, "content": content_hash(files)})
    shared._files.pipe_file(_manifest_path(shared), manifest_text(evil).encode())
    told = list[str]()
    assert shared.find("train", FINGERPRINT, told.append) is None
    assert told == ["manifest.json is unreadable"]


def test_the_first_of_two_makers_stays_and_is_whole(shared: SharedArtifacts, tmp_path: Path) -> None:
    first, second = _make(Store(tmp_path / "a"), "first"), _make(Store(tmp_path / "b"), "second")
    shared.put(first)
    assert shared.put(second).content == first.manifest.content
    assert _bytes(shared.fetch(_found(shared), Store(tmp_path / "c"))) == _bytes(first)
    assert shared.put(second, replace=True).content == second.manifest.content
    assert _bytes(shared.fetch(_found(shared), Store(tmp_path / "d"))) == _bytes(second)


def test_a_maker_who_comes_in_between_is_not_overwritten(
    shared: SharedArtifacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    first, second = _make(Store(tmp_path / "a"), "first"), _make(Store(tmp_path / "b"), "other")
    whole = type(shared)._put_manifest

    def after_another(self: SharedArtifacts, manifest: Manifest, *, instead: bool) -> None:
        monkeypatch.setattr(type(shared), "_put_manifest", whole)
        shared.put(second)
        self._put_manifest(manifest, instead=instead)

    def commit_another() -> None:
        hub.before_a_commit = lambda: None
        open_shared(shared.place).put(second)

    if isinstance(shared, sharing._SharedOnHub):
        hub = request.getfixturevalue("hub")
        hub.before_a_commit = commit_another
    else:
        monkeypatch.setattr(type(shared), "_put_manifest", after_another)
    assert shared.put(first).content == second.manifest.content
    assert _bytes(shared.fetch(_found(shared), Store(tmp_path / "c"))) == _bytes(second)


def test_what_a_step_left_half_made_gives_way_to_what_is_fetched(
    shared: SharedArtifacts, tmp_path: Path
) -> None:
    made, store = _make(Store(tmp_path / "a")), Store(tmp_path / "b")
    shared.put(made)
    half = store.prepare("train", FINGERPRINT) / "scratch" / "checkpoint-1"
    half.mkdir(parents=True)
    (half / "state").write_bytes(b"half")
    (store.incoming("train", FINGERPRINT) / "of-another-manifest").write_bytes(b"old")
    assert _bytes(shared.fetch(_found(shared), store)) == _bytes(made)


def test_a_stop_ends_transfers_and_pauses(
    shared: SharedArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _make(Store(tmp_path / "a"))
    stopped = open_shared(shared.place, stop := threading.Event())
    stop.set()
    with pytest.raises(Interrupted):
        stopped.put(made)
    assert shared.find("train", FINGERPRINT) is None
    shared.put(made)
    with pytest.raises(Interrupted):
        stopped.fetch(_found(shared), Store(tmp_path / "b"))
    monkeypatch.setattr(SharedArtifacts, "_pauses_s", (3600.0,))
    FaultyFiles.faults["read"] = [TimeoutError()]
    with pytest.raises(Interrupted):
        open_shared(FAULTY, stop).find("train", FINGERPRINT)


def test_a_large_file_goes_through_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "team").mkdir()
    shared, store = open_shared(str(tmp_path / "team")), Store(tmp_path / "a")
    folder = store.prepare("train", FINGERPRINT)
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(80_000_000)
    made = store.seal(folder, kind="train", fingerprint=FINGERPRINT, settings={}, seed=1, seconds=0.5)
    tracemalloc.start()
    try:
        shared.put(made)
        shared.fetch(_found(shared), Store(tmp_path / "b"))
        assert tracemalloc.get_traced_memory()[1] < 3 * sharing._BLOCK_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "shared",
    [pytest.param("s3", marks=pytest.mark.skipif(not HAS_S3, reason=NEEDS_S3))],
    indirect=True,
)
def test_a_large_file_goes_to_s3_in_parts(shared: SharedArtifacts, tmp_path: Path) -> None:
    made = _make(Store(tmp_path / "a"), size=10_000_000)
    shared.put(made)
    info = shared._files.info(f"{shared._files_path(made.manifest)}/model.safetensors")
    assert info["ETag"].strip('"').endswith("-3"), "40 MB"
    assert _bytes(shared.fetch(_found(shared), Store(tmp_path / "b"))) == _bytes(made)


def _processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["potstill.core.shared", "fsspec.implementations.memory", "pytest"])
    return context


def _transfer_until_killed(what: str, calls: int, place: str, artifact: Path, store: Path) -> None:
    """Put or fetch, and end at the n-th moment at which something is to become visible or lasting."""
    real, left = {name: getattr(os, name) for name in ("replace", "link", "fsync")}, [calls]

    def counted(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real[name](*arguments)

        return call

    for name in real:
        setattr(os, name, counted(name))
    sharing._BLOCK_BYTES = 1000
    shared = open_shared(place)
    if what == "put":
        shared.put(Artifact.open(artifact))
    else:
        shared.fetch(_found(shared), Store(store))


def _killed_after(calls: int, what: str, place: Path, artifact: Artifact, store: Path) -> bool:
    arguments = (what, calls, str(place), artifact.folder, store)
    process = _processes().Process(target=_transfer_until_killed, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("what", ["put", "fetch"])
def test_a_process_that_is_killed_at_any_moment_is_taken_up_by_the_next(what: str, tmp_path: Path) -> None:
    made, place, store = _make(Store(tmp_path / "a")), tmp_path / "team", Store(tmp_path / "b")
    place.mkdir()
    shared = open_shared(str(place))
    if what == "fetch":
        shared.put(made)
    kills = 0
    while _killed_after(kills, what, place, made, tmp_path / "b"):
        kills += 1
        if what == "put":
            # Either nothing is to be found, or all of it is.
            if (found := shared.find("train", FINGERPRINT)) is not None:
                assert _bytes(shared.fetch(found, Store(tmp_path / f"c{kills}"))) == _bytes(made)
        elif (fetched := store.find("train", FINGERPRINT)) is not None:
            assert _bytes(fetched) == _bytes(made)
    assert kills > len(made.manifest.files)
    assert _bytes(shared.fetch(_found(shared), store)) == _bytes(made)
    assert not list(place.rglob("*.partial")), "what kills left is cleared up"


def _seal_and_put(place: str, store: Path, text: str, barrier: Any, told: Any) -> None:
    shared = open_shared(place)
    made = _make(Store(store), text)
    barrier.wait(60)
    told.put(shared.put(made).content)


@pytest.mark.slow
@pytest.mark.parametrize("texts", [("one", "two"), ("same", "same")])
def test_two_processes_that_seal_one_fingerprint_at_once_leave_one_whole_artifact(
    texts: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "team").mkdir()
    shared, context = open_shared(str(tmp_path / "team")), _processes()
    barrier, told = context.Barrier(2), context.Queue()
    makers = [
        context.Process(
            target=_seal_and_put, args=(shared.place, tmp_path / f"maker{number}", text, barrier, told)
        )
        for number, text in enumerate(texts)
    ]
    for maker in makers:
        maker.start()
    found = [told.get(timeout=60) for _ in makers]
    for maker in makers:
        maker.join(60)
        assert maker.exitcode == 0
    assert found == [_found(shared).content] * 2, "both know which one stands there"
    fetched = shared.fetch(_found(shared), Store(tmp_path / "reader"))
    makers_own = [
        Artifact.open(next((tmp_path / f"maker{number}" / "artifacts").iterdir())) for number in (0, 1)
    ]
    whole = [_bytes(one) for one in makers_own if one.manifest.content == fetched.manifest.content]
    payload = {name: data for name, data in _bytes(fetched).items() if name != MANIFEST_FILE}
    assert payload in [{name: one[name] for name in payload} for one in whole]


def test_on_the_hub_an_artifact_is_one_commit(hub: Hub, hub_place: str, tmp_path: Path) -> None:
    made, shared = _make(Store(tmp_path / "a")), open_shared(hub_place)
    shared.put(made)
    [paths] = hub.commits
    assert len(paths) == len(made.manifest.files) + 1
    shared.put(made)
    assert len(hub.commits) == 1
    with pytest.raises(StoreError, match="there is no such repository"):
        open_shared("hf://datasets/team/another/distil")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (7, "is no text"),
        ("", "no URL and no absolute path"),
        ("team/distil", "no URL and no absolute path"),
        ("s3://", "no URL of a place"),
        ("S 3://bucket", "no URL of a place"),
        (f"s3://AKIA:{SECRET}@bucket/distil", "holds a user name, a key"),
        (f"hf://{SECRET}@datasets/user/name", "holds a user name, a key"),
        (f"s3://bucket/distil?X-Amz-Signature={SECRET}", "holds a user name, a key"),
        (f"gs://bucket/distil#{SECRET}", "holds a user name, a key"),
        (f"simplecache::s3://bucket/{SECRET}", "no URL of a place"),
        ("s3://bucket/../other", "no part of a place"),
    ],
)
def test_a_place_with_credentials_or_without_a_form_is_refused_and_not_repeated(
    place: object, message: str
) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        check_place(place)
    assert SECRET not in str(caught.value)


def test_a_place_is_a_url_or_a_whole_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_place("~/team") == str(tmp_path / "team")
    for place in ("s3://bucket/distil", "hf://datasets/user/name@main/distil", "file:///mnt/team"):
        assert check_place(place) == place
    assert check_place("gs://bucket/distil/") == "gs://bucket/distil"


def test_a_folder_that_is_not_mounted_is_no_place(tmp_path: Path) -> None:
    for place in (str(tmp_path / "team"), f"file://{tmp_path}/team"):
        with pytest.raises(StoreError, match=r"team: is no folder here(.|\n)*mount it"):
            open_shared(place)
    assert not (tmp_path / "team").exists()


def test_what_opens_a_url_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
        for scheme in ("s3", "s3a", "gs", "gcs"):
            monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    for scheme, extra in (("s3", "s3"), ("gs", "gs")):
        with pytest.raises(StoreError, match=rf"pip install 'potstill\[{extra}\]'"):
            open_shared(f"{scheme}://bucket/distil")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_shared("nothing://bucket/distil")


def test_what_a_file_system_says_is_repeated_without_secrets(
    faulty: SharedArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    said = f"https://user:pass@host/x?X-Amz-Signature=abcdef {SECRET}"
    FaultyFiles.faults["read"] = [OSError(said)] * 5
    with pytest.raises(StoreError) as caught:
        faulty.find("train", FINGERPRINT)
    text = str(caught.value)
    assert not [one for one in (SECRET, "pass", "abcdef") if one in text]
    assert "https://...@host/x?..." in text
