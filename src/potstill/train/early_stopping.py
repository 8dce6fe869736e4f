"""Stopping when the held-out loss falls no more, and keeping the best weights that were seen."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from potstill.core.errors import TrainingError
from potstill.core.hashing import hash_file
from potstill.core.store import wait_for_disk, write_atomically
from potstill.train.settings import EarlyStoppingSettings

__all__ = ["EarlyStopping", "best_evaluation"]


def best_evaluation(losses: Iterable[tuple[int, float]], min_delta: float = 0.0) -> tuple[int | None, int]:
    """The step of the lowest loss among (step, loss), and how many evaluations came since the last fall.

    A fall is by more than `min_delta` below the loss of the fall before it, so that many small ones add up
    to one. Of equal losses the first is kept.
    """
    step, lowest, fallen_to, later = None, float("inf"), float("inf"), 0
    for at, loss in losses:
        if loss < lowest:
            step, lowest = at, loss
        if loss < fallen_to - min_delta:
            fallen_to, later = loss, 0
        else:
            later += 1
    return step, later


class EarlyStopping(TrainerCallback):
    """Watches the evaluations of a trainer, whose log says all that there is to know after an interruption.

    Where the arguments have no evaluations, it asks for those that count: every so many steps and
    at the last.
    `save` and `load` write the trained weights to a file and read them back; files lie in the trainer's
    output folder, one for the best step so far and one for that of the newest checkpoint, each with its hash
    beside it. Several processes decide alike, since they have one log; `save` is to write in one of them
    alone.
    """

    def __init__(
        self, settings: EarlyStoppingSettings, save: Callable[[Path], None], load: Callable[[Path], None]
    ) -> None:
        self.settings, self.save, self.load = settings, save, load
        self.kept_step: int | None = None

    def _judge(self, state: TrainerState) -> tuple[int | None, int]:
        return best_evaluation(
            [(one["step"], one["eval_loss"]) for one in state.log_history if self._counts(one, state)],
            self.settings.min_delta,
        )

    def _counts(self, entry: Mapping[str, Any], state: TrainerState) -> bool:
        # An evaluation that was asked for besides must not change what comes out.
        return "eval_loss" in entry and self._is_counted(entry["step"], state)

    def _is_counted(self, step: int, state: TrainerState) -> bool:
        every = self.settings.every
        return every is None or step % every == 0 or step >= state.max_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Where training goes on, raise TrainingError unless the best weights so far are as they were."""
        best, _ = self._judge(state)
        if best is not None:
            _check(_file(Path(str(args.output_dir)), best))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Ask for an evaluation that counts, unless the arguments say when to evaluate."""
        if args.eval_strategy == IntervalStrategy.NO and self._is_counted(state.global_step, state):
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Keep the weights where the loss is the lowest; stop where it has not fallen for too long."""
        if not self._counts(state.log_history[-1], state):
            return
        best, later = self._judge(state)
        folder = Path(str(args.output_dir))
        if best is not None and best == state.global_step:
            self.save(_file(folder, best))
            if args.should_save:
                _seal(_file(folder, best))
        if later >= self.settings.patience:
            control.should_training_stop = True
            # Training that resumed from here would go on.
            control.should_save = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Remove the weights that no checkpoint refers to any more."""
        if not args.should_save:
            return
        best, _ = self._judge(state)
        folder = Path(str(args.output_dir))
        for path in folder.glob(_file(folder, "*").name):
            if best is None or path != _file(folder, best):
                path.unlink()
                _hash_file(path).unlink(missing_ok=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Put the best weights in the place of the last ones."""
        self.kept_step, _ = self._judge(state)
        if self.kept_step is not None and self.kept_step != state.global_step:
            self.load(_file(Path(str(args.output_dir)), self.kept_step))


def _file(folder: Path, step: int | str) -> Path:
    return folder / f"best-{step}.safetensors"


def _hash_file(weights: Path) -> Path:
    return weights.with_suffix(".sha256")


def _seal(weights: Path) -> None:
    wait_for_disk(weights)
    write_atomically(_hash_file(weights), hash_file(weights))


def _check(weights: Path) -> None:
    try:
        is_whole = _hash_file(weights).read_text(encoding="utf-8") == hash_file(weights)
    except FileNotFoundError:
        is_whole = False
    if not is_whole:
        raise TrainingError(
            "the weights of the lowest held-out loss so far are damaged or missing",
            where=str(weights),
            expected="the weights that the checkpoint's log names as the best",
            mend="remove the folder that they lie in and run again: this training begins anew",
        )
