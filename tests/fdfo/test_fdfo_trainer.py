"""FDFO in training: its gradients, and what its rewards and options change."""

import pytest
import torch
from conftest import logged, trained_weights
from tiny_clip import save_clip
from tiny_runs import PROMPTS, redness
from transformers import TrainerCallback

from trl_fdfo.algorithm import finite_difference, known_gradient
from trl_fdfo.media import to_pil
from trl_fdfo.rewards import CLIPScore, JPEGCompressibility, PairwiseJudge
from trl_fdfo.seeds import derive_seed
from trl_fdfo.training.prompts import rollout_rows
from trl_fdfo.training.watchdogs import WatchdogError


# The four steps of the paper as a plain loop over the tiny SD3: no Trainer, no replay, no call of the pipeline ---------

SEED = 3
SHAPE = (4, 8, 8)  # of the latents


def corner(images, prompts):
    """One pixel. It differs more between the branches than a mean does, so float32 hardly rounds the difference."""
    return images[:, 0, 3, 3]


def velocity_for(pipeline, prompts):
    """The function v(x, t) for these prompts, without guidance."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=8
    )

    def velocity(x, t):
        return pipeline.transformer(
            hidden_states=x,
            timestep=(t * 1000).expand(len(x)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).sample

    return velocity


def random_stream(*numbers):
    return torch.Generator().manual_seed(derive_seed(SEED, *numbers))


def paired_rollouts(velocity, sigmas, numbers, branches, gamma):
    """Step 1: a tuple (x_t, t, v) of each level, and the endpoints x_0, for prompts by their numbers in the rollout."""
    initial = [torch.randn(SHAPE, generator=random_stream(0, n, 0)) for n in numbers for _ in range(branches)]
    streams = [random_stream(0, n * branches + a, 1) for n in numbers for a in range(branches)]
    fresh_noise = lambda: torch.stack([torch.randn(SHAPE, generator=stream) for stream in streams])
    spread = ((1 + gamma) ** 2 - 1) ** 0.5
    x = (torch.stack(initial) + spread * fresh_noise()) / (1 + gamma)
    tuples = []
    for t, s in zip(sigmas[:-1], sigmas[1:]):
        v = velocity(x, t)
        tuples.append((x, t, v))
        if s == 0:
            x = x - t * v
        else:
            r = s / (1 + gamma - gamma * s)
            x = (x + (r - t) * v + r * spread * fresh_noise()) / (1 + gamma * r)
    return tuples, x


def rewards_of(pipeline, endpoints, prompts):
    """Step 2: decode the images and score them."""
    latents = endpoints / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    images = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    return corner(images, prompts)


def finite_differences(endpoints, rewards, branches):
    """Step 3: the whitened direction d_a and the difference in reward dR_a of each sample."""
    endpoints, rewards = endpoints.unflatten(0, (-1, branches)), rewards.unflatten(0, (-1, branches))
    delta = endpoints - endpoints.mean(dim=1, keepdim=True)
    direction = delta / (delta.square().mean(dim=(2, 3, 4), keepdim=True) + 1e-6)
    difference = rewards - rewards.mean(dim=1, keepdim=True)
    return direction.flatten(0, 1), difference.flatten()


def surrogate(v, v_old, direction, difference, epsilon=0.03):
    """Step 4: the loss of each sample."""
    mean = lambda values: values.mean(dim=(1, 2, 3))
    target = v_old - direction
    rho = (mean(direction**2) - mean((v - target) ** 2)).exp()
    return -difference * rho + difference.abs() / (2 * epsilon) * (rho - 1) ** 2


class Gradients(TrainerCallback):
    """Keeps the gradients that the first optimizer step sees."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = gradients_of(model)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


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
        seed=SEED,
    )
    # LoRA starts at the base model, where the penalty has no gradient: move it.
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model, pipeline = trainer.model, trainer.pipeline
    start = trained_weights(trainer)
    trainer.train()

    for name, parameter in model.named_parameters():
        if name in start:
            parameter.data.copy_(start[name])
            parameter.grad = None
    pipeline.scheduler.set_timesteps(4)
    sigmas = pipeline.scheduler.sigmas
    rows = rollout_rows(len(PROMPTS), 4, rollout=0, seed=SEED)
    total = 0.0
    for numbers in ((0, 1), (2, 3)):  # the two batches of the rollout
        prompts = [PROMPTS[rows[n]] for n in numbers for _ in range(branches)]
        velocity = velocity_for(pipeline, prompts)
        with torch.no_grad():
            tuples, endpoints = paired_rollouts(velocity, sigmas, numbers, branches, gamma)
            rewards = rewards_of(pipeline, endpoints, prompts)
            direction, difference = finite_differences(endpoints, rewards, branches)
        for x_t, t, v_old in tuples:
            v = velocity(x_t, t)
            loss = surrogate(v, v_old, direction, difference)
            if beta:
                with torch.no_grad(), model.disable_adapter():
                    base = velocity(x_t, t)
                loss = loss + beta * ((v - base) ** 2).mean(dim=(1, 2, 3))
            total = total + loss.mean() / 8  # two batches of four levels
    total.backward()

    expected = gradients_of(model)
    assert expected.keys() == gradients.first.keys()
    flat = lambda grads: torch.cat([grads[name].flatten() for name in sorted(grads)])
    assert flat(expected).norm() > 0
    assert (flat(gradients.first) - flat(expected)).norm() <= 1e-5 * flat(expected).norm()


