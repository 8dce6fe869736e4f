"""The cache step on a tiny random model: what it keeps is what the teacher says, whatever interrupts it."""

import functools
import hashlib
import io
import itertools
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
import torch
from pydantic import ValidationError

from potstill.cache import CacheSettings, ScoringReplica, import_artifact, run
from potstill.core.alternatives import Alternatives
from potstill.core.errors import DataError, EngineError, Interrupted, ModelError, StoreError
from potstill.core.events import Reporter
from potstill.core.records import RECORDS_FILE, Record, write_records
from potstill.core.settings import Settings, meaning
from potstill.core.step import StepContext, StepResult
from potstill.core.store import Artifact, Store
from potstill.data.batches import collate
from potstill.data.chat import Rendered, Renderer
from potstill.logits import shards
from potstill.logits.checked_files import read_arrays
from potstill.logits.hdf5 import export_hdf5
from potstill.logits.logit_cache import LogitCache
from potstill.logits.shards import ShardWriter
from potstill.losses.types import Sampled, Sparse
from potstill.models import (
    LoadedModel,
    TransformersModel,
    load,
    load_tokenizer,
    tokenizer_hash,
)
from potstill.scoring import hidden_of_rows
from potstill.teachers import OpenAIModel, RequestError
from potstill.teachers.failures import FAILURES_FILE
from potstill.teachers.transformers import generate_batch

from ..copies import CopiesHere
from ..servers import Reply, ScriptedServer, error, prompt_logprobs, rows_scored, running_server, vllm
from .logits.caches import assert_same_signal

# Rows of several lengths; the last is the first again, under another id.
RESPONSES = [
    "12",
    "The answer is -11.",
    "First 12 + 7 = 19, then 19 - 30 = -11.",
    "eleven apples",
    "30 - 7",
    "a b c",
]
RECORDS = [
    Record(
        prompt_id=f"prompt {number % 6}",
        messages=[
            {"role": "user", "content": f"Problem {number % 6}: 12 + 7 =" + " and so on" * (number % 3)}
        ],
        response=RESPONSES[number % 6],
        sample=number,
        held_out=number == 2,
    )
    for number in range(7)
]

# The widest layers' float32 activations of a token in the tiny model, of hidden size 32 and 48 in between.
TOKEN_BYTES = 4 * (16 * 32 + 4 * 48)


class Bench:
    """A store with records and a tiny model; runs the step in folders of its own."""

    def __init__(self, root: Path, model_folder: Path) -> None:
        self.root, self.store = root, Store(root / "store")
        self.model: Settings = TransformersModel(path=str(model_folder), dtype="float32")
        self.said = io.StringIO()
        self.records: list[Record] = RECORDS

    def context(self, name: str) -> StepContext:
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        return StepContext(
            name="logits",
            kind="cache",
            folder=folder,
            seed=1,
            cache_folder=self.store.root,
            reporter=Reporter(stream=self.said),
            resolve_models=lambda reference: {str(reference): self.model},
            resolve_data=lambda reference: [(self._traces(), None)],
        )

    def _traces(self) -> Artifact:
        folder = self.store.prepare("generate", "f" * 24)
        write_records(folder / RECORDS_FILE, self.records)
        return self.store.seal(
            folder, kind="generate", fingerprint="f" * 24, settings={}, seed=1, seconds=0.0
        )

    def run(
        self, name: str = "cache", *, copies: CopiesHere | None = None, **settings: Any
    ) -> tuple[StepResult, LogitCache]:
        context = self.context(name)
        context.replicas = copies
        result = run(_settings(**settings), context)
        return result, LogitCache.open(context.folder)


def _settings(**settings: Any) -> CacheSettings:
    return CacheSettings.model_validate(
        {
            "do": "cache",
            "model": "teacher",
            "data": "traces",
            **({} if settings.get("codec") == "sampled" else {"top_k": 8}),
            **settings,
        }
    )


def _bytes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


