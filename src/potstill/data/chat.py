"""Rendering: records to token ids and loss masks, and back from what a model wrote."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from potstill.core.errors import DataError, ModelError
from potstill.core.records import Record
from potstill.data.reasoning import ReasoningFormat, split_reasoning, tag_reasoning
from potstill.data.responses import join_reasoning
from potstill.models import (
    THINK_CLOSE,
    THINK_OPEN,
    decoder_start_token,
    reasoning_format,
    template_hash,
    token_bytes,
    tokenizer_hash,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "THINK_CLOSE",
    "THINK_OPEN",
    "Rendered",
    "Renderer",
    "check_prompt_length",
    "fit",
    "split_reasoning",
    "tag_reasoning",
]

_SENTINEL = "POTSTILL7319SENTINEL"
_EMPTY_BLOCK = re.compile(rf"{THINK_OPEN}\s*{THINK_CLOSE}\s*\Z")
# Templates that take a message's reasoning apart from its content; it is there under both names.
_TAKES_REASONING = re.compile(r"reasoning_content|\.thinking\b|\[['\"]thinking['\"]\]")
# Some templates write today's date, so that a prompt would be another one tomorrow.
_ONE_DAY = (
    "{%- macro strftime_now(form) -%}{{ form.replace('%d', '26').replace('%B', 'July').replace('%b', 'Jul')"
    ".replace('%m', '07').replace('%Y', '2024').replace('%y', '24') }}{%- endmacro -%}"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids and, one a token, whether it is supervised (1) or context (0).

    mask[0] is always 0: nothing predicts the first token.
    """

    ids: list[int]
    mask: list[int]

    @property
    def supervised_tokens(self) -> int:
        """How many tokens the loss counts."""
        return sum(self.mask)


