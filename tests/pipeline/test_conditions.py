"""
Noise that a pipeline draws after its latents are prepared is drawn once more in a replay and a decoding; tokens that are
conditions are kept.
"""

from dataclasses import replace

import pytest
import tiny_pipelines
import torch
from tiny_pipelines import conditioned, ltx, sana_wm

from trl_fdfo.fdfo.churn import constant_churn
from trl_fdfo.flow_grpo.scheduler import SDEScheduler
from trl_fdfo.pipeline_flow import PipelineFlow, ReplayError, check_replay


STEPS = 4
PROMPTS = ["a cat", "two dogs"]
CONDITION = ltx.CALLS_DENOISING_DECODER["plain"]


def make_flow(build, call, **options):
    return PipelineFlow(build(), num_generations=2, num_inference_steps=STEPS, **{**call, **options})


def roll_out(flow, columns=None, prompts=PROMPTS, gamma=0.2):
    sigmas = flow.rehearse(prompts[:1], columns, 2).sigmas
    samples = len(prompts) * 2
    return flow.rollout(
        prompts, constant_churn(sigmas, gamma), range(len(prompts)), range(10, 10 + samples), range(STEPS), columns
    )


def condition_rollout(**options):
    flow = make_flow(ltx.build_condition, CONDITION, **options)
    return flow, roll_out(flow, conditioned.image(1), PROMPTS[:1])


@torch.no_grad()
@pytest.mark.parametrize("name", ltx.CALLS_DENOISING_DECODER)
def test_a_decoder_that_draws_noise_draws_that_of_the_rollout(name):
    flow = make_flow(ltx.build_denoising_decoder, ltx.CALLS_DENOISING_DECODER[name])
    batch = roll_out(flow)
    endpoints = batch.endpoints.flatten(0, 1)
    for _ in range(2):
        assert torch.equal(flow.decode(batch, endpoints), batch.images)
    second = flow.split(replace(batch, images=None), [range(STEPS)] * 2)[1]
    assert torch.allclose(flow.decode(second, endpoints[2:]), batch.images[2:], atol=1e-5)
    other_noise = replace(batch, generator_states=batch.generator_states[::-1])
    assert (flow.decode(other_noise, endpoints) - batch.images).abs().max() > 1e-3


def test_what_draws_no_more_noise_keeps_no_states():
    for build, call in (
        (tiny_pipelines.sd3, {"height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": 8}),
        (ltx.build, ltx.CALLS["plain"]),
    ):
        batch = roll_out(make_flow(build, call))
        assert len(batch.generator_states) == 0


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"frame_index": 8}, {"image_cond_noise_scale": 0.0}], ids=str)
def test_noise_of_a_condition_is_drawn_once_more(options):
    flow, batch = condition_rollout(**options)
    for level in (*range(STEPS), 2, 0):
        assert torch.equal(flow.velocity(batch, level), batch.velocities[level])
    assert torch.equal(flow.decode(batch, batch.endpoints[0]), batch.images)
    if not options:
        other = [torch.Generator().manual_seed(5).get_state() for _ in batch.generator_states]
        with pytest.raises(ReplayError):
            wrong = flow.velocity(replace(batch, generator_states=other), 1)
            check_replay(wrong, batch.velocities[1], flow.pipeline, 1)


@pytest.mark.parametrize("gamma", [0.0, 0.2])
@pytest.mark.parametrize(
    ("build", "call"), [(ltx.build_condition, CONDITION), (sana_wm.build, sana_wm.CALLS["guided"])]
)
def test_tokens_of_a_condition_have_no_velocity_and_no_churn(build, call, gamma):
    flow = make_flow(build, call)
    batch = roll_out(flow, conditioned.image(1), PROMPTS[:1], gamma)
    first, second = batch.endpoints[0]
    tokens = len(first) // 2  # of each of two frames, of which the first is the image
    assert torch.equal(first[:tokens], second[:tokens])
    assert torch.equal(first[tokens:], second[tokens:]) == (gamma == 0)
    for velocity in batch.velocities.values():
        assert not velocity[:, :tokens].any() and velocity[:, tokens:].all()


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1], ids=["text", "image"])
def test_the_step_of_tokens_is_that_of_diffusers(count):
    columns = conditioned.image(1) if count else {}
    flow = make_flow(ltx.build_condition, CONDITION, image_cond_noise_scale=0.0, decode_noise_scale=0.0)
    # The branches see one sample of the image: here, all of its samples are equal.
    out = flow.pipeline.vae.encoder.conv_out.conv
    out.weight[4:], out.bias[4:] = 0.0, -30.0
    batch = roll_out(flow, columns, PROMPTS[:1], gamma=0.0)
    images = flow.pipeline(
        prompt=["a cat"],
        generator=[torch.Generator().manual_seed(0)],
        output_type="pt",
        return_dict=False,
        **flow.call_kwargs | columns,
    )[0]
    torch.testing.assert_close(batch.images[:1], images, rtol=0, atol=1e-5)


def test_a_condition_that_is_kept_in_part_is_refused():
    flow = make_flow(ltx.build_condition, CONDITION, strength=0.5)
    with pytest.raises(ValueError, match=r"timestep 500 in a step at 1000: .* Set the strength of each condition to 1"):
        flow.rehearse(PROMPTS[:1], conditioned.image(1), 2)


def test_a_likelihood_takes_a_condition_that_stays_as_it_is():
    flow, batch = condition_rollout(image_cond_noise_scale=0.0, scheduler_class=SDEScheduler)
    tokens = batch.x_t[0].shape[1] // 2
    for level, x_s in batch.x_s.items():
        assert torch.equal(x_s[:, :tokens], batch.x_t[level][:, :tokens])
        assert torch.equal(flow.velocity(batch, level), batch.velocities[level])
    with pytest.raises(ValueError, match="changes its latents between two steps"):
        condition_rollout(scheduler_class=SDEScheduler)
