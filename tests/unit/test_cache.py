"""The cache step on a tiny random model: what it keeps is what the teacher says, whatever interrupts it."""

import functools
import hashlib
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from potstill.cache import CacheSettings, run
from potstill.core.errors import DataError, Interrupted, ModelError
from potstill.core.events import Reporter
from potstill.core.records import RECORDS_FILE, Record, write_records
from potstill.core.settings import Settings, meaning
from potstill.core.step import StepContext, StepResult
from potstill.core.store import Artifact, Store
from potstill.data.batches import collate
from potstill.data.chat import Renderer
from potstill.logits import shards
from potstill.logits.shards import LogitCache
from potstill.models import TransformersModel, hidden_states, load, load_tokenizer, tokenizer_hash

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
            resolve_model=lambda reference: self.model,
            resolve_data=lambda reference: [(self._traces(), None)],
        )

    def _traces(self) -> Artifact:
        folder = self.store.prepare("generate", "f" * 24)
        write_records(folder / RECORDS_FILE, self.records)
        return self.store.seal(
            folder, kind="generate", fingerprint="f" * 24, settings={}, seed=1, seconds=0.0
        )

    def run(self, name: str = "cache", **settings: Any) -> tuple[StepResult, LogitCache]:
        context = self.context(name)
        result = run(_settings(**settings), context)
        return result, LogitCache.open(context.folder)


def _settings(**settings: Any) -> CacheSettings:
    return CacheSettings.model_validate(
        {"do": "cache", "model": "teacher", "data": "traces", "top_k": 8, **settings}
    )


def _bytes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def bench(tmp_path: Path, tiny_model_folder: Path) -> Bench:
    return Bench(tmp_path, tiny_model_folder)


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each forward pass of the step, as they happen."""
    passes: list[int] = []

    def counted(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        passes.append(len(ids_BT))
        return hidden_states(model, ids_BT, mask_BT)

    monkeypatch.setattr("potstill.cache.hidden_states", counted)
    return passes


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ShardWriter", functools.partial(shards.ShardWriter, shard_tokens=17))


def test_the_cached_signal_is_the_teachers_softmax_within_fp16_rounding(
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
            largest = logits_TV[predicted].log_softmax(-1).topk(8, -1).values.abs().max().item()
            assert torch.equal(signal.ids_NK, ids_NK)
            torch.testing.assert_close(
                signal.log_probs_NK.double(), wanted_NK, rtol=0, atol=largest * 2**-10 / temperature
            )
    assert result.extra == {
        "codec": "topk",
        "codec_version": 1,
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


@pytest.mark.parametrize("passes_before", [2, 5])
@pytest.mark.usefixtures("small_shards")
def test_pitfall_15_an_interrupted_capture_ends_with_the_same_bytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, forward_passes: list[int], passes_before: int
) -> None:
    bench.records = [
        Record(f"p{number}", [{"role": "user", "content": "1" * (number % 7)}], response=f"{number} apples")
        for number in range(16)
    ]
    whole_result, _ = bench.run("whole", batch_tokens=70)
    whole_passes = [*forward_passes]
    forward_passes.clear()

    context = bench.context("interrupted")

    def stops(*arguments: Any, **options: Any) -> Any:
        if len(forward_passes) == passes_before - 1:
            context.stop.set()
        return collate(*arguments, **options)

    monkeypatch.setattr("potstill.cache.collate", stops)
    with pytest.raises(Interrupted):
        run(_settings(batch_tokens=70), context)
    assert len(forward_passes) == passes_before
    sealed = sum(len(shards._open(path).get_tensor("keys")) for path in context.folder.glob("shard-*"))
    assert 0 < sealed < 16
    assert sealed not in itertools.accumulate(whole_passes), "no shard ends inside a batch"
    assert not (context.folder / "index.safetensors").exists()

    monkeypatch.setattr("potstill.cache.collate", collate)
    forward_passes.clear()
    result, _ = bench.run("interrupted", batch_tokens=70)
    assert 0 < len(forward_passes) < len(whole_passes), "nothing was taken over from the first attempt"
    assert result == whole_result
    assert _bytes(bench.root / "interrupted") == _bytes(bench.root / "whole")


def test_a_finished_capture_is_not_scored_again(bench: Bench, forward_passes: list[int]) -> None:
    bench.run()
    forward_passes.clear()
    bench.run()
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


def test_the_settings_import_nothing_heavy() -> None:
    code = "import json, sys, potstill.cache; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "pyarrow", "numpy", "safetensors"} & set(json.loads(done.stdout))
