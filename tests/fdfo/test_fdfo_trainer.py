import asyncio
import json
import os
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from conftest import trained_weights
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_runs import PROMPTS, redness
from transformers import TrainerCallback

from trl_fdfo import FDFOTrainer
from trl_fdfo.pipeline.loading import load_pipeline
from trl_fdfo.pipeline.replay_check import ReplayError
from trl_fdfo.rewards import PairwiseJudge
from trl_fdfo.seeds import derive_seed
from trl_fdfo.training.prompts import rollout_rows
from trl_fdfo.training.watchdogs import WatchdogError


class Gradients(TrainerCallback):
    """Keeps the gradients that the first optimizer step sees."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def corner(images, prompts):
    """One pixel: it differs between the branches by more than a mean does, so fp32 hardly rounds the difference."""
    return images[:, 0, 3, 3]


def metrics_of(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


# The mathematics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("branches", "beta"), [(2, 0.0), (3, 0.5)])
def test_gradients_equal_a_plain_loop_over_the_equations(make_trainer, branches, beta):
    gradients, gamma = Gradients(), 1.0
    trainer = make_trainer(
        reward_fn=corner,
        num_rollouts=1,
        num_generations=branches,
        churn=gamma,
        optimizer_steps_per_rollout=1,
        max_grad_norm=0.0,
        beta=beta,
        callbacks=[gradients],
        seed=3,
    )
    # LoRA starts at the base model, where the penalty has no gradient: move it.
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model, pipeline = trainer.model, trainer.pipeline
    start = trained_weights(trainer)
    trainer.train()

    # The plain loop: no Trainer, no replay, no pipeline call.
    for name, parameter in model.named_parameters():
        if name in start:
            parameter.data.copy_(start[name])
            parameter.grad = None
    sigmas = trainer.flow.rehearse(["a"]).sigmas
    total = 0.0
    rows = rollout_rows(len(PROMPTS), 4, rollout=0, seed=3)
    for first in (0, 2):
        prompts = [PROMPTS[row] for row in rows[first : first + 2]]
        prompts = [prompt for prompt in prompts for _ in range(branches)]
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=8
        )

        def velocity_at(x, t, embeds=embeds, pooled=pooled):
            timestep = (t * 1000).expand(len(x))
            return model(
                hidden_states=x, timestep=timestep, encoder_hidden_states=embeds, pooled_projections=pooled
            ).sample

        x, noises = [], []
        for n in (first, first + 1):
            for a in range(branches):
                shared = torch.Generator().manual_seed(derive_seed(3, 0, n, 0))
                x.append(torch.randn(4, 8, 8, generator=shared))
                noises.append(torch.Generator().manual_seed(derive_seed(3, 0, n * branches + a, 1)))
        draw = lambda noises=noises: torch.stack([torch.randn(4, 8, 8, generator=g) for g in noises])
        spread = ((1 + gamma) ** 2 - 1) ** 0.5
        x = (torch.stack(x) + spread * draw()) / (1 + gamma)
        tuples = []
        with torch.no_grad():
            for i, (t, s) in enumerate(zip(sigmas[:-1], sigmas[1:])):
                v = velocity_at(x, t)
                tuples.append((x, t, v))
                r = s / (1 + gamma - gamma * s) if i < 3 else s
                x = x + (r - t) * v
                if i < 3:
                    x = (x + r * spread * draw()) / (1 + gamma * r)
            latents = x / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
            images = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        rewards = corner(images, prompts).unflatten(0, (2, branches))
        endpoints = x.unflatten(0, (2, branches))
        delta = endpoints - endpoints.mean(dim=1, keepdim=True)
        direction = (delta / (delta.square().mean(dim=(2, 3, 4), keepdim=True) + 1e-6)).flatten(0, 1)
        difference = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
        for x_t, t, v_old in tuples:
            v = velocity_at(x_t, t)
            target = v_old - direction
            rho = ((direction**2).mean(dim=(1, 2, 3)) - ((v - target) ** 2).mean(dim=(1, 2, 3))).exp()
            loss = -difference * rho + difference.abs() / (2 * 0.03) * (rho - 1) ** 2
            if beta:
                with torch.no_grad(), model.disable_adapter():
                    base = velocity_at(x_t, t)
                loss = loss + beta * ((v - base) ** 2).mean(dim=(1, 2, 3))
            total = total + loss.mean() / 8
    total.backward()

    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert expected.keys() == gradients.first.keys()
    flat = lambda grads: torch.cat([grads[name].flatten() for name in sorted(grads)])
    assert flat(expected).norm() > 0
    assert (flat(gradients.first) - flat(expected)).norm() <= 1e-6 * flat(expected).norm()


def test_training_moves_every_lora_matrix_and_raises_the_reward(make_trainer):
    trainer = make_trainer(num_rollouts=30, prompts_per_rollout=8, per_device_prompt_batch_size=4, learning_rate=3e-3)
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    # The text stream of SD3's last block reaches the output only through its keys and values.
    unused = "transformer_blocks.1.attn.add_q_proj"
    for name in before:
        assert torch.equal(before[name], after[name]) == (unused in name and "lora_B" in name), name
    rewards = metrics_of(trainer, "reward")
    assert sum(rewards[-5:]) > sum(rewards[:5])
    assert metrics_of(trainer, "replay_error") == [0.0] * 30


def test_equal_rewards_change_nothing(make_trainer):
    trainer = make_trainer(reward_fn=lambda images: [1.0] * len(images), weight_decay=0.0)
    before = trained_weights(trainer)
    trainer.train()
    for name, weight in trained_weights(trainer).items():
        assert torch.equal(weight, before[name]), name
    assert metrics_of(trainer, "frac_reward_zero_std") == [1.0, 1.0]


def test_prompts_to_which_no_reward_applies_teach_nothing(make_trainer):
    def only_cats(images, prompts):
        return [value if prompt == "a cat" else None for value, prompt in zip(redness(images, prompts), prompts)]

    def only_cats_others_equal(images, prompts):
        return [value if prompt == "a cat" else 5.0 for value, prompt in zip(redness(images, prompts), prompts)]

    weights = []
    for reward in (only_cats, only_cats_others_equal):
        trainer = make_trainer(reward_fn=reward, prompts_per_rollout=6)
        trainer.train()
        weights.append(trained_weights(trainer))
        assert all(value == value for value in metrics_of(trainer, "reward")), "NaN"
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name])


def test_reward_gradient_is_that_of_the_decoded_images(make_trainer):
    trainer = make_trainer(direction="reward_gradient", num_rollouts=1)
    seen = []
    original = trainer._reward_gradient

    def keep(sampled, columns):
        seen.append((sampled, original(sampled, columns)))
        return seen[-1][1]

    trainer._reward_gradient = keep
    before = trained_weights(trainer)
    trainer.train()
    assert metrics_of(trainer, "replay_error") == [0.0]
    assert any(not torch.equal(w, before[n]) for n, w in trained_weights(trainer).items())
    vae = trainer.pipeline.vae
    for sampled, gradient in seen:
        latents = sampled.endpoints.flatten(0, 1).detach().requires_grad_()
        # What StableDiffusion3Pipeline does at its end.
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        redness((decoded / 2 + 0.5).clamp(0, 1), None).sum().backward()
        assert gradient.any()
        torch.testing.assert_close(gradient, latents.grad.unflatten(0, (2, 2)))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images: images.mean(dim=(1, 2, 3)).tolist(), "returned a list without a gradient"),
        (lambda images: images.detach().mean(dim=(1, 2, 3)), "returned a Tensor without a gradient"),
        (
            lambda images: images.square().sum(dim=(1, 2, 3)).mul(0).sqrt(),
            "gradient of the reward has values that are not",
        ),
    ],
)
def test_reward_gradient_needs_one(make_trainer, reward, message):
    with pytest.raises((ValueError, WatchdogError), match=message):
        make_trainer(reward_fn=reward, direction="reward_gradient").train()


@pytest.mark.parametrize("schedule", ["interval", "prior"])
def test_churn_schedules_train(make_trainer, schedule):
    trainer = make_trainer(churn_schedule=schedule, churn_kwargs={"spread": 0.3} if schedule == "prior" else None)
    before = trained_weights(trainer)
    trainer.train()
    assert any(not torch.equal(w, before[n]) for n, w in trained_weights(trainer).items())
    assert all(value > 0 for value in metrics_of(trainer, "branch_rms"))
    gammas = trainer.noise_amounts(0, range(4))
    assert gammas.shape == (4, 5) and len({tuple(row) for row in gammas.tolist()}) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2},
        {"timestep_fraction": 0.5},
        {"guidance_scale": 4.0},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"num_generations": 4},
        {"whiten_direction": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_train_with_an_exact_replay(make_trainer, options):
    trainer = make_trainer(**options)
    before = trained_weights(trainer)
    trainer.train()
    assert metrics_of(trainer, "replay_error") == [0.0, 0.0]
    assert any(not torch.equal(w, before[n]) for n, w in trained_weights(trainer).items())
    steps = 2 * trainer.args.optimizer_steps_per_rollout * trainer.args.num_iterations
    assert trainer.state.global_step == steps


def test_flux_trains(make_trainer):
    trainer = make_trainer(pipeline=tiny_pipelines.flux(), guidance_scale=3.5)
    before = trained_weights(trainer)
    trainer.train()
    assert metrics_of(trainer, "replay_error") == [0.0, 0.0]
    for name, weight in trained_weights(trainer).items():
        assert not torch.equal(weight, before[name]), name


# The self-check -------------------------------------------------------------------------------------------------------


def test_self_check_stops_a_run_before_its_first_step(make_trainer):
    pipeline = tiny_pipelines.sd3()
    pipeline.transformer.proj_out = torch.nn.Sequential(pipeline.transformer.proj_out, torch.nn.Dropout(0.2))
    trainer = make_trainer(pipeline=pipeline)
    with pytest.raises(ReplayError, match=r"replay of StableDiffusion3Pipeline is not exact.*Likely causes: dropout"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_self_check_finds_a_pipeline_with_state(make_trainer):
    class Drifting(type(tiny_pipelines.sd3())):
        """Its latents carry something that the replay cannot know of."""

        def prepare_latents(self, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return super().prepare_latents(*args, **kwargs)

        @property
        def guidance_scale(self):
            self.reads = getattr(self, "reads", 0) + 1
            return self._guidance_scale + 0.1 * self.reads

    pipeline = Drifting(**tiny_pipelines.sd3().components)
    with pytest.raises(ReplayError, match="Drifting is not exact.*a pipeline that keeps state between its steps"):
        make_trainer(pipeline=pipeline, guidance_scale=3.0).train()


# What is trained ------------------------------------------------------------------------------------------------------


def test_default_lora_targets_are_the_attention_projections(make_trainer):
    config = make_trainer().model.peft_config["default"]
    paper = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert set(config.target_modules) == paper
    assert config.init_lora_weights == "gaussian"


def test_lora_weights_are_fp32_on_a_bf16_model(make_trainer):
    trainer = make_trainer(pipeline=tiny_pipelines.sd3().to(torch.bfloat16))
    assert {weight.dtype for weight in trained_weights(trainer).values()} == {torch.float32}
    trainer.train()
    assert metrics_of(trainer, "replay_error") == [0.0, 0.0]


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


def test_only_the_transformer_is_trained(make_trainer):
    trainer = make_trainer()
    for name, component in trainer.pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name != "transformer":
            assert not any(parameter.requires_grad for parameter in component.parameters()), name


def test_seed_gives_the_first_weights_of_the_adapter(make_trainer):
    weights = []
    for seed, other_numbers in ((1, 0), (1, 3), (2, 0)):
        torch.manual_seed(other_numbers)
        weights.append(trained_weights(make_trainer(tiny_pipelines.sd3(seed=other_numbers), seed=seed)))
    lora_a = [name for name in weights[0] if "lora_A" in name]
    assert lora_a and all(torch.equal(weights[0][name], weights[1][name]) for name in lora_a)
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in lora_a)


# Rewards --------------------------------------------------------------------------------------------------------------


def test_next_batch_is_sampled_while_an_async_reward_is_awaited(make_trainer):
    order = []

    async def remote(images):
        order.append("starts")
        while order.count("sampled") < 2:  # of the two batches
            await asyncio.sleep(0.01)
        order.append("ends")
        return redness(images, None)

    trainer = make_trainer(reward_fn=remote, num_rollouts=1)
    rollout = trainer.flow.rollout
    trainer.flow.rollout = lambda *args, **kwargs: (rollout(*args, **kwargs), order.append("sampled"))[0]
    trainer.train()
    # Else the first reward would still be waiting for the second batch.
    assert sorted(order) == ["ends", "ends", "sampled", "sampled", "starts", "starts"]
    # It is the same run as with the reward in the foreground.
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


def test_judge_trains_like_the_reward_whose_differences_it_gives(make_trainer):
    def compare(first, second, prompts):
        return redness(first, prompts) - redness(second, prompts)

    def trained(reward):
        trainer = make_trainer(reward_fn=reward)
        trainer.train()
        assert metrics_of(trainer, "frac_reward_zero_std") == [0.0, 0.0]
        return trained_weights(trainer)

    expected = trained(redness)
    for name, weight in trained(PairwiseJudge(compare)).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


def test_reward_that_never_applies_is_reported(make_trainer, caplog):
    def never(images):
        return [None] * len(images)

    trainer = make_trainer(reward_fn=[redness, never])
    trainer.train()
    assert "Rollout 1: the reward 'never' applied to none of its images" in caplog.text
    assert metrics_of(trainer, "frac_reward_zero_std") == [0.0, 0.0]
    alone = make_trainer()
    alone.train()
    for name, weight in trained_weights(alone).items():
        assert torch.equal(trained_weights(trainer)[name], weight), name


# Saving and resuming --------------------------------------------------------------------------------------------------


def images_of(pipeline):
    generator = torch.Generator().manual_seed(5)
    call = {"num_inference_steps": 3, "height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": 8}
    return pipeline("a cat", generator=generator, output_type="pt", return_dict=False, **call)[0]


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


@pytest.mark.parametrize("use_peft", [True, False])
def test_resumed_run_ends_in_the_same_weights(make_trainer, use_peft):
    options = {"num_rollouts": 3, "save_strategy": "epoch", "ema_decay": 0.5, "use_peft": use_peft}
    whole = make_trainer(**options)
    whole.train()
    averaged = whole.generate(PROMPTS, range(6))
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert resumed.state.global_step == 6
    expected = trained_weights(whole)
    for name, weight in trained_weights(resumed).items():
        assert torch.equal(weight, expected[name]), name
    assert torch.equal(resumed.generate(PROMPTS, range(6)), averaged)


def test_averaging_can_start_with_a_resumed_run(make_trainer, caplog):
    make_trainer(num_rollouts=1, save_strategy="epoch").train()
    resumed = make_trainer(num_rollouts=2, ema_decay=0.5, resume_with_changed_options=True)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert resumed.state.global_step == 4
    assert "the average over rollouts starts from its weights" in caplog.text
    assert "with changes: ema_decay: None -> 0.5" in caplog.text


def test_training_twice_samples_anew(make_trainer):
    trainer = make_trainer(num_rollouts=1)
    trainer.train()
    trainer.train()
    assert metrics_of(trainer, "replay_error") == [0.0]


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


# Evaluation, logging and Trainer's own features -----------------------------------------------------------------------


def test_metrics_are_logged_once_per_rollout(make_trainer):
    trainer = make_trainer(reward_fn=[redness, lambda images: [0.0] * len(images)], reward_weights=[2.0, 1.0], beta=0.1)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert [log["step"] for log in logs] == [2, 4] and [log["epoch"] for log in logs] == [1, 2]
    for name in (
        "reward reward_std rewards/redness/mean rewards/redness/std rewards/<lambda>/mean frac_reward_zero_std kl "
        "clip_ratio ratio branch_rms replay_error step_time rollout_time train_time images_per_second grad_norm"
    ).split():
        assert all(log[name] == log[name] for log in logs), name
    for log in logs:
        assert log["reward"] == pytest.approx(2 * log["rewards/redness/mean"])
        assert log["images_per_second"] == pytest.approx(8 / (log["rollout_time"] + log["train_time"]))
        assert log["step_time"] == pytest.approx(log["train_time"] / 2)


def test_ratio_is_one_before_the_first_step(make_trainer):
    trainer = make_trainer(num_rollouts=1, optimizer_steps_per_rollout=1)
    trainer.train()
    assert metrics_of(trainer, "ratio") == [1.0]
    assert metrics_of(trainer, "clip_ratio") == [0.0]


def test_evaluate_without_prompts(make_trainer):
    with pytest.raises(ValueError, match="evaluate needs prompts: give the trainer an `eval_dataset`"):
        make_trainer().evaluate()


def test_run_plan(make_trainer, capsys):
    trainer = make_trainer(timestep_fraction=0.5, num_rollouts=1)
    trainer.train()
    plan = capsys.readouterr().out
    trainable = sum(weight.numel() for weight in trained_weights(trainer).values())
    assert f"trainable parameters  {trainable:,} of" in plan
    assert "1, of 4 prompts x 2 images x 4 steps = 32 transformer samples" in plan
    assert "2 optimizer steps on 16 samples (2 of 4 noise levels)" in plan
    assert "2 per optimizer step and process, of 4 samples" in plan


def test_progress_bars(make_trainer, capsys):
    make_trainer(disable_tqdm=False).train()
    bars = capsys.readouterr().err
    assert "rollout 2" in bars and "4/4" in bars and "reward=" in bars


def test_pipeline_by_path_and_packaged_prompts(make_config, tmp_path):
    tiny_pipelines.sd3().save_pretrained(tmp_path / "pipeline")
    trainer = FDFOTrainer(make_config(num_rollouts=1), str(tmp_path / "pipeline"), redness)
    assert len(trainer.train_dataset) >= 500
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    # Not the folders above it, which say more of this machine than of the model.
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


# Warnings and refusals; those of options and arguments are in test_bad_input.py -----------------------------------------


@pytest.mark.parametrize("reward", [lambda images: [None] * len(images), lambda images: [1.0] * len(images)])
def test_a_reward_that_teaches_nothing_is_warned_of(make_trainer, reward, caplog):
    trainer = make_trainer(reward_fn=reward, num_rollouts=1)
    trainer.train()
    assert "Rollout 1: the images of no prompt differ in reward" in caplog.text
    assert metrics_of(trainer, "frac_reward_zero_std") == [1.0]


def test_second_adapter_is_refused(make_trainer):
    pipeline = make_trainer().pipeline
    with pytest.raises(ValueError, match="already has an adapter.*Load the pipeline anew"):
        make_trainer(pipeline=pipeline)


def test_bad_reward_values_stop_the_run(make_trainer):
    trainer = make_trainer(reward_fn=lambda images: [1.0])
    with pytest.raises(ValueError, match=r"Reward '<lambda>' returned 1 values for 4 images"):
        trainer.train()
