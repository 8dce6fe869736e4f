"""One specification for students of every family: template, head, losses, adapters, saving, evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from potstill.core.records import Record
from potstill.data.chat import Rendered, Renderer
from potstill.losses.head import weighted_loss
from potstill.losses.response import response_loss
from potstill.models import (
    LoadedModel,
    TransformersModel,
    isolates_packed_rows,
    load,
    load_tokenizer,
    output_head,
)
from potstill.models.prefixes import can_share_prefix
from potstill.scoring import supervised_hidden
from potstill.train.student import StudentWithLoss, make_micro_batch

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma3",
    "mistral",
    "smollm3",
    "granite",
    "phi",
    "phi3",
    "gpt_neox",
    "gpt2",
    "opt",
    "qwen3_moe",
    "mixtral",
    "olmoe",
)
MIXTURES = {"qwen3_moe", "mixtral", "olmoe"}
# What is right for the others is refused for these: windows in attention, positions counted from a mask; and
# routers are counted over whole rows.
WHOLE_PREFIXES = {"gemma3", "opt", *MIXTURES}
WHOLE_PACKS = {"opt"}

IDS = torch.tensor([[5, 17, 200, 299, 13, 8], [260, 11, 44, 91, 12, 7]])
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 7?"},
    {"role": "assistant", "content": "19."},
    {"role": "user", "content": "And 19 - 30?"},
]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings(family: str, build_family_folder: Callable[[str], Path]) -> TransformersModel:
    return TransformersModel(path=str(build_family_folder(family)), device="cpu", dtype="float32")


def rows_of(settings: TransformersModel) -> list[Rendered]:
    """Conversations of one system message and of different lengths."""
    renderer = Renderer(load_tokenizer(settings))
    answers = ("-11.", "First 19 - 30 = -11. The answer is -11.", "The answer is -11, less than zero.")
    return [renderer.render(Record("p", CONVERSATION, response=answer)) for answer in answers]


def test_the_families_are_those_that_tiny_models_are_made_of(tiny_family: str) -> None:
    assert tiny_family in FAMILIES


def test_a_conversation_is_rendered_by_the_template_and_only_the_last_answer_is_learned(
    settings: TransformersModel,
) -> None:
    tokenizer = load_tokenizer(settings)
    renderer = Renderer(tokenizer)
    rendered = renderer.render(Record("p", CONVERSATION, response="It is -11."))
    prompt = tokenizer.decode(rendered.ids[: rendered.mask.index(1)])
    assert prompt == renderer.prompt_text(CONVERSATION)
    for message in CONVERSATION:
        assert prompt.count(message["content"]) == 1, message
    learned = [at for at, mask in zip(rendered.ids, rendered.mask, strict=True) if mask]
    [end] = renderer.end_of_turn_ids
    opened = "\n</think>\n\n" if renderer.opens_reasoning(CONVERSATION) else ""
    assert tokenizer.decode(learned) == f"{opened}It is -11.{tokenizer.convert_ids_to_tokens(end)}"
    assert learned[-1] == end
    if tokenizer.bos_token not in (None, tokenizer.eos_token):
        assert rendered.ids[0] == tokenizer.bos_token_id
        assert rendered.ids.count(tokenizer.bos_token_id) == 1


def load_float64(settings: TransformersModel) -> LoadedModel:
    loaded = load(settings, trainable=True)
    if loaded.model.config.model_type in MIXTURES:
        loaded.model.set_experts_implementation("eager")  # grouped products are not made in float64
    loaded.model.double()
    return loaded


def reference(model: Any, rows: list[Rendered], size: int) -> torch.Tensor:
    """The mean cross-entropy of supervised tokens, row by row through transformers' own forward."""
    losses = []
    for row in rows:
        ids_T, mask_T = torch.tensor(row.ids), torch.tensor(row.mask, dtype=torch.bool)
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1, :size]
        losses.append(functional.cross_entropy(logits_TV[mask_T[1:]], ids_T[1:][mask_T[1:]], reduction="sum"))
    total: torch.Tensor = torch.stack(losses).sum() / sum(row.supervised_tokens for row in rows)
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_chunked_heads_loss_and_gradients_are_those_of_transformers_forward(
    settings: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, rows = load_float64(settings), rows_of(settings)
    model, size = loaded.model, loaded.vocabulary_size
    assert model.get_output_embeddings().weight.shape[0] > size, "the head is padded"
    monkeypatch.setattr("potstill.scoring.can_share_prefix", lambda model: False)
    expected_loss = reference(model, rows, size)
    expected = gradients(model, expected_loss)
    batch = make_micro_batch(rows)
    hidden_NH, targets_N = supervised_hidden(model, batch.input_ids_BT, batch.loss_mask_BT)
    weights_N = torch.full((len(targets_N),), 1 / len(targets_N), dtype=torch.float64)
    loss, _ = weighted_loss(
        hidden_NH, output_head(model, size), response_loss(targets_N), weights_N, chunk_tokens=5
    )
    assert len(targets_N) > 2 * 5
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert_same(gradients(model, loss), expected)


@pytest.mark.parametrize("way", ["shared prefix", "packing"])
def test_shared_prefixes_and_packs_give_the_gradients_of_whole_rows_or_are_refused(
    family: str, settings: TransformersModel, way: str
) -> None:
    loaded, rows = load_float64(settings), rows_of(settings)
    model, student = loaded.model, StudentWithLoss(loaded.model, loaded.vocabulary_size)
    allowed = can_share_prefix(model) if way == "shared prefix" else isolates_packed_rows(model)
    assert allowed is (family not in (WHOLE_PREFIXES if way == "shared prefix" else WHOLE_PACKS))
    if not allowed:
        return
    batch = make_micro_batch(rows, packed=way == "packing")
    assert batch.shared_prefix > 8 if way == "shared prefix" else batch.position_ids_BT is not None
    expected = gradients(model, reference(model, rows, loaded.vocabulary_size))
    loss, _ = student(batch, batch.supervised)
    assert_same(gradients(model, loss), expected)


def linear_layers(model: Any) -> int:
    """Projections inside the blocks and between: all but the head."""
    from transformers.pytorch_utils import Conv1D

    layers = [one for one in model.modules() if isinstance(one, torch.nn.Linear | Conv1D)]
    return len(layers) - 1


def run_step(module: Any, kind: type[Any], context: Any, **fields: Any) -> Any:
    return module.run(kind.model_validate({"do": kind.kind, **fields}), context)


@pytest.fixture
def data(settings: TransformersModel, step_context: Any, seal: Any, traces: Any) -> dict[str, list[Any]]:
    """Traces, and the family's own model's logits of them."""
    from potstill import cache

    found = {"traces": [traces(6, held_out_every=3)]}
    context = step_context("cache", folder="cache", models={"teacher": settings}, data=found)
    kept = run_step(cache, cache.CacheSettings, context, model="teacher", data="traces", top_k=8)
    found["logits"] = [seal(context.folder, "cache", kept)]
    return found


Trained = tuple[Path, torch.Tensor, int]


@pytest.fixture
def train(data: dict[str, list[Any]], step_context: Any, seal: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`train(base, **fields)`: a student after two steps on the logits; its logits; its adapted layers."""
    from potstill import train
    from potstill.train.step import save_student

    def make(base: TransformersModel, **fields: Any) -> Trained:
        seen: list[Any] = []

        def remember(loaded: Any, *arguments: Any, **options: Any) -> None:
            seen.extend(
                [logits_of(loaded.model), sum(hasattr(one, "lora_A") for one in loaded.model.modules())]
            )
            save_student(loaded, *arguments, **options)

        monkeypatch.setattr("potstill.train.step.save_student", remember)
        context = step_context("train", folder="student", models={"base": base}, data=data)
        usual = {"student": "base", "data": "logits", "batch": 2, "max_steps": 2, "lr": 0.01, "device": "cpu"}
        result = run_step(train, train.TrainSettings, context, **usual, **fields)
        assert result.counts["steps"] == 2
        assert result.metrics["untouched"] == []
        seal(context.folder, "train", result)
        return context.folder, seen[0], seen[1]

    return make


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits.float()
    return logits


def reload(folder: Path) -> Any:
    return load(TransformersModel(path=str(folder), device="cpu", dtype="float32")).model


def test_a_student_is_pruned_trained_saved_and_reloaded(
    settings: TransformersModel, data: dict[str, list[Any]], train: Any, step_context: Any, seal: Any
) -> None:
    from potstill import student

    context = step_context("init", folder="pruned", models={"teacher": settings}, data=data)
    result = run_step(student, student.InitSettings, context, model="teacher", data="traces", layers=1)
    assert result.counts["blocks"] == 1
    seal(context.folder, "init", result)
    folder, expected, _ = train(TransformersModel(path=str(context.folder), device="cpu"))
    found = logits_of(reload(folder))
    # Training and use may differ in the kernel of attention, and so in rounding.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert (found - logits_of(reload(context.folder))).abs().max() > 1e-2
    tokenizer = load_tokenizer(TransformersModel(path=str(folder)))
    assert tokenizer.chat_template == load_tokenizer(settings).chat_template


def test_an_adapter_reaches_every_projection_but_the_head_is_reloaded_and_evaluated(
    settings: TransformersModel, data: dict[str, list[Any]], train: Any, step_context: Any
) -> None:
    from potstill import evaluate

    folder, expected, adapted = train(settings, lora={"rank": 2, "alpha": 4})
    assert adapted == linear_layers(reload(Path(settings.path)))
    found = logits_of(reload(folder))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert (found - logits_of(reload(Path(settings.path)))).abs().max() > 1e-2
    models = {"base": settings, "student": TransformersModel(path=str(folder), device="cpu")}
    context = step_context("evaluate", folder="exam", models=models, data=data)
    result = run_step(
        evaluate,
        evaluate.EvaluateSettings,
        context,
        models={"base": "base", "student": "student"},
        teacher="base",
        data="traces:held_out",
        tasks={"sums": {"task": "chain_sum", "size": 2}},
        max_new_tokens=3,
    )
    assert result.counts["task_prompts"] == 2
    assert result.metrics["models"]["student"]["held_out"]["kl_nats_per_token"]["value"] > 0
