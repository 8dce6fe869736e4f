"""Rendering is right for templates of every family, and never teaches what it should not."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import DataError, ModelError
from potstill.core.records import Record
from potstill.data.chat import Rendered, Renderer, check_prompt_length, fit, split_reasoning, tag_reasoning
from potstill.models import DEFAULT_CHAT_TEMPLATE, set_rendering, template_hash, tokenizer_hash

ASKED = [{"role": "user", "content": "How many apples?"}]

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in (Path(__file__).parents[2] / "chat_templates").glob("*.jinja")
}
LLAMA3, GEMMA, MISTRAL, PHI3, QWEN3 = (
    TEMPLATES[name] for name in ("llama3", "gemma2", "mistral", "phi3", "qwen3")
)
OPENS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
UNMARKED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"

# template, special tokens added, bos, eos, the prompt's text, the end of a turn
FAMILIES: dict[str, tuple[str, Sequence[str], str | None, str, str, str]] = {
    "llama3": (
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow many apples?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        "<|eot_id|>",
    ),
    "gemma": (
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<bos><start_of_turn>user\nHow many apples?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "mistral": (
        MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "<s>",
        "</s>",
        "<s>[INST] How many apples? [/INST]",
        "</s>",
    ),
    "phi3": (
        PHI3,
        ("<|user|>", "<|assistant|>", "<|end|>"),
        None,
        "<|endoftext|>",
        "<|user|>\nHow many apples?<|end|>\n<|assistant|>\n",
        "<|end|>",
    ),
    "qwen3": (
        QWEN3,
        (),
        None,
        "<|endoftext|>",
        "<|im_start|>user\nHow many apples?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "default": (
        DEFAULT_CHAT_TEMPLATE,
        (),
        None,
        "<|endoftext|>",
        "User:\nHow many apples?\n\nAssistant:\n",
        "<|endoftext|>",
    ),
    "no end of turn": (
        UNMARKED,
        (),
        None,
        "<|endoftext|>",
        "user: How many apples?\nassistant:",
        "<|endoftext|>",
    ),
}


def variant(
    tokenizer: Any,
    template: str,
    *,
    special: Sequence[str] = (),
    bos: str | None = None,
    eos: str = "<|im_end|>",
) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": list(special)})
    changed.bos_token, changed.eos_token, changed.chat_template = bos, eos, template
    return changed


def trace(response: str, **fields: Any) -> Record:
    return Record(prompt_id="p", messages=ASKED, response=response, **fields)


def supervised(tokenizer: Any, rendered: Rendered) -> str:
    kept = [id_ for id_, mask in zip(rendered.ids, rendered.mask, strict=True) if mask]
    return str(tokenizer.decode(kept, skip_special_tokens=False))


class TestFamilies:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_prompt_then_raw_response_then_the_end_of_turn(self, tiny_tokenizer: Any, family: str) -> None:
        template, special, bos, eos, prompt, end = FAMILIES[family]
        tokenizer = variant(tiny_tokenizer, template, special=special, bos=bos, eos=eos)
        renderer = Renderer(tokenizer)
        rendered = renderer.render(trace("Eleven. "))
        assert tokenizer.decode(rendered.ids, skip_special_tokens=False) == f"{prompt}Eleven. {end}"
        assert supervised(tokenizer, rendered) == f"Eleven. {end}"
        assert rendered.ids[-1] == tokenizer.convert_tokens_to_ids(end)
        assert renderer.end_of_turn_ids == [rendered.ids[-1]]
        assert rendered.ids[: rendered.mask.index(1)] == renderer.prompt_ids(ASKED)

    @pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family[2]])
    def test_the_beginning_token_stands_once(self, tiny_tokenizer: Any, family: str) -> None:
        template, special, bos, eos, _, _ = FAMILIES[family]
        tokenizer = variant(tiny_tokenizer, template, special=special, bos=bos, eos=eos)
        ids = Renderer(tokenizer).render(trace("Eleven.")).ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1

    def test_templates_without_generation_marks_leave_no_mask_empty(self, tiny_tokenizer: Any) -> None:
        assert "{% generation %}" not in tiny_tokenizer.chat_template
        assert Renderer(tiny_tokenizer).render(trace("Eleven.")).supervised_tokens > 1

    def test_an_empty_think_block_of_the_template_is_not_supervised(self, tiny_tokenizer: Any) -> None:
        tokenizer = variant(tiny_tokenizer, QWEN3)
        with_block = tokenizer.apply_chat_template(
            [*ASKED, {"role": "assistant", "content": "x"}], tokenize=False
        )
        assert "<think>\n\n</think>" in with_block
        rendered = Renderer(tokenizer).render(trace("Eleven."))
        assert "think" not in tokenizer.decode(rendered.ids)

    def test_a_think_block_that_the_template_strips_from_history_stays_in_the_response(
        self, tiny_tokenizer: Any
    ) -> None:
        tokenizer = variant(tiny_tokenizer, QWEN3)
        rendered = Renderer(tokenizer).render(trace("<think>\nten and one\n</think>\n\nEleven."))
        assert supervised(tokenizer, rendered) == "<think>\nten and one\n</think>\n\nEleven.<|im_end|>"

    @pytest.mark.parametrize("template", ["gemma2", "gemma3", "mistral"])
    def test_a_system_message_without_a_place_stands_before_the_first_question(
        self, tiny_tokenizer: Any, template: str
    ) -> None:
        tokenizer = variant(tiny_tokenizer, TEMPLATES[template], bos="<|im_start|>", eos="<|endoftext|>")
        renderer = Renderer(tokenizer)
        assert renderer.takes_system is (template == "gemma3")
        asked = [{"role": "system", "content": "Be brief."}, *ASKED]
        folded = [{"role": "user", "content": "Be brief.\n\nHow many apples?"}]
        assert renderer.prompt_text(asked) == renderer.prompt_text(folded)
        assert asked[0]["role"] == "system", "the record's own messages stay as they are"
        assert renderer.keeps_beginning(asked, "Ele") is renderer.keeps_beginning(folded, "Ele")

    def test_a_template_that_passes_over_a_system_message_gets_it_with_the_question(
        self, tiny_tokenizer: Any
    ) -> None:
        silent = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
        renderer = Renderer(variant(tiny_tokenizer, silent))
        assert renderer.prompt_text([{"role": "system", "content": "Be brief."}, *ASKED]) == (
            "Be brief.\n\nHow many apples?"
        )

    def test_a_refusal_by_the_template_names_row_and_roles(self, tiny_tokenizer: Any) -> None:
        record = Record("p", messages=[*ASKED, *ASKED], response="x")
        with pytest.raises(DataError, match="Roles must alternate") as caught:
            Renderer(variant(tiny_tokenizer, MISTRAL)).render(record, row_number=12)
        assert "row 12" in str(caught.value)
        assert "user, user" in str(caught.value)

    def test_a_template_that_writes_the_date_writes_the_same_every_day(self, tiny_tokenizer: Any) -> None:
        tokenizer = variant(tiny_tokenizer, TEMPLATES["smollm3"])
        renderer = Renderer(tokenizer)
        assert "Today Date: 26 July 2024\n" in renderer.prompt_text(ASKED)
        assert tokenizer.chat_template == TEMPLATES["smollm3"], "what is saved is the model's own"

    def test_a_tokenizer_without_a_template_is_refused(self, tiny_tokenizer: Any) -> None:
        with pytest.raises(ModelError, match="no chat template"):
            Renderer(variant(tiny_tokenizer, ""))

    def test_a_tokenizer_that_can_end_no_turn_is_refused(self, tiny_tokenizer: Any) -> None:
        tokenizer = variant(tiny_tokenizer, UNMARKED)
        tokenizer.eos_token = None
        with pytest.raises(ModelError, match="no token ends a turn"):
            Renderer(tokenizer)


class TestReasoningOpenedByThePrompt:
    @pytest.mark.parametrize("template", [OPENS_THINKING, TEMPLATES["deepseek_r1"]])
    def test_the_block_is_opened_once_whoever_opens_it(self, tiny_tokenizer: Any, template: str) -> None:
        opening, plain = Renderer(variant(tiny_tokenizer, template)), Renderer(tiny_tokenizer)
        whole, inside = "<think>\nten\n</think>\n11", "ten\n</think>\n11"
        assert opening.opens_reasoning(ASKED)
        assert not plain.opens_reasoning(ASKED)
        for renderer in (opening, plain):
            for response in (whole, inside):
                text = renderer.tokenizer.decode(renderer.render(trace(response)).ids)
                assert text.count("<think>") == 1, (response, text)
                assert text.endswith("<think>\nten\n</think>\n11<|im_end|>")

    def test_an_answer_without_reasoning_closes_the_block_first(self, tiny_tokenizer: Any) -> None:
        renderer = Renderer(variant(tiny_tokenizer, OPENS_THINKING))
        text = renderer.tokenizer.decode(renderer.render(trace("Eleven.")).ids)
        assert text.endswith("<think>\n\n</think>\n\nEleven.<|im_end|>")
        for unfinished in ({"finish_reason": "length"}, {"reasoning": "ten and"}):
            text = renderer.tokenizer.decode(renderer.render(trace("ten and", **unfinished)).ids)
            assert "</think>" not in text, "it was cut off inside the block"

    def test_reasoning_behind_an_empty_block_of_the_prompt_is_refused(self, tiny_tokenizer: Any) -> None:
        unthinking = "{%- set enable_thinking = false %}" + QWEN3
        renderer = Renderer(variant(tiny_tokenizer, unthinking))
        text = renderer.tokenizer.decode(renderer.render(trace("Eleven.")).ids)
        assert text.endswith("assistant\n<think>\n\n</think>\n\nEleven.<|im_end|>")
        with pytest.raises(DataError, match=r"row 2 .*empty think block") as caught:
            renderer.render(trace("<think>\nten\n</think>\n\nEleven."), row_number=2)
        assert "reasoning_format: strip" in str(caught.value)

    @pytest.mark.parametrize("template", [QWEN3, OPENS_THINKING, TEMPLATES["llama3"]])
    def test_what_a_model_wrote_is_read_as_it_was_rendered(self, tiny_tokenizer: Any, template: str) -> None:
        renderer = Renderer(variant(tiny_tokenizer, template))
        rendered = renderer.render(trace("<think>\nten\n</think>\n\nEleven."))
        written = supervised(renderer.tokenizer, rendered).removesuffix("<|im_end|>")
        assert split_reasoning(renderer.read_response(ASKED, written)) == ("ten", "Eleven.")


THOUGHT = "<think>\nten\n</think>\n\nEleven."


class TestHistory:
    """Earlier answers, with the reasoning that they had; the template decides what is left of it."""

    def rendered(self, tokenizer: Any) -> str:
        history = [*ASKED, {"role": "assistant", "content": THOUGHT}, {"role": "user", "content": "Sure?"}]
        record = Record("p", history, response="<think>\nstill\n</think>\n\nYes.")
        text = tokenizer.decode(Renderer(tokenizer).render(record).ids)
        assert text.endswith("<think>\nstill\n</think>\n\nYes.<|im_end|>"), "the trained turn keeps its own"
        return str(text)

    @pytest.mark.parametrize("template", ["qwen3", "deepseek_r1"])
    def test_a_template_that_strips_it_does(self, tiny_tokenizer: Any, template: str) -> None:
        text = self.rendered(variant(tiny_tokenizer, TEMPLATES[template]))
        assert "ten" not in text
        assert "Eleven." in text

    def test_a_template_that_knows_no_reasoning_keeps_it(self, tiny_tokenizer: Any) -> None:
        assert f"assistant\n{THOUGHT}<|im_end|>" in self.rendered(tiny_tokenizer)

    @pytest.mark.parametrize("field", ["m['reasoning_content']", "m.thinking"])
    def test_a_template_that_wants_it_apart_gets_it_so(self, tiny_tokenizer: Any, field: str) -> None:
        apart = (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}[{{ " + field + " }}]{% endif %}"
            "{{ m['content'] }}\n{% endfor %}"
        )
        assert "[ten]Eleven.\n" in self.rendered(variant(tiny_tokenizer, apart))


def with_format(tokenizer: Any, reasoning: Any, template: str | None = None) -> Any:
    changed = copy.deepcopy(tokenizer)
    set_rendering(changed, template or changed.chat_template, reasoning)
    return changed


WRITTEN = {
    "strip": "Eleven.",
    "openthoughts": (
        "<|begin_of_thought|>\nten\n<|end_of_thought|>\n\n<|begin_of_solution|>\nEleven.\n<|end_of_solution|>"
    ),
    "two marks": "<r>\nten\n</r>\n\nEleven.",
    "four marks": "<think>\nten\n</think>\n\n<answer>\nEleven.\n</answer>",
}
OWN_MARKS = {
    "two marks": ["<r>", "</r>"],
    "four marks": ["<think>", "</think>", "<answer>", "</answer>"],
}


class TestReasoningFormat:
    """A student's own way to write its reasoning."""

    @pytest.mark.parametrize("name", WRITTEN)
    def test_it_is_trained_on_and_read_back(self, tiny_tokenizer: Any, name: str) -> None:
        renderer = Renderer(with_format(tiny_tokenizer, OWN_MARKS.get(name, name)))
        written = WRITTEN[name]
        for response in (THOUGHT, written if name != "strip" else THOUGHT):
            rendered = renderer.render(trace(response))
            assert supervised(renderer.tokenizer, rendered) == f"{written}<|im_end|>"
        expected = (None if name == "strip" else "ten", "Eleven.")
        assert split_reasoning(renderer.read_response(ASKED, written)) == expected
        assert supervised(renderer.tokenizer, renderer.render(trace("Eleven."))) == "Eleven.<|im_end|>"

    @pytest.mark.parametrize("name", ["openthoughts", "two marks", "four marks"])
    def test_a_response_cut_off_in_its_reasoning_stays_open(self, tiny_tokenizer: Any, name: str) -> None:
        renderer = Renderer(with_format(tiny_tokenizer, OWN_MARKS.get(name, name)))
        rendered = renderer.render(trace("<think>\nten and", finish_reason="length"))
        opening = WRITTEN[name].partition("\n")[0]
        assert supervised(renderer.tokenizer, rendered) == f"{opening}\nten and"

    @pytest.mark.parametrize("name", ["openthoughts", "two marks", "four marks"])
    def test_an_answer_that_was_cut_off_is_not_closed(self, tiny_tokenizer: Any, name: str) -> None:
        renderer = Renderer(with_format(tiny_tokenizer, OWN_MARKS.get(name, name)))
        written = WRITTEN[name].partition("Eleven.")[0] + "Eleven"
        rendered = renderer.render(trace("<think>\nten\n</think>\n\nEleven", finish_reason="length"))
        assert supervised(renderer.tokenizer, rendered) == written

    @pytest.mark.parametrize("own", [None, ["<r>", "</r>"], "strip"])
    def test_the_marks_of_the_model_that_wrote_a_trace_are_not_learned(
        self, tiny_tokenizer: Any, own: Any
    ) -> None:
        renderer = Renderer(with_format(tiny_tokenizer, own))
        written = {None: THOUGHT, "strip": "Eleven."}.get(
            own if own is None else str(own), WRITTEN["two marks"]
        )
        parts = {"reasoning": "ten", "answer": "Eleven."}
        rendered = renderer.render(trace("[T]ten[/T]Eleven.", **parts))
        assert supervised(renderer.tokenizer, rendered) == f"{written}<|im_end|>"
        if own != "strip":
            cut = {"reasoning": "ten and", "answer": "", "finish_reason": "length"}
            rendered = renderer.render(trace("[T]ten and", **cut))
            opening = written.partition("\n")[0]
            assert supervised(renderer.tokenizer, rendered) == f"{opening}\nten and"

    def test_a_mark_in_the_answer_is_text(self, tiny_tokenizer: Any) -> None:
        renderer = Renderer(with_format(tiny_tokenizer, ["Reasoning:", "Answer:"]))
        rendered = renderer.render(trace("<think>\nten\n</think>\n\nAnswer: B"))
        assert supervised(renderer.tokenizer, rendered) == ("Reasoning:\nten\nAnswer:\n\nAnswer: B<|im_end|>")

    def test_think_tags_that_the_prompt_opens_are_read_back_once(self, tiny_tokenizer: Any) -> None:
        renderer = Renderer(with_format(tiny_tokenizer, OWN_MARKS["four marks"], OPENS_THINKING))
        written = supervised(renderer.tokenizer, renderer.render(trace(THOUGHT))).removesuffix("<|im_end|>")
        assert renderer.read_response(ASKED, written) == THOUGHT

    def test_history_is_written_in_it(self, tiny_tokenizer: Any) -> None:
        history = [*ASKED, {"role": "assistant", "content": THOUGHT}, *ASKED]
        assert "ten" not in Renderer(with_format(tiny_tokenizer, "strip")).prompt_text(history)
        assert "<r>\nten\n</r>" in Renderer(with_format(tiny_tokenizer, ["<r>", "</r>"])).prompt_text(history)

    def test_without_reasoning_a_block_that_the_prompt_opens_is_closed_at_once(
        self, tiny_tokenizer: Any
    ) -> None:
        renderer = Renderer(with_format(tiny_tokenizer, "strip", OPENS_THINKING))
        rendered = renderer.render(trace(THOUGHT, reasoning="ten"))
        assert renderer.tokenizer.decode(rendered.ids).endswith("<think>\n\n</think>\n\nEleven.<|im_end|>")

    def test_nothing_but_reasoning_is_nothing_to_learn_without_it(self, tiny_tokenizer: Any) -> None:
        with pytest.raises(DataError, match=r"row 4 .*nothing to learn"):
            Renderer(with_format(tiny_tokenizer, "strip")).render(trace("<think>\nten and"), row_number=4)

    def test_other_marks_than_those_that_the_prompt_opens_are_refused(self, tiny_tokenizer: Any) -> None:
        renderer = Renderer(with_format(tiny_tokenizer, ["<r>", "</r>"], OPENS_THINKING))
        with pytest.raises(ModelError, match="opens <think> itself"):
            renderer.render(trace(THOUGHT))

    def test_it_is_part_of_the_template_that_own_ids_stand_behind(self, tiny_tokenizer: Any) -> None:
        tokenizer = with_format(tiny_tokenizer, "strip")
        assert template_hash(tokenizer) != template_hash(tiny_tokenizer)
        ids = {
            "prompt_token_ids": [1, 40],
            "response_token_ids": [50, 51],
            "tokenizer": tokenizer_hash(tokenizer),
        }
        renderer = Renderer(tokenizer)
        for sampling in ({}, {"template": template_hash(tiny_tokenizer)}):
            rendered = renderer.render(trace(THOUGHT, sampling=sampling, **ids))
            assert supervised(tokenizer, rendered) == "Eleven.<|im_end|>"
        own = trace(THOUGHT, sampling={"template": template_hash(tokenizer)}, **ids)
        assert renderer.render(own).ids[:4] == [1, 40, 50, 51]

    def test_a_response_that_another_model_began_is_refused(self, tiny_tokenizer: Any) -> None:
        with pytest.raises(DataError, match="another model began"):
            Renderer(with_format(tiny_tokenizer, "strip")).render(trace(THOUGHT, prefix_characters=4))


