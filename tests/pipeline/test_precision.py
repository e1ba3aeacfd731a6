"""Latents are float32 from `prepare_latents` to the VAE, and the VAE decodes in float32."""

import copy

import pytest
import tiny_pipelines
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import EACH_DEVICE
from torch import nn

from benchmarks import precision
from trl_fdfo.fdfo.churn import churn_start, churn_step, constant_churn
from trl_fdfo.flow_grpo.scheduler import SDEScheduler
from trl_fdfo.offload import offload_until_called
from trl_fdfo.pipeline.patch import in_float32
from trl_fdfo.pipeline_flow import PipelineFlow


STEPS, CHURN = 6, 0.0025
SETTINGS = {"height": 16, "width": 16, "max_sequence_length": 8, "guidance_scale": 1.0}


def make_flow(pipeline=None, **options):
    pipeline = pipeline or tiny_pipelines.sd3().to(torch.bfloat16)
    return PipelineFlow(pipeline, num_generations=2, num_inference_steps=STEPS, **{**SETTINGS, **options})


def roll_out(flow, churn=CHURN):
    amounts = constant_churn(flow.rehearse(["a"]).sigmas, churn)
    return flow.rollout(["a cat", "the sea"], amounts, [0, 1], [10, 11, 12, 13], range(STEPS))


@pytest.mark.parametrize(
    ("guidance_scale", "dtype"),
    [(1.0, torch.bfloat16), (1.0, torch.float16), (2.0, torch.float16), (4.5, torch.float16)],
)
def test_mixed_precision_keeps_the_difference_of_two_images(guidance_scale, dtype):
    errors = precision.errors(guidance_scale, 8, dtype)
    assert all(errors[name] <= limit for name, limit in precision.LIMITS.items()), errors


def test_guidance_multiplies_the_rounding_of_bfloat16():
    # The bounds of docs/pipelines.md; latents that are rounded after each step give 3e-2.
    assert precision.errors(2.0, 8, torch.bfloat16)["half difference"] <= 4e-3
    assert precision.errors(4.5, 8, torch.bfloat16)["half difference"] <= 1e-2


def test_latents_are_not_rounded_between_the_steps():
    flow = make_flow()
    batch = roll_out(flow)
    assert batch.endpoints.dtype == torch.float32
    # The sampler by hand, in float32, from the recorded velocities.
    sigmas = flow.rehearse(["a"]).sigmas
    generators = [torch.Generator().manual_seed(seed) for seed in (10, 11, 12, 13)]
    draw = lambda: torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s), dtype=torch.bfloat16) for s in (0, 1)]
    x = churn_start(torch.cat(noise).float().repeat_interleave(2, dim=0), CHURN, draw())
    for level in range(STEPS):
        # The pipeline, and so its replay, has the latents in its own dtype.
        assert torch.equal(batch.x_t[level], x.to(torch.bfloat16))
        assert batch.velocities[level].dtype == torch.float32
        churn, noise = (CHURN, draw()) if level < STEPS - 1 else (0.0, torch.zeros_like(x))
        x = churn_step(x, batch.velocities[level], sigmas[level], sigmas[level + 1], churn, noise)
    torch.testing.assert_close(batch.endpoints.flatten(0, 1), x, rtol=0, atol=1e-6)


def test_a_likelihood_gets_the_latents_in_float32():
    flow = make_flow(scheduler_class=SDEScheduler)
    batch = roll_out(flow, churn=0.3)
    for level in range(STEPS):
        assert batch.x_t[level].dtype == batch.x_s[level].dtype == torch.float32
        assert torch.equal(flow.velocity(batch, level), batch.velocities[level])
        if level:
            assert torch.equal(batch.x_t[level], batch.x_s[level - 1])


def test_the_vae_decodes_in_float32_and_is_left_in_its_own_dtype():
    flow = make_flow()
    pipeline = flow.pipeline
    exact = copy.deepcopy(pipeline.vae).float()
    before = dict(pipeline.vae.named_parameters())
    batch = roll_out(flow)
    latents = batch.endpoints.flatten(0, 1) / 1.5 + 0.1
    with torch.no_grad():
        expected = (exact.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(batch.images, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.decode(batch, batch.endpoints.flatten(0, 1)), expected, rtol=0, atol=1e-6)
    assert all(weight is before[name] for name, weight in pipeline.vae.named_parameters())
    assert pipeline.vae.dtype == torch.bfloat16
    # The user's own call still works.
    generator = torch.Generator().manual_seed(0)
    images = pipeline("a cat", generator=generator, num_inference_steps=STEPS, output_type="pt", **SETTINGS)[0]
    torch.testing.assert_close(images.float(), flow.generate(["a cat"], [0]), rtol=0, atol=0.03)


@EACH_DEVICE
def test_an_offloaded_vae_comes_to_the_device_before_it_is_upcast(device):
    came = []

    class Arrivals(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            came.append(module.dtype)
            return args, kwargs

    flow = make_flow(tiny_pipelines.sd3().to(device, torch.bfloat16))
    vae = flow.pipeline.vae
    hook = offload_until_called(vae, torch.device(device))
    add_hook_to_module(vae, Arrivals(), append=True)
    for _ in range(2):
        came.clear()
        roll_out(flow)
        # What comes first is what moves, and what stays pinned in host memory.
        assert came[0] == torch.bfloat16
        assert {(weight.device.type, weight.dtype) for weight in vae.parameters()} == {(device, torch.bfloat16)}
    hook.offload()
    assert {(weight.device.type, weight.dtype) for weight in vae.parameters()} == {("cpu", torch.bfloat16)}


def test_a_gradient_passes_through_a_vae_of_16_bits():
    flow = make_flow()
    batch = roll_out(flow)
    flow.pipeline.vae.requires_grad_(False)
    endpoints = batch.endpoints.flatten(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(flow.decode(batch, endpoints).sum(), endpoints)
    exact = make_flow(copy.deepcopy(flow.pipeline).to(torch.float32))
    (expected,) = torch.autograd.grad(exact.decode(batch, endpoints).sum(), endpoints)
    torch.testing.assert_close(gradient, expected)


def test_decoding_ignores_autocast():
    flow = make_flow(tiny_pipelines.sd3())
    expected = roll_out(flow).images
    with torch.autocast("cpu", torch.bfloat16):
        batch = roll_out(flow)
    with torch.no_grad():
        latents = batch.endpoints.flatten(0, 1) / 1.5 + 0.1
        assert torch.equal(batch.images, (flow.pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    assert not torch.equal(batch.images, expected)  # the transformer's autocast


def test_only_weights_of_16_bits_are_float32_for_a_while():
    module = nn.Sequential(nn.Linear(2, 2).to(torch.bfloat16), nn.BatchNorm1d(2))
    module[1].weight = module[0].bias  # shared
    weights, dtypes = list(module.parameters()), [buffer.dtype for buffer in module.buffers()]
    with in_float32(module):
        assert all(weight.dtype == torch.float32 for weight in module.parameters())
        assert module[1].weight is module[0].bias
        assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(module.parameters(), weights))
        assert module[1].num_batches_tracked.dtype == torch.int64
    assert all(a is b for a, b in zip(module.parameters(), weights, strict=True))
    assert [buffer.dtype for buffer in module.buffers()] == dtypes
    with pytest.raises(ZeroDivisionError), in_float32(module):
        raise ZeroDivisionError
    assert module[0].weight is weights[0]
    quantised = nn.Linear(2, 2).to(torch.bfloat16)
    quantised.packed = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with in_float32(quantised):
        assert quantised.weight.dtype == torch.bfloat16
