import pytest
from pydantic import ValidationError

from potstill.core.settings import meaning
from potstill.train import TrainSettings

MINIMAL = {"do": "train", "student": "base", "data": "traces"}


def settings(**fields: object) -> TrainSettings:
    return TrainSettings.model_validate({**MINIMAL, **fields})


@pytest.mark.parametrize(
    ("field", "ours"),
    [
        ("learning_rate", "lr"),
        ("gradient_accumulation_steps", "batch"),
        ("num_train_epochs", "epochs"),
        ("logging_nan_inf_filter", "not finite"),
        ("save_steps", "checkpoint_minutes"),
        ("bf16", "autocast"),
        ("seed", "the recipe's seed"),
    ],
)
def test_a_field_that_we_own_is_refused_under_trainer_and_ours_is_named(field: str, ours: str) -> None:
    with pytest.raises(ValidationError, match=f"{field} is decided by .*{ours}"):
        settings(trainer={field: 1})


def test_other_training_arguments_pass() -> None:
    assert settings(trainer={"adam_epsilon": 1e-6}).trainer == {"adam_epsilon": 1e-6}


def test_every_owned_field_exists_in_transformers() -> None:
    import dataclasses

    from transformers import TrainingArguments

    from potstill.train.settings import OWNED

    known = {one.name for one in dataclasses.fields(TrainingArguments)}
    assert set(OWNED) - known == {"warmup_ratio"}  # which transformers removed, and people still write


def test_a_share_of_the_rate_to_end_at_needs_a_schedule_that_falls() -> None:
    assert settings(min_lr_ratio=0.2, schedule="linear").min_lr_ratio == 0.2
    with pytest.raises(ValidationError, match="schedule is constant"):
        settings(min_lr_ratio=0.2, schedule="constant")


def test_a_base_is_not_held_to_without_bound() -> None:
    with pytest.raises(ValidationError, match="finite"):
        settings(base_kl=float("inf"))


@pytest.mark.parametrize("betas", [[0.9], [0.9, 1.0], [0.9, 0.95, 0.99]])
def test_betas_are_two_numbers_below_one(betas: list[float]) -> None:
    with pytest.raises(ValidationError):
        settings(betas=betas)


@pytest.mark.parametrize(
    "wrong", [{"alpha": 1.1}, {"batch": 0}, {"epochs": 0}, {"temperature": 0}, {"lora": {"rank": 0}}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        settings(**wrong)


def test_how_a_training_is_executed_is_no_part_of_what_it_makes() -> None:
    executed = settings(max_tokens=64, checkpoint_minutes=0.5, evaluate_every=3, device="cpu")
    assert meaning(executed) == meaning(settings())
    assert meaning(settings(lr=2e-4)) != meaning(settings())


# --- features


def test_a_layer_map_has_numbers_whether_yaml_json_or_the_command_line_gave_it() -> None:
    for layers in ({1: 2, 3: 6}, {"1": 2, "3": 6}):
        feature = settings(feature={"kind": "cka", "layers": layers}).feature
        assert feature is not None
        assert feature.layers == {1: 2, 3: 6}
    dumped = settings(feature={"kind": "cka", "layers": {1: 2}}).model_dump(mode="json")
    assert settings(feature=dumped["feature"]) == settings(feature={"kind": "cka", "layers": {1: 2}})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "kind"),
        ({"kind": "mse"}, "kind"),
        ({"kind": "cka", "weight": 0}, "weight"),
        ({"kind": "cka", "layers": "every"}, "layers"),
        ({"kind": "cka", "layers": {}}, "layers is a mapping"),
        ({"kind": "cka", "layers": {-1: 2}}, "layers is a mapping"),
        ({"kind": "cka", "layers": {"first": 2}}, "layers"),
        ({"kind": "cka", "relation_heads": 4}, "relation_heads belongs to relations"),
        ({"kind": "cka", "projection_lr_multiplier": 0.5}, "cka needs no projection"),
        ({"kind": "relations", "projection_lr_multiplier": 0.5}, "relations needs no projection"),
        ({"kind": "relations", "embeddings": True}, "layer 1 is the first"),
        ({"kind": "relations", "layers": {0: 1}}, "layer 1 is the first"),
        ({"kind": "relations", "layers": {1: 0}}, "layer 1 is the first"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(feature=wrong)


def test_tokens_and_max_steps_both_say_where_training_ends() -> None:
    with pytest.raises(ValidationError, match="leave one of them out"):
        TrainSettings.model_validate(
            {"do": "train", "student": "s", "data": "rows", "tokens": 10, "max_steps": 2}
        )