class TestEnding:
    def test_a_truncated_response_never_teaches_to_stop(self, tiny_tokenizer: Any) -> None:
        rendered = Renderer(tiny_tokenizer).render(trace("Eleven", finish_reason="length"))
        assert supervised(tiny_tokenizer, rendered) == "Eleven"

    def test_pad_being_eos_hides_no_end_of_turn(self, tiny_tokenizer: Any) -> None:
        assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id
        rendered = Renderer(tiny_tokenizer).render(trace("Eleven", finish_reason="stop"))
        assert rendered.ids[-1] == tiny_tokenizer.pad_token_id
        assert rendered.mask[-1] == 1

    @pytest.mark.parametrize("response", [None, "", " \n"])
    def test_a_row_with_nothing_to_learn_is_refused_by_its_number(
        self, tiny_tokenizer: Any, response: str | None
    ) -> None:
        with pytest.raises(DataError, match=r"row 3 .*nothing to learn"):
            Renderer(tiny_tokenizer).render(Record("p", ASKED, response=response), row_number=3)


class TestOwnTokenIds:
    def own(self, tokenizer: Any, /, **fields: Any) -> Record:
        return trace(
            "Eleven.",
            **{
                "prompt_token_ids": [1, 40],
                "response_token_ids": [50, 51],
                "tokenizer": tokenizer_hash(tokenizer),
                **fields,
            },
        )

    def test_ids_of_the_same_tokenizer_are_used(self, tiny_tokenizer: Any) -> None:
        rendered = Renderer(tiny_tokenizer).render(self.own(tiny_tokenizer))
        assert rendered == Rendered([1, 40, 50, 51, 2], [0, 0, 1, 1, 1])

    def test_an_end_of_turn_already_there_is_not_doubled(self, tiny_tokenizer: Any) -> None:
        rendered = Renderer(tiny_tokenizer).render(self.own(tiny_tokenizer, response_token_ids=[50, 2]))
        assert rendered == Rendered([1, 40, 50, 2], [0, 0, 1, 1])

    def test_an_end_of_turn_alone_is_nothing_to_learn(self, tiny_tokenizer: Any) -> None:
        with pytest.raises(DataError, match="nothing to learn"):
            Renderer(tiny_tokenizer).render(self.own(tiny_tokenizer, response_token_ids=[2]))

    def test_ids_of_another_tokenizer_are_not(self, tiny_tokenizer: Any) -> None:
        renderer = Renderer(tiny_tokenizer)
        assert renderer.render(self.own(tiny_tokenizer, tokenizer="another")) == renderer.render(
            trace("Eleven.")
        )

    def test_ids_under_another_template_are_not(self, tiny_tokenizer: Any) -> None:
        renderer = Renderer(tiny_tokenizer)
        same, other = ({"template": one} for one in (template_hash(tiny_tokenizer), "another"))
        assert renderer.render(self.own(tiny_tokenizer, sampling=same)).ids[:2] == [1, 40]
        assert renderer.render(self.own(tiny_tokenizer, sampling=other)) == renderer.render(trace("Eleven."))

    def test_a_response_without_prompt_ids_follows_the_rendered_prompt(self, tiny_tokenizer: Any) -> None:
        renderer = Renderer(tiny_tokenizer)
        rendered = renderer.render(self.own(tiny_tokenizer, prompt_token_ids=None))
        assert rendered.ids == [*renderer.prompt_ids(ASKED), 50, 51, 2]

    def test_the_record_is_left_as_it_was(self, tiny_tokenizer: Any) -> None:
        record = self.own(tiny_tokenizer)
        Renderer(tiny_tokenizer).render(record)
        assert (record.prompt_token_ids, record.response_token_ids) == ([1, 40], [50, 51])


