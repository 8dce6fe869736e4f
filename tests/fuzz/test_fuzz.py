"""Whatever comes in from outside is either read right or refused by an error that is meant for a person.

`make fuzz` runs these for longer, led by coverage.
"""

import functools
import json
import math
import resource
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from potstill.core.errors import PotstillError

from ..conftest import CHATML_TEMPLATE, _train_tokenizer
from .inputs import JSON, json_bytes, mutated_bytes, mutated_json, texts

bounded = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@functools.cache
def workplace(name: str) -> Path:
    """A folder that one target has for itself."""
    return Path(tempfile.mkdtemp(prefix=f"potstill-fuzz-{name}-"))


@pytest.fixture(scope="module", autouse=True)
def _no_folder_stays() -> Any:
    yield
    for name in ("recipe", "data", "shards", "hdf5", "adapter", "run"):
        shutil.rmtree(workplace(name), ignore_errors=True)
    workplace.cache_clear()


def refused(function: Callable[[], Any]) -> Any:
    """What a function gives, or None where it refuses with an error that a person can read."""
    with suppress(PotstillError):
        return function()
    return None


RECIPE = {
    "name": "fuzz",
    "seed": 3,
    "models": {
        "teacher": {"path": "smollm2-135m-instruct"},
        "s": {"engine": "openai", "base_url": "http://h/v1", "model": "m"},
    },
    "steps": {
        "traces": {
            "do": "generate",
            "model": "s",
            "data": [{"task": "chain_sum", "size": 4}],
            "each": {"x": ["a", "b"]},
        },
        "logits": {"do": "cache", "model": "teacher", "data": "traces", "top_k": 8},
        "student": {
            "do": "train",
            "student": "teacher",
            "data": "logits",
            "lora": {"rank": 2},
            "stages": [{"name": "all"}],
        },
        "exam": {"do": "evaluate", "models": {"a": "student"}, "data": "traces:held_out"},
    },
    "outputs": {"final": "student"},
    "variants": {"v": {"seed": 4}},
    "scale": {"engine": "torchrun"},
}


@bounded
@given(
    mutated_bytes(
        yaml.safe_dump(RECIPE).encode(), b"a: &a [*a]\n", b"a: {<<: [1]}\n? [x]\n: y\n", b"\xff\xfe"
    )
)
def test_a_recipe_file_of_any_bytes(data: bytes) -> None:
    from potstill.recipe import load_recipe

    path = workplace("recipe") / "recipe.yaml"
    path.write_bytes(data)
    refused(lambda: load_recipe(str(path)))


@bounded
@given(
    mutated_json(RECIPE),
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "seed",
                    "steps.traces.data.0",
                    "traces.temperature",
                    "models.s",
                    "student.stages.all.lr",
                    "a.b",
                ]
            ),
            texts,
        ),
        max_size=2,
    ),
)
def test_a_recipe_of_any_values_and_overrides(recipe: Any, overrides: list[tuple[str, str]]) -> None:
    from potstill.recipe import load_recipe

    path = workplace("recipe") / "recipe.yaml"
    path.write_bytes(json_bytes(recipe))  # JSON is YAML
    loaded = refused(lambda: load_recipe(str(path), [f"{key}={value}" for key, value in overrides]))
    if loaded is not None:
        path.write_text(loaded.to_yaml(), encoding="utf-8")
        assert load_recipe(str(path)).to_yaml() == loaded.to_yaml()


ROWS: list[dict[str, Any]] = [
    {"question": "What is 1 + 1?", "answer": "2", "subject": "math"},
    {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhi"},
        ]
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"question": "q", "choices": ["x", "y"], "answer": 1},
    {"instruction": "i", "input": "x", "output": "o"},
    {"prompt": "p", "response": "r", "reasoning_content": "t"},
    {"text": "plain"},
]


def _read(suffix: str, data: bytes) -> None:
    from potstill.core.records import RECORDS_FILE, read_records, write_records
    from potstill.core.settings import InputPath
    from potstill.data.sources import FileSource, _outside_a_run, read

    folder = workplace("data")
    path = folder / f"rows{suffix}"
    path.write_bytes(data)
    source = FileSource(path=InputPath(path))
    records = refused(lambda: list(read(source, _outside_a_run(0))))
    if records is not None:
        write_records(folder / RECORDS_FILE, records)
        assert [json_bytes_of(one) for one in read_records(folder / RECORDS_FILE)] == [
            *map(json_bytes_of, records)
        ]