@pytest.fixture
def bench(tmp_path: Path, tiny_model_folder: Path) -> Bench:
    return Bench(tmp_path, tiny_model_folder)


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each forward pass of the step, as they happen."""
    passes: list[int] = []

    def counted(model: Any, rows: list[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
        passes.append(len(rows))
        return hidden_of_rows(model, rows)

    monkeypatch.setattr("potstill.scoring.hidden_of_rows", counted)
    return passes


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ShardWriter", functools.partial(shards.ShardWriter, shard_tokens=17))


def test_the_cached_signal_is_the_teachers_softmax_within_the_codecs_error(
    bench: Bench, forward_passes: list[int]
) -> None:
    result, cache = bench.run(temperatures=[2.0], batch_tokens=150)
    assert len(forward_passes) > 1
    assert max(forward_passes) > 1, "no row was padded"
    assert isinstance(bench.model, TransformersModel)
    teacher = load(bench.model)
    renderer = Renderer(teacher.tokenizer)
    assert len(cache) == len(RECORDS)
    for number, record in enumerate(RECORDS):
        row, rendered = cache.row(number), renderer.render(record)
        assert (row.token_ids, row.mask) == (rendered.ids, rendered.mask)
        assert (row.record_id, row.held_out) == (record.id, record.held_out)
        ids_T = torch.tensor(row.token_ids)
        with torch.no_grad():
            logits_TV = teacher.model(input_ids=ids_T[None], use_cache=False).logits[0, :, :300].double()
        # Token i is predicted by the logits at i - 1.
        predicted = [at - 1 for at, supervised in enumerate(row.mask) if supervised]
        for temperature in (1.0, 2.0):
            wanted_NK, ids_NK = (logits_TV[predicted] / temperature).log_softmax(-1).topk(8, -1)
            signal = cache.signal(number, temperature)
            assert isinstance(signal, Sparse)
            assert torch.equal(signal.ids_NK, ids_NK)
            # Rounding, and as much again for the sum that is put right.
            limit_NK = 2 * (1 + logits_TV[predicted].log_softmax(-1).topk(8, -1).values.abs()) / 512
            assert ((signal.log_probs_NK - wanted_NK).abs() <= limit_NK / temperature + 2**-10).all()
    rendering = result.extra.pop("rendering")
    assert rendering["chat_template"] == teacher.tokenizer.chat_template
    assert result.extra == {
        "codec": "topk",
        "codec_version": 2,
        "k": 8,
        "vocabulary_size": 300,
        "temperatures": [1.0, 2.0],
        "tokenizer": tokenizer_hash(teacher.tokenizer),
        "model": teacher.identity,
    }


def test_counts_and_figures_are_reported(bench: Bench) -> None:
    result, cache = bench.run()
    tokens, supervised = int(cache.lengths.sum()), int(cache.supervised.sum())
    assert result.counts == {
        "rows": 7,
        "distinct_rows": 6,
        "too_long": 0,
        "failed": 0,
        "tokens": tokens,
        "supervised_tokens": supervised,
    }
    assert 0 < result.metrics["mean_kept_mass"] < 1
    assert result.metrics["bytes_per_token"] > 8 * 4
    assert result.tokens == tokens - int(cache.lengths[6])


def test_an_equal_row_is_scored_once(bench: Bench, forward_passes: list[int]) -> None:
    _, cache = bench.run()
    assert sum(forward_passes) == 6
    assert torch.equal(cache.signal(0).log_probs_NK, cache.signal(6).log_probs_NK)
    assert cache.row(0).record_id != cache.row(6).record_id


@pytest.mark.parametrize("codec", [{"codec": "topk"}, {"codec": "sampled"}], ids=["topk", "sampled"])
@pytest.mark.parametrize("passes_before", [2, 5])
@pytest.mark.usefixtures("small_shards")
def test_pitfall_15_an_interrupted_capture_ends_with_the_same_bytes(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    forward_passes: list[int],
    passes_before: int,
    codec: dict[str, Any],
) -> None:
    bench.records = [
        Record(f"p{number}", [{"role": "user", "content": "1" * (number % 7)}], response=f"{number} apples")
        for number in range(16)
    ]
    whole_result, _ = bench.run("whole", batch_tokens=70, **codec)
    whole_passes = [*forward_passes]
    forward_passes.clear()

    context = bench.context("interrupted")

    def stops(*arguments: Any, **options: Any) -> Any:
        if len(forward_passes) == passes_before:
            context.stop.set()
        return collate(*arguments, **options)

    monkeypatch.setattr("potstill.scoring.collate", stops)
    with pytest.raises(Interrupted):
        run(_settings(batch_tokens=70, **codec), context)
    assert len(forward_passes) == passes_before
    sealed = sum(len(read_arrays(path)["keys"]) for path in context.folder.glob("shard-*"))
    assert 0 < sealed < 16
    assert sealed not in itertools.accumulate(whole_passes), "no shard ends inside a batch"
    assert not (context.folder / "index.safetensors").exists()

    monkeypatch.setattr("potstill.scoring.collate", collate)
    forward_passes.clear()
    result, _ = bench.run("interrupted", batch_tokens=70, **codec)
    assert 0 < len(forward_passes) < len(whole_passes), "nothing was taken over from the first attempt"
    assert result == whole_result
    assert _bytes(bench.root / "interrupted") == _bytes(bench.root / "whole")


def test_a_finished_capture_is_not_scored_again(bench: Bench, forward_passes: list[int]) -> None:
    bench.run()
    forward_passes.clear()
    bench.run()
    assert forward_passes == []


def test_a_mask_that_leaves_nothing_out_is_an_error_before_anything_is_scored(
    bench: Bench, forward_passes: list[int]
) -> None:
    with pytest.raises(DataError, match="mask_prefix leaves nothing out"):
        bench.run(mask_prefix=True)
    assert forward_passes == []


def test_rows_with_another_tokenizers_ids_are_refused(bench: Bench) -> None:
    bad = Record(
        "p", [{"role": "user", "content": "2 + 2 ="}], response="4", response_token_ids=[5], tokenizer="other"
    )
    bench.records = [RECORDS[0], bad]
    with pytest.raises(DataError, match=r"row 2 \(record \w+\): its token ids are another tokenizer's"):
        bench.run()


def test_rows_with_the_teachers_own_ids_keep_them(bench: Bench) -> None:
    assert isinstance(bench.model, TransformersModel)
    tokenizer = load_tokenizer(bench.model)
    own = Record(
        "p",
        [{"role": "user", "content": "2 + 2 ="}],
        response="4",
        prompt_token_ids=[7, 8, 9],
        response_token_ids=[10, 11, 12],
        finish_reason="length",
        tokenizer=tokenizer_hash(tokenizer),
    )
    bench.records = [own]
    _, cache = bench.run()
    assert cache.row(0).token_ids == [7, 8, 9, 10, 11, 12]
    assert cache.row(0).mask == [0, 0, 0, 1, 1, 1]


def test_pitfall_11_a_row_with_nothing_to_learn_is_refused_by_number(bench: Bench) -> None:
    empty = Record("p", [{"role": "user", "content": "2 + 2 ="}], response="")
    bench.records = [RECORDS[0], RECORDS[1], empty]
    with pytest.raises(DataError, match=r"row 3 \(record \w+\): nothing to learn"):
        bench.run()
    assert not list((bench.root / "cache").glob("shard-*"))


@pytest.mark.parametrize("codec", ["topk", "sampled"])
def test_a_row_that_the_teacher_gives_no_distribution_for_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    longest = max(RECORDS[:6], key=lambda record: len(str(record.messages)) + len(record.response))

    def overflowing(model: Any, rows: list[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_NH, targets_N = hidden_of_rows(model, rows)
        place = max(range(len(rows)), key=lambda number: len(rows[number].ids))
        first = sum(row.supervised_tokens for row in rows[:place])
        hidden_NH[first : first + rows[place].supervised_tokens] = torch.nan
        return hidden_NH, targets_N

    monkeypatch.setattr("potstill.scoring.hidden_of_rows", overflowing)
    with pytest.raises(DataError, match=rf"record {longest.id}: token 0 of those kept has no distribution"):
        bench.run(codec=codec, batch_tokens=5000)


def test_rows_that_are_too_long_are_left_out_and_told(bench: Bench) -> None:
    _, everything = bench.run("everything")
    lengths = sorted(everything.lengths.tolist())
    result, cache = bench.run(max_length=lengths[3])
    assert result.counts["too_long"] == 7 - len(cache) > 0
    assert cache.lengths.max() == lengths[3]
    assert f"{7 - len(cache)} rows of more than {lengths[3]} tokens left out" in bench.said.getvalue()


def test_only_rows_that_are_too_long_are_an_error(bench: Bench) -> None:
    with pytest.raises(DataError, match="each of the 7 rows has more than 2 tokens"):
        bench.run(max_length=2)


def test_rows_past_the_models_context_are_left_out(
    bench: Bench, tmp_path: Path, build_tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    _, everything = bench.run("everything")
    shortest = int(everything.lengths.min())
    folder = tmp_path / "short-context"
    build_tiny_model("llama", max_position_embeddings=shortest).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    bench.model = TransformersModel(path=str(folder), dtype="float32")
    _, cache = bench.run()
    assert set(cache.lengths.tolist()) == {shortest}


def test_a_long_text_is_cut_into_windows_that_score_every_token_once(bench: Bench) -> None:
    text = " ".join(RESPONSES) * 3
    bench.records = [Record("text", [], response=text), Record("short", [], response="12 + 7")]
    _, whole = bench.run("whole")
    result, cut = bench.run("cut", max_length=20)
    assert result.counts["too_long"] == 0
    assert cut.lengths.max() == 20
    assert len(cut) > len(whole) == 2
    windows = [cut.row(number) for number in range(len(cut) - 1)]
    ids, first = list(whole.row(0).token_ids), list(windows[0].token_ids)
    for before, window in itertools.pairwise(windows):
        assert window.token_ids[0] == before.token_ids[-1]
        first += window.token_ids[1:]
    assert first == ids
    assert all(list(window.mask) == [0] + [1] * (len(window.token_ids) - 1) for window in windows)
    assert sum(cut.supervised) == sum(whole.supervised)
    assert {window.record_id for window in windows} == {bench.records[0].id}
    # What a window's tokens are predicted from is the window.
    assert torch.equal(cut.signal(0).top_ids, whole.signal(0).rows(slice(0, 19)).top_ids)


def test_a_batch_that_does_not_fit_into_memory_is_halved_until_it_does(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, forward_passes: list[int]
) -> None:
    _, whole = bench.run("whole", batch_tokens=2000)
    assert max(forward_passes) == 6
    forward_passes.clear()
    refused: list[int] = []

    def small_memory(model: Any, rows: list[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
        if len(rows) > 2:
            refused.append(len(rows))
            raise torch.OutOfMemoryError("out of memory")
        forward_passes.append(len(rows))
        return hidden_of_rows(model, rows)

    monkeypatch.setattr("potstill.scoring.hidden_of_rows", small_memory)
    _, found = bench.run("found", batch_tokens=2000)
    assert refused == [6, 3]
    assert sum(forward_passes) == 6
    assert "out of memory: batches are scored in 4 pieces from here on" in bench.said.getvalue()
    for number in range(7):
        assert found.row(number) == whole.row(number)
        assert torch.equal(found.signal(number).top_ids, whole.signal(number).top_ids)
    kept = json.loads((bench.root / "found" / "scratch" / "batches.json").read_text())
    assert (kept["tokens"], kept["pieces"]) == (2000, 4)


def test_a_row_that_fits_into_no_memory_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("potstill.scoring.hidden_of_rows", no_memory)
    with pytest.raises(ModelError, match=r"a row of \d+ tokens does not fit into memory"):
        bench.run()


def test_the_batch_size_found_first_stays_when_a_capture_is_taken_up_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, forward_passes: list[int]
) -> None:
    bench.run(batch_tokens=100)
    passes = [*forward_passes]
    for path in (bench.root / "cache").glob("*.safetensors"):
        path.unlink()
    forward_passes.clear()
    bench.run(batch_tokens=2000)
    assert forward_passes == passes


@pytest.mark.parametrize(
    ("free_bytes", "tokens"),
    [(0, 256), (4 * 1000 * TOKEN_BYTES, 1000), (4 * 3999 * TOKEN_BYTES, 3999), (2**60, 4096)],
)
def test_the_batch_size_is_what_a_quarter_of_the_free_memory_holds_within_bounds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, free_bytes: int, tokens: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_bytes))
    bench.run()
    assert json.loads((bench.root / "cache" / "scratch" / "batches.json").read_text())["tokens"] == tokens


@pytest.fixture
def tiny_teacher(tiny_model_folder: Path) -> LoadedModel:
    """The tiny model in memory."""
    return load(TransformersModel(path=str(tiny_model_folder), dtype="float32"))


@pytest.fixture
def server(bench: Bench, tiny_model_folder: Path, tiny_teacher: LoadedModel) -> Iterator[ScriptedServer]:
    """A server of the tiny model, which is then the bench's model."""
    with running_server() as running:
        bench.model = OpenAIModel(
            engine="openai", base_url=running.base_url, model="tiny", tokenizer=str(tiny_model_folder)
        )
        running.always = vllm(lambda body: Reply(body=prompt_logprobs(tiny_teacher, body)))
        yield running


