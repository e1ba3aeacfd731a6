"""
What a run will do, and what it takes: the text that is printed before it.

Memory is that of one device. What stands there the whole time is counted from the weights' shapes, what a rollout records
from a rehearsal of one of its batches, and what comes and goes in a forward and backward pass by [`trl_fdfo.cost`].
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from .cost import Cost, Precision, sampling_cost, training_cost
from .fdfo_config import FDFOConfig
from .pipeline_flow import PipelineFlow, Rehearsal
from .prompt_embeddings import text_encoders
from .schedulers import RolloutScheduler


GIB = 2**30

# Bytes of an optimizer's state per trained parameter, by the option `optim`; "paged" ones keep it where there is room.
OPTIMIZER_BYTES = {
    **dict.fromkeys(["adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"], 8),
    **dict.fromkeys(["adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"], 2),
    **dict.fromkeys(["paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit"], 0),
    **dict.fromkeys(["lion_32bit", "adagrad", "rmsprop"], 4),
    **{"adamw_torch_4bit": 1, "lion_8bit": 1, "sgd": 0},
}

# Memory of usual GPUs in GiB, and what the CUDA context and the allocator's gaps take of it.
GPUS = (16, 24, 32, 40, 48, 80, 96, 141)
CONTEXT, GAPS = 0.5 * GIB, 0.1

NOT_COUNTED = (
    "text encoders and rewards at work, buffers of DDP, ZeRO and FSDP2, weights unpacked from a quantised form, the CUDA "
    "context (0.5 GiB), gaps of the allocator"
)


@dataclass(frozen=True)
class Engine:
    """
    How a run uses its devices.

    Attributes:
        device_type (`str`): `"cuda"`, `"cpu"`, ...
        name (`str`): `"DDP"`, `"ZeRO-2"`, ..., or `""` for a single process.
        autocast (`torch.dtype`, *optional*): Of mixed precision.
    """

    device_type: str
    name: str = ""
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Engine":
        kind = accelerator.distributed_type
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        if kind == DistributedType.DEEPSPEED:
            return cls(accelerator.device.type, f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}")
        if kind == DistributedType.FSDP:
            return cls(accelerator.device.type, "FSDP2")
        return cls(accelerator.device.type, "" if kind == DistributedType.NO else "DDP", autocast)

    @property
    def shards(self) -> frozenset[str]:
        """Which of weights, gradients and the optimizer's state are spread over the processes."""
        if self.name in ("ZeRO-3", "FSDP2"):
            return frozenset(["weights", "gradients", "optimizer"])
        return {"ZeRO-1": frozenset(["optimizer"]), "ZeRO-2": frozenset(["gradients", "optimizer"])}.get(
            self.name, frozenset()
        )


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        name (`str`): What takes the memory.
        sampling (`int`): Bytes on one device while images are sampled and scored.
        training (`int`): Bytes there while they are trained on.
        note (`str`): Said behind it.
    """

    name: str
    sampling: int
    training: int
    note: str = ""


class RunPlan:
    """
    Args:
        config ([`FDFOConfig`]): Options of the run.
        flow ([`PipelineFlow`]): Of its pipeline, which may be on the meta device.
        model (`nn.Module`): What is trained, before an engine has taken it apart.
        rehearsal ([`Rehearsal`]): Of one batch of `per_device_prompt_batch_size` prompts with all their branches.
        rewards (`dict[str, Callable | None]`): Rewards by name; None for one that is not loaded.
        engine ([`Engine`]): What it will run on.
        eval_prompts (`int`): Prompts of an evaluation.
    """

    def __init__(
        self,
        config: FDFOConfig,
        flow: PipelineFlow,
        model: nn.Module,
        rehearsal: Rehearsal,
        rewards: dict[str, Callable | None],
        engine: Engine,
        eval_prompts: int = 0,
    ):
        self.config = config
        self.eval_prompts = eval_prompts
        self.pipeline = flow.pipeline
        self.model = model
        self.rewards = rewards
        self.engine = engine
        self.trajectory_bytes = trajectory_bytes(rehearsal, config, flow.sampler)
        self.batch_bytes = self.trajectory_bytes // (config.num_rollout_batches * config.num_trained_levels)
        self.failure: Exception | None = None
        # The VAE decodes and the transformer samples batches of this many times the size of the rehearsed one.
        times = config.per_device_sampling_batch_size // config.per_device_prompt_batch_size
        precision = Precision(engine.device_type, engine.autocast)
        self.sampling = self._cost(sampling_cost, model, rehearsal.model_calls, precision)
        self.sampling = Cost(times * self.sampling.peak, self.sampling.flops)
        self.training = self._cost(
            training_cost, model, rehearsal.model_calls, precision, config.gradient_checkpointing
        )
        decoding = self._cost(sampling_cost, flow.pipeline.vae, rehearsal.decode_calls, precision, "decode")
        self.decoding = Cost(times * decoding.peak, decoding.flops)

    def _cost(self, function: Callable[..., Cost], *args: Any) -> Cost:
        try:
            return function(*args)
        except (
            Exception
        ) as error:  # whatever a model's code does on tensors without data: an estimate must not end a run
            self.failure = error
            return Cost(0, 0)

    def __str__(self) -> str:
        args = self.config
        trained = sum(parameter.numel() for parameter in _trained(self.model))
        total = sum(parameter.numel() for parameter in self.model.parameters())
        images = args.prompts_per_rollout * args.num_generations
        tuples = images * args.num_trained_levels * args.num_iterations
        engine = f" by {self.engine.name}" if self.engine.name else ""
        return "\n".join(
            [
                f"{args.algorithm} on {type(self.pipeline).__name__}, {args.world_size} process(es){engine}, {self.engine.device_type}",
                f"  trainable parameters  {trained:,} of {total:,} ({100 * trained / total:.2f}%)",
                f"  rollouts              {args.num_rollouts}, of {args.prompts_per_rollout} prompts x "
                f"{args.num_generations} images x {args.num_inference_steps} steps = "
                f"{images * args.num_inference_steps:,} transformer samples",
                f"  updates per rollout   {args.steps_per_rollout} optimizer steps on {tuples:,} samples "
                f"({args.num_trained_levels} of {args.num_inference_steps} noise levels)",
                f"  micro-batches         {args.gradient_accumulation_steps} per optimizer step and process, of "
                f"{args.per_device_train_batch_size} samples",
                *self._evaluation(),
                *self._compute(),
                *self._memory(),
            ]
        )

    def _evaluation(self) -> list[str]:
        args = self.config
        if args.eval_strategy == "no" or not self.eval_prompts:
            return []
        steps = args.steps_per_rollout
        if args.eval_strategy == "steps":
            total = args.num_rollouts * steps
            steps = math.ceil(args.eval_steps * total) if args.eval_steps < 1 else args.eval_steps
        rollouts = steps / args.steps_per_rollout
        # The one before the run that an alarm adds, to compare with, is not counted.
        number = args.num_rollouts * args.steps_per_rollout // steps + args.eval_on_start
        images = number * self.eval_prompts * args.images_per_eval_prompt
        share = images / (args.num_rollouts * args.prompts_per_rollout * args.num_generations)
        return [
            f"  evaluations           {number:g}, every {rollouts:g} rollouts, of {self.eval_prompts} prompts x "
            f"{args.images_per_eval_prompt} images: {share:.1%} more to sample"
        ]

    # Compute ----------------------------------------------------------------------------------------------------------

    def _compute(self) -> list[str]:
        if self.failure is not None:
            return []
        args = self.config
        batches = args.num_rollout_batches
        sampling = batches * args.num_inference_steps * self.sampling.flops
        forwards = self.sampling.flops if args.beta else 0
        training = batches * args.num_trained_levels * args.num_iterations * (self.training.flops + forwards)
        at_most = "at most " if args.shared_prefix else ""
        return [
            f"  compute per rollout   {at_most}{_flops(sampling)} to sample, {_flops(training)} to train, on each process"
        ]

    # Memory -----------------------------------------------------------------------------------------------------------

    def parts(self, **options: bool) -> list[Part]:
        """What takes memory on one device, with some options in the place of the config's."""
        args, engine = copy.copy(self.config), self.engine
        vars(args).update(options)

        def share(part: str) -> int:
            return args.world_size if part in engine.shards else 1

        trained = list(_trained(self.model))
        trained_ids = {id(parameter) for parameter in trained}
        frozen = [t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in trained_ids]
        weights, gradients = _nbytes(trained), _nbytes(trained)
        numbers = sum(parameter.numel() for parameter in trained)
        per_number = OPTIMIZER_BYTES.get(optimizer := getattr(args.optim, "value", args.optim))
        state = (per_number or 0) * numbers
        if engine.name.startswith("ZeRO") and args.bf16:
            weights = gradients = 2 * numbers
            state += 8 * numbers  # weights and gradients in float32
        parts = [
            *self._same("transformer, frozen", _nbytes(frozen) // share("weights"), _dtypes(frozen)),
            *self._same("trained weights", weights // share("weights"), _dtypes(trained)),
            Part("gradients", 0, gradients // share("gradients")),
            *self._same(
                "optimizer", state // share("optimizer"), optimizer + ("" if per_number is not None else ": not known")
            ),
        ]
        if args.ema_decay is not None:
            parts += self._same("average of weights", _nbytes(trained))
        on_host = args.offload_trajectories
        parts.append(
            Part(
                "trajectories",
                0 if on_host else self.trajectory_bytes,
                self.batch_bytes if on_host else self.trajectory_bytes,
                f"of which {_size(self.trajectory_bytes)} in host memory" if on_host else "",
            )
        )
        parts += self._components(args)
        parts += self._rewards()
        if self.failure is None:
            busy = max((self.sampling.peak, "transformer"), (self.decoding.peak, "VAE"))
            beta = self.sampling.peak if args.beta else 0
            batch = args.per_device_train_batch_size
            saved = "with" if args.gradient_checkpointing else "without"
            note = f"the {busy[1]}; {batch} samples {saved} gradient checkpointing"
            parts.append(Part("activations", busy[0], self.training.peak + beta, note))
        return parts

    def _same(self, name: str, size: int, note: str = "") -> list[Part]:
        return [Part(name, size, size, note)]

    def _components(self, args: FDFOConfig) -> list[Part]:
        parts = []
        for name, component in self.pipeline.components.items():
            if not isinstance(component, nn.Module) or name == "transformer":
                continue
            size = _nbytes((*component.parameters(), *component.buffers()))
            # Where it encodes nothing it never comes to the device, and else when it is called, until the rollout's end.
            cached = args.cache_prompt_embeds and name in text_encoders(self.pipeline)
            waits = cached or args.offload_components
            parts.append(
                Part(
                    name, 0 if cached else size, 0 if waits else size, f"{_size(size)} in host memory" if waits else ""
                )
            )
        return parts

    def _rewards(self) -> Iterator[Part]:
        for name, reward in self.rewards.items():
            if reward is None:
                yield Part(f"reward {name}", 0, 0, "not loaded: add its weights")
                continue
            holders = list(_reachable(reward))
            modules = [held for held in holders if isinstance(held, nn.Module)]
            if not modules:
                continue
            size = _nbytes([t for module in modules for t in (*module.parameters(), *module.buffers())])
            waits = any(getattr(held, "offload", None) is True for held in holders)
            yield Part(f"reward {name}", size, 0 if waits else size, "in host memory while training" if waits else "")

    def peaks(self, **options: bool) -> tuple[int, int]:
        """Bytes on one device while sampling and while training."""
        parts = self.parts(**options)
        return sum(part.sampling for part in parts), sum(part.training for part in parts)

    def peak(self, **options: bool) -> int:
        """Bytes on one device at most, the rehearsal before the run included, for which the text encoders come there."""
        parts = self.parts(**{**options, "cache_prompt_embeds": False})
        later = ("optimizer", "trajectories", "average of weights")
        rehearsal = sum(part.sampling for part in parts if not part.name.startswith((*later, "reward ")))
        return max(rehearsal, *self.peaks(**options))

    def _memory(self) -> list[str]:
        sampling, training = self.peaks()
        rows = [("memory per device", "sampling", "training", "")]
        rows += [
            (f"  {part.name}", _size(part.sampling), _size(part.training), part.note)
            for part in self.parts()
            if part.sampling or part.training or part.note
        ]
        rows.append(("  sum", _size(sampling), _size(training), ""))
        lines = [f"  {name:28}{one:>12}{other:>12}   {note}".rstrip() for name, one, other, note in rows]
        if self.peak() > max(sampling, training):
            lines.append(f"    before the run, with the text encoders: {_size(self.peak())}")
        lines.append(f"    not counted: {NOT_COUNTED}")
        if self.failure is not None:
            reason = str(self.failure).strip().partition("\n")[0]
            lines.append(f"    activations are missing: {type(self.failure).__name__}: {reason}")
        if "weights" in self.engine.shards:
            whole = _nbytes((*self.model.parameters(), *self.model.buffers()))
            lines.append(f"    at the start the transformer stands whole on each device: {_size(whole)}")
        if self.engine.device_type == "cuda":
            lines += self._fits()
        return lines

    def _fits(self) -> list[str]:
        """Which GPU is large enough, and for which it would be with options that do not change the result."""
        best = self.peak()
        lines = [f"    with a tenth and 0.5 GiB to spare: {_gpu(best)}"]
        options: dict[str, bool] = {}
        for name in ("offload_trajectories", "cache_prompt_embeds", "offload_components"):
            options[name] = True
            if self.peak(**options) < best:
                best = self.peak(**options)
                lines.append(f"      and {name}: {_gpu(best)}")
        return lines


def trajectory_bytes(rehearsal: Rehearsal, config: FDFOConfig, sampler: type[RolloutScheduler]) -> int:
    """
    Bytes of what a process records of one rollout: of each batch the noisy latents and the velocity at K levels, what is
    learnt from the rewards of its samples (for FDFO a direction and a reward difference, for a likelihood where the steps
    arrived and an advantage), and what `encode_prompt` and `prepare_latents` returned.
    """
    samples = config.per_device_train_batch_size
    # What moves to the host, or out of a larger batch, is copied: of a view the part that is seen.
    copied = config.offload_trajectories or config.per_device_sampling_batch_size > config.per_device_prompt_batch_size
    size = _nbytes if copied else _storage_nbytes
    level = size([rehearsal.latents]) + size([rehearsal.velocity])
    signal = 4 * samples
    if sampler.records_arrivals:
        level += size([rehearsal.velocity])  # whose dtype they have
    else:
        signal += 4 * rehearsal.latents.numel()
    remembered = size(_tensors([rehearsal.encoded, rehearsal.prepared]))
    return config.num_rollout_batches * (config.num_trained_levels * level + signal + remembered)


def _gpu(peak: int) -> str:
    needed = (1 + GAPS) * peak + CONTEXT
    large = [size for size in GPUS if size * GIB >= needed]
    return f"{needed / GIB:.1f} GiB, " + (f"a GPU of {large[0]} GB" if large else "more than a GPU has")


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def _tensors(data: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(data) if isinstance(leaf, Tensor)]


def _nbytes(tensors: Sequence[Tensor]) -> int:
    """Each of them once; what is quantised as it is stored."""
    once = {id(tensor): tensor for tensor in tensors}.values()
    return sum(part.nbytes for tensor in once for part in _stored(tensor))


def _stored(tensor: Tensor) -> list[Tensor]:
    """The tensors that one consists of: torchao's have the size and dtype of what they stand for."""
    if isinstance(tensor, DTensor) or not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _stored(getattr(tensor, name))]


def _storage_nbytes(tensors: Sequence[Tensor]) -> int:
    """What they keep alive."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _dtypes(tensors: Sequence[Tensor]) -> str:
    sizes: dict[torch.dtype, int] = {}
    for part in (part for tensor in tensors for part in _stored(tensor)):
        sizes[part.dtype] = sizes.get(part.dtype, 0) + part.nbytes
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in sorted(sizes, key=sizes.get, reverse=True))


def _reachable(reward: Any, depth: int = 2) -> Iterator[Any]:
    """A reward, and the objects in its attributes, and in theirs."""
    owner = reward.__self__ if isinstance(reward, MethodType) else reward
    yield owner
    if depth and not isinstance(owner, (nn.Module, type, FunctionType, ModuleType)):
        for value in getattr(owner, "__dict__", {}).values():
            if isinstance(value, MethodType) or hasattr(value, "__dict__"):
                yield from _reachable(value, depth - 1)


def _size(size: int) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B" if size else "-"


def _flops(flops: int) -> str:
    for unit, name in ((10**15, "PFLOP"), (10**12, "TFLOP"), (10**9, "GFLOP")):
        if flops >= unit:
            return f"{flops / unit:.3g} {name}"
    return f"{flops / 10**6:.3g} MFLOP"
