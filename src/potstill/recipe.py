"""Recipes: load a YAML file, extend it, override it, expand `each` and check every setting."""

import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from potstill.core.errors import PotstillError, RecipeError, StoreError
from potstill.core.settings import InputPath, Reference, Settings
from potstill.core.shared import check_place
from potstill.core.yaml_lines import KeyPath, Origin, dump_yaml, parse_value, read_yaml
from potstill.data.source_settings import HubSource
from potstill.models import EMBEDDED, TransformersModel
from potstill.pipeline.graph import Graph, Node, nearest
from potstill.pipeline.kinds import STEP_KINDS, settings_class
from potstill.pipeline.outputs import Output, check_output
from potstill.scale import Ray, Scale, Torchrun
from potstill.teachers import AnyModel

__all__ = ["Recipe", "json_schema", "load_recipe", "one_step_recipe", "shipped_recipes", "sweep_variants"]

Kind = TypeVar("Kind", bound=Settings)

_TOP_KEYS = (
    "name",
    "description",
    "seed",
    "extends",
    "scale",
    "shared",
    "models",
    "steps",
    "outputs",
    "variants",
)
# What a step's command takes beside the settings of its step.
_BESIDE_A_STEP = ("name", "seed", "scale", "shared")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_COMMAND_LINE = "command line"
# What a stage inherits in every case: what kind of step it is, and whom the first stage trains.
_NOT_IN_A_STAGE = ("do", "student", "each", "stages")
_SOURCE_KEYS = frozenset({"path", "dataset", "task"})
_EACH_VALUE = re.compile(r"[^/\\\x00-\x1f\x7f]{1,100}")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: the graph to run and the mapping that makes the same graph again."""

    name: str
    seed: int
    graph: Graph
    resolved: Mapping[str, Any]
    description: str = ""
    outputs: Sequence[Output] = ()
    scale: Scale | None = None
    shared: str | None = None

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; running it makes the same artifacts."""
        return dump_yaml(dict(self.resolved))


@dataclass
class _Raw:
    """A merged recipe mapping, where each key was written, and the folders its paths are relative to.

    `overridden` has every key that the command line set, as it was typed there.
    """

    mapping: dict[str, Any]
    origins: dict[KeyPath, Origin]
    folders: list[Path] = field(default_factory=list)
    overridden: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: Sequence[str]) -> str:
        """The nearest known place of a key: file and line, or the command line."""
        for length in range(len(path), -1, -1):
            if origin := self.origins.get(tuple(path[:length])):
                return str(origin)
        return "recipe"


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with potstill, by name."""
    package = Path(__file__).parent
    folder = next(one for one in (package / "recipes", package.parents[1] / "recipes") if one.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _find(name: str, folder: Path) -> Path:
    with suppress(OSError, ValueError):  # a name that is no path names no file
        for candidate in (folder / name, Path(name)):
            if candidate.is_file():
                return candidate.resolve()
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise RecipeError(
        f"there is no recipe {name!r}",
        expected="a YAML file, or the name of a recipe that comes with potstill",
        mend=nearest(name, shipped),
    )


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, key by key; an explicit null removes a key."""
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _read(name: str, folder: Path, chain: tuple[Path, ...] = ()) -> _Raw:
    path = _find(name, folder)
    if path in chain:
        circle = " -> ".join(one.name for one in (*chain, path))
        raise RecipeError(f"recipes extend each other in a circle: {circle}", where=str(path))
    mapping, origins = read_yaml(path)
    if "extends" not in mapping:
        return _Raw(mapping, origins, [path.parent])
    base = _read(str(mapping.pop("extends")), path.parent, (*chain, path))
    return _Raw(_merge(base.mapping, mapping), {**base.origins, **origins}, [path.parent, *base.folders])


