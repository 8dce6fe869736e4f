"""What watches a training: it reports every step and decides when to evaluate, to checkpoint and to stop."""

import itertools
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from potstill.core.errors import Interrupted
from potstill.core.step import StepContext
from potstill.train import checkpoints
from potstill.train.saving import kept_epochs, save_epoch
from potstill.train.settings import TrainSettings
from potstill.train.trainer import DistillationTrainer

if TYPE_CHECKING:
    from potstill.core.events import Progress

__all__ = ["Watcher", "expert_load", "history_point"]

# What a second attempt at the same training would log otherwise, and a table that is kept apart.
_NO_POINT = frozenset({"tokens_per_s", "mfu", "expert_counts"})


def history_point(entry: dict[str, Any]) -> dict[str, Any]:
    """The figures of a step or evaluation in the trainer's log, without times; empty for other entries."""
    if "tokens" not in entry and "eval_loss" not in entry:
        return {}
    wanted = {name: value for name, value in entry.items() if name not in _NO_POINT}
    return {"step": wanted.pop("step"), **wanted} if "step" in wanted else wanted


def expert_load(log: list[dict[str, Any]], kept_step: int) -> list[dict[str, Any]]:
    """What each expert of each router got of the held-out rows, before and with the kept weights."""
    found = [entry for entry in log if "expert_counts" in entry]
    chosen = [*found[:1], *(entry for entry in found[1:] if entry["step"] == kept_step)]
    return [{"step": entry["step"], "counts": entry["expert_counts"]} for entry in chosen]


def _tokens_before(step: int, trainer: DistillationTrainer) -> int:
    """How many tokens all steps before `step` train on."""
    plan = trainer.plan
    epochs, steps = divmod(step, len(plan))
    plan.set_epoch(epochs)
    started = sum(plan.lengths[row] for rows in itertools.islice(plan, steps) for row in rows) if steps else 0
    return epochs * sum(plan.lengths) + started


class Watcher(TrainerCallback):
    """The tie between a trainer and the step that it runs in."""

    def __init__(self, settings: TrainSettings, context: StepContext) -> None:
        self.settings, self.context = settings, context
        self.steps_per_epoch, self.evaluates = 1, False
        self.saved_at = time.monotonic()
        self.progress: Progress
        self.trainer: DistillationTrainer

    def train(self, trainer: DistillationTrainer, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint where there is one. Raises Interrupted after saving another."""
        self.steps_per_epoch, self.evaluates = len(trainer.plan), len(trainer.held_out) > 0
        self.trainer = trainer
        steps = self.settings.max_steps or math.ceil(self.settings.epochs * self.steps_per_epoch)
        done = 0
        if checkpoint is not None:
            done = int(checkpoint.name.rpartition("-")[2])
            self.context.say(f"goes on after step {done:,} of {steps:,}")
        for name in kept_epochs(self.context.folder) if trainer.args.should_save else ():
            if int(name.removeprefix("epoch")) > done // self.steps_per_epoch:
                shutil.rmtree(self.context.folder / name)  # left by an attempt that came further
        tokens = _tokens_before(steps, trainer) - _tokens_before(done, trainer)
        self.saved_at = time.monotonic()
        with self.context.progress("training", total=tokens, unit="tokens") as self.progress:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Decide what follows the step."""
        step, every = state.global_step, self.settings.evaluate_every
        is_last = step >= state.max_steps
        # Here and not at the epoch's end, which comes after the checkpoint of its last step: a run that
        # resumes from that one would miss the evaluation.
        counted = self.settings.early_stopping.every if self.settings.early_stopping else None
        due = is_last or any(step % one == 0 for one in (self.steps_per_epoch, every, counted) if one)
        control.should_evaluate = self.evaluates and due
        keep = self.settings.keep_epochs
        if keep is not None and step % self.steps_per_epoch == 0:
            # Before the step's checkpoint, for the same reason.
            epoch, folder = step // self.steps_per_epoch, self.context.folder
            loaded, scratch = self.trainer.loaded, self.context.scratch
            save_epoch(loaded, epoch, folder, scratch, keep, writes=args.should_save)
        if not is_last:
            waited_s = time.monotonic() - self.saved_at
            control.should_save = self.trainer.on_any_rank(
                self.context.stop.is_set() or waited_s >= 60 * self.settings.checkpoint_minutes
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Complete the checkpoint, and stop where the user asked for it."""
        # Every rank writes a file of it, and they end or go on together once it is whole.
        is_asked_to_stop = self.trainer.on_any_rank(self.context.stop.is_set())
        with args.main_process_first(local=False):
            if args.should_save:
                checkpoints.complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        self.saved_at = time.monotonic()
        if is_asked_to_stop:
            raise Interrupted

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **objects: Any,
    ) -> None:
        """Report a step or an evaluation."""
        point, step = history_point(logs or {}), state.global_step
        if "tokens" in point:
            assert logs is not None
            speed = {"tokens_per_s": round(logs["tokens_per_s"], 1), "mfu": round(logs["mfu"], 4)}
            self.progress.advance(point["tokens"], loss=f"{point['loss']:.3f}")
            self.context.event("train_log", optimiser_step=step, **point, **speed)
        elif point:
            self.context.event("train_log", optimiser_step=step, **point)
            said = f"step {step:,}: held-out loss {point['eval_loss']:.3f}"
            if "eval_dead_experts" in point:
                said += (
                    f", {point['eval_dead_experts']:,} dead experts, "
                    f"load entropy {point['eval_expert_entropy']:.3f}"
                )
            self.context.say(said)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Report how a mixture's experts are used."""
        for point in expert_load(state.log_history[-1:], state.global_step):
            self.context.event("expert_load", optimiser_step=point["step"], counts=point["counts"])
