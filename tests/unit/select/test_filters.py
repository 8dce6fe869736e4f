"""Filters: what each drops and why, in words; and that nothing is dropped that was not asked for."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from potstill.core.errors import DataError, RecipeError
from potstill.core.records import Record
from potstill.core.settings import meaning
from potstill.core.step import StepContext
from potstill.data.sources import read_file
from potstill.select.filters import Dropped, FilterSettings, filter_records

Filter = Callable[..., list[Dropped | None]]
GERMAN = "Zuerst addieren wir die beiden Zahlen, dann multiplizieren wir die Summe mit vier."


def trace(response: str | None, prompt: str = "Why?", **fields: Any) -> Record:
    return Record(f"p-{prompt}", [{"role": "user", "content": prompt}], response=response, **fields)


@pytest.fixture
def context(step_context: Callable[..., StepContext]) -> StepContext:
    return step_context("select")


@pytest.fixture
def drops(context: StepContext) -> Filter:
    """`drops(*records, **settings)`: what the filters say of each record."""

    def filtered(*records: Record, **settings: Any) -> list[Dropped | None]:
        found = [*filter_records(records, FilterSettings.model_validate(settings), context)]
        assert [one.id for one, _ in found] == [one.id for one in records]
        return [verdict for _, verdict in found]

    return filtered


class TestNoFilters:
    def test_empty_settings_keep_every_record_as_it_is(self, drops: Filter) -> None:
        records = [trace("a"), trace("a"), trace(None), trace("", finish_reason="length")]
        assert drops(*records) == [None] * 4

    def test_no_records_are_none(self, drops: Filter) -> None:
        assert drops(answer=True, near_duplicates=0.8) == []


class TestLength:
    def test_tokens_are_counted_by_ids_or_else_by_logprobs(self, drops: Filter) -> None:
        records = [trace("x", response_token_ids=[1] * 5), trace("y", logprobs=[-0.1] * 2)]
        assert drops(*records, min_tokens=3) == [None, Dropped("min_tokens", "2 tokens, fewer than 3")]
        assert drops(*records, max_tokens=4) == [Dropped("max_tokens", "5 tokens, more than 4"), None]
        assert drops(*records, min_tokens=2, max_tokens=5) == [None, None]

    def test_a_row_whose_tokens_are_not_known_stays_and_is_told_of(
        self, drops: Filter, context: StepContext
    ) -> None:
        assert drops(trace("x"), trace("y", logprobs=[0.0]), min_tokens=2)[0] is None
        assert any("min_tokens: 1 rows could not be judged" in one for one in context.reporter.said)

    def test_where_no_rows_tokens_are_known_the_filter_is_refused(self, drops: Filter) -> None:
        with pytest.raises(DataError, match="filter max_tokens: none of 2 rows could be judged") as caught:
            drops(trace("x"), trace("y"), max_tokens=2)
        assert "the number of its tokens is not known" in str(caught.value)

    def test_characters_are_those_of_the_response(self, drops: Filter) -> None:
        assert drops(trace("abc"), trace("ab"), min_characters=3) == [
            None,
            Dropped("min_characters", "2 characters, fewer than 3"),
        ]
        assert drops(trace("a" * 2000), max_characters=1999) == [
            Dropped("max_characters", "2,000 characters, more than 1,999")
        ]


class TestForm:
    def test_unfinished_responses_go(self, drops: Filter) -> None:
        found = drops(*(trace("x", finish_reason=one) for one in ("stop", "length", None)), finished=True)
        assert [one and one.filter for one in found] == [None, "finished", None]

    @pytest.mark.parametrize(
        "text", ["<think>so</think>5", "so</think>5", "<think>so", "Well. <think>so</think>5"]
    )
    def test_a_think_block_of_any_form_is_present(self, drops: Filter, text: str) -> None:
        assert drops(trace(text), reasoning="present") == [None]

    @pytest.mark.parametrize("text", ["5", "", "<think> \n</think>5", "</think>5"])
    def test_a_missing_or_empty_think_block_goes(self, drops: Filter, text: str) -> None:
        assert drops(trace(text), reasoning="present") == [
            Dropped("reasoning", "no think block, or an empty one")
        ]

    @pytest.mark.parametrize(
        "text", ["<think>so</think>5", "so</think>5", "<|begin_of_thought|>so<|end_of_thought|>5"]
    )
    def test_one_block_then_an_answer_is_well_formed(self, drops: Filter, text: str) -> None:
        assert drops(trace(text), reasoning="well_formed") == [None]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("5", "no think block, or an empty one"),
            ("<think>so</think>", "no answer behind the think block"),
            ("<think>so", "no answer behind the think block"),
            ("<think>a</think>5<think>b</think>", "not one think block at the beginning, then an answer"),
            ("Well. <think>so</think>5", "not one think block at the beginning, then an answer"),
        ],
    )
    def test_a_badly_formed_block_goes_with_what_is_wrong(
        self, drops: Filter, text: str, reason: str
    ) -> None:
        assert drops(trace(text), reasoning="well_formed") == [Dropped("reasoning", reason)]

    def test_a_block_that_the_chat_template_opened_counts(self, drops: Filter) -> None:
        cut_off = trace("so it", reasoning="so it", answer="")
        assert drops(cut_off, reasoning="present") == [None]
        assert drops(cut_off, answer=True)[0] is not None
        assert drops(cut_off, reasoning="well_formed")[0] is not None

    @pytest.mark.parametrize(
        ("text", "stays"), [("5", True), ("<think>so</think>5", True), ("<think>5", False), (" ", False)]
    )
    def test_a_missing_answer_goes(self, drops: Filter, text: str, stays: bool) -> None:
        found = drops(trace(text), answer=True)
        assert found == [None if stays else Dropped("answer", "no answer behind the think block")]


class TestContent:
    def test_a_loop_at_the_end_goes_with_its_share(self, drops: Filter) -> None:
        start = " ".join(f"word{number}" for number in range(3000))
        found = drops(trace(start), trace(f"{start} {'and so on and so ' * 60}"), max_repetition=0.5)
        assert found[0] is None
        assert found[1] is not None
        assert found[1].filter == "max_repetition"
        assert "9" in found[1].reason
        assert "8-grams" in found[1].reason

    def test_the_n_of_repeated_n_grams_is_a_setting(self, drops: Filter) -> None:
        text = "one two three four " * 2
        assert drops(trace(text), max_repetition=0.4, repetition_ngram=2)[0] is not None
        assert drops(trace(text), max_repetition=0.4, repetition_ngram=6) == [None]

    def test_another_language_goes_with_its_name_and_place(self, drops: Filter) -> None:
        english = "First we add the two numbers and then we multiply the sum by four."
        found = drops(
            trace(english),
            trace(f"<think>{GERMAN}</think>{english}"),
            trace(f"<think>{english}</think>{GERMAN}"),
            trace("42"),
            languages=["en"],
            other_languages=["de", "fr"],
        )
        assert [one and one.reason.partition(" is in 'de'")[0] for one in found] == [
            None,
            "the reasoning",
            "the answer",
            None,
        ]

    def test_answers_that_are_not_right_go(self, drops: Filter) -> None:
        right, wrong = (trace(f"It is {n}.", task="math", reference="7") for n in (7, 8))
        reasoned = trace("is it 8?</think>7", task="math", reference="7")
        assert drops(right, wrong, reasoned, verified=True) == [
            None,
            Dropped("verified", "the answer is not right by the verifier of 'math'"),
            None,
        ]

    def test_a_verdict_that_was_given_already_is_not_asked_for_again(self, drops: Filter) -> None:
        given = [trace("x", task="math", reference="7", verdicts={"correct": one}) for one in (True, False)]
        assert [one is None for one in drops(*given, verified=True)] == [True, False]

    def test_what_nothing_can_verify_goes_with_the_reason(self, drops: Filter) -> None:
        found = drops(
            trace("7", task="math", reference="7"), trace("7"), trace("7", task="math"), verified=True
        )
        assert [one and one.reason for one in found] == [
            None,
            "it has no task, so nothing can verify its answer",
            "it has no gold answer to compare with",
        ]

    def test_a_verifier_of_the_filter_judges_in_the_place_of_the_rows_own(
        self, drops: Filter, tmp_path: Path
    ) -> None:
        (tmp_path / "mine.py").write_text(
            "def right(answer, row):\n    return row['reference'] in answer\n", encoding="utf-8"
        )
        function = {"function": f"{tmp_path}/mine.py:right"}
        judged = trace("It is 8.", task="math", reference="7", verdicts={"correct": True})
        assert drops(judged, trace("7", reference="7"), trace("7"), verified=function) == [
            Dropped("verified", "the answer is not right by the filter's verifier"),
            None,
            Dropped("verified", "TypeError: 'in <string>' requires string as left operand, not NoneType"),
        ]
        fields = trace('{"n": 8}', reference='{"n": 7}')
        assert drops(fields, verified={"fields": "all"}) == [Dropped("verified", "wrong: n")]

    def test_where_nothing_can_be_verified_the_filter_is_refused(self, drops: Filter) -> None:
        with pytest.raises(DataError, match="filter verified: none of 2 rows could be judged"):
            drops(trace("7"), trace("8"), verified=True)

    def test_an_unknown_task_stops_with_the_known_ones(self, drops: Filter) -> None:
        with pytest.raises(DataError, match="no verifier is called 'maths'"):
            drops(trace("7", task="maths", reference="7"), verified=True)

    def test_prompts_of_an_evaluation_set_go(self, drops: Filter, tmp_path: Path) -> None:
        question = (
            "A train of 120 metres takes 6 seconds to pass a pole; how fast does it go, in metres a second?"
        )
        path = tmp_path / "exam.jsonl"
        path.write_text(json.dumps({"question": question, "answer": "20"}) + "\n", encoding="utf-8")
        found = drops(
            trace("20", question),
            trace("20", "How fast is a train?"),
            contamination={"data": {"path": str(path)}},
        )
        assert found[0] is not None
        assert found[0].filter == "contamination"
        assert "a train of 120 metres" in found[0].reason.casefold()
        assert found[1] is None

    def test_an_evaluation_set_that_is_not_there_is_an_error(self, drops: Filter) -> None:
        with pytest.raises(DataError, match="no such data file"):
            drops(trace("20"), contamination={"data": {"path": "nowhere/exam.jsonl"}})


class TestDuplicates:
    def test_the_first_of_a_group_stays_and_is_named(self, drops: Filter) -> None:
        records = [trace("So it is.", id="a"), trace("So  it is.", id="b"), trace("No.", id="c")]
        assert drops(*records, exact_duplicates=True) == [
            None,
            Dropped("exact_duplicates", "the same prompt and response as record a"),
            None,
        ]

    def test_near_duplicates_are_told_with_their_similarity(self, drops: Filter) -> None:
        text = " ".join(f"part{number} of this story" for number in range(60))
        found = drops(trace(text, id="a"), trace(text.replace("part9 ", "x "), id="b"), near_duplicates=0.8)
        assert found[0] is None
        assert found[1] is not None
        assert found[1].reason.startswith("near duplicate of record a, Jaccard 0.9")

    def test_a_dropped_row_makes_no_other_a_duplicate(self, drops: Filter) -> None:
        records = [trace("So it is.", finish_reason="length"), trace("So it is.", finish_reason="stop")]
        found = drops(*records, finished=True, exact_duplicates=True, near_duplicates=0.8)
        assert [one and one.filter for one in found] == ["finished", None]


class TestStream:
    def test_records_are_taken_one_at_a_time(self, context: StepContext) -> None:
        taken = 0

        def endless() -> Iterator[Record]:
            nonlocal taken
            while True:
                taken += 1
                yield trace(f"The answer is {taken}.", f"Prompt {taken}?")

        settings = FilterSettings(max_repetition=0.5, exact_duplicates=True, near_duplicates=0.9)
        found = filter_records(endless(), settings, context)
        for _ in range(10):
            next(found)
        assert taken == 10

    def test_each_filters_drops_are_told_and_recorded(self, drops: Filter, context: StepContext) -> None:
        drops(trace("a"), trace("a"), trace(""), answer=True, exact_duplicates=True)
        assert "filters dropped 2 of 3 rows: answer 1, exact_duplicates 1" in context.reporter.said
        assert context.reporter.events[-1] == {
            "event": "filters",
            "step": "step",
            "rows": 3,
            "dropped": {"answer": 1, "exact_duplicates": 1},
        }

    @pytest.mark.parametrize(
        "settings",
        [{"answer": True}, {"exact_duplicates": True}, {"min_characters": 1}, {"languages": ["en"]}],
    )
    def test_a_prompt_without_a_response_is_an_error_that_names_it(
        self, drops: Filter, settings: dict[str, Any]
    ) -> None:
        with pytest.raises(DataError, match=r"record r7: a prompt without a response"):
            drops(trace(None, id="r7"), **settings)

    def test_prompts_alone_can_be_filtered_for_contamination(self, drops: Filter, tmp_path: Path) -> None:
        path = tmp_path / "exam.jsonl"
        path.write_text('{"question": "What is 3 + 4?", "answer": "7"}\n', encoding="utf-8")
        found = drops(trace(None, "what is 3 + 4"), contamination={"data": {"path": str(path)}})
        assert found[0] is not None


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"min_tokens": 5, "max_tokens": 4}, "no row could stay"),
            ({"min_characters": 0}, "greater than or equal to 1"),
            ({"max_repetition": 1.0}, "less than 1"),
            ({"near_duplicates": 0.0}, "greater than 0"),
            ({"near_duplicates": 1.5}, "less than or equal to 1"),
            ({"other_languages": ["de"]}, "only with languages"),
            ({"languages": ["de", "en"], "other_languages": ["de"]}, "de cannot be among both"),
            ({"languages": "en"}, "list"),
            ({"reasoning": "yes"}, "present"),
            ({"contamination": {"ngram": 13}}, "data"),
            ({"contamination": {"data": {"path": "a.jsonl"}, "ngram": 0}}, "greater than or equal to 1"),
            ({"dedupe": True}, "Extra inputs"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            FilterSettings.model_validate(settings)

    def test_an_unknown_language_is_refused_before_any_row(self, context: StepContext) -> None:
        settings = FilterSettings(languages=["english"])
        with pytest.raises(RecipeError, match="'english'"):
            filter_records([], settings, context)
        with pytest.raises(RecipeError, match="'english'"):
            meaning(settings)

    def test_the_versions_of_what_decides_are_part_of_the_meaning(self) -> None:
        assert "content" not in meaning(FilterSettings(answer=True))
        found = meaning(FilterSettings(languages=["en"], near_duplicates=0.8))["content"]
        assert sorted(found) == ["py3langid", "rensa"]


class TestRealText:
    @pytest.mark.slow
    def test_worked_problems_written_by_people_nearly_all_stay(
        self, context: StepContext, shared_data: Path
    ) -> None:
        settings = FilterSettings(
            answer=True,
            max_repetition=0.5,
            languages=["en"],
            verified=True,
            exact_duplicates=True,
            near_duplicates=0.8,
        )
        rows = itertools.islice(read_file(shared_data / "gsm8k" / "train.jsonl"), 2000)
        dropped = Counter(one.filter for _, one in filter_records(rows, settings, context) if one is not None)
        assert dropped.total() < 5, dropped