def _override(raw: _Raw, assignment: str, step: str | None = None) -> None:
    """Set one dotted key: `seed=3`, `steps.student.lr=1e-4`, or `student.lr=1e-4` for a step's key.

    Inside a list a part of the key is an item's number or its name, as in `student.stages.all.lr=1e-5`.
    `null` removes a key. With `step` the whole key is one of that step's.
    """
    dotted, equals, text = assignment.partition("=")
    dotted = dotted.strip()
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"{assignment!r} is no override",
            where=_COMMAND_LINE,
            expected="key=value, such as student.lr=1e-4",
        )
    if step is not None:
        keys = ["steps", step, *keys]
    elif keys[0] not in _TOP_KEYS:
        keys = ["steps", *keys]
        known = raw.mapping.get("steps") or {}
        if len(keys) == 2 or keys[1] not in known:
            raise RecipeError(
                f"{assignment!r} names {keys[1]!r}, which is neither a step nor a key of a recipe",
                where=_COMMAND_LINE,
                expected="name=, seed=, models.<name>.<key>=, or <step>.<key>=",
                mend=nearest(keys[1], [*known, *_TOP_KEYS]),
            )
    target: Any = raw.mapping
    path: list[str] = []
    for depth, key in enumerate(keys):
        if isinstance(target, list):
            place: Any = _item_number(target, key, dotted)
        elif isinstance(target, dict):
            place = key
        else:
            raise RecipeError(f"{dotted}: {path[-1]!r} holds a value, not a mapping", where=_COMMAND_LINE)
        path.append(str(place))
        if depth == len(keys) - 1:
            value = parse_value(text)
            if value is None and isinstance(target, dict) and place in target:
                del target[place]  # as a recipe that extends another removes a key
            else:
                target[place] = value
        else:
            target = target[place] if isinstance(target, list) else target.setdefault(place, {})
    raw.origins[tuple(path)] = Origin(_COMMAND_LINE)
    raw.overridden[tuple(path)] = dotted