class Renderer:
    """Renders records for one tokenizer: prompt by its chat template, the raw response, end-of-turn.

    A system message stands before the first user message, an empty line between them, where the template has
    no place for it (`takes_system` is false), as Gemma's authors do it. Earlier answers are handed to the
    template with their reasoning, which it may leave out; only the last one is a response. To an
    encoder-decoder the prompt is the source, and the response is tokenised as a text of its own. The
    tokenizer must stay as it is: what derives from it is computed once, here. It needs a chat template, which
    `potstill.models.load_tokenizer` sees to. Raises ModelError without one or without an end-of-turn.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template",
                where=str(tokenizer.name_or_path),
                mend="load it with potstill.models.load_tokenizer, which gives it the default template",
            )
        self.tokenizer = tokenizer
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        self.template_hash = template_hash(tokenizer)
        self.reasoning_format = ReasoningFormat.of(tokenizer)
        template = str(tokenizer.chat_template)
        self._template = _ONE_DAY + template if "strftime_now" in template else None
        self._takes_reasoning = bool(_TAKES_REASONING.search(template))
        self.takes_system = self._takes_system()
        self._decoder_start = decoder_start_token(tokenizer)
        self.end_of_turn_ids = self._derive_end_of_turn()
        self._stop_ids = {*self.end_of_turn_ids, tokenizer.eos_token_id}
        self._latest_prompt: tuple[str, list[int]] | None = None

    def described(self) -> dict[str, Any]:
        """How conversations are rendered, for a manifest."""
        rendering = {
            "hash": self.template_hash,
            "chat_template": self.tokenizer.chat_template,
            "reasoning_format": reasoning_format(self.tokenizer),
        }
        return {"rendering": rendering}

    def prompt_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation by the chat template, up to and with the generation prompt."""
        return self._apply_template(messages, add_generation_prompt=True)

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of `prompt_text`; special tokens are those that the template writes, none is added.

        Raises DataError for an encoder-decoder's prompt that holds the token which its decoder starts with.
        """
        return self._encode_prompt(self.prompt_text(messages))

    def bytes_of(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes that each id stands for; none for an id that the tokenizer does not know."""
        known = self._token_bytes
        return [known[id_] if id_ < len(known) else b"" for id_ in ids]

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        return token_bytes(self.tokenizer)

    def opens_reasoning(self, messages: Sequence[Mapping[str, str]]) -> bool:
        """Whether the generation prompt itself opens the think block, so that a response starts inside it."""
        return _opens_reasoning(self.prompt_text(messages))

    def opened_once(self, messages: Sequence[Mapping[str, str]], response: str) -> str:
        """The response with its think block opened exactly once: by the generation prompt, or by itself."""
        return _open_once(self.prompt_text(messages), response)

    def read_response(self, messages: Sequence[Mapping[str, str]], response: str) -> str:
        """A response as the model wrote it, its reasoning in a think block that is opened in the text."""
        text = response if self.reasoning_format is None else self.reasoning_format.read(response)
        opened = self.opens_reasoning(messages) and not text.lstrip().startswith(THINK_OPEN)
        return THINK_OPEN + text if opened else text

    def keeps_beginning(self, messages: Sequence[Mapping[str, str]], beginning: str) -> bool:
        """Whether the template leaves the beginning of a response as it is in an unfinished last message.

        That is how a server is asked to go on from it; many templates drop or close a think block there.
        """
        from jinja2 import TemplateError

        prefilled = [*self._as_template_takes(messages), {"role": "assistant", "content": beginning}]
        try:
            found: Any = self.tokenizer.apply_chat_template(
                prefilled, tokenize=False, continue_final_message=True, chat_template=self._template
            )
        except (TemplateError, ValueError):
            return False
        return bool(found == self.prompt_text(messages) + beginning)

    def owns(self, record: Record) -> bool:
        """Whether the record's token ids are this tokenizer's, behind a prompt of this chat template.

        And in this reasoning format, where there is one: then the record has to state its template.
        """
        unstated = self.template_hash if self.reasoning_format is None else None
        template = record.sampling.get("template", unstated)
        return record.tokenizer == self.tokenizer_hash and template == self.template_hash

    def render(self, record: Record, *, mask_prefix: bool = False, row_number: int | None = None) -> Rendered:
        """Token ids and loss mask of a trace: the prompt is context; response and end-of-turn are supervised.

        A response with finish_reason "length" gets no end-of-turn, so that a truncated one never teaches to
        stop. The record's own ids are used when this tokenizer made them, and this chat template where
        `sampling["template"]` states its hash. A record without messages is plain text: bos where there is
        one, the text, eos. With `mask_prefix` the tokens that hold nothing but what another model wrote
        before the continuation are context as well. Raises DataError, with the row number, when there is
        nothing to learn.
        """
        prefix_tokens = 0
        if not record.messages and self._decoder_start is not None:
            raise DataError(
                "plain text has no prompt, and an encoder-decoder reads one",
                where=_where(record, row_number),
                expected="traces: prompts with responses",
                mend="leave such rows out, or use a decoder-only model",
            )
        if record.messages:
            prompt_ids, response_ids, prefix_tokens = self._conversation(record, row_number)
            ends = self.end_of_turn_ids
        else:
            prompt_ids, response_ids = self._plain_text(record)
            ends = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        ended = bool(response_ids) and response_ids[-1] in self._stop_ids
        if not response_ids or (ended and len(response_ids) == 1):
            raise DataError(
                "nothing to learn: the response is empty",
                where=_where(record, row_number),
                expected="a trace with a response",
                mend="remove the row, or generate responses for these prompts first",
            )
        if not ended and record.finish_reason != "length":
            response_ids = [*response_ids, *ends]
        context = len(prompt_ids) + (prefix_tokens if mask_prefix else 0)
        mask = [0] * context + [1] * (len(prompt_ids) + len(response_ids) - context)
        mask[0] = 0
        if not any(mask):
            raise DataError(
                "nothing to learn: behind the prefix of another model the response is empty",
                where=_where(record, row_number),
                mend="remove the row, or leave mask_prefix out",
            )
        return Rendered([*prompt_ids, *response_ids], mask)

    def without_end_of_turn(self, rendered: Rendered) -> Rendered:
        """A rendered trace up to its response's last token, the last of which there are log-probabilities."""
        if rendered.ids[-1] not in self._stop_ids:
            return rendered
        return Rendered(rendered.ids[:-1], rendered.mask[:-1])

    def _conversation(self, record: Record, row_number: int | None) -> tuple[list[int], list[int], int]:
        """Prompt ids, response ids, and how many of the latter hold nothing but the response's prefix."""
        own = self.owns(record)
        if own and record.prompt_token_ids and record.response_token_ids is not None:
            return record.prompt_token_ids, record.response_token_ids, record.prefix_tokens
        try:
            prompt = self.prompt_text(record.messages)
            prompt_ids = self._encode_prompt(prompt)
        except DataError as error:
            raise DataError(error.what, where=_where(record, row_number), mend=error.mend) from error
        if own and record.response_token_ids is not None:
            return prompt_ids, record.response_token_ids, record.prefix_tokens
        response = record.response or ""
        opened = self._written(prompt, record, row_number)
        response_ids = self._continuation(prompt, prompt_ids, opened)
        if not record.prefix_characters:
            return prompt_ids, response_ids, 0
        rest = response[record.prefix_characters :]
        if not opened.endswith(rest):
            raise DataError(
                "a response that another model began cannot be written in a reasoning format of its own",
                where=_where(record, row_number),
                mend="leave reasoning_format out, or leave such rows out",
            )
        prefix = opened[: len(opened) - len(rest)]
        # A token that reaches over the end of the prefix is another one in the prefix alone.
        pairs = zip(response_ids, self._continuation(prompt, prompt_ids, prefix), strict=False)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        return prompt_ids, response_ids, sum(1 for _ in same)

    def _written(self, prompt: str, record: Record, row_number: int | None) -> str:
        """The response as the model is to write it behind this prompt."""
        response, own = _in_think_tags(record, prompt), self.reasoning_format
        if own is not None:
            response = own.write(response, cut_off=record.finish_reason == "length")
        strips = own is not None and own.marks is None
        has_block = THINK_OPEN in response or THINK_CLOSE in response
        if _opens_reasoning(prompt):
            if own is not None and own.marks is not None and own.marks.open != THINK_OPEN:
                raise ModelError(
                    f"the chat template opens {THINK_OPEN} itself, and reasoning_format has other marks",
                    expected="one way to write reasoning",
                    mend="leave reasoning_format out, or name another chat_template",
                )
            closed = record.finish_reason != "length" or THINK_CLOSE in (record.response or "")
            if closed and response.strip() and not has_block and (strips or record.reasoning is None):
                return f"\n{THINK_CLOSE}\n\n{response.lstrip()}"  # an answer without reasoning
        elif has_block and _EMPTY_BLOCK.search(prompt):
            raise DataError(
                "the chat template's prompt ends with an empty think block, and the response thinks",
                where=_where(record, row_number),
                mend="give the model reasoning_format: strip, or a chat_template without the empty block",
            )
        return _open_once(prompt, response)

    def _plain_text(self, record: Record) -> tuple[list[int], list[int]]:
        beginning = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        if record.tokenizer == self.tokenizer_hash and record.response_token_ids is not None:
            return beginning, record.response_token_ids
        return beginning, self._encode(record.response or "")

    def _continuation(self, prompt: str, prompt_ids: list[int], response: str) -> list[int]:
        # Encoded alone, a SentencePiece tokenizer would put a space before the first word.
        if not response.strip():
            return []
        if self._decoder_start is not None:  # the target is a text of its own
            return self._encode(response)
        joint = self._encode(prompt + response)
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        return self._encode(response)

    def _encode_prompt(self, prompt: str) -> list[int]:
        latest = self._latest_prompt
        if latest is not None and latest[0] == prompt:
            return [*latest[1]]  # samples of a prompt stand side by side
        ids, start = self._encode(prompt), self._decoder_start
        if start is not None and self.tokenizer.convert_tokens_to_ids(start) in ids[:-1]:
            raise DataError(
                f"the prompt holds {start}, the token that the decoder starts with",
                mend="take it out of the prompt; a chat template of your own need not write it",
            )
        self._latest_prompt = prompt, [*ids]
        return ids

    def _encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except TypeError as error:
            if not any("\ud800" <= one <= "\udfff" for one in text):
                raise
            raise DataError(
                "holds half of a surrogate pair, which is no character",
                expected="text that UTF-8 can hold",
                mend="leave the row out, or decode its source anew",
            ) from error
        return ids

    def _apply_template(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._rendered(self._as_template_takes(messages), add_generation_prompt)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the model's chat template refuses this conversation ({roles}): {error}",
                mend="leave out what the template has no place for, or name another `chat_template`",
            ) from error

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text: Any = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self._template,
        )
        return str(text)

    def _takes_system(self) -> bool:
        from jinja2 import TemplateError

        turns = [{"role": "system", "content": _SENTINEL}, {"role": "user", "content": "Hello"}]
        try:
            return _SENTINEL in self._rendered(turns, add_generation_prompt=True)
        except TemplateError:
            return False

    def _as_template_takes(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        turns = [dict(message) for message in messages]
        if (
            not self.takes_system
            and len(turns) > 1
            and [one["role"] for one in turns[:2]] == ["system", "user"]
        ):
            system, user, *rest = turns
            turns = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        for turn in turns:
            if turn["role"] != "assistant":
                continue
            reasoning, answer = split_reasoning(turn["content"])
            if reasoning is not None and self.reasoning_format is not None:
                turn["content"] = self.reasoning_format.write(turn["content"])
            elif reasoning is not None and self._takes_reasoning:
                turn |= {"content": answer, "reasoning_content": reasoning}
        return turns

    def _derive_end_of_turn(self) -> list[int]:
        """The token that ends an assistant's turn: the first special token behind one, else eos."""
        tokenizer = self.tokenizer
        turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _SENTINEL}]
        try:
            tail = self._apply_template(turn, add_generation_prompt=False).rpartition(_SENTINEL)
        except DataError:
            tail = ("", "", "")
        if tail[1]:
            special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
            special.update(tokenizer.all_special_ids)
            special.discard(tokenizer.unk_token_id)
            found = next((id_ for id_ in self._encode(tail[2]) if id_ in special), None)
            if found is not None:
                return [found]
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "no token ends a turn: the chat template writes none and the tokenizer has no eos_token",
                where=str(tokenizer.name_or_path),
                mend="set eos_token in the model folder's tokenizer_config.json",
            )
        return [tokenizer.eos_token_id]