def json_bytes_of(record: Any) -> bytes:
    from dataclasses import asdict

    return json.dumps(asdict(record), sort_keys=True).encode()


@bounded
@given(st.lists(st.sampled_from(ROWS).flatmap(mutated_json) | JSON, max_size=4), st.data())
def test_a_jsonl_file_of_any_rows(rows: list[Any], data: st.DataObject) -> None:
    _read(".jsonl", data.draw(mutated_bytes(b"\n".join(map(json_bytes, rows)))))


@bounded
@given(st.sampled_from(ROWS).flatmap(mutated_json) | JSON, st.data())
def test_a_json_file_of_any_value(rows: Any, data: st.DataObject) -> None:
    _read(".json", data.draw(mutated_bytes(json_bytes(rows))))


@bounded
@given(
    mutated_bytes(
        b'question,answer\n"a, ""b""",2\nc,"d\ne"\n', b"\xef\xbb\xbfprompt,response,\n,,\n", b"text\n\x00\n"
    )
)
def test_a_csv_file_of_any_bytes(data: bytes) -> None:
    _read(".csv", data)


@bounded
@given(mutated_bytes("a paragraph\n\nanother \u2028 one\n".encode(), b"\xff\n\n"))
def test_a_text_file_of_any_bytes(data: bytes) -> None:
    _read(".txt", data)


@functools.cache
def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = workplace("data") / "seed.parquet"
    columns = {
        "prompt": ["a" * 9, "b"],
        "response": ["c", None],
        "n": [1, 2],
        "l": [[1.0], []],
        "b": [b"\xff", b""],
    }
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


@bounded
@given(st.data())
def test_a_parquet_file_of_any_bytes(data: st.DataObject) -> None:
    _read(".parquet", data.draw(mutated_bytes(_parquet())))


@functools.cache
def _renderer(template: str = CHATML_TEMPLATE) -> Any:
    from potstill.data.chat import Renderer

    return Renderer(_train_tokenizer(template))


_messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", ""]), "content": texts}
    ),
    max_size=4,
)


@bounded
@given(_messages, texts, st.sampled_from(["stop", "length", None]), st.integers(0, 6))
def test_a_conversation_of_any_texts(
    messages: Any, response: str, finish_reason: str | None, prefix: int
) -> None:
    from potstill.core.records import Record
    from potstill.data.chat import split_reasoning

    reasoning, answer = split_reasoning(response)
    record = Record(
        "p",
        messages,
        "id",
        response=response,
        reasoning=reasoning,
        answer=answer,
        finish_reason=finish_reason,
        prefix_characters=min(prefix, len(response)),
    )
    renderer = _renderer()
    rendered = refused(lambda: renderer.render(record, mask_prefix=bool(prefix)))
    if rendered is None:
        return
    assert len(rendered.ids) == len(rendered.mask)
    assert rendered.mask[0] == 0 < sum(rendered.mask)
    ends = renderer.end_of_turn_ids
    if finish_reason != "length" and messages:
        assert rendered.ids[-len(ends) :] == ends


@bounded
@given(
    st.lists(
        texts | st.sampled_from(["A. ", "e.g. ", "$$x$$", "```\n", "\\[", "1. ", "… ", "。", " \n\n"]),
        max_size=12,
    ).map("".join)
)
def test_sentences_of_any_text_cover_it_in_order(text: str) -> None:
    from potstill.data.responses import without_half_characters
    from potstill.select.sentences import sentences

    text = without_half_characters(text)
    spans = sentences(text)
    data, before = text.encode(), 0
    for start, end in spans:
        assert before <= start < end <= len(data)
        assert not data[before:start].decode().strip(), "nothing but white space stands between sentences"
        data[start:end].decode()
        before = end
    assert not data[before:].decode().strip()


@functools.cache
def _cache() -> tuple[dict[str, bytes], list[tuple[Any, ...]]]:
    """The files of a small cache, and what is read from it."""
    import torch

    from potstill.logits.codecs import TopK
    from potstill.logits.shards import CachedRow, ShardWriter, write_index

    folder = workplace("shards") / "seed"
    codec = TopK(4, 40, (1.0, 2.0))
    rows = [CachedRow([n, 5, n + 1, 7], [0, 0, 1, 1], n == 2, f"r{n}") for n in range(6)]
    folder.mkdir()
    writer = ShardWriter(folder, codec, tokenizer="tok", model="m", shard_tokens=6)
    for number, row in enumerate(rows):
        logits_NV = torch.randn(2, 40, generator=torch.Generator().manual_seed(number))
        writer.append(row, codec.encoder([row.key], [2])(logits_NV, slice(0, 2)))
    writer.seal()
    write_index(folder, rows)
    return {path.name: path.read_bytes() for path in folder.iterdir()}, _read_cache(folder)


