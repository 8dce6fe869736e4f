"""Tiny random models and a small real tokenizer, made in milliseconds; a store away from the user's own."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

# Read when huggingface_hub and tokenizers are first imported, so they are set before anything can import
# them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Likewise by triton: without a GPU its interpreter runs kernels on the CPU.
if not any(Path(one).exists() for one in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# How long an example takes says how busy the machine is, and nothing of what is tested.
settings.register_profile("untimed", settings.default, deadline=None)
settings.load_profile("untimed")

TOKENIZER_LENGTH = 300
PADDED_VOCABULARY = 304  # models pad their vocabulary past the tokenizer's; so do these
HIDDEN_SIZE = 32
LAYERS = 2
SOFT_CAP = 2.0

TinyModelBuilder = Callable[..., "PreTrainedModel"]

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = (
    "State the final answer to the following arithmetic problem: 12 + 7 - 30 =",
    "First 12 + 7 = 19, then 19 - 30 = -11. The answer is -11.",
    "How many apples are left when three of the eleven apples are eaten?",
    "user assistant system think answer question question answer the the the and and of of is is",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def store_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of the test's own; the user's is never touched."""
    root = tmp_path / "store"
    monkeypatch.setenv("POTSTILL_STORE", str(root))
    return root


@pytest.fixture(scope="session")
def _quiet_libraries() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)  # on tiny tensors threads only wait for each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_COMMON = _IDS | {
    "vocab_size": PADDED_VOCABULARY,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
