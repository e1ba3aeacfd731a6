import contextlib
import functools
import io
import logging
import pickle
from dataclasses import replace

import numpy as np
import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoencoderKL,
    ClassifierFreeGuidance,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from tiny_pipelines import (
    ace_step,
    conditioned,
    cosmos,
    flux2_klein,
    helios,
    hunyuan_video,
    ideogram4,
    kandinsky5_video,
    longcat_image,
    sana_video,
    skyreels_v2,
    wan,
    wan_video,
)
from tiny_pipelines.families import FAMILIES, columns_of
from torch.utils._pytree import tree_leaves

from trl_fdfo import FDFOTrainer
from trl_fdfo.fdfo.churn import constant_churn
from trl_fdfo.fdfo.scheduler import ChurnScheduler
from trl_fdfo.flow_grpo.scheduler import SDEScheduler
from trl_fdfo.pipeline import checks, schedulers
from trl_fdfo.pipeline.checks import check_pipeline
from trl_fdfo.pipeline.encoder_offload import EncoderOffload
from trl_fdfo.pipeline.patch import State, warned_once
from trl_fdfo.pipeline.records import OncePerPrompt, host_copy, once_per_prompt, repeated
from trl_fdfo.pipeline_flow import PipelineFlow, ReplayError, check_replay


STEPS = 4
PROMPTS = ["a cat", "two dogs", "the sea"]

PIPELINES = {
    "sd3": (tiny_pipelines.sd3, {"guidance_scale": 1.0}),
    "sd3 guided": (tiny_pipelines.sd3, {"guidance_scale": 4.0, "negative_prompt": "bad"}),
    "sd3 with T5": (lambda: tiny_pipelines.sd3(with_t5=True), {"guidance_scale": 1.0}),
    "sd3 with T5 guided": (lambda: tiny_pipelines.sd3(with_t5=True), {"guidance_scale": 4.0}),
    "flux": (tiny_pipelines.flux, {"guidance_scale": 3.5}),
    "flux without guidance": (lambda: tiny_pipelines.flux(guidance_embeds=False), {}),
    "flux true guidance": (tiny_pipelines.flux, {"true_cfg_scale": 3.0, "negative_prompt": "bad"}),
}


def make_flow(name="sd3", dtype=torch.float32, branches=2, pipeline=None, **call_kwargs):
    build, settings = PIPELINES[name]
    return PipelineFlow(
        pipeline if pipeline is not None else build().to(dtype),
        num_generations=branches,
        num_inference_steps=STEPS,
        **{"height": 16, "width": 16, "max_sequence_length": 8, **settings, **call_kwargs},
    )


def roll_out(flow, gamma=0.2, seed=0, levels=range(STEPS)):
    samples = len(PROMPTS) * flow.num_generations
    return flow.rollout(
        PROMPTS,
        noise_amounts=constant_churn(flow.rehearse(["a"]).sigmas, gamma),
        seeds=[seed + n for n in range(len(PROMPTS))],
        noise_seeds=[seed + 1000 + n for n in range(samples)],
        levels=levels,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PIPELINES)