def _read_cache(folder: Path) -> list[tuple[Any, ...]]:
    from potstill.logits.logit_cache import LogitCache

    cache = LogitCache.open(folder)
    cache.verify()
    found = []
    for number in range(len(cache)):
        row, signal = cache.row(number), cache.signal(number, 2.0)
        values = (signal.ids_NK, signal.log_probs_NK, signal.log_tail_N)
        found.append(
            (
                list(row.token_ids),
                list(row.mask),
                row.held_out,
                row.record_id,
                [one.tolist() for one in values],
            )
        )
    return found


@bounded
@given(st.data())
def test_a_cache_with_a_file_of_any_bytes(data: st.DataObject) -> None:
    files, whole = _cache()
    name = data.draw(st.sampled_from(sorted(files)))
    folder = workplace("shards") / "read"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for other, content in files.items():
        (folder / other).write_bytes(data.draw(mutated_bytes(content)) if other == name else content)
    found = refused(lambda: _read_cache(folder))
    if found is not None and name != "cache.json":  # which, like a manifest, is taken without a checksum
        assert found == whole


@functools.cache
def _hdf5() -> bytes:
    pytest.importorskip("h5py")
    from potstill.logits.hdf5 import export_hdf5
    from potstill.logits.logit_cache import LogitCache

    _cache()
    path = workplace("hdf5") / "seed.h5"
    export_hdf5(LogitCache.open(workplace("shards") / "seed"), path)
    return path.read_bytes()


@bounded
@given(st.data())
def test_an_hdf5_file_of_any_bytes(data: st.DataObject) -> None:
    from potstill.logits.hdf5 import import_hdf5

    path, folder = workplace("hdf5") / "given.h5", workplace("hdf5") / "cache"
    path.write_bytes(data.draw(mutated_bytes(_hdf5())))
    shutil.rmtree(folder, ignore_errors=True)
    refused(lambda: import_hdf5(path, folder))


_arrays = st.sampled_from(
    ["absent", "empty", "scalar", "strings", "floats", "negative", "huge", "nan", "two", "group", "compound"]
)


@bounded
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "top_k_ids",
                "top_k_values",
                "log_tail",
                "logsumexp",
                "lengths",
                "token_ids",
                "token_lengths",
                "loss_mask",
                "held_out",
                "record_ids",
            ]
        ),
        _arrays,
        max_size=2,
    ),
    st.dictionaries(
        st.sampled_from(["k", "vocab_size", "model", "tokenizer", "temperatures", "values"]),
        st.none()
        | st.integers(-(2**40), 2**40)
        | st.floats()
        | st.text(alphabet="a1.", max_size=3)
        | st.lists(st.floats(), max_size=3),
        max_size=2,
    ),
)
def test_an_hdf5_file_of_any_content(arrays: dict[str, str], attributes: dict[str, Any]) -> None:
    h5py = pytest.importorskip("h5py")
    import numpy as np

    from potstill.logits.hdf5 import import_hdf5

    path, folder = workplace("hdf5") / "given.h5", workplace("hdf5") / "cache"
    path.write_bytes(_hdf5())
    with h5py.File(path, "r+") as file:
        for name, kind in arrays.items():
            shape = file[name].shape
            del file[name]
            made: dict[str, Any] = {
                "empty": np.zeros(0),
                "scalar": 3,
                "strings": ["x"] * (shape[0] or 1),
                "floats": np.full(shape, 0.5),
                "negative": np.full(shape, -(2**31), dtype=np.int64),
                "huge": np.full(shape, 2**62, dtype=np.int64),
                "nan": np.full(shape, math.nan),
                "two": np.zeros((*shape, 2)),
                "compound": np.zeros(shape, dtype=[("a", "i4"), ("b", "f4")]),
            }
            if kind == "group":
                file.create_group(name)
            elif kind != "absent":
                file[name] = made[kind]
        for name, value in attributes.items():
            del file.attrs[name]
            if value is not None:
                file.attrs[name] = value
    shutil.rmtree(folder, ignore_errors=True)
    refused(lambda: import_hdf5(path, folder))


ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "smollm2-135m-instruct",
    "r": 2,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
    "auto_mapping": None,
}


