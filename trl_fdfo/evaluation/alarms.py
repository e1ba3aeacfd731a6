"""
Alarms: signs that a reward is being gamed. The reward rises while something that is not trained on falls.
docs/evaluation.md has the reasons of the thresholds.

An alarm watches the control rewards of an evaluation and its diversity, each against its first evaluation, before
training. A fall counts if it is both relevant and more than noise:

    control     mean_0 - mean  >  max(alarm_control_drop std_0,        2 sqrt(se_0^2 + se^2))
    diversity   mean_0 - mean  >  max(alarm_diversity_drop mean_0,     2 sqrt(se_0^2 + se^2))

and more than a thousandth of the first value; an evaluation of one prompt raises none. mean, std and se (standard error of
the mean) are over prompts. Prompts and seeds are the same each time, which makes the difference steadier than two
independent means: two of these errors are a strict bound. All values stand in the logs of the evaluations, and so in each
checkpoint.
"""

import math
from collections.abc import Mapping, Sequence

from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from ..metric_names import ALARM, CONTROL, DIVERSITY, EVAL_PREFIX, REWARD, deviation, part, standard_error


logger = logging.get_logger(__name__)

MIN_ERRORS = 2
MIN_FALL = 1e-3  # of the value itself: rounding is no fall, where a control is the same for all prompts

_REWARD, _DIVERSITY, _ALARM = (EVAL_PREFIX + name for name in (REWARD, DIVERSITY, ALARM))


class Alarms(TrainerCallback):
    """
    Raises an alarm if an evaluation shows that the reward is being gamed, and ends the run with `stop`.

    Args:
        control_drop (`float`, *optional*): Fall of a control reward, in standard deviations over the prompts; None: off.
        diversity_drop (`float`, *optional*): Fall of the diversity, as a fraction of the first value; None: off.
        stop (`bool`): End the run at an alarm.
        controls (`Sequence[str]`): Names of the control rewards.
        has_diversity (`bool`): Evaluations have `eval_diversity`.
        evaluates_at_start (`bool`): The run is evaluated before it starts, with or without an alarm.
        steps_per_rollout (`int`): Optimizer steps between two rollouts.
        smaller_updates (`str`): What keeps the updates of the algorithm small, as the message advises.
    """

    def __init__(
        self,
        control_drop: float | None,
        diversity_drop: float | None,
        stop: bool,
        controls: Sequence[str],
        has_diversity: bool,
        evaluates_at_start: bool,
        steps_per_rollout: int,
        smaller_updates: str,
    ):
        self._control_drop, self._diversity_drop, self._stop = control_drop, diversity_drop, stop
        self._evaluates_at_start = evaluates_at_start
        self._steps_per_rollout, self._smaller_updates = steps_per_rollout, smaller_updates
        self._is_to_stop = False
        # The metrics, and what a message calls them.
        self._names: dict[str, str] = {}
        if control_drop is not None:
            self._names |= {EVAL_PREFIX + part(CONTROL, name): f"the control '{name}'" for name in controls}
        if diversity_drop is not None and has_diversity:
            self._names[_DIVERSITY] = "the diversity"

    @property
    def watched(self) -> list[str]:
        """The metrics whose fall raises an alarm."""
        return list(self._names)

    def check(self, metrics: Mapping[str, float], state: TrainerState) -> bool:
        """
        Warn of each metric that has fallen since the first evaluation in `state.log_history`; True if one has.

        Args:
            metrics (`Mapping[str, float]`): An evaluation that is not yet in the history: `eval_reward`, for each control
                `eval_controls/<name>/mean`, `std` and `se`, and `eval_diversity` and `eval_diversity_se`.
            state (`TrainerState`): State of the trainer.
        """
        messages = []
        for metric, name in self._names.items():
            first = _first(state.log_history, metric)
            if first is None or metric not in metrics:
                continue
            error = standard_error(metric)
            if metric == _DIVERSITY:
                relevant = self._diversity_drop * first[metric]
                measure = f"alarm_diversity_drop={self._diversity_drop:g} of what it was"
            else:
                relevant = self._control_drop * first[deviation(metric)]
                measure = f"alarm_control_drop={self._control_drop:g} standard deviations over the prompts"
            noise = MIN_ERRORS * math.hypot(first[error], metrics[error])
            bounds = [(relevant, measure), (noise, f"{MIN_ERRORS} standard errors of the difference")]
            bounds.append((MIN_FALL * abs(first[metric]), f"{MIN_FALL:g} of what it was"))
            # One prompt gives no error, and so no bound.
            bound, measure = max(bounds) if math.isfinite(noise) else (math.inf, "")
            # NaN, where a control applies to no prompt, is no fall.
            if first[metric] - metrics[metric] > bound:
                fall = f"{name} fell from {first[metric]:.3g} to {metrics[metric]:.3g}, by more than {bound:.3g} ({measure})"
                messages.append(self._message(fall, first[_REWARD], metrics[_REWARD], state))
        if state.is_world_process_zero:
            for message in messages:
                logger.warning(message)
        return bool(messages)

    def _message(self, fall: str, reward_before: float, reward: float, state: TrainerState) -> str:
        rollouts = state.global_step / self._steps_per_rollout
        rewards = f"from {reward_before:.3g} to {reward:.3g}"
        if math.isnan(reward):  # a judge compares images and gives none of them a score
            meaning = "while it is trained on a reward that gives no score to compare it with"
        elif reward > reward_before:
            meaning = f"while the reward rose {rewards}: it is bought with what nobody trains on"
        else:
            meaning = f"and the reward did not rise ({rewards}): the model comes apart"
        end = "The run ends, as stop_on_alarm is set." if self._stop else "stop_on_alarm=True would end it."
        return (
            f"Alarm after rollout {rollouts:g}: {fall}, {meaning}. Look at the pictures of the evaluations; then go back to an "
            f"earlier checkpoint with {self._smaller_updates}, or train for fewer rollouts. {end}"
        )

    # Trainer's events -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_to_stop = False
        # The first evaluation is made once per run, not again when it resumes from a checkpoint, whose history has it.
        needed = self.watched if args.eval_strategy != "no" else []
        if needed or self._evaluates_at_start:
            args.eval_on_start = any(_first(state.log_history, m) is None for m in needed or [_REWARD])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self._stop and metrics and metrics.get(_ALARM):
            self._is_to_stop = True
            self._end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if self._is_to_stop:
            self._end(args, state, control)

    def _end(self, args, state, control) -> None:
        """At the end of a rollout, where a run can be saved and resumed."""
        if state.global_step % self._steps_per_rollout == 0:
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"


def _first(log_history: Sequence[Mapping[str, float]], metric: str) -> Mapping[str, float] | None:
    return next((log for log in log_history if metric in log), None)
