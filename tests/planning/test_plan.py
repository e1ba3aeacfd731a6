import functools
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import tiny_pipelines.lumina2
import torch
from datasets import Dataset
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from tiny_pipelines import ace_step, flux_kontext, glm_image, ltx2, z_image_conditioned
from tiny_runs import PROMPTS, redness
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from trl import TrlParser

from benchmarks import gpu_sd35
from trl_fdfo import FDFOConfig, FDFOTrainer, FlowGRPOConfig, FlowGRPOTrainer, shapes
from trl_fdfo.cli import train
from trl_fdfo.fdfo.scheduler import ChurnScheduler
from trl_fdfo.pipeline.options import quantize_to_int8
from trl_fdfo.planning.cost import Cost, Precision, sampling_cost, training_cost
from trl_fdfo.planning.memory import NF4_BYTES, Engine, component_parts, encoding_bytes, nbytes
from trl_fdfo.planning.plan import RunPlan
from trl_fdfo.planning.time import (
    CARDS,
    COMPILED_OPERATIONS,
    COMPILED_TRAFFIC,
    CUDNN_SAVING,
    LAUNCH,
    THROUGHPUT,
    UTILISATION,
    Card,
)
from trl_fdfo.planning.without_weights import load_without_weights, plan_without_weights, planned
from trl_fdfo.rewards.learned_reward import LearnedReward


ROOT = Path(__file__).parents[2]
PlannedConfig = planned(FDFOConfig)


@pytest.fixture
def make_trainer(make_trainer):
    return functools.partial(make_trainer, trainer_class=FDFOTrainer)


# Activations and operations -------------------------------------------------------------------------------------------


def test_cost_of_a_linear_layer():
    layer = nn.Linear(8, 16, bias=False)
    calls = [((torch.randn(4, 8),), {})]
    sampled, trained = sampling_cost(layer, calls, Precision("cpu")), training_cost(layer, calls, Precision("cpu"))
    assert sampled.peak == 4 * 4 * 16 and sampled.flops == 2 * 4 * 8 * 16
    assert trained.flops == 2 * sampled.flops  # its input has no gradient
    assert sampling_cost(layer, 2 * calls, Precision("cpu")).flops == 2 * sampled.flops
    # The layer is left as it was.
    assert layer.weight.grad is None and type(layer.weight.data) is torch.Tensor


def test_weight_normalisation_is_counted():
    # Its layers hold a tensor that is computed from their weights. Autoencoders of sound have such layers.
    layer = nn.utils.weight_norm(nn.Linear(8, 4))
    assert sampling_cost(layer, [((torch.ones(3, 8),), {})], Precision("cpu")).flops == 2 * 3 * 8 * 4


def test_traffic_is_what_operations_without_flops_read_and_write():
    class Odd(nn.Module):
        def forward(self, x):
            product = x @ x.t()  # a view; FLOPs
            product += 1
            total = product.sum()
            return total.expand(100) * torch.empty(100)  # the expanded number is read once

    cost = sampling_cost(Odd(), [((torch.randn(4, 8),), {})], Precision("cpu"))
    assert cost.flops == 2 * 4 * 4 * 8
    assert cost.traffic == 4 * ((16 + 16) + (16 + 1) + (1 + 100 + 100))
    assert cost.operations == 4


def test_operations_that_are_alike_are_not_taken_for_repeated_ones():
    class Alike(nn.Module):
        def forward(self, x):
            numbers = x.long()
            for _ in range(3):
                numbers * 1, numbers * 1.0, numbers * True, numbers.t() * 1
                assert (x.t() + 1).stride() == (1, 4) and (x + 1).stride() == (4, 1)
                assert (numbers * 1.0).dtype == torch.float32 and (numbers * True).dtype == torch.int64

    cost = sampling_cost(Alike(), [((torch.randn(4, 4),), {})], Precision("cpu"))
    long, short = 8 * 16, 4 * 16
    assert cost.operations == 1 + 3 * 8
    assert cost.traffic == short + long + 3 * (4 * 2 * long + 2 * (long + short) + 2 * 2 * short)


def test_norms_are_in_float32_under_the_autocast_of_a_gpu():
    norm, calls = nn.LayerNorm(64, elementwise_affine=False), [((torch.randn(32, 64, dtype=torch.bfloat16),), {})]
    on_cpu = sampling_cost(norm, calls, Precision("cpu", torch.bfloat16)).peak
    on_gpu = sampling_cost(norm, calls, Precision("cuda", torch.bfloat16)).peak
    assert on_gpu > on_cpu + 2 * 32 * 64
    assert torch.nn.functional.layer_norm.__module__ == "torch.nn.functional"


