"""Pipelines with two transformers: one for the high noise levels and one for the low ones."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import trained_weights
from datasets import Dataset
from peft import PeftModel
from tiny_pipelines import wan
from tiny_runs import PROMPTS, UnplannedTrainer

from trl_fdfo import FlowGRPOConfig, FlowGRPOTrainer
from trl_fdfo.fdfo.churn import constant_churn
from trl_fdfo.pipeline.patch import shadowed
from trl_fdfo.pipeline.trained import trained_module, trained_modules
from trl_fdfo.pipeline_flow import PipelineFlow, ReplayError, check_replay
from trl_fdfo.training.engines import check_calls_of_levels


STEPS = 4
CALL = wan.CALLS_TWO_TRANSFORMERS["two_scales"]


def brightness(images, prompts, **kwargs):
    return images.flatten(1).mean(dim=1)


@pytest.fixture
def make(make_config):
    """A trainer of a pipeline with two transformers, of which the first has one step of four."""

    def make(**options):
        call = {name: value for name, value in CALL.items() if name not in ("height", "width", "guidance_scale")}
        config = make_config(
            **{"guidance_scale": CALL["guidance_scale"], "pipeline_kwargs": call, "learning_rate": 1e-2, **options}
        )
        dataset = Dataset.from_dict({"prompt": PROMPTS[:4]})
        return UnplannedTrainer(config, wan.build_two_transformers(), brightness, train_dataset=dataset)

    return make


def roll_out(pipeline):
    flow = PipelineFlow(pipeline, num_generations=2, num_inference_steps=STEPS, **CALL)
    churn = constant_churn(flow.rehearse(["a cat"]).sigmas, 0.2)
    return flow, flow.rollout(["a cat", "two dogs"], churn, [0, 1], range(10, 14), range(STEPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", wan.CALLS_TWO_TRANSFORMERS)
def test_replay_is_exact(call, dtype):
    pipeline = wan.build_two_transformers().to(dtype)
    flow = PipelineFlow(pipeline, num_generations=2, num_inference_steps=STEPS, **wan.CALLS_TWO_TRANSFORMERS[call])
    churn = constant_churn(flow.rehearse(["a cat"]).sigmas, 0.2)
    batch = flow.rollout(["a cat", "two dogs"], churn, [0, 1], range(10, 14), range(STEPS))
    for level in range(STEPS):
        assert torch.equal(flow.velocity(batch, level), batch.velocities[level])


def test_gradients_reach_each_transformer_at_its_levels_alone():
    pipeline = wan.build_two_transformers()
    flow, batch = roll_out(pipeline)
    reached = []
    for level in range(STEPS):
        pipeline.transformer.zero_grad()
        pipeline.transformer_2.zero_grad()
        flow.velocity(batch, level).square().sum().backward()
        modules = trained_modules(pipeline).values()
        reached.append(tuple(all(p.grad is not None for p in module.parameters()) for module in modules))
        assert all(
            any(p.grad is not None for p in module.parameters()) == has for module, has in zip(modules, reached[-1])
        )
    assert reached == [(True, False), (False, True), (False, True), (False, True)]


def test_the_wrong_transformer_of_two_is_far_from_exact():
    pipeline = wan.build_two_transformers()
    flow, batch = roll_out(pipeline)
    first, second = pipeline.transformer, pipeline.transformer_2
    for level in range(STEPS):
        wrong = {"transformer": second, "transformer_2": first}
        with shadowed(pipeline, **wrong), pytest.raises(ReplayError):
            swapped = PipelineFlow(pipeline, num_generations=2, num_inference_steps=STEPS, **CALL)
            check_replay(swapped.velocity(batch, level), batch.velocities[level], pipeline, level)
        check_replay(flow.velocity(batch, level), batch.velocities[level], pipeline, level)


def test_other_guidance_of_the_second_transformer_is_far_from_exact():
    flow, batch = roll_out(wan.build_two_transformers())
    other = replace(batch, call_kwargs={**batch.call_kwargs, "guidance_scale_2": 1.0})
    check_replay(flow.velocity(other, 0), batch.velocities[0], flow.pipeline, 0)
    with pytest.raises(ReplayError):
        check_replay(flow.velocity(other, 3), batch.velocities[3], flow.pipeline, 3)


def images_of(pipeline):
    return PipelineFlow(pipeline, num_generations=2, num_inference_steps=STEPS, **CALL).generate(["a red ball"], [0])


def test_each_gets_an_adapter_that_trains_and_diffusers_opens(make, tmp_path):
    trainer = make()
    before = trained_weights(trainer)
    trainer.train()
    assert all(log["replay_error"] == 0.0 for log in trainer.state.log_history if "replay_error" in log)
    for name in ("transformer", "transformer_2"):
        moved = [
            not torch.equal(w, before[key]) for key, w in trained_weights(trainer).items() if f".{name}.blocks" in key
        ]
        assert len(moved) == 16 and all(moved)
    trainer.save_model(str(tmp_path))
    expected = trainer.generate(["a red ball"], [0])
    pipeline = wan.build_two_transformers()
    assert not torch.equal(images_of(pipeline), expected)
    pipeline.load_lora_weights(str(tmp_path))
    half = images_of(pipeline)
    pipeline.transformer_2.load_lora_adapter(
        str(tmp_path), weight_name="pytorch_lora_weights_transformer_2.safetensors", prefix="transformer"
    )
    assert torch.equal(images_of(pipeline), expected) and not torch.equal(half, expected)
    pipeline = wan.build_two_transformers()
    pipeline.load_lora_weights(str(tmp_path))
    file = "pytorch_lora_weights_transformer_2.safetensors"
    pipeline.load_lora_weights(str(tmp_path), weight_name=file, load_into_transformer_2=True)
    assert torch.equal(images_of(pipeline), expected)
    # PEFT's format holds both.
    pipeline = wan.build_two_transformers()
    PeftModel.from_pretrained(trained_module(pipeline), tmp_path)
    assert torch.equal(images_of(pipeline), expected)
    again = make(adapter=str(tmp_path))
    assert torch.equal(again.generate(["a red ball"], [0]), expected)
    with pytest.raises(ValueError, match="trained_transformers=.* was given together with adapter"):
        make(adapter=str(tmp_path), trained_transformers=["transformer_2"])


@pytest.mark.parametrize("options", [{}, {"use_peft": False, "learning_rate": 1e-4}])
def test_one_of_them_alone_is_trained(make, options, tmp_path):
    # Of 4 steps 3 are the second transformer's.
    trainer = make(trained_transformers=["transformer_2"], timestep_fraction=0.5, **options)
    assert trainer.trainable_levels == [1, 2, 3]
    assert {level for batch in range(9) for level in trainer.trained_levels(0, batch)} == {1, 2, 3}
    weights = lambda: {
        name: [p.detach().clone() for p in module.parameters()]
        for name, module in trained_modules(trainer.pipeline).items()
    }
    before = weights()
    trainer.train()
    after = weights()
    assert all(map(torch.equal, before["transformer"], after["transformer"]))
    assert not all(map(torch.equal, before["transformer_2"], after["transformer_2"]))
    trainer.save_model(str(tmp_path))
    if "use_peft" not in options:
        assert sorted(path.name for path in tmp_path.glob("pytorch_lora*")) == [
            "pytorch_lora_weights_transformer_2.safetensors"
        ]
        card = Path(tmp_path, "README.md").read_text()
        assert "pipeline.transformer_2.load_lora_adapter(" in card and "load_lora_weights" not in card


def under(kind, processes=2, **state):
    """What the check asks of an accelerator: an engine is launched by other tests, and this one refuses to start."""
    return SimpleNamespace(distributed_type=kind, num_processes=processes, state=SimpleNamespace(**state))


def test_engines_that_shard_need_the_same_calls_at_all_levels(make):
    """Their processes train different levels at a time: shards of different layers would be put together."""
    fsdp = under(DistributedType.FSDP, fsdp_plugin=object())
    trainer = make()
    check = lambda accelerator: check_calls_of_levels(
        trainer._rehearsal, trainer.trainable_levels, accelerator, trainer.pipeline
    )
    for accelerator in (fsdp, under(DistributedType.DEEPSPEED)):
        with pytest.raises(
            ValueError, match=r"levels of this WanPipeline call different things \(transformer.* and tran.*_2"
        ):
            check(accelerator)
    for accelerator in (under(DistributedType.MULTI_GPU), under(DistributedType.DEEPSPEED, processes=1)):
        check(accelerator)
    trainer = make(trained_transformers=["transformer_2"], timestep_fraction=0.5)
    check(fsdp)


def test_more_levels_than_the_trained_one_has_are_refused(make):
    with pytest.raises(ValueError, match=r"trains 4 of 4 noise levels, .* at 3 of them: set timestep_fraction=0\.75"):
        make(trained_transformers=["transformer_2"])


@pytest.mark.parametrize("names", [[], ["transformer_3"], ["transformer", "unet"]])
def test_unknown_transformers_are_refused(make, names):
    with pytest.raises(ValueError, match=r"trained_transformers=.* must name some of .*: transformer, transformer_2\."):
        make(trained_transformers=names)


def test_a_run_resumes_to_the_bit(make, tmp_path):
    whole = make(num_rollouts=2)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "parts")}
    make(num_rollouts=2, max_steps=-1, **options).train()
    resumed = make(num_rollouts=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    expected = trained_weights(whole)
    assert all(torch.equal(weight, expected[key]) for key, weight in trained_weights(resumed).items())


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "report_to": ["tensorboard"]},
        {"beta": 0.1, "ema_decay": 0.5},
        {"attention_backend": "native"},
        {"cache_prompt_embeds": True, "offload_components": True, "shared_prefix": True, "churn_schedule": "interval"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_train_with_an_exact_replay(make, options, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    if "churn_schedule" in options:
        options = {**options, "churn": None}
    trainer = make(**options)
    trainer.train()
    assert all(log["replay_error"] < 1e-6 for log in trainer.state.log_history if "replay_error" in log)
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(("window", "fraction", "trained"), [(None, 0.67, {1, 2}), (2, 1.0, {1, 2})])
def test_flow_grpo_draws_the_levels_of_the_trained_one(make_config, window, fraction, trained):
    call = {name: value for name, value in CALL.items() if name not in ("height", "width", "guidance_scale")}
    options = make_config(guidance_scale=5.0, pipeline_kwargs=call, trained_transformers=["transformer_2"])
    names = ("output_dir", "num_rollouts", "prompts_per_rollout", "per_device_prompt_batch_size", "num_inference_steps")
    names += (
        "height",
        "width",
        "guidance_scale",
        "pipeline_kwargs",
        "trained_transformers",
        "save_strategy",
        "use_cpu",
    )
    config = FlowGRPOConfig(
        **{name: getattr(options, name) for name in names},
        num_noisy_steps=window,
        timestep_fraction=fraction,
        optimizer_steps_per_rollout=2,
        report_to=[],
    )
    dataset = Dataset.from_dict({"prompt": PROMPTS[:4]})
    trainer = FlowGRPOTrainer(config, wan.build_two_transformers(), brightness, train_dataset=dataset)
    assert {level for batch in range(9) for level in trainer.trained_levels(0, batch)} == trained
    trainer.train()


def test_all_of_the_pipeline_is_one_module():
    pipeline = wan.build_two_transformers()
    module = trained_module(pipeline)
    assert trained_module(pipeline) is module
    count = sum(p.numel() for part in (pipeline.transformer, pipeline.transformer_2) for p in part.parameters())
    assert sum(p.numel() for p in module.parameters()) == count
    pipeline.transformer_2 = wan.transformer()
    assert trained_module(pipeline).transformer_2 is pipeline.transformer_2
