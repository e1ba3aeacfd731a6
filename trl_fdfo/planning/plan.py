"""
The plan of a run, printed before it starts: its rollouts and updates, its compute, and the memory of one device.

[`trl_fdfo.planning.memory`] counts what stays in memory, and [`trl_fdfo.planning.cost`] what a forward and backward
pass take.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..pipeline.flow import PipelineFlow
from ..pipeline.records import Rehearsal
from .cost import Cost, Precision, sampling_cost, training_cost
from .memory import (
    GIB,
    Engine,
    Part,
    component_parts,
    model_parts,
    nbytes,
    reward_parts,
    size_text,
    trained_parameters,
    trajectory_bytes,
)


# Memory of common GPUs in GiB; the bytes that a CUDA context takes, and the fraction that the allocator's gaps take.
GPUS = (16, 24, 32, 40, 48, 80, 96, 141)
CONTEXT, GAPS = 0.5 * GIB, 0.1

NOT_COUNTED = (
    "text encoders and rewards at work, buffers of DDP, ZeRO and FSDP2, weights unpacked from a quantised form, the "
    "CUDA context (0.5 GiB), gaps of the allocator"
)


class RunPlan:
    """
    The plan of a run. `str` returns its text.

    Args:
        args (`TrainingArguments`): Options of the run, as a rollout config has them.
        flow ([`PipelineFlow`]): Flow of the run's pipeline, which may be on the meta device.
        model (`nn.Module`): The trained model, before an engine takes it apart.
        rehearsal ([`Rehearsal`]): Rehearsal of one batch of `per_device_prompt_batch_size` prompts with all branches.
        rewards (`dict[str, Callable | None]`): Rewards by name; None for one that is not loaded.
        engine ([`Engine`]): The engine of the run.
        eval_prompts (`int`): Prompts of an evaluation.
        algorithm (`str`): Name of the algorithm.
        latents_per_target (`int`): Float32 tensors of the latents' shape in the targets of a sample, beside one number.
    """

    def __init__(
        self,
        args: TrainingArguments,
        flow: PipelineFlow,
        model: nn.Module,
        rehearsal: Rehearsal,
        rewards: dict[str, Callable | None],
        engine: Engine,
        eval_prompts: int = 0,
        *,
        algorithm: str,
        latents_per_target: int,
    ):
        self.args = args
        self.algorithm = algorithm
        self.eval_prompts = eval_prompts
        self.pipeline = flow.pipeline
        self.model = model
        self.rewards = rewards
        self.engine = engine
        self.shared_prefix = flow.shared_prefix
        self.trajectory_bytes = trajectory_bytes(rehearsal, args, flow.scheduler_class, latents_per_target)
        self.batch_bytes = self.trajectory_bytes // (args.num_rollout_batches * args.num_trained_levels)
        self.failure: Exception | None = None  # the error of a cost that could not be counted and is 0
        precision = Precision(engine.device_type, engine.autocast)
        sampling = self._cost(sampling_cost, model, rehearsal.model_calls, precision)
        self.training = self._cost(training_cost, model, rehearsal.model_calls, precision, args.gradient_checkpointing)
        decoding = self._cost(sampling_cost, flow.pipeline.vae, rehearsal.decode_calls, precision, "decode")
        # The transformer samples and the VAE decodes batches of this many times the size of the rehearsed one.
        times = args.per_device_sampling_batch_size // args.per_device_prompt_batch_size
        self.sampling, self.decoding = (replace(cost, peak=times * cost.peak) for cost in (sampling, decoding))

    def _cost(self, function: Callable[..., Cost], *args: Any) -> Cost:
        try:
            return function(*args)
        except Exception as error:  # a model's code may raise anything without data; an estimate must not end a run
            self.failure = error
            return Cost(0, 0)

    def __str__(self) -> str:
        args = self.args
        trained = sum(parameter.numel() for parameter in trained_parameters(self.model))
        total = sum(parameter.numel() for parameter in self.model.parameters())
        images = args.prompts_per_rollout * args.num_generations
        tuples = images * args.num_trained_levels * args.num_iterations
        engine = f" by {self.engine.name}" if self.engine.name else ""
        lines = [
            f"{self.algorithm} on {type(self.pipeline).__name__}, {args.world_size} process(es){engine}, "
            f"{self.engine.device_type}",
            f"  trainable parameters  {trained:,} of {total:,} ({100 * trained / total:.2f}%)",
            f"  rollouts              {args.num_rollouts}, of {args.prompts_per_rollout} prompts x "
            f"{args.num_generations} images x {args.num_inference_steps} steps = "
            f"{images * args.num_inference_steps:,} transformer samples",
            f"  updates per rollout   {args.steps_per_rollout} optimizer steps on {tuples:,} samples "
            f"({args.num_trained_levels} of {args.num_inference_steps} noise levels)",
            f"  micro-batches         {args.gradient_accumulation_steps} per optimizer step and process, of "
            f"{args.per_device_train_batch_size} samples",
        ]
        if args.eval_strategy != "no" and self.eval_prompts:
            lines.append(self._evaluation_line())
        if self.failure is None:
            lines.append(self._compute_line())
        return "\n".join([*lines, *self._memory_lines()])

    def _evaluation_line(self) -> str:
        args = self.args
        steps = args.steps_per_rollout
        if args.eval_strategy == "steps":
            total = args.num_rollouts * steps
            steps = math.ceil(args.eval_steps * total) if args.eval_steps < 1 else args.eval_steps
        rollouts = steps / args.steps_per_rollout
        # Not counted: the evaluation before the run that an alarm adds.
        number = args.num_rollouts * args.steps_per_rollout // steps + args.eval_on_start
        images = number * self.eval_prompts * args.images_per_eval_prompt
        share = images / (args.num_rollouts * args.prompts_per_rollout * args.num_generations)
        return (
            f"  evaluations           {number:g}, every {rollouts:g} rollouts, of {self.eval_prompts} prompts x "
            f"{args.images_per_eval_prompt} images: {share:.1%} more to sample"
        )

    def _compute_line(self) -> str:
        args = self.args
        sampling = args.num_rollout_batches * args.num_inference_steps * self.sampling.flops
        base_model = self.sampling.flops if args.beta else 0
        micro_batches = args.num_rollout_batches * args.num_trained_levels * args.num_iterations
        training = micro_batches * (self.training.flops + base_model)
        at_most = "at most " if self.shared_prefix else ""
        return (
            f"  compute per rollout   {at_most}{_flops(sampling)} to sample, {_flops(training)} to train, on each "
            "process"
        )

    def _memory_lines(self) -> list[str]:
        sampling, training = self.peaks()
        rows = [("memory per device", "sampling", "training", "")]
        rows += [
            (f"  {part.name}", size_text(part.sampling), size_text(part.training), part.note)
            for part in self.parts()
            if part.sampling or part.training or part.note
        ]
        rows.append(("  sum", size_text(sampling), size_text(training), ""))
        lines = [f"  {name:28}{one:>12}{other:>12}   {note}".rstrip() for name, one, other, note in rows]
        if self.peak() > max(sampling, training):
            lines.append(f"    before the run, with the text encoders: {size_text(self.peak())}")
        lines.append(f"    not counted: {NOT_COUNTED}")
        if self.failure is not None:
            reason = str(self.failure).strip().partition("\n")[0]
            lines.append(f"    activations are missing: {type(self.failure).__name__}: {reason}")
        if "weights" in self.engine.shards:
            whole = nbytes((*self.model.parameters(), *self.model.buffers()))
            lines.append(f"    at the start the transformer stands whole on each device: {size_text(whole)}")
        if self.engine.device_type == "cuda":
            lines += self._gpu_lines()
        return lines

    def _gpu_lines(self) -> list[str]:
        """The smallest GPU for the run as it is, and for the run with options that save memory and change no result."""
        best = self.peak()
        lines = [f"    with a tenth and 0.5 GiB to spare: {_gpu(best)}"]
        options: dict[str, bool] = {}
        for name in ("offload_trajectories", "cache_prompt_embeds", "offload_components"):
            options[name] = True
            if self.peak(**options) < best:
                best = self.peak(**options)
                lines.append(f"      and {name}: {_gpu(best)}")
        return lines

    def parts(self, **options: bool) -> list[Part]:
        """The parts of the memory on one device; `options` replace options of the run."""
        args = copy.copy(self.args)
        vars(args).update(options)
        on_host = args.offload_trajectories
        trajectories = Part(
            "trajectories",
            0 if on_host else self.trajectory_bytes,
            self.batch_bytes if on_host else self.trajectory_bytes,
            f"of which {size_text(self.trajectory_bytes)} in host memory" if on_host else "",
        )
        parts = [
            *model_parts(self.model, args, self.engine),
            trajectories,
            *component_parts(self.pipeline, args),
            *reward_parts(self.rewards),
        ]
        if self.failure is None:
            sampling, busy = max((self.sampling.peak, "transformer"), (self.decoding.peak, "VAE"))
            base_model = self.sampling.peak if args.beta else 0
            saved = "with" if args.gradient_checkpointing else "without"
            note = f"the {busy}; {args.per_device_train_batch_size} samples {saved} gradient checkpointing"
            parts.append(Part("activations", sampling, self.training.peak + base_model, note))
        return parts

    def peaks(self, **options: bool) -> tuple[int, int]:
        """Bytes on one device while sampling, and while training."""
        parts = self.parts(**options)
        return sum(part.sampling for part in parts), sum(part.training for part in parts)

    def peak(self, **options: bool) -> int:
        """Most bytes on one device, also in the rehearsal before the run, which needs the text encoders there."""
        parts = self.parts(**{**options, "cache_prompt_embeds": False})
        later = ("optimizer", "trajectories", "average of weights", "reward ")
        rehearsal = sum(part.sampling for part in parts if not part.name.startswith(later))
        return max(rehearsal, *self.peaks(**options))


def _gpu(peak: int) -> str:
    needed = (1 + GAPS) * peak + CONTEXT
    large = [size for size in GPUS if size * GIB >= needed]
    return f"{needed / GIB:.1f} GiB, " + (f"a GPU of {large[0]} GB" if large else "more than a GPU has")


def _flops(flops: int) -> str:
    for unit, name in ((10**15, "PFLOP"), (10**12, "TFLOP"), (10**9, "GFLOP")):
        if flops >= unit:
            return f"{flops / unit:.3g} {name}"
    return f"{flops / 10**6:.3g} MFLOP"
