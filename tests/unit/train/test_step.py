"""The train step as a recipe runs it: artifacts in, a model out, and the same after an interruption."""

import contextlib
import errno
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.core.errors import DataError, Interrupted, ModelError, RecipeError, StoreError, TrainingError
from potstill.core.settings import Settings
from potstill.core.store import Artifact
from potstill.logits.logit_cache import LogitCache
from potstill.losses.types import Sparse
from potstill.models import TransformersModel, load

Training = Callable[..., Any]


def unfinished(folder: Path) -> list[str]:
    """What a scratch folder holds beside the rows, which go with the trainer."""
    names = [path.name for path in (folder / "scratch").iterdir()]
    return sorted(name for name in names if not name.startswith("spool-"))


def weights(folder: Path) -> bytes:
    return next(iter(folder.glob("*.safetensors"))).read_bytes()


@pytest.mark.parametrize(
    ("response", "student", "said"),
    [
        ("<think>\none and one\n</think>\n\n2", {}, True),
        ("It is 2.", {}, False),
        ("<think>\none and one\n</think>\n\n2", {"add_tokens": ["<think>"]}, False),
        ("<think>\none and one\n</think>\n\n2", {"reasoning_format": "strip"}, False),
    ],
)
def test_think_tags_that_are_text_to_the_student_are_told_once(
    train: Training,
    traces: Any,
    base: TransformersModel,
    response: str,
    student: dict[str, Any],
    said: bool,
) -> None:
    made = traces(
        12, name="thoughts", response=response, reasoning="one and one" if "<think>" in response else None
    )
    _, _, context = train(data=made, student=base.model_copy(update=student), max_steps=1)
    told = [line for line in context.reporter.said if "is no token of the student's" in line]
    assert len(told) == said
    if said:
        assert told[0].strip().startswith("<think> is no token of the student's: it is written as text, of ")


def cached(
    step_context: Any,
    seal: Any,
    teacher: TransformersModel,
    source: Artifact,
    *,
    folder: str = "cache",
    **fields: Any,
) -> Artifact:
    from potstill.cache import CacheSettings
    from potstill.cache import run as run_cache

    context = step_context("cache", folder=folder, models={"teacher": teacher}, data={"traces": [source]})
    chosen = CacheSettings.model_validate(
        {"do": "cache", "model": "teacher", "data": "traces", "top_k": 8, **fields}
    )
    return seal(context.folder, "cache", run_cache(chosen, context))


# --- what comes out


def test_training_lowers_the_loss_of_held_out_rows_and_keeps_the_curve(train: Training) -> None:
    result, _, context = train(epochs=3)
    history = result.metrics["history"]
    steps, evaluations = ([point for point in history if key in point] for key in ("loss", "eval_loss"))
    assert [point["step"] for point in steps] == list(range(1, 10))
    assert [point["step"] for point in evaluations] == [0, 3, 6, 9]  # start, every epoch, end
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    assert result.counts["rows"] == 10
    assert result.counts["held_out_rows"] == 2
    assert result.tokens == sum(point["tokens"] for point in steps)
    assert not any("tokens_per_s" in point for point in history)
    logged = [event for event in context.reporter.events if event["event"] == "train_log"]
    assert [event["optimiser_step"] for event in logged if "tokens_per_s" in event] == list(range(1, 10))


def test_it_says_what_is_trained(train: Training) -> None:
    result, _, context = train(epochs=0.3)
    assert result.counts["steps"] == 1
    assert result.counts["trained_parameters"] == result.counts["parameters"]
    assert any("(100.00%)" in line for line in context.reporter.said)
    assert result.metrics["untouched"] == []


def test_groups_are_told_and_kept_in_a_table(train: Training) -> None:
    result, _, context = train(
        max_steps=1, groups=[{"match": "embed_tokens", "lr_multiplier": 0}, {"match": "mlp"}]
    )
    table = result.metrics["parameter_groups"]
    assert [(row["match"], row["lr"]) for row in table] == [
        ("embed_tokens", 0),
        ("mlp", 5e-3),
        ("(all others)", 5e-3),
    ]
    assert result.counts["trained_parameters"] == result.counts["parameters"] - table[0]["parameters"]
    assert any(line.startswith("embed_tokens") and "frozen" in line for line in context.reporter.said)


