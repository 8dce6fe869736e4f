"""Parameter groups: which weights train at which rate, chosen by regular expressions over their names."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from potstill.core.errors import TrainingError
from potstill.train.settings import ParameterGroup

__all__ = ["GroupRow", "ParameterGroups"]

_NAMES_SHOWN = 3
_NUMBER = re.compile(r"\.\d+\.")
_OTHERS = "(all others)"


@dataclass(frozen=True)
class GroupRow:
    """A line of the table: what a pattern got. `lr` is the rate at the schedule's peak, 0 for frozen."""

    match: str
    tensors: int
    parameters: int
    lr: float
    weight_decay: float


class ParameterGroups:
    """The trained weights of a model by group: in order, the first pattern that `re.search` finds wins.

    Names are those of the model's own `named_parameters()`; only weights that train are looked at, so that a
    model's adapter can be divided while its base stays frozen. What no pattern matches trains at `lr` itself.
    A multiplier of 0 freezes (`requires_grad` off: no gradient, no optimiser state). Weight decay never
    applies to tensors of one dimension, biases and norms. Raises TrainingError for a pattern that gets
    nothing, and where nothing is left to train.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[ParameterGroup], lr: float, weight_decay: float
    ) -> None:
        self._model = model
        names = [name for name, one in model.named_parameters() if one.requires_grad]
        patterns = [re.compile(group.match) for group in groups]
        first = {
            name: next((i for i, pattern in enumerate(patterns) if pattern.search(name)), None)
            for name in names
        }
        for number, group in enumerate(groups):
            if number not in first.values():
                raise _gets_nothing(model, group, names)
        # For each trained tensor its line of the table: pattern, rate, and decay.
        self._lines: dict[str, tuple[str, float, float]] = {}
        frozen: dict[str, list[nn.Parameter]] = {}
        for name, one in model.named_parameters():
            if not one.requires_grad:
                continue
            place = first[name]
            group = ParameterGroup(match=_OTHERS) if place is None else groups[place]
            if group.lr_multiplier == 0:
                one.requires_grad = False
                frozen.setdefault(group.match, []).append(one)
                continue
            decay = weight_decay if group.weight_decay is None else group.weight_decay
            self._lines[name] = (group.match, lr * group.lr_multiplier, 0.0 if one.ndim < 2 else decay)
        if not self._lines:
            raise TrainingError(
                "every weight is frozen: there is nothing to train",
                expected="at least one weight with a learning rate above 0",
                mend="leave a group out, or give one an lr_multiplier above 0",
            )
        order = [*(group.match for group in groups), _OTHERS]
        rows = [GroupRow(match, len(some), _count(some), 0.0, 0.0) for match, some in frozen.items()]
        rows += [
            GroupRow(match, len(some), _count(some), rate, decay)
            for (match, rate, decay), some in self._by_line().items()
        ]
        self.table = sorted(rows, key=lambda row: order.index(row.match))

    def _by_line(self) -> dict[tuple[str, float, float], list[nn.Parameter]]:
        found: dict[tuple[str, float, float], list[nn.Parameter]] = {}
        for name, one in self._model.named_parameters():
            if name in self._lines:
                found.setdefault(self._lines[name], []).append(one)
        return found

    def for_optimiser(self) -> list[dict[str, Any]]:
        """The groups as torch's optimisers take them."""
        # By name and not by the tensors of the beginning: sharding a model puts others in their place.
        return [
            {"params": some, "lr": rate, "weight_decay": decay}
            for (_, rate, decay), some in self._by_line().items()
        ]

    def as_json(self) -> list[dict[str, Any]]:
        """The table for a manifest."""
        return [asdict(row) for row in self.table]

    def as_text(self) -> list[str]:
        """The table for a terminal."""
        head = ("match", "tensors", "parameters", "lr", "weight decay")
        body = [
            (
                row.match,
                f"{row.tensors:,}",
                f"{row.parameters:,}",
                f"{row.lr:g}" if row.lr else "frozen",
                f"{row.weight_decay:g}",
            )
            for row in self.table
        ]
        widths = [max(len(row[column]) for row in (head, *body)) for column in range(len(head))]
        return [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (head, *body)
        ]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(one.numel() for one in parameters)


def _gets_nothing(model: nn.Module, group: ParameterGroup, names: list[str]) -> TrainingError:
    """Why a pattern gets nothing: taken by earlier ones, frozen, tied, or of no weight at all."""
    pattern = re.compile(group.match)
    if taken := [name for name in names if pattern.search(name)]:
        what = f"earlier patterns take all it matches, {_some(taken)}"
    elif frozen := [name for name, _ in model.named_parameters() if pattern.search(name)]:
        what = f"it matches only weights that are frozen already, {_some(frozen)}"
    elif tied := [name for name, _ in model.named_parameters(remove_duplicate=False) if pattern.search(name)]:
        same = {id(one): name for name, one in model.named_parameters()}
        owner = same[id(model.get_parameter(tied[0]))]
        what = f"{tied[0]} is tied to {owner}, which is the name that counts"
    else:
        what = "it matches no weight"
    # The same tensor of every layer is one name here.
    kinds = sorted({_NUMBER.sub(".0.", name) for name in names})
    plain = re.sub(r"[\\^$()\[\]?*+|]", "", group.match)
    near = sorted(kinds, key=lambda name: -_likeness(plain, name))
    return TrainingError(
        f"groups: the pattern {group.match!r} gets nothing: {what}",
        expected="a regular expression that re.search finds in the names of trained weights",
        mend=f"names near it: {', '.join(near[:_NAMES_SHOWN])}",
    )


def _likeness(plain: str, name: str) -> float:
    return max(difflib.SequenceMatcher(None, plain, part).ratio() for part in (name, *name.split(".")))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
