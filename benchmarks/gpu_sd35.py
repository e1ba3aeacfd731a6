"""
Measures what each option costs and saves in FDFO on Stable Diffusion 3.5 Medium on one CUDA GPU.

    python benchmarks/gpu_sd35.py              # begins no row after eight minutes, and so ends within ten
    python benchmarks/gpu_sd35.py --parts rows --rows "fp16"     # adds a part, or rows, to the file of the same card
    python benchmarks/gpu_sd35.py --tiny       # a rehearsal on a tiny model, also on a CPU: measures nothing

The pipeline has the published architecture with random weights in bfloat16, at 512 x 512 pixels. A prompt's embedding
has the real shape, 77 CLIP and 128 T5 tokens, but comes from encoders of one thin layer, which cost next to nothing.
The rows "text encoders" have encoders of the real size. The reward is free. The trainer is `FDFOTrainer`.

First come checks in float32: the trainer's images are those of diffusers, the replay is exact, the saved adapter loads
in diffusers and gives the trainer's images. Then come single calls of the models, at last compiled: the time that the host
takes to launch a call, and the time of the call, beside the estimate of the plan's formula; and PyTorch's kernels of
attention, with their errors. Then come rows, first those that compare the
memory with the plan. A row is one run with some options changed. Its first rollout warms up; the others are timed. A row
that fails ends no other: "out of memory" is a result. Prints and writes to `benchmarks/results/gpu_sd35-<name of the
GPU>.json`, after each check, call and row:

- images/s sampled, with the decoding; tuples/s trained (forward, backward, optimizer), and the plan's estimate of both;
- GiB: peak of allocated memory while sampling and while training, and the plan's estimate of it;
- the largest replay error, relative to the velocity;
- MFU: model FLOPs over the rate of a bfloat16 matrix product measured in the same run. FLOPs are counted on a twin
  without memory, and a forward pass that gradient checkpointing repeats counts once.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import io
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_pipelines
import torch
import torch._dynamo
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from peft import PeftModel, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, TrainerCallback

from benchmarks.common import (
    PROMPTS,
    QUIET,
    PeakMemory,
    TimedTrainer,
    median_seconds,
    sd3_vae,
    synchronize,
    timed_trainer,
)
from trl_fdfo import FDFOConfig
from trl_fdfo.pipeline.lora import default_lora_config
from trl_fdfo.pipeline.options import repeated_blocks
from trl_fdfo.pipeline.own_dtype import run_in_own_dtype
from trl_fdfo.planning.cost import Precision, sampling_cost, training_cost
from trl_fdfo.planning.time import CARDS, Card


DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """A pipeline by the numbers of its configs. A prompt's embedding has `clip_tokens` and `t5_tokens`."""

    pixels: int
    transformer: dict[str, Any]
    vae: dict[str, Any]
    clips: list[dict[str, Any]]
    t5: dict[str, Any]
    clip_tokens: int
    t5_tokens: int
    product: int  # rows and columns of the matrices whose product measures the ceiling

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.pixels // 2 ** (len(self.vae["block_out_channels"]) - 1)
        return self.vae["latent_channels"], side, side

    @property
    def embedding_shape(self) -> tuple[int, int]:
        return self.clip_tokens + self.t5_tokens, self.transformer["joint_attention_dim"]


