"""Dense and hybrid retrieval: vectors, resuming, Qdrant against plain cosines, and fused rankings."""

import socket
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.errors import EngineError, Interrupted
from potstill.core.records import Record
from potstill.models import load_encoder
from potstill.retrieval import QdrantServer
from potstill.retrieval.dense import VECTORS_FILE, Dense, Embedder, write_vectors
from potstill.retrieval.index import fused
from potstill.retrieval.passages import Passages, write_passages

from .conftest import Bench, articles
from .qdrant_server import QdrantStandIn, running_qdrant

qdrant = pytest.importorskip("qdrant_client")


@pytest.fixture
def passages(tmp_path: Path, tiny_tokenizer: Any) -> Passages:
    rows = [Record(f"a{n}", [], response=one["text"]) for n, one in enumerate(articles())]
    write_passages(tmp_path / "p.arrow", rows, tiny_tokenizer, 50)
    return Passages(tmp_path / "p.arrow")


@pytest.fixture
def embed(tiny_encoder: str, bench: Bench) -> Embedder:
    return Embedder(tiny_encoder, bench.build("retrieve"), "cpu")


def alone(name: str, text: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A text's vector in float64, without padding or batches."""
    model, tokenizer = load_encoder(name, task="embedding", device="cpu")
    states_TH = model.double()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach().numpy()
    mean_H = states_TH.mean(0)
    found: np.ndarray[Any, np.dtype[np.float64]] = mean_H / np.linalg.norm(mean_H)
    return found


def test_a_vector_is_the_mean_of_the_last_states_whatever_shares_its_batch(
    embed: Embedder, tiny_encoder: str
) -> None:
    texts = ["A zindle costs 11 coins.", "grey", "The florp has been dyed in grey since 1. " * 3]
    for vector_H, text in zip(embed(texts), texts, strict=True):
        assert vector_H == pytest.approx(alone(tiny_encoder, text), abs=1e-5)
        assert np.linalg.norm(vector_H) == pytest.approx(1, abs=1e-5)


def test_embedding_goes_on_where_it_was_interrupted(
    passages: Passages, embed: Embedder, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.retrieval.dense._BLOCK_TEXTS", 4)
    monkeypatch.setattr("potstill.retrieval.dense._BATCH_TEXTS", 2)
    context = bench.build("retrieve")
    calls: list[int] = []

    class Counting:
        model = embed.model

        def __init__(self, stop_at: int) -> None:
            self.stop_at = stop_at

        def __call__(self, texts: list[str]) -> Any:
            calls.append(len(texts))
            if sum(calls) > self.stop_at:
                raise Interrupted
            return embed(texts)

    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    assert write_vectors(passages, embed, tmp_path / "whole", context) == 32
    with pytest.raises(Interrupted):
        write_vectors(passages, Counting(10), tmp_path / "halves", context)  # type: ignore[arg-type]
    calls.clear()
    write_vectors(passages, Counting(99), tmp_path / "halves", context)  # type: ignore[arg-type]
    assert sum(calls) == len(passages) - 8, "two blocks of four were kept"
    whole, halves = (tmp_path / name / VECTORS_FILE for name in ("whole", "halves"))
    assert whole.read_bytes() == halves.read_bytes()
    assert [path.name for path in (tmp_path / "halves").iterdir()] == [VECTORS_FILE]


def test_qdrant_finds_what_plain_cosines_find(
    passages: Passages, embed: Embedder, bench: Bench, tmp_path: Path
) -> None:
    write_vectors(passages, embed, tmp_path, bench.build("retrieve"))
    vectors_NH = np.load(tmp_path / VECTORS_FILE, allow_pickle=False).astype(np.float64)
    search = Dense(tmp_path / VECTORS_FILE, embed, "f" * 64, None)
    for query in ("A florp costs 12 coins.", "grey since", "?"):
        cosines_N = vectors_NH @ embed([query])[0].astype(np.float64)
        found = search.search(query, 5)
        assert [score for _, score in found] == pytest.approx(sorted(cosines_N, reverse=True)[:5], abs=1e-5)
        assert [cosines_N[number] for number, _ in found] == pytest.approx(
            [score for _, score in found], abs=1e-5
        )


@pytest.fixture
def server() -> Iterator[QdrantStandIn]:
    with running_qdrant() as running:
        yield running


@pytest.fixture
def vectors(passages: Passages, embed: Embedder, bench: Bench, tmp_path: Path) -> Path:
    """The file of the passages' vectors."""
    write_vectors(passages, embed, tmp_path, bench.build("retrieve"))
    return tmp_path / VECTORS_FILE


def test_a_server_finds_exactly_what_this_process_finds(
    vectors: Path, embed: Embedder, server: QdrantStandIn
) -> None:
    here = Dense(vectors, embed, "f" * 64, None)
    there = Dense(vectors, embed, "f" * 64, QdrantServer(url=server.url))
    for query in ("A florp costs 12 coins.", "grey since", "?"):
        found = there.search(query, 5)
        assert [number for number, _ in found] == [number for number, _ in here.search(query, 5)]
        assert server.requests[-1].body["params"] == {"exact": True}


def test_a_server_is_filled_once_and_keeps_its_collection(
    vectors: Path, embed: Embedder, server: QdrantStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.retrieval.dense._REQUEST_VALUES", 5 * 32)
    first = Dense(vectors, embed, "f" * 64, QdrantServer(url=server.url)).search("grey", 3)
    count = len(np.load(vectors))
    assert server.filled == [[*range(start, min(start + 5, count))] for start in range(0, count, 5)]
    asked = len(server.requests)
    assert Dense(vectors, embed, "f" * 64, QdrantServer(url=server.url)).search("grey", 3) == first
    again = [(one.method, one.path.rpartition("/")[2]) for one in server.requests[asked:]]
    assert again == [("GET", "exists"), ("POST", "count"), ("POST", "query")]
    Dense(vectors, embed, "e" * 64, QdrantServer(url=server.url))
    assert len({one.path.split("/")[2] for one in server.requests}) == 2, "other vectors have their own"


def test_a_collection_whose_filling_broke_off_is_filled_again(
    vectors: Path, embed: Embedder, server: QdrantStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.retrieval.dense._REQUEST_VALUES", 5 * 32)
    server.broken_from = 3  # after the question whether it exists, its making and the first points
    with pytest.raises(EngineError, match="out of room") as caught:
        Dense(vectors, embed, "f" * 64, QdrantServer(url=server.url))
    assert server.url in str(caught.value)
    assert server.filled[0] == [*range(5)]
    server.broken_from = None
    found = Dense(vectors, embed, "f" * 64, QdrantServer(url=server.url)).search("grey", 99)
    assert {number for number, _ in found} == {*range(len(np.load(vectors)))}


def test_two_runs_that_fill_a_collection_at_once_both_find_all_of_it(
    vectors: Path, embed: Embedder, server: QdrantStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other does it all before this one makes the collection, then amid this one's points."""
    monkeypatch.setattr("potstill.retrieval.dense._REQUEST_VALUES", 5 * 32)
    found = []

    def other() -> None:
        server.before_request = None
        found.append(Dense(vectors, embed, "f" * 64, QdrantServer(url=server.url)).search("grey", 99))

    for made in (2, 4):
        server.engine.delete_collection(f"potstill-{'f' * 24}")
        server.before_request = (len(server.requests) + made, other)
        found.append(Dense(vectors, embed, "f" * 64, QdrantServer(url=server.url)).search("grey", 99))
    assert [{number for number, _ in one} for one in found] == [{*range(len(np.load(vectors)))}] * 4
    assert all(one.method != "DELETE" for one in server.requests), "a run takes from no other"


def test_a_server_that_breaks_while_it_is_searched_is_an_error_with_its_url(
    vectors: Path, embed: Embedder, server: QdrantStandIn
) -> None:
    search = Dense(vectors, embed, "f" * 64, QdrantServer(url=server.url))
    server.broken_from = 0
    with pytest.raises(EngineError, match="Qdrant gives no answer") as caught:
        search.search("grey", 3)
    assert server.url in str(caught.value)


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection:UserWarning")
def test_a_server_is_told_the_key_with_every_request(
    vectors: Path, embed: Embedder, server: QdrantStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDRANT_KEY", "open sesame")
    given = QdrantServer(url=server.url, api_key_env="QDRANT_KEY")
    Dense(vectors, embed, "f" * 64, given).search("grey", 3)
    assert {one.api_key for one in server.requests} == {"open sesame"}


def test_a_step_writes_the_same_with_a_server(bench: Bench, tiny_encoder: str, server: QdrantStandIn) -> None:
    here = bench.run(method="dense", encoder=tiny_encoder, k=2)
    there = bench.run("there", method="dense", encoder=tiny_encoder, k=2, qdrant={"url": server.url})
    assert there == here
    assert server.filled


@pytest.mark.parametrize("method", ["dense", "hybrid"])
def test_a_step_searches_by_meaning_and_both(bench: Bench, tiny_encoder: str, method: str) -> None:
    written = bench.run(method=method, encoder=tiny_encoder, k=2)
    assert all(len(record.meta["passages"]) == 2 for record in written)
    assert "vectors: 32 width" in bench.said
    assert ("bm25:" in bench.said) == (method == "hybrid")
    bench.run("again", method=method, encoder=tiny_encoder)
    assert "vectors:" not in bench.said


RANKING = st.lists(st.integers(0, 9), unique=True, max_size=6)


@given(RANKING, RANKING)
def test_a_fused_ranking_is_by_the_sum_of_reciprocal_ranks(one: list[int], other: list[int]) -> None:
    def score(number: int) -> Fraction:
        ranks = [ranking.index(number) + 1 for ranking in (one, other) if number in ranking]
        return sum((Fraction(1, 60 + rank) for rank in ranks), Fraction(0))

    found = fused([[(number, 0.0) for number in ranking] for ranking in (one, other)])
    assert {number for number, _ in found} == {*one, *other}
    assert [value for _, value in found] == pytest.approx(sorted(map(score, {*one, *other}), reverse=True))
    assert all(value == pytest.approx(float(score(number))) for number, value in found)


def test_a_server_that_is_not_there_is_an_error_with_its_url(
    passages: Passages, embed: Embedder, bench: Bench, tmp_path: Path
) -> None:
    write_vectors(passages, embed, tmp_path, bench.build("retrieve"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(EngineError, match="Qdrant gives no answer") as caught:
            Dense(tmp_path / VECTORS_FILE, embed, "f" * 64, QdrantServer(url=url))
    assert url in str(caught.value)


def test_a_key_that_is_not_set_is_named_by_its_variable(
    passages: Passages, embed: Embedder, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QDRANT_KEY", raising=False)
    write_vectors(passages, embed, tmp_path, bench.build("retrieve"))
    server = QdrantServer(url="http://127.0.0.1:1", api_key_env="QDRANT_KEY")
    with pytest.raises(EngineError, match="QDRANT_KEY is not set"):
        Dense(tmp_path / VECTORS_FILE, embed, "f" * 64, server)


def test_without_qdrant_client_the_mend_is_named(bench: Bench, tiny_encoder: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="not installed") as caught:
        bench.run(method="dense", encoder=tiny_encoder)
    assert "bm25" in (caught.value.mend or "")
