"""Progress bars, and a report of the first rollout."""

import sys
import time
from collections.abc import Mapping

import psutil
import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from ..metric_names import ALARM, CONTROL, DIVERSITY, EVAL_PREFIX, REWARD, deviation


class RolloutProgressCallback(ProgressCallback):
    """
    Shows a bar that counts optimizer steps, with the latest reward and the latest evaluation. During a rollout a second
    bar counts its images, and shows for how many answers, such as people's votes, it waits.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._evaluated: dict[str, str] = {}  # shown values of the latest evaluation
        if self.training_bar is not None:
            self.training_bar.set_description("train")
            self.training_bar.unit = "step"

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or logs is None:
            return
        if REWARD in logs:
            rollout = rollout_of(state.global_step, args.steps_per_rollout)
            shown = short(logs, REWARD, deviation(REWARD))
            self.training_bar.set_postfix({"rollout": f"{rollout}/{args.num_rollouts}", **shown, **self._evaluated})
            return
        if EVAL_PREFIX + REWARD in logs:
            self._evaluated = short(logs, EVAL_PREFIX + REWARD, EVAL_PREFIX + CONTROL, EVAL_PREFIX + DIVERSITY)
            if logs.get(EVAL_PREFIX + ALARM):
                self._evaluated["ALARM"] = "see the log"
            self.training_bar.set_postfix(self._evaluated)
        super().on_log(args, state, control, logs=logs, **kwargs)

    def rollout_bar(self, rollout: int, images: int) -> tqdm:
        """Return the bar of one rollout, which has `images` images on this process."""
        return tqdm(
            total=images,
            desc=f"rollout {rollout + 1}",
            unit="image",
            leave=False,
            dynamic_ncols=True,
            disable=self.training_bar is None,
        )


def show_waiting(bar: tqdm, waiting: Mapping[str, float]) -> None:
    """Show in the bar of a rollout for how many answers each reward waits."""
    shown = ", ".join(f"{name} waits for {number:.0f}" for name, number in waiting.items() if number)
    # It is asked many times a second, and each showing is a line of a log. A bar that is not shown has no `postfix`.
    if shown != (getattr(bar, "postfix", None) or ""):
        bar.set_postfix_str(shown)


class FirstRolloutReport(TrainerCallback):
    """
    Prints the time of the first rollout and of its updates, and the time that is left, once per call of `train`.
    `seconds` since the start of `train` are those in `"rollout"`, and in its part `"reward"`.
    """

    def __init__(self, seconds: Mapping[str, float]):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self._rollouts_before = state.global_step // args.steps_per_rollout

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        done, inside = divmod(state.global_step, args.steps_per_rollout)
        if inside or done != self._rollouts_before + 1 or not state.is_world_process_zero:
            return
        took = time.perf_counter() - self._start
        sampling = self.seconds["rollout"] - self.seconds["reward"]
        left = args.num_rollouts - done
        peak, where = peak_memory(args.device)
        # `print` would write into a progress bar.
        tqdm.write(
            f"After rollout {done}: peak memory {peak / 2**30:.2f} GiB {where}; {took:.1f} s per rollout (sampling "
            f"{sampling:.1f}, rewards {self.seconds['reward']:.1f}, updates {took - self.seconds['rollout']:.1f}); "
            f"{_duration(left * took)} for the {left} left"
        )


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Return the largest number of bytes in use at once, and its place. On a GPU it counts from the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset, "of the whole process"
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of the whole process"


def rollout_of(step: int, steps_per_rollout: int) -> int:
    """Number of the rollout, from 1, that an optimizer step is made on."""
    return -(-step // steps_per_rollout)


def short(logs: Mapping[str, float], *names: str) -> dict[str, str]:
    """The metrics that there are, as texts of three digits."""
    return {name: f"{logs[name]:.3g}" for name in names if name in logs}


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