def transformer() -> nn.Module:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return get_peft_model(model, LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("autocast", "int8"), [(None, False), (torch.bfloat16, False), (None, True)], ids=["float32", "bfloat16", "int8"]
)
def test_activations_are_what_the_allocator_sees(checkpointing, autocast, int8):
    model = transformer()
    if int8:
        pytest.importorskip("torchao")
        quantize_to_int8(model)
    inputs = {
        "hidden_states": torch.randn(2, 16, 32, 32),
        "encoder_hidden_states": torch.randn(2, 40, 64),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.full((2,), 500.0),
        "return_dict": False,
    }
    precision = Precision("cpu", autocast)
    trained = training_cost(model, [((), inputs)], precision, checkpointing)
    sampled = sampling_cost(model, [((), inputs)], precision)
    assert model.base_model.model.gradient_checkpointing is False
    if checkpointing:
        model.base_model.model.enable_gradient_checkpointing()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    def train():
        with precision.autocast_context():
            velocity = model(**inputs)[0]
        velocity.float().square().mean().backward()

    def sample():
        with torch.no_grad(), precision.autocast_context():
            model(**inputs)

    # Kernels have buffers of their own, the largest on a CPU with instructions for bfloat16.
    assert trained.peak == pytest.approx(allocated(train), rel=0.01 if autocast is None else 0.02)
    assert sampled.peak == pytest.approx(allocated(sample), rel=0.05)
    # A forward pass; as much again for the gradients of activations (2.5 times as much in attention); with
    # checkpointing a second forward pass.
    passes = 3 if checkpointing else 2
    assert passes < trained.flops / sampled.flops < passes + 0.5


def allocated(function) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# Trajectories ---------------------------------------------------------------------------------------------------------


def recorded_bytes(buffer) -> int:
    batches = {id(batch): batch for step in buffer.steps for batch, _ in step}.values()
    total = 0
    for batch in batches:
        sampled = batch.sampled
        kept = [sampled.x_t, sampled.velocities, sampled.x_s, sampled.remembered, sampled.outputs, batch.targets]
        tensors = [leaf for leaf in tree_leaves(kept) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
        total += sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
    return total


@pytest.mark.parametrize("build", [tiny_pipelines.sd3, tiny_pipelines.flux])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"timestep_fraction": 0.5, "guidance_scale": 4.0, "bf16": True},
        {"offload_trajectories": True},
        {"per_device_sampling_batch_size": 4},
    ],
)
def test_trajectories_are_what_the_buffer_holds(make_trainer, build, options):
    trainer = make_trainer(build(), **{"prompts_per_rollout": 4, "num_rollouts": 1, **options})
    plan = trainer.run_plan()
    trainer.train()
    assert plan.trajectory_bytes == recorded_bytes(trainer._buffer)


@pytest.mark.parametrize(
    ("copied", "options"),
    [(False, {}), (True, {}), (True, {"sde_type": "cps", "num_noisy_steps": 2, "window_interval": 1})],
)
def test_trajectories_of_flow_grpo(make_config, copied, options):
    names = ("output_dir", "num_rollouts", "prompts_per_rollout", "per_device_prompt_batch_size", "height", "width")
    names += ("num_inference_steps", "pipeline_kwargs", "optimizer_steps_per_rollout", "use_cpu", "disable_tqdm")
    config = make_config(num_rollouts=1, disable_tqdm=True)
    config = FlowGRPOConfig(
        **{name: getattr(config, name) for name in names},
        num_generations=3,
        offload_trajectories=copied,
        report_to=[],
        **options,
    )
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    trainer = FlowGRPOTrainer(config, tiny_pipelines.sd3(), redness, train_dataset=prompts)
    plan = trainer.run_plan()
    trainer.train()
    recorded = recorded_bytes(trainer._buffer)
    # Without copies a step's result and the next step's input are one tensor. The plan counts both.
    assert recorded == plan.trajectory_bytes if copied else recorded < plan.trajectory_bytes


@pytest.mark.parametrize("offload", [False, True])
def test_a_view_keeps_what_it_is_a_view_of(make_config, offload):
    # The pipeline cuts off the output for the tokens of the edited image, which stays in memory.
    prompts = Dataset.from_dict({"prompt": PROMPTS[:2], "image": flux_kontext.images(2)})
    config = make_config(
        num_rollouts=1,
        prompts_per_rollout=2,
        pipeline_columns=["image"],
        per_device_prompt_batch_size=1,
        offload_trajectories=offload,
        pipeline_kwargs={"max_area": 16 * 16, "_auto_resize": False, "max_sequence_length": 8},
    )
    trainer = FDFOTrainer(config, flux_kontext.build(), redness, train_dataset=prompts)
    plan = trainer.run_plan()
    trainer.train()
    assert plan.trajectory_bytes == recorded_bytes(trainer._buffer)


def test_outputs_that_a_momentum_needs_are_counted(make_config):
    family = ace_step.FAMILIES["ACE-Step with momentum (audio)"]
    call = dict(family.calls["guided"])
    config = make_config(
        num_rollouts=1,
        per_device_prompt_batch_size=1,
        guidance_scale=call.pop("guidance_scale"),
        height=None,
        width=None,
        pipeline_columns=list(family.images(1)),
        pipeline_kwargs=call,
    )
    prompts = Dataset.from_dict({"prompt": PROMPTS[:1], **family.images(1)})  # all of one length
    trainer = FDFOTrainer(config, family.build(), lambda audio: audio.mean(dim=(1, 2)), train_dataset=prompts)
    plan = trainer.run_plan()
    trainer.train()
    assert plan.trajectory_bytes == recorded_bytes(trainer._buffer)