def test_pitfall_7_a_cache_from_a_servers_prompt_logprobs_is_that_of_the_model(
    bench: Bench, tiny_model_folder: Path, server: ScriptedServer
) -> None:
    result, served = bench.run("served")
    prompts = rows_scored(server)
    assert len(prompts) == 6
    assert all(request["max_tokens"] == 1 and request["prompt_logprobs"] == 8 for request in prompts)
    bench.model = TransformersModel(path=str(tiny_model_folder), dtype="float32")
    _, local = bench.run("local")
    assert (served.tokenizer, result.model_identity) == (local.tokenizer, f"tiny at {server.base_url}")
    for number in range(7):
        assert served.row(number) == local.row(number)
        assert_same_signal(served.signal(number), local.signal(number))


@pytest.mark.parametrize("settings", [{"temperatures": [2.0]}, {"codec": "sampled"}])
@pytest.mark.usefixtures("server")
def test_a_server_gives_its_likeliest_ids_at_temperature_1_only(
    bench: Bench, settings: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match="is a server, which gives its likeliest ids at temperature 1"):
        bench.run(**settings)


def test_a_server_without_prompt_logprobs_is_refused(bench: Bench, server: ScriptedServer) -> None:
    server.always = vllm(lambda body: Reply(body={"choices": [{"text": "x"}]}))
    with pytest.raises(EngineError, match="the answer holds no log-probabilities of the prompt's"):
        bench.run()


