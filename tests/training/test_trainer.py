"""Behaviour of the trainer that every algorithm has, shown with FDFO on tiny pipelines."""

import asyncio
import json
import os
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from conftest import logged, trained_weights
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_runs import PROMPTS, redness

from trl_fdfo import FDFOTrainer
from trl_fdfo.cli.arguments import InferenceArguments
from trl_fdfo.cli.models import call_options
from trl_fdfo.pipeline.loading import load_pipeline
from trl_fdfo.pipeline.replay_check import ReplayError


def images_of(pipeline):
    generator = torch.Generator().manual_seed(5)
    call = {"num_inference_steps": 3, "height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": 8}
    return pipeline("a cat", generator=generator, output_type="pt", return_dict=False, **call)[0]


# Pipelines, prompts and options ---------------------------------------------------------------------------------------


def test_flux_trains(make_trainer):
    trainer = make_trainer(pipeline=tiny_pipelines.flux(), guidance_scale=3.5)
    before = trained_weights(trainer)
    trainer.train()
    assert logged(trainer, "replay_error") == [0.0, 0.0]
    for name, weight in trained_weights(trainer).items():
        assert not torch.equal(weight, before[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2},
        {"timestep_fraction": 0.5},
        {"guidance_scale": 4.0},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"num_generations": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_train_with_an_exact_replay(make_trainer, options):
    trainer = make_trainer(**options)
    before = trained_weights(trainer)
    trainer.train()
    assert logged(trainer, "replay_error") == [0.0, 0.0]
    assert any(not torch.equal(w, before[n]) for n, w in trained_weights(trainer).items())
    steps = 2 * trainer.args.optimizer_steps_per_rollout * trainer.args.num_iterations
    assert trainer.state.global_step == steps


def test_pipeline_by_path_and_packaged_prompts(make_config, tmp_path):
    tiny_pipelines.sd3().save_pretrained(tmp_path / "pipeline")
    trainer = FDFOTrainer(make_config(num_rollouts=1), str(tmp_path / "pipeline"), redness)
    assert len(trainer.train_dataset) >= 500
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    # The folders above it say more about this machine than about the model.
    assert saved["base_model_name_or_path"] == "pipeline"


def test_dataset_columns_reach_the_reward(make_config):
    seen = []

    def reward(images, prompts, label, trainer_state):
        seen.append((prompts, label, trainer_state.global_step))
        return [0.0] * len(images)

    dataset = Dataset.from_dict({"caption": ["a", "b"], "label": [1, 2]})
    config = make_config(dataset_prompt_column="caption", num_rollouts=1)
    FDFOTrainer(config, tiny_pipelines.sd3(), reward, train_dataset=dataset).train()
    prompts, labels, step = seen[0]
    assert prompts[0] == prompts[1] != prompts[2] and labels == [{"a": 1, "b": 2}[p] for p in prompts] and step == 0


def test_training_twice_samples_anew(make_trainer):
    trainer = make_trainer(num_rollouts=1)
    trainer.train()
    trainer.train()
    assert logged(trainer, "replay_error") == [0.0]


# The check that a replay is exact -------------------------------------------------------------------------------------


def add_dropout(pipeline):
    pipeline.transformer.proj_out = torch.nn.Sequential(pipeline.transformer.proj_out, torch.nn.Dropout(0.2))


def test_self_check_refuses_a_pipeline_at_construction(make_trainer):
    pipeline = tiny_pipelines.sd3()
    add_dropout(pipeline)
    with pytest.raises(ReplayError, match=r"replay of StableDiffusion3Pipeline is not exact.*Likely causes: dropout"):
        make_trainer(pipeline=pipeline)


def test_self_check_stops_a_run_before_its_first_step(make_trainer):
    trainer = make_trainer()
    add_dropout(trainer.pipeline)
    with pytest.raises(ReplayError, match=r"replay of StableDiffusion3Pipeline is not exact.*Likely causes: dropout"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_self_check_finds_a_pipeline_with_state(make_trainer):
    class Drifting(type(tiny_pipelines.sd3())):
        """Its guidance grows each time it is read, and no replay can repeat that."""

        reads = 0

        @property
        def guidance_scale(self):
            self.reads += 1
            return self._guidance_scale + 0.1 * self.reads

    pipeline = Drifting(**tiny_pipelines.sd3().components)
    with pytest.raises(ReplayError, match="Drifting is not exact.*a pipeline that keeps state between its steps"):
        make_trainer(pipeline=pipeline, guidance_scale=3.0).train()


# The trained weights --------------------------------------------------------------------------------------------------


def test_default_lora_targets_are_the_attention_projections(make_trainer):
    config = make_trainer(lora_r=3, lora_alpha=6).model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (3, 6)
    paper = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert set(config.target_modules) == paper
    assert config.init_lora_weights == "gaussian"


def rounding_with_the_batch(size):
    """A pipeline whose kernels round otherwise, by a share of `size`, in batches of more than two prompts."""
    pipeline = tiny_pipelines.sd3()
    hook = lambda module, args, output: (output[0] * (1 + size * (len(output[0]) > 4)),)
    pipeline.transformer.register_forward_hook(hook)
    return pipeline


def test_the_tolerance_of_the_replay_is_measured(make_trainer):
    larger = {"per_device_sampling_batch_size": 4, "num_rollouts": 1}
    usual = 1e-3  # of float32
    # One batch size in eager kernels is exact: a small difference is another function.
    assert make_trainer().replay_tolerance == pytest.approx(0.1 * usual)
    for size, expected in ((1e-5, 0.1 * usual), (5e-4, 4 * 5e-4), (4e-3, 5 * usual)):
        trainer = make_trainer(rounding_with_the_batch(size), **larger)
        assert trainer.replay_tolerance == pytest.approx(expected, rel=0.01)
        trainer.train()
        assert logged(trainer, "replay_error") == [pytest.approx(size, rel=0.1)]
    with pytest.raises(ReplayError, match="by 0.00[56].*at most 0.005 is allowed.*set `replay_tolerance`"):
        make_trainer(rounding_with_the_batch(6e-3), **larger)
    assert make_trainer(rounding_with_the_batch(6e-3), replay_tolerance=0.01, **larger).replay_tolerance == 0.01
    with pytest.raises(ReplayError, match="at most 0.0001 is allowed"):
        make_trainer(rounding_with_the_batch(5e-4), replay_tolerance=1e-4, **larger)


def test_lora_weights_are_fp32_on_a_bf16_model(make_trainer):
    trainer = make_trainer(pipeline=tiny_pipelines.sd3().to(torch.bfloat16))
    assert {weight.dtype for weight in trained_weights(trainer).values()} == {torch.float32}
    trainer.train()
    assert logged(trainer, "replay_error") == [0.0, 0.0]


def test_seed_gives_the_first_weights_of_the_adapter(make_trainer):
    weights = []
    for seed, other_numbers in ((1, 0), (1, 3), (2, 0)):
        torch.manual_seed(other_numbers)
        weights.append(trained_weights(make_trainer(tiny_pipelines.sd3(seed=other_numbers), seed=seed)))
    lora_a = [name for name in weights[0] if "lora_A" in name]
    assert lora_a and all(torch.equal(weights[0][name], weights[1][name]) for name in lora_a)
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in lora_a)


def test_peft_config_overrides(make_trainer):
    trainer = make_trainer(peft_config=LoraConfig(r=2, target_modules=["proj_out"]))
    assert {name.split(".lora")[0] for name in trained_weights(trainer)} == {"base_model.model.proj_out"}


def test_full_fine_tuning(make_trainer, tmp_path):
    trainer = make_trainer(use_peft=False, learning_rate=1e-4)
    before = trained_weights(trainer)
    assert len(before) == len(list(trainer.pipeline.transformer.parameters()))
    trainer.train()
    assert any(not torch.equal(w, before[n]) for n, w in trained_weights(trainer).items())
    trainer.save_model(str(tmp_path / "pipeline"))
    loaded = load_pipeline(tmp_path / "pipeline")
    for name, weight in loaded.transformer.state_dict().items():
        assert torch.equal(weight, trainer.pipeline.transformer.state_dict()[name]), name
    # Steps, guidance and size are the run's, not the pipeline's own.
    found = call_options(InferenceArguments(model=str(tmp_path / "pipeline"), prompts=["a cat"]), {})
    assert found == trainer.eval_call_kwargs() and found["num_inference_steps"] == 4


def test_full_fine_tuning_with_mixed_precision_keeps_float32_weights(make_trainer, tmp_path):
    """AdamW's steps of 1e-5 are less than half a unit of a bfloat16 weight above 0.004, and would be rounded away."""
    tiny_pipelines.sd3().save_pretrained(tmp_path / "pipeline")
    options = {"bf16": True, "learning_rate": 1e-5, "weight_decay": 0.0, "num_rollouts": 1}
    trainer = make_trainer(str(tmp_path / "pipeline"), use_peft=False, **options)
    before = trained_weights(trainer)
    assert {weight.dtype for weight in before.values()} == {torch.float32}
    trainer.train()
    after = trained_weights(trainer)
    moved = sum(((after[name] != weight) & (weight.abs() > 0.016)).sum().item() for name, weight in before.items())
    assert moved > 0.9 * sum((weight.abs() > 0.016).sum().item() for weight in before.values())
    assert make_trainer(str(tmp_path / "pipeline"), **options).pipeline.transformer.dtype == torch.bfloat16


def test_a_whole_pipeline_does_not_say_which_folder_it_came_from(make_trainer, tmp_path):
    tiny_pipelines.sd3().save_pretrained(tmp_path / "pipeline")
    make_trainer(str(tmp_path / "pipeline"), use_peft=False).save_model()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert tmp_path / "out" / "model_index.json" in files
    assert [file for file in files if bytes(tmp_path) in file.read_bytes()] == []


def test_full_fine_tuning_of_weights_in_16_bits_is_refused(make_trainer):
    with pytest.raises(
        ValueError, match=r"train weights in torch.bfloat16 of this StableDiffusion3Pipeline, in which most steps"
    ):
        make_trainer(tiny_pipelines.sd3().to(torch.bfloat16), use_peft=False, bf16=True)


def test_only_the_transformer_is_trained(make_trainer):
    trainer = make_trainer()
    for name, component in trainer.pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name != "transformer":
            assert not any(parameter.requires_grad for parameter in component.parameters()), name


# Rewards --------------------------------------------------------------------------------------------------------------


def test_next_batch_is_sampled_while_an_async_reward_is_awaited(make_trainer):
    order = []

    async def remote(images):
        order.append("starts")
        while order.count("sampled") < 2:  # until both batches are
            await asyncio.sleep(0.01)
        order.append("ends")
        return redness(images, None)

    trainer = make_trainer(reward_fn=remote, num_rollouts=1)
    rollout = trainer.flow.rollout
    trainer.flow.rollout = lambda *args, **kwargs: (rollout(*args, **kwargs), order.append("sampled"))[0]
    trainer.train()
    # Otherwise the first reward would still wait for the second batch.
    assert sorted(order) == ["ends", "ends", "sampled", "sampled", "starts", "starts"]
    # A reward that is not async gives the same run.
    expected = make_trainer(num_rollouts=1)
    expected.train()
    for name, weight in trained_weights(expected).items():
        assert torch.equal(trained_weights(trainer)[name], weight), name
    (log,) = [log for log in trainer.state.log_history if "reward_time" in log]
    assert 0 < log["reward_time"] < log["rollout_time"]


def test_reward_that_fails_in_the_background_ends_the_rollout(make_trainer):
    calls = []

    async def broken(images, prompts):
        calls.append(prompts)
        raise RuntimeError("no more memory")

    trainer = make_trainer(reward_fn=broken, prompts_per_rollout=40, per_device_prompt_batch_size=2)
    with pytest.raises(RuntimeError, match="no more memory"):
        trainer.train()
    assert len(calls) < 20


def test_bad_reward_values_stop_the_run(make_trainer):
    trainer = make_trainer(reward_fn=lambda images: [1.0])
    with pytest.raises(ValueError, match=r"Reward '<lambda>' returned 1 values for 4 images"):
        trainer.train()


def test_reward_that_never_applies_is_reported(make_trainer, caplog):
    def never(images):
        return [None] * len(images)

    trainer = make_trainer(reward_fn=[redness, never])
    trainer.train()
    assert "Rollout 1: the reward 'never' applied to all images of no prompt" in caplog.text
    assert logged(trainer, "frac_reward_zero_std") == [0.0, 0.0]
    alone = make_trainer()
    alone.train()
    for name, weight in trained_weights(alone).items():
        assert torch.equal(trained_weights(trainer)[name], weight), name


def test_the_mean_of_a_reward_is_over_the_prompts_for_which_it_counts(make_trainer):
    def partly(images):
        return [5.0, None, 1.0, 3.0]

    trainer = make_trainer(reward_fn=partly, num_rollouts=1, prompts_per_rollout=2, optimizer_steps_per_rollout=1)
    trainer.train()
    assert logged(trainer, "rewards/partly/mean") == logged(trainer, "reward") == [2.0]
    assert logged(trainer, "rewards/partly/std") == logged(trainer, "reward_std") == [pytest.approx(2**0.5)]


@pytest.mark.parametrize("reward", [lambda images: [None] * len(images), lambda images: [1.0] * len(images)])
def test_a_reward_that_teaches_nothing_is_reported(make_trainer, reward, caplog):
    trainer = make_trainer(reward_fn=reward, num_rollouts=1)
    trainer.train()
    assert "Rollout 1: the images of no prompt differ in reward" in caplog.text
    assert logged(trainer, "frac_reward_zero_std") == [1.0]


# Plan, logs and progress ----------------------------------------------------------------------------------------------


def test_run_plan(make_trainer, capsys):
    trainer = make_trainer(trainer_class=FDFOTrainer, timestep_fraction=0.5, num_rollouts=1)
    trainer.train()
    plan = capsys.readouterr().out
    trainable = sum(weight.numel() for weight in trained_weights(trainer).values())
    assert f"trainable parameters  {trainable:,} of" in plan
    assert "1, of 4 prompts x 2 images x 4 steps = 32 transformer samples" in plan
    assert "2 optimizer steps on 16 samples (2 of 4 noise levels)" in plan
    assert "2 per optimizer step and process, of 4 samples" in plan


def test_metrics_are_logged_once_per_rollout(make_trainer):
    trainer = make_trainer(reward_fn=[redness, lambda images: [0.0] * len(images)], reward_weights=[2.0, 1.0], beta=0.1)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert [log["step"] for log in logs] == [2, 4] and [log["epoch"] for log in logs] == [1, 2]
    for name in (
        "reward reward_std rewards/redness/mean rewards/redness/std rewards/<lambda>/mean frac_reward_zero_std base_distance "
        "clip_ratio ratio branch_rms replay_error step_time rollout_time train_time images_per_second grad_norm"
    ).split():
        assert all(log[name] == log[name] for log in logs), name
    for log in logs:
        assert log["reward"] == pytest.approx(2 * log["rewards/redness/mean"])
        assert log["images_per_second"] == pytest.approx(8 / (log["rollout_time"] + log["train_time"]))
        assert log["step_time"] == pytest.approx(log["train_time"] / 2)


def test_times_are_of_a_rollout_however_often_they_are_logged(make_trainer):
    trainer = make_trainer(optimizer_steps_per_rollout=4, timestep_fraction=0.5, logging_steps=1, num_rollouts=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "step_time" in log]
    assert len(logs) == 8
    for log in (log for log in logs if "reward" in log):
        assert log["train_time"] == pytest.approx(4 * log["step_time"])
        assert log["images_per_second"] == pytest.approx(8 / (log["rollout_time"] + log["train_time"]))


def test_progress_bars(make_trainer, capsys):
    make_trainer(disable_tqdm=False).train()
    bars = capsys.readouterr().err
    assert "rollout 2" in bars and "4/4" in bars and "reward=" in bars


# The result -----------------------------------------------------------------------------------------------------------


def test_saved_adapter_loads_through_diffusers_and_peft(make_trainer, tmp_path):
    trainer = make_trainer(learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    expected = images_of(trainer.pipeline)
    assert not torch.equal(expected, images_of(tiny_pipelines.sd3()))

    by_diffusers = tiny_pipelines.sd3()
    by_diffusers.load_lora_weights(str(tmp_path / "adapter"))
    assert torch.equal(images_of(by_diffusers), expected)
    by_peft = tiny_pipelines.sd3()
    PeftModel.from_pretrained(by_peft.transformer, tmp_path / "adapter")
    assert torch.equal(images_of(by_peft), expected)


def test_averaged_weights_are_saved_and_trained_weights_are_kept(make_trainer, tmp_path):
    trainer = make_trainer(num_rollouts=4, ema_decay=0.9, learning_rate=1e-2)
    trainer.train()
    trained = trained_weights(trainer)
    trainer.save_model(str(tmp_path / "averaged"))
    for name, weight in trained_weights(trainer).items():
        assert torch.equal(weight, trained[name])
    with trainer.averaged_weights():
        averaged = trained_weights(trainer)
        expected = images_of(trainer.pipeline)
    assert any(not torch.equal(averaged[name], trained[name]) for name in trained)
    pipeline = tiny_pipelines.sd3()
    pipeline.load_lora_weights(str(tmp_path / "averaged"))
    assert torch.equal(images_of(pipeline), expected)


def test_best_model_with_averaging_is_the_one_that_was_scored(make_trainer, tmp_path):
    def worse_and_worse(images, trainer_state):
        return [-float(trainer_state.global_step)] * len(images)

    trainer = make_trainer(
        num_rollouts=4,
        ema_decay=0.5,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_reward_fn=worse_and_worse,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_control",
        learning_rate=1e-2,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    trainer.save_model(str(tmp_path / "best"))
    file = "pytorch_lora_weights.safetensors"
    scored = load_file(f"{trainer.state.best_model_checkpoint}/{file}")
    saved = load_file(tmp_path / "best" / file)
    last = load_file(f"{trainer.args.output_dir}/checkpoint-8/{file}")
    assert all(torch.equal(saved[name], scored[name]) for name in scored)
    assert any(not torch.equal(saved[name], last[name]) for name in last)


def test_neither_token_nor_folders_of_the_user_are_written(make_trainer, tmp_path):
    tiny_pipelines.sd3().save_pretrained(tmp_path / "pipeline")
    pipeline = load_pipeline(str(tmp_path / "pipeline"))
    trainer = make_trainer(pipeline, hub_token="hf_very_secret", save_strategy="epoch", num_rollouts=1)
    trainer.train()
    trainer.save_model()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        written = file.read_bytes()
        for secret in ("hf_very_secret", str(tmp_path), str(Path.home()), os.environ["PATH"]):
            assert secret.encode() not in written, (file, secret)
    assert trainer.args.hub_token == "hf_very_secret"
