"""What OpenAI's API is asked in a body, and what its answers say."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from potstill.core.alternatives import Alternatives
from potstill.data.chat import THINK_CLOSE, THINK_OPEN, Renderer
from potstill.data.responses import bytes_of_tokens, join_reasoning, without_half_characters
from potstill.teachers.probes import KNOWN_TEXT, PROBE_BEGINNING, PROBE_QUESTION
from potstill.teachers.protocol import Answer, Request, RequestError
from potstill.teachers.server_errors import ServerErrors

if TYPE_CHECKING:
    import httpx2

__all__ = ["ASK_IDS", "OWN_KEYS", "Completions", "mapping", "whole_number"]

OWN_KEYS = frozenset(
    {"model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed"}
    | {"logprobs", "top_logprobs", "n", "stream"}
)
# vLLM: of the sampled tokens, and in the place of the likeliest ones' texts. Others leave them unread or
# refuse them by name.
_ASK_IDS, _ASK_LIKELIEST_IDS = "return_token_ids", "return_tokens_as_token_ids"
ASK_IDS = (_ASK_IDS, _ASK_LIKELIEST_IDS)
_SEEDS = 2**31  # what every server takes
_PROBED_TOKENS = 5
_ID_MARK = "token_id:"  # how vLLM writes an id in the place of a token
_LONGEST_ID = 9  # digits
_NO_PROBABILITY = -9999.0  # vLLM writes it for minus infinity, which JSON has not
_FINISHED: dict[str, Literal["stop", "length"]] = {"stop": "stop", "eos": "stop", "end_turn": "stop"}
_FINISHED |= {"length": "length", "max_tokens": "length"}


class Completions:
    """Words requests for one model on one server and reads its answers; sends nothing.

    `extra_body` goes with every request. `served` renders as the server does, where its tokenizer is known.
    """

    def __init__(self, errors: ServerErrors, extra_body: Mapping[str, Any], served: Renderer | None) -> None:
        self._errors, self._extra_body, self._served = errors, extra_body, served
        # OpenAI's own reasoning models refuse the older name; many other servers know no other.
        own = urlsplit(errors.base_url).hostname == "api.openai.com"
        self._max_tokens = "max_completion_tokens" if own else "max_tokens"
        self._tokenizer_hash: str | None = None
        self._end_ids: frozenset[int] = frozenset()
        if served is not None:
            self._tokenizer_hash = served.tokenizer_hash
            self._end_ids = frozenset({*served.end_of_turn_ids, served.tokenizer.eos_token_id} - {None})

    def chat_body(self, request: Request, *, with_ids: bool) -> dict[str, Any]:
        """What /chat/completions is asked; `with_ids` asks vLLM for token ids.

        Raises RequestError where the server's chat template would change the beginning of the response.
        """
        body = {
            **self._extra_body,
            "model": self._errors.model,
            "messages": request.messages,
            "temperature": request.temperature,
            "top_p": request.top_p,
            self._max_tokens: request.max_new_tokens,
            "seed": request.seed % _SEEDS,
        }
        if request.prefix is not None:
            body["messages"] = self._with_prefix(request.messages, request.prefix)
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        if request.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": request.logprobs}
        if not with_ids:
            return body
        likeliest = request.logprobs is not None and request.logprobs > 1
        return {_ASK_IDS: True, **({_ASK_LIKELIEST_IDS: True} if likeliest else {}), **body}

    def _with_prefix(self, messages: list[dict[str, str]], prefix: str) -> list[dict[str, str]]:
        """The conversation with the beginning of the answer as its last message.

        Raises RequestError where the chat template would make another text of it: many drop a think block
        from an assistant's message, or close one that is still open.
        """
        if self._served is None:
            keeps = THINK_OPEN not in prefix and THINK_CLOSE not in prefix
            what = (
                "the beginning of the response has a think block, and the server's chat template is unknown"
            )
        else:
            keeps = self._served.keeps_beginning(messages, prefix)
            what = "the model's chat template changes the beginning of the response"
        if keeps:
            return [*messages, {"role": "assistant", "content": prefix}]
        raise RequestError(
            what,
            where=self._errors.base_url,
            blames_row=True,
            expected="a template that leaves an assistant's last message as it is",
            mend="state the model's `tokenizer`, so that this can be checked, or run the model in process",
        )

    def answer(
        self,
        response: "httpx2.Response",
        found: Mapping[str, Any],
        request: Request,
        *,
        repeats: bool = False,
    ) -> Answer:
        """The first choice of what /chat/completions answered; `found` is its JSON.

        `repeats` says that the server gives the beginning again before the rest, which is left out then.
        Raises RequestError where it is no whole response, or lacks log-probabilities that were asked for.
        """
        choice = self._choice(response, found)
        finish_reason = _FINISHED.get(str(choice.get("finish_reason")))
        if finish_reason is None:
            raise self._errors.unusable(
                f"the response ended by {choice.get('finish_reason')!r}, neither 'stop' nor 'length'",
                response,
                blames_row=True,
            )
        text, content, reasoning = self._text(response, choice, request, finish_reason, repeats=repeats)
        usage = mapping(found.get("usage"))
        ids, logprobs, written, entries = _tokens(choice, content, usage.get("completion_tokens"))
        if request.logprobs is not None and logprobs is None:
            raise self._errors.unusable(
                "the answer holds no log-probabilities, though they were asked for", response
            )
        alternatives = None
        if request.logprobs is not None and request.logprobs > 1:
            alternatives = _alternatives(entries, as_ids=ids is not None)
            if not alternatives.logprobs:
                raise self._errors.unusable(
                    "the answer holds no alternatives to its tokens, though they were asked for", response
                )
        if ids and ids[-1] in self._end_ids:
            ids.pop()
            logprobs = None if logprobs is None else logprobs[: len(ids)]
        placed, token_bytes = _placed(logprobs, written, text, content if reasoning and ids is None else "")
        if alternatives is not None and placed is not None and logprobs is not None:
            alternatives = alternatives.behind(len(placed) - len(logprobs))
        return Answer(
            response=text,
            finish_reason=finish_reason,
            prompt_token_ids=_whole_numbers(found.get("prompt_token_ids")),
            response_token_ids=ids,
            logprobs=placed,
            token_bytes=token_bytes,
            alternatives=alternatives,
            tokenizer=None if ids is None else self._tokenizer_hash,
            prompt_tokens=whole_number(usage.get("prompt_tokens")),
            response_tokens=whole_number(usage.get("completion_tokens")),
        )

    def _text(
        self,
        response: "httpx2.Response",
        choice: Mapping[str, Any],
        request: Request,
        finish_reason: str,
        *,
        repeats: bool,
    ) -> tuple[str, str, str]:
        """The raw response, and the parts that it came in: content and reasoning."""
        message = mapping(choice.get("message"))
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        content = message.get("content")
        if content is None and isinstance(reasoning, str):
            content = ""
        if not isinstance(content, str) or not isinstance(reasoning, str | None):
            raise self._errors.unusable("the answer holds no text", response, blames_row=True)
        content, reasoning = without_half_characters(content), without_half_characters(reasoning or "")
        text = join_reasoning(reasoning or None, content)
        if reasoning and not content and finish_reason == "length":
            text = text.rpartition(f"\n{THINK_CLOSE}")[0]  # cut off while it reasoned, the block is open
        if repeats and request.prefix is not None and text.startswith(request.prefix):
            text = text[len(request.prefix) :]
        elif reasoning and request.prefix is not None:
            if THINK_OPEN not in request.prefix or THINK_CLOSE in request.prefix:
                raise self._errors.unusable(
                    "the server began to reason anew instead of going on from the response's beginning",
                    response,
                    blames_row=True,
                )
            rest = text.removeprefix(f"{THINK_OPEN}\n{reasoning.strip()}")
            text = f"{reasoning}{rest}"  # the block was open; the next word may need the space before it
        return text, content, reasoning

    def first_token_body(self, temperature: float) -> dict[str, Any]:
        """What /chat/completions is asked for the likeliest tokens that a response begins with."""
        question = Request([{"role": "user", "content": PROBE_QUESTION}], logprobs=_PROBED_TOKENS)
        request = replace(question, temperature=temperature, max_new_tokens=1)
        return self.chat_body(request, with_ids=False)

    def first_token(self, found: Mapping[str, Any]) -> dict[str, float]:
        """The log-probabilities of those tokens, by what the server calls them; empty without any."""
        choices = found.get("choices")
        choice = mapping(choices[0]) if isinstance(choices, list) and choices else {}
        entries = mapping(choice.get("logprobs")).get("content")
        first = mapping(entries[0]) if isinstance(entries, list) and entries else {}
        likeliest = first.get("top_logprobs")
        return {
            str(one.get("id", one.get("bytes") or one.get("token"))): float(one["logprob"])
            for one in map(mapping, likeliest if isinstance(likeliest, list) else ())
            if isinstance(one.get("logprob"), int | float) and one["logprob"] > _NO_PROBABILITY
        }

    def continuation_body(self) -> dict[str, Any]:
        """What /chat/completions is asked to go on from a known beginning, by one token."""
        question = [{"role": "user", "content": PROBE_QUESTION}]
        request = Request(question, prefix=PROBE_BEGINNING, temperature=0.0, max_new_tokens=1)
        return self.chat_body(request, with_ids=False)

    def repeats(self, response: "httpx2.Response", found: Mapping[str, Any]) -> bool:
        """Whether what it answered begins with that beginning, as llama.cpp's server does."""
        content = mapping(self._choice(response, found).get("message")).get("content")
        return isinstance(content, str) and content.startswith(PROBE_BEGINNING)

    def known_text(self) -> list[int]:
        """A known text as the served model's token ids; only where its tokenizer is known."""
        assert self._served is not None
        ids: list[int] = self._served.tokenizer(KNOWN_TEXT, add_special_tokens=False)["input_ids"]
        return ids

    def prompt_logprobs_body(self, token_ids: Sequence[int], k: int) -> dict[str, Any]:
        """What /completions is asked for the k likeliest ids in each token's place."""
        return {
            **self._extra_body,
            "model": self._errors.model,
            "prompt": list(token_ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
        }

    def prompt_logprobs(
        self, response: "httpx2.Response", found: Mapping[str, Any], token_ids: Sequence[int], k: int
    ) -> list[dict[int, float]]:
        """Of each token but the first, the log-probabilities of at least the k likeliest ids and its own.

        Raises RequestError where the answer lacks any of them.
        """
        entries = self._choice(response, found).get("prompt_logprobs")
        if not isinstance(entries, list) or len(entries) != len(token_ids):
            raise RequestError(
                f"the answer holds no log-probabilities of the prompt's {len(token_ids)} tokens",
                where=self._errors.base_url,
                expected="a server with `prompt_logprobs` in /completions, such as vLLM",
                mend="serve the model by vLLM, or let transformers run it here",
            )
        return [self._of_token(entry, id_, k) for entry, id_ in zip(entries[1:], token_ids[1:], strict=True)]

    def _of_token(self, entry: Any, own_id: int, k: int) -> dict[int, float]:
        found = {
            int(id_): _log_probability(value["logprob"])
            for id_, value in mapping(entry).items()
            if id_.isdigit() and isinstance(mapping(value).get("logprob"), int | float)
        }
        if len(found) < k:
            raise RequestError(
                f"the answer has {len(found)} ids for a token, though {k} were asked for",
                where=self._errors.base_url,
                expected="a server that gives as many as it is asked for, or refuses, as vLLM does",
                mend="lower top_k, or serve the model by vLLM",
            )
        if own_id not in found:
            raise RequestError(
                f"the answer says nothing of id {own_id}, which stands in the prompt",
                where=self._errors.base_url,
                expected="each of the prompt's ids beside the likeliest ones, as vLLM gives it",
                mend="see that `tokenizer` is that of the model which is served",
            )
        return found

    def _choice(self, response: "httpx2.Response", found: Mapping[str, Any]) -> Mapping[str, Any]:
        choices = found.get("choices")
        if not isinstance(choices, list) or not choices:
            raise self._errors.unusable("the answer holds no choices", response)
        return mapping(choices[0])


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def whole_number(value: Any) -> int | None:
    """The value where it is a whole number, else None."""
    return value if type(value) is int else None


def _whole_numbers(value: Any) -> list[int] | None:
    return value if isinstance(value, list) and value and all(type(one) is int for one in value) else None


_Entries = list[Mapping[str, Any]]


def _tokens(
    choice: Mapping[str, Any], content: str, sampled: Any
) -> tuple[list[int] | None, list[float] | None, list[bytes], _Entries]:
    """Token ids where the server gives them (vLLM's token_ids, llama.cpp's ids), log-probabilities, bytes.

    And the entries that these are read from, the end of the turn's included. llama.cpp's entries leave out
    tokens that end inside a character: they are all ids only where they are as many as the tokens `sampled`.
    """
    ids = _whole_numbers(choice.get("token_ids"))
    stated = mapping(choice.get("logprobs"))
    entries, of_reasoning = stated.get("content"), stated.get("reasoning_content")  # the latter is DeepSeek's
    if not isinstance(entries, list):
        return ids, None, [], []
    entries = [mapping(one) for one in (*(of_reasoning if isinstance(of_reasoning, list) else ()), *entries)]
    logprobs = [one.get("logprob") for one in entries]
    if not all(isinstance(one, int | float) for one in logprobs):
        return ids, None, [], []
    if ids is None and len(entries) == sampled and entries and _own_id(entries[0]) is not None:
        ids = _whole_numbers([_own_id(one) for one in entries])
    written = [_written(one) for one in entries]
    if ids is not None:
        return ids, logprobs if len(ids) == len(logprobs) else None, written, entries
    if written and not content.encode().endswith(written[-1]):
        logprobs.pop()  # the end-of-turn token, which is no part of the text
    return None, logprobs, written, entries


def _alternatives(entries: _Entries, *, as_ids: bool) -> Alternatives:
    """The likeliest tokens of each entry: ids where they are wanted and all of them have one, else bytes."""
    likeliest = [_likeliest(entry) for entry in entries]
    if as_ids:
        ids = [[_own_id(one) for one in place] for place in likeliest]
        if all(id_ is not None for place in ids for id_ in place):
            return Alternatives.of(_pairs(ids, likeliest), as_ids=True)
    return Alternatives.of(
        _pairs([[_written(one) for one in place] for place in likeliest], likeliest), as_ids=False
    )


def _likeliest(entry: Mapping[str, Any]) -> _Entries:
    found = entry.get("top_logprobs")
    if not isinstance(found, list):
        return []
    return [one for one in found if isinstance(one, dict) and _is_known(one.get("logprob"))]


def _is_known(stated: Any) -> bool:
    return isinstance(stated, int | float) and not math.isnan(stated)


def _pairs(tokens: Sequence[Sequence[Any]], likeliest: Sequence[_Entries]) -> list[list[tuple[Any, float]]]:
    return [
        [(token, _log_probability(one["logprob"])) for token, one in zip(texts, place, strict=True)]
        for texts, place in zip(tokens, likeliest, strict=True)
    ]


def _log_probability(stated: float) -> float:
    return -math.inf if stated == _NO_PROBABILITY else float(stated)


def _own_id(entry: Mapping[str, Any]) -> int | None:
    """The id of an entry's token: llama.cpp gives it beside the token, vLLM in its place."""
    token, id_ = entry.get("token"), whole_number(entry.get("id"))
    if isinstance(token, str) and token.startswith(_ID_MARK):
        digits = token.removeprefix(_ID_MARK)
        id_ = int(digits) if digits.isdecimal() and len(digits) <= _LONGEST_ID else None
    return id_ if id_ is not None and 0 <= id_ < 10**_LONGEST_ID else None


def _placed(
    logprobs: list[float] | None, written: list[bytes], text: str, content: str
) -> tuple[list[float] | None, list[int] | None]:
    """Log-probabilities with the bytes of the text that each token stands for; None where nobody knows them.

    Where they are those of the text's last part alone, `content`, all that stands before it (the reasoning)
    is one token whose log-probability is not known.
    """
    if logprobs is None:
        return None, None
    written, content = written[: len(logprobs)], content.lstrip()
    sizes = bytes_of_tokens(written, text)
    if sizes is None and content and text.endswith(content):
        sizes = bytes_of_tokens(written, content)
        if sizes is not None:
            return [math.nan, *logprobs], [len(text.encode()) - sum(sizes), *sizes]
    return logprobs, sizes


def _written(entry: Mapping[str, Any]) -> bytes:
    """The bytes of a log-probability's token; its text stands for them where the server gives none."""
    found = entry.get("bytes")
    if isinstance(found, list):
        with suppress(TypeError, ValueError):  # no numbers, or none that a byte has
            return bytes(found)
    return without_half_characters(str(entry.get("token", ""))).encode()