def test_a_server_that_gives_fewer_ids_than_asked_for_is_refused(
    bench: Bench, server: ScriptedServer, tiny_teacher: LoadedModel
) -> None:
    server.always = vllm(
        lambda body: Reply(body=prompt_logprobs(tiny_teacher, {**body, "prompt_logprobs": 3}))
    )
    with pytest.raises(EngineError, match=r"ids for a token, though 8 were asked for"):
        bench.run()


def test_a_vllm_that_allows_fewer_log_probabilities_is_told_how_to_be_served(
    bench: Bench, server: ScriptedServer
) -> None:
    refusal = "Requested prompt logprobs of 64, which is greater than max allowed: 20"
    server.always = vllm(lambda body: Reply(400, error(refusal)))
    with pytest.raises(EngineError, match=r"max allowed: 20(.|\n)*--max-logprobs of at least top_k"):
        bench.run()


def test_rows_past_a_servers_context_are_left_out(
    bench: Bench, server: ScriptedServer, tiny_teacher: LoadedModel
) -> None:
    _, everything = bench.run("everything")
    lengths = sorted(everything.lengths.tolist())

    def answer(body: dict[str, Any]) -> Reply:
        if len(body["prompt"]) + body["max_tokens"] > lengths[3] + 1:
            return Reply(400, error("this model's maximum context length is exceeded"))
        return Reply(body=prompt_logprobs(tiny_teacher, body))

    server.always = vllm(answer, max_model_len=lengths[3] + 1)
    result, cache = bench.run("fitting")
    assert cache.lengths.max() == lengths[3]
    assert result.counts["too_long"] == 7 - len(cache) > 0


def test_a_server_that_does_not_say_its_context_needs_max_length(
    bench: Bench, server: ScriptedServer, tiny_teacher: LoadedModel
) -> None:
    server.always = vllm(lambda body: Reply(body=prompt_logprobs(tiny_teacher, body)), max_model_len=None)
    with pytest.raises(ModelError, match=r"does not say how long a prompt may be(.|\n)*`max_length`"):
        bench.run()
    assert not [request for request in server.requests if "prompt" in request]
    _, cache = bench.run(max_length=2000)
    assert len(cache) == 7