@bounded
@given(mutated_json(ADAPTER).map(json_bytes) | mutated_bytes(json.dumps(ADAPTER).encode()))
def test_an_adapters_configuration_of_any_bytes(data: bytes) -> None:
    from potstill.models import TransformersModel
    from potstill.models.source import (
        adapter_base,
        identity,
        is_encoder_decoder,
        parameter_count,
    )

    folder = workplace("adapter")
    (folder / "adapter_config.json").write_bytes(data)
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    settings_ = TransformersModel(path=str(folder))
    for ask in (
        lambda: adapter_base(folder),
        lambda: identity(settings_),
        lambda: is_encoder_decoder(folder),
        lambda: parameter_count(settings_),
    ):
        refused(ask)


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "torch_dtype": "float32",
    "text_config": {"dtype": "float16"},
    "quantization_config": {"load_in_4bit": True},
}


@bounded
@given(
    mutated_json(CONFIG).map(json_bytes),
    mutated_bytes(
        b'\x3c\x00\x00\x00\x00\x00\x00\x00{"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}    '
        b"12345678"
    ),
)
def test_a_models_configuration_and_weights_of_any_bytes(config: bytes, weights: bytes) -> None:
    from potstill.models import TransformersModel
    from potstill.models.source import (
        identity,
        parameter_count,
        stored_dtype,
        stored_quantization,
        stored_vocabulary_size,
    )

    folder = workplace("adapter") / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(weights)
    settings_ = TransformersModel(path=str(folder))
    for ask in (identity, parameter_count, stored_dtype, stored_quantization, stored_vocabulary_size):
        refused(lambda ask=ask: ask(settings_))


ANSWER: dict[str, Any] = {
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "hi you", "reasoning_content": "hm"},
            "token_ids": [4, 5],
            "prompt_logprobs": [None, {"5": {"logprob": -0.1}, "6": {"logprob": -9999.0}}],
            "logprobs": {
                "content": [
                    {"token": "hi", "bytes": [104, 105], "logprob": -0.1, "id": 4},
                    {"token": " you", "logprob": -0.2},
                ]
            },
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    "prompt_token_ids": [1, 2],
}


@functools.cache
def _server() -> tuple[Any, Any]:
    from pydantic import SecretStr

    from potstill.teachers.completions import Completions
    from potstill.teachers.server_errors import ServerErrors

    errors = ServerErrors("http://h/v1", "m", "KEY", SecretStr("sk-canary"))
    return Completions(errors, {}, _renderer()), errors


def _response(status: int, headers: dict[str, str], body: bytes) -> Any:
    import httpx2

    request = httpx2.Request("POST", "http://h/v1/chat/completions")
    return httpx2.Response(status, headers=headers, content=body, request=request)


@bounded
@given(mutated_json(ANSWER), st.none() | st.just(1), st.none() | st.sampled_from(["", "<think>\nh", "hi"]))
def test_an_answer_of_a_server_of_any_values(found: Any, logprobs: int | None, prefix: str | None) -> None:
    from potstill.teachers.completions import mapping
    from potstill.teachers.protocol import Request

    completions, _ = _server()
    response = _response(200, {}, json_bytes(found))
    request = Request([{"role": "user", "content": "q"}], logprobs=logprobs, prefix=prefix)
    answer = refused(lambda: completions.answer(response, mapping(found), request))
    if answer is not None:
        answer.response.encode()
        assert answer.finish_reason in ("stop", "length")
        if logprobs:
            assert answer.logprobs is not None
        if answer.logprobs is not None and answer.response_token_ids is not None:
            assert len(answer.logprobs) == len(answer.response_token_ids)
        if answer.token_bytes is not None:
            assert sum(answer.token_bytes) == len(answer.response.encode())
    refused(lambda: completions.prompt_logprobs(response, mapping(found), [5, 5], 2))