def check_prompt_length(prompt_tokens: int, context_tokens: int, *, row_number: int | None = None) -> None:
    """Raise DataError when a prompt leaves no room for a response in the model's context (both in tokens)."""
    if prompt_tokens >= context_tokens:
        raise DataError(
            f"the prompt has {prompt_tokens:,} tokens, but the context holds {context_tokens:,}",
            where=None if row_number is None else f"row {row_number}",
            expected="a prompt shorter than the context, with room for a response",
            mend="shorten the prompt, filter such rows out, or take a model with a longer context",
        )


def fit(rendered: Rendered, context_tokens: int, *, row_number: int | None = None) -> Rendered:
    """`rendered` within the context: the end of a response that does not fit is cut off, never the prompt.

    Raises DataError when the prompt alone fills the context.
    """
    if len(rendered.ids) <= context_tokens:
        return rendered
    prompt_tokens = rendered.mask.index(1)
    check_prompt_length(prompt_tokens, context_tokens, row_number=row_number)
    return Rendered(rendered.ids[:context_tokens], rendered.mask[:context_tokens])


def _where(record: Record, row_number: int | None) -> str:
    return f"record {record.id}" if row_number is None else f"row {row_number} (record {record.id})"


def _in_think_tags(record: Record, prompt: str) -> str:
    """The response with the reasoning that was read from it in think tags, where it has marks of others.

    Of one that another model began nothing may move; nor of one that goes on in the prompt's own block.
    """
    response, reasoning = record.response or "", record.reasoning
    if reasoning is None or record.prefix_characters or THINK_OPEN in response or THINK_CLOSE in response:
        return response
    if _opens_reasoning(prompt) and response.strip() == reasoning:
        return response
    if record.answer or record.finish_reason != "length":
        return join_reasoning(reasoning, record.answer or "")
    return f"{THINK_OPEN}\n{reasoning}"


def _opens_reasoning(prompt: str) -> bool:
    return prompt.rstrip().endswith(THINK_OPEN)


def _open_once(prompt: str, response: str) -> str:
    """The response with its think block opened exactly once, by the prompt or by the response."""
    stripped = response.lstrip()
    if _opens_reasoning(prompt):
        return stripped.removeprefix(THINK_OPEN).lstrip("\n") if stripped.startswith(THINK_OPEN) else response
    if THINK_CLOSE in response and THINK_OPEN not in response:
        return f"{THINK_OPEN}\n{response.lstrip(chr(10))}"
    return response