def refusing(teacher: LoadedModel, token_ids: list[int]) -> Callable[[dict[str, Any]], Reply]:
    """A server of the tiny model that takes every row but one."""

    def answer(body: dict[str, Any]) -> Reply:
        if body["prompt"] == token_ids:
            return Reply(400, error("the prompt holds what may not be"))
        return Reply(body=prompt_logprobs(teacher, body))

    return vllm(answer)


def test_pitfall_20_a_row_that_the_server_refuses_is_a_row_of_its_own(
    bench: Bench, server: ScriptedServer, tiny_teacher: LoadedModel
) -> None:
    _, everything = bench.run("everything")
    number = int(everything.lengths.argmax())
    refused = everything.row(number)
    server.always = refusing(tiny_teacher, refused.token_ids)
    result, cache = bench.run("refused", max_failed_share=0.2)
    assert (result.counts["failed"], result.counts["distinct_rows"], len(cache)) == (1, 5, 6)
    assert [cache.row(one) for one in range(6)] == [everything.row(one) for one in range(7) if one != number]
    [failure] = map(json.loads, (bench.root / "refused" / FAILURES_FILE).read_text().splitlines())
    assert failure == {
        "row": f"record {refused.record_id}",
        "reason": "HTTP 400: the prompt holds what may not be",
        "status": 400,
    }
    assert "1 rows left out: " in bench.said.getvalue()


def test_above_the_share_a_capture_fails_and_the_next_one_asks_what_is_missing(
    bench: Bench, server: ScriptedServer, tiny_teacher: LoadedModel
) -> None:
    _, everything = bench.run("everything")
    refused = everything.row(int(everything.lengths.argmax()))
    healthy = server.always
    server.always = refusing(tiny_teacher, refused.token_ids)
    with pytest.raises(EngineError, match=r"1 of 6 requests failed: 1 x HTTP 400: the prompt holds"):
        bench.run("refused")
    server.always = healthy
    server.requests.clear()
    _, cache = bench.run("refused")
    assert [one["prompt"] for one in rows_scored(server)] == [refused.token_ids]
    assert [cache.row(one) for one in range(7)] == [everything.row(one) for one in range(7)]


@pytest.mark.parametrize("end", ["error", "stop"])
def test_answers_that_were_paid_for_stay_where_a_batch_ends_in_its_middle(
    bench: Bench, server: ScriptedServer, tiny_teacher: LoadedModel, end: str
) -> None:
    bench.model = bench.model.model_copy(update={"concurrency": 1})
    context, over = bench.context("ended"), threading.Event()
    healthy = server.always

    def answer(body: dict[str, Any]) -> Reply:
        if len(rows_scored(server)) > 3:
            if end == "error":
                return Reply(401, error("no more of this key"))
            context.stop.set()
            over.wait(30)
        return Reply(body=prompt_logprobs(tiny_teacher, body))

    server.always = vllm(answer)
    with pytest.raises(EngineError if end == "error" else Interrupted):
        run(_settings(), context)
    over.set()
    paid_for = [one["prompt"] for one in rows_scored(server)][:3]
    server.always = healthy
    server.requests.clear()
    _, cache = bench.run("ended")
    asked = [one["prompt"] for one in rows_scored(server)]
    assert len(asked) == 3
    assert not [prompt for prompt in asked if prompt in paid_for]
    assert len(cache) == 7
    signals = [cache.signal(number) for number in range(7)]
    _, whole = bench.run("whole")
    for number, signal in enumerate(signals):
        wanted = whole.signal(number)
        assert isinstance(signal, Sparse)
        assert isinstance(wanted, Sparse)
        assert torch.equal(signal.log_probs_NK, wanted.log_probs_NK)


def test_a_server_that_refuses_every_row_is_given_up_after_a_few(
    bench: Bench, server: ScriptedServer, tiny_teacher: LoadedModel
) -> None:
    bench.records = [replace(RECORDS[0], id=f"r{one}", response=f"{one} and {one}") for one in range(60)]

    def answer(body: dict[str, Any]) -> Reply:
        if body in rows_scored(server):
            return Reply(400, error("no"))
        return Reply(body=prompt_logprobs(tiny_teacher, body))

    server.always = vllm(answer)
    with pytest.raises(EngineError, match=r"\d+ requests in a row failed, the last with: HTTP 400: no"):
        bench.run(max_failed_share=1.0)


def written(teacher: TransformersModel, top_logprobs: int, **fields: Any) -> list[Record]:
    """Traces of the model with the alternatives to their tokens, some of them ended, some cut off."""
    loaded = load(teacher)
    renderer = Renderer(loaded.tokenizer)
    messages = [[{"role": "user", "content": f"Problem {number}"}] for number in range(12)]
    answers = generate_batch(
        loaded,
        renderer,
        [renderer.prompt_ids(one) for one in messages],
        max_new_tokens=100,
        temperature=1.3,
        seeds=list(range(12)),
        top_logprobs=top_logprobs,
    )
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    kept = ("prompt_token_ids", "response_token_ids", "logprobs", "alternatives", "tokenizer")
    records = [
        Record(
            prompt_id=str(number),
            messages=asked,
            response=answer.response,
            finish_reason=answer.finish_reason,
            model=loaded.identity,
            sampling={"logprob_temperature": 1.0, "template": renderer.template_hash, "temperature": 1.3},
            **{name: getattr(answer, name) for name in kept},
        )
        for number, (asked, answer) in enumerate(zip(messages, answers, strict=True))
        if answer.response_token_ids
    ]
    return [replace(record, **fields) for record in records]


