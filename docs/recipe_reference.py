"""Writes docs/recipe-reference.md from the recipe's JSON schema: python docs/recipe_reference.py."""

from pathlib import Path
from typing import Any

from potstill.pipeline.kinds import STEP_KINDS, settings_class
from potstill.recipe import json_schema

TARGET = Path(__file__).with_name("recipe-reference.md")
_HEAD = """# Recipe reference

Generated from the schema (`potstill schema`) by `docs/recipe_reference.py`; do not edit. What the top keys,
references, views and `each` mean is in [design.md](design.md). *Execution* settings say how to run and never
change what is made.
"""


_WORDS = {"integer": "whole number", "string": "text", "boolean": "true/false"}


def _type(schema: dict[str, Any]) -> str:
    match schema:
        case {"$ref": reference}:
            name = reference.rpartition("/")[2]
            text = f"[{name}](#{name.lower()})"
        case {"const": value}:
            text = f"`{value}`"
        case {"enum": values}:
            text = " or ".join(f"`{one}`" for one in values)
        case {"anyOf": members} | {"oneOf": members}:
            text = " or ".join(dict.fromkeys(_type(one) for one in members))
        case {"type": "array", "items": items}:
            text = f"list of {_type(items)}"
        case {"type": "object", "additionalProperties": dict(values)}:
            text = f"mapping to {_type(values)}"
        case _:
            kind = str(schema.get("type", "any"))
            text = _WORDS.get(kind, kind)
    return text


def _table(schema: dict[str, Any]) -> list[str]:
    required = set(schema.get("required", ()))
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        if name == "each":
            continue
        default = "-" if field.get("default") is None else f"`{field['default']}`"
        default = "required" if name in required else default
        meaning = field.get("description", "") + (" *execution*" if field.get("execution") else "")
        lines.append(f"| `{name}` | {_type(field)} | {default} | {meaning.strip()} |")
    return lines


def reference() -> str:
    """The page's text."""
    schema = json_schema()
    definitions = schema["$defs"]
    lines = [_HEAD]
    steps = {one["title"]: one for one in schema["properties"]["steps"]["additionalProperties"]["oneOf"]}
    for kind in STEP_KINDS:
        step = steps[settings_class(kind).__name__]
        lines += [f"## {kind}", "", str(step.get("description", "")).strip(), "", *_table(step), ""]
    lines += ["# Scale", "", "The recipe's own `scale:` block, by its engine.", ""]
    for member in schema["properties"]["scale"]["oneOf"]:
        scale = definitions.pop(member["$ref"].rpartition("/")[2])
        engine = scale["properties"]["engine"]["const"]
        lines += [f"## scale: {{engine: {engine}}}", "", scale["description"], "", *_table(scale), ""]
    shared = schema["properties"]["shared"]["description"]
    lines += ["# Shared", "", f"The recipe's own `shared:` key: {shared}.", ""]
    lines += ["# Blocks", ""]
    for name in sorted(definitions):
        block = definitions[name]
        if "properties" in block:
            lines += [f"## {name}", "", str(block.get("description", "")).strip(), "", *_table(block), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
