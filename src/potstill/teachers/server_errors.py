"""What a server's failures mean: which may pass, which concern one prompt, which end the work."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from potstill.core.errors import EngineError
from potstill.core.events import format_seconds
from potstill.data.responses import without_half_characters
from potstill.teachers.pace import Failure, GivenUp
from potstill.teachers.protocol import RequestError, Usage

if TYPE_CHECKING:
    import httpx2
    from pydantic import SecretStr

__all__ = ["MayPass", "ServerErrors", "retry_after_s"]

_LONGEST_RETRY_AFTER_S = 600.0
_SHOWN_CHARACTERS = 300
_REFUSALS = (429, 503, 529)  # nothing was begun: too many requests, unavailable, overloaded


class MayPass(Exception):
    """A failure worth another try: the error to raise in the end, and how long the server asks to wait."""

    def __init__(
        self, error: RequestError, failure: Failure = "failed", retry_after_s: float | None = None
    ) -> None:
        super().__init__(error.what)
        self.error, self.failure, self.retry_after_s = error, failure, retry_after_s


@dataclass(frozen=True)
class ServerErrors:
    """The errors of one server, worded for its user; `key` is kept out of every text."""

    base_url: str
    model: str
    api_key_env: str | None
    key: "SecretStr | None"

    def unanswered(self, error: Exception) -> RequestError:
        """The request got no answer: refused, timed out or broken off."""
        detail = self._shown(str(error) or type(error).__name__)
        return RequestError(
            f"no answer from the server ({detail})",
            where=self.base_url,
            expected="a running OpenAI-compatible server",
            mend="check server, base_url and network; a slow one needs more timeout_s or less concurrency",
        )

    def unreachable(self, error: Exception) -> EngineError:
        """The server was never reached."""
        known = self.unanswered(error)
        what = known.what.replace("no answer from the server", "the server cannot be reached")
        return EngineError(
            what, where=known.where, expected=known.expected, mend="start the server, or check base_url"
        )

    def outage(self, last: RequestError | None, given_up: GivenUp) -> EngineError:
        """The server has failed every request for too long."""
        reason = "" if last is None else f", the last with: {last.what}"
        return EngineError(
            f"{given_up.failures} requests in a row failed in {format_seconds(given_up.seconds)}{reason}",
            where=self.base_url,
            expected="a server that answers again within the model's patience_s",
            mend="look at the server's log, then run again: answers are kept, only what is missing is asked",
        )

    def late(self, timeout_s: float) -> RequestError:
        """The answer was not whole in time."""
        return RequestError(
            f"no whole answer within {timeout_s:g} s",
            where=self.base_url,
            mend="raise the model's timeout_s, or lower its concurrency or max_new_tokens",
        )

    def refusal(self, response: "httpx2.Response") -> EngineError | MayPass:
        """The error for an HTTP status other than 200."""
        status, reason = response.status_code, self._reason(response)
        what = f"HTTP {status}: {reason}"
        if status in (401, 403):
            name = self.api_key_env
            mend = (
                "name the variable that holds the key in api_key_env"
                if name is None
                else f"check the key in {name}"
            )
            return EngineError(
                f"the server refuses the key ({what})",
                where=self.base_url,
                expected="a valid API key",
                mend=mend,
            )
        if status == 402 or "insufficient_quota" in reason:
            return EngineError(
                f"the account has no credit left ({what})",
                where=self.base_url,
                mend="add credit, then run again",
            )
        if status in (404, 405) or 300 <= status < 400:
            return EngineError(
                f"the server has no such model or address ({what})",
                where=str(response.url),
                expected=f"a server that serves the model {self.model!r} there",
                mend="check `model`, and that base_url ends where the API begins, usually in /v1",
            )
        if status in (408, 425, 429) or status >= 500:
            refused = status in _REFUSALS
            mend = "run again later" if refused else "look at the server's log, then run again"
            asked_s = retry_after_s(response.headers)
            if asked_s is not None and asked_s > _LONGEST_RETRY_AFTER_S:
                what += f"; it asks to wait {asked_s:.0f} s"
                return RequestError(what, status=status, where=self.base_url, mend="wait, then run again")
            error = RequestError(what, status=status, where=self.base_url, mend=mend)
            return MayPass(error, "refused" if refused else "failed", asked_s)
        mend = "look at the prompt and the step's settings"
        if "logprobs" in reason:
            asked = "logprobs" if response.url.path.endswith("/chat/completions") else "top_k"
            mend = f"serve with --max-logprobs of at least {asked} (vLLM's default is 20), or lower {asked}"
        return RequestError(what, status=status, blames_row=True, where=self.base_url, mend=mend)

    def unusable(self, what: str, response: "httpx2.Response", *, blames_row: bool = False) -> RequestError:
        """The server answered with something that is no response."""
        return RequestError(
            f"{what}: {self._shown(response.text)}",
            status=response.status_code,
            blames_row=blames_row,
            usage=_usage(response),
            where=self.base_url,
            expected=f"what OpenAI's API answers at {response.url.path}",
            mend="check that base_url leads to an OpenAI-compatible API (it usually ends in /v1)",
        )

    def _reason(self, response: "httpx2.Response") -> str:
        try:
            found = response.json()
        except (ValueError, RecursionError):
            return self._shown(response.text) or response.reason_phrase
        error = found.get("error", found) if isinstance(found, dict) else found
        if isinstance(error, dict):  # `detail` is FastAPI's, of which transformers' server is made
            parts = [error.get("message", error.get("detail")), error.get("code")]
        else:
            parts = [error]
        return self._shown(", ".join(str(part) for part in parts if part)) or response.reason_phrase

    def _shown(self, text: str) -> str:
        """A text from outside as one short line, without the key."""
        if self.key is not None:
            text = text.replace(self.key.get_secret_value(), "[the API key]")
        text = without_half_characters(" ".join(text.split()))
        return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _usage(response: "httpx2.Response") -> Usage:
    """The tokens that an answer counts, usable or not."""
    try:
        counts = response.json()["usage"]
        prompt, written = (counts.get(name) for name in ("prompt_tokens", "completion_tokens"))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return Usage()
    return Usage(prompt if type(prompt) is int else None, written if type(written) is int else None)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; None where there is none."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