# The plan -------------------------------------------------------------------------------------------------------------


def sizes(plan: RunPlan, **options) -> dict[str, tuple[int, int]]:
    return {part.name: (part.sampling, part.training) for part in plan.parts(**options)}


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def test_parts_that_wait_by_when_they_are_called(make_config):
    pipeline = glm_image.build()
    args = make_config(offload_components=True)
    parts = {part.name: (part.sampling, part.training) for part in component_parts(pipeline, args)}
    writes, encodes, vae = (
        bytes_of(pipeline.components[name]) for name in ("vision_language_encoder", "text_encoder", "vae")
    )
    assert parts == {"vision_language_encoder": (0, 0), "text_encoder": (0, 0), "vae": (vae, 0)}
    assert encoding_bytes(pipeline, args, []) == writes + encodes
    # A replay calls what prepares the embeddings for the two streams once more.
    pipeline = ltx2.build()
    parts = {part.name: (part.sampling, part.training) for part in component_parts(pipeline, args)}
    connectors, sound = (bytes_of(pipeline.components[name]) for name in ("connectors", "audio_vae"))
    assert parts["connectors"] == (connectors, connectors) and parts["audio_vae"] == (sound, 0)


def test_parts_of_a_run(make_trainer):
    trainer = make_trainer(ema_decay=0.9, optim="adamw_torch")
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    lora = 4 * sum(parameter.numel() for parameter in trained)
    parts = sizes(trainer.run_plan())
    assert parts["transformer, frozen"] == 2 * (bytes_of(trainer.model) - lora,)
    assert parts["trained weights"] == parts["average of weights"] == (lora, lora)
    assert parts["gradients"] == (0, lora)
    assert parts["optimizer"] == (2 * lora, 2 * lora)
    vae, text_encoder = (bytes_of(trainer.pipeline.components[name]) for name in ("vae", "text_encoder"))
    assert parts["vae"] == (vae, vae) and parts["text_encoder"] == (text_encoder, text_encoder)
    plan = trainer.run_plan()
    assert sizes(plan, offload_components=True)["vae"] == (vae, 0)
    assert sizes(plan, cache_prompt_embeds=True)["text_encoder"] == (0, 0)
    assert sizes(plan, cache_prompt_embeds=True)["vae"] == (vae, vae)
    assert sizes(plan, offload_trajectories=True)["trajectories"][0] == 0
    assert plan.peaks() == tuple(sum(column) for column in zip(*parts.values()))
    # Offloaded text encoders leave before the transformer is called: the peak is the larger of the two phases.
    assert sizes(plan, offload_components=True)["text_encoder"] == (0, 0)
    assert plan.peak(offload_components=True) == max(plan.peaks(offload_components=True))
    assert "with the text encoders" not in str(plan)
    plan.trajectory_bytes, plan.training, plan.sampling, plan.decoding = 0, *3 * [Cost(0, 0)]
    trainer.pipeline.text_encoder.register_module("large", nn.Linear(2**20, 1, device="meta"))
    encoders = bytes_of(trainer.pipeline.text_encoder) + text_encoder
    kept = ("transformer, frozen", "trained weights", "optimizer", "average of weights")
    assert plan.peak(offload_components=True) == encoders + sum(parts[name][0] for name in kept)
    # The run has not begun, and the transformer waits in host memory.
    assert plan.peak(cache_prompt_embeds=True) == encoders + vae
    plan.args = replace(trainer.args, cache_prompt_embeds=True)
    assert f"before the run, with the text encoders: {(encoders + vae) / 2**20:.2f} MiB" in str(plan)


def test_weights_that_a_controlnet_shares_with_the_transformer_count_once(make_config):
    pipeline = z_image_conditioned.controlnet()
    sizes = {part.name: part.training for part in component_parts(pipeline, make_config())}
    own = [weight for name, weight in pipeline.controlnet.named_parameters() if name.startswith("control_")]
    assert sizes["controlnet"] == nbytes(own) < nbytes(list(pipeline.controlnet.parameters()))


@pytest.mark.parametrize(
    ("optim", "factor", "said"), [("sgd", 0, "sgd"), ("adamw_8bit", 0.5, "adamw_8bit"), ("lomo", 0, "lomo: not known")]
)
def test_state_of_other_optimizers(make_trainer, optim, factor, said):
    plan = make_trainer(optim=optim).run_plan()
    parts = {part.name: part for part in plan.parts()}
    assert parts["optimizer"].training == factor * parts["trained weights"].training
    assert parts["optimizer"].note == said and f"   {said}\n" in str(plan)


class Score(LearnedReward):
    def score(self, images, prompts):
        return torch.zeros(len(images))