class TestPlainText:
    def test_all_of_a_text_is_supervised_between_bos_and_eos(self, tiny_tokenizer: Any) -> None:
        rendered = Renderer(tiny_tokenizer).render(Record("p", [], response="the answer is eleven"))
        assert rendered.ids[0] == tiny_tokenizer.bos_token_id
        assert rendered.mask == [0] + [1] * (len(rendered.ids) - 1)
        assert supervised(tiny_tokenizer, rendered) == "the answer is eleven<|im_end|>"

    def test_without_bos_the_first_token_is_context(self, tiny_tokenizer: Any) -> None:
        tokenizer = variant(tiny_tokenizer, QWEN3)
        rendered = Renderer(tokenizer).render(Record("p", [], response="eleven apples"))
        assert rendered.mask == [0] + [1] * (len(rendered.ids) - 1)
        assert tokenizer.decode(rendered.ids) == "eleven apples<|im_end|>"

    def test_an_empty_text_is_refused(self, tiny_tokenizer: Any) -> None:
        with pytest.raises(DataError, match="nothing to learn"):
            Renderer(tiny_tokenizer).render(Record("p", [], response=""))


class TestLength:
    def test_a_prompt_past_the_context_names_row_and_lengths(self) -> None:
        check_prompt_length(511, 512, row_number=4)
        with pytest.raises(DataError, match=r"row 4: the prompt has 1,024 tokens, but the context holds 512"):
            check_prompt_length(1024, 512, row_number=4)

    def test_what_does_not_fit_is_cut_from_the_end_of_the_response(self) -> None:
        rendered = Rendered([1, 2, 3, 4, 5], [0, 0, 1, 1, 1])
        assert fit(rendered, 5) is rendered
        assert fit(rendered, 4) == Rendered([1, 2, 3, 4], [0, 0, 1, 1])
        with pytest.raises(DataError, match="row 9: the prompt has 2 tokens"):
            fit(rendered, 2, row_number=9)


