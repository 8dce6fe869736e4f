"""YAML with every key's file and line; duplicate keys refused, numbers as YAML 1.2 reads them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from potstill.core.errors import RecipeError

__all__ = ["KeyPath", "Origin", "dump_yaml", "parse_value", "read_yaml"]

KeyPath = tuple[str, ...]
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file and line, or the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number."""


_Loader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _build(
    loader: _Loader, node: yaml.Node, path: KeyPath, origins: dict[KeyPath, Origin], source: str
) -> Any:
    origins.setdefault(path, Origin(source, node.start_mark.line + 1))
    if isinstance(node, yaml.CollectionNode) and node.tag not in _PLAIN_TAGS:
        raise RecipeError(
            f"the tag {node.tag!r} is not allowed", where=str(origins[path]), expected="plain YAML"
        )
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, str(i)), origins, source) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen and key != "<<":
            raise RecipeError(
                f"{'.'.join((*path, key))} is given twice (first on line {seen[key]})",
                where=f"{source}:{line}",
                expected="every name once",
                mend="rename or remove one of the two",
            )
        seen[key] = line
    loader.flatten_mapping(node)
    mapping = {}
    for key_node, value_node in node.value:
        key_path = (*path, str(key_node.value))
        origins[key_path] = Origin(source, key_node.start_mark.line + 1)
        mapping[str(key_node.value)] = _build(loader, value_node, key_path, origins, source)
    return mapping


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, Origin]]:
    """A YAML file's mapping and where each of its keys stands; RecipeError where it is no YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot be read ({error})", where=str(path), expected="a UTF-8 YAML file"
        ) from error
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        origins: dict[KeyPath, Origin] = {}
        value = {} if node is None else _build(loader, node, (), origins, str(path))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"not valid YAML: {error.problem}", where=f"{path}:{line}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=str(path)) from error
    finally:
        loader.dispose()
    if not isinstance(value, dict):
        raise RecipeError(
            "the file is not a mapping", where=str(path), expected="keys such as name:, models:, steps:"
        )
    return value, origins


def parse_value(text: str) -> Any:
    """A value as YAML types it: 3 is a number, true a boolean, [a, b] a list, anything else text."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{text!r} is not a value: {str(error).splitlines()[0]}", where="command line"
        ) from error


def dump_yaml(value: Any) -> str:
    """YAML text of plain values, keys in their order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)