def test_rewards(make_trainer):
    kept, offloaded = Score(nn.Linear(10, 10)), Score(nn.Linear(20, 10), offload=True)
    offloaded.__name__ = "Other"
    parts = sizes(make_trainer(reward_fn=[kept, offloaded, redness], reward_weights=[1.0, 1.0, 1.0]).run_plan())
    assert parts["reward Score"] == (440, 440)
    assert parts["reward Other"] == (840, 0)
    assert "reward redness" not in parts


def test_plan_says_what_the_run_is(make_trainer, capsys):
    trainer = make_trainer(timestep_fraction=0.5, num_rollouts=1, gradient_checkpointing=True)
    trainer.train()
    printed = capsys.readouterr().out
    assert "2 optimizer steps on 16 samples (2 of 4 noise levels)" in printed
    assert "FLOP to sample" in printed and "4 samples with gradient checkpointing" in printed
    for name in ("transformer, frozen", "trajectories", "text_encoder_2", "activations", "sum"):
        assert f"\n    {name} " in printed
    assert "a GPU of" not in printed  # it runs on the CPU


def test_compute_counts_every_pass(make_trainer):
    # 2 batches of 2 prompts x 2 branches, 4 levels.
    plan = make_trainer().run_plan()
    line = str(plan).split("compute per rollout   ")[1].split("\n")[0]
    sampled, trained = 2 * 4 * plan.sampling.flops, 2 * 4 * plan.training.flops
    assert line == f"{sampled / 1e6:.3g} MFLOP to sample, {trained / 1e6:.3g} MFLOP to train, on each process"
    shared = make_trainer(churn_schedule="interval", shared_prefix=True).run_plan()
    assert str(shared).split("compute per rollout   ")[1].startswith(f"at most {sampled / 1e6:.3g} MFLOP to sample, ")
    guided = make_trainer(guidance_scale=4.0, beta=0.1).run_plan()
    assert guided.sampling.flops == pytest.approx(2 * plan.sampling.flops, rel=1e-3)
    assert f"{8 * (guided.training.flops + guided.sampling.flops) / 1e6:.3g} MFLOP to train" in str(guided)


def test_a_model_that_cannot_be_counted_is_trained_all_the_same(make_trainer, capsys):
    class Odd(SD3Transformer2DModel):
        def forward(self, hidden_states, *args, **kwargs):
            if hidden_states.mean().item() > 100:  # needs the values
                raise AssertionError
            return super().forward(hidden_states, *args, **kwargs)

    pipeline = tiny_pipelines.sd3()
    pipeline.transformer.__class__ = Odd
    make_trainer(pipeline, num_rollouts=1).train()
    printed = capsys.readouterr().out
    assert "activations are missing: DataDependentOutputException" in printed
    assert "without gradient checkpointing" not in printed and "FLOP" not in printed
    assert "After rollout 1" in printed


def test_a_model_that_reads_the_lengths_of_prompts_off_a_mask_is_counted(make_trainer):
    size = {"height": 32, "width": 32, "pipeline_kwargs": {"max_sequence_length": 40}}
    plan = make_trainer(tiny_pipelines.lumina2.build(), guidance_scale=1.0, **size).run_plan()
    assert plan.failure is None
    assert plan.training.peak > plan.sampling.peak > 0 and plan.training.flops > plan.sampling.flops > 0


def test_plan_counts_the_evaluations(make_trainer):
    options = {"eval_dataset": Dataset.from_dict({"prompt": ["a cat"] * 3}), "eval_strategy": "epoch"}
    # 2 rollouts of 4 prompts x 2 images, and 2 evaluations of 3 x 2.
    line = "  evaluations           2, every 1 rollouts, of 3 prompts x 2 images: 75.0% more to sample"
    assert line in str(make_trainer(images_per_eval_prompt=2, **options).run_plan())
    assert "evaluations  " not in str(make_trainer().run_plan())
    # Rollouts have 4 steps.
    of_use = {"num_inference_steps": 6, "guidance_scale": 3.0}
    line = "3 prompts x 2 images x 6 steps: 112.5% more steps to sample, with guidance_scale=3.0"
    assert line in str(make_trainer(images_per_eval_prompt=2, eval_pipeline_kwargs=of_use, **options).run_plan())


def test_what_the_first_rollout_took(make_trainer, capsys):
    make_trainer(num_rollouts=3, save_strategy="epoch").train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("After rollout")]
    # Other tests in this process may have caused its peak.
    assert len(lines) == 1 and re.match(r"After rollout 1: peak memory \d+\.\d\d GiB of the whole process; ", lines[0])
    assert lines[0].endswith("for the 2 left")
    # A resumed run reports its own first rollout.
    trainer = make_trainer(num_rollouts=5, save_strategy="epoch")
    trainer.train(resume_from_checkpoint=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("After rollout")]
    assert len(lines) == 1 and lines[0].startswith("After rollout 4:") and lines[0].endswith("for the 1 left")


# Without weights ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pipeline whose folder has configs and tokenizers, and no weights."""
    tiny_pipelines.sd3(with_t5=True).save_pretrained(tmp_path / "pipeline")
    weights = list((tmp_path / "pipeline").rglob("*.safetensors"))
    assert len(weights) == 5
    for path in weights:
        path.unlink()
    return tmp_path / "pipeline"