class TestFromTraces:
    """What traces keep of their teacher is a cache without anything being asked."""

    def test_it_is_the_cache_that_the_teacher_gives_online(
        self, bench: Bench, forward_passes: list[int]
    ) -> None:
        assert isinstance(bench.model, TransformersModel)
        bench.records = written(bench.model, 8)
        _, online = bench.run("online")
        assert forward_passes
        forward_passes.clear()
        result, kept = bench.run("kept", from_traces=True)
        assert forward_passes == []
        assert result.counts["failed"] == 0
        assert (kept.tokenizer, kept.model, kept.codec) == (online.tokenizer, online.model, online.codec)
        assert len(kept) == len(online) == len(bench.records)
        for number in range(len(kept)):
            assert kept.row(number) == online.row(number)
            assert_same_signal(kept.signal(number), online.signal(number))

    def test_a_teacher_behind_an_api_is_not_asked_and_need_not_be_there(
        self, bench: Bench, tiny_model_folder: Path
    ) -> None:
        assert isinstance(bench.model, TransformersModel)
        bench.records = written(bench.model, 8, model="big at http://127.0.0.1:9/v1", prompt_token_ids=None)
        for record in bench.records:
            del record.sampling["template"]  # a server has its own
        bench.model = OpenAIModel(
            engine="openai", base_url="http://127.0.0.1:9/v1", model="big", tokenizer=str(tiny_model_folder)
        )
        result, cache = bench.run(from_traces=True, top_k=5)
        assert result.model_identity == "big at http://127.0.0.1:9/v1"
        assert len(cache) == len(bench.records)

    @pytest.mark.usefixtures("small_shards")
    def test_an_interrupted_one_ends_with_the_same_bytes(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert isinstance(bench.model, TransformersModel)
        bench.records = written(bench.model, 8)
        bench.run("whole", from_traces=True)
        append = ShardWriter.append

        def stops(self: ShardWriter, *arguments: Any, **options: Any) -> None:
            if len(list(self.folder.glob("shard-*"))) == 3:
                raise Interrupted
            append(self, *arguments, **options)

        monkeypatch.setattr(ShardWriter, "append", stops)
        with pytest.raises(Interrupted):
            bench.run("parts", from_traces=True)
        monkeypatch.setattr(ShardWriter, "append", append)
        bench.run("parts", from_traces=True)
        whole, parts = _bytes(bench.root / "whole"), _bytes(bench.root / "parts")
        assert whole == parts

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"alternatives": None}, "holds no alternatives to its tokens"),
            ({"model": "another"}, "holds those of another to its tokens"),
            ({"sampling": {"logprob_temperature": 0.7}}, "nobody states that its log-probabilities are at"),
            (
                {"tokenizer": None, "response_token_ids": None},
                "holds texts, or other ids than those that are learnt",
            ),
        ],
    )
    def test_a_trace_that_does_not_hold_them_is_a_failed_row(
        self, bench: Bench, changed: dict[str, Any], reason: str
    ) -> None:
        assert isinstance(bench.model, TransformersModel)
        records = written(bench.model, 8)
        bench.records = [replace(records[0], **changed), *records[1:]]
        with pytest.raises(EngineError, match=rf"1 of {len(records)} requests failed: 1 x .*{reason}"):
            bench.run("none", from_traces=True)
        result, cache = bench.run("some", from_traces=True, max_failed_share=0.1)
        assert (result.counts["failed"], len(cache)) == (1, len(records) - 1)

    def test_more_ids_than_were_kept_and_an_end_that_nobody_told_of_fail_by_row(self, bench: Bench) -> None:
        assert isinstance(bench.model, TransformersModel)
        records = written(bench.model, 4)
        bench.records = records
        with pytest.raises(EngineError, match=r"holds 4 ids in the place of a token, and top_k is 8"):
            bench.run("more", from_traces=True)
        bench.records = [
            replace(one, alternatives=Alternatives.of([*one.alternatives][:-1], as_ids=True))
            if one.alternatives is not None and one.finish_reason == "stop"
            else one
            for one in records
        ]
        ended = sum(one.finish_reason == "stop" for one in records)
        result, _ = bench.run("ended", from_traces=True, top_k=4, max_failed_share=0.9)
        assert result.counts["failed"] == ended
        failures = (bench.root / "ended" / FAILURES_FILE).read_text()
        assert failures.count("no alternatives in the place where its response ended") == ended

    def test_what_traces_do_not_hold_is_refused_at_once(self, bench: Bench) -> None:
        with pytest.raises(ModelError, match="the likeliest ids at temperature 1"):
            bench.run(from_traces=True, temperatures=[2.0])
        bench.model = OpenAIModel(engine="openai", base_url="http://127.0.0.1:9/v1", model="big")
        with pytest.raises(ModelError, match="no tokenizer of 'teacher' is known"):
            bench.run(from_traces=True)


