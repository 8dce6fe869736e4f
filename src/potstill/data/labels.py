"""Labels of rows: stated, looked up by another column's value, or predicted from the prompt."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from potstill.core.errors import DataError
from potstill.core.hashing import derive_seed, hash_json
from potstill.core.records import Record
from potstill.core.settings import meaning
from potstill.core.step import StepContext
from potstill.data.category_maps import read_category_map
from potstill.data.classifier import MOST_ROWS, TextClassifier, fit_classifier
from potstill.data.shapes import BadRow, Example
from potstill.data.source_settings import Label, LearnedLabel, MappedLabel, Source

__all__ = ["Labels"]

# What was learnt, by what it was learnt from: several steps read the same source.
_LEARNT: dict[str, TextClassifier] = {}


class Labels:
    """The labels of one source's rows."""

    def __init__(
        self,
        labels: Mapping[str, Label],
        context: StepContext,
        read_source: Callable[[Source, StepContext], Iterable[Record]],
    ) -> None:
        self._labels = labels
        self._maps = {
            name: read_category_map(Path(label.file))
            for name, label in labels.items()
            if isinstance(label, MappedLabel)
        }
        self._classifiers = {
            name: _learn(name, label, context, read_source)
            for name, label in labels.items()
            if isinstance(label, LearnedLabel)
        }
        self._confidences: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._unsure: Counter[str] = Counter()

    def of(self, columns: Mapping[str, Any], example: Callable[[], Example]) -> dict[str, Any]:
        """A row's labels, and how sure predicted ones are; `example` is asked where a prompt is needed.

        BadRow where a value that is looked up stands in no map.
        """
        found: dict[str, Any] = {}
        for name, label in self._labels.items():
            if isinstance(label, MappedLabel):
                found[name] = self._mapped(name, label, columns)
            elif isinstance(label, LearnedLabel):
                if not str(columns.get(name) or "").strip():
                    found |= self._predicted(name, label, example())
            else:
                found[name] = label
        return found

    def _mapped(self, name: str, label: MappedLabel, columns: Mapping[str, Any]) -> str:
        value = str(columns.get(label.column, "")).strip()
        if value not in self._maps[name]:
            raise BadRow(f"{label.column} is {value!r}, which {Path(label.file).name} gives no {name}")
        return self._maps[name][value]

    def _predicted(self, name: str, label: LearnedLabel, example: Example) -> dict[str, Any]:
        text = example.messages[-1]["content"] if example.messages else example.response or ""
        [(predicted, confidence)] = self._classifiers[name].predict([text])
        if confidence < label.min_confidence:
            self._unsure[name] += 1
            return {}
        self._confidences[name][predicted].append(confidence)
        return {name: predicted, f"{name}_confidence": round(confidence, 4)}

    def say(self, where: str, context: StepContext) -> None:
        """Say and record as an event how many rows got which predicted label, and how sure it is."""
        for name in self._classifiers:
            found = {
                value: (len(sure), sum(sure) / len(sure))
                for value, sure in sorted(self._confidences[name].items())
            }
            parts = [f"{value} {count:,} (confidence {sure:.2f})" for value, (count, sure) in found.items()]
            if self._unsure[name]:
                parts.append(f"too unsure {self._unsure[name]:,}")
            if parts:
                context.say(f"{where}: {name} predicted: {', '.join(parts)}")
            context.event(
                "labels_predicted",
                source=where,
                label=name,
                rows={value: count for value, (count, _) in found.items()},
                confidence={value: sure for value, (_, sure) in found.items()},
                unsure=self._unsure[name],
            )


def _learn(
    name: str,
    label: LearnedLabel,
    context: StepContext,
    read_source: Callable[[Source, StepContext], Iterable[Record]],
) -> TextClassifier:
    key = hash_json([name, meaning(label.like), context.seed])
    if key not in _LEARNT:
        labelled = (
            (derive_seed(context.seed, "labels", record.id), value, record)
            for record in read_source(label.like, context)
            if (value := str(record.meta.get(name) or "").strip())
        )
        # By chance rather than the first ones, as files are often sorted by the very label.
        chosen = heapq.nsmallest(MOST_ROWS, labelled, key=itemgetter(0))
        if not chosen:
            raise DataError(
                f"no row has a {name} that could be learnt",
                where=label.like.label,
                expected=f"a column {name!r} with short values, or `labels` that make one",
            )
        texts = [one.messages[-1]["content"] if one.messages else one.response or "" for _, _, one in chosen]
        _LEARNT[key] = fit_classifier(texts, [value for _, value, _ in chosen])
    made = _LEARNT[key]
    if (trial := made.trial) is not None:
        context.say(
            f"{name} is learnt from {label.like.label}: right for {trial.accuracy:.0%} of {trial.rows:,} "
            f"labelled rows that were left out, at a mean confidence of {trial.confidence:.2f}"
        )
        context.event("labels_learnt", label=name, **trial._asdict())
    return made
