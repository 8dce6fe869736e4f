"""The select step on tiny models: what stays, what goes and why, and what is said of it."""

import json
import math
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from potstill import scoring
from potstill.core.alternatives import Alternatives
from potstill.core.errors import DataError, Interrupted, ModelError
from potstill.core.records import RECORDS_FILE, Record, read_records
from potstill.core.settings import Settings
from potstill.data.chat import Rendered, Renderer
from potstill.models import TransformersModel, load, load_tokenizer
from potstill.scoring import token_logprobs
from potstill.select.scores import sentence_class
from potstill.select.sentences import sentences, tokens_of_spans
from potstill.teachers import OpenAIModel, SolverModel

from ...copies import CopiesHere
from .conftest import Bench, naive_probability, written_by


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each batch that the step scores."""
    passes: list[int] = []
    hidden: Callable[..., Any] = scoring.hidden_of_rows

    def counted(model: Any, rows: list[Rendered], **options: Any) -> Any:
        passes.append(len(rows))
        return hidden(model, rows, **options)

    monkeypatch.setattr(scoring, "hidden_of_rows", counted)
    return passes


def _dropped(bench: Bench) -> list[dict[str, Any]]:
    text = (bench.context.folder / "dropped.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _ids(records: list[Record]) -> list[str]:
    return [record.id for record in records]


def test_a_student_that_takes_the_plain_template_is_told_once(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "student" / "chat_template.jinja").unlink()
    bench.run(rule="divergence", level="response")
    assert bench.said.count("takes the one called plain") == 1


def test_scores_are_the_two_models_probabilities_of_the_response(
    bench: Bench, records: list[Record], forward_passes: list[int]
) -> None:
    kept = bench.run(keep={"top": 1.0}, max_tokens=150)
    assert max(forward_passes) > 1, "no rows were scored together"
    assert len(forward_passes) > 1
    assert _ids(kept) == _ids(records), "the order of the data is kept"
    for record in kept:
        if record.held_out:
            assert record.scores == {}
            continue
        teacher, student = (naive_probability(bench, role, record) for role in ("teacher", "student"))
        assert record.scores["teacher_probability"] == pytest.approx(teacher, rel=1e-4)
        assert record.scores["student_probability"] == pytest.approx(student, rel=1e-4)
        assert record.scores["divergence"] == pytest.approx(teacher - student, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("level", ["response", "sentence"])
def test_each_prompt_and_each_row_is_tokenised_once_for_a_model(
    bench: Bench, records: list[Record], monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    encoded: Counter[str] = Counter()
    encode = Renderer._encode

    def counted(renderer: Renderer, text: str) -> list[int]:
        encoded[text] += 1
        return encode(renderer, text)

    sizes = [[len((one.response or "").encode())] for one in records]
    texts = [
        replace(one, response_token_ids=None, tokenizer=None, logprobs=[-1.0], token_bytes=size)
        for one, size in zip(records, sizes, strict=True)
    ]
    bench.give(texts)
    monkeypatch.setattr(Renderer, "_encode", counted)
    bench.run(level=level)
    asked = {text: times for text, times in encoded.items() if "Question" in text}
    assert len(asked) == 6 + 18, "of 6 prompts that are not held out, and of 18 rows"
    assert set(asked.values()) == {1}


def test_the_share_with_the_largest_divergence_stays_and_all_held_out_rows(bench: Bench) -> None:
    everything = {record.id: record for record in bench.run("everything", keep={"top": 1.0})}
    kept = bench.run(keep={"top": 0.5})
    held_out = [record.id for record in everything.values() if record.held_out]
    assert len(held_out) == 6
    ranked = sorted(
        (record for record in everything.values() if not record.held_out),
        key=lambda record: -record.scores["divergence"],
    )
    assert {*_ids(kept)} == {*held_out, *_ids(ranked[:9])}
    counts = {"records": 15, "held_out": 6, "rows": 24, "dropped_by_rule": 9}
    assert bench.result.counts == counts
    dropped = _dropped(bench)
    assert [one["row"] for one in dropped] == sorted(int(one.id[1:]) + 1 for one in ranked[9:])
    lowest = ranked[8].scores["divergence"]
    for one in dropped:
        assert one["by"] == "rule"
        assert one["reason"] == f"below {lowest:.4g}, the lowest score that is kept"
        assert one["scores"] == everything[one["id"]].scores


def test_every_arm_is_reported_beside_what_is_kept(bench: Bench) -> None:
    bench.run(keep={"top": 0.5})
    metrics = json.loads(json.dumps(bench.result.metrics, allow_nan=False))
    assert metrics["kept_by"] == "rule"
    assert {name: arm["rows"] for name, arm in metrics["arms"].items()} == {
        "all": 18,
        "rule": 9,
        "random": 9,
        "length": 9,
    }
    rule, everything = metrics["arms"]["rule"], metrics["arms"]["all"]
    assert rule["mean_divergence"] > everything["mean_divergence"]
    assert metrics["divergence"]["mean"] == pytest.approx(everything["mean_divergence"])
    gap = everything["mean_teacher_probability"] - everything["mean_student_probability"]
    assert everything["mean_divergence"] == pytest.approx(gap)
    assert metrics["divergence"]["low"] < metrics["effective_threshold"] < metrics["divergence"]["high"]
    bars = metrics["histogram"]
    assert (sum(bars["kept"]), sum(bars["dropped"])) == (9, 9)
    assert len(bars["edges"]) == len(bars["kept"]) + 1
    cut = metrics["effective_threshold"]
    for low, kept in zip(bars["edges"][1:], bars["kept"], strict=True):
        assert not kept or low >= cut


@pytest.mark.parametrize("control", ["random", "length"])
def test_a_control_keeps_other_rows_by_its_seed_and_as_many(bench: Bench, control: str) -> None:
    rule = bench.run("rule", keep={"top": 0.5})
    first = bench.run("first", control=control)
    assert bench.result.metrics["kept_by"] == control
    assert bench.result.counts[f"dropped_by_{control}"] == 9
    assert {one["reason"] for one in _dropped(bench)} == {f"not drawn by the control ({control})"}
    assert _ids(bench.run("again", control=control)) == _ids(first)
    assert _ids(bench.run("other", control=control, seed=2)) != _ids(first)
    assert len(first) == len(rule)
    assert _ids(first) != _ids(rule)
    assert [one.id for one in first if one.held_out] == [one.id for one in rule if one.held_out]


def test_the_same_rows_stay_whatever_their_order(bench: Bench, records: list[Record]) -> None:
    first = bench.run("first", keep={"top": 0.4})
    controls = {name: _ids(bench.run(name, control=name)) for name in ("random", "length")}
    shuffled = random.Random(3).sample(records, len(records))
    bench.give(shuffled)
    assert sorted(_ids(bench.run("shuffled", keep={"top": 0.4}))) == sorted(_ids(first))
    for name, ids in controls.items():
        assert sorted(_ids(bench.run(f"shuffled-{name}", control=name))) == sorted(ids)


def test_a_row_is_scored_once_by_a_model(bench: Bench, forward_passes: list[int]) -> None:
    first = bench.run("first", max_tokens=150)
    assert forward_passes
    forward_passes.clear()
    again = bench.run("again", keep={"per_prompt": 1}, max_tokens=400)
    assert forward_passes == [], "known scores were computed again"
    scores = {record.id: record.scores for record in first}
    assert all(record.scores == scores[record.id] for record in again if record.id in scores)
    assert len(again) == 6 + 6


def test_a_prompt_is_run_once_for_all_its_candidates(
    bench: Bench, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    for record in records:
        record.messages = [{"role": "system", "content": "Count the apples with care."}, *record.messages]
    bench.give(records)
    passes: list[tuple[int, int]] = []
    plain = LlamaModel.forward

    def watched(module: Any, *given: Any, **options: Any) -> Any:
        passes.append(tuple(options["input_ids"].shape))
        return plain(module, *given, **options)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    kept = bench.run(keep={"top": 1.0}, max_tokens=200)
    renderer = Renderer(load_tokenizer(bench.models["student"]))
    rows = [renderer.render(record) for record in records if not record.held_out]
    prompts = {tuple(row.ids[: -row.supervised_tokens]) for row in rows}
    shared = next(at for at, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    assert passes.count((1, shared)) == 1, "what all rows begin with was not run once"
    assert sum(one * tokens for one, tokens in passes) < 0.7 * sum(len(row.ids) for row in rows)
    assert len(kept) == 24
    for record in kept[:3]:
        assert record.scores["student_probability"] == pytest.approx(
            naive_probability(bench, "student", record), rel=1e-4
        )


def test_an_interrupted_step_goes_on_and_leaves_the_same(
    bench: Bench, forward_passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run("whole", max_tokens=100)
    whole, passes = bench.context.folder, len(forward_passes)
    (bench.folder / "store" / "scores").rename(bench.folder / "away")
    forward_passes.clear()
    hidden: Callable[..., Any] = scoring.hidden_of_rows

    def stops(model: Any, rows: list[Rendered], **options: Any) -> Any:
        if len(forward_passes) == 2:
            bench.context.stop.set()
        return hidden(model, rows, **options)

    monkeypatch.setattr(scoring, "hidden_of_rows", stops)
    with pytest.raises(Interrupted):
        bench.run("interrupted", max_tokens=100)
    assert len(forward_passes) == 3 < passes
    assert not (bench.context.folder / RECORDS_FILE).exists()
    monkeypatch.setattr(scoring, "hidden_of_rows", hidden)
    forward_passes.clear()
    bench.run("interrupted", max_tokens=100)
    assert 0 < len(forward_passes) == passes - 3
    for name in (RECORDS_FILE, "dropped.jsonl"):
        assert (bench.context.folder / name).read_bytes() == (whole / name).read_bytes()


def test_rows_left_out_are_whole_before_the_candidates_are_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, lines = os.replace, []

    def replaced(source: Path, target: Path) -> None:
        if target.name == "candidates.parquet":
            lines.extend((target.parent / "left-out.jsonl").read_text(encoding="utf-8").splitlines())
        replace(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    bench.run(rule="none", student=None, keep=None, filters={"max_characters": 40})
    assert len(lines) == bench.result.counts["dropped_by_max_characters"] > 0


def test_alternatives_stay_with_the_traces_that_stay(bench: Bench, records: list[Record]) -> None:
    for number, record in enumerate(records):
        record.alternatives = Alternatives.of([[(number, -1.0)]], as_ids=True)
    bench.give(records)
    kept = {one.id: one.alternatives for one in bench.run(keep={"top": 0.5})}
    assert 0 < len(kept) < len(records)
    assert kept == {one.id: one.alternatives for one in records if one.id in kept}


@pytest.mark.parametrize("level", ["response", "sentence"])
def test_what_the_student_wrote_before_the_teacher_went_on_counts_for_neither(
    bench: Bench, records: list[Record], level: str
) -> None:
    record = records[0]
    assert record.logprobs is not None
    assert record.response_token_ids is not None
    renderer = Renderer(load(bench.models["student"]).tokenizer)
    record.prefix_tokens = 3
    written = b"".join(renderer.bytes_of(record.response_token_ids[:3]))
    record.prefix_characters = len(written.decode("utf-8"))
    record.logprobs = [math.nan] * 3 + record.logprobs[3:]
    bench.give(records)
    (found,) = [one for one in bench.run(keep={"top": 1.0}, level=level) if one.id == record.id]
    for role in ("teacher", "student"):
        expected = naive_probability(bench, role, record, behind=3)
        assert found.scores[f"{role}_probability"] == pytest.approx(expected, rel=1e-4)


def test_traces_without_log_probabilities_are_an_error_that_says_how_to_get_them(
    bench: Bench, records: list[Record], forward_passes: list[int]
) -> None:
    records[7].logprobs = None
    records[6].logprobs = None  # held out: nobody asks for it
    assert records[6].held_out
    records[8].logprobs = None
    records[9].logprobs = None
    bench.give(records)
    with pytest.raises(DataError) as caught:
        bench.run()
    assert str(caught.value.where) == "row 10 (record r09)"
    assert "`logprobs: 1`" in str(caught.value)
    assert "`teacher`" in str(caught.value)
    assert forward_passes == [], "a model was run before what is missing was noticed"


def test_a_local_teacher_scores_what_is_missing_or_at_another_temperature(
    bench: Bench, records: list[Record], forward_passes: list[int]
) -> None:
    expected = {record.id: record.scores for record in bench.run("own", keep={"top": 1.0})}
    forward_passes.clear()
    bench.run("all-there", teacher="teacher", keep={"top": 1.0})
    assert forward_passes == [], "the traces' own log-probabilities at temperature 1 were not used"
    for number, record in enumerate(records):
        if number % 4 == 1:
            record.logprobs = None
        elif number % 4 == 3:  # what came back from a server that gave none
            record.logprobs = [math.nan] * len(record.logprobs or [])
        else:
            record.logprobs = [one * 0.5 for one in record.logprobs or []]
            record.sampling = {"logprob_temperature": [0.5, None][number % 4 // 2]}
    bench.give(records)
    rescored = bench.run("rescored", teacher="teacher", keep={"top": 1.0})
    assert sum(forward_passes) == 18
    for record in rescored:
        if not record.held_out:
            assert record.scores == pytest.approx(expected[record.id], rel=1e-4, abs=1e-7)
    assert "temperature" not in bench.said


@pytest.mark.parametrize(("stated", "words"), [(0.3, "temperature 0.3"), (None, "nobody states")])
def test_log_probabilities_at_another_temperature_are_warned_of(
    bench: Bench, records: list[Record], stated: float | None, words: str
) -> None:
    for record in records[:2]:
        record.sampling = {"logprob_temperature": stated}
    bench.give(records)
    bench.run()
    (warning,) = [one for one in bench.result.metrics["warnings"] if "log p at temperature 1" in one]
    assert warning.startswith("2 traces have log-probabilities at ")
    assert words in warning
    assert f"warning: {warning}" in bench.said


def test_a_rule_that_keeps_everything_or_divergences_of_one_sign_are_warned_of(
    bench: Bench, records: list[Record]
) -> None:
    bench.run("quiet")
    assert not any(
        "keeps all" in one or "every divergence" in one for one in bench.result.metrics["warnings"]
    )
    for record in records:
        record.logprobs = [-0.01 * one for one in range(1, 1 + len(record.logprobs or []))]
    bench.give(records)
    bench.run("sure", keep={"threshold": 0.1})
    keeps_all, one_sign = bench.result.metrics["warnings"]
    assert keeps_all.startswith("the rule keeps all 18 rows, so that it selects nothing")
    assert "`keep: {top: 0.6}`" in keeps_all
    assert one_sign.startswith("every divergence is positive (+")
    assert "the teacher is surer of every trace" in one_sign


def test_a_threshold_that_nothing_reaches_is_an_error(bench: Bench) -> None:
    with pytest.raises(DataError, match=r"no row reaches the threshold of 0.9; the highest score is"):
        bench.run(keep={"threshold": 0.9})


def test_rows_without_a_response_go_even_where_they_are_held_out(bench: Bench, records: list[Record]) -> None:
    records[0].response, records[6].response = None, " \n"
    bench.give(records)
    kept = bench.run(keep={"top": 1.0})
    assert len(kept) == 22
    assert [(one["row"], one["by"], one["reason"]) for one in _dropped(bench)] == [
        (1, "response", "no response"),
        (7, "response", "no response"),
    ]
    assert bench.result.counts["dropped_by_response"] == 2


def test_rows_that_a_model_cannot_score_are_dropped_with_the_reason(
    bench: Bench, records: list[Record]
) -> None:
    records[0].messages = [{"role": "user", "content": "long " * 600}]
    records[1].logprobs = [math.nan] * len(records[1].logprobs or [])
    bench.give(records)
    kept = bench.run(keep={"top": 1.0})
    assert len(kept) == 22
    first, second = _dropped(bench)
    assert (first["row"], first["by"]) == (1, "score")
    assert "exceed the context of" in first["reason"]
    assert (second["row"], second["reason"]) == (
        2,
        "teacher: the log-probability of none of its tokens is known",
    )
    assert bench.result.counts["dropped_by_score"] == 2


def test_a_row_that_a_model_gives_nan_is_dropped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: Callable[..., Any] = scoring.hidden_of_rows

    def overflowing(model: Any, rows: list[Rendered], **options: Any) -> Any:
        hidden_NH, targets_N = hidden(model, rows, **options)
        hidden_NH[0] = torch.nan
        return hidden_NH, targets_N

    monkeypatch.setattr(scoring, "hidden_of_rows", overflowing)
    with pytest.raises(DataError, match=r"no row can be scored: 18 x student: .* no probability"):
        bench.run(max_tokens=1)


def test_data_without_any_response_is_an_error(bench: Bench, records: list[Record]) -> None:
    for record in records:
        record.response = None
    bench.give(records)
    with pytest.raises(DataError, match=r"none of the 24 rows is left to choose from \(24 by response\)"):
        bench.run()


def test_data_that_are_all_held_out_are_an_error(bench: Bench) -> None:
    with pytest.raises(DataError, match="all of the 6 rows that are left are held out"):
        bench.run(data="traces:held_out")
    assert len(bench.run(data="traces:held_out", rule="none", student=None, keep=None)) == 6


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (OpenAIModel(engine="openai", base_url="http://127.0.0.1:1/v1", model="big"), "no tokenizer makes"),
        (SolverModel(engine="solver", function="solver.py:solve"), "engine solver, which gives no log-prob"),
    ],
)
def test_a_model_that_does_not_score_given_text_is_refused(
    bench: Bench, model: Settings, reason: str
) -> None:
    bench.models["big"] = model
    for role in ("student", "teacher"):
        with pytest.raises(ModelError, match=rf"the {role} big is a .*{reason}"):
            bench.run(**{role: "big"})


def test_a_student_in_four_bits_is_scored_as_such(
    bench: Bench, tmp_path: Path, build_tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    wide = build_tiny_model("llama", hidden_size=128, intermediate_size=128)
    wide.save_pretrained(tmp_path / "wide")
    tiny_tokenizer.save_pretrained(tmp_path / "wide")
    whole = TransformersModel(path=str(tmp_path / "wide"), device="cpu", dtype="float32")
    bench.models |= {"whole": whole, "small": whole.model_copy(update={"quantize": "nf4"})}
    first, second = (bench.run(name, student=name, keep={"top": 1.0}) for name in ("whole", "small"))
    rounded = load(whole).model
    for name, module in load(bench.models["small"]).model.named_modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            weight = functional.dequantize_4bit(module.weight.data, state)
            rounded.get_submodule(name).weight.data = weight
    rounded.save_pretrained(tmp_path / "rounded")
    tiny_tokenizer.save_pretrained(tmp_path / "rounded")
    bench.models["rounded"] = whole.model_copy(update={"path": str(tmp_path / "rounded")})
    for one, other in zip(first, second, strict=True):
        if not one.held_out:
            assert other.scores["student_probability"] != one.scores["student_probability"]
            expected = naive_probability(bench, "rounded", other)
            assert other.scores["student_probability"] == pytest.approx(expected, rel=1e-3)


def test_without_a_rule_every_usable_row_stays_unscored(bench: Bench, forward_passes: list[int]) -> None:
    kept = bench.run(rule="none", student=None, keep=None)
    assert len(kept) == 24
    assert forward_passes == []
    assert bench.result.metrics == {}
    assert _dropped(bench) == []


def test_filters_come_before_the_rule_and_leave_held_out_rows_alone(
    bench: Bench, records: list[Record]
) -> None:
    for number in (1, 6, 9, 23):
        records[number].finish_reason = "length"
    assert records[6].held_out
    bench.give(records)
    kept = bench.run(keep={"top": 0.5}, filters={"finished": True, "min_characters": 3})
    assert [record.id for record in kept if record.held_out] == ["r06", "r07", "r08", "r15", "r16", "r17"]
    dropped = _dropped(bench)
    assert [one["row"] for one in dropped] == sorted(one["row"] for one in dropped)
    assert all(one["id"] == records[one["row"] - 1].id for one in dropped)
    filtered = [one for one in dropped if one["by"] == "finished"]
    assert [one["row"] for one in filtered] == [2, 10, 24]
    assert filtered[0]["reason"] == "cut off at the token limit (finish_reason: length)"
    assert bench.result.counts == {
        "records": 6 + 8,
        "held_out": 6,
        "rows": 24,
        "dropped_by_finished": 3,
        "dropped_by_rule": 7,
    }
    assert bench.result.metrics["arms"]["all"]["rows"] == 15


@pytest.mark.parametrize("level", ["response", "sentence"])
def test_what_the_teachers_server_gives_no_log_p_of_counts_for_no_model(
    bench: Bench, records: list[Record], level: str
) -> None:
    """Servers that give log p of the answer alone, behind reasoning: both models are judged by the answer."""
    hidden, student = 3, bench.models["student"]
    assert isinstance(student, TransformersModel)
    renderer = Renderer(load_tokenizer(student))
    for record in records:
        assert record.response_token_ids is not None
        sizes = [*map(len, renderer.bytes_of(record.response_token_ids))]
        record.logprobs = [math.nan] + [-1.0] * len(sizes[hidden:])
        record.token_bytes = [sum(sizes[:hidden]), *sizes[hidden:]]
        record.tokenizer = None
    bench.give(records)
    known = 0
    for record in bench.run(level=level, keep={"top": 1.0}):
        if not record.held_out:
            known += 1
            expected = naive_probability(bench, "student", record, behind=hidden)
            assert record.scores["teacher_probability"] == pytest.approx(math.exp(-1))
            assert record.scores["student_probability"] == pytest.approx(expected, rel=1e-4)
    assert known > 5


class TestSentences:
    """Level sentence: how many sentences are the teacher's."""

    def test_each_sentence_has_the_class_that_its_own_tokens_give_it(self, bench: Bench) -> None:
        kept = bench.run(level="sentence", keep={"top": 1.0}, distilled="distilled")
        roles = ("teacher", "student", "distilled")
        loaded = {}
        for role in roles:
            settings = bench.models[role]
            assert isinstance(settings, TransformersModel)
            loaded[role] = load(settings)
        renderer = Renderer(loaded["teacher"].tokenizer)
        several = 0
        for record in kept:
            if record.held_out:
                continue
            rendered = renderer.without_end_of_turn(renderer.render(record))
            spans = sentences(record.response or "")
            several += len(spans) > 1
            sizes = [len(one) for one in renderer.bytes_of(record.response_token_ids or [])]
            places = tokens_of_spans(spans, sizes)
            counted = dict.fromkeys(("teacher", "student", "shared", "boosted"), 0)
            logprobs = {role: token_logprobs(loaded[role], [rendered])[0].tolist() for role in roles}
            for number in {*places}:
                p = {}
                for role in roles:
                    inside = [one for at, one in zip(places, logprobs[role], strict=True) if at == number]
                    p[role] = math.exp(math.fsum(inside) / len(inside))
                counted[sentence_class(p["teacher"], p["student"], p["distilled"], alpha=0.1, beta=0.1)] += 1
            assert {name: record.scores[f"{name}_sentences"] for name in counted} == counted
            assert record.scores["sentences"] == sum(counted.values()) == len({*places})
        assert several > 3

    def test_the_paper_keeps_of_each_prompt_the_trace_with_most_teacher_sentences(self, bench: Bench) -> None:
        everything = bench.run("everything", level="sentence", keep={"top": 1.0}, beta=0.001)
        kept = bench.run(level="sentence", keep={"per_prompt": 1}, beta=0.001)
        assert bench.result.metrics["score"] == "count of teacher sentences"
        assert bench.result.metrics["effective_threshold"] is None
        assert len(kept) == 6 + 6
        most: dict[str, float] = {}
        for record in everything:
            if not record.held_out:
                count = record.scores["teacher_sentences"]
                most[record.prompt_id] = max(count, most.get(record.prompt_id, 0.0))
        assert max(most.values()) > 0, "there is no teacher sentence: nothing is shown"
        for record in kept:
            if not record.held_out:
                assert record.scores["teacher_sentences"] == most[record.prompt_id]
        assert {one["reason"] for one in _dropped(bench)} == {"not among the best 1 of its prompt"}

    def test_the_ratio_is_the_share_of_scored_sentences(self, bench: Bench) -> None:
        kept = bench.run(level="sentence", measure="ratio", keep={"threshold": 0.5}, beta=0.001)
        for record in kept:
            if not record.held_out:
                assert record.scores["teacher_sentences"] / record.scores["sentences"] >= 0.5

    def test_a_teacher_of_another_tokenizer_is_aligned_by_bytes(
        self, bench: Bench, records: list[Record]
    ) -> None:
        """A teacher of bytes beside a student of longer tokens."""
        expected = {
            record.id: record.scores["sentences"]
            for record in bench.run("own", level="sentence", keep={"top": 1.0})
            if not record.held_out
        }
        for record in records:
            record.tokenizer = record.response_token_ids = None
            size = len((record.response or "").encode())
            record.token_bytes = [1] * size
            record.logprobs = [-1.0] * size
        bench.give(records)
        for record in bench.run("bytes", level="sentence", keep={"top": 1.0}):
            if not record.held_out:
                assert record.scores["teacher_probability"] == pytest.approx(math.exp(-1))
                assert record.scores["sentences"] == expected[record.id]

    def test_tokens_that_nobody_can_place_are_said_so(self, bench: Bench, records: list[Record]) -> None:
        for record in records:
            record.tokenizer = None
        bench.give(records)
        with pytest.raises(DataError, match="no row can be scored: 18 x teacher: nobody knows") as caught:
            bench.run(level="sentence")
        assert "generate again with `logprobs: 1`" in str(caught.value)
        assert len(bench.run("by-response", level="response")) == 15

    def test_a_row_whose_tokens_do_not_add_up_to_its_text_is_dropped(
        self, bench: Bench, records: list[Record]
    ) -> None:
        records[0].token_bytes = [1] * len(records[0].logprobs or [])
        bench.give(records)
        bench.run(level="sentence", keep={"top": 1.0})
        (dropped,) = _dropped(bench)
        assert (dropped["row"], dropped["by"]) == (1, "score")
        assert "bytes, but the text has" in dropped["reason"]

    def test_a_think_block_that_the_rendering_opens_is_no_obstacle(
        self, bench: Bench, records: list[Record]
    ) -> None:
        for record in records:
            record.response = f"Is it 19? Yes.\n</think>\n\n{record.response}"
            record.tokenizer = None
        settings = bench.models["teacher"]
        assert isinstance(settings, TransformersModel)
        bench.give(written_by(load(settings), records))
        kept = bench.run(level="sentence", keep={"top": 1.0})
        assert len(kept) == 24
        assert all(record.scores["sentences"] >= 3 for record in kept if not record.held_out)