def test_pitfall_24_a_server_whose_log_probabilities_depend_on_the_order_is_refused(
    bench: Bench, server: ScriptedServer, tiny_teacher: LoadedModel
) -> None:
    """A text that begins as one before it has other log-probabilities than when it came first."""
    seen: set[tuple[int, ...]] = set()

    def answer(body: dict[str, Any]) -> Reply:
        begun = tuple(body["prompt"][:16])
        found = prompt_logprobs(tiny_teacher, body)
        if begun in seen:
            for values in found["choices"][0]["prompt_logprobs"][1:]:
                for value in values.values():
                    value["logprob"] -= 0.1
        seen.add(begun)
        return Reply(body=found)

    server.always = vllm(answer)
    with pytest.raises(EngineError, match=r"scores a text differently once(.|\n)*--no-enable-prefix-caching"):
        bench.run()
    assert not rows_scored(server)


def test_a_model_without_logits_is_refused(bench: Bench) -> None:
    class Server(Settings):
        engine: str = "openai"

    bench.model = Server()
    with pytest.raises(ModelError, match="'teacher' gives no logits over the whole vocabulary"):
        bench.run()


def test_more_ids_than_the_vocabulary_has_are_refused(bench: Bench) -> None:
    with pytest.raises(DataError, match="top_k is 301, but the vocabulary has 300"):
        bench.run(top_k=301)


def test_temperature_one_is_always_declared_and_their_order_means_nothing() -> None:
    assert _settings(temperatures=[4, 2.0, 2.0]).temperatures == [1.0, 2.0, 4.0]
    assert meaning(_settings(temperatures=[2.0])) == meaning(_settings(temperatures=[1.0, 2.0]))
    assert meaning(_settings(batch_tokens=7)) == meaning(_settings())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature: float) -> None:
    with pytest.raises(ValidationError, match="temperatures"):
        _settings(temperatures=[temperature])


def test_a_sampled_cache_holds_draws_at_its_one_temperature(bench: Bench) -> None:
    result, cache = bench.run(codec="sampled", draws=20, temperatures=[2.0])
    signal = cache.signal(0, 2.0)
    assert isinstance(signal, Sampled)
    torch.testing.assert_close(signal.shares_NK.sum(-1), torch.ones(len(signal.shares_NK)))
    assert result.extra["codec"] == "sampled"
    assert (result.extra["draws"], result.extra["temperatures"]) == (20, [2.0])
    with pytest.raises(DataError, match="temperature 1 was not declared"):
        cache.signal(0, 1.0)


@pytest.mark.parametrize("first", [4, 2])
def test_draws_do_not_depend_on_the_batches(bench: Bench, first: int) -> None:
    _, whole = bench.run("whole", codec="sampled", batch_tokens=2000)
    bench.records = [RECORDS[5], *RECORDS[:first]]
    _, other = bench.run("other", codec="sampled", batch_tokens=64)
    found, wanted = other.signal(1), whole.signal(0)
    assert isinstance(found, Sampled)
    assert isinstance(wanted, Sampled)
    assert torch.equal(found.ids_NK, wanted.ids_NK)
    assert torch.equal(found.shares_NK, wanted.shares_NK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "sampled", "top_k": 8}, "top_k belongs to codec topk, and codec is sampled"),
        ({"codec": "topk", "draws": 20}, "draws belongs to codec sampled, and codec is topk"),
        ({"codec": "sampled", "temperatures": [1.0, 2.0]}, "codec sampled draws at one temperature"),
        ({"codec": "sampled", "temperatures": []}, "codec sampled draws at one temperature"),
    ],
)
def test_settings_of_another_codec_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _settings(**settings)


def test_the_settings_import_nothing_heavy() -> None:
    code = "import json, sys, potstill.cache; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "pyarrow", "numpy", "safetensors"} & set(json.loads(done.stdout))


def _hdf5_file(bench: Bench, name: str, **settings: Any) -> Path:
    _, cache = bench.run(f"exported-{name}", **settings)
    export_hdf5(cache, bench.root / name)
    return bench.root / name