# Learning from rewards ------------------------------------------------------------------------------------------------


def test_training_moves_every_lora_matrix_and_raises_the_reward(make_trainer):
    trainer = make_trainer(num_rollouts=30, prompts_per_rollout=8, per_device_prompt_batch_size=4, learning_rate=3e-3)
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    # The text stream of SD3's last block reaches the output only through its keys and values.
    unused = "transformer_blocks.1.attn.add_q_proj"
    for name in before:
        assert torch.equal(before[name], after[name]) == (unused in name and "lora_B" in name), name
    rewards = logged(trainer, "reward")
    assert sum(rewards[-5:]) > sum(rewards[:5])
    assert logged(trainer, "replay_error") == [0.0] * 30


def test_ratio_is_one_before_the_first_step(make_trainer):
    trainer = make_trainer(num_rollouts=1, optimizer_steps_per_rollout=1)
    trainer.train()
    assert logged(trainer, "ratio") == [1.0]
    assert logged(trainer, "clip_ratio") == [0.0]


def test_equal_rewards_change_nothing(make_trainer):
    trainer = make_trainer(reward_fn=lambda images: [1.0] * len(images), weight_decay=0.0)
    before = trained_weights(trainer)
    trainer.train()
    for name, weight in trained_weights(trainer).items():
        assert torch.equal(weight, before[name]), name
    assert logged(trainer, "frac_reward_zero_std") == [1.0, 1.0]


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
        assert all(value == value for value in logged(trainer, "reward")), "NaN"
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name])


def test_judge_trains_like_the_reward_whose_differences_it_gives(make_trainer):
    def compare(first, second, prompts):
        return redness(first, prompts) - redness(second, prompts)

    def trained(reward):
        trainer = make_trainer(reward_fn=reward)
        trainer.train()
        assert logged(trainer, "frac_reward_zero_std") == [0.0, 0.0]
        return trained_weights(trainer)

    expected = trained(redness)
    for name, weight in trained(PairwiseJudge(compare)).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


# The options of FDFO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["interval", "prior"])
def test_churn_schedules_train(make_trainer, schedule):
    trainer = make_trainer(churn_schedule=schedule, churn_kwargs={"spread": 0.3} if schedule == "prior" else None)
    before = trained_weights(trainer)
    trainer.train()
    assert any(not torch.equal(w, before[n]) for n, w in trained_weights(trainer).items())
    assert all(value > 0 for value in logged(trainer, "branch_rms"))
    gammas = trainer.noise_amounts(0, range(4))
    assert gammas.shape == (4, 5) and len({tuple(row) for row in gammas.tolist()}) == 4


def test_a_direction_that_is_not_whitened_trains_with_an_exact_replay(make_trainer):
    trainer = make_trainer(whiten_direction=False)
    before = trained_weights(trainer)
    trainer.train()
    assert logged(trainer, "replay_error") == [0.0, 0.0] and trainer.state.global_step == 4
    assert any(not torch.equal(w, before[n]) for n, w in trained_weights(trainer).items())


@pytest.mark.parametrize(("fraction", "levels"), [(0.25, {0}), (0.5, {0, 1})])
def test_the_first_levels_alone_are_trained(make_trainer, fraction, levels):
    trainer = make_trainer(
        timestep_selection="first", timestep_fraction=fraction, num_inference_steps=4, num_rollouts=1
    )
    drawn = [trainer.trained_levels(rollout, batch) for rollout in range(4) for batch in range(4)]
    assert {frozenset(of_batch) for of_batch in drawn} == {frozenset(levels)}
    # No optimizer step has one of the levels in all batches.
    assert {of_batch[0] for of_batch in drawn} == levels
    trainer.train()
    assert logged(trainer, "replay_error") == [0.0]