def planned_config(config, **options):
    names = ["output_dir", "num_rollouts", "prompts_per_rollout", "per_device_prompt_batch_size", "height", "width"]
    names += ["num_inference_steps", "pipeline_kwargs", "churn", "optimizer_steps_per_rollout", "lora_r", "report_to"]
    return PlannedConfig(**{**{name: getattr(config, name) for name in names}, **options})


def planned_run(config, folder, rewards=()) -> RunPlan:
    return plan_without_weights(
        config, folder, rewards, Dataset.from_dict({"prompt": PROMPTS}), ChurnScheduler, "FDFO", 1
    )


def test_plan_without_weights_equals_the_plan_of_the_run(make_config, folder):
    config = make_config()
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    run = FDFOTrainer(config, tiny_pipelines.sd3(with_t5=True), redness, train_dataset=prompts).run_plan()
    plan = planned_run(planned_config(config, use_cpu=True), folder, ["tiny_runs:redness"])
    expected = sizes(run) | {"reward tiny_runs:redness": (0, 0)}
    assert sizes(plan) == expected
    assert (plan.sampling, plan.training, plan.decoding) == (run.sampling, run.training, run.decoding)
    assert str(plan).splitlines()[:6] == str(run).splitlines()[:6]


def test_plan_without_weights_counts_the_weights_that_are_unpacked(make_config, tmp_path):
    pytest.importorskip("torchao")
    tiny_pipelines.sd3().save_pretrained(tmp_path)
    config, prompts = make_config(quantization="int8"), Dataset.from_dict({"prompt": PROMPTS})
    run = FDFOTrainer(config, str(tmp_path), redness, train_dataset=prompts).run_plan()
    plan = planned_run(planned_config(config, use_cpu=True, quantization="int8"), tmp_path)
    assert (plan.sampling, plan.training) == (run.sampling, run.training)
    assert sizes(plan)["transformer, frozen"] == sizes(run)["transformer, frozen"]
    bare = planned_run(planned_config(config, use_cpu=True), tmp_path)
    assert plan.training.peak > bare.training.peak + sizes(plan)["transformer, frozen"][1]


def test_products_with_weights_of_bitsandbytes_are_counted():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear4bit(64, 32, False, torch.float32, compress_statistics=False, quant_type="nf4")
    packed.requires_grad_(False).to("cpu")
    costs = [
        function(nn.Sequential(nn.Linear(64, 64), layer), [((torch.ones(8, 64),), {})], Precision("cpu"))
        for layer in (packed, nn.Linear(64, 32, False).requires_grad_(False))
        for function in (sampling_cost, training_cost)
    ]
    assert [cost.flops for cost in costs[:2]] == [cost.flops for cost in costs[2:]]
    assert costs[2].flops == 2 * 8 * (64 * 64 + 64 * 32)


def test_decoding_is_counted_as_it_runs(make_config, folder):
    def peak(**options) -> int:
        return planned_run(planned_config(make_config(), use_cpu=True, **options), folder).decoding.peak

    images = 4 * 3 * 16 * 16 * 4  # bytes of the four images of two prompts, in float32
    whole, sliced = peak(), peak(vae_slicing=True)
    assert peak(per_device_sampling_batch_size=4) == 2 * whole
    # One image, and all images that are done: as parts, then as a whole.
    assert whole / 4 < sliced < whole / 4 + 2 * images
    assert peak(vae_slicing=True, per_device_sampling_batch_size=4) < sliced + 2 * images + images / 4


