"""Rendering is right for templates of every family, and never teaches what it should not."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import DataError, ModelError
from potstill.core.records import Record
from potstill.data.chat import Rendered, Renderer, check_prompt_length, fit, split_reasoning, tag_reasoning
from potstill.models import DEFAULT_CHAT_TEMPLATE, template_hash, tokenizer_hash

ASKED = [{"role": "user", "content": "How many apples?"}]

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set said = m['content'].split('</think>')[-1].lstrip('\\n') %}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ said }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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

    def test_a_refusal_by_the_template_names_row_and_roles(self, tiny_tokenizer: Any) -> None:
        tokenizer = variant(tiny_tokenizer, GEMMA, special=FAMILIES["gemma"][1], bos="<bos>", eos="<eos>")
        record = Record(
            prompt_id="p", messages=[{"role": "system", "content": "Be brief"}, *ASKED], response="x"
        )
        with pytest.raises(DataError, match="System role not supported") as caught:
            Renderer(tokenizer).render(record, row_number=12)
        assert "row 12" in str(caught.value)
        assert "system, user" in str(caught.value)

    def test_a_tokenizer_without_a_template_is_refused(self, tiny_tokenizer: Any) -> None:
        with pytest.raises(ModelError, match="no chat template"):
            Renderer(variant(tiny_tokenizer, ""))

    def test_a_tokenizer_that_can_end_no_turn_is_refused(self, tiny_tokenizer: Any) -> None:
        tokenizer = variant(tiny_tokenizer, UNMARKED)
        tokenizer.eos_token = None
        with pytest.raises(ModelError, match="no token ends a turn"):
            Renderer(tokenizer)


class TestReasoningOpenedByThePrompt:
    def test_the_block_is_opened_once_whoever_opens_it(self, tiny_tokenizer: Any) -> None:
        opening, plain = Renderer(variant(tiny_tokenizer, OPENS_THINKING)), Renderer(tiny_tokenizer)
        whole, inside = "<think>\nten\n</think>\n11", "ten\n</think>\n11"
        assert opening.opens_reasoning(ASKED)
        assert not plain.opens_reasoning(ASKED)
        for renderer in (opening, plain):
            for response in (whole, inside):
                text = renderer.tokenizer.decode(renderer.render(trace(response)).ids)
                assert text.count("<think>") == 1, (response, text)
                assert text.endswith("<think>\nten\n</think>\n11<|im_end|>")


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