class TestSplitReasoning:
    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("Eleven.", (None, "Eleven.")),
            (" Eleven.\n", (None, " Eleven.\n")),
            ("<think>\nten\n</think>\n\nEleven.", ("ten", "Eleven.")),
            ("ten\n</think>\nEleven.", ("ten", "Eleven.")),
            ("<think>ten and", ("ten and", "")),
            ("<think>\n\n</think>\n\nEleven.", ("", "Eleven.")),
            ("Let me see.\n<think>ten</think>\nEleven.", ("ten", "Let me see.\nEleven.")),
            ("ten </think> say <think> is a tag", ("ten", "say <think> is a tag")),
            ("", (None, "")),
        ],
    )
    def test_reasoning_and_answer_come_apart(self, text: str, parts: tuple[str | None, str]) -> None:
        assert split_reasoning(text) == parts

    def test_openthoughts_marks_become_think_tags(self) -> None:
        text = (
            "<|begin_of_thought|>\n\nten\n\n<|end_of_thought|>\n\n"
            "<|begin_of_solution|>\n\nEleven.\n\n<|end_of_solution|>"
        )
        assert tag_reasoning(text) == "<think>\nten\n</think>\n\nEleven."
        assert split_reasoning(text) == ("ten", "Eleven.")

    def test_an_openthoughts_response_cut_off_stays_open(self) -> None:
        assert tag_reasoning("<|begin_of_thought|>\n\nten and") == "<think>\nten and"
        assert tag_reasoning("<|begin_of_solution|>Eleven.<|end_of_solution|>") == "Eleven."
        assert tag_reasoning("no marks") == "no marks"

    def test_what_stands_before_the_marks_is_not_lost(self) -> None:
        text = "Sure!\n<|begin_of_thought|>ten<|end_of_thought|>Eleven."
        assert split_reasoning(text) == ("ten", "Sure!\nEleven.")