def test_what_is_written_is_read_again(bench: Bench) -> None:
    kept = bench.run()
    assert kept == list(read_records(bench.context.folder / RECORDS_FILE))
    assert all(isinstance(path, Path) for path in bench.context.folder.iterdir())


def test_copies_of_a_model_score_as_one_does_and_each_takes_up_the_others_scores(
    bench: Bench, forward_passes: list[int], tmp_path: Path
) -> None:
    def scores(folder: str) -> bytes:
        return (tmp_path / folder / RECORDS_FILE).read_bytes()

    bench.run("one", max_tokens=200)
    (store,) = tmp_path.glob("store/scores/*.sqlite")
    whole = dict(sqlite3.connect(store).execute("SELECT key, logprobs FROM scores"))
    with sqlite3.connect(store) as database:
        database.execute("DELETE FROM scores")
    copies = CopiesHere(2)
    bench.run("two", copies=copies, max_tokens=200)
    assert all(copies.jobs)
    assert dict(sqlite3.connect(store).execute("SELECT key, logprobs FROM scores")) == whole
    assert scores("two") == scores("one")
    again = CopiesHere(2)
    bench.run("again", copies=again, max_tokens=200)
    assert (again.opened, sum(again.jobs)) == (0, 0)
    forward_passes.clear()
    bench.run("one again", max_tokens=200)
    assert forward_passes == []
    assert (copies.opened, copies.closed) == (1, 1)