def test_replay_is_exact_and_has_gradients(name, dtype):
    flow = make_flow(name, dtype)
    batch = roll_out(flow)
    assert set(batch.velocities) == set(range(STEPS))
    for level in range(STEPS):
        velocity = flow.velocity(batch, level)
        assert torch.equal(velocity, batch.velocities[level])
        assert check_replay(velocity, batch.velocities[level], flow.pipeline, level) == 0.0
        parameter = next(flow.pipeline.transformer.parameters())
        assert torch.autograd.grad(velocity.float().square().sum(), parameter)[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_replay_of_another_step_or_other_latents_is_far_from_exact(name):
    flow = make_flow(name)
    batch, other = roll_out(flow), roll_out(flow, seed=77)
    exact = flow.velocity(batch, 1)
    for wrong in (batch.velocities[2], other.velocities[1]):
        with pytest.raises(ReplayError):
            check_replay(exact, wrong, flow.pipeline, 1)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_embeddings_are_recorded_once_per_prompt(name):
    flow = make_flow(name, branches=3)
    batch = roll_out(flow)
    prompts, branches = batch.endpoints.shape[:2]
    assert branches == 3
    embeddings = batch.remembered["encode_prompt"][0][0]
    assert isinstance(embeddings, OncePerPrompt) and len(embeddings.rows) == prompts and embeddings.times == 3
    assert embeddings.rows.untyped_storage().nbytes() == embeddings.rows.nbytes
    repeats = repeated(batch.remembered["encode_prompt"])
    for found, encoded in zip(repeats[0], flow.encode(PROMPTS, 3)[0], strict=True):
        assert found is encoded is None or torch.equal(found, encoded)


@pytest.mark.parametrize(
    ("prompts", "rows"), [(["a", "a", "b", "b"], 2), (["a", "a", "b"], 3), (["a"], 1), (["a", "b", "a", "b"], 4)]
)
def test_an_evaluation_keeps_the_embeddings_of_a_prompt_once(prompts, rows):
    flow = make_flow()
    assert flow.encode_ahead(prompts) is None  # the text encoders stay on the device
    flow.encoders = EncoderOffload([], flow.pipeline.transformer, torch.device("cpu"))
    encoded = flow.encode_ahead(prompts)
    assert len(encoded[0][0].rows) == rows
    images = flow.generate(prompts, range(len(prompts)), encoded=encoded)
    assert torch.equal(images, flow.generate(prompts, range(len(prompts))))
    wrong = flow.encode_ahead(["another prompt"] * len(prompts))
    assert not torch.equal(images, flow.generate(prompts, range(len(prompts)), encoded=wrong))


def test_what_branches_do_not_share_is_recorded_whole():
    rows = torch.arange(12.0).reshape(4, 3)
    shared, apart = rows.repeat_interleave(2, dim=0), rows.repeat(2, 1)
    listed = [row for row in rows for _ in range(2)]
    value = [(shared, apart, None, 3), {"list": listed, "others": list(apart), "odd": rows[:3]}]
    kept = once_per_prompt(value, 2, 8)
    assert torch.equal(kept[0][0].rows, rows) and kept[0][1:] == (apart, None, 3)
    assert len(kept[1]["list"].rows) == 4 and kept[1]["odd"] is value[1]["odd"]
    assert type(kept[1]["others"]) is list and len(kept[1]["others"]) == 8
    back = repeated(host_copy(kept))
    assert torch.equal(back[0][0], shared) and torch.equal(torch.stack(back[1]["list"]), torch.stack(listed))


@pytest.mark.parametrize("name", ["sd3 guided", "flux"])
def test_zero_churn_gives_identical_branches_and_the_plain_pipeline(name):
    flow = make_flow(name)
    batch = roll_out(flow, gamma=0.0)
    assert torch.equal(batch.endpoints[:, 0], batch.endpoints[:, 1])
    # The user's own call, with diffusers' own scheduler.
    plain = flow.pipeline(
        **batch.call_kwargs | {"generator": [torch.Generator().manual_seed(n // 2) for n in range(6)]}
    )
    assert torch.equal(batch.images, plain[0])
    torch.testing.assert_close(flow.generate(PROMPTS, [0, 1, 2]), plain[0][::2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_branches_share_their_noise_and_prompts_do_not(name):
    flow = make_flow(name, branches=3)
    first = roll_out(flow, gamma=0.01).x_t[0].unflatten(0, (3, 3))
    within = (first[:, 0] - first[:, 1]).square().mean().sqrt()
    across = (first[0, 0] - first[1, 0]).square().mean().sqrt()
    # Two branches with correlation (1 / 1.01)^2, two independent noises.
    assert within.item() == pytest.approx((2 - 2 / 1.01**2) ** 0.5, rel=0.2)
    assert across.item() == pytest.approx(2**0.5, rel=0.2)


def test_a_sample_does_not_depend_on_its_batch():
    flow = make_flow()
    whole = roll_out(flow)
    alone = flow.rollout(PROMPTS[1:2], constant_churn(flow.rehearse(["a"]).sigmas, 0.2), [1], [1002, 1003], [0])
    torch.testing.assert_close(alone.endpoints, whole.endpoints[1:2], rtol=0, atol=1e-5)


def test_churn_of_each_prompt_is_its_own():
    flow = make_flow()
    gammas = torch.zeros(3, STEPS + 1)
    gammas[1, 0] = 0.5
    batch = flow.rollout(PROMPTS, gammas, [0, 1, 2], list(range(6)), levels=[])
    assert torch.equal(batch.endpoints[0, 0], batch.endpoints[0, 1])
    assert not torch.equal(batch.endpoints[1, 0], batch.endpoints[1, 1])
    assert batch.x_t == {}


def test_images_are_floats_in_the_unit_interval():
    batch = roll_out(make_flow(dtype=torch.bfloat16))
    assert batch.images.shape == (6, 3, 16, 16) and batch.images.dtype == torch.float32
    assert 0 <= batch.images.min() and batch.images.max() <= 1
    assert batch.endpoints.shape == (3, 2, 4, 8, 8)


def test_pipeline_is_left_as_it_was():
    flow = make_flow()
    pipeline = flow.pipeline
    before, config = dict(pipeline.__dict__), dict(pipeline.config)
    batch = roll_out(flow)
    flow.velocity(batch, 0)
    flow.generate(["a"], [0])
    with pytest.raises(StopIteration):
        flow.velocity(replace(batch, remembered={"encode_prompt": [], "prepare_latents": []}), 0)
    changed = {name for name in pipeline.__dict__ if pipeline.__dict__[name] is not before.get(name)}
    # The pipeline's own call sets such names.
    assert all(name.startswith("_") for name in changed), changed
    assert "encode_prompt" not in pipeline.__dict__
    assert dict(pipeline.config) == config
    assert pipeline.scheduler is before["scheduler"] and pipeline.transformer is before["transformer"]


def test_calls_go_to_the_wrapped_model_and_attributes_to_the_module():
    flow = make_flow()
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(kwargs["timestep"])
        return flow.pipeline.__dict__["transformer"]._module(*args, **kwargs)

    flow.model = wrapped
    batch = roll_out(flow)
    del calls[:-STEPS]  # calls of a rehearsal
    flow.velocity(batch, 2)
    assert len(calls) == STEPS + 1 and torch.equal(calls[-1], calls[2])


def test_dropout_fires_the_self_check_with_the_cure():
    flow = make_flow()
    transformer = flow.pipeline.transformer.train()
    transformer.proj_out = torch.nn.Sequential(transformer.proj_out, torch.nn.Dropout(0.3))
    batch = roll_out(flow)
    with pytest.raises(ReplayError, match=r"(?s)StableDiffusion3Pipeline is not exact.*step 1.*Likely causes: dropout"):
        check_replay(flow.velocity(batch, 1), batch.velocities[1], flow.pipeline, 1)


def test_nan_fails_the_self_check():
    flow = make_flow()
    with pytest.raises(ReplayError, match="by nan of its rms"):
        check_replay(torch.full((2, 3), torch.nan), torch.ones(2, 3), flow.pipeline, 0)


def test_unknown_argument_is_refused_with_those_that_are_taken():
    with pytest.raises(
        ValueError, match=r"does not take true_cfg_scale in its call. It takes: prompt, .*max_sequence_length"
    ):
        make_flow("sd3", true_cfg_scale=2.0)


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [("sd3", {"height": 18}, "16 and 20"), ("flux", {"width": 13}, "12 and 16"), ("sd3", {"width": 0}, "4 and 8")],
)
def test_resolution_that_is_no_multiple_is_refused_with_the_nearest(name, size, nearest):
    with pytest.raises(
        ValueError, match=rf"={next(iter(size.values()))} is not a multiple of 4.*nearest that work: {nearest}"
    ):
        make_flow(name, **size)


def test_frames_that_the_pipeline_rounds_are_named_once(caplog):
    caplog.set_level("WARNING")
    flow = PipelineFlow(
        wan.build(), num_generations=2, num_inference_steps=2, **{**wan.CALLS["plain"], "num_frames": 6}
    )
    for _ in range(2):
        flow.rehearse(["a cat"])
    assert "num_frames=6, and WanPipeline makes videos of 5 frames. Set num_frames=5" in caplog.text


def test_a_warning_of_diffusers_is_given_once():
    given = io.StringIO()
    handler, logger = logging.StreamHandler(given), logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.WARNING)  # a program that another test has run may have set it
    logger.addHandler(handler)
    try:
        for _ in range(3):
            with warned_once():
                logging.getLogger("diffusers.pipelines.a_test").warning("a warning of each call")
        assert given.getvalue() == "a warning of each call\n"
        logging.getLogger("diffusers.pipelines.a_test").warning("a warning of each call")
        assert given.getvalue() == 2 * "a warning of each call\n"
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_a_call_that_lacks_an_image_is_told_where_it_comes_from():
    build = functools.partial(PipelineFlow, wan_video.small_image_to_video(), num_generations=2, num_inference_steps=2)
    flow = build(**wan_video.VIDEO, guidance_scale=1.0)
    with pytest.raises(ValueError, match="It needs image: give a column of that name in `pipeline_columns`"):
        flow.rehearse(["a cat"])
    with pytest.raises(ValueError, match="image names no file from here, such as 'no.png'"):
        flow.rehearse(["a cat"], {"image": ["no.png"]})


def test_epsilon_prediction_is_refused():
    tokenizer = tiny_pipelines.clip_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=tiny_pipelines.clip_encoder(tokenizer, tiny_pipelines.CLIPTextModel),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4,
            cross_attention_dim=16,
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with pytest.raises(
        ValueError, match="StableDiffusionPipeline cannot be trained: DDIMScheduler is not a flow-matching"
    ):
        check_pipeline(pipeline)


def test_stochastic_sampling_is_refused():
    pipeline = tiny_pipelines.sd3()
    pipeline.scheduler = tiny_pipelines.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="stochastic_sampling=True"):
        check_pipeline(pipeline)


def flow_sampler(scheduler_class):
    return scheduler_class(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


class SquaredLevels(FlowMatchEulerDiscreteScheduler):
    """Noise levels of its own, which its config does not tell."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self.sigmas, self.timesteps = self.sigmas**2, 1000 * self.sigmas[:-1] ** 2


class OwnStep(FlowMatchEulerDiscreteScheduler):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


def shifted(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_shift(shift)
    return scheduler


@pytest.mark.parametrize(
    ("scheduler", "levels"),
    [
        (UniPCMultistepScheduler, [1, 0.9, 0.75, 0.5, 0]),
        (DPMSolverMultistepScheduler, [1, 0.9, 0.75, 0.5, 0]),
        (lambda: FlowMatchHeunDiscreteScheduler(shift=3.0), [1, 0.8577, 0.6022, 0.00893, 0]),
        (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), [1, 0.8577, 0.6022, 0.00893, 0]),
        (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True), [1, 0.8577, 0.6022, 0.00893, 0]),
        (lambda: shifted(7.0), [1, 0.9336, 0.7793, 0.02059, 0]),
        (lambda: SquaredLevels(shift=3.0), [1, 0.7356, 0.3626, 0.0000797, 0]),
    ],
    ids=["UniPC", "DPM++", "Heun", "Euler", "inverted", "set_shift", "subclass"],
)
def test_noise_levels_are_those_of_the_scheduler_that_was_given(scheduler, levels):
    pipeline = tiny_pipelines.sd3()
    pipeline.scheduler = flow_sampler(scheduler) if isinstance(scheduler, type) else scheduler()
    given = pipeline.scheduler
    flow = make_flow(pipeline=pipeline)
    torch.testing.assert_close(flow.rehearse(["a"]).sigmas, torch.tensor(levels).float(), rtol=2e-3, atol=1e-6)
    batch = roll_out(flow)
    for level in range(STEPS):
        assert torch.equal(flow.velocity(batch, level), batch.velocities[level])
    # Without churn a rollout is Euler's sampler between these levels.
    plain = roll_out(flow, gamma=0.0)
    sigmas = flow.rehearse(["a"]).sigmas
    x = plain.x_t[0]
    for level in range(STEPS):
        torch.testing.assert_close(plain.x_t[level], x)
        x = x + (sigmas[level + 1] - sigmas[level]) * plain.velocities[level]
    torch.testing.assert_close(plain.endpoints.flatten(0, 1), x)
    torch.testing.assert_close(flow.generate(PROMPTS, [0, 1, 2]), plain.images[::2], rtol=0, atol=1e-5)
    assert pipeline.scheduler is given and type(given) is type(flow.pipeline.scheduler)
    if type(given).step is FlowMatchEulerDiscreteScheduler.step:
        # The user's own call.
        arguments = plain.call_kwargs | {"generator": [torch.Generator().manual_seed(n // 2) for n in range(6)]}
        assert torch.equal(plain.images, pipeline(**arguments)[0])


@pytest.mark.parametrize("make", [lambda: OwnStep(shift=3.0), lambda: flow_sampler(UniPCMultistepScheduler)])
def test_a_step_that_is_replaced_is_named(make, caplog):
    schedulers.logger.warning_once.cache_clear()  # another test in this process may have been warned
    pipeline = tiny_pipelines.sd3()
    pipeline.scheduler = make()
    make_flow(pipeline=pipeline)
    name = type(pipeline.scheduler).__name__
    assert f"Euler's steps replace those of {name}, between the noise levels of {name}" in caplog.text


@pytest.mark.parametrize(
    ("guidance_embeds", "guidance_scale", "warned"), [(True, 1.0, True), (True, 3.5, False), (False, 1.0, False)]
)
def test_no_guidance_for_a_guidance_distilled_model_is_warned_of(guidance_embeds, guidance_scale, warned, caplog):
    checks.logger.warning_once.cache_clear()  # another test in this process may have been warned
    make_flow(pipeline=tiny_pipelines.flux(guidance_embeds), guidance_scale=guidance_scale)
    message = "guidance_scale=1.0 does not turn guidance off in this FluxPipeline"
    assert (message in caplog.text and "Set guidance_scale=3.5" in caplog.text) is warned


class LevelsAlone(type(tiny_pipelines.sd3())):
    """Its call has no number of steps."""

    def __call__(self, prompt, sigmas=(1.0, 0.5), generator=None, output_type="pil", return_dict=True):
        return super().__call__(
            prompt, None, None, 16, 16, 28, sigmas, 1.0, generator=generator, output_type=output_type, return_dict=False
        )


def test_a_pipeline_that_takes_noise_levels_alone_takes_as_many_steps():
    pipeline = LevelsAlone(**parts_of(tiny_pipelines.sd3()))
    flow = PipelineFlow(pipeline, num_generations=2, num_inference_steps=3, sigmas=[1.0, 0.6, 0.3])
    assert len(flow.rehearse(["a"]).sigmas) == 4
    assert flow.try_replay(["a cat"])[0] == 0.0
    with pytest.raises(ValueError, match="does not take num_inference_steps in its call. It takes: prompt, sigmas"):
        PipelineFlow(pipeline, num_generations=2, num_inference_steps=3)


def test_noise_levels_that_do_not_fall_are_refused():
    pipeline = tiny_pipelines.sd3()
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="sigma_min"
    )
    with pytest.raises(
        ValueError, match=r"noise levels of StableDiffusion3Pipeline must fall .*take another scheduler"
    ):
        make_flow(pipeline=pipeline).rehearse(["a"])


def test_a_shift_that_is_set_later_changes_no_noise_level_of_the_flow():
    flow = make_flow()
    before = flow.rehearse(["a"]).sigmas
    flow.pipeline.scheduler.set_shift(7.0)
    assert torch.equal(flow.rehearse(["a"]).sigmas, before)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            cosmos.text_to_image_2,
            cosmos.SMALL,
            r"noise levels of the FlowMatchEulerDiscreteScheduler reach 80: .* \[0, 1\]",
        ),
        (helios.build, {**helios.SMALL, "num_frames": 10}, "more steps than the 4 of its schedule, .* a single chunk"),
        (
            skyreels_v2.forcing,
            {**skyreels_v2.VIDEO, "ar_step": 1},
            r"a part of its latents at timestep 999 while others are at 889, .* such as by ar_step=0",
        ),
    ],
    ids=["noise levels above 1", "several chunks", "noise levels of frames"],
)
def test_sampling_that_is_no_single_flow_is_refused(build, options, message):
    flow = PipelineFlow(build(), num_generations=2, num_inference_steps=STEPS, **options)
    with pytest.raises(ValueError, match=message):
        flow.rehearse(PROMPTS[:1], samples_per_prompt=2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "options", "columns", "calls"),
    [
        (skyreels_v2.forcing, {**skyreels_v2.VIDEO, "num_frames": 9}, {}, 3),
        (skyreels_v2.forcing, {**skyreels_v2.VIDEO, "num_inference_steps": 1}, {}, 2),
        (skyreels_v2.forcing_image_to_video, skyreels_v2.VIDEO, conditioned.image(1), 1),
    ],
    ids=["text", "one step", "image"],
)
def test_frames_with_schedulers_of_their_own_are_denoised_together(build, options, columns, calls):
    pipeline = build()
    # A step of this solver without its corrector is Euler's.
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=8.0,
        solver_order=1,
        disable_corrector=list(range(STEPS)),
    )
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, **options}
    flow, unrehearsed = (PipelineFlow(pipeline, num_generations=2, **options) for _ in range(2))
    some = flow.rehearse(["a cat"], columns, 2)
    steps = len(some.sigmas) - 1
    batch, plain = (
        flow.rollout(["a cat"], constant_churn(some.sigmas, gamma), [0], [1, 2], range(steps), columns)
        for gamma in (0.2, 0.0)
    )
    for level in (*range(steps), 0):
        assert torch.equal(flow.velocity(batch, level), batch.velocities[level])
        assert batch.velocities[level][0].numel() == calls * 4 * 4 * 4  # channels of a frame of 4 x 4
    assert torch.equal(flow.decode(batch, batch.endpoints[0]), batch.images)
    for level in range(1, steps):
        with pytest.raises(ReplayError):
            wrong = flow.velocity(replace(batch, x_t={level: plain.x_t[level]}), level)
            check_replay(wrong, batch.velocities[level], pipeline, level)
    arguments = {"generator": [torch.Generator().manual_seed(0)], "output_type": "pt", "return_dict": False}
    arguments |= {name: values[0] for name, values in columns.items()}
    images = pipeline(prompt=["a cat"], **flow.call_kwargs | arguments)[0]
    for made in (plain.images[:1], unrehearsed.generate(["a cat"], [0], columns)):
        torch.testing.assert_close(made, images.float(), rtol=0, atol=1e-4)
    if "num_frames" in options and not columns:
        other = 14 - options["num_frames"]
        assert flow.generate(["a cat"], [0], num_frames=other).shape[1] == other
        assert flow.generate(["a cat"], [0]).shape[1] == options["num_frames"]


def test_sdxl_is_refused():
    tokenizers = [tiny_pipelines.clip_tokenizer(), tiny_pipelines.clip_tokenizer()]
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        cross_attention_dim=32,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_pipelines.vae(),
        text_encoder=tiny_pipelines.clip_encoder(tokenizers[0], tiny_pipelines.CLIPTextModel),
        text_encoder_2=tiny_pipelines.clip_encoder(tokenizers[1]),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    with pytest.raises(
        ValueError, match="StableDiffusionXLPipeline cannot be trained.* EulerDiscreteScheduler is not a"
    ):
        check_pipeline(pipeline)


@pytest.mark.parametrize("loops", [2, 0])
def test_a_pipeline_that_does_not_step_through_its_schedule_once_is_refused(loops):
    class Loops(type(tiny_pipelines.sd3())):
        @functools.wraps(StableDiffusion3Pipeline.__call__)
        def __call__(self, *args, **kwargs):
            step = self.scheduler.step
            # Twice in each step, as a sampler of its own would; or never.
            self.scheduler.step = lambda *args, **kwargs: [step(*args, **kwargs) for _ in range(loops)][-1]
            return super().__call__(*args, **kwargs)

    flow = make_flow(pipeline=Loops(**tiny_pipelines.sd3().components))
    with pytest.raises(ValueError, match="more steps than the 4 of its|Loops cannot be called"):
        flow.rehearse(["a cat"])


class Minimal(DiffusionPipeline):
    """The parts that a pipeline must have, and some that it must not."""

    _optional_components = ["transformer_2", "guider"]

    def __init__(self, transformer, scheduler, transformer_2=None, guider=None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, transformer_2=transformer_2, guider=guider)

    def encode_prompt(self): ...

    def prepare_latents(self): ...

    def __call__(self, prompt, latents):
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.transformer(latents, t), t, latents)[0]
        return latents


@pytest.mark.parametrize("call", ["guided", "guided in some steps"])
def test_guidance_with_momentum_is_replayed_from_the_outputs_of_earlier_steps(call):
    family = ace_step.FAMILIES["ACE-Step with momentum (audio)"]
    columns = family.images(1)
    flow = PipelineFlow(family.build(), num_generations=2, num_inference_steps=STEPS, **family.calls[call])
    noise = constant_churn(flow.rehearse(["a cat"], columns).sigmas, 0.2)
    batch = flow.rollout(["a cat"], noise, [0], [1, 2], range(STEPS), columns)
    for kept in (batch, batch.on_host()):
        for level in range(STEPS):
            assert torch.equal(flow.velocity(kept, level), batch.velocities[level])


def test_a_guidance_object_needs_the_outputs_if_its_momentum_is_on():
    parts = [tiny_pipelines.sd3().transformer, FlowMatchEulerDiscreteScheduler()]
    with_momentum = AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5)
    for guider, kept in (
        (ClassifierFreeGuidance(), False),
        (AdaptiveProjectedGuidance(), False),
        (with_momentum, True),
    ):
        assert PipelineFlow(Minimal(*parts, guider=guider), num_generations=2).keeps_outputs == kept


def test_feature_cache_is_refused():
    pipeline = tiny_pipelines.flux()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"feature cache on.*`pipeline.transformer.disable_cache\(\)`"):
        check_pipeline(pipeline)
    pipeline.transformer.disable_cache()
    check_pipeline(pipeline)


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(ValueError, match="must be a `DiffusionPipeline`.*not StableDiffusion3Pipeline itself"):
        check_pipeline(type(tiny_pipelines.sd3()))
    with pytest.raises(ValueError, match="not a SD3Transformer2DModel"):
        check_pipeline(tiny_pipelines.sd3().transformer)


def test_skip_layer_guidance_depends_on_the_step_and_is_replayed():
    settings = {"guidance_scale": 4.0, "skip_guidance_layers": [0], "skip_layer_guidance_start": 0.2}
    flow = make_flow(**settings, skip_layer_guidance_stop=0.6)
    batch = roll_out(flow)
    for level in range(STEPS):
        assert torch.equal(flow.velocity(batch, level), batch.velocities[level])
    # Steps 1 and 2 are within (0.2, 0.6) x 4 and skip layers: without that they would differ.
    plain = replace(batch, call_kwargs={**batch.call_kwargs, "skip_guidance_layers": None})
    for level in range(STEPS):
        assert torch.equal(flow.velocity(plain, level), batch.velocities[level]) == (level not in (1, 2))


def test_attention_processors_are_back_after_a_replay_is_cut_short():
    flow = make_flow(pipeline=conditioned.sd3_pag(), guidance_scale=1.0)
    before = dict(flow.pipeline.transformer.attn_processors)
    batch = roll_out(flow)
    for level in range(STEPS):
        assert torch.equal(flow.velocity(batch, level), batch.velocities[level])
        assert flow.pipeline.transformer.attn_processors == before


def test_transformer_can_be_pickled_after_a_replay():
    flow = make_flow()
    flow.velocity(roll_out(flow), 1)
    other = pickle.loads(pickle.dumps(flow.pipeline.transformer))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), flow.pipeline.transformer.parameters()))


def test_branches_see_the_same_image_and_share_their_noise():
    flow = make_flow(pipeline=conditioned.img2img(), strength=1.0)
    columns = conditioned.image(1)
    sigmas = flow.rehearse(["a"], columns, 2).sigmas
    batch = flow.rollout(["a cat"], constant_churn(sigmas, 0.0), [0], [1, 2], range(STEPS), columns)
    assert torch.equal(batch.x_t[0][0], batch.x_t[0][1])
    assert torch.equal(batch.endpoints[:, 0], batch.endpoints[:, 1])
    # At strength 1 the initial latents are the noise of the seed alone.
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    packed = flow.pipeline._pack_latents(latents, 1, 4, 8, 8)
    assert torch.equal(batch.x_t[0][:1], packed)


def test_an_image_that_is_part_of_the_latents_gets_no_churn():
    columns = conditioned.image(1)
    flow = PipelineFlow(
        sana_video.image_to_video(), num_generations=2, num_inference_steps=STEPS, **sana_video.CALLS["plain"]
    )
    sigmas = flow.rehearse(PROMPTS[:1], columns, 2).sigmas
    batch, plain = (
        flow.rollout(PROMPTS[:1], constant_churn(sigmas, gamma), [0], [1, 2], range(STEPS), columns)
        for gamma in (0.2, 0.0)
    )
    first = batch.x_t[0].unbind(dim=2)[0]
    assert torch.equal(first, plain.x_t[0][:, :, 0])
    assert not torch.isclose(batch.x_t[0], plain.x_t[0])[:, :, 1:].any()
    # The scheduler gets the other frames alone.
    assert batch.x_t[1].shape[2] == batch.x_t[0].shape[2] - 1


def test_a_pipeline_may_write_into_its_latents():
    flow = make_flow(pipeline=kandinsky5_video.build(), **kandinsky5_video.CALLS["plain"])
    batch = flow.rollout(["a cat"], torch.full((STEPS + 1,), 0.2), [0], [1, 2], range(STEPS))
    for level in (*range(STEPS), 0):
        assert torch.equal(flow.velocity(batch, level), batch.velocities[level])


def test_gradients_go_through_what_the_first_step_keeps_for_later_ones():
    flow = PipelineFlow(flux2_klein.build_kv(), num_generations=2, num_inference_steps=STEPS, **flux2_klein.SIZE)
    columns = {"image": flux2_klein.images(1)}
    batch = flow.rollout(["a cat"], torch.full((STEPS + 1,), 0.1), [0], [1, 2], range(STEPS), columns)
    weight = flow.pipeline.transformer.transformer_blocks[0].attn.to_v.weight  # of the image's values, too
    total = flow.velocity(batch, 2).sum()
    slope = torch.autograd.grad(total, weight)[0].sum().item()
    with torch.no_grad():
        weight += 1e-3
        more = flow.velocity(batch, 2).sum()
        weight -= 2e-3
        less = flow.velocity(batch, 2).sum()
    assert slope == pytest.approx((more - less).item() / 2e-3, rel=1e-2)


def test_a_rollout_keeps_no_keys_and_values():
    flow = PipelineFlow(flux2_klein.build_kv(), num_generations=2, num_inference_steps=STEPS, **flux2_klein.SIZE)
    batch = flow.rollout(["a cat"], torch.zeros(STEPS + 1), [0], [1, 2], range(STEPS), {"image": flux2_klein.images(1)})
    leaves = [leaf for output in batch.outputs for leaf in tree_leaves(output)]
    assert {type(leaf) for leaf in leaves} == {torch.Tensor, State}
    assert all(leaf.is_meta for leaf in leaves if isinstance(leaf, torch.Tensor))


# Its blocks, computed again, would all read keys and values of the last one: wrong gradients after a right velocity. A part
# of a batch would read those of the whole.
@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"num_candidates": 3}], ids=lambda options: [*options][0]
)
def test_a_model_that_keeps_keys_and_values_is_refused(make_config, options):
    config = make_config(
        **options,
        per_device_prompt_batch_size=1,
        pipeline_columns=["image"],
        guidance_scale=None,
        pipeline_kwargs={name: value for name, value in flux2_klein.SIZE.items() if name not in ("height", "width")},
    )
    dataset = Dataset.from_dict({"prompt": ["a cat"], "image": flux2_klein.images(1)})
    with pytest.raises(ValueError, match="this Flux2KleinKVPipeline keeps results of its first call for later ones"):
        FDFOTrainer(config, flux2_klein.build_kv(), lambda images, prompts, image: images.mean(dim=(1, 2, 3)), dataset)


def test_a_replay_writes_no_prompt_anew():
    pipeline = longcat_image.build()
    calls = []
    pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(True))
    call = longcat_image.CALLS["rewritten prompts"]
    flow = PipelineFlow(pipeline, num_generations=2, num_inference_steps=STEPS, **call)
    batch = flow.rollout(["a cat"], torch.zeros(STEPS + 1), [0], [1, 2], range(STEPS))
    assert len(calls) > 1  # one for the embeddings, one for each token that is written
    calls.clear()
    for level in range(STEPS):
        assert torch.equal(flow.velocity(batch, level), batch.velocities[level])
    assert not calls


def test_images_do_not_depend_on_what_the_process_drew_before():
    flow = make_flow("sd3", pipeline=conditioned.sd3_controlnet())
    columns = conditioned.control_image(1)
    arguments = (["a cat"], constant_churn(flow.rehearse(["a"], columns).sigmas, 0.2), [0], [1, 2], [0], columns)
    first = flow.rollout(*arguments)
    state = torch.get_rng_state()
    torch.manual_seed(123)
    torch.rand(7)
    before = torch.get_rng_state()
    assert torch.equal(flow.rollout(*arguments).images, first.images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 8), (0.3, 13), (1.0, 4)])
def test_a_schedule_that_starts_late_takes_as_many_steps_as_the_option_says(strength, steps, make_config):
    trainer = FDFOTrainer(
        make_config(
            per_device_prompt_batch_size=1,
            pipeline_columns=["image"],
            pipeline_kwargs={"strength": strength, "max_sequence_length": 8},
        ),
        conditioned.img2img(),
        lambda images, prompts, **columns: images.mean(dim=(1, 2, 3)),
        Dataset.from_dict({"prompt": ["a cat"] * 4, **conditioned.image(4)}),
    )
    scheduled = trainer.flow.call_kwargs["num_inference_steps"]
    assert len(trainer.sigmas) == STEPS + 1 and scheduled - int(scheduled * (1 - strength)) == STEPS
    assert scheduled <= steps
    assert (trainer.sigmas[0] < 1) == (strength < 1)
    trainer.train()
    assert trainer.state.global_step == 4


def test_churn_at_the_start_alone_is_refused_if_the_schedule_starts_late():
    flow = make_flow(pipeline=conditioned.img2img(), strength=0.5)
    columns = conditioned.image(1)
    amounts = torch.zeros(STEPS + 1)
    amounts[0] = 0.1
    with pytest.raises(
        ValueError, match="All churn is at the first noise level.*starts late, at step 2 .*strength=1.0"
    ):
        flow.rollout(["a cat"], amounts, [0], [1, 2], range(2), columns)


def test_a_call_that_samples_part_by_part_is_refused():
    flow = make_flow(pipeline=hunyuan_video.build_framepack(), **hunyuan_video.CALLS_SECTIONS["two sections"])
    with pytest.raises(ValueError, match="more steps than the 4 of its schedule, .* a single chunk"):
        flow.rehearse(["a cat"], conditioned.image(1), 2)


def test_a_likelihood_of_changed_latents_is_refused():
    flow = make_flow(pipeline=conditioned.inpaint(), strength=1.0, scheduler_class=SDEScheduler)
    columns = conditioned.image_and_mask(1)
    with pytest.raises(ValueError, match="changes its latents between two steps"):
        flow.rollout(["a cat"], torch.full((STEPS + 1,), 0.3), [0], [1, 2], range(STEPS), columns)


class WithMemory(type(tiny_pipelines.sd3())):
    """Changes its transformer from call to call."""

    def check_inputs(self, *args, **kwargs):
        self.transformer.proj_out.bias.data.add_(0.1)


def test_what_cannot_be_replayed_is_found_at_construction(make_trainer):
    scored = []

    def reward(images, prompts):
        scored.append(len(images))
        return images.mean(dim=(1, 2, 3))

    with pytest.raises(ReplayError, match="The replay of WithMemory is not exact"):
        make_trainer(WithMemory(**parts_of(tiny_pipelines.sd3())), reward)
    # In training mode, as in a run.
    pipeline = tiny_pipelines.sd3()
    pipeline.transformer.proj_out = torch.nn.Sequential(pipeline.transformer.proj_out, torch.nn.Dropout(0.3))
    with pytest.raises(ReplayError, match="Likely causes: dropout"):
        make_trainer(pipeline, reward)
    assert scored == []


def parts_of(pipeline):
    return {
        name: part for name, part in pipeline.components.items() if name not in ("image_encoder", "feature_extractor")
    }


class Fails(type(tiny_pipelines.sd3())):
    """Cannot be called a third time: a rehearsal and a rollout call it, then a replay."""

    calls = 0

    def check_inputs(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("once too often")


def test_an_error_of_the_trial_names_the_call():
    flow = make_flow(pipeline=Fails(**parts_of(tiny_pipelines.sd3())))
    flow.call_kwargs["num_inference_steps"] = 2  # it is not tried in more
    flow.rehearse(["a"])
    with pytest.raises(ValueError, match="A rollout of Fails with .*'num_inference_steps': 2.*RuntimeError: once too"):
        flow.try_replay(["a cat"])


def test_construction_leaves_the_modes_of_the_layers(make_trainer):
    trainer = make_trainer()
    assert not trainer.pipeline.transformer.pos_embed.training


def test_a_call_that_depends_on_its_number_of_steps_is_tried_in_all_of_them():
    # A guidance for each step: two steps would be refused.
    flow = PipelineFlow(ideogram4.build(), num_generations=2, **ideogram4.CALLS["scheduled"])
    assert flow.try_replay(["a cat"])[0] == 0.0
    flow = make_flow(sigmas=np.linspace(1, 0.25, STEPS))
    assert flow.try_replay(["a cat"])[0] == 0.0


def test_churn_at_the_first_level_leaves_the_images_that_are_edited():
    # This pipeline draws noise for one sample at a time, and puts its images beside it.
    family, name = FAMILIES["JoyImage-Edit Plus"], "JoyImage-Edit Plus"
    columns = {column: values[:1] for column, values in columns_of(name, 1).items()}
    call = {"num_inference_steps": 3, **family.calls["plain"]}
    flow = PipelineFlow(family.build(), num_generations=2, scheduler_class=ChurnScheduler, **call)
    flow.rehearse(family.prompts[:1], columns, 2)
    seen = []
    flow.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    for churn in (0.0, 0.3):
        batch = flow.rollout(family.prompts[:1], torch.tensor([churn, 0, 0, 0]), [5], [1, 2], range(3), columns)
    is_noise = batch.remembered["prepare_latents"][0][1][0]
    for without, with_churn in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(with_churn[:, ~is_noise], without[:, ~is_noise])
    (one, other), start = seen[3], seen[0][0]
    assert torch.equal(seen[0][0], seen[0][1]) and not torch.equal(one[is_noise], other[is_noise])
    for branch in (one, other):  # of the variance that it had
        assert branch[is_noise].std().item() == pytest.approx(start[is_noise].std().item(), rel=0.1)
    with torch.no_grad():
        assert torch.equal(flow.velocity(batch, 0), batch.velocities[0])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("FLUX.2 Klein KV with an image", None),
        (
            "Kandinsky 5 image to video",
            "RuntimeError: one of the variables needed for gradient computation has been modified",
        ),
        ("Cosmos 2.5 Transfer (video)", "RuntimeError: .* does not require grad"),
    ],
)
def test_a_decoder_without_gradients_is_refused_before_the_run(name, reason):
    family = FAMILIES[name]
    call = {"num_inference_steps": 3, **next(iter(family.calls.values()))}
    flow = PipelineFlow(family.build(), num_generations=2, scheduler_class=ChurnScheduler, **call)
    columns = {column: values[:1] for column, values in columns_of(name, 1).items()}
    flow.rehearse(family.prompts[:1], columns, 2)
    assert flow.try_replay(family.prompts[:1], columns)[0] < 1e-5
    refused = pytest.raises(
        ValueError, match=rf"cannot be decoded with gradients \({reason}.*direction='finite_difference'"
    )
    with refused if reason else contextlib.nullcontext():
        flow.try_replay(family.prompts[:1], columns, decodes=True)
