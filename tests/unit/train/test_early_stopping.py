"""Training stops when the held-out loss falls no more, and what is kept is the best that was seen."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.errors import TrainingError
from potstill.train.early_stopping import best_evaluation

LOSSES = st.lists(st.integers(0, 20).map(float), min_size=1, max_size=30)


@given(LOSSES)
def test_the_best_is_the_first_of_the_lowest(losses: list[float]) -> None:
    step, later = best_evaluation(enumerate(losses))
    assert step == losses.index(min(losses))
    assert later == len(losses) - 1 - step


def test_a_fall_that_is_too_small_uses_up_patience_and_is_kept_all_the_same() -> None:
    assert best_evaluation([(0, 6.0), (10, 5.97), (20, 5.94), (30, 5.92)], min_delta=0.1) == (30, 3)


def test_many_small_falls_add_up_to_one() -> None:
    assert best_evaluation([(0, 1.0), (1, 0.95), (2, 0.89)], min_delta=0.1) == (2, 0)
    assert best_evaluation([(0, 1.0), (1, 0.95), (2, 0.89), (3, 0.88)], min_delta=0.1) == (3, 1)


@given(LOSSES, st.floats(0, 25))
def test_what_is_kept_does_not_depend_on_how_far_a_loss_must_fall(
    losses: list[float], min_delta: float
) -> None:
    assert best_evaluation(enumerate(losses), min_delta)[0] == losses.index(min(losses))


def test_the_lowest_loss_is_kept_where_it_ends_the_training(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from potstill.train.early_stopping import EarlyStopping
    from potstill.train.settings import EarlyStoppingSettings

    stopping = EarlyStopping(EarlyStoppingSettings(patience=1, min_delta=0.5), Path.touch, Path.unlink)
    arguments: Any = SimpleNamespace(output_dir=tmp_path, should_save=True)
    control: Any = SimpleNamespace(should_training_stop=False)
    state: Any = SimpleNamespace(max_steps=20, log_history=[])
    for step, loss in ((1, 3.0), (2, 2.9)):
        state.global_step = step
        state.log_history.append({"step": step, "eval_loss": loss})
        stopping.on_evaluate(arguments, state, control)
    assert control.should_training_stop
    assert (tmp_path / "best-2.safetensors").exists()


def test_no_evaluation_is_no_best() -> None:
    assert best_evaluation([]) == (None, 0)


@given(LOSSES, st.integers(1, 4))
def test_patience_ends_where_so_many_evaluations_in_a_row_were_no_better(
    losses: list[float], patience: int
) -> None:
    ends = [n for n in range(1, len(losses) + 1) if best_evaluation(enumerate(losses[:n]))[1] >= patience]
    lowest = float("inf")
    in_a_row = 0
    for number, loss in enumerate(losses, start=1):
        in_a_row = 0 if loss < lowest else in_a_row + 1
        lowest = min(lowest, loss)
        if in_a_row >= patience:
            assert ends[0] == number
            return
    assert not ends


def test_the_files_of_steps_that_no_checkpoint_knows_are_removed(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from potstill.train.early_stopping import EarlyStopping
    from potstill.train.settings import EarlyStoppingSettings

    written: list[Path] = []

    def save(path: Path) -> None:
        path.write_text("", encoding="utf-8")
        written.append(path)

    stopping = EarlyStopping(EarlyStoppingSettings(patience=2, every=2), save, written.remove)
    arguments: Any = SimpleNamespace(output_dir=tmp_path, should_save=True)
    control: Any = SimpleNamespace(should_training_stop=False, should_save=True)
    state: Any = SimpleNamespace(global_step=0, max_steps=20, log_history=[])
    for step, loss in ((0, 3.0), (2, 2.0), (3, 1.0), (4, 1.5)):
        state.global_step = step
        state.log_history.append({"step": step, "eval_loss": loss})
        stopping.on_evaluate(arguments, state, control)
    # Step 3 was no counted evaluation.
    assert [path.name for path in written] == [f"best-{step}.safetensors" for step in (0, 2, 4)]
    of_another_process: Any = SimpleNamespace(output_dir=tmp_path, should_save=False)
    stopping.on_save(of_another_process, state, control)
    assert len(list(tmp_path.iterdir())) == 6
    stopping.on_save(arguments, state, control)
    assert {path.name for path in tmp_path.iterdir()} == {"best-4.safetensors", "best-4.sha256"}
    for step in (6, 8):
        assert not control.should_training_stop
        state.global_step = step
        state.log_history.append({"step": step, "eval_loss": 1.6})
        stopping.on_evaluate(arguments, state, control)
    assert (control.should_training_stop, control.should_save) == (True, False)


@pytest.mark.parametrize("damage", ["bit", "weights", "hash"])
def test_training_does_not_go_on_without_the_best_weights_as_they_were(tmp_path: Path, damage: str) -> None:
    from types import SimpleNamespace

    from potstill.train.early_stopping import EarlyStopping
    from potstill.train.settings import EarlyStoppingSettings

    def save(path: Path) -> None:
        path.write_bytes(b"weights")

    stopping = EarlyStopping(EarlyStoppingSettings(patience=2), save, Path.unlink)
    arguments: Any = SimpleNamespace(output_dir=tmp_path, should_save=True)
    control: Any = SimpleNamespace()
    state: Any = SimpleNamespace(global_step=0, max_steps=20, log_history=[])
    stopping.on_train_begin(arguments, state, control)
    state.global_step = 2
    state.log_history.append({"step": 2, "eval_loss": 1.0})
    stopping.on_evaluate(arguments, state, control)
    stopping.on_train_begin(arguments, state, control)

    weights = tmp_path / "best-2.safetensors"
    if damage == "bit":
        weights.write_bytes(b"weightr")
    else:
        weights.with_suffix(".sha256" if damage == "hash" else weights.suffix).unlink()
    with pytest.raises(TrainingError, match="damaged or missing") as error:
        stopping.on_train_begin(arguments, state, control)
    assert str(weights) in str(error.value)


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"min_delta": -1}, {"every": 0}])
def test_values_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    from pydantic import ValidationError

    from potstill.train.settings import EarlyStoppingSettings

    with pytest.raises(ValidationError):
        EarlyStoppingSettings.model_validate(wrong)
