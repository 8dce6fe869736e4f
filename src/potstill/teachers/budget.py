"""What a step has bought, what it may buy, and what the rest will cost."""

import math
from dataclasses import dataclass

from potstill.core.errors import BudgetError
from potstill.teachers.openai import Price
from potstill.teachers.protocol import Usage
from potstill.teachers.request_store import Bought

__all__ = ["Budget"]

_ROUNDING = 1e-6


@dataclass(slots=True)
class _Limit:
    """One bound: the most that may be spent, what is spent, and on how many answers."""

    most: float
    spent: float
    answers: int
    squares: float  # sum over the answers of what each cost, squared

    def add(self, amount: float) -> None:
        self.spent, self.squares, self.answers = (
            self.spent + amount,
            self.squares + amount**2,
            self.answers + 1,
        )

    @property
    def each(self) -> float:
        """What an answer is expected to cost at most: the mean and one standard deviation."""
        if not self.answers:
            return 0.0
        mean = self.spent / self.answers
        return mean + math.sqrt(max(0.0, self.squares / self.answers - mean**2))

    def places(self) -> float:
        rest = self.most - self.spent
        if rest <= 0:
            return 0
        affordable = rest / self.each * (1 + _ROUNDING) if self.each else math.inf
        return min(affordable, 2 * self.answers + 1)


class Budget:
    """Counts what was bought, over all runs of a step, against `max_cost` (dollars) and `max_tokens`.

    Tokens are a prompt's and a response's together. Once the next answer would pass a bound at the mean and a
    standard deviation of those before, none is asked any more. While few are known, only about twice as many
    are under way at once, so that one whose cost is unknown cannot be bought many times over.
    """

    def __init__(
        self, bought: Bought, *, price: Price | None, max_cost: float | None, max_tokens: int | None
    ) -> None:
        self.answers = bought.answers
        self.prompt_tokens, self.response_tokens = bought.prompt_tokens, bought.response_tokens
        self.price, self._max_cost, self._max_tokens = price, max_cost, max_tokens
        bounds = [("cost", max_cost, self.cost or 0.0), ("tokens", max_tokens, float(self.tokens))]
        self._limits = {
            name: _Limit(most, spent, self.answers, spent**2 / max(1, self.answers))
            for name, most, spent in bounds
            if most is not None
        }

    @property
    def tokens(self) -> int:
        """Tokens bought, of prompts and responses."""
        return self.prompt_tokens + self.response_tokens

    @property
    def cost(self) -> float | None:
        """Dollars spent; None without a price."""
        return None if self.price is None else self.price.cost(self.prompt_tokens, self.response_tokens)

    def projected(self, left: int) -> float | None:
        """Dollars in the end, when `left` more answers cost what those so far did; None where unknown."""
        if self.cost is None or not self.answers:
            return None
        return self.cost * (1 + left / self.answers)

    def count(self, usage: Usage) -> None:
        """Take in one answer. Raises BudgetError where its tokens are unknown and a bound is to be kept."""
        if usage.prompt_tokens is None or usage.response_tokens is None:
            if self._limits:
                raise BudgetError(
                    "the engine does not say how many tokens an answer took, so no budget can be kept",
                    expected="`usage` in every answer",
                    mend="leave out max_cost and max_tokens; `limit` and `max_new_tokens` bound a step too",
                )
            return
        self.answers += 1
        self.prompt_tokens += usage.prompt_tokens
        self.response_tokens += usage.response_tokens
        if "cost" in self._limits and self.price is not None:
            self._limits["cost"].add(self.price.cost(usage.prompt_tokens, usage.response_tokens))
        if "tokens" in self._limits:
            self._limits["tokens"].add(usage.prompt_tokens + usage.response_tokens)

    def places(self, wanted: int) -> int:
        """How many requests may be under way at once, `wanted` at most; 0 when the budget is used up."""
        return int(min([wanted, *(limit.places() for limit in self._limits.values())]))

    def figures(self, left: int) -> dict[str, str]:
        """Tokens and cost so far and in the end, for the line that shows progress."""
        shown = {"tokens": f"{self.tokens:,}"}
        if self._max_tokens is not None:
            shown["tokens"] += f"/{self._max_tokens:,}"
        if self.cost is not None:
            shown["spent"] = _dollars(self.cost)
            if self._max_cost is not None:
                shown["spent"] += f"/{_dollars(self._max_cost)}"
            if (projected := self.projected(left)) is not None:
                shown["projected"] = _dollars(projected)
        return shown

    def totals(self) -> dict[str, float]:
        """What was bought, for events and reports; nothing where the engine counts no tokens."""
        if not self.answers:
            return {}
        found: dict[str, float] = {
            "answers": self.answers,
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.response_tokens,
        }
        return found if self.cost is None else {**found, "cost_usd": round(self.cost, 6)}

    def used_up(self, left: int, *, where: str, kept: str) -> BudgetError:
        """The error when the budget ends before the requests do; `kept` says what stays."""
        spent = f"{self.tokens:,} tokens" if self.cost is None else _dollars(self.cost)
        bounds = [] if self._max_cost is None else [f"max_cost {_dollars(self._max_cost)}"]
        bounds += [] if self._max_tokens is None else [f"max_tokens {self._max_tokens:,}"]
        needed = f"about {round(self.tokens * (1 + left / max(1, self.answers))):,} tokens"
        if (projected := self.projected(left)) is not None:
            needed += f", {_dollars(projected)}"
        return BudgetError(
            f"the budget is used up: {spent} bought, {left:,} requests are left",
            where=where,
            expected=" and ".join(bounds),
            mend=f"raise it ({needed} in all should do) and run again. {kept}",
        )


def _dollars(amount: float) -> str:
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.4f}"