def test_engines_share_out(make_config, folder):
    plan = planned_run(planned_config(make_config(), prompts_per_rollout=16, plan_processes=4), folder)
    assert plan.args.world_size == 4 and plan.args.num_rollout_batches == 2
    assert plan.engine == Engine("cuda", "DDP")  # no autocast: the weights are in bfloat16
    ddp = sizes(plan)
    numbers = sum(parameter.numel() for parameter in plan.model.parameters() if parameter.requires_grad)
    names = ("transformer, frozen", "trained weights", "gradients", "optimizer")
    assert [ddp[name][1] for name in names[1:]] == [4 * numbers, 4 * numbers, 8 * numbers]

    def under(name):
        plan.engine = replace(plan.engine, name=name)
        return [sizes(plan)[part][1] for part in names]

    frozen = ddp["transformer, frozen"][1]
    assert under("FSDP2") == [frozen // 4, numbers, numbers, 2 * numbers]
    assert "at the start the transformer stands whole" in str(plan)
    # Weights and gradients in bfloat16. The processes share their float32 originals and Adam's two moments.
    assert under("ZeRO-1") == [frozen, 2 * numbers, 2 * numbers, 4 * numbers]
    assert under("ZeRO-2") == [frozen, 2 * numbers, numbers // 2, 4 * numbers]
    assert under("ZeRO-3") == [frozen // 4, numbers // 2, numbers // 2, 4 * numbers]


def test_plan_names_the_gpu(make_config, folder):
    plan = planned_run(planned_config(make_config()), folder)
    assert "with a tenth and 0.5 GiB to spare: 0.5 GiB, a GPU of 16 GB\n" in str(plan)
    plan.trajectory_bytes = 30 * 2**30
    assert "with a tenth and 0.5 GiB to spare: 33.5 GiB, a GPU of 40 GB\n" in str(plan)
    assert "and offload_trajectories: " in str(plan)
    plan.trajectory_bytes = 300 * 2**30
    assert "330.5 GiB, more than a GPU has" in str(plan)


def test_planned_config():
    config = PlannedConfig(output_dir="out", plan_processes=8, per_device_prompt_batch_size=1)
    # The GPU need not be here.
    assert config.bf16 and config.device_type == "cuda" and config.num_rollout_batches == 54
    assert not PlannedConfig(output_dir="out", fp16=True).bf16
    assert not PlannedConfig(output_dir="out", use_cpu=True).bf16
    with pytest.raises(ValueError, match="cannot be split evenly over 5 process"):
        PlannedConfig(output_dir="out", plan_processes=5)
    with pytest.raises(ValueError, match="gpu='t4' is not one of rtx4090, "):
        PlannedConfig(output_dir="out", gpu="t4")
    with pytest.raises(ValueError, match="gpu='h100' is for a run on GPUs, and use_cpu=True has none"):
        PlannedConfig(output_dir="out", gpu="h100", use_cpu=True)
    with pytest.raises(ValueError, match="plan_processes=0 must be at least 1"):
        PlannedConfig(output_dir="out", plan_processes=0)


def test_config_classes_of_planned_runs():
    for config_class in (FDFOConfig, FlowGRPOConfig):
        planned_class = planned(config_class)
        assert planned(config_class) is planned_class and issubclass(planned_class, config_class)
        assert planned_class.__name__ == f"Planned{config_class.__name__}"
        # The parser reads types and help texts.
        assert {field.name for field in fields(planned_class)} <= get_type_hints(planned_class).keys()
        (config,) = TrlParser(planned_class).parse_args_and_config(["--output_dir", "out", "--plan_processes", "2"])
        assert type(config) is planned_class and config.world_size == 2
        assert "processes of the run" in TrlParser(planned_class).format_help()


def test_nothing_has_weights(folder):
    pipeline = load_without_weights(folder, torch.bfloat16)
    weights = [w for part in pipeline.components.values() if isinstance(part, nn.Module) for w in part.parameters()]
    assert len(weights) > 100 and all(weight.is_meta and weight.dtype == torch.bfloat16 for weight in weights)
    assert pipeline.tokenizer("a cat").input_ids


def run_script(*arguments) -> None:
    train.main([str(argument) for argument in arguments])


def test_script_plans_without_weights_and_stops(folder, tmp_path, capsys):
    run_script(
        *("--plan", "--model", folder, "--reward", "pickscore", "--reward", "no_such:thing", "--plan_processes", 2),
        *("--output_dir", tmp_path / "out", "--height", 16, "--width", 16, "--num_inference_steps", 4),
        *("--prompts_per_rollout", 8, "--pipeline_kwargs", json.dumps({"max_sequence_length": 8}), "--bf16", "true"),
    )
    printed = capsys.readouterr().out
    assert "FDFO on StableDiffusion3Pipeline, 2 process(es) by DDP, cuda" in printed
    assert "2 per optimizer step and process" in printed and "8 prompts x 2 images x 4 steps" in printed
    assert "reward pickscore" in printed and "reward no_such:thing" in printed and "not loaded" in printed
    assert "a GPU of 16 GB" in printed
    assert not (tmp_path / "out").exists()


def test_seconds_of_a_card():
    card = Card(memory=24, peak=1000.0, float32=100.0, bandwidth=50.0)
    cost = Cost(peak=0, flops=1200, traffic=100, operations=2)
    moves = 100 / (THROUGHPUT * 50)
    assert card.seconds(cost, torch.bfloat16) == pytest.approx(1200 / (UTILISATION * 1000) + moves)
    assert card.seconds(cost, torch.float16) == card.seconds(cost, torch.bfloat16)
    assert card.seconds(cost, torch.float32) == pytest.approx(1200 / (UTILISATION * 100) + moves)
    assert card.seconds(cost, torch.float32, tf32=True) == pytest.approx(1200 / (UTILISATION * 500) + moves)
    # A host that cannot keep up.
    slow = replace(cost, operations=10**9)
    assert card.seconds(slow, torch.bfloat16) == pytest.approx(10**9 * LAUNCH)
    compiled = card.seconds(cost, torch.bfloat16, compiled=True)
    assert compiled == pytest.approx(1200 / (UTILISATION * 1000) + COMPILED_TRAFFIC * moves)
    assert card.seconds(slow, torch.bfloat16, compiled=True) == pytest.approx(COMPILED_OPERATIONS * 10**9 * LAUNCH)
    attends = replace(cost, attention=300)
    assert card.seconds(attends, torch.bfloat16) == card.seconds(cost, torch.bfloat16)
    saved = card.seconds(cost, torch.bfloat16) - card.seconds(attends, torch.bfloat16, cudnn=True)
    assert saved == pytest.approx(CUDNN_SAVING * 300 / 1000)


def test_seconds_of_a_measured_update():
    """Of whole runs on an H100, compiled, in 40 steps: with PyTorch's flash kernel and with cuDNN's."""
    results = json.loads((ROOT / "benchmarks" / "results" / "gpu_sd35-NVIDIA-H100-80GB-HBM3.json").read_text())
    rows = {row["options"].get("attention_backend"): row for row in results["rows"] if "40 steps" in row["name"]}
    twin = gpu_sd35.run_as_trained(gpu_sd35.build_adapted_transformer(gpu_sd35.MEDIUM, torch.device("meta")))
    with gpu_sd35.building(torch.device("meta")):
        calls = [((), gpu_sd35.transformer_inputs(gpu_sd35.MEDIUM, 16))]
    cost = training_cost(twin, calls, Precision("cuda"))
    # The joint attention of 24 blocks and the image's own of 13, forward and 2.5 times as much back. Before the image's own of the
    # first block nothing is trained.
    joint, own = 4 * 1536 * (1024 + 77 + 128) ** 2, 4 * 1536 * 1024**2
    assert cost.attention == 16 * (3.5 * (24 * joint + 13 * own) - 2.5 * own)
    for backend, row in rows.items():
        seconds = CARDS["h100"].seconds(cost, torch.bfloat16, compiled=True, cudnn=backend is not None)
        assert 16 / seconds == pytest.approx(row["tuples_per_second"], rel=0.03)
    assert rows.keys() == {None, "_native_cudnn"}


# The machine of the H100 had a slow host, which its calls of 4 images waited for.
@pytest.mark.parametrize(
    ("file", "smallest", "calls_in_file"),
    [("gpu_sd35-NVIDIA-H200.json", 4, 6), ("gpu_sd35-NVIDIA-H100-80GB-HBM3.json", 16, 3)],
)
def test_seconds_of_calls_that_were_measured(file, smallest, calls_in_file):
    """By the formula as it is now, of the calls that its constants are fitted to."""
    results = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
    card = CARDS[gpu_sd35.plan_card(results["machine"])]
    twin = gpu_sd35.run_as_trained(gpu_sd35.build_adapted_transformer(gpu_sd35.MEDIUM, torch.device("meta")))
    checked = 0
    for call in results["calls"]:
        if "plan_seconds" not in call:  # without the adapter, or as a CUDA graph, which the plan does not know
            continue
        with gpu_sd35.building(torch.device("meta")):
            calls = [((), gpu_sd35.transformer_inputs(gpu_sd35.MEDIUM, call["images"]))]
        cost = (training_cost if "backward" in call["name"] else sampling_cost)(twin, calls, Precision("cuda"))
        seconds = card.seconds(cost, torch.bfloat16, compiled="compiled" in call["name"])
        assert seconds == pytest.approx(call["plan_seconds"], rel=1e-3)
        if call["images"] >= smallest:
            assert seconds == pytest.approx(call["seconds"], rel=0.17)
            checked += 1
    assert checked == calls_in_file


def test_plan_says_seconds_and_hours(make_config, folder):
    config = planned_config(
        make_config(), gpu="h100", num_inference_steps=20, timestep_fraction=0.5, beta=0.1, prompts_per_rollout=8
    )
    plan = planned_run(config, folder, ["clip(dtype='bfloat16')", "my_module:reward"])
    card = CARDS["h100"]
    call, update = (card.seconds(cost, torch.bfloat16) for cost in (plan.sampling, plan.training))
    expected = {
        "sampling": 4 * 20 * call,
        "decoding": 4 * card.seconds(plan.decoding, torch.float32, tf32=True),
        "reward clip": pytest.approx(16 * card.seconds(*plan.reward_costs["clip"])),
        "reward my_module:reward": None,
        "training": 4 * 10 * (update + call),
    }
    assert plan.seconds() == expected
    assert plan.reward_costs["clip"][1] == torch.bfloat16
    cheaper = plan.seconds(num_inference_steps=10, timestep_fraction=0.25)
    assert cheaper["sampling"] == pytest.approx(expected["sampling"] / 2)
    assert cheaper["training"] == pytest.approx(expected["training"] * 2 / 10)
    printed = str(plan)
    rows = {line[:34].strip(): line[34:].split() for line in printed.splitlines()}
    milliseconds = 1000 * card.seconds(*plan.reward_costs["clip"])
    assert rows["reward clip"][4:] == f"{milliseconds:.2g} ms per image, bfloat16".split()
    assert rows["seconds per rollout"] == "as given 5/20 levels 10 steps both".split()
    assert rows["reward my_module:reward"] == 4 * ["not", "counted"]
    total = sum(seconds for seconds in plan.seconds().values() if seconds is not None)
    assert rows["hours of 2 rollouts"][0] == f"{2 * total / 3600:,.1f}"
    assert f"in short: h100: {plan.needed_memory():.1f} of 80 GB; an estimated " in printed
    # Nothing to choose from is not shown.
    short = str(planned_run(planned_config(make_config(), gpu="h100", timestep_fraction=0.25), folder))
    assert (
        "seconds per rollout" in short
        and "levels " not in short.split("seconds per rollout")[1]
        and "10 steps" not in short
    )
    assert "seconds per rollout" not in str(planned_run(planned_config(make_config()), folder))


def test_plan_names_the_batch_that_fills_the_card(make_config, folder):
    # 12 prompts, 2 at a time, 4 levels, 2 optimizer steps.
    plan = planned_run(planned_config(make_config(), gpu="h100", prompts_per_rollout=12), folder)
    bytes_per_second = THROUGHPUT * CARDS["h100"].bandwidth
    for factor, expected in ((0.9, None), (1.1, 3), (1.6, 4), (2.1, 6), (3.1, 12), (6.1, None)):
        traffic = int(plan.training.operations * LAUNCH / factor * bytes_per_second)
        plan.training = replace(plan.training, flops=0, traffic=traffic)
        assert plan.filling_batch() == expected, factor
        line = f"the card waits for the host: per_device_prompt_batch_size={expected} fills it"
        assert (line in str(plan)) == (expected is not None)


def test_a_larger_sampling_batch_launches_less(make_config, folder):
    plain = planned_run(planned_config(make_config()), folder)
    larger = planned_run(planned_config(make_config(), per_device_sampling_batch_size=4), folder)
    assert larger.sampling.operations == plain.sampling.operations // 2
    assert larger.sampling.flops == plain.sampling.flops and larger.sampling.traffic == plain.sampling.traffic > 0


def test_plan_without_weights_slices_the_vae(make_config, folder):
    decoding = [
        planned_run(planned_config(make_config(), vae_slicing=sliced), folder).decoding for sliced in (False, True)
    ]
    assert decoding[1].flops == decoding[0].flops and decoding[1].peak < 0.5 * decoding[0].peak


# int8 has a float32 scale and a zero point in each row.
@pytest.mark.parametrize(
    ("quantization", "bits", "row_bytes", "note"),
    [("nf4", 4.5, 0, "nf4, bfloat16"), ("int8", 8, 5, "int8, bfloat16, float32")],
)
def test_plan_without_weights_quantises_linear_layers(make_config, folder, quantization, bits, row_bytes, note):
    pytest.importorskip("torchao")
    plain = planned_run(planned_config(make_config()), folder)
    linear = [p.weight for p in plain.model.modules() if isinstance(p, nn.Linear) and not p.weight.requires_grad]
    numbers, rows = sum(weight.numel() for weight in linear), sum(len(weight) for weight in linear)
    plan = planned_run(planned_config(make_config(), quantization=quantization, gradient_checkpointing=True), folder)
    saved = sizes(plain)["transformer, frozen"][0] - sizes(plan)["transformer, frozen"][0]
    assert saved == pytest.approx((16 - bits) / 8 * numbers - row_bytes * rows, abs=1)
    assert next(part.note for part in plan.parts() if "frozen" in part.name) == note


def test_a_weight_of_bitsandbytes_has_scales():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": False}  # diffusers' default
    weight = bitsandbytes.nn.Params4bit(torch.randn(64, 128), **options)._quantize("cpu")
    assert nbytes([weight]) == NF4_BYTES * 64 * 128


def test_script_plans_the_packaged_pipeline(tmp_path, capsys):
    run_script(
        *("--plan", "--config", "shapes", "--output_dir", tmp_path / "out"),
    )
    printed = capsys.readouterr().out
    total = sum(parameter.numel() for parameter in shapes.load_pipeline().transformer.parameters())
    trained = int(printed.split("trainable parameters  ")[1].split(" of ")[0].replace(",", ""))
    assert f"{trained:,} of {trained + total:,}" in printed


def test_script_says_how_to_get_configs(tmp_path):
    with pytest.raises(OSError, match='hf download somebody/no-such-model --exclude "\\*.safetensors"'):
        run_script("--plan", "--model", "somebody/no-such-model", "--output_dir", tmp_path / "out")


def test_hooks_of_a_user_are_not_called_by_the_plan(make_trainer):
    seen = []

    class Hook:
        def __call__(self, module, args, kwargs=None, output=None):
            seen.append([type(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)])

        def __deepcopy__(self, memo):
            raise AssertionError("a hook may hold a file or a lock")

    pipeline = tiny_pipelines.sd3()
    block = pipeline.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(Hook())
    pipeline.transformer.register_forward_hook(Hook(), with_kwargs=True)
    block.register_full_backward_hook(Hook())
    pipeline.vae.decoder.register_forward_hook(Hook())
    trainer = make_trainer(pipeline)
    called = len(seen)
    plan = trainer.run_plan()
    assert plan.failure is None and plan.training.peak > 0
    assert len(seen) == called > 0
    assert all(kind is torch.Tensor for kinds in seen for kind in kinds)
    assert len(block._forward_pre_hooks) == 1
