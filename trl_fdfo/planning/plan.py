"""
The plan of a run, printed before it starts: its rollouts and updates, its compute, and the memory of one device.

[`trl_fdfo.planning.memory`] counts what stays in memory, and [`trl_fdfo.planning.cost`] what a forward and backward
pass take.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import TrainingArguments

from ..pipeline.flow import PipelineFlow
from ..pipeline.records import Rehearsal
from .cost import Cost, Precision, sampling_cost, training_cost
from .memory import (
    GIB,
    Engine,
    Part,
    component_parts,
    encoding_bytes,
    kept_output_bytes,
    model_parts,
    nbytes,
    reward_parts,
    size_text,
    trained_parameters,
    trajectory_bytes,
)
from .time import CARDS, LAUNCH, THROUGHPUT, UTILISATION, host_seconds


# Memory of common GPUs in GiB; the bytes that a CUDA context takes, and the fraction that the allocator's gaps take.
GPUS = (16, 24, 32, 40, 48, 80, 96, 141)
CONTEXT, GAPS = 0.5 * GIB, 0.1

NOT_COUNTED = (
    "text encoders and rewards at work, samples that wait for rewards in the background, gradients of rewards with those of the "
    "decoder (direction='reward_gradient'), buffers of DDP, ZeRO and FSDP2, weights unpacked from nf4, the CUDA "
    "context (0.5 GiB), gaps of the allocator"
)

NOT_TIMED = (
    "text encoders, the optimizer, evaluations, checkpoints, traffic between GPUs and to the host, unpacking of nf4, a "
    "wait for rewards on a server"
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
        noises_endpoints (`bool`): The algorithm learns from endpoints that are noised afresh: a rollout keeps no tuples, and
            another policy gives a velocity for each micro-batch.
        has_old_policy (`bool`): The policy that samples has weights of its own.
        gpu (`str`, *optional*): A card of [`CARDS`], whose seconds are estimated.
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
        noises_endpoints: bool = False,
        has_old_policy: bool = False,
        gpu: str | None = None,
    ):
        self.args = args
        self.algorithm = algorithm
        self.eval_prompts = eval_prompts
        self.pipeline = flow.pipeline
        self.model = model
        self.rewards = rewards
        self.engine = engine
        self.gpu = gpu
        self.shared_prefix = flow.shared_prefix
        self.noises_endpoints, self.has_old_policy = noises_endpoints, has_old_policy
        kept = (rehearsal, args, flow.scheduler_class, latents_per_target)
        self.trajectory_bytes = trajectory_bytes(*kept, noises_endpoints)
        # What keeping the tuples of all trained levels would take besides.
        self.saved_bytes = trajectory_bytes(*kept) - self.trajectory_bytes
        levels = 1 if noises_endpoints else args.num_trained_levels
        self.batch_bytes = self.trajectory_bytes // (args.num_rollout_batches * levels)
        if flow.keeps_outputs:
            self.trajectory_bytes += kept_output_bytes(rehearsal, args)
        # Images that are sampled for each that is trained on.
        self._candidates = args.num_candidates / args.num_generations
        self._batches_per_call = args.prompts_per_call // args.per_device_prompt_batch_size
        self.failure: Exception | None = None  # the error of a cost that could not be counted and is 0
        precision = Precision(engine.device_type, engine.autocast)
        # A pipeline that makes one sample per call was rehearsed with one.
        calls = rehearsal.model_calls * (args.per_device_train_batch_size // len(rehearsal.latents))
        sampling = self._cost(sampling_cost, model, calls, precision)
        self.training = self._cost(training_cost, model, calls, precision, args.gradient_checkpointing)
        # The transformer samples and the VAE decodes batches of this many times the size of the rehearsed one.
        times = self._candidates * self._batches_per_call

        def larger(latents: Tensor) -> Tensor:
            # A VAE that decodes one image at a time does not take as many times the memory.
            whole = latents.repeat(math.ceil(times), *[1] * (latents.ndim - 1))
            return whole[: round(len(whole) * times / math.ceil(times))]

        decode_calls = tree_map_only(Tensor, larger, rehearsal.decode_calls)
        decoding = Cost(0, 0)  # of a pipeline without a VAE
        if decode_calls:
            decoding = self._cost(sampling_cost, flow.pipeline.vae, decode_calls, precision, "decode")
        # Peaks of a whole call; the rest for a rehearsed batch of it.
        self.sampling = replace(sampling, peak=int(times * sampling.peak), operations=int(sampling.operations / times))
        counts = {name: int(getattr(decoding, name) / times) for name in ("flops", "traffic", "operations")}
        self.decoding = replace(decoding, **counts)

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
        images = args.prompts_per_rollout * args.num_candidates
        trained_images = args.prompts_per_rollout * args.num_generations
        tuples = trained_images * args.num_trained_levels * args.num_iterations
        engine = f" by {self.engine.name}" if self.engine.name else ""
        lines = [
            f"{self.algorithm} on {type(self.pipeline).__name__}, {args.world_size} process(es){engine}, "
            f"{self.engine.device_type}",
            f"  trainable parameters  {trained:,} of {total:,} ({100 * trained / total:.2f}%)",
            f"  rollouts              {args.num_rollouts}, of {args.prompts_per_rollout} prompts x "
            f"{args.num_candidates} images x {args.num_inference_steps} steps = "
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
        lines += self._memory_lines()
        if self.gpu is not None and self.failure is None:
            lines += self._time_lines()
        return "\n".join(lines)

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
        share = images / (args.num_rollouts * args.prompts_per_rollout * args.num_candidates)
        line = (
            f"  evaluations           {number:g}, every {rollouts:g} rollouts, of {self.eval_prompts} prompts x "
            f"{args.images_per_eval_prompt} images"
        )
        if not args.eval_pipeline_kwargs:
            return f"{line}: {share:.1%} more to sample"
        steps = args.eval_pipeline_kwargs.get("num_inference_steps") or args.num_inference_steps
        others = {name: value for name, value in args.eval_pipeline_kwargs.items() if name != "num_inference_steps"}
        note = f", with {', '.join(f'{name}={value}' for name, value in others.items())}" if others else ""
        return f"{line} x {steps} steps: {share * steps / args.num_inference_steps:.1%} more steps to sample{note}"

    @property
    def _calls_beside_training(self) -> int:
        """Calls without gradients for each micro-batch: of the base model, and of the policy that samples."""
        return bool(self.args.beta) + self.noises_endpoints

    def _compute_line(self) -> str:
        args = self.args
        calls = args.num_rollout_batches * (args.num_inference_steps + self.noises_endpoints)
        sampling = int(self._candidates * calls * self.sampling.flops)
        micro_batches = args.num_rollout_batches * args.num_trained_levels * args.num_iterations
        training = micro_batches * (self.training.flops + self._calls_beside_training * self.sampling.flops)
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
            when = "before the run" if self.args.cache_prompt_embeds else "before each rollout"
            lines.append(f"    {when}, with the text encoders: {size_text(self.peak())}")
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

    def _time_lines(self) -> list[str]:
        args, card = self.args, CARDS[self.gpu]
        columns: dict[str, dict[str, Any]] = {"as given": {}}
        quarter = {"timestep_fraction": 0.25}
        if args.timestep_fraction > 0.25:
            fewer = self._args_with(quarter)  # a quarter of 10 is rounded to 2
            columns[f"{fewer.num_trained_levels}/{fewer._num_trainable_levels()} levels"] = quarter
        if args.num_inference_steps > 10:
            columns["10 steps"] = {"num_inference_steps": 10}
        if len(columns) == 3:
            columns["both"] = quarter | columns["10 steps"]
        tables = [self.seconds(**options) for options in columns.values()]
        rows = [("seconds per rollout", *columns)]
        rows += [(f"  {name}", *(_seconds(table[name]) for table in tables)) for name in tables[0]]
        sums = [sum(filter(None, table.values())) for table in tables]
        rows.append(("  sum", *map(_seconds, sums)))
        rows.append(
            (f"hours of {args.num_rollouts:,} rollouts", *(f"{args.num_rollouts * one / 3600:,.1f}" for one in sums))
        )
        lines = [
            f"  time, {self.gpu}: estimated, with {UTILISATION:g} of {card.peak / 1e12:,.0f} TFLOP/s, "
            f"{THROUGHPUT:g} of {card.bandwidth / 1e9:,.0f} GB/s, {1e6 * LAUNCH:g} us per operation (docs/memory_plan.md)"
        ]
        notes = {
            f"  reward {name}": f"{1000 * seconds:.2g} ms per image, {str(self.reward_costs[name][1]).removeprefix('torch.')}"
            for name, seconds in self._reward_seconds().items()
            if seconds is not None
        }
        for name, *values in rows:
            columns_of_row = "".join(f"{value:>13}" for value in values)
            lines.append(f"    {name:30}{columns_of_row}   {notes.get(name, '')}".rstrip())
        saved = ", what shared_prefix saves" if self.shared_prefix else ""
        lines.append(f"    not counted: {NOT_TIMED}{saved}")
        if filling := self.filling_batch():
            lines.append(
                f"    the card waits for the host: per_device_prompt_batch_size={filling} fills it, if memory allows"
            )
        return [*lines, f"  in short: {self.in_short()}"]

    def filling_batch(self) -> int | None:
        """
        The smallest `per_device_prompt_batch_size` with which an update takes the card as long as the host, by the
        estimate. None if the run has a batch of that size already, or if no batch is large enough.
        """
        args, card = self.args, CARDS[self.gpu]
        busy = card.busy_seconds(self.training, self._dtype, self._tf32, args.torch_compile, self._cudnn)
        host = host_seconds(self.training, args.torch_compile)
        if busy >= host:
            return None
        prompts = args.num_rollout_batches * args.per_device_prompt_batch_size
        for size in range(math.ceil(args.per_device_prompt_batch_size * host / busy), prompts + 1):
            batches, rest = divmod(prompts, size)
            if not rest and batches * args.num_trained_levels % args.optimizer_steps_per_rollout == 0:
                return size
        return None

    @property
    def _dtype(self) -> torch.dtype:
        """In which the transformer multiplies."""
        return self.engine.autocast or next(self.model.parameters()).dtype

    @property
    def _cudnn(self) -> bool:
        return self.args.attention_backend == "_native_cudnn"

    @property
    def _tf32(self) -> bool:
        """True if a GPU multiplies float32 matrices in TF32, which `TrainingArguments` turns on with `torch_compile`."""
        args = self.args
        return args.torch_compile and not args.fp16 if args.tf32 is None else args.tf32

    def in_short(self) -> str:
        """Memory and time on the card, in a line."""
        args, card = self.args, CARDS[self.gpu]
        needed, seconds = self.needed_memory(), sum(filter(None, self.seconds().values()))
        fits = "" if needed <= card.memory else ", which is too much"
        cards = f"{args.world_size} x {self.gpu}" if args.world_size > 1 else self.gpu
        return (
            f"{cards}: {needed:.1f} of {card.memory} GB{fits}; an estimated {_seconds(seconds)} s per rollout, "
            f"{args.num_rollouts * seconds / 3600:,.1f} h for {args.num_rollouts:,} rollouts"
        )

    @functools.cached_property
    def reward_costs(self) -> dict[str, tuple[Cost, torch.dtype] | None]:
        """By reward, what an image costs and the dtype of the model; None if that is not known."""
        costs: dict[str, tuple[Cost, torch.dtype] | None] = {}
        for name, reward in self.rewards.items():
            call = reward.planned_call() if hasattr(reward, "planned_call") else None
            costs[name] = None
            if call is not None:
                batch = sampling_cost(reward.model, [((), call)], Precision(self.engine.device_type))
                counts = (batch.flops, batch.traffic, batch.operations)
                image = Cost(batch.peak, *(count // reward.batch_size for count in counts))
                costs[name] = image, reward.model.dtype
        return costs

    def needed_memory(self) -> float:
        """GiB that a device must have, with room for what is not counted."""
        return _needed(self.peak()) / GIB

    def _reward_seconds(self) -> dict[str, float | None]:
        """Estimated seconds of each reward per image, on the card `gpu`; None for one that is not counted."""
        card = CARDS[self.gpu]
        return {
            name: None if cost is None else card.seconds(*cost, tf32=self._tf32)
            for name, cost in self.reward_costs.items()
        }

    def seconds(self, **options: Any) -> dict[str, float | None]:
        """
        Estimated seconds of a rollout and its updates by part, on the card `gpu`; None for a reward that is not counted.
        `options` replace `num_inference_steps` and `timestep_fraction` of the run.
        """
        args, card = self._args_with(options), CARDS[self.gpu]
        how = (self._dtype, self._tf32, args.torch_compile)
        call, update = card.seconds(self.sampling, *how), card.seconds(self.training, *how, self._cudnn)
        update += self._calls_beside_training * call
        batches = args.num_rollout_batches
        sampled_batches = self._candidates * batches
        parts: dict[str, float | None] = {
            "sampling": sampled_batches * (args.num_inference_steps + self.noises_endpoints) * call,
            "decoding": sampled_batches * card.seconds(self.decoding, torch.float32, tf32=True),
        }
        images = sampled_batches * args.per_device_train_batch_size
        for name, seconds in self._reward_seconds().items():
            parts[f"reward {name}"] = None if seconds is None else images * seconds
        return parts | {"training": batches * args.num_trained_levels * args.num_iterations * update}

    def parts(self, **options: bool) -> list[Part]:
        """The parts of the memory on one device; `options` replace options of the run."""
        args = self._args_with(options)
        on_host = args.offload_trajectories
        notes = [f"of which {size_text(self.trajectory_bytes)} in host memory"] if on_host else []
        if self.noises_endpoints and self.saved_bytes > 0:
            notes.append(
                f"endpoints alone: the tuples of all trained steps would be {size_text(self.saved_bytes)} more"
            )
        trajectories = Part(
            "trajectories",
            0 if on_host else self.trajectory_bytes,
            self.batch_bytes if on_host else self.trajectory_bytes,
            ", ".join(notes),
        )
        parts = [
            *model_parts(self.model, args, self.engine, self.has_old_policy),
            trajectories,
            *self._candidate_parts(on_host),
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

    def _candidate_parts(self, on_host: bool) -> list[Part]:
        """What all candidates of a call take until it is scored, or those of a rollout, if rewards are scaled over all of it."""
        args = self.args
        if self._candidates == 1:
            return []
        whole = args.scale_rewards == "batch" and not on_host
        batches = args.num_rollout_batches if whole else self._batches_per_call
        size = round(self._candidates * self.trajectory_bytes * batches / args.num_rollout_batches)
        waits = "until the rollout is scored" if whole else "until their call is scored"
        return [Part("candidates", size, 0, f"{args.num_candidates} per prompt, {waits}")]

    def _args_with(self, options: dict[str, Any]) -> TrainingArguments:
        args = copy.copy(self.args)
        vars(args).update(options)
        return args

    def peaks(self, **options: bool) -> tuple[int, int]:
        """Bytes on one device while sampling, and while training."""
        parts = self.parts(**options)
        return sum(part.sampling for part in parts), sum(part.training for part in parts)

    def peak(self, **options: bool) -> int:
        """Most bytes on one device, also while prompts are encoded."""
        encoding = encoding_bytes(self.pipeline, self._args_with(options), self.parts(**options))
        return max(encoding, *self.peaks(**options))


def _needed(peak: int) -> float:
    return (1 + GAPS) * peak + CONTEXT


def _seconds(seconds: float | None) -> str:
    return "not counted" if seconds is None else f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _gpu(peak: int) -> str:
    needed = _needed(peak)
    large = [size for size in GPUS if size * GIB >= needed]
    return f"{needed / GIB:.1f} GiB, " + (f"a GPU of {large[0]} GB" if large else "more than a GPU has")


def _flops(flops: int) -> str:
    for unit, name in ((10**15, "PFLOP"), (10**12, "TFLOP"), (10**9, "GFLOP")):
        if flops >= unit:
            return f"{flops / unit:.3g} {name}"
    return f"{flops / 10**6:.3g} MFLOP"
