"""Adapters through the train step: each kind, in 4 bits, on checkpoints that are quantised already."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import DataError, TrainingError
from potstill.models import TransformersModel, loading
from potstill.train import trainer

Training = Callable[..., Any]


@pytest.fixture
def wide(build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> TransformersModel:
    """A model whose rows hold whole blocks of 4-bit weights."""
    build_tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "wide")
    tiny_tokenizer.save_pretrained(tmp_path / "wide")
    return TransformersModel(path=str(tmp_path / "wide"))


@pytest.fixture
def quantised(wide: TransformersModel, tiny_tokenizer: Any, tmp_path: Path) -> Callable[[str], Any]:
    """`quantised("nf4" or "int8")`: the folder of a checkpoint that bitsandbytes quantised."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def make(scheme: str) -> TransformersModel:
        given = (
            BitsAndBytesConfig(load_in_8bit=True)
            if scheme == "int8"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=scheme)
        )
        model = AutoModelForCausalLM.from_pretrained(
            wide.path, quantization_config=given, device_map={"": "cpu"}
        )
        model.save_pretrained(tmp_path / scheme)
        tiny_tokenizer.save_pretrained(tmp_path / scheme)
        return TransformersModel(path=str(tmp_path / scheme))

    return make


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("method", [{}, {"dora": True}, {"rslora": True}, {"dora": True, "rslora": True}])
def test_every_kind_of_adapter_learns(
    train: Training, wide: TransformersModel, method: dict[str, Any], quantize: Any
) -> None:
    if quantize is not None:
        pytest.importorskip("bitsandbytes")
    student = wide.model_copy(update={"quantize": quantize})
    result, folder, _ = train(student=student, epochs=3, lora={"rank": 4, **method})
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    assert result.metrics["untouched"] == []
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["use_dora"], config["use_rslora"]) == (
        bool(method.get("dora")),
        bool(method.get("rslora")),
    )
    assert result.extra["base"].get("quantize") == quantize
    assert ("uint8" in result.extra["precision"]["frozen"]) == (quantize is not None)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantised_already_is_a_base_and_a_teacher_as_it_is(
    train: Training, quantised: Any, seal: Any, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In bf16 rounding alone, which is another under autocast than in a teacher, is over 1e-4 nats.
    for module in (loading, trainer):
        monkeypatch.setattr(module, "supports_bf16", lambda device: False)
    checkpoint = quantised(scheme)
    result, folder, context = train(
        student=checkpoint, teacher=checkpoint, epochs=2, alpha=1.0, lora={"rank": 4}
    )
    said = context.reporter.said
    assert f"the student's weights are in {scheme} already, and are used as they are" in said
    assert f"the teacher's weights are in {scheme} already, and are used as they are" in said
    first = next(point for point in result.metrics["history"] if "eval_kl" in point)
    assert first["eval_kl"] == pytest.approx(0, abs=1e-4)  # both are one model
    assert result.metrics["untouched"] == []
    seal(folder, "train", result)
    on, _, _ = train("on", student=TransformersModel(path=str(folder)), max_steps=1)
    assert on.extra["base"]["path"] == checkpoint.path


def test_a_checkpoint_that_is_quantised_already_needs_an_adapter(train: Training, quantised: Any) -> None:
    with pytest.raises(TrainingError, match="is quantised to nf4, and quantised weights cannot be trained"):
        train(student=quantised("nf4"))


def test_a_head_that_shares_the_embedding_is_adapted_without_a_warning(train: Training) -> None:
    result, _, _ = train(epochs=2, lora={"rank": 4, "target": ["lm_head", "q_proj"]})
    assert result.metrics["untouched"] == []
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]


# --- the base, kept near


def test_full_weights_are_kept_near_a_frozen_copy_of_what_they_were(train: Training) -> None:
    losses = {}
    for weight in (0.01, 3.0):
        result, _, _ = train(f"at {weight:g}", epochs=4, base_kl=weight)
        points = [point for point in result.metrics["history"] if "base_kl" in point]
        assert points[0]["base_kl"] == pytest.approx(0, abs=1e-6)
        assert points[-1]["base_kl"] > 0
        losses[weight] = points[-1]["base_kl"]
    assert losses[3.0] < 0.3 * losses[0.01]


def test_full_weights_that_are_trained_on_stay_near_the_original_base(
    train: Training, seal: Any, base: TransformersModel
) -> None:
    first, folder, _ = train("first", epochs=3)
    seal(folder, "train", first)
    assert first.extra["base"]["path"] == base.path
    second, second_folder, _ = train(
        "second", student=TransformersModel(path=str(folder)), max_steps=1, base_kl=0.1
    )
    (point,) = [point for point in second.metrics["history"] if "base_kl" in point]
    assert point["base_kl"] > 0.01, "the first stage's weights are no base"
    assert second.extra["base"] == first.extra["base"]
    assert second.extra["base_identity"] == first.extra["base_identity"]
    assert (second_folder / "model.safetensors").is_file()


# --- beginnings that another model wrote


def test_a_mask_that_leaves_nothing_out_is_an_error(train: Training) -> None:
    with pytest.raises(DataError, match="mask_prefix leaves nothing out"):
        train(mask_prefix=True)


def test_a_mask_leaves_out_what_another_model_wrote(train: Training, traces: Any) -> None:
    begun = traces(name="begun", prefix_characters=len("The answer"))
    figures = {}
    for masked in (False, True):
        result, _, _ = train(f"masked {masked}", data=begun, max_steps=1, mask_prefix=masked)
        figures[masked] = result.metrics["history"][0]["eval_loss"]
    assert figures[True] != figures[False]


# --- activations computed again


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.known.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return made

    def _gone(self, pointer: int, size: int) -> None:
        if pointer in self.known:
            self.known.remove(pointer)
            self.now -= size


def test_computing_activations_again_saves_memory_and_gives_the_same_adapter(
    train: Training,
    build_tiny_model: Any,
    tiny_tokenizer: Any,
    traces: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It is off where activations are computed again, and its sums differ in their last bits.
    monkeypatch.setattr("potstill.scoring.can_share_prefix", lambda model: False)
    build_tiny_model(num_hidden_layers=8).save_pretrained(tmp_path / "deep")
    tiny_tokenizer.save_pretrained(tmp_path / "deep")
    deep = TransformersModel(path=str(tmp_path / "deep"), dtype="float32")
    long = traces(8, name="long", response="so it goes " * 30, held_out_every=100)
    most, files = {}, {}
    for again in (False, True):
        with LiveBytes() as live:
            _, folder, _ = train(
                f"again {again}",
                student=deep,
                data=long,
                max_steps=1,
                batch=8,
                lora={"rank": 4},
                activation_checkpointing=again,
            )
        most[again] = live.most
        files[again] = (folder / "adapter_model.safetensors").read_bytes()
    assert most[True] < 0.6 * most[False]
    assert files[True] == files[False]