@bounded
@given(
    st.integers(100, 599),
    st.dictionaries(
        st.sampled_from(["retry-after", "content-type", "location"]),
        st.sampled_from(
            [
                "-1",
                "nan",
                "inf",
                "1e400",
                "Wed, 21 Oct 2015 07:28:00 GMT",
                "Wed, 21 Oct 2015 07:28:00 -0000",
                "Wed, 21 Oct 99999 07:28:00 GMT",
                "text/html; charset=utf-7",
                "x",
            ]
        ),
    ),
    mutated_json({"error": {"message": "no sk-canary", "code": 3}}).map(json_bytes) | st.binary(max_size=40),
)
def test_a_refusal_of_a_server_of_any_bytes(status: int, headers: dict[str, str], body: bytes) -> None:
    from potstill.teachers.server_errors import MayPass

    _, errors = _server()
    refusal = errors.refusal(_response(status, headers, body))
    error = refusal.error if isinstance(refusal, MayPass) else refusal
    assert isinstance(error, PotstillError)
    assert "sk-canary" not in str(error)
    str(error).encode()


def _events() -> list[dict[str, Any]]:
    return [
        {
            "time": 1.0,
            "event": "run_started",
            "recipe": "r",
            "seed": 1,
            "steps": [
                {"name": "student", "kind": "train", "needs": ["logits"]},
                {"name": "logits", "kind": "cache", "needs": []},
            ],
        },
        {"time": 2.0, "event": "step_started", "step": "student", "kind": "train", "fingerprint": "f"},
        {
            "time": 3.0,
            "event": "train_log",
            "step": "student",
            "optimiser_step": 1,
            "loss": 2.0,
            "grad_norm": 1.0,
        },
        {"time": 4.0, "event": "step_failed", "step": "student", "error": "<script>alert(1)</script>"},
        {"time": 5.0, "event": "run_failed"},
    ]


@bounded
@given(mutated_json(_events()), st.data())
def test_a_report_of_any_events(events: Any, data: st.DataObject) -> None:
    from potstill.pipeline.run_folder import load_run
    from potstill.report import terminal_table, write_report

    folder = workplace("run")
    (folder / "recipe.yaml").write_text("name: r\n", encoding="utf-8")
    lines = b"\n".join(map(json_bytes, events if isinstance(events, list) else [events]))
    (folder / "events.jsonl").write_bytes(data.draw(mutated_bytes(lines)))
    view = refused(lambda: load_run(folder))
    if view is not None:
        refused(lambda: write_report(view, folder / "report.html"))
        refused(lambda: terminal_table(view))
        page = (folder / "report.html").read_bytes()
        assert b"<script" not in page


MANIFEST: dict[str, Any] = {
    "kind": "generate",
    "fingerprint": "f" * 64,
    "content": "c" * 64,
    "settings": {"do": "generate", "model": "m"},
    "seed": 1,
    "counts": {"records": 3},
    "metrics": {"mean_response_tokens": 3.5},
    "extra": {"views": ["epoch1"], "base": {"path": "x/y"}},
    "files": {
        "records.parquet": {"sha256": "0" * 64, "size_bytes": 3},
        "epoch1/m": {"sha256": "0" * 64, "size_bytes": 1},
    },
    "versions": {"python": "3"},
    "seconds": 1.0,
}


@bounded
@given(mutated_json(MANIFEST).map(json_bytes) | mutated_bytes(json.dumps(MANIFEST).encode()))
def test_a_manifest_of_any_bytes_names_no_file_out_of_its_folder(data: bytes) -> None:
    from potstill.core.store import Artifact

    folder = workplace("run") / "artifact"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    artifact = refused(lambda: Artifact.open(folder))
    if artifact is not None:
        artifact.damage()
        for name in (*artifact.manifest.files, *artifact.views):
            assert (folder / name).resolve().is_relative_to(folder.resolve())


@bounded
@given(mutated_bytes(b'{"kept": [1, 2.5, "\xc3\xa4"], "checksum": "?"}'), JSON)
def test_what_is_kept_as_checked_json_comes_back_or_is_refused(data: bytes, value: Any) -> None:
    from potstill.core.checked_json import DamagedJsonError, checked_json, read_checked_json

    text = checked_json({"kept": value}).encode("utf-8", "surrogatepass")
    try:
        again = read_checked_json(text)
    except DamagedJsonError:
        assert "\\ud" in ascii(value), "only half a character has no place in UTF-8"
    else:
        assert json.dumps(again["kept"]) == json.dumps(json.loads(json.dumps(value)))
    with suppress(DamagedJsonError):
        read_checked_json(data)


def test_the_fuzzed_readers_have_stayed_small() -> None:
    """No input made the process large: all of the above together stay below this."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB
