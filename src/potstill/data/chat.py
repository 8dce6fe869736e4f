"""Rendering: records to token ids and loss masks, and a response's reasoning apart from its answer."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from potstill.core.errors import DataError, ModelError
from potstill.core.records import Record
from potstill.models import template_hash, token_bytes, tokenizer_hash

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

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_SENTINEL = "POTSTILL7319SENTINEL"
_OPEN_THOUGHTS = re.compile(r"<\|(begin|end)_of_(thought|solution)\|>")


def tag_reasoning(text: str) -> str:
    """`text` without OpenThoughts' four marks: the thought stands in <think> tags, the solution after it."""
    if not _OPEN_THOUGHTS.search(text):
        return text
    before, opened, rest = text.partition("<|begin_of_thought|>")
    thought, closed, answer = (rest if opened else before).partition("<|end_of_thought|>")
    if not closed and not opened:
        return _OPEN_THOUGHTS.sub("", text).strip()
    reasoning = f"{THINK_OPEN}\n{_OPEN_THOUGHTS.sub('', thought).strip()}"
    if not closed:
        return reasoning
    return f"{reasoning}\n{THINK_CLOSE}\n\n{_OPEN_THOUGHTS.sub('', answer).strip()}".rstrip()


def split_reasoning(text: str) -> tuple[str | None, str]:
    """The reasoning and the answer of a response: (None, text) where there is no think block.

    A text that starts inside the block (the template's generation prompt opened it) has only the closing tag;
    a text cut off inside the block has only the opening one, and its answer is empty.
    """
    text = tag_reasoning(text)
    before, opened, rest = text.partition(THINK_OPEN)
    if not opened or THINK_CLOSE in before:
        before, rest = "", text
    reasoning, closed, answer = rest.partition(THINK_CLOSE)
    if not opened and not closed:
        return None, text
    return reasoning.strip(), f"{before.strip()}\n{answer.strip()}".strip()


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

    The tokenizer must stay as it is: what derives from it is computed once, here. It needs a chat template,
    which `potstill.models.load_tokenizer` sees to. Raises ModelError without one or without an end-of-turn.
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
        self.end_of_turn_ids = self._derive_end_of_turn()
        self._stop_ids = {*self.end_of_turn_ids, tokenizer.eos_token_id}

    def prompt_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation by the chat template, up to and with the generation prompt."""
        return self._apply_template(messages, add_generation_prompt=True)

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of `prompt_text`; special tokens are those that the template writes, none is added."""
        return self._encode(self.prompt_text(messages))

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

    def keeps_beginning(self, messages: Sequence[Mapping[str, str]], beginning: str) -> bool:
        """Whether the template leaves the beginning of a response as it is in an unfinished last message.

        That is how a server is asked to go on from it; many templates drop or close a think block there.
        """
        from jinja2 import TemplateError

        prefilled = [*map(dict, messages), {"role": "assistant", "content": beginning}]
        try:
            found: Any = self.tokenizer.apply_chat_template(
                prefilled, tokenize=False, continue_final_message=True
            )
        except (TemplateError, ValueError):
            return False
        return bool(found == self.prompt_text(messages) + beginning)

    def owns(self, record: Record) -> bool:
        """Whether the record's token ids are this tokenizer's, behind a prompt of this chat template."""
        template = record.sampling.get("template", self.template_hash)
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
        except DataError as error:
            raise DataError(error.what, where=_where(record, row_number), mend=error.mend) from error
        prompt_ids = self._encode(prompt)
        if own and record.response_token_ids is not None:
            return prompt_ids, record.response_token_ids, record.prefix_tokens
        response = record.response or ""
        opened = _open_once(prompt, response)
        response_ids = self._continuation(prompt, prompt_ids, opened)
        if not record.prefix_characters:
            return prompt_ids, response_ids, 0
        prefix = opened[: len(opened) - (len(response) - record.prefix_characters)]
        # A token that reaches over the end of the prefix is another one in the prefix alone.
        pairs = zip(response_ids, self._continuation(prompt, prompt_ids, prefix), strict=False)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        return prompt_ids, response_ids, sum(1 for _ in same)

    def _plain_text(self, record: Record) -> tuple[list[int], list[int]]:
        beginning = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        if record.tokenizer == self.tokenizer_hash and record.response_token_ids is not None:
            return beginning, record.response_token_ids
        return beginning, self._encode(record.response or "")

    def _continuation(self, prompt: str, prompt_ids: list[int], response: str) -> list[int]:
        # Encoded alone, a SentencePiece tokenizer would put a space before the first word.
        if not response.strip():
            return []
        joint = self._encode(prompt + response)
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        return self._encode(response)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _apply_template(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: Any = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the model's chat template refuses this conversation ({roles}): {error}",
                mend="leave out `system` if the template knows no such role, or name another `chat_template`",
            ) from error
        return str(text)

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
