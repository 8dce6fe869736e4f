"""YAML with every key's file and line; duplicate keys refused, numbers as YAML 1.2 reads them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from potstill.core.errors import RecipeError

__all__ = ["KeyPath", "Origin", "dump_yaml", "parse_value", "read_yaml"]

KeyPath = tuple[str, ...]
_PLAIN_TAGS = tuple(
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")
)
# Aliases of aliases make millions of values of a few lines.
_MOST_VALUES = 100_000
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file and line, or the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number and 2026-07-01 as text, as YAML 1.2 does.

    `values` counts what has been made of its text.
    """

    values = 0


_Loader.yaml_implicit_resolvers = {
    key: [(tag, form) for tag, form in value if not tag.endswith(":timestamp")]
    for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _build(
    loader: _Loader, node: yaml.Node, path: KeyPath, origins: dict[KeyPath, Origin], source: str
) -> Any:
    origins.setdefault(path, Origin(source, node.start_mark.line + 1))
    loader.values += 1
    if loader.values > _MOST_VALUES:
        raise RecipeError(
            f"its aliases make more than {_MOST_VALUES:,} values",
            where=str(origins[path]),
            mend="write out what is meant, or keep rows in a data file",
        )
    if node.tag not in _PLAIN_TAGS:
        raise RecipeError(
            f"the tag {node.tag!r} is not allowed", where=str(origins[path]), expected="plain YAML"
        )
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, str(i)), origins, source) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        value = loader.construct_object(node)
        _check_text(value, origins[path])
        return value
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
        _check_text(key, Origin(source, line))
        seen[key] = line
    loader.flatten_mapping(node)
    mapping = {}
    for key_node, value_node in node.value:
        key_path = (*path, str(key_node.value))
        origins[key_path] = Origin(source, key_node.start_mark.line + 1)
        mapping[str(key_node.value)] = _build(loader, value_node, key_path, origins, source)
    return mapping


def _check_text(value: Any, origin: Origin) -> None:
    if isinstance(value, str) and _HALF_CHARACTER.search(value):
        raise RecipeError(
            "a text holds half of a surrogate pair, which is no character",
            where=str(origin),
            expected="text that UTF-8 can hold",
        )


def _parse(text: str, source: str) -> tuple[Any, dict[KeyPath, Origin]]:
    """The value of a YAML text and where each of its keys stands."""
    loader, origins = None, dict[KeyPath, Origin]()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, (), origins, source), origins
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"not valid YAML: {error.problem}", where=f"{source}:{line}") from error
    except RecursionError as error:
        raise RecipeError("not valid YAML: it has no end, or is too deep", where=source) from error
    except (yaml.YAMLError, ValueError) as error:
        # A ValueError is of a number: one of thousands of digits, or none behind !!int.
        if isinstance(error, RecipeError):
            raise
        what = " ".join(str(error).split())
        raise RecipeError(f"not valid YAML: {what}", where=source) from error
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, Origin]]:
    """A YAML file's mapping and where each of its keys stands; RecipeError where it is no YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot be read ({error})", where=str(path), expected="a UTF-8 YAML file"
        ) from error
    value, origins = _parse(text, str(path))
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise RecipeError(
            "the file is not a mapping", where=str(path), expected="keys such as name:, models:, steps:"
        )
    return value, origins


def parse_value(text: str) -> Any:
    """A value as YAML types it: 3 is a number, true a boolean, [a, b] a list, anything else text."""
    try:
        return _parse(text, "command line")[0]
    except RecipeError as error:
        raise RecipeError(f"{text!r} is not a value: {error.what}", where="command line") from error


def dump_yaml(value: Any) -> str:
    """YAML text of plain values, keys in their order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)
