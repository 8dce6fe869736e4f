"""The retrieve step on a small corpus: what each row is searched for by, and what stays as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from potstill.core.errors import DataError, Interrupted, ModelError
from potstill.core.records import Record
from potstill.retrieval.settings import DEFAULT_TEMPLATE
from potstill.retrieval.step import RERANKER_FOLDER

from ...rows import write_rows
from .conftest import NAMES, Bench, priced


def test_rows_to_train_on_get_the_passage_of_their_rationale(bench: Bench) -> None:
    written = bench.run()
    for number, record in enumerate(written[:6]):
        given = DEFAULT_TEMPLATE.format(
            passages=f"A {NAMES[number]} costs {number + 11} coins.",
            question=f"What does one pay for the {NAMES[number]}?",
        )
        assert record.messages == [{"role": "user", "content": given}]
        assert record.meta["passages"] == [2 * number]


def test_a_held_out_row_is_searched_for_by_its_question_though_it_has_a_rationale(bench: Bench) -> None:
    written = bench.run()
    assert "the" in priced(7).messages[-1]["content"]
    for number, record in enumerate(written[6:], start=6):
        assert record.held_out
        assert record.meta["passages"] == [2 * number + 1], "the passage with `the`, which the question has"
        assert "dyed in grey" in record.messages[-1]["content"]
        assert f"costs {number + 11}" not in record.messages[-1]["content"]
    assert bench.result.counts == {
        "records": 8,
        "held_out": 2,
        "by_rationale": 6,
        "by_question": 2,
        "without_passage": 0,
        "passages": 16,
    }
    assert bench.result.metrics["recall"] == {"question": 0.0}


def test_with_query_question_no_row_sees_its_rationales_passage(bench: Bench) -> None:
    written = bench.run(query="question")
    assert [record.meta["passages"] for record in written] == [[2 * number + 1] for number in range(8)]
    assert bench.result.counts["by_rationale"] == 0


def test_a_prompts_identity_and_its_side_of_the_split_stay(bench: Bench) -> None:
    given = [priced(number, held_out=number > 5) for number in range(8)]
    written = bench.run()
    for before, after in zip(given, written, strict=True):
        assert (after.prompt_id, after.held_out) == (before.prompt_id, before.held_out)
        assert (after.response, after.reasoning, after.reference) == (
            before.response,
            before.reasoning,
            before.reference,
        )
        assert after.id != before.id
        assert after.logprobs is None, "they were those behind another prompt"
        assert after.prompt_token_ids is None


def test_passages_stay_within_the_budget_and_k(bench: Bench, tiny_tokenizer: Any) -> None:
    written = bench.run(k=4, document_tokens=60, template="{passages}|{question}")
    for record in written:
        documents = record.messages[-1]["content"].partition("|")[0]
        assert len(tiny_tokenizer(documents, add_special_tokens=False)["input_ids"]) <= 60
        assert 1 <= len(record.meta["passages"]) <= 4
    assert max(len(record.meta["passages"]) for record in written) > 1
    assert 0 < bench.result.metrics["document_tokens_a_prompt"] <= 60
    assert bench.result.tokens > 0


def test_system_prompts_stay_and_prompts_without_a_response_are_searched_for_by_question(
    bench: Bench,
) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the lisk?"}]
    bench.give([Record("q", asked)], "prompts")
    [record] = bench.run(data="prompts")
    assert record.messages[0] == asked[0]
    assert record.meta["passages"] == [15]
    assert "recall" not in bench.result.metrics


def test_a_prompt_that_nothing_is_found_for_stays_as_it_is(bench: Bench) -> None:
    bench.give([Record("q", [{"role": "user", "content": "Perché no?"}])], "prompts")
    [record] = bench.run(data="prompts")
    assert record.messages[-1]["content"] == "Perché no?"
    assert bench.result.counts["without_passage"] == 1


def test_braces_in_a_question_or_passage_are_no_template(bench: Bench) -> None:
    bench.give([Record("q", [{"role": "user", "content": "the {lisk} {passages}?"}])], "prompts")
    [record] = bench.run(data="prompts")
    assert record.messages[-1]["content"].endswith("the {lisk} {passages}?")


def test_the_index_is_made_once_for_a_corpus(bench: Bench, store_root: Path) -> None:
    bench.run()
    assert "passages: 16 articles, 16 passages" in bench.said
    made = {
        path.parent: path.stat().st_mtime_ns for path in (store_root / "artifacts").glob("*/manifest.json")
    }
    bench.run("again", k=2)
    assert bench.said.count("passages:") == 0, bench.said
    assert {
        path.parent: path.stat().st_mtime_ns for path in (store_root / "artifacts").glob("*/manifest.json")
    } == made
    bench.run("smaller", passage_tokens=16)
    assert "passages:" in bench.said, "passages of another size are another index"
    write_rows(Path(bench.corpus), [{"text": "A lisk costs 99 coins, the florp 2."}])
    changed = bench.run("changed")
    assert "99 coins" in changed[7].messages[-1]["content"]


@pytest.mark.parametrize(
    ("drawn", "is_cut_again"),
    [
        ({}, False),
        ({"limit": 4}, False),
        ({"held_out": 0.5}, False),
        ({"limit": 4, "shuffle": True}, True),
        ({"labels": {"domain": "prices"}}, True),
    ],
)
def test_a_corpus_is_cut_once_for_all_seeds_unless_they_draw_its_articles(
    bench: Bench, drawn: dict[str, Any], is_cut_again: bool
) -> None:
    corpus = {"path": bench.corpus, **drawn}
    bench.run("one", seed=1, corpus=corpus)
    assert "passages:" in bench.said
    bench.run("other", seed=2, corpus=corpus)
    assert ("passages:" in bench.said) == is_cut_again


def test_a_corpus_may_be_what_a_step_wrote(bench: Bench) -> None:
    articles = [
        Record(f"a{n}", [{"role": "user", "content": "Write."}], response=f"the {n} lisk") for n in (1, 2)
    ]
    bench.give(articles, "written")
    written = bench.run(corpus="written")
    assert written[7].messages[-1]["content"].startswith("Passages:\n\nthe 1 lisk")


def test_an_interrupted_index_is_made_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> int:
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr("potstill.retrieval.index.build_bm25", interrupted)
        with pytest.raises(Interrupted):
            bench.run()
    written = bench.run()
    assert written[0].meta["passages"] == [0]
    assert "bm25:" in bench.said


# --- reranker


def test_the_reranker_learns_to_find_from_the_question_what_the_rationale_finds(
    bench: Bench, tiny_encoder: str
) -> None:
    reranker = {"model": tiny_encoder, "epochs": 30, "batch": 2, "lr": 3e-3}
    written = bench.run(reranker=reranker, candidates=3)
    recall = bench.result.metrics["recall"]
    assert recall == {"question": 0.0, "reranked": 1.0}
    assert [record.meta["passages"] for record in written[6:]] == [[12], [14]]
    losses = list(bench.result.metrics["reranker"]["loss"].values())
    assert losses[-1] < 0.5 * losses[0]


def test_a_trained_reranker_serves_elsewhere(bench: Bench, tiny_encoder: str) -> None:
    reranker = {"model": tiny_encoder, "epochs": 30, "batch": 2, "lr": 3e-3}
    first = bench.run(reranker=reranker, candidates=3)
    trained = bench.context.folder / RERANKER_FOLDER
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in trained.iterdir()}
    again = bench.run("again", reranker={"model": str(trained), "epochs": 0}, candidates=3)
    assert [record.meta["passages"] for record in again] == [record.meta["passages"] for record in first]
    assert "reranker" not in bench.result.metrics


def test_the_same_seed_makes_the_same_reranker(bench: Bench, tiny_encoder: str) -> None:
    reranker = {"model": tiny_encoder, "epochs": 1}
    weights = []
    for name in ("one", "other"):
        bench.run(name, reranker=reranker)
        weights.append((bench.context.folder / RERANKER_FOLDER / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_reranker_without_anything_to_learn_from_is_refused(bench: Bench, tiny_encoder: str) -> None:
    bench.give([priced(number, held_out=True) for number in range(3)], "held-out")
    with pytest.raises(DataError, match="no row teaches the reranker anything") as caught:
        bench.run(data="held-out", reranker={"model": tiny_encoder})
    assert "epochs: 0" in (caught.value.mend or "")


# --- what a user gets wrong


def test_plain_text_is_no_prompt(bench: Bench) -> None:
    with pytest.raises(DataError, match="no prompt that ends with a question") as caught:
        bench.run(data={"path": bench.corpus})
    assert "`corpus`" in (caught.value.mend or "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 9}, "k is 9, more than the 8 candidates"),
        ({"template": "{passages}"}, "template needs"),
        ({"template": "{passages} {question} {answer}"}, "template needs"),
        ({"qdrant": {"url": "http://127.0.0.1:6333"}}, "qdrant belongs to method dense or hybrid"),
        ({"passage_tokens": 0}, "greater than or equal to 8"),
        ({"reranker": {"learning_rate": 1}}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    bench: Bench, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        bench.settings(**settings)


def test_an_unknown_encoder_is_named_with_those_there_are(bench: Bench) -> None:
    with pytest.raises(ModelError, match="no embedded encoder of the name 'minilm'") as caught:
        bench.settings(method="dense", encoder="minilm").content()
    assert "all-minilm-l6-v2" in (caught.value.expected or "")


def test_meta_of_a_written_row_is_plain_json(bench: Bench) -> None:
    assert json.dumps(bench.run()[0].meta)