def test_reward_gradient_goes_through_the_decoder(make_trainer):
    trainer = make_trainer(direction="reward_gradient", num_rollouts=1)
    seen = []
    original = trainer._reward_gradient

    def keep(sampled, columns):
        seen.append((sampled, original(sampled, columns)))
        return seen[-1][1]

    trainer._reward_gradient = keep
    before = trained_weights(trainer)
    trainer.train()
    assert logged(trainer, "replay_error") == [0.0]
    assert any(not torch.equal(w, before[n]) for n, w in trained_weights(trainer).items())
    vae = trainer.pipeline.vae
    for sampled, gradient in seen:
        latents = sampled.endpoints.flatten(0, 1).detach().requires_grad_()
        # StableDiffusion3Pipeline decodes like this.
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        redness((decoded / 2 + 0.5).clamp(0, 1), None).sum().backward()
        assert gradient.any()
        torch.testing.assert_close(gradient, latents.grad.unflatten(0, (2, 2)))


class Recording(CLIPScore):
    """Keeps what it was given and what it answered."""

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        self.calls.append((images, prompts, scores.detach(), scores.requires_grad))
        return scores

    def on_rollout_end(self):
        super().on_rollout_end()
        self.calls.append("end")


def test_reward_gradient_of_a_packaged_reward(make_trainer, tmp_path):
    save_clip(tmp_path)
    reward = Recording(str(tmp_path), device="cpu", batch_size=3, offload=True)
    reward.calls = []
    trainer = make_trainer(reward_fn=reward, direction="reward_gradient", num_rollouts=1)
    before = trained_weights(trainer)
    trainer.train()
    assert any(not torch.equal(w, before[n]) for n, w in trained_weights(trainer).items())
    assert logged(trainer, "replay_error") == [0.0]
    # What is logged are the scores of PIL images, without gradients; those with gradients agree with them.
    *calls, end = reward.calls
    assert [requires_grad for *_, requires_grad in calls] == [False, False, True, True]
    assert end == "end", "the model leaves for the host when its gradients are taken"
    scores = torch.cat([scores for *_, scores, _ in calls[:2]])
    assert logged(trainer, "reward") == [pytest.approx(scores.double().mean().item(), rel=1e-9)]
    for (pil, prompts, scores, _), (images, same_prompts, with_gradient, _) in zip(calls[:2], calls[2:]):
        assert prompts == same_prompts
        assert torch.equal(scores, CLIPScore.__call__(reward, pil, prompts))
        assert [list(one.getdata()) for one in pil] == [list(one.getdata()) for one in to_pil(images.detach())]
        torch.testing.assert_close(with_gradient, scores, rtol=1e-5, atol=1e-4)


def test_a_reward_without_a_gradient_adds_its_finite_difference(make_trainer, caplog):
    compressibility = JPEGCompressibility()
    trainer = make_trainer(
        reward_fn=[redness, compressibility], reward_weights=[2.0, 0.5], direction="reward_gradient", num_rollouts=1
    )
    assert "takes the gradient of redness, and the finite difference of JPEGCompressibility" in caplog.text
    seen, targets = [], trainer.targets

    def keep(*arguments):
        seen.append((*arguments, targets(*arguments)))
        return seen[-1][-1]

    trainer.targets = keep
    trainer.train()
    assert len(seen) == 2 and logged(trainer, "replay_error") == [0.0]
    for sampled, total, _, (direction, reward_difference) in seen:
        endpoints = sampled.endpoints.detach().requires_grad_()
        images = trainer.flow.decode(sampled, endpoints.flatten(0, 1))
        redness(images, None).sum().backward()
        sizes = torch.tensor(compressibility(images=to_pil(images.detach())), dtype=torch.float64).unflatten(0, (2, 2))
        torch.testing.assert_close(total, 0.5 * sizes)
        difference = finite_difference(endpoints.detach(), 0.5 * sizes)
        expected = 2 * endpoints.grad + known_gradient(difference)
        # The update is n times the gradient of the total, for n elements of the latents.
        update = (direction * reward_difference[:, None, None, None]).unflatten(0, (2, 2)) / direction[0].numel()
        torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-6)
        assert known_gradient(difference).any()


def test_reward_gradient_of_rewards_that_have_none_is_refused_at_construction(make_trainer):
    def plain(images):
        return images.mean(dim=(1, 2, 3))

    plain.differentiable = False
    message = (
        "direction='reward_gradient' needs a reward that has a gradient, and none of JPEGCompressibility, plain has one"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(reward_fn=[JPEGCompressibility(), plain], direction="reward_gradient")


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
def test_reward_gradient_needs_a_finite_gradient(make_trainer, reward, message):
    with pytest.raises((ValueError, WatchdogError), match=message):
        make_trainer(reward_fn=reward, direction="reward_gradient").train()


def test_a_reward_that_cannot_have_a_gradient_is_refused_by_its_first_scores(make_trainer):
    batches = []

    def reward(images):
        batches.append(images)
        return images.mean(dim=(1, 2, 3)).tolist()

    with pytest.raises(ValueError, match="takes the gradient of 'reward', which returned a list without a gradient"):
        make_trainer(reward_fn=reward, direction="reward_gradient").train()
    assert len(batches) == 1
