"""A pipeline that draws noise after its latents are prepared: a replay and a decoding draw the same noise once more."""

from dataclasses import replace

import pytest
import tiny_pipelines
import torch
from tiny_pipelines import ltx

from trl_fdfo.fdfo.churn import constant_churn
from trl_fdfo.pipeline_flow import PipelineFlow


STEPS = 4
PROMPTS = ["a cat", "two dogs"]


def make_flow(build, call):
    return PipelineFlow(build(), num_generations=2, num_inference_steps=STEPS, **call)


def roll_out(flow, columns=None, prompts=PROMPTS):
    sigmas = flow.rehearse(prompts[:1], columns, 2).sigmas
    samples = len(prompts) * 2
    return flow.rollout(
        prompts, constant_churn(sigmas, 0.2), range(len(prompts)), range(10, 10 + samples), range(STEPS), columns
    )


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
