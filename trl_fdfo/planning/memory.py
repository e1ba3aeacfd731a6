"""Memory of a run on one device by part, counted from the shapes of weights and from the rehearsal of one batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments

from ..pipeline.options import is_quantized
from ..pipeline.patch import is_decoder, upcast_weights
from ..pipeline.prompt_embeddings import called_first, text_encoders
from ..pipeline.records import Rehearsal, once_per_prompt
from ..pipeline.schedulers import RolloutScheduler
from ..pipeline.trained import frozen_modules, trained_module
from .cost import stored


GIB = 2**30

# Bytes of an optimizer's state per trained number, by the option `optim`. Paged optimizers use whatever memory has
# room.
OPTIMIZER_BYTES = {
    **dict.fromkeys(["adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"], 8),
    **dict.fromkeys(["adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"], 2),
    **dict.fromkeys(["paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit"], 0),
    **dict.fromkeys(["lion_32bit", "adagrad", "rmsprop"], 4),
    **{"adamw_torch_4bit": 1, "lion_8bit": 1, "sgd": 0},
}
# Bytes per number of a linear layer in nf4, which has a float32 scale for each 64 numbers.
NF4_BYTES = 0.5 + 4 / 64


@dataclass(frozen=True)
class Engine:
    """
    How a run uses its devices.

    Attributes:
        device_type (`str`): `"cuda"`, `"cpu"`, ...
        name (`str`): `"DDP"`, `"ZeRO-2"`, ..., or `""` for a single process.
        autocast (`torch.dtype`, *optional*): Dtype of mixed precision; None where it is off.
    """

    device_type: str
    name: str = ""
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Engine":
        kind = accelerator.distributed_type
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        if accelerator.autocast_handler is not None and not accelerator.autocast_handler.enabled:
            autocast = None
        if kind == DistributedType.DEEPSPEED:
            return cls(accelerator.device.type, f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}")
        if kind == DistributedType.FSDP:
            return cls(accelerator.device.type, "FSDP2")
        return cls(accelerator.device.type, "" if kind == DistributedType.NO else "DDP", autocast)

    @property
    def shards(self) -> frozenset[str]:
        """The members of "weights", "gradients" and "optimizer" that are spread over the processes."""
        shards = {"ZeRO-1": ["optimizer"], "ZeRO-2": ["gradients", "optimizer"]}
        shards["ZeRO-3"] = shards["FSDP2"] = ["weights", "gradients", "optimizer"]
        return frozenset(shards.get(self.name, ()))


@dataclass(frozen=True)
class Part:
    """
    One row of the table of memory.

    Attributes:
        name (`str`): The row's name.
        sampling (`int`): Bytes on one device while images are sampled and scored.
        training (`int`): Bytes on one device while the images are trained on.
        note (`str`): A remark that is printed behind the bytes.
    """

    name: str
    sampling: int
    training: int
    note: str = ""

    @classmethod
    def constant(cls, name: str, size: int, note: str = "") -> "Part":
        """A part that takes equal memory in sampling and training."""
        return cls(name, size, size, note)


def model_parts(model: nn.Module, args: TrainingArguments, engine: Engine, has_old_policy: bool = False) -> list[Part]:
    """
    The weights of the model, their gradients, the state of the optimizer, the average of the weights, and the policy that
    samples, if it has weights of its own.
    """

    def processes(shared: str) -> int:
        return args.world_size if shared in engine.shards else 1

    trained = trained_parameters(model)
    trained_ids = {id(parameter) for parameter in trained}
    frozen = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in trained_ids]
    frozen_bytes, note = nbytes(frozen), _dtypes(frozen)
    if args.quantization == "nf4" and not is_quantized(model):  # a plan without weights, which a GPU alone can quantise
        linear = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear)} - trained_ids
        numbers = sum(tensor.numel() for tensor in frozen if id(tensor) in linear)
        others = nbytes([tensor for tensor in frozen if id(tensor) not in linear])
        frozen_bytes, note = (
            others + round(NF4_BYTES * numbers),
            f"{args.quantization}, {note}",
        )
    weights = gradients = nbytes(trained)
    numbers = sum(parameter.numel() for parameter in trained)
    optimizer = getattr(args.optim, "value", args.optim)  # an enum's member, or its name
    per_number = OPTIMIZER_BYTES.get(optimizer)
    state = (per_number or 0) * numbers
    if engine.name.startswith("ZeRO") and args.bf16:
        weights = gradients = 2 * numbers
        state += 8 * numbers  # weights and gradients in float32
    remark = optimizer if per_number is not None else f"{optimizer}: not known"
    parts = [
        Part.constant("transformer, frozen", frozen_bytes // processes("weights"), note),
        Part.constant("trained weights", weights // processes("weights"), _dtypes(trained)),
        Part("gradients", 0, gradients // processes("gradients")),
        Part.constant("optimizer", state // processes("optimizer"), remark),
    ]
    if args.ema_decay is not None:
        parts.append(Part.constant("average of weights", 4 * numbers))
    if has_old_policy:
        # While they are in the place of the trained weights, these are copied too.
        parts.append(Part.constant("policy that samples", 4 * numbers + nbytes(trained)))
    return parts


def component_parts(pipeline: DiffusionPipeline, args: TrainingArguments) -> Iterator[Part]:
    """The text encoders, the VAE and the pipeline's other frozen modules, but for weights that are the transformer's too."""
    transformer = trained_module(pipeline)
    counted = {id(tensor) for tensor in (*transformer.parameters(), *transformer.buffers())}
    for name, component in frozen_modules(pipeline).items():
        size = nbytes([t for t in (*component.parameters(), *component.buffers()) if id(t) not in counted])
        # Offloaded parts move to the device when called. Text encoders and language models leave before the transformer is
        # called, decoders when the rollout ends. A replay calls the others, such as a ControlNet, which then stay.
        is_first = name in called_first(pipeline)
        waits = args.offload_components and (is_first or is_decoder(name, component))
        waits = waits or (args.cache_prompt_embeds and name in text_encoders(pipeline))
        note = f"{size_text(size)} in host memory" if waits else ""
        sampling = 0 if waits and is_first else size
        if is_decoder(name, component):
            halves = upcast_weights(component).values()
            if halves:
                upcast = size + nbytes(halves)  # twice as large
                sampling, note = size + upcast, ", ".join(filter(None, [note, "with a copy in float32 that decodes"]))
        yield Part(name, sampling, 0 if waits else size, note)


def encoding_bytes(pipeline: DiffusionPipeline, args: TrainingArguments, parts: Sequence[Part]) -> int:
    """
    Bytes on one device while text encoders that wait in host memory encode; 0 if they stay on the device.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline.
        args (`TrainingArguments`): Options of the run.
        parts (`Sequence[Part]`): The table of memory.
    """
    if not (args.offload_components or args.cache_prompt_embeds):
        return 0
    encoders = called_first(pipeline) if args.offload_components else text_encoders(pipeline)
    size = nbytes([tensor for part in encoders.values() for tensor in (*part.parameters(), *part.buffers())])
    absent = ["gradients", "trajectories", "activations"]
    if args.cache_prompt_embeds:  # before the run, and the transformer waits in host memory
        absent += ["transformer, frozen", "trained weights", "optimizer", "average of weights", "policy that samples"]
    return size + sum(part.training for part in parts if part.name not in absent)


def reward_parts(rewards: dict[str, Callable | None]) -> Iterator[Part]:
    """The modules that rewards hold; None stands for a reward that is not loaded."""
    for name, reward in rewards.items():
        if reward is None:
            yield Part(f"reward {name}", 0, 0, "not loaded: add its weights")
            continue
        holders = list(_reachable(reward))
        modules = [held for held in holders if isinstance(held, nn.Module)]
        if not modules:
            continue
        size = nbytes([t for module in modules for t in (*module.parameters(), *module.buffers())])
        waits = any(getattr(held, "offload", None) is True for held in holders)
        yield Part(f"reward {name}", size, 0 if waits else size, "in host memory while training" if waits else "")


def trajectory_bytes(
    rehearsal: Rehearsal,
    args: TrainingArguments,
    scheduler_class: type[RolloutScheduler],
    latents_per_target: int,
    noises_endpoints: bool = False,
) -> int:
    """
    Bytes that a process records of one rollout. A batch keeps at each of K levels the noisy latents, the velocity and, if
    the scheduler records arrivals, the next latents; the velocity and, with arrivals, the latents are float32. It also
    keeps for each sample's targets a float32 number and `latents_per_target` float32 tensors of the latents' shape, and
    what the pipeline has encoded and prepared. An algorithm that noises the endpoints keeps these, in float32, in the place
    of all levels.
    """
    # A batch is copied when it moves to the host or is cut from a larger one. Otherwise a view keeps its whole storage.
    copied = args.offload_trajectories or args.prompts_per_call > args.per_device_prompt_batch_size
    copied = copied or args.num_candidates > args.num_generations
    size = nbytes if copied else _storage_nbytes
    latents = 2 * 4 * rehearsal.latents.numel() if scheduler_class.records_arrivals else size([rehearsal.latents])
    tuples = args.num_trained_levels * (latents + size([rehearsal.velocity]))
    if noises_endpoints:
        tuples = 4 * rehearsal.latents.numel()
    samples = len(rehearsal.latents)
    targets = 4 * samples + latents_per_target * 4 * rehearsal.latents.numel()
    encoded = once_per_prompt(rehearsal.encoded, min(args.num_generations, samples), samples)
    values = [encoded, rehearsal.encoded_images, rehearsal.generated, rehearsal.prepared]
    remembered = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    calls = args.per_device_train_batch_size // samples  # of a batch: several if a call makes one sample
    return args.num_rollout_batches * calls * (tuples + targets + size(remembered))


def kept_output_bytes(rehearsal: Rehearsal, args: TrainingArguments) -> int:
    """Bytes of all that the transformer returns in a rollout of a process, which a guidance with momentum keeps."""
    calls = args.per_device_train_batch_size // len(rehearsal.latents)
    tensors = [leaf for leaf in tree_leaves(rehearsal.outputs) if isinstance(leaf, Tensor)]
    return args.num_rollout_batches * calls * args.num_inference_steps * _storage_nbytes(tensors)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, each counted once; of quantised ones the bytes that are stored."""
    once = {id(tensor): tensor for tensor in tensors}.values()
    return sum(part.nbytes for tensor in once for part in stored(tensor))


def size_text(size: int) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B" if size else "-"


def _storage_nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes that tensors keep alive, beyond what a view shows of its storage."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _dtypes(tensors: Sequence[Tensor]) -> str:
    sizes: dict[torch.dtype, int] = {}
    for part in (part for tensor in tensors for part in stored(tensor)):
        sizes[part.dtype] = sizes.get(part.dtype, 0) + part.nbytes
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in sorted(sizes, key=sizes.get, reverse=True))


def _reachable(reward: Any, depth: int = 2) -> Iterator[Any]:
    """A reward, the objects in its attributes, and the objects in their attributes."""
    owner = reward.__self__ if isinstance(reward, MethodType) else reward
    yield owner
    if depth and not isinstance(owner, (nn.Module, type, FunctionType, ModuleType)):
        for value in getattr(owner, "__dict__", {}).values():
            if isinstance(value, MethodType) or hasattr(value, "__dict__"):
                yield from _reachable(value, depth - 1)
