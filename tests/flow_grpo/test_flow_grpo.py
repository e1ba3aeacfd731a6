import math

import pytest
import tiny_pipelines
import torch
from conftest import logged, trained_weights
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_runs import PROMPTS, redness

from trl_fdfo import FDFOTrainer, FlowGRPOConfig, FlowGRPOTrainer
from trl_fdfo.algorithm import (
    batch_advantages,
    clipped_loss,
    cps_distribution,
    gaussian_kl,
    group_advantages,
    log_prob,
    sde_distribution,
    sde_step,
)


EACH_SDE = pytest.mark.parametrize("distribution", [sde_distribution, cps_distribution], ids=["sde", "cps"])


def tensors(*shape: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64))


# The SDE --------------------------------------------------------------------------------------------------------------


def test_step_equals_its_equation():
    x, v, noise = tensors(3, 4, 2, 2, count=3)
    t, s, a = 0.7, 0.6, 0.7
    sigma = a * math.sqrt(t / (1 - t))
    drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
    expected = x + drift * (s - t) + sigma * math.sqrt(t - s) * noise
    torch.testing.assert_close(sde_step(x, v, t, s, a, noise), expected, rtol=1e-12, atol=1e-12)
    # A scale of its own for each sample.
    step = sde_step(x, v, t, s, torch.tensor([a, 0.0, a]), noise)
    torch.testing.assert_close(step[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=1e-6)
    assert torch.equal(step[1], (x + (s - t) * v)[1])


@EACH_SDE
def test_without_noise_it_is_the_euler_step_of_diffusers_to_the_bit(distribution):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    x, v = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    for number, timestep in enumerate(scheduler.timesteps):
        t, s = scheduler.sigmas[number : number + 2]
        step = sde_step(x, v, t, s, 0.0, torch.ones_like(x), distribution)
        assert torch.equal(step, scheduler.step(v, timestep, x)[0])


@pytest.mark.parametrize("data_std", [1.0, 0.3])
def test_variance_is_kept_on_a_gaussian_flow(data_std):
    # A step maps x to c x + std n, so that the variance follows without sampling. What is left is the error of
    # discretisation, which halves with the length of the steps. sigma_t diverges at t = 1: steps are equal in log(1 - t).
    variance_at = lambda t: (1 - t) ** 2 * data_std**2 + t**2

    def error(steps: int) -> float:
        sigmas = 1 - torch.logspace(-3, 0, steps + 1, dtype=torch.float64)
        variance, worst = variance_at(sigmas[0]), 0.0
        for t, s in zip(sigmas[:-1], sigmas[1:-1]):
            velocity = (t - (1 - t) * data_std**2) / variance_at(t)  # E[eps - x_0 | x_t] / x_t
            mean, std = sde_distribution(torch.ones(1, 1, dtype=torch.float64), velocity.expand(1, 1), t, s, 0.7)
            variance = mean.squeeze() ** 2 * variance + std.squeeze() ** 2
            worst = max(worst, abs(variance / variance_at(s) - 1).item())
        return worst

    coarse, fine = error(2000), error(4000)
    assert fine < 0.01 and fine < 0.55 * coarse


def test_first_step_is_finite():
    mean, std = sde_distribution(torch.ones(1, 3), torch.ones(1, 3), torch.tensor(1.0), torch.tensor(0.9), 0.7)
    # sigma of the next level, where t / (1 - t) = 9
    torch.testing.assert_close(std.squeeze(), torch.tensor(0.7 * 3 * 0.1**0.5))
    torch.testing.assert_close(mean, torch.full((1, 3), 1 - 0.1 * (1 + 0.49 * 9 / 2)))


# Likelihood, advantages, loss -----------------------------------------------------------------------------------------


@EACH_SDE
def test_log_prob_is_that_of_the_gaussian(distribution):
    x, v, x_s = tensors(3, 5, count=3)
    t, s, a = 0.5, 0.4, 0.7
    found = log_prob(x_s, distribution(x, v, t, s, a))
    for n in range(3):
        logs = []
        for x_i, v_i, arrived in zip(x[n].tolist(), v[n].tolist(), x_s[n].tolist()):
            if distribution is sde_distribution:
                sigma = a * math.sqrt(t / (1 - t))
                mean = x_i + (v_i + sigma**2 / (2 * t) * (x_i + (1 - t) * v_i)) * (s - t)
                variance = sigma**2 * (t - s)
            else:
                variance = (s * math.sin(a * math.pi / 2)) ** 2
                mean = (1 - s) * (x_i - t * v_i) + math.sqrt(s**2 - variance) * (x_i + (1 - t) * v_i)
            logs.append(-((arrived - mean) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2)
        assert found[n].item() == pytest.approx(sum(logs) / 5, rel=0, abs=1e-10)


def test_kl_is_that_of_two_gaussians():
    x, v, w = tensors(3, 5, count=3)
    p, q = (sde_distribution(x, velocity, 0.5, 0.4, 0.7) for velocity in (v, w))
    normal = lambda d: torch.distributions.Normal(d.mean, d.std.expand_as(d.mean))
    expected = torch.distributions.kl_divergence(normal(p), normal(q)).mean(dim=1)
    torch.testing.assert_close(gaussian_kl(p, q), expected)


def test_advantages_have_mean_0_and_standard_deviation_1():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    advantages = group_advantages(rewards)
    std = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + 0 + (6 - 3) ** 2) / 4)
    torch.testing.assert_close(advantages[0], torch.tensor([-2.0, -1.0, 0.0, 3.0]) / (std + 1e-4))
    assert torch.equal(advantages[1], torch.zeros(4))