def test_extra_evaluations_come_every_so_many_steps(train: Training) -> None:
    result, _, _ = train(epochs=1, evaluate_every=2)
    assert [point["step"] for point in result.metrics["history"] if "eval_loss" in point] == [0, 2, 3]


def test_processes_compare_the_checkpoint_that_they_go_on_from(
    train: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[dict[str, str]] = []
    monkeypatch.setattr("potstill.train.step.check_agreement", compared.append)
    with pytest.raises(Interrupted):
        train(stop_at=3, max_steps=6)
    train(max_steps=6)
    assert compared == [{"checkpoints to go on from": name} for name in ("none", "checkpoint-3")]


def test_max_steps_decides_the_length_and_progress_knows_its_tokens(train: Training) -> None:
    result, _, context = train(epochs=1, max_steps=5)
    assert result.counts["steps"] == 5
    assert context.reporter.totals == [result.tokens]


def test_the_saved_folder_loads_in_plain_transformers_and_stops_at_the_end_of_a_turn(
    train: Training, traces: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    same = traces(8, name="same", response="19.", held_out_every=100)
    _, folder, _ = train(data=same, epochs=15, lr=2e-2, schedule="constant")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    prompt = [{"role": "user", "content": "What is 1 + 2?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    answer = generated[0, ids.shape[1] :].tolist()
    assert tokenizer.decode(answer) == "19.<|im_end|>"
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_model_that_states_what_cannot_be_saved_is_saved_all_the_same(
    train: Training, tiny_model_folder: Path
) -> None:
    path = tiny_model_folder / "generation_config.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stated, "do_sample": False, "temperature": 0.6}), encoding="utf-8")
    _, folder, _ = train(max_steps=1)
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["temperature"] == 0.6


# --- teacher's logits


@pytest.fixture
def teacher(build_tiny_model: Any, tmp_path: Path, base: Any) -> TransformersModel:
    """A model of the student's tokenizer with other weights."""
    from transformers import AutoTokenizer

    build_tiny_model(seed=5).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(base.path).save_pretrained(tmp_path / "teacher")
    return TransformersModel(path=str(tmp_path / "teacher"))


def test_cached_logits_are_a_training_set_by_themselves(
    train: Training, step_context: Any, seal: Any, traces: Any, teacher: TransformersModel
) -> None:
    cache = cached(step_context, seal, teacher, traces(), temperatures=[1.0, 2.0])
    result, _, _ = train("kl", data=cache, epochs=4, alpha=1.0, temperature=2.0)
    first, *_, last = [point for point in result.metrics["history"] if "eval_kl" in point]
    assert result.counts["rows"] == 10
    assert last["eval_kl"] < first["eval_kl"]
    assert last["eval_loss"] == pytest.approx(4 * last["eval_kl"])  # T^2 KL alone
    blended, _, _ = train("blend", data=cache, epochs=1, temperature=2.0)
    point = blended.metrics["history"][-1]
    assert point["eval_loss"] == pytest.approx(0.5 * point["eval_cross_entropy"] + 0.5 * 4 * point["eval_kl"])
    with pytest.raises(TrainingError, match="weighs each id by the student's own probability"):
        train("reverse", data=cache, divergence="reverse_kl")
    means, _, _ = train("batchmean", data=cache, max_steps=1, alpha=1.0, kl_reduction="batchmean")
    first, *_ = [point for point in means.metrics["history"] if "eval_kl" in point]
    held_out = LogitCache.open(cache.folder)
    tokens_a_row = held_out.supervised[held_out.held_out].mean()
    assert first["eval_loss"] == pytest.approx(tokens_a_row * first["eval_kl"])
    with pytest.raises(DataError, match="temperature 3"):
        train("undeclared", data=cache, temperature=3.0)
    short, _, _ = train("short", data=cache, max_steps=1, max_length=35)
    assert short.counts["shortened_rows"] > 0


def test_the_mass_outside_a_caches_ids_is_logged_beside_kl_and_agreement(
    train: Training, step_context: Any, seal: Any, traces: Any, teacher: TransformersModel
) -> None:
    sealed = cached(step_context, seal, teacher, traces(), top_k=8)
    result, _, _ = train("tail", data=sealed, batch=10, max_steps=1, alpha=1.0)
    cache = LogitCache.open(sealed.folder)
    for is_held_out, prefix in ((True, "eval_"), (False, "")):
        signal = cache.signals([n for n in range(len(cache)) if cache.held_out[n] == is_held_out], 1.0)
        assert isinstance(signal, Sparse)
        tail = float(signal.log_tail_N.exp().mean())
        assert tail > 0.5, "a random teacher has much of its mass elsewhere"
        (point, *_) = [one for one in result.metrics["history"] if f"{prefix}kl" in one]
        assert point[f"{prefix}teacher_tail"] == pytest.approx(tail, rel=1e-3)
        assert 0 <= point[f"{prefix}agreement"] <= 1


def test_a_cache_read_at_a_smaller_k_trains_as_one_captured_at_it(
    train: Training, step_context: Any, seal: Any, traces: Any, teacher: TransformersModel
) -> None:
    source = traces()
    losses = {}
    for name, kept, asked in (("read at 8", 64, 8), ("captured at 8", 8, None), ("all 64", 64, None)):
        cache = cached(step_context, seal, teacher, source, top_k=kept, folder=f"cache of {name}")
        fields = {} if asked is None else {"top_k": asked}
        # Adam makes much of small differences: at a low rate rounding to bf16 stays small.
        result, _, _ = train(name, data=cache, max_steps=3, alpha=1.0, lr=1.0e-4, **fields)
        losses[name] = [point["loss"] for point in result.metrics["history"] if "loss" in point]
    assert losses["read at 8"] == pytest.approx(losses["captured at 8"], rel=0.01)
    assert losses["read at 8"] != pytest.approx(losses["all 64"], rel=0.02)
    with pytest.raises(DataError, match="1 to 64"):
        train("more", data=cache, top_k=65)


def test_a_k_without_a_cache_is_an_error(train: Training, teacher: TransformersModel) -> None:
    with pytest.raises(TrainingError, match="top_k is 8, but the teacher's logits are not read from a cache"):
        train(top_k=8, teacher=teacher)


def test_a_weight_for_the_teacher_without_its_logits_is_an_error(train: Training) -> None:
    with pytest.raises(TrainingError, match=r"alpha is 0\.5, but there is no teacher"):
        train(alpha=0.5)
    with pytest.raises(TrainingError, match=r"divergence is jsd, but there is no teacher"):
        train(divergence="jsd")


def test_a_teacher_in_memory_is_learned_from_beside_traces(
    train: Training, step_context: Any, seal: Any, traces: Any, teacher: TransformersModel
) -> None:
    result, _, _ = train("online", teacher=teacher, epochs=3, alpha=1.0, temperature=2.0)
    first, *_, last = [point for point in result.metrics["history"] if "eval_kl" in point]
    assert last["eval_kl"] < first["eval_kl"]
    assert last["eval_loss"] == pytest.approx(4 * last["eval_kl"])
    for divergence in ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "adaptive_kl"):
        found, _, _ = train(divergence, teacher=teacher, max_steps=1, alpha=1.0, divergence=divergence)
        assert found.metrics["eval_loss_before"] != result.metrics["eval_loss_before"]
    cache = cached(step_context, seal, teacher, traces(name="scored"))
    with pytest.raises(TrainingError, match="one teacher"):
        train("both", teacher=teacher, data=cache)


@pytest.fixture
def wide_teacher(build_tiny_model: Any, tmp_path: Path, base: Any) -> TransformersModel:
    """A deeper and wider model of the student's tokenizer."""
    from transformers import AutoTokenizer

    build_tiny_model(seed=5, hidden_size=48, num_hidden_layers=4).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(base.path).save_pretrained(tmp_path / "wide")
    return TransformersModel(path=str(tmp_path / "wide"))


def test_inner_states_of_a_deeper_and_wider_teacher_are_learned_from_and_projections_saved_apart(
    train: Training, wide_teacher: TransformersModel, seal: Any, step_context: Any, traces: Any
) -> None:
    result, folder, context = train(
        "feature", teacher=wide_teacher, epochs=4, feature={"kind": "hidden_mse", "embeddings": True}
    )
    before, *_, after = [point for point in result.metrics["history"] if "eval_feature" in point]
    assert after["eval_feature"] < before["eval_feature"]
    assert result.metrics["feature"] == {
        "kind": "hidden_mse",
        "layers": {"0": 0, "1": 2, "2": 4},
        "projections": {"0": [48, 32], "1": [48, 32], "2": [48, 32]},
    }
    assert result.counts["trained_parameters"] == result.counts["parameters"]  # projections are no part of it
    assert any(
        line.startswith("feature hidden_mse: the student's layer 0 to 0, 1 to 2")
        for line in context.reporter.said
    )
    assert (folder / "feature" / "projections.safetensors").is_file()
    plain, _, _ = train("plain", epochs=4)
    assert result.counts["parameters"] == plain.counts["parameters"]
    on, _, _ = train("on", student=TransformersModel(path=str(folder)), max_steps=1)
    assert on.metrics["eval_loss_before"] == pytest.approx(after["eval_cross_entropy"], rel=1e-5)
    cache = cached(step_context, seal, wide_teacher, traces(name="scored"))
    with pytest.raises(TrainingError, match="cached logits are a teacher's answers alone"):
        train("stored", data=cache, feature={"kind": "cka"})


def test_logits_of_another_tokenizer_are_refused(
    train: Training,
    step_context: Any,
    seal: Any,
    traces: Any,
    build_tiny_model: Any,
    tmp_path: Path,
    base: Any,
) -> None:
    from transformers import AutoTokenizer

    cache = cached(step_context, seal, base, traces())
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenizer.add_tokens(["<think>"])
    build_tiny_model().save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="another tokenizer"):
        train(student=TransformersModel(path=str(tmp_path / "other")), data=cache)


# --- rows


def test_rows_that_are_all_held_out_are_refused(train: Training, traces: Any) -> None:
    with pytest.raises(TrainingError, match="all 3 are held out"):
        train(data=traces(3, name="held-out", held_out_every=1))


def test_prompts_without_responses_are_refused_by_row(train: Training, traces: Any) -> None:
    with pytest.raises(DataError, match=r"row 1 .*nothing to learn"):
        train(data=traces(3, name="prompts", response=None))


def test_rows_over_the_length_are_cut_at_their_end_or_left_out_and_counted(train: Training) -> None:
    result, _, context = train(max_steps=1, max_length=28)
    cut, left_out = result.counts["shortened_rows"], result.counts["left_out_rows"]
    assert cut > 0
    assert left_out > 0
    assert result.counts["rows"] + result.counts["held_out_rows"] == 12 - left_out
    assert f"{cut} rows were cut to 28 tokens" in context.reporter.said
    assert any(
        line.startswith(f"{left_out} rows were left out; the first: the prompt")
        for line in context.reporter.said
    )


def test_a_length_that_leaves_nothing_to_learn_is_an_error_that_names_a_row(train: Training) -> None:
    with pytest.raises(DataError, match="row 1"):
        train(max_length=8)


# --- adapters


def test_an_adapter_is_saved_with_its_base_and_trained_on_without_lora(
    train: Training, seal: Any, base: TransformersModel
) -> None:
    result, folder, _ = train("first", epochs=1, lora={"rank": 4, "dropout": 0.1})
    assert 0 < result.counts["trained_parameters"] < 0.3 * result.counts["parameters"]
    assert result.extra["precision"]["trained"] == "float32"
    assert result.extra["base"] == {
        "engine": "transformers",
        "path": base.path,
        "trust_remote_code": False,
        "add_tokens": [],
    }
    assert not (folder / "model.safetensors").exists()
    seal(folder, "train", result)
    adapter = TransformersModel(path=str(folder))
    plain, adapted = (load(one, dtype=torch.float32).model for one in (base, adapter))
    ids = torch.arange(10, 30)[None]
    assert not torch.equal(plain(ids, use_cache=False).logits, adapted(ids, use_cache=False).logits)

    on, on_folder, _ = train("second", student=adapter, epochs=1)
    assert on.counts["trained_parameters"] == result.counts["trained_parameters"]
    assert on.extra == result.extra  # the base, never the adapter before
    assert on.metrics["eval_loss_before"] == pytest.approx(result.metrics["eval_loss"], rel=1e-3)
    assert weights(on_folder) != weights(folder)
    with pytest.raises(TrainingError, match="is an adapter, and lora asks for another"):
        train("third", student=adapter, lora={})


def test_an_unknown_layer_for_an_adapter_is_an_error_that_names_the_layers(train: Training) -> None:
    with pytest.raises(TrainingError, match="q_proj"):
        train(lora={"target": ["query"]})


def test_the_same_adapter_is_the_same_file(train: Training) -> None:
    one, other = (train(name, max_steps=2, lora={"rank": 2})[1] for name in ("one", "other"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    targets = json.loads((one / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    assert targets == sorted(targets)


# --- early stopping


OVERFITS = {"epochs": 30, "lr": 3e-2, "early_stopping": {"patience": 2}, "schedule": "constant"}


def test_training_stops_early_and_keeps_the_best_weights(train: Training, seal: Any) -> None:
    result, folder, context = train("stopped", **OVERFITS)
    points = {one["step"]: one["eval_loss"] for one in result.metrics["history"] if "eval_loss" in one}
    kept = result.metrics["kept_step"]
    assert points[kept] == min(points.values()) == result.metrics["eval_loss"]
    assert 0 < kept == result.counts["steps"] - 2 * 3 < 90  # two epochs of three steps came after it
    assert any(f"weights of step {kept}" in line for line in context.reporter.said)
    seal(folder, "train", result)
    again, _, _ = train("again", student=TransformersModel(path=str(folder)), max_steps=1)
    assert again.metrics["eval_loss_before"] == pytest.approx(result.metrics["eval_loss"], rel=1e-5)


def test_evaluations_that_are_asked_for_besides_change_nothing_of_what_is_kept(train: Training) -> None:
    expected, expected_folder, _ = train("rare", **OVERFITS)
    found, folder, _ = train("often", evaluate_every=1, **OVERFITS)
    assert found.metrics["kept_step"] == expected.metrics["kept_step"]
    assert weights(folder) == weights(expected_folder)


@pytest.mark.parametrize("after_best", [-1, 1, 4])
def test_stopping_early_after_an_interruption_is_the_same(train: Training, after_best: int) -> None:
    expected, expected_folder, _ = train("whole", **OVERFITS)
    with pytest.raises(Interrupted):
        train("parted", stop_at=expected.metrics["kept_step"] + after_best, **OVERFITS)
    found, folder, _ = train("parted", **OVERFITS)
    assert weights(folder) == weights(expected_folder)
    assert found.metrics == expected.metrics


def test_stopping_early_needs_held_out_rows(train: Training, traces: Any) -> None:
    with pytest.raises(TrainingError, match="loss of held-out rows, and there are none"):
        train(data=traces(4, name="all", held_out_every=100), early_stopping={})


# --- models and arguments that cannot be trained


def test_quantised_weights_need_an_adapter(train: Training, base: TransformersModel) -> None:
    with pytest.raises(TrainingError, match="quantised to nf4"):
        train(student=base.model_copy(update={"quantize": "nf4"}))


def test_a_model_of_another_engine_cannot_be_trained(train: Training) -> None:
    class Remote(Settings):
        engine: str = "openai"

    with pytest.raises(ModelError, match="base is a model of engine openai"):
        train(student=Remote())


def test_a_missing_model_is_told(train: Training, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        train(student=TransformersModel(path=str(tmp_path / "nowhere")))


def test_an_unknown_training_argument_is_named_with_the_nearest(train: Training) -> None:
    with pytest.raises(RecipeError, match="did you mean 'adam_epsilon'"):
        train(trainer={"adam_epsilom": 1e-6})


def test_a_wrong_value_of_a_training_argument_is_told(train: Training) -> None:
    with pytest.raises(RecipeError, match="optim"):
        train(trainer={"optim": "none-such-optim"})


def test_a_training_argument_reaches_the_trainer(train: Training) -> None:
    adam, sgd = (
        train(name, max_steps=2, trainer=extra)[1] for name, extra in (("a", {}), ("s", {"optim": "sgd"}))
    )
    assert weights(adam) != weights(sgd)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_activation_checkpointing_changes_nothing_but_memory(
    train: Training, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = {"kept": 0, "recomputed": 0}
    losses = {}
    plain = LlamaMLP.forward
    # It is off where activations are recomputed.
    monkeypatch.setattr("potstill.scoring.can_share_prefix", lambda model: False)
    for name in calls:

        def counted(module: Any, hidden: Any, name: str = name) -> Any:
            calls[name] += 1
            return plain(module, hidden)

        monkeypatch.setattr(LlamaMLP, "forward", counted)
        result, _, _ = train(name, max_steps=3, lora=lora, activation_checkpointing=name == "recomputed")
        losses[name] = [point["loss"] for point in result.metrics["history"] if "loss" in point]
    assert calls["recomputed"] == calls["kept"] + 3 * 2  # once more in each step's backward, in both blocks
    assert losses["recomputed"] == losses["kept"]


# --- trackers


def test_tensorboard_has_every_figure_and_the_artifact_none_of_its_files(train: Training) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, folder, context = train("tracked", epochs=1, report_to=["tensorboard"])
    _, plain, _ = train("plain", epochs=1)
    (logs,) = (context.cache_folder / "tensorboard").iterdir()
    events = EventAccumulator(str(logs)).Reload()
    assert {"train/loss", "train/cross_entropy", "train/mfu", "eval/loss"} <= set(events.Tags()["scalars"])
    points = [point["loss"] for point in result.metrics["history"] if "loss" in point]
    assert [one.value for one in events.Scalars("train/loss")] == pytest.approx(points)
    assert {path.name for path in folder.iterdir()} == {path.name for path in plain.iterdir()}


def test_trackio_keeps_every_step_in_its_folder(
    train: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    result, _, _ = train("tracked", epochs=1, report_to=["trackio"])
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "potstill.db")) as database:
        rows = database.execute("SELECT metrics FROM metrics ORDER BY step").fetchall()
    logged = [json.loads(metrics) for (metrics,) in rows]
    losses = [point["loss"] for point in result.metrics["history"] if "loss" in point]
    assert [one["train/loss"] for one in logged if "train/loss" in one] == pytest.approx(losses)


# --- interruption


MID_EPOCH, BOUNDARY = 5, 6  # of three steps an epoch


@pytest.mark.parametrize("stop_at", [MID_EPOCH, BOUNDARY])
@pytest.mark.parametrize("lora", [None, {"rank": 4, "dropout": 0.3}], ids=["all", "lora"])
def test_with_features_interrupted_equals_uninterrupted_and_so_do_the_projections(
    train: Training, wide_teacher: TransformersModel, stop_at: int, lora: Any
) -> None:
    fields: dict[str, Any] = {"epochs": 4, "lora": lora, "feature": {"kind": "hidden_mse", "weight": 2.0}}
    expected, expected_folder, _ = train("whole", teacher=wide_teacher, **fields)
    with pytest.raises(Interrupted):
        train("parted", teacher=wide_teacher, stop_at=stop_at, **fields)
    found, folder, context = train("parted", teacher=wide_teacher, **fields)
    assert f"goes on after step {stop_at} of 12" in context.reporter.said
    assert weights(folder) == weights(expected_folder)
    assert weights(folder / "feature") == weights(expected_folder / "feature")
    assert found.metrics == expected.metrics


@pytest.mark.parametrize("stop_at", [MID_EPOCH, BOUNDARY])
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"lora": {"rank": 4, "dropout": 0.3}},
        {
            "groups": [{"match": "embed_tokens", "lr_multiplier": 0}, {"match": "mlp", "lr_multiplier": 0.1}],
            "weight_decay": 0.1,
        },
    ],
    ids=["all", "lora", "groups"],
)
def test_interrupted_equals_uninterrupted(train: Training, stop_at: int, method: Any) -> None:
    fields = {"epochs": 4, "evaluate_every": 2, **method}
    expected, expected_folder, _ = train("whole", **fields)
    with pytest.raises(Interrupted):
        train("parted", stop_at=stop_at, **fields)
    assert unfinished(expected_folder.parent / "parted") == [f"checkpoint-{stop_at}"]
    assert not list((expected_folder.parent / "parted").glob("*.safetensors"))

    found, folder, context = train("parted", **fields)
    assert f"goes on after step {stop_at} of 12" in context.reporter.said
    done_again = [event["optimiser_step"] for event in context.reporter.events if "tokens_per_s" in event]
    assert done_again == list(range(stop_at + 1, 13))
    assert weights(folder) == weights(expected_folder)
    assert found.metrics == expected.metrics
    assert found.tokens == expected.tokens
    assert found.counts == expected.counts
    assert found.model_identity == expected.model_identity


def test_a_run_killed_while_it_wrote_a_checkpoint_resumes_from_the_one_before(train: Training) -> None:
    _, expected_folder, _ = train("whole", epochs=2)
    with pytest.raises(Interrupted):
        train("killed", stop_at=2, epochs=2)
    scratch = expected_folder.parent / "killed" / "scratch"
    half = scratch / "checkpoint-4"
    half.mkdir()
    (half / "trained.safetensors").write_bytes(b"half of a file")
    _, folder, context = train("killed", epochs=2)
    assert "goes on after step 2 of 6" in context.reporter.said
    assert weights(folder) == weights(expected_folder)
    assert not half.exists()


def test_a_checkpoint_after_every_step_changes_nothing_and_one_is_kept(train: Training) -> None:
    _, expected_folder, _ = train("rare", epochs=1)
    _, folder, _ = train("often", epochs=1, checkpoint_minutes=0)
    assert unfinished(folder) == ["checkpoint-2"]  # none at the last step
    assert weights(folder) == weights(expected_folder)
    assert not (expected_folder / "scratch" / "checkpoint-2").exists()


def test_a_full_disk_stops_with_what_to_do(train: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("potstill.train.trainer.save_file", no_room)
    with pytest.raises(StoreError, match="No space left on device"):
        train(epochs=1, checkpoint_minutes=0)


@pytest.mark.gpu
def test_it_trains_on_a_gpu(train: Training) -> None:
    result, folder, _ = train(epochs=3, device="cuda")
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    assert result.extra["precision"] == {"trained": "float32", "autocast": "bfloat16"}
    assert weights(folder)


@pytest.mark.gpu
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_on_a_gpu_a_student_learns_from_a_teacher_beside_it(
    train: Training, teacher: TransformersModel, alpha: float
) -> None:
    result, _, _ = train("online", teacher=teacher, epochs=3, alpha=alpha, temperature=2.0, device="cuda")
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_on_a_gpu_an_adapter_is_trained_on_a_frozen_base_in_four_bits_or_not(
    train: Training, base: TransformersModel, quantize: str | None
) -> None:
    if quantize:
        pytest.importorskip("bitsandbytes")
    student = base.model_copy(update={"quantize": quantize})
    result, _, _ = train(student=student, lora={"rank": 4}, epochs=3, lr=5e-3, device="cuda")
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