class TestRealTokenizers:
    def test_sentencepiece_puts_no_space_before_the_first_word(self, shared_data: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "tinyllama")
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        assert tokenizer.decode(tokenizer.encode("Hello", add_special_tokens=False)[0]) == "Hello"
        rendered = Renderer(tokenizer).render(trace("Hello there"))
        assert tokenizer.decode(rendered.ids) == "User:\nHow many apples?\n\nAssistant:\nHello there</s>"


class TestPrefix:
    """The beginning of a response that another model wrote."""

    def continued(self, renderer: Any, prefix: str, rest: str, **fields: Any) -> Record:
        messages = [{"role": "user", "content": "What is 12 + 7?"}]
        return Record("p", messages, response=prefix + rest, prefix_characters=len(prefix), **fields)

    def test_it_is_supervised_unless_it_is_masked(self, tiny_tokenizer: Any) -> None:
        renderer = Renderer(tiny_tokenizer)
        record = self.continued(renderer, "First 12 + 7 = 19,", " then -11.")
        whole, masked = renderer.render(record), renderer.render(record, mask_prefix=True)
        assert whole.ids == masked.ids
        supervised = [id_ for id_, one in zip(masked.ids, masked.mask, strict=True) if one]
        assert tiny_tokenizer.decode(supervised) == " then -11.<|im_end|>"
        assert sum(whole.mask) > sum(masked.mask)

    def test_a_token_that_reaches_into_the_continuation_is_supervised(self, tiny_tokenizer: Any) -> None:
        renderer = Renderer(tiny_tokenizer)
        record = self.continued(renderer, "The ques", "tion is")
        masked = renderer.render(record, mask_prefix=True)
        supervised = [id_ for id_, one in zip(masked.ids, masked.mask, strict=True) if one]
        text = tiny_tokenizer.decode(supervised)
        assert text.endswith("tion is<|im_end|>")
        assert len(text) > len("tion is<|im_end|>"), "the test's prefix ends inside a token"

    def test_of_own_ids_the_count_is_the_records(self, tiny_tokenizer: Any) -> None:
        renderer = Renderer(tiny_tokenizer)
        ids = tiny_tokenizer("a b c d", add_special_tokens=False)["input_ids"]
        record = self.continued(
            renderer,
            "a b",
            " c d",
            prompt_token_ids=[5, 6, 7],
            response_token_ids=ids,
            prefix_tokens=2,
            tokenizer=renderer.tokenizer_hash,
        )
        masked = renderer.render(record, mask_prefix=True)
        assert masked.ids == [5, 6, 7, *ids, *renderer.end_of_turn_ids]
        assert masked.mask == [0] * 5 + [1] * (len(ids) - 1)

    def test_an_added_think_tag_belongs_to_it(self, tiny_tokenizer: Any) -> None:
        renderer = Renderer(tiny_tokenizer)
        record = self.continued(renderer, "seven and", " twelve\n</think>\n\n19")
        masked = renderer.render(record, mask_prefix=True)
        supervised = [id_ for id_, one in zip(masked.ids, masked.mask, strict=True) if one]
        assert tiny_tokenizer.decode(supervised) == " twelve\n</think>\n\n19<|im_end|>"
        assert "<think>\nseven" in tiny_tokenizer.decode(masked.ids)

    def test_a_prefix_without_a_continuation_teaches_the_end_of_turn_or_nothing(
        self, tiny_tokenizer: Any
    ) -> None:
        renderer = Renderer(tiny_tokenizer)
        record = self.continued(renderer, "19 it is", "", finish_reason="stop")
        masked = renderer.render(record, mask_prefix=True)
        assert [
            id_ for id_, one in zip(masked.ids, masked.mask, strict=True) if one
        ] == renderer.end_of_turn_ids
        record.finish_reason = "length"
        with pytest.raises(DataError, match="behind the prefix of another model"):
            renderer.render(record, mask_prefix=True, row_number=3)

    def test_a_template_that_keeps_an_unfinished_message_is_told_from_one_that_does_not(
        self, tiny_tokenizer: Any
    ) -> None:
        messages = [{"role": "user", "content": "What is 12 + 7?"}]
        assert Renderer(tiny_tokenizer).keeps_beginning(messages, "First 12")
        assert Renderer(tiny_tokenizer).keeps_beginning(messages, "<think>\nFirst 12")
        closing = copy.deepcopy(tiny_tokenizer)
        closing.chat_template = closing.chat_template.replace(
            "message['content']",
            "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') + message['content']",
        )
        assert not Renderer(closing).keeps_beginning(messages, "First 12")
        dropping = copy.deepcopy(tiny_tokenizer)
        dropping.chat_template = dropping.chat_template.replace(
            "message['content']", "message['content'].split('</think>')[-1]"
        )
        assert not Renderer(dropping).keeps_beginning(messages, "<think>\nFirst\n</think>\n\n19")