def _item_number(items: Sequence[Any], key: str, dotted: str) -> int:
    """Which item of a list a part of a dotted key means: the one of that name, or of that number from 0."""
    names = [str(item.get("name")) if isinstance(item, dict) and "name" in item else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    named = [name for name in names if name is not None]
    raise RecipeError(
        f"{dotted}: the list has no item {key!r}",
        where=_COMMAND_LINE,
        expected=f"its number, below {len(items)}" + (", or its name" if named else ""),
        mend=nearest(key, named) if named else None,
    )


def _explain(
    error: ValidationError, raw: _Raw, prefix: KeyPath, root: type[BaseModel] | None, value: Any
) -> RecipeError:
    """One message for all faults pydantic found in `value`, each with its place and the nearest valid key."""
    messages = []
    for fault in error.errors(include_url=False):
        path = [*prefix, *_written(fault["loc"], value, missing=fault["type"] == "missing")]
        shown = ".".join(path)
        if fault["type"] == "extra_forbidden":
            known = _keys_at(root, fault["loc"][:-1])
            if root is not None and prefix[0] == "steps" and len(fault["loc"]) == 1:
                # What a step may have beside the settings of its kind.
                known += ["each", "stages"] if root is settings_class("train") else ["each"]
            hint = nearest(path[-1], known) if known else "remove it"
            if "FileSource" in fault["loc"] and path[-1] in HubSource.model_fields:
                hint = f"{path[-1]} belongs to a data set of the hub: name that by `dataset`, not `path`"
            messages.append(f"{raw.where(path)}: unknown key {shown}\n  to mend:  {hint}")
        elif fault["type"] == "missing":
            messages.append(f"{raw.where(path)}: {shown} is missing")
        else:
            text = fault["msg"].removeprefix("Value error, ")
            given = fault.get("input")
            suffix = "" if isinstance(given, dict | list) else f", not {given!r}"
            messages.append(f"{raw.where(path)}: {shown}: {text[:1].lower()}{text[1:]}{suffix}")
    return RecipeError("\n".join(dict.fromkeys(messages)))


def _written(loc: Sequence[Any], value: Any, *, missing: bool) -> list[str]:
    """The parts of a location that stand in the recipe, without the members of unions that pydantic names."""
    found = []
    for part in loc:
        keys = range(len(value)) if isinstance(value, list | tuple) else value
        if isinstance(keys, Mapping | range) and part in keys:
            value = value[part]
        elif not (missing and part is loc[-1]):
            continue
        found.append(str(part))
    return found


def _keys_at(root: type[BaseModel] | None, loc: Iterable[Any]) -> list[str]:
    """The valid keys of the settings class that a location inside `root` leads to."""
    models = [root] if root else []
    for part in loc:
        followed = []
        for model in models:
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            if part in fields:
                followed += list(_settings_classes(fields[part].annotation))
            else:
                # A list index, or the tag that pydantic puts in for the chosen member of a union.
                followed.append(model)
        models = [one for one in followed if one.__name__ == part] or followed
    keys = (field.alias or key for model in models for key, field in model.model_fields.items())
    return [*dict.fromkeys(keys)]


def _settings_classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _settings_classes(argument)
    if hasattr(annotation, "__value__"):
        yield from _settings_classes(annotation.__value__)


def _validate(kind: type[Kind], value: Mapping[str, Any], raw: _Raw, path: KeyPath) -> Kind:
    try:
        return kind.model_validate(value, context={"folders": raw.folders})
    except ValidationError as error:
        raise _explain(error, raw, path, kind, value) from None
    except RecipeError:
        raise
    except PotstillError as error:
        raise RecipeError(str(error), where=raw.where(path)) from error


def _check_mapping(raw: _Raw, key: str) -> dict[str, dict[str, Any]]:
    found = raw.mapping.get(key) or {}
    if not isinstance(found, dict):
        raise RecipeError(
            f"{key}: is not a mapping", where=raw.where([key]), expected="names with settings below them"
        )
    for name, value in found.items():
        where = raw.where([key, name])
        if not _NAME.fullmatch(name):
            raise RecipeError(
                f"{name!r} cannot be a name", where=where, expected="letters, digits, '-', '_' and '.'"
            )
        if not isinstance(value, dict):
            raise RecipeError(
                f"{key}.{name} is not a mapping", where=where, expected="settings such as {do: train, ...}"
            )
    return found


def _expand(
    name: str, step: Mapping[str, Any], raw: _Raw
) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """(instance name, values, settings) for every combination of `each`, or the step itself."""
    each = step.get("each")
    body = {key: value for key, value in step.items() if key != "each"}
    if each is None:
        yield name, {}, body
        return
    if not (isinstance(each, dict) and each and all(isinstance(one, list) and one for one in each.values())):
        raise RecipeError(
            f"steps.{name}.each is no mapping of names to lists",
            where=raw.where(["steps", name, "each"]),
            expected="each: {category: [math, science]}",
        )
    for combination in itertools.product(*each.values()):
        given = dict(zip(each, combination, strict=True))
        values = {key: str(value) for key, value in given.items()}
        if bad := [value for value in values.values() if not _EACH_VALUE.fullmatch(value)]:
            raise RecipeError(
                f"the value {bad[0]!r} of each: cannot be part of a step's name, which names a file as well",
                where=raw.where(["steps", name, "each"]),
                expected="a short word or number without '/' and '\\'",
                mend="use a word of your own; what it stands for can be told apart with `where` and `labels`",
            )
        yield f"{name}[{','.join(values.values())}]", values, _substitute(body, given)


def _substitute(value: Any, values: Mapping[str, Any]) -> Any:
    """The value with `{name}` replaced in its texts; a text that is nothing else becomes what is given."""
    if isinstance(value, dict):
        return {key: _substitute(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, values) for item in value]
    if isinstance(value, str):
        if (alone := _PLACEHOLDER.fullmatch(value)) is not None and alone[1] in values:
            return values[alone[1]]
        return _PLACEHOLDER.sub(lambda match: str(values.get(match[1], match[0])), value)
    return value


def _expand_stages(raw: _Raw) -> None:
    """Put a chain of train steps in the place of each step with `stages`, one step a stage.

    The last keeps the step's name, so that references to it mean the trained model; an earlier one is called
    `step-stage`. Each trains on what the one before made, with the step's settings and its own laid on them;
    an adapter is created by the first and trained on by the others.
    """
    declared, steps = _check_mapping(raw, "steps"), {}
    for name, step in declared.items():
        if step.get("do") != "train":
            steps[name] = step
            continue
        inherited = {key: value for key, value in step.items() if key != "stages"}
        if step.get("stages") is None:
            steps[name] = inherited
            continue
        stages = _checked_stages(raw, name, step["stages"])
        _refuse_hidden_overrides(raw, name, stages)
        for number, stage in enumerate(stages):
            own = name if number == len(stages) - 1 else f"{name}-{stage['name']}"
            if own in steps or (own != name and own in declared):
                raise RecipeError(
                    f"the stage {stage['name']!r} of {name!r} makes a step {own!r}, and there is one already",
                    where=raw.where(["steps", name, "stages", str(number)]),
                    mend="rename the stage or the step",
                )
            steps[own] = _merge(inherited, {key: value for key, value in stage.items() if key != "name"})
            _copy_origins(raw, ("steps", name), ("steps", own))
            _copy_origins(raw, ("steps", name, "stages", str(number)), ("steps", own))
            inherited = {key: value for key, value in inherited.items() if key != "lora"} | {"student": own}
    raw.mapping = {**raw.mapping, "steps": steps}


def _checked_stages(raw: _Raw, name: str, stages: Any) -> list[dict[str, Any]]:
    """The stages of a step: one at least, each with its own name, and nothing that only a step may set."""
    path = ("steps", name, "stages")
    form = "stages: [{name: head, epochs: 1, groups: [...]}, {name: all, epochs: 2}]"
    if not isinstance(stages, list) or not stages:
        raise RecipeError(f"{'.'.join(path)} is empty or no list", where=raw.where(path), expected=form)
    labels: set[str] = set()
    for number, stage in enumerate(stages):
        place = (*path, str(number))
        label = stage.get("name") if isinstance(stage, dict) else None
        if not isinstance(label, str) or not _NAME.fullmatch(label) or label in labels:
            raise RecipeError(
                f"{'.'.join(place)} has no name of its own", where=raw.where(place), expected=form
            )
        labels.add(label)
        for key in _NOT_IN_A_STAGE + (("lora",) if number else ()):
            if key in stage:
                lora = "set lora in the step or its first stage: later stages train that adapter on"
                raise RecipeError(
                    f"a stage cannot set {key}" if key != "lora" else "a later stage cannot set lora",
                    where=raw.where([*place, key]),
                    mend=lora if key == "lora" else f"set {key} in the step itself",
                )
    return stages


def _refuse_hidden_overrides(raw: _Raw, name: str, stages: Sequence[Mapping[str, Any]]) -> None:
    """Raise RecipeError where the command line sets a step's key that any of its stages sets itself."""
    for path, typed in raw.overridden.items():
        keys = path[2:]
        if path[:2] != ("steps", name) or not keys or keys[0] in ("name", "stages"):
            continue
        hiding = [repr(stage["name"]) for stage in stages if _sets(stage, keys)]
        if not hiding:
            continue
        reached = "any" if len(hiding) == len(stages) else "every"
        key, step = ".".join(keys), typed.split(".")[: -len(keys)]
        places = [str(number) if "." in one["name"] else one["name"] for number, one in enumerate(stages)]
        if keys[0] == "lora":
            del places[1:]
        raise RecipeError(
            f"{typed} would not reach {reached} stage: {key} is set in {' and in '.join(hiding)}",
            where=_COMMAND_LINE,
            mend="set it where it counts: "
            + ", ".join(".".join([*step, "stages", one, key]) + "=" for one in places),
        )


def _sets(stage: Any, keys: Sequence[str]) -> bool:
    """Whether a stage has its own value at a key of the step, or in the place of what the key lies in."""
    for key in keys:
        if not isinstance(stage, dict):
            return True
        if key not in stage:
            return False
        stage = stage[key]
    return True


def _copy_origins(raw: _Raw, path: KeyPath, to: KeyPath) -> None:
    """Say of the keys below one place that another place's stand there too."""
    for origin, place in list(raw.origins.items()):
        if origin[: len(path)] == path and path != to:
            raw.origins[*to, *origin[len(path) :]] = place


def _nodes(raw: _Raw) -> dict[str, Node]:
    nodes = {}
    for name, step in _check_mapping(raw, "steps").items():
        path = ("steps", name)
        kind = step.get("do")
        if kind not in STEP_KINDS:
            raise RecipeError(
                f"steps.{name} has no kind of step (do:)"
                if kind is None
                else f"steps.{name}.do: unknown kind {kind!r}",
                where=raw.where([*path, "do"]),
                expected=f"do: {' | '.join(STEP_KINDS)}",
                mend=nearest(str(kind), STEP_KINDS) if kind is not None else None,
            )
        for instance, values, body in _expand(name, step, raw):
            settings = _validate(settings_class(kind), body, raw, path)
            nodes[instance] = Node(instance, name, kind, settings, values, raw.where(path))
    return nodes


def _with_resolved_paths(value: Any, settings: Any) -> Any:
    """The raw mapping with every path that was found made absolute, so that it runs from anywhere."""
    if isinstance(settings, InputPath | Reference):
        return str(settings)
    if isinstance(value, dict):
        found = settings if isinstance(settings, dict) else dict(settings or ())
        return {key: _with_resolved_paths(item, found.get(key)) for key, item in value.items()}
    if isinstance(value, list) and isinstance(settings, list | tuple) and len(value) == len(settings):
        return [_with_resolved_paths(item, one) for item, one in zip(value, settings, strict=True)]
    return value


def _build(raw: _Raw) -> Recipe:
    mapping = raw.mapping
    for key in mapping:
        if key not in _TOP_KEYS:
            raise RecipeError(f"unknown key {key}", where=raw.where([key]), mend=nearest(key, _TOP_KEYS))
    name, seed = mapping.get("name", "run"), mapping.get("seed", 0)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RecipeError(
            f"name: {name!r} cannot name a run",
            where=raw.where(["name"]),
            expected="letters, digits, '-', '_' and '.'",
        )
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise RecipeError(f"seed: {seed!r} is no whole number", where=raw.where(["seed"]))
    models: dict[str, Settings] = {}
    adapter: TypeAdapter[Settings] = TypeAdapter(AnyModel)
    for model, settings in _check_mapping(raw, "models").items():
        try:
            models[model] = adapter.validate_python(settings, context={"folders": raw.folders})
        except ValidationError as error:
            raise _explain(error, raw, ("models", model), None, settings) from None
    _expand_stages(raw)
    mapping = raw.mapping
    nodes = _nodes(raw)
    if not nodes:
        raise RecipeError(
            "the recipe has no steps", where=raw.where(["steps"]), expected="steps: {name: {do: ...}}"
        )
    if both := sorted({node.base for node in nodes.values()} & set(models)):
        raise RecipeError(
            f"{both[0]!r} names both a model and a step",
            where=raw.where(["steps", both[0]]),
            mend="rename one of them",
        )
    embedded = {model: TransformersModel(path=model) for model in EMBEDDED}
    graph = Graph(nodes, {**embedded, **models})
    plain = {node.base: node.settings for node in nodes.values() if not node.values}
    resolved = _with_resolved_paths(
        {key: mapping[key] for key in _TOP_KEYS if key in mapping}, {"models": models, "steps": plain}
    )
    return Recipe(
        name,
        seed,
        graph,
        {"name": name, "seed": seed, **resolved},
        str(mapping.get("description", "")),
        _outputs(raw, graph),
        _scale(raw),
        _shared(raw),
    )


def _scale(raw: _Raw) -> Scale | None:
    declared = raw.mapping.get("scale")
    if declared is None:
        return None
    if not isinstance(declared, dict):
        raise RecipeError(
            f"scale: {declared!r} is not a mapping",
            where=raw.where(["scale"]),
            expected="scale: {engine: torchrun, nproc_per_node: 2} or {engine: ray, replicas: 2}",
        )
    engines: dict[Any, type[Torchrun | Ray]] = {"torchrun": Torchrun, "ray": Ray}
    engine = declared.get("engine")
    if engine is not None and engine not in engines:
        raise RecipeError(
            f"scale.engine: {engine!r} starts no processes",
            where=raw.where(["scale", "engine"]),
            expected="torchrun (train steps) or ray (the models that generate, cache and select ask)",
        )
    return _validate(engines.get(engine, Torchrun), declared, raw, ("scale",))


def _shared(raw: _Raw) -> str | None:
    declared = raw.mapping.get("shared")
    if declared is None:
        return None
    try:
        return check_place(declared)
    except StoreError as error:
        raise RecipeError(
            error.what, where=raw.where(["shared"]), expected=error.expected, mend=error.mend
        ) from None


def _outputs(raw: _Raw, graph: Graph) -> list[Output]:
    declared = raw.mapping.get("outputs") or {}
    if not isinstance(declared, dict):
        raise RecipeError(
            "outputs: is not a mapping",
            where=raw.where(["outputs"]),
            expected="outputs: {final_model: student}",
        )
    found: list[Output] = []
    for name, source in declared.items():
        found.append(check_output(name, source, graph, raw.where(["outputs", name]), others=found))
    return found


def _made_strict(value: Any) -> Any:
    """Every data source inside a step's settings told to stop at a malformed row."""
    if isinstance(value, list):
        return [_made_strict(item) for item in value]
    if not isinstance(value, dict):
        return value
    strict = {"strict": True} if len(_SOURCE_KEYS & value.keys()) == 1 else {}
    return {**{key: _made_strict(item) for key, item in value.items()}, **strict}


def load_recipe(
    name: str, overrides: Sequence[str] = (), variant: str | None = None, *, strict: bool = False
) -> Recipe:
    """Load a recipe by file or shipped name, with a named variant and `key=value` overrides laid on it.

    With `strict` every data source stops at a malformed row.
    """
    raw = _read(name, Path.cwd())
    if variant is not None:
        variants = _check_mapping(raw, "variants")
        if variant not in variants:
            raise RecipeError(
                f"the recipe has no variant {variant!r}",
                where=raw.where(["variants"]),
                mend=nearest(variant, variants),
            )
        raw.mapping = _merge(raw.mapping, variants[variant])
        _copy_origins(raw, ("variants", variant), ())
    for assignment in overrides:
        _override(raw, assignment)
    if strict:
        raw.mapping["steps"] = _made_strict(raw.mapping.get("steps"))
    return _build(raw)


def one_step_recipe(kind: str, assignments: Sequence[str]) -> Recipe:
    """The recipe behind `potstill <kind> key=value ...`: one step, named after its kind."""
    raw = _Raw({"name": kind, "steps": {kind: {"do": kind}}}, {(): Origin(_COMMAND_LINE)}, [Path.cwd()])
    for assignment in assignments:
        key = assignment.partition("=")[0].partition(".")[0]
        _override(raw, assignment, None if key in _BESIDE_A_STEP else kind)
    return _build(raw)


def sweep_variants(
    name: str, sweeps: Sequence[str], overrides: Sequence[str], *, strict: bool = False
) -> dict[str, Recipe]:
    """One recipe a combination of sweeps, by label: `key=a,b` sweeps values, `a,b` sweeps named variants."""
    axes: list[list[tuple[str, str | None, list[str]]]] = []
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        if equals:
            values = parse_value(f"[{text}]")
            short = key.partition(".stages.")[2] or key.rpartition(".")[2]
            axes.append(
                [
                    (
                        f"{short}={value}",
                        None,
                        [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"],
                    )
                    for value in values
                ]
            )
        else:
            axes.append([(one.strip(), one.strip(), []) for one in sweep.split(",")])
    recipes = {}
    for combination in itertools.product(*axes):
        label = ",".join(part[0] for part in combination)
        variants = [part[1] for part in combination if part[1] is not None]
        if len(variants) > 1:
            raise RecipeError(
                "one sweep over variants at a time", where=_COMMAND_LINE, expected="--sweep a,b"
            )
        extra = [assignment for part in combination for assignment in part[2]]
        recipes[label] = load_recipe(
            name, [*overrides, *extra], variants[0] if variants else None, strict=strict
        )
    return recipes


def _stages_schema(train: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a train step's `stages`: a name, and any of the step's own settings."""
    settings = {key: one for key, one in train["properties"].items() if key not in _NOT_IN_A_STAGE}
    stage = {
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": f"^{_NAME.pattern}$"}, **settings},
        "required": ["name"],
        "additionalProperties": False,
    }
    return {
        "type": "array",
        "minItems": 1,
        "items": stage,
        "description": "a chain of train steps: each a name and what differs from this step's settings; "
        "optimiser and schedule begin anew. `student.stages.all.lr=1e-5` on the command line overrides one "
        "stage, by its name or its number from 0; what a stage sets itself cannot be overridden in the step",
    }


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors."""
    definitions: dict[str, Any] = {}

    def schema(kind: Any) -> dict[str, Any]:
        found = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        definitions.update(found.pop("$defs", {}))
        return found

    each = {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}}
    steps = []
    for kind in STEP_KINDS:
        found = schema(settings_class(kind))
        if kind == "train":
            found["properties"]["stages"] = _stages_schema(found)
        found["properties"] = {**found["properties"], "each": each}
        steps.append(found)
    recipe = {
        "name": {"type": "string", "pattern": f"^{_NAME.pattern}$"},
        "description": {"type": "string"},
        "seed": {"type": "integer"},
        "extends": {"type": "string"},
        "scale": schema(Scale),
        "shared": {
            "type": "string",
            "description": "where artifacts are shared: an absolute path, or a URL such as "
            "s3://bucket/folder; what is there is fetched and not made, what is made is put there",
        },
        "models": {"type": "object", "additionalProperties": schema(AnyModel)},
        "steps": {"type": "object", "additionalProperties": {"oneOf": steps}},
        "outputs": {"type": "object", "additionalProperties": {"type": "string"}},
        "variants": {"type": "object", "additionalProperties": {"type": "object"}},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "potstill recipe",
        "type": "object",
        "properties": recipe,
        "additionalProperties": False,
        "$defs": definitions,
    }