def test_advantages_of_a_batch_share_a_standard_deviation():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.2, 0.0, 0.2]])
    std = math.sqrt(sum((r - 32.4 / 12) ** 2 for r in rewards.flatten().tolist()) / 12)
    expected = torch.tensor([[-2.0, -1.0, 0.0, 3.0], [0.0] * 4, [-0.1, 0.1, -0.1, 0.1]]) / (std + 1e-4)
    torch.testing.assert_close(batch_advantages(rewards, std), expected)


def test_loss_clips_the_ratio():
    x, v, change, x_s = tensors(4, 6, count=4)
    old = sde_distribution(x, v, 0.5, 0.4, 0.7)
    advantage = torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=torch.float64)
    new = sde_distribution(x, v + 0.1 * change, 0.5, 0.4, 0.7)
    loss, ratio = clipped_loss(x_s, new, old, advantage, epsilon=0.02)
    expected = (log_prob(x_s, new) - log_prob(x_s, old)).exp()
    torch.testing.assert_close(ratio, expected)
    clipped = expected.clamp(0.98, 1.02)
    assert not torch.equal(clipped, expected), "the change is to reach the clip"
    torch.testing.assert_close(loss, torch.maximum(-advantage * expected, -advantage * clipped))


def test_ratio_is_one_before_the_first_step_and_the_gradient_is_that_of_the_likelihood():
    x, v, x_s = tensors(3, 6, count=3)
    advantage = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    velocity = v.clone().requires_grad_()
    new = sde_distribution(x, velocity, 0.5, 0.4, 0.7)
    loss, ratio = clipped_loss(x_s, new, sde_distribution(x, v, 0.5, 0.4, 0.7), advantage, epsilon=0.01)
    assert torch.equal(ratio, torch.ones(3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), velocity, retain_graph=True)
    (expected,) = torch.autograd.grad(-(advantage * log_prob(x_s, new)).sum(), velocity)
    torch.testing.assert_close(gradient, expected)
    assert not gradient[2].any()


# The trainer ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_grpo(make_config):
    def make(pipeline=None, reward_fn=redness, trainer_class=FlowGRPOTrainer, config_class=FlowGRPOConfig, **options):
        defaults = {
            "num_generations": 4,
            "epsilon": 0.1,
            "prompts_per_rollout": 4,
            "per_device_prompt_batch_size": 2,
        }
        # Of the options of a tiny run all but FDFO's churn.
        tiny = {name: getattr(make_config(), name) for name in TINY}
        config = config_class(**{**tiny, **defaults, **options})
        prompts = Dataset.from_dict({"prompt": PROMPTS})
        return trainer_class(config, pipeline if pipeline is not None else tiny_pipelines.sd3(), reward_fn, prompts)

    return make


TINY = ("output_dir", "num_rollouts", "num_inference_steps", "height", "width", "pipeline_kwargs", "learning_rate")
TINY += ("optimizer_steps_per_rollout", "lora_r", "report_to", "use_cpu", "disable_tqdm", "save_strategy")


@pytest.mark.parametrize("build", [tiny_pipelines.sd3, tiny_pipelines.flux], ids=["SD3", "FLUX"])
def test_training_replays_exactly_and_raises_the_reward(make_grpo, build):
    trainer = make_grpo(build(), num_rollouts=8, learning_rate=3e-3, prompts_per_rollout=12, epsilon=1e-2)
    before = trained_weights(trainer)
    trainer.train()
    still = [name for name, weight in trained_weights(trainer).items() if torch.equal(weight, before[name])]
    # Of the text stream in SD3's last block the queries reach nothing.
    assert still == [name for name in before if "blocks.1.attn.add_q_proj.lora_B" in name]
    assert logged(trainer, "replay_error") == [0.0] * 8 == logged(trainer, "first_ratio_error")
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3])


