"""Chat templates that come along, for models that have none: by name, or from a Jinja file."""

from pathlib import Path

from potstill.core.errors import ModelError

__all__ = ["CHAT_TEMPLATES", "DEFAULT_CHAT_TEMPLATE", "chat_template_text", "control_tokens"]

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
_CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SOURCE_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)
# plain writes no token but eos, which every model has been trained to end a text with; source none at all.
CHAT_TEMPLATES = {
    "plain": DEFAULT_CHAT_TEMPLATE,
    "chatml": _CHATML_TEMPLATE,
    "source": _SOURCE_TEMPLATE,
}
_CONTROL_TOKENS = {"plain": (), "chatml": ("<|im_start|>", "<|im_end|>"), "source": ()}


def chat_template_text(name: str) -> str:
    """The template of a built-in name, or of a Jinja file's path. Raises ModelError where there is none."""
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if not Path(name).is_file():
        raise ModelError(
            "no such chat template",
            where=name,
            expected=f"a Jinja file, or one of: {', '.join(CHAT_TEMPLATES)}",
            mend="check the path; a relative one is looked up beside the recipe, then in the working folder",
        )
    return Path(name).read_text(encoding="utf-8")


def control_tokens(name: str) -> tuple[str, ...]:
    """The tokens that a built-in template needs the tokenizer to have."""
    return _CONTROL_TOKENS.get(name, ())
