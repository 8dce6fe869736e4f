"""Fingerprints: what a step means, with the content of its inputs in the place of their names."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from potstill.cache import CacheSettings
from potstill.core.errors import PotstillError, RecipeError
from potstill.core.hashing import hash_json
from potstill.core.settings import ModelRef, ModelsRef, Part, Reference, Settings, meaning, references
from potstill.core.store import MANIFEST_FILE, Artifact
from potstill.data.parts import part_content
from potstill.data.source_settings import StepPart, source_of_path
from potstill.models import TransformersModel, parameter_count
from potstill.pipeline.graph import Graph, Node

__all__ = ["Inputs", "MissingInput"]


class MissingInput(Exception):
    """An input step has not been made yet, so what depends on it has no fingerprint."""

    def __init__(self, step: str) -> None:
        super().__init__(step)
        self.step = step


class Inputs:
    """What a step's references lead to, given the artifacts made so far (by step name)."""

    def __init__(self, graph: Graph, node: Node, made: Mapping[str, Artifact]) -> None:
        self.graph, self.node, self.made = graph, node, made

    def artifacts(self, reference: Reference) -> list[tuple[Artifact, str | None]]:
        """The artifacts of a data reference, each with its view; MissingInput where one is not made yet."""
        if reference.is_path:
            return [(Artifact.open(Path(reference)), None)]
        return [
            (self._made(step.name), reference.view) for step in self.graph.steps_named(reference, self.node)
        ]

    def model(self, reference: ModelRef) -> Settings:
        """The settings of the model a reference names; of several the first's."""
        return next(iter(self.models(reference).values()))

    def models(self, reference: ModelRef) -> dict[str, Settings]:
        """The settings of the models a reference names, each by its step's name, its own or its path."""
        if reference.is_path:
            return {str(reference): TransformersModel(path=str(reference))}
        if reference.target in self.graph.models:
            return {reference.target: self.graph.models[reference.target]}
        found: dict[str, Settings] = {}
        for step, artifact in self._made_models(reference).items():
            folder = artifact.folder if reference.view is None else artifact.folder / reference.view
            quantize = artifact.manifest.extra.get("quantize")
            found[step] = TransformersModel(path=str(folder), quantize=quantize)
        return found

    def _made_models(self, reference: ModelRef) -> dict[str, Artifact]:
        found = {}
        for step in self.graph.steps_named(reference, self.node):
            artifact = found[step.name] = self._made(step.name)
            if reference.view is not None and reference.view not in artifact.views:
                raise RecipeError(
                    f"{self.node.name} wants {str(reference)!r}, and {step.name} kept no such epoch",
                    where=f"step {self.node.name}",
                    expected=", ".join(artifact.views) or "an epoch that training came to",
                    mend=f"name another, or {step.name} itself",
                )
        return found

    def _made(self, step: str) -> Artifact:
        if step not in self.made:
            raise MissingInput(step)
        return self.made[step]

    def identify(self, reference: Reference | Part) -> Any:
        """What stands for a reference in a fingerprint: the content it leads to."""
        if isinstance(reference, StepPart):
            # By its rows: what else the step holds, and the step's own identity, change nothing.
            rows = part_content(reference, self.artifacts(reference.step))
            return {"part": rows, "weight": reference.weight}
        assert isinstance(reference, Reference), reference
        if isinstance(reference, ModelRef):
            if reference.is_path or reference.target in self.graph.models:
                return meaning(self.model(reference))
            contents = [
                _model_content(artifact, reference.view) for artifact in self._made_models(reference).values()
            ]
            return contents if isinstance(reference, ModelsRef) else contents[0]
        if reference.is_path and not (Path(reference) / MANIFEST_FILE).is_file():
            return meaning(source_of_path(reference))
        return [
            # A student of cached logits takes their chat template, which their files do not hold.
            [artifact.manifest.content, view, *_rendering(artifact)]
            for artifact, view in self.artifacts(reference)
        ]

    def check_content(self, checked: set[Path]) -> None:
        """Compare all that the step reads with what was sealed, but for the folders `checked` already.

        Raises StoreError for a file that a disk or a copy has changed.
        """
        from potstill.logits.shards import checked_when_read

        for reference, steps in self.graph.needs_of(self.node):
            artifacts = [self._made(step.name) for step in steps]
            if reference.is_path and (Path(reference) / MANIFEST_FILE).is_file():
                artifacts = [Artifact.open(Path(reference))]
            for artifact in artifacts:
                if artifact.folder not in checked:
                    artifact.check_content(checked_when_read if artifact.kind == CacheSettings.kind else None)
                    checked.add(artifact.folder)

    def described(self) -> dict[str, Any]:
        """Each reference and the artifacts behind it, for the manifest."""
        found: dict[str, Any] = {}
        for reference, steps in self.graph.needs_of(self.node):
            if steps:
                found[str(reference)] = {
                    step.name: self._made(step.name).manifest.fingerprint for step in steps
                }
            elif isinstance(reference, ModelRef):
                found[str(reference)] = meaning(self.model(reference))
        return found

    def parameters(self) -> dict[str, int]:
        """How many parameters each model has that runs here, by its reference, for the manifest."""
        found = {}
        for _, reference in references(self.node.settings):
            if isinstance(reference, ModelRef):
                with suppress(PotstillError, OSError):  # what was made is made, wherever its model is by now
                    model = self.model(reference)
                    if isinstance(model, TransformersModel) and (count := parameter_count(model)):
                        found[str(reference)] = count
        return found

    def fingerprint(self, seed: int) -> str:
        """The fingerprint of the step: kind, schema version, seed, settings and the content they lead to."""
        settings = self.node.settings
        version = getattr(type(settings), "schema_version", None)
        if version is None:
            raise RecipeError(f"steps of kind {self.node.kind} state no schema_version")
        return hash_json([self.node.kind, version, seed, meaning(settings, self.identify)])


def _model_content(artifact: Artifact, view: str | None) -> dict[str, Any]:
    """What stands for the model that a step made, or for a view of it."""
    extra = artifact.manifest.extra
    quantized = {key: extra[key] for key in ("quantize",) if key in extra}
    content = artifact.content_of(view)
    if view is not None:
        # By its base and not by the artifact's identity, which is that of the last weights.
        return {"content": content, "base": extra.get("base_identity"), **quantized}
    return {"content": content, "identity": artifact.manifest.model_identity, **quantized}


def _rendering(artifact: Artifact) -> list[str]:
    rendering = artifact.manifest.extra.get("rendering")
    return [] if rendering is None else [rendering["hash"]]