def test_an_import_into_a_folder_with_anything_else_in_it_is_refused_and_harms_nothing(bench: Bench) -> None:
    path, folder = _hdf5_file(bench, "a.h5"), bench.root / "home"
    (folder / "scratch").mkdir(parents=True)
    (folder / "scratch" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(StoreError, match=r"home: holds scratch, which no import of a\.h5 made"):
        import_artifact(path, folder)
    assert [one.name for one in folder.rglob("*")] == ["scratch", "notes.txt"]


def test_an_import_into_a_cache_of_another_file_is_refused_and_leaves_it_sealed(bench: Bench) -> None:
    first, other = _hdf5_file(bench, "a.h5"), bench.root / "b.h5"
    # The same rows, model and codec: only the logits differ.
    shutil.copy(first, other)
    with h5py.File(other, "r+") as file:
        file["top_k_values"][:] = np.sort(file["top_k_values"][:] - 1)[:, ::-1]
    sealed = import_artifact(first, bench.root / "home")
    with pytest.raises(StoreError, match=r"home: holds the logits of another file than .*b\.h5"):
        import_artifact(other, bench.root / "home")
    found = Artifact.open(bench.root / "home")
    assert (found.manifest.fingerprint, found.damage()) == (sealed.manifest.fingerprint, None)


def test_a_cache_that_no_import_made_is_not_imported_into(bench: Bench) -> None:
    path = _hdf5_file(bench, "a.h5")
    shutil.rmtree(bench.root / "exported-a.h5" / "scratch")
    before = _bytes(bench.root / "exported-a.h5")
    with pytest.raises(StoreError, match="holds the logits of another file"):
        import_artifact(path, bench.root / "exported-a.h5")
    assert _bytes(bench.root / "exported-a.h5") == before


def _break_off_import(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("potstill.logits.hdf5.write_index", killed)
        with pytest.raises(KeyboardInterrupt):
            import_artifact(path, folder)


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_import_of_the_same_file_is_taken_up_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = _hdf5_file(bench, "a.h5"), bench.root / "home"
    whole = import_artifact(path, bench.root / "whole")
    _break_off_import(path, folder, monkeypatch)
    assert list(folder.glob("shard-*"))
    (folder / ".cache.json.4711.partial").write_text("{", encoding="utf-8")
    assert import_artifact(path, folder).manifest.files == whole.manifest.files


def test_an_import_that_fails_over_a_finished_one_leaves_no_manifest_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = _hdf5_file(bench, "a.h5"), bench.root / "home"
    whole = import_artifact(path, folder)
    _break_off_import(path, folder, monkeypatch)
    with pytest.raises(StoreError, match="not a finished artifact"):
        Artifact.open(folder)
    assert import_artifact(path, folder).manifest.content == whole.manifest.content


@pytest.mark.parametrize("codec", [{}, {"codec": "sampled", "draws": 5}], ids=["topk", "sampled"])
def test_copies_of_the_teacher_leave_the_same_bytes_as_one(
    bench: Bench, small_shards: None, codec: dict[str, Any]
) -> None:
    one, _ = bench.run("one", batch_tokens=70, **codec)
    copies = CopiesHere(2)
    two, _ = bench.run("two", copies=copies, batch_tokens=70, **codec)
    assert two == one
    assert len(list((bench.root / "one").glob("shard-*"))) > 1
    assert _bytes(bench.root / "two") == _bytes(bench.root / "one")
    assert all(copies.jobs)


@pytest.mark.parametrize("copies_first", [True, False])
def test_a_capture_that_one_teacher_began_is_taken_up_by_copies_and_the_other_way(
    bench: Bench, small_shards: None, monkeypatch: pytest.MonkeyPatch, copies_first: bool
) -> None:
    bench.run("whole", batch_tokens=70)
    context = bench.context("half")
    context.replicas = CopiesHere(2) if copies_first else None
    writer_class = shards.ShardWriter.func  # type: ignore[attr-defined]  # a partial, of small_shards
    appended = writer_class.append

    def stops(writer: Any, *row: Any, **options: Any) -> None:
        appended(writer, *row, **options)
        if list(context.folder.glob("shard-*")):
            context.stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(writer_class, "append", stops)
        with pytest.raises(Interrupted):
            run(_settings(batch_tokens=70), context)
    sealed = _bytes(bench.root / "half")
    assert [name for name in sealed if name.startswith("shard")] == ["shard-000-00000.safetensors"]
    copies = CopiesHere(2)
    bench.run("half", copies=None if copies_first else copies, batch_tokens=70)
    assert copies_first or 0 < sum(copies.jobs) < 7
    assert _bytes(bench.root / "half") == _bytes(bench.root / "whole")


def test_a_batch_over_which_copies_end_ends_the_step_and_what_is_sealed_is_kept(
    bench: Bench, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = bench.run("whole", batch_tokens=70)
    last = min(map(whole.row, range(len(whole))), key=lambda row: len(row.token_ids))  # the longest go first
    scores = ScoringReplica.work

    async def ends(copy: ScoringReplica, header: Any, batch: Any, pieces: int) -> Any:
        if any(row.token_ids == last.token_ids for row in batch):
            raise RequestError("a replica ended each of 3 times that it was asked this", blames_row=True)
        return await scores(copy, header, batch, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(ScoringReplica, "work", ends)
        with pytest.raises(RequestError, match="ended each of 3 times"):
            bench.run("half", copies=CopiesHere(2), batch_tokens=70, max_failed_share=0.5)
    assert list((bench.root / "half").glob("shard-*"))
    assert not (bench.root / "half" / FAILURES_FILE).exists()
    bench.run("half", copies=CopiesHere(2), batch_tokens=70)
    assert _bytes(bench.root / "half") == _bytes(bench.root / "whole")


def test_a_copy_that_runs_out_of_memory_tells_the_step_in_how_many_pieces_it_scored(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(model: Any, rows: list[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return hidden_of_rows(model, rows)

    monkeypatch.setattr("potstill.scoring.hidden_of_rows", scarce)
    _, cache = bench.run(copies=CopiesHere(2), batch_tokens=4096)
    assert len(cache) == len(RECORDS)
    assert "batches are scored in 4 pieces from here on" in bench.said.getvalue()