@pytest.mark.parametrize(
    "options",
    [
        {"num_noisy_steps": 1},
        {"sde_type": "cps", "noise_level": 0.8, "beta": 0.1},
        {"window_interval": 1, "num_noisy_steps": 2, "same_latent": True, "advantage_std": "batch"},
        {"beta": 0.1},
        {"offload_trajectories": True, "per_device_sampling_batch_size": 4},
        {"guidance_scale": 4.0, "timestep_fraction": 0.4},
        {"bf16": True},
        {"num_iterations": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_train_with_an_exact_replay(make_grpo, options):
    trainer = make_grpo(**options)
    before = trained_weights(trainer)
    plan = trainer.run_plan()
    trainer.train()
    # Kernels for another batch size round in another way on some CPUs.
    largest = 1e-6 if "per_device_sampling_batch_size" in options else 0.0
    assert max(logged(trainer, "replay_error")) <= largest
    assert any(not torch.equal(weight, before[name]) for name, weight in trained_weights(trainer).items())
    assert str(plan).startswith("Flow-GRPO on StableDiffusion3Pipeline")


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_what_is_sampled_and_trained(make_grpo, sde_type):
    trainer = make_grpo(num_rollouts=1, sde_type=sde_type)
    trainer.train()
    batches = {id(batch): batch for step in trainer._buffer.steps for batch, _ in step}.values()
    assert len(batches) == 2
    for batch in batches:
        assert sorted(batch.levels) == [0, 1, 2], "all but the last"
        sampled = batch.sampled
        x_t = sampled.x_t[0].unflatten(0, (2, 4))
        assert (x_t[:, :, None] - x_t[:, None]).flatten(3).abs().amax(dim=-1).bool().sum() == 2 * 4 * 3, (
            "images of a prompt start from different noise"
        )
        for level in (0, 1):
            assert torch.equal(sampled.x_s[level], sampled.x_t[level + 1])
        # The noise that a step was taken with has unit variance.
        noise = []
        for level in batch.levels:
            distribution = sde_distribution if sde_type == "sde" else cps_distribution
            t, s = sampled.sigmas[level : level + 2]
            mean, std = distribution(sampled.x_t[level], sampled.velocities[level].float(), t, s, 0.7)
            noise.append((sampled.x_s[level] - mean) / std)
        noise = torch.stack(noise)
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
        (advantages,) = batch.targets
        torch.testing.assert_close(advantages.unflatten(0, (2, 4)).mean(dim=1), torch.zeros(2), rtol=0, atol=1e-5)


def test_fast_variant_has_noise_where_it_trains(make_grpo):
    trainer = make_grpo(
        num_noisy_steps=2, num_inference_steps=8, num_rollouts=1, prompts_per_rollout=24, optimizer_steps_per_rollout=2
    )
    noise = trainer.noise_amounts(0, range(24))
    windows = set()
    for batch in range(12):
        levels = trainer.trained_levels(0, batch)
        first = min(levels)
        assert sorted(levels) == [first, first + 1] and first + 1 < 7
        windows.add(first)
        for scale in noise[2 * batch : 2 * batch + 2]:
            assert scale.nonzero().flatten().tolist() == [first + 1, first + 2] and scale.max() == 0.7
    assert len(windows) > 2
    trainer.train()
    assert logged(trainer, "replay_error") == [0.0]


def test_window_slides_with_the_rollouts(make_grpo):
    trainer = make_grpo(num_noisy_steps=3, num_inference_steps=8, window_interval=2)
    # The last of the 8 steps has no noise: windows begin at the steps 0 to 4.
    for rollout, first in enumerate([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0]):
        noise = trainer.noise_amounts(rollout, range(4))
        expected = torch.zeros(4, 9)
        expected[:, first + 1 : first + 4] = 0.7  # a step's noise is that of the level where it arrives
        assert torch.equal(noise, expected)
        for batch in (0, 1):
            assert sorted(trainer.trained_levels(rollout, batch)) == [first, first + 1, first + 2]
    assert "(3 of 8 noise levels)" in str(trainer.run_plan())


def test_images_of_a_prompt_may_start_alike(make_grpo):
    trainer = make_grpo(num_noisy_steps=2, window_interval=1, same_latent=True, num_rollouts=2)
    for rollout, first in enumerate((0, 1)):
        buffer = trainer._roll_out(rollout)
        for batch in {id(batch): batch for step in buffer.steps for batch, _ in step}.values():
            starts, arrivals = (x[first].unflatten(0, (2, 4)) for x in (batch.sampled.x_t, batch.sampled.x_s))
            assert torch.equal(starts, starts[:, :1].expand_as(starts)), "the ODE keeps them alike"
            assert not torch.equal(starts[0, 0], starts[1, 0]), "two prompts"
            assert (arrivals[:, 1:] != arrivals[:, :1]).flatten(2).any(dim=2).all()


def test_batch_advantages_of_a_rollout(make_grpo):
    scored = []
    rewards = lambda images, prompts: scored.append(redness(images, prompts)) or scored[-1]
    trainer = make_grpo(advantage_std="batch", reward_fn=rewards)
    buffer = trainer._roll_out(0)
    values = torch.cat(scored).double().unflatten(0, (4, 4))
    std = math.sqrt(((values - values.mean()) ** 2).mean())
    for batch in {batch.number: batch for step in buffer.steps for batch, _ in step}.values():
        own = values[2 * batch.number : 2 * batch.number + 2]
        expected = (own - own.mean(dim=1, keepdim=True)) / (std + 1e-4)
        torch.testing.assert_close(batch.targets[0], expected.flatten().float())


def test_run_goes_on_to_the_bit_and_not_with_another_algorithm(make_grpo, make_trainer):
    options = {"sde_type": "cps", "num_noisy_steps": 2, "window_interval": 1, "advantage_std": "batch"}
    whole = make_grpo(num_rollouts=3, **options)
    whole.train()
    make_grpo(num_rollouts=2, save_strategy="epoch", **options).train()
    going_on = make_grpo(num_rollouts=3, save_strategy="epoch", **options)
    going_on.train(resume_from_checkpoint=True)
    for name, weight in trained_weights(going_on).items():
        assert torch.equal(weight, trained_weights(whole)[name])
    other = make_grpo(num_rollouts=4, **{**options, "window_interval": 2})
    with pytest.raises(ValueError, match="window_interval: 1 -> 2"):
        other.train(resume_from_checkpoint=True)
    other = make_trainer(num_rollouts=4)
    with pytest.raises(ValueError, match="algorithm: 'Flow-GRPO' -> 'FDFO'"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations=1, but the model learns from the difference"),
        ({"noise_level": 0.0}, "noise_level=0.0 must be > 0"),
        ({"noise_level": "a"}, "noise_level='a' is a str"),
        ({"num_noisy_steps": 4}, r"num_noisy_steps=4 must be in \[1, 3\]"),
        ({"num_inference_steps": 1}, "num_inference_steps=1: the last step has no noise"),
        ({"sde_type": "ode"}, "sde_type='ode' is not one of sde, cps"),
        ({"sde_type": "cps", "noise_level": 1.1}, r"noise_level=1.1 must be in \(0, 1\] with sde_type='cps'"),
        ({"advantage_std": "global"}, "advantage_std='global' is not one of group, batch"),
        ({"window_interval": 5}, "window_interval=5 moves a window .* set num_noisy_steps"),
        ({"window_interval": 0, "num_noisy_steps": 2}, "window_interval=0 must be at least 1"),
        ({"window_interval": 5, "num_noisy_steps": 3}, "window_interval=5 cannot move a window of num_noisy_steps=3"),
        ({"trainer_class": FDFOTrainer}, "config is of FlowGRPOConfig, and FDFOTrainer takes a `FDFOConfig`"),
    ],
)
def test_wrong_options_are_refused(make_grpo, options, message):
    with pytest.raises(ValueError, match=message):
        make_grpo(**options)


def test_a_clip_of_fdfo_is_warned_of(make_grpo, caplog):
    make_grpo(epsilon=0.2)
    assert "epsilon=0.2 clips nothing" in caplog.text


@pytest.mark.parametrize("options", [{"churn": 0.1}, {"direction": "reward_gradient"}, {"shared_prefix": True}])
def test_options_of_another_algorithm_are_refused(make_grpo, options):
    with pytest.raises(TypeError, match=f"FlowGRPOConfig has no option {next(iter(options))}="):
        make_grpo(**options)


def test_fdfo_config_is_refused(make_config):
    with pytest.raises(ValueError, match="config is of FDFOConfig, and FlowGRPOTrainer takes a `FlowGRPOConfig`"):
        FlowGRPOTrainer(make_config(), tiny_pipelines.sd3(), redness)