# From config.json of transformer/, vae/ and text_encoder*/ in stabilityai/stable-diffusion-3.5-medium.
MEDIUM = Size(
    pixels=512,
    transformer={
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    vae={"latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    clips=[
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    ],
    t5={"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    clip_tokens=77,
    t5_tokens=128,
    product=8192,
)

TINY = Size(
    pixels=16,
    transformer={
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "out_channels": 4,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    vae={"latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    clips=2 * [{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}],
    t5={"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
    clip_tokens=16,
    t5_tokens=8,
    product=256,
)


@dataclass(frozen=True)
class Row:
    """
    One run: its options, which replace options of `make_config`; whether its text encoders have the real size; whether
    its memory is compared with the plan, which takes seconds to work out.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    text_encoders: bool = False
    planned: bool = False


SAVING = {
    "gradient_checkpointing": True,
    "per_device_prompt_batch_size": 1,
    "offload_components": True,
    "offload_trajectories": True,
}
FILLED = {"per_device_prompt_batch_size": 8}
COMPILED = FILLED | {"torch_compile": True}
CUDNN = {"attention_backend": "_native_cudnn"}
PAPER = {"num_inference_steps": 40}
ONE_BATCH = {"prompts_per_rollout": 2}
# The most telling rows come first, because a run that is out of time leaves out the last. Two options are missing: the
# attention of SD 3.5 ignores `attention_backend`, and `vae_tiling` leaves 512 pixels whole.
ROWS = [
    # The paper's setting, as fast as it gets.
    Row("8 prompts", FILLED, planned=True),
    Row("8 prompts, torch_compile", COMPILED, planned=True),
    Row("8 prompts, torch_compile, cuDNN's attention", COMPILED | CUDNN),
    Row("8 prompts, torch_compile, cuDNN's attention, in 40 steps", COMPILED | CUDNN | PAPER),
    Row("8 prompts, torch_compile, in 40 steps", COMPILED | PAPER),
    # Memory, of one batch of 2 prompts.
    Row("all that saves memory", SAVING | ONE_BATCH, text_encoders=True, planned=True),
    Row("quantization nf4", ONE_BATCH | {"quantization": "nf4"}, planned=True),
    Row("quantization int8", ONE_BATCH | {"quantization": "int8"}, planned=True),
    Row("text encoders", ONE_BATCH, text_encoders=True, planned=True),
    Row(
        "text encoders, offload_components", ONE_BATCH | {"offload_components": True}, text_encoders=True, planned=True
    ),
    Row("gradient checkpointing", ONE_BATCH | {"gradient_checkpointing": True}, planned=True),
    Row("offload_trajectories", ONE_BATCH | {"offload_trajectories": True}, planned=True),
    # Speed.
    Row("2 prompts", planned=True),
    Row("gradient checkpointing, 8 prompts", FILLED | {"gradient_checkpointing": True}),
    Row("4 prompts", {"per_device_prompt_batch_size": 4}),
    Row("1 prompt", {"per_device_prompt_batch_size": 1}),
    Row("fp16", {"bf16": False, "fp16": True}),
    Row("adamw_bnb_8bit", {"optim": "adamw_bnb_8bit"}),
    Row("text encoders, cache_prompt_embeds", {"cache_prompt_embeds": True}, text_encoders=True),
    Row("torch_compile", {"torch_compile": True}),
    Row("8 prompts sampled, 2 trained", {"per_device_sampling_batch_size": 8}),
    Row("interval churn", {"churn_schedule": "interval", "churn": 1.0}),
    Row("interval churn, shared_prefix", {"churn_schedule": "interval", "churn": 1.0, "shared_prefix": True}),
    Row("torch_compile, gradient checkpointing", {"torch_compile": True, "gradient_checkpointing": True}),
    Row("8 prompts, decoded at a time", FILLED | {"vae_slicing": False}),
    # The first row again shows how far the machine has drifted.
    Row("8 prompts, again", FILLED),
]


@contextlib.contextmanager
def building(device: torch.device) -> Iterator[None]:
    """Draws weights on their device and in bfloat16, where an encoder of 5 billion need not pass through the CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_transformer(size: Size, device: torch.device) -> SD3Transformer2DModel:
    with building(device):
        # The table of positions is made on the CPU in float32, and then moved.
        return SD3Transformer2DModel(**size.transformer).to(device, DTYPE)


def build_vae(size: Size, device: torch.device) -> AutoencoderKL:
    with building(device):
        return sd3_vae(**size.vae, shift_factor=0.0609, scaling_factor=1.5305).to(device, DTYPE)


def build_text_encoders(size: Size, device: torch.device, real: bool) -> dict[str, Any]:
    """Text encoders of the real size, or of one thin layer. Their small tokenizers do not change the time."""
    tokenizers = [tiny_pipelines.clip_tokenizer(), tiny_pipelines.clip_tokenizer(), tiny_pipelines.t5_tokenizer()]
    thin_clip = {} if real else {"num_hidden_layers": 1, "intermediate_size": 64}
    thin_t5 = {} if real else {"num_layers": 1, "d_ff": 64, "num_heads": 1, "vocab_size": 64}
    encoders = []
    with building(device):
        for tokenizer, numbers in zip(tokenizers, size.clips):
            tokenizer.model_max_length = size.clip_tokens
            config = CLIPTextConfig(
                **{**numbers, **thin_clip},
                projection_dim=numbers["hidden_size"],
                max_position_embeddings=size.clip_tokens,
                eos_token_id=tokenizer.eos_token_id,  # where the pooled embedding is read
            )
            encoders.append(CLIPTextModelWithProjection(config).to(device, DTYPE))
        t5 = T5Config(**{**size.t5, **thin_t5}, feed_forward_proj="gated-gelu", dropout_rate=0.0)
        encoders.append(T5EncoderModel(t5).to(device, DTYPE))
    names = ["", "_2", "_3"]
    return {
        **{f"text_encoder{name}": encoder for name, encoder in zip(names, encoders)},
        **{f"tokenizer{name}": tokenizer for name, tokenizer in zip(names, tokenizers)},
    }


def build_pipeline(size: Size, device: torch.device, text_encoders: bool = False) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    return StableDiffusion3Pipeline(
        transformer=build_transformer(size, device),
        vae=build_vae(size, device),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **build_text_encoders(size, device, real=text_encoders),
    )


def make_config(size: Size, steps: int, rounds: int, folder: str, device: torch.device, **options: Any) -> FDFOConfig:
    defaults = {
        "output_dir": folder,
        "num_rollouts": rounds + 1,
        "prompts_per_rollout": 8,
        "optimizer_steps_per_rollout": 1,
        "num_inference_steps": steps,
        "height": size.pixels,
        "width": size.pixels,
        "pipeline_kwargs": {"max_sequence_length": size.t5_tokens},
        # In bfloat16 and with random weights, rounding may hide the paper's churn.
        "churn": 0.05,
        "bf16": True,
        "use_cpu": device.type == "cpu",
        **QUIET,
    }
    return FDFOConfig(**{**defaults, **options})


# Counting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """
    FLOPs of the model for one image in a forward pass, in a trained tuple (forward and backward) and in the decoding;
    and the kernels of a forward pass and of a trained tuple, whose number does not depend on the batch.
    """

    forward: int
    tuple: int
    decode: int
    forward_kernels: int
    tuple_kernels: int
    trained_parameters: int

    def of_image(self, steps: int) -> int:
        return steps * self.forward + self.decode


class KernelCounter(TorchDispatchMode):
    """Counts the operations that are not views."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def build_adapted_transformer(size: Size, device: torch.device) -> PeftModel:
    """The transformer with the adapter of a run with default options."""
    transformer = build_transformer(size, device).requires_grad_(False)
    config = make_config(size, 1, 1, tempfile.gettempdir(), torch.device("cpu"))
    lora = default_lora_config(config.lora_r, config.lora_alpha, config.lora_target_modules, transformer)
    return get_peft_model(transformer, lora)


def count_work(size: Size) -> Work:
    """
    Counts FLOPs on models without memory. Attention runs there as matrix products, the ones that a fused kernel
    computes. A fused kernel computes some of them again in the backward pass; these are not counted.
    """
    meta, images = torch.device("meta"), 2
    model = build_adapted_transformer(size, meta)
    with building(meta):
        inputs = transformer_inputs(size, images)
        with FlopCounterMode(display=False) as flops, KernelCounter() as kernels:
            velocity = model(**inputs)[0]
            forward, forward_kernels = flops.get_total_flops(), kernels.count
            velocity.float().square().mean().backward()
        vae = build_vae(size, meta)
        with FlopCounterMode(display=False) as decoded, torch.no_grad():
            vae.decode(torch.empty(images, *size.latent_shape))
    return Work(
        forward=forward // images,
        tuple=flops.get_total_flops() // images,
        decode=decoded.get_total_flops() // images,
        forward_kernels=forward_kernels,
        tuple_kernels=kernels.count,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def transformer_inputs(size: Size, images: int) -> dict[str, torch.Tensor]:
    """Arguments of a call of the transformer, on the default device and in the default dtype."""
    return {
        "hidden_states": torch.randn(images, *size.latent_shape),
        "encoder_hidden_states": torch.randn(images, *size.embedding_shape),
        "pooled_projections": torch.randn(images, size.transformer["pooled_projection_dim"]),
        "timestep": torch.full((images,), 500.0),
        "return_dict": False,
    }


# Checking ----------------------------------------------------------------------------------------------------------

# Largest difference of two images in [0, 1], and largest replay error, in float32.
SAME_IMAGES, SAME_VELOCITY = 1e-3, 1e-4


def check(size: Size, steps: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """The checks in float32: yields name, value, limit and verdict of each."""

    def verdict_on(name: str, value: float, limit: float, above: bool = False) -> dict[str, Any]:
        passed = value > limit if above else value <= limit
        return {"name": name, "value": value, "limit": limit, "above": above, "passed": passed}

    def build() -> StableDiffusion3Pipeline:
        pipeline = build_pipeline(size, device).to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def of_diffusers(pipeline: StableDiffusion3Pipeline) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = config.call_kwargs() | {"generator": generators, "output_type": "pt"}
        return pipeline(prompts, **call).images.cpu()

    prompts, seeds = PROMPTS["prompt"][:2], [0, 1]
    # Convolutions in TF32, PyTorch's default, round by the number of images that the VAE decodes at a time.
    with tempfile.TemporaryDirectory() as folder, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        options = {"bf16": False, "prompts_per_rollout": 2, "per_device_eval_batch_size": 2, "learning_rate": 0.05}
        config = make_config(size, steps, 0, folder, device, **options)
        pipeline = build()
        base = of_diffusers(pipeline)
        trainer = timed_trainer(config, pipeline)
        images = trainer.generate(prompts, seeds)
        yield verdict_on("images before training, from diffusers'", difference(images, base), SAME_IMAGES)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        yield verdict_on("replay error", replay_error(trainer), SAME_VELOCITY)
        trained = trainer.generate(prompts, seeds)
        # Otherwise the next check would pass with an adapter that did not load.
        yield verdict_on("images after training, from those before", difference(trained, base), 10 * SAME_IMAGES, True)
        trainer.save_model()
        del trainer, pipeline
        loaded = build()
        loaded.load_lora_weights(folder)
        apart = difference(of_diffusers(loaded), trained)
        yield verdict_on("images after training, from diffusers' with the adapter", apart, SAME_IMAGES)


def difference(images: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference; of images that are not finite, infinite."""
    return (images - others).abs().max().nan_to_num(float("inf")).item()


def replay_error(trainer: TimedTrainer) -> float:
    return max(log["replay_error"] for log in trainer.state.log_history if "replay_error" in log)


# Measuring ---------------------------------------------------------------------------------------------------------


def product_rate(size: Size, device: torch.device) -> float:
    """FLOP/s of a large matrix product, the ceiling. Its numbers are random: zeros would be faster."""
    n = size.product
    a, b = (torch.randn(n, n, device=device, dtype=DTYPE) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b, device)


def measure_calls(size: Size, card: Card | None, device: torch.device) -> Iterator[dict[str, Any]]:
    """
    Times calls of the models without a trainer: the limit of what FDFO can reach. Yields for each the images, the seconds
    of the host alone and of the call, and the plan's estimate for a card that the plan knows.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # as a trainer does
    own, meta = Precision("cuda"), torch.device("meta")
    bare = build_transformer(size, device).requires_grad_(False)
    adapted, twin = (run_as_trained(build_adapted_transformer(size, where)) for where in (device, meta))
    vae = build_vae(size, device).float()
    for images in (4, 16):
        with building(device):
            inputs = transformer_inputs(size, images)
        with building(meta):
            calls = [((), transformer_inputs(size, images))]
        costs = {"forward": sampling_cost(twin, calls, own), "forward and backward": training_cost(twin, calls, own)}
        latents = inputs["hidden_states"].float()
        functions = {
            "forward without adapter": torch.no_grad()(lambda: bare(**inputs)),  # noqa: B023
            "forward": torch.no_grad()(lambda: adapted(**inputs)),  # noqa: B023
            "forward and backward": lambda: adapted(**inputs)[0].float().square().mean().backward(),  # noqa: B023
            "decoding": torch.no_grad()(lambda: [vae.decode(one) for one in latents.split(1)]),  # noqa: B023
        }
        for name, function in functions.items():
            plan = card.seconds(costs[name], DTYPE) if card is not None and name in costs else None
            yield timed_call(name, images, function, device, plan)
    # The code that inductor makes for a CPU says nothing about a GPU, and takes a rehearsal most of its time.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    for block in repeated_blocks(adapted):
        block.compile(dynamic=False, backend=backend)
    for name, cost in costs.items():
        plan = card.seconds(cost, DTYPE, compiled=True) if card is not None else None
        yield timed_call(f"{name}, compiled", images, functions[name], device, plan)


def timed_call(name: str, images: int, function: Callable, device: torch.device, plan: float | None) -> dict[str, Any]:
    seconds = median_seconds(function, device, repeats=5, warm_up=2)
    result = {"name": name, "images": images, "seconds": seconds, "host_seconds": host_seconds(function, device)}
    return result if plan is None else result | {"plan_seconds": plan}


def measure_attention(size: Size, device: torch.device) -> Iterator[dict[str, Any]]:
    """
    Times the kernels of attention at the lengths of a joint and an image's own attention, of 16 images. Yields for each the
    seconds of a call and of one with gradients, and the relative rms errors of the output and of the gradients, against
    float32. cuDNN's gradients are NaN at some lengths, if all scores are far below 0: the last length is one of them.
    """
    heads, width = size.transformer["num_attention_heads"], size.transformer["attention_head_dim"]
    tokens = (size.latent_shape[1] // size.transformer["patch_size"]) ** 2
    for length in (tokens, tokens + size.clip_tokens + size.t5_tokens, tokens + 64):
        for score in (0, -120):
            torch.manual_seed(0)
            query, key, value, by = (
                torch.randn(16, heads, length, width, device=device, dtype=DTYPE) for _ in range(4)
            )
            if score:
                query[..., 0], key[..., 0] = 1.0, score * width**0.5
            tensors = [query, key, value]
            right = attention_with_gradients(
                SDPBackend.MATH, [tensor[:1].float() for tensor in tensors], by[:1].float()
            )
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                try:
                    got = attention_with_gradients(backend, [tensor[:1] for tensor in tensors], by[:1])
                    errors = [((a - b).square().mean() / b.square().mean()).sqrt().item() for a, b in zip(got, right)]
                    with torch.no_grad(), sdpa_kernel(backend):
                        forward = median_seconds(lambda: attend(*tensors), device)  # noqa: B023
                    both = median_seconds(lambda: attention_with_gradients(backend, tensors, by), device)  # noqa: B023
                except RuntimeError as error:  # this device lacks the kernel
                    yield {"name": backend.name, "length": length, "score": score, "error": str(error).splitlines()[0]}
                    continue
                yield {
                    "name": backend.name,
                    "length": length,
                    "score": score,
                    "seconds": forward,
                    "seconds_with_gradients": both,
                    "errors": errors,
                }


def attention_with_gradients(backend: SDPBackend, tensors: list[torch.Tensor], by: torch.Tensor) -> list[torch.Tensor]:
    """The output of attention and the gradients of query, key and value, in float32."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with sdpa_kernel(backend):
        output = attend(*leaves)
        gradients = torch.autograd.grad(output, leaves, by)
    return [tensor.detach().float() for tensor in (output, *gradients)]


def run_as_trained(model: PeftModel) -> PeftModel:
    """With the adapter in float32, which is cast to the transformer's own dtype."""
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
    run_in_own_dtype(model)
    return model


def host_seconds(function: Callable, device: torch.device) -> float:
    """Seconds until a call is launched, where it did not wait for a GPU that is further behind."""
    seconds = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    synchronize(device)
    return statistics.median(seconds)


def plan_card(machine: dict[str, Any]) -> str | None:
    """The plan's name of the GPU, if it knows it."""
    name = machine.get("gpu", "").replace(" ", "").lower()
    return next((card for card in CARDS if card in name), None)


def make_trainer(row: Row, size: Size, config: FDFOConfig, device: torch.device) -> TimedTrainer:
    pipeline = build_pipeline(size, device, row.text_encoders)
    if "quantization" in row.options:
        # A pipeline is quantised while it is loaded.
        pipeline.save_pretrained(config.output_dir)
        pipeline = config.output_dir
    return timed_trainer(config, pipeline, PeakMemory(device), row.planned)


def measure(
    row: Row,
    size: Size,
    work: Work,
    ceiling: float,
    steps: int,
    rounds: int,
    device: torch.device,
    card: str | None = None,
) -> dict[str, Any]:
    """Figures of one run with a row's options, which may replace `steps`."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(size, steps, rounds, folder, device, **row.options)
        trainer = make_trainer(row, size, config, device)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    phases = trainer.phases
    images = config.prompts_per_rollout * config.num_generations
    tuples = images * config.num_trained_levels
    images_per_second = images / statistics.median(phases.sampling[1:])
    tuples_per_second = tuples / statistics.median(phases.training[1:])
    result = {}
    if row.planned:
        plan = trainer.run_plan()
        sampling, training = plan.peaks()
        if plan.peak() > max(sampling, training):
            sampling = plan.peak()  # as prompts are encoded
        result["plan_sampling_gib"], result["plan_training_gib"] = sampling / 2**30, training / 2**30
        if card is not None and plan.failure is None:
            plan.gpu = card
            seconds = plan.seconds()
            result["plan_images_per_second"] = images / (seconds["sampling"] + seconds["decoding"])
            result["plan_tuples_per_second"] = tuples / seconds["training"]
    return result | {
        "images_per_second": images_per_second,
        "tuples_per_second": tuples_per_second,
        "sampling_gib": phases.sampling_peak / 2**30,
        "training_gib": phases.training_peak / 2**30,
        "replay_error": replay_error(trainer),
        "sampling_mfu": images_per_second * work.of_image(config.num_inference_steps) / ceiling,
        "training_mfu": tuples_per_second * work.tuple / ceiling,
        "sampling_seconds": phases.sampling,
        "training_seconds": phases.training,
        "compiled_frames": torch._dynamo.utils.counters["frames"]["ok"],
    }


def clean_slate(device: torch.device, environment: dict[str, str]) -> int:
    """
    Undo a row's changes to the process: `torch_compile` sets an environment variable, which the next row would read.

    Returns:
        `int`: Bytes that are still allocated. They would be counted in the next row too.
    """
    os.environ.clear()
    os.environ.update(environment)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def measure_or_fail(row: Row, device: torch.device, **settings: Any) -> dict[str, Any]:
    """The figures of `measure`, or its error: a row that fails ends no other."""
    result = dataclasses.asdict(row)
    known = {option.name for option in dataclasses.fields(FDFOConfig)}
    environment = dict(os.environ)
    try:
        if unknown := row.options.keys() - known:
            raise ValueError(f"FDFOConfig has no {', '.join(sorted(unknown))}")
        result |= measure(row, device=device, **settings)
    except torch.OutOfMemoryError:
        result["error"] = "out of memory"
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["left_gib"] = clean_slate(device, environment) / 2**30
    return result


def profile(row: Row, size: Size, steps: int, device: torch.device) -> str:
    """The kernels of a row by their time, in sampling and training of one rollout."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = make_config(size, steps, 1, folder, device, **row.options)
        trainer = make_trainer(row, size, config, device)
        profiler = torch.profiler.profile(
            activities=activities, schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
        )

        class Step(TrainerCallback):
            def on_epoch_end(self, args, state, control, **kwargs):
                profiler.step()

        trainer.add_callback(Step())
        with profiler:
            trainer.train()
    phases, events = trainer.phases, profiler.key_averages()
    wall = phases.sampling[-1] + phases.training[-1]
    text = f"{row.name}: one rollout of {wall:.2f} s with the profiler on"
    if device.type == "cuda":
        kernels = sum(
            event.self_device_time_total
            for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        )
        kernels /= 1e6  # from microseconds
        text += f", of which the GPU is busy {kernels:.2f} s ({100 * kernels / wall:.0f}%)"
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return f"{text}\n{events.table(sort_by=by, row_limit=30, max_name_column_width=90)}"


# Reporting ---------------------------------------------------------------------------------------------------------


def describe_machine(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    machine: dict[str, Any] = {package: importlib.metadata.version(package) for package in packages}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
    return machine


HEADER = (
    f"{'':38}{'images/s':>9} {'(plan)':>7} {'tuples/s':>9} {'(plan)':>7}{'GiB: sampling':>14} {'(plan)':>7} {'training':>9} {'(plan)':>7}"
    f"{'MFU: sampling':>14} {'training':>9} {'replay error':>13}"
)


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']:38}{row['error'].splitlines()[0][:100]}"
    plan = {part: f"({row[f'plan_{part}_gib']:.1f})" if row["planned"] else "" for part in ("sampling", "training")}
    speed = {
        part: f"({row[f'plan_{part}_per_second']:.1f})" if f"plan_{part}_per_second" in row else ""
        for part in ("images", "tuples")
    }
    text = (
        f"{row['name']:38}{row['images_per_second']:9.2f} {speed['images']:>7} {row['tuples_per_second']:9.1f} "
        f"{speed['tuples']:>7}{row['sampling_gib']:14.1f} "
        f"{plan['sampling']:>7} {row['training_gib']:9.1f} {plan['training']:>7}{100 * row['sampling_mfu']:13.1f}% "
        f"{100 * row['training_mfu']:8.1f}% {row['replay_error']:13.2g}"
    )
    return text + (f"  ({row['left_gib']:.1f} GiB were not freed)" if row["left_gib"] > 0.1 else "")


def attention_line(kernel: dict[str, Any]) -> str:
    name = f"{kernel['length']:5d} tokens, scores near {kernel['score']:4d}, {kernel['name']:16}"
    if "error" in kernel:
        return f"{name} {kernel['error']}"
    errors = ", ".join(f"{error:.2g}" for error in kernel["errors"])
    return (
        f"{name} {1e3 * kernel['seconds']:6.2f} ms, with gradients {1e3 * kernel['seconds_with_gradients']:6.2f} ms, errors "
        f"{errors}"
    )


def verdict(check: dict[str, Any]) -> str:
    relation = "above" if check["above"] else "at most"
    return f"{'passed' if check['passed'] else 'FAILED'}: {check['name']}: {check['value']:.2g}, {relation} {check['limit']:g}"


PARTS = ["checks", "calls", "attention", "rows"]


def earlier_results(output: Path, settings: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    """What the file of an earlier run with the same settings has of other parts, and its rows, which are replaced singly."""
    before = json.loads(output.read_text()) if output.exists() else {}
    if any(before.get(name) != value for name, value in settings.items()):
        before = {}
    return {part: before.get(part, []) if part == "rows" or part not in parts else [] for part in PARTS}


def put_row(rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Replaces the row of that name, or adds one. A row that was not begun replaces none."""
    names = [row["name"] for row in rows]
    if result["name"] not in names:
        rows.append(result)
    elif "options" in result:
        rows[names.index(result["name"])] = result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a GPU or a CPU: a rehearsal")
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of the sampler; 40 is the paper's setting, 10 its fast one"
    )
    parser.add_argument("--rounds", type=int, default=2, help="timed rollouts of each row")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no row after this time")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="only these parts; the file keeps the others, if it is of the same machine; default: all, of --rows the rows",
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows; the file keeps the others likewise")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also print the kernels of the first row, or of the first of --rows, by time",
    )
    parser.add_argument("--output", type=Path, help="file of the results; default: see above")
    args = parser.parse_args(arguments)
    unknown = set(args.rows or ()) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no rows {sorted(unknown)}; there are: {'; '.join(row.name for row in ROWS)}")
    parts = args.parts or (["rows"] if args.rows else PARTS)
    if not torch.cuda.is_available() and not args.tiny:
        print("This benchmark measures a CUDA GPU, and there is none here. --tiny rehearses it on the CPU.")
        return
    begin = time.perf_counter()
    diffusers_logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = TINY if args.tiny else MEDIUM
    machine = describe_machine(device)
    card = plan_card(machine)
    name = "tiny" if args.tiny else re.sub(r"\W+", "-", machine["gpu"])
    folder = Path("outputs") if args.tiny else Path(__file__).with_name("results")
    output = args.output or folder / f"gpu_sd35-{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)

    work = count_work(size)
    ceiling = product_rate(size, device)
    print(f"{machine.get('gpu', 'CPU')}, torch {machine['torch']}")
    print(
        f"matrix product {ceiling / 1e12:.3g} TFLOP/s; model: forward {work.forward / 1e12:.3g}, tuple "
        f"{work.tuple / 1e12:.3g}, decoding {work.decode / 1e12:.3g} TFLOP per image"
    )
    settings = {"machine": machine, "steps": args.steps, "pixels": size.pixels, "work": dataclasses.asdict(work)}
    results = settings | {"ceiling_flops_per_second": ceiling} | earlier_results(output, settings, parts)

    def write() -> None:  # after each part: an interrupted run keeps the others
        output.write_text(json.dumps(results, indent=1) + "\n")

    environment = dict(os.environ)
    try:
        for checked in check(size, args.steps, device) if "checks" in parts else ():
            results["checks"].append(checked)
            print(verdict(checked), flush=True)
            write()
    except Exception as error:  # no row depends on the checks
        results["checks"].append({"name": "checks", "error": f"{type(error).__name__}: {error}", "passed": False})
        print(f"FAILED: {results['checks'][-1]['error']}", flush=True)
        write()
    clean_slate(device, environment)
    for call in measure_calls(size, CARDS.get(card), device) if "calls" in parts else ():
        results["calls"].append(call)
        print(
            f"{call['images']:3d} images, {call['name']:24} {1e3 * call['seconds']:8.1f} ms, of the host alone "
            f"{1e3 * call['host_seconds']:8.1f} ms"
            + (f", by the plan {1e3 * call['plan_seconds']:.1f} ms" if "plan_seconds" in call else ""),
            flush=True,
        )
        write()
    clean_slate(device, environment)
    for kernel in measure_attention(size, device) if "attention" in parts else ():
        results["attention"].append(kernel)
        print(attention_line(kernel), flush=True)
        write()
    print(f"{time.perf_counter() - begin:.0f} s so far")
    print(HEADER)
    rows = [row for row in ROWS if "rows" in parts and (not args.rows or row.name in args.rows)]
    for row in rows:
        if time.perf_counter() - begin > 60 * args.minutes:
            result = {"name": row.name, "error": f"not begun: {args.minutes:g} minutes were over"}
        else:
            result = measure_or_fail(
                row, device, size=size, work=work, ceiling=ceiling, steps=args.steps, rounds=args.rounds, card=card
            )
        put_row(results["rows"], result)
        print(line(result), flush=True)
        write()
    print(f"{time.perf_counter() - begin:.0f} s; written to {output}")
    if args.profile:
        print(profile((rows or ROWS)[0], size, args.steps, device))
    if not all(checked["passed"] for checked in results["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