_WITHOUT_GROUPS = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "final_logit_softcapping": SOFT_CAP,
}
_GPT2 = _IDS | {
    "vocab_size": PADDED_VOCABULARY,
    "n_embd": HIDDEN_SIZE,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_OPT = _IDS | {
    "vocab_size": PADDED_VOCABULARY,
    "hidden_size": HIDDEN_SIZE,
    "word_embed_proj_dim": 16,  # so that its projection out of the trunk is used
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "dropout": 0.0,
    "init_std": 0.2,
}
_CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _COMMON | {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", _COMMON | {"tie_word_embeddings": True, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", _COMMON | _GEMMA),
    "mistral": ("MistralConfig", _COMMON | {"tie_word_embeddings": False, "sliding_window": None}),
    "smollm3": ("SmolLM3Config", _COMMON | {"no_rope_layer_interval": 2}),
    "granite": ("GraniteConfig", _COMMON | {"embedding_multiplier": 6.0, "logits_scaling": 4.0}),
    "phi": ("PhiConfig", _COMMON | {"tie_word_embeddings": False}),  # its head has a bias
    "phi3": ("Phi3Config", _COMMON | {"tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoXConfig", _WITHOUT_GROUPS | {"tie_word_embeddings": False}),
    "gpt2": ("GPT2Config", _GPT2),
    "opt": ("OPTConfig", _OPT),
}
TINY_FAMILIES = tuple(_CONFIGURATIONS)

_EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
_MOE_CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _COMMON | _EXPERTS | {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "mixtral": ("MixtralConfig", _COMMON | _EXPERTS | {"num_local_experts": 8, "intermediate_size": 24}),
    "olmoe": ("OlmoeConfig", _COMMON | _EXPERTS | {"num_experts": 8, "intermediate_size": 24}),
}
MOE_FAMILIES = tuple(_MOE_CONFIGURATIONS)


def _move_vectors(model: "PreTrainedModel") -> None:
    """Biases start at zero and norms at one: a head that forgot them would go unnoticed."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _build(family: str = "llama", *, seed: int = 0, **overrides: Any) -> "PreTrainedModel":
    import torch
    import transformers

    name, settings = (_CONFIGURATIONS | _MOE_CONFIGURATIONS)[family]
    config = getattr(transformers, name)(**settings | overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        _move_vectors(model)
    return model.eval()


@pytest.fixture
def build_tiny_model(_quiet_libraries: None) -> TinyModelBuilder:
    """`build_tiny_model(family="llama", *, seed=0, **config)`: random, fp32, in eval mode, 2 layers of 32."""
    return _build


@pytest.fixture(params=(*TINY_FAMILIES, *MOE_FAMILIES))
def tiny_family(request: pytest.FixtureRequest) -> str:
    """Each family's name in turn, those of mixtures of experts among them."""
    return str(request.param)


@pytest.fixture
def tiny_model(tiny_family: str, build_tiny_model: TinyModelBuilder) -> "PreTrainedModel":
    """A tiny model of each family in turn."""
    return build_tiny_model(tiny_family)


@pytest.fixture(params=TINY_FAMILIES)
def dense_family(request: pytest.FixtureRequest) -> str:
    """The name of each family without experts in turn."""
    return str(request.param)


@pytest.fixture(params=MOE_FAMILIES)
def moe_family(request: pytest.FixtureRequest) -> str:
    """The name of each family of mixtures of experts in turn; `build_tiny_model` gives them eight experts."""
    return str(request.param)


@pytest.fixture
def tiny_llama(build_tiny_model: TinyModelBuilder) -> "PreTrainedModel":
    """A tiny Llama with tied embeddings."""
    return build_tiny_model("llama")


# Of T5 the head shares the embedding, and what it reads is scaled; of T5 1.1 and mT5 neither.
_T5_CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5Config", {"tie_word_embeddings": True}),
    "t5_1_1": ("T5Config", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("MT5Config", {}),
}
T5_FAMILIES = tuple(_T5_CONFIGURATIONS)
# Their ids are those of T5's tokenizers; the decoder starts with the padding.
_T5_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def _build_t5(family: str = "t5", *, seed: int = 0, **overrides: Any) -> "PreTrainedModel":
    import torch
    import transformers

    name, settings = _T5_CONFIGURATIONS[family]
    common = {"vocab_size": PADDED_VOCABULARY, "d_model": HIDDEN_SIZE, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    sizes = {"num_layers": LAYERS + 1, "num_decoder_layers": LAYERS, "dropout_rate": 0.0}
    config = getattr(transformers, name)(**common | ids | sizes | settings | overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        _move_vectors(model)
        if family != "t5":
            with torch.no_grad():
                model.lm_head.weight = torch.nn.Parameter(0.5 * torch.randn_like(model.lm_head.weight))
    return model.eval()


@pytest.fixture
def build_tiny_t5(_quiet_libraries: None) -> TinyModelBuilder:
    """`build_tiny_t5(family="t5", *, seed=0, **config)`: random, fp32, in eval mode, 3 and 2 layers of 32."""
    return _build_t5


@pytest.fixture(params=T5_FAMILIES)
def tiny_t5(request: pytest.FixtureRequest, build_tiny_t5: TinyModelBuilder) -> "PreTrainedModel":
    """A tiny encoder-decoder of each family in turn."""
    return build_tiny_t5(request.param)


@pytest.fixture(scope="session")
def t5_tokenizer(_quiet_libraries: None) -> "PreTrainedTokenizerFast":
    """A Unigram tokenizer with T5's special tokens, and like T5's without a chat template.

    Its pieces are counted, not trained: tokenizers' trainer makes others each time. Shared by all tests of
    a run: one that changes it works on a deep copy.
    """
    from collections import Counter
    from math import log

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Counter("▁" + word for line in _CORPUS for word in line.split())
    letters = Counter("".join(words.elements())) + Counter("0123456789+-=?.,[]<>/▁")
    pieces = [*letters.items(), *words.most_common()][: 200 - len(_T5_TOKENS)]
    scored = [(piece, log(count / letters.total())) for piece, count in pieces]
    tokenizer = Tokenizer(models.Unigram([(one, 0.0) for one in _T5_TOKENS.values()] + scored, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_T5_TOKENS)


@pytest.fixture(scope="session")
def build_t5_folder(t5_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`build_t5_folder(family="t5")`: a tiny encoder-decoder with its tokenizer; nobody writes into it."""

    @functools.cache
    def build(family: str = "t5") -> Path:
        folder = tmp_path_factory.mktemp("t5") / family
        _build_t5(family).save_pretrained(folder)
        t5_tokenizer.save_pretrained(folder)
        return folder

    return build


_CHATML_TOKENS = {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@dataclass(frozen=True)
class FamilyChat:
    """How a family is spoken to: a file of tests/chat_templates, or none, and its special tokens."""

    template: str | None
    tokens: dict[str, str]
    others: tuple[str, ...] = ()


_CHATS = {
    "llama": FamilyChat(
        "llama3",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "qwen2": FamilyChat("smollm3", {"eos_token": "<|im_end|>"}),
    "qwen3": FamilyChat("qwen3", {"eos_token": "<|im_end|>"}),
    "gemma3": FamilyChat(
        "gemma3", {"bos_token": "<bos>", "eos_token": "<eos>"}, ("<start_of_turn>", "<end_of_turn>")
    ),
    "mistral": FamilyChat("mistral", {"bos_token": "<s>", "eos_token": "</s>"}, ("[INST]", "[/INST]")),
    "smollm3": FamilyChat("smollm3", {"eos_token": "<|im_end|>"}),
    "granite": FamilyChat(
        "deepseek_r1", {"bos_token": "<s>", "eos_token": "</s>"}, ("<|User|>", "<|Assistant|>")
    ),
    "phi": FamilyChat(None, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "phi3": FamilyChat("phi3", {"eos_token": "<|endoftext|>"}, ("<|user|>", "<|assistant|>", "<|end|>")),
    "gpt_neox": FamilyChat(None, {"eos_token": "<|endoftext|>"}),
    "gpt2": FamilyChat(None, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "opt": FamilyChat(None, {"bos_token": "</s>", "eos_token": "</s>"}),
    "qwen3_moe": FamilyChat("qwen3", {"eos_token": "<|im_end|>"}),
    "mixtral": FamilyChat("mistral", {"bos_token": "<s>", "eos_token": "</s>"}, ("[INST]", "[/INST]")),
    "olmoe": FamilyChat(None, {"eos_token": "<|endoftext|>"}),
}
assert _CHATS.keys() == (_CONFIGURATIONS | _MOE_CONFIGURATIONS).keys()


def chat_template_of(name: str) -> str:
    """A chat template that does what a family's own does, in short."""
    return (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def chat_template() -> Callable[[str], str]:
    """`chat_template(name)`: one of tests/chat_templates."""
    return chat_template_of


def _train_tokenizer(
    chat_template: str | None = CHATML_TEMPLATE,
    tokens: Mapping[str, str] = MappingProxyType(_CHATML_TOKENS),
    others: Sequence[str] = (),
) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_LENGTH,
        special_tokens=[
            *dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *tokens.values(), *others])
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    # As in SmolLM2, pad == eos: whoever masks by the padding id loses the end of every turn.
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=tokens["eos_token"], **tokens)
    wrapped.chat_template = chat_template
    assert len(wrapped) == TOKENIZER_LENGTH
    return wrapped


@pytest.fixture(scope="session")
def tiny_tokenizer(_quiet_libraries: None) -> "PreTrainedTokenizerFast":
    """A trained byte-level BPE of 300 tokens with ChatML's special tokens and template; pad is eos.

    Shared by all tests of a run: one that changes it works on a deep copy.
    """
    return _train_tokenizer()


@pytest.fixture(scope="session")
def build_family_folder(
    _quiet_libraries: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`build_family_folder(family)`: a tiny model with a tokenizer and chat template as its family has them.

    A session has one folder a family: nobody writes into it.
    """

    @functools.cache
    def build(family: str) -> Path:
        chat, folder = _CHATS[family], tmp_path_factory.mktemp("families") / family
        template = None if chat.template is None else chat_template_of(chat.template)
        tokenizer = _train_tokenizer(template, chat.tokens, chat.others)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        _build(family, **ids).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def tiny_model_folder(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """A Hugging Face folder with the tiny Llama and its tokenizer."""
    folder = tmp_path / "tiny-llama"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A Hugging Face folder with a tiny Llama and its tokenizer, for all tests: nobody writes into it."""
    folder = tmp_path_factory.mktemp("shared") / "tiny-llama"
    _build("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: POTSTILL_SHARED_DATA, or shared/data beside the repository."""
    stated = os.environ.get("POTSTILL_SHARED_DATA")
    folder = Path(stated) if stated else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data is not at hand")
    return folder


@pytest.fixture
def tiny_encoder(tmp_path: Path, tiny_tokenizer: Any, _quiet_libraries: None) -> str:
    """The folder of a random encoder."""
    import torch
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=PADDED_VOCABULARY,
            hidden_size=HIDDEN_SIZE,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        BertModel(config).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")
