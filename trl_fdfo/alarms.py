"""
What tells that a reward is being gamed: it rises while something that is not trained on falls.

Watched are the control rewards of an evaluation and its diversity, each against its first evaluation, that of the model
before training. A fall counts where it is both relevant and more than noise:

    control     mean_0 - mean  >  max(alarm_control_drop std_0,        2 sqrt(se_0^2 + se^2))
    diversity   mean_0 - mean  >  max(alarm_diversity_drop mean_0,     2 sqrt(se_0^2 + se^2))

mean, std and se (standard error of the mean) are over prompts. Prompts and seeds are the same each time, which makes the
difference steadier than two independent means: two of these errors are a strict bound. All of it is in the logs of the
evaluations, and so in each checkpoint.
"""

import math
from collections.abc import Mapping, Sequence

from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from .fdfo_config import FDFOConfig


logger = logging.get_logger(__name__)

MIN_ERRORS = 2


class Alarms(TrainerCallback):
    """
    Raises an alarm where an evaluation shows that the reward is being gamed, and ends the run with `stop_on_alarm`.

    Args:
        args ([`FDFOConfig`]): `alarm_control_drop`, `alarm_diversity_drop` and `stop_on_alarm`.
        controls (`Sequence[str]`): Names of the control rewards.
        has_diversity (`bool`): Whether evaluations have `eval_diversity`.
    """

    def __init__(self, args: FDFOConfig, controls: Sequence[str] = (), has_diversity: bool = False):
        self._args = args
        self._evaluate_at_start = args.eval_on_start
        self._controls = list(controls) if args.alarm_control_drop is not None else []
        self._has_diversity = has_diversity and args.alarm_diversity_drop is not None
        self._is_to_stop = False

    @property
    def watched(self) -> list[str]:
        """The metrics whose fall raises an alarm."""
        diversity = ["eval_diversity"] if self._has_diversity else []
        return [*(f"eval_controls/{name}/mean" for name in self._controls), *diversity]

    def check(self, metrics: Mapping[str, float], state: TrainerState) -> bool:
        """
        Whether something has fallen since the first evaluation in `state.log_history`, warning of each.

        Args:
            metrics (`Mapping[str, float]`): Of an evaluation that is not yet in the history: `eval_reward`, of each control
                `eval_controls/<name>/mean`, `std` and `se`, and `eval_diversity` and `eval_diversity_se`.
            state (`TrainerState`): State of the trainer.
        """
        falls = []
        for metric in self.watched:
            first = _first(state.log_history, metric)
            if first is None or metric not in metrics:
                continue
            error = metric.removesuffix("/mean") + ("/se" if metric.endswith("/mean") else "_se")
            noise = MIN_ERRORS * math.hypot(first[error], metrics[error])
            if metric == "eval_diversity":
                name, relevant = "the diversity", self._args.alarm_diversity_drop * first[metric]
                bound = f"more than {self._args.alarm_diversity_drop:.0%} of what it was"
            else:
                std = first[metric.removesuffix("mean") + "std"]
                name, relevant = f"the control '{metric.split('/')[1]}'", self._args.alarm_control_drop * std
                bound = f"more than {self._args.alarm_control_drop:g} of its standard deviation {std:.3g} over prompts"
            # NaN, where a control applies to no prompt, is no fall.
            if first[metric] - metrics[metric] > max(relevant, noise):
                fall = f"{name} fell from {first[metric]:.3g} to {metrics[metric]:.3g}"
                falls.append((fall, bound, _change(first["eval_reward"], metrics["eval_reward"])))
        if state.is_world_process_zero:
            for fall, bound, reward in falls:
                logger.warning(self._message(fall, bound, reward, state))
        return bool(falls)

    def _message(self, fall: str, bound: str, reward: str, state: TrainerState) -> str:
        rollouts = state.global_step / self._args.steps_per_rollout
        end = (
            "The run ends, as stop_on_alarm is set." if self._args.stop_on_alarm else "stop_on_alarm=True would end it."
        )
        return (
            f"Alarm after rollout {rollouts:g}: {fall}, {bound}, {reward}. The run buys the reward with what nobody trains "
            "on. Look at the pictures of the evaluations; then go back to an earlier checkpoint and raise beta, lower "
            f"epsilon or learning_rate, or end earlier. {end}"
        )

    # Trainer's events -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_to_stop = False
        # What is compared with: once per run, not again when it goes on from a checkpoint, whose history has it.
        needed = self.watched if args.eval_strategy != "no" else []
        if needed or self._evaluate_at_start:
            args.eval_on_start = any(_first(state.log_history, m) is None for m in needed or ["eval_reward"])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if args.stop_on_alarm and metrics and metrics.get("eval_alarm"):
            self._is_to_stop = True
            self._stop(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if self._is_to_stop:
            self._stop(args, state, control)

    def _stop(self, args, state, control) -> None:
        """At the end of a rollout, where a run can be saved and go on."""
        if state.global_step % args.steps_per_rollout == 0:
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"


def _first(log_history: Sequence[Mapping[str, float]], metric: str) -> Mapping[str, float] | None:
    return next((log for log in log_history if metric in log), None)


def _change(before: float, now: float) -> str:
    if now > before:
        return f"while the reward rose from {before:.3g} to {now:.3g}"
    return f"and the reward has not risen ({before:.3g} to {now:.3g})"
