"""The graph of steps: references resolved to steps and models, in the order they run."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from potstill.core.errors import RecipeError
from potstill.core.settings import DataRef, ModelRef, ModelsRef, Reference, Settings, references

__all__ = ["VIEWS", "Graph", "Node", "nearest"]

VIEWS = ("prompts", "held_out")
_MODEL_MAKERS = frozenset({"init", "train", "merge"})
_DATA_MAKERS = frozenset({"generate", "select", "cache", "retrieve"})
_EPOCH = re.compile(r"epoch[1-9]\d*")
_INSTANCE = re.compile(r"(?P<base>[^\[\]]+)\[(?P<values>[^\[\]]*)\]")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known name, or all of them when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else "none is declared"


@dataclass(frozen=True)
class Node:
    """One step to run: its settings, and the `each` values that made it out of the step it is declared as."""

    name: str
    base: str
    kind: str
    settings: Settings
    values: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True)
class Graph:
    """Steps and declared models; RecipeError where a reference leads nowhere or round in a circle."""

    nodes: Mapping[str, Node]
    models: Mapping[str, Settings]

    def __post_init__(self) -> None:
        _ = self.order

    def steps_named(self, reference: Reference, consumer: Node) -> list[Node]:
        """The steps a reference means to a consumer: its own `each` value where both have it, else all."""
        target = reference.target
        if target in self.nodes:
            return [self.nodes[target]]
        match = _INSTANCE.fullmatch(target)
        base = match["base"] if match else target
        instances = [node for node in self.nodes.values() if node.base == base and node.values]
        if match:
            wanted = [value.strip() for value in match["values"].split(",")]
            instances = [node for node in instances if list(node.values.values()) == wanted]
        else:
            instances = [
                node
                for node in instances
                if all(
                    node.values[key] == consumer.values[key]
                    for key in node.values.keys() & consumer.values.keys()
                )
            ]
        if instances:
            return instances
        known = {*self.nodes, *(node.base for node in self.nodes.values()), *self.models}
        raise RecipeError(
            f"{consumer.name!r} refers to {str(reference)!r}, which is neither a step nor a declared model",
            where=consumer.origin or None,
            expected="the name of a step or model of this recipe, or a path or hub id with a '/'",
            mend=nearest(target, known),
        )

    def needs_of(self, node: Node) -> list[tuple[Reference, list[Node]]]:
        """Each reference of a step and the steps it leads to (none for a path or a declared model)."""
        return [(ref, self._lead(node, ".".join(path), ref)) for path, ref in references(node.settings)]

    def _lead(self, node: Node, key: str, reference: Reference) -> list[Node]:
        if reference.is_path:
            return []
        where = f"{node.origin or 'recipe'} ({node.name}.{key})"
        if isinstance(reference, ModelRef):
            self._check_epoch(node, reference, where)
        elif reference.view is not None and reference.view not in VIEWS:
            raise RecipeError(
                f"{str(reference)!r} asks for the view {reference.view!r}",
                where=where,
                expected=f"one of the views {', '.join(VIEWS)}",
                mend=nearest(reference.view, VIEWS),
            )
        if isinstance(reference, ModelRef) and reference.target in self.models:
            return []
        found = self.steps_named(reference, node)
        makers = _MODEL_MAKERS if isinstance(reference, ModelRef) else _DATA_MAKERS
        for step in found:
            if step.kind not in makers:
                wanted = "a model" if isinstance(reference, ModelRef) else "prompts, traces or logits"
                raise RecipeError(
                    f"{key} wants {wanted}, and {step.name!r} is a step of kind {step.kind}",
                    where=where,
                    expected=f"a step of kind {' or '.join(sorted(makers))}"
                    + (" or a declared model" if isinstance(reference, ModelRef) else ""),
                )
        if len(found) > 1 and not isinstance(reference, DataRef | ModelsRef):
            raise RecipeError(
                f"{key}: {str(reference)!r} means several models: {', '.join(one.name for one in found)}",
                where=where,
                expected="one model",
                mend=f"name one, such as {found[0].name!r}, or give this step the same each:",
            )
        return found

    def _check_epoch(self, node: Node, reference: ModelRef, where: str) -> None:
        """Refuse a view of a model that is not one epoch of a train step that keeps it."""
        if reference.view is None:
            return
        asked = f"{str(reference)!r} asks for the view {reference.view!r}"
        expected = "student:epoch1, say, of a train step with keep_epochs"
        if not _EPOCH.fullmatch(reference.view):
            raise RecipeError(f"{asked} of a model", where=where, expected=expected)
        if reference.target in self.models:
            raise RecipeError(f"{asked}, and a declared model has none", where=where, expected=expected)
        for step in self.steps_named(reference, node):
            refuses = getattr(step.settings, "refuses_view", None)
            reason = f"a step of kind {step.kind} has none" if refuses is None else refuses(reference.view)
            if reason is not None:
                raise RecipeError(f"{asked} of {step.name!r}, and {reason}", where=where, expected=expected)

    @cached_property
    def needs(self) -> dict[str, list[str]]:
        """The steps each step needs, by name, in order of appearance."""
        return {
            node.name: list(dict.fromkeys(step.name for _, steps in self.needs_of(node) for step in steps))
            for node in self.nodes.values()
        }

    @cached_property
    def order(self) -> list[str]:
        """Step names, every one behind what it needs, otherwise as declared."""
        done: list[str] = []
        trail: list[str] = []

        def visit(name: str) -> None:
            if name in done:
                return
            if name in trail:
                circle = " -> ".join([*trail[trail.index(name) :], name])
                raise RecipeError(
                    f"the steps go round in a circle: {circle}",
                    where=self.nodes[name].origin or None,
                    expected="steps that only need earlier ones",
                    mend="point one of these references at another step",
                )
            trail.append(name)
            for need in self.needs[name]:
                visit(need)
            trail.pop()
            done.append(name)

        for name in self.nodes:
            visit(name)
        return done

    def ancestors(self, name: str) -> set[str]:
        """Every step that a step needs, directly or through others."""
        direct = self.needs[name]
        return set(direct).union(*(self.ancestors(need) for need in direct))
