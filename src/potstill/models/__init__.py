"""From a model's name to weights and tokenizer: embedded, GGUF, hub, local folder, adapter."""

from potstill.models.embedded import (
    EMBEDDED,
    EmbeddedModel,
    convert_gguf,
    embedded_path,
    fetch_embedded,
    is_fetched,
)
from potstill.models.files import cached_file_hash
from potstill.models.heads import (
    OutputHead,
    can_share_prefix,
    hidden_states,
    hidden_states_after,
    isolates_packed_rows,
    output_head,
)
from potstill.models.loading import LoadedModel, choose_device, frozen_weight_bytes, load, supports_bf16
from potstill.models.source import TransformersModel, adapter_base, find_source, identity, parameter_count
from potstill.models.tokenizers import (
    DEFAULT_CHAT_TEMPLATE,
    check_same_vocabulary,
    load_tokenizer,
    template_hash,
    token_bytes,
    tokenizer_hash,
    vocabulary_size,
)

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "EMBEDDED",
    "EmbeddedModel",
    "LoadedModel",
    "OutputHead",
    "TransformersModel",
    "adapter_base",
    "cached_file_hash",
    "can_share_prefix",
    "check_same_vocabulary",
    "choose_device",
    "convert_gguf",
    "embedded_path",
    "fetch_embedded",
    "find_source",
    "frozen_weight_bytes",
    "hidden_states",
    "hidden_states_after",
    "identity",
    "is_fetched",
    "isolates_packed_rows",
    "load",
    "load_tokenizer",
    "output_head",
    "parameter_count",
    "supports_bf16",
    "template_hash",
    "token_bytes",
    "tokenizer_hash",
    "vocabulary_size",
]
