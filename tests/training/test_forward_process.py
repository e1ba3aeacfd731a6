"""What algorithms of the forward process share: endpoints that are noised afresh, and a policy that samples."""

from dataclasses import replace

import pytest
import tiny_pipelines
import torch
from conftest import logged, trained_weights
from datasets import Dataset
from forward_runs import OPTIONS, make_forward  # noqa: F401
from tiny_pipelines import conditioned, ltx, ltx2, skyreels_v2, wan
from tiny_runs import PROMPTS
from torch.utils._pytree import tree_leaves

import trl_fdfo
from trl_fdfo.cli.algorithms import ALGORITHMS
from trl_fdfo.pipeline_flow import PipelineFlow
from trl_fdfo.planning.without_weights import planned
from trl_fdfo.seeds import FORWARD_NOISE, derive_seed
from trl_fdfo.training.forward_process import ODEScheduler, target_velocity


TRAINERS = {name: getattr(trl_fdfo, trainer) for name, trainer in ALGORITHMS.items()}
FORWARD = {name: trainer for name, trainer in TRAINERS.items() if trainer.noises_endpoints}
EACH = pytest.mark.parametrize("trainer_class", FORWARD.values(), ids=FORWARD)
# What is the base class's own is tested with one.
ONE = pytest.mark.parametrize("trainer_class", [FORWARD["diffusion_nft"]], ids=[""])
CALL = wan.CALLS_TWO_TRANSFORMERS["two_scales"]
TWO_TRANSFORMERS = {
    "guidance_scale": CALL["guidance_scale"],
    "pipeline_kwargs": {name: CALL[name] for name in CALL if name not in ("height", "width", "guidance_scale")},
}


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(dim=1)


# The velocity at any samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "call"),
    [
        (tiny_pipelines.sd3, {"height": 16, "width": 16, "max_sequence_length": 8, "guidance_scale": 4.0}),
        (tiny_pipelines.flux, {"height": 16, "width": 16, "max_sequence_length": 8}),
        (wan.build_two_transformers, CALL),
        (ltx2.build, ltx2.CALLS["guided"]),  # a video and its sound, which are two streams
    ],
    ids=["guided", "packed", "two transformers", "two streams"],
)
def test_velocity_at_the_samples_of_another_rollout_is_what_that_recorded(build, call):
    flow = PipelineFlow(build(), num_generations=2, scheduler_class=ODEScheduler, num_inference_steps=3, **call)
    one, other = (flow.rollout(["a cat"], torch.zeros(4), seeds, [0, 1], range(3)) for seeds in ([10, 11], [12, 13]))
    for level in range(3):
        mixed = replace(one, x_t={level: other.x_t[level]}, velocities={})
        with torch.no_grad():
            assert torch.equal(flow.velocity(mixed, level), other.velocities[level])
            assert not torch.equal(one.velocities[level], other.velocities[level])


@EACH
def test_what_is_trained_is_the_noised_endpoint(make_forward, trainer_class):  # noqa: F811
    trainer = make_forward(trainer_class, num_rollouts=1)
    trainer._buffer = buffer = trainer._roll_out(0)
    seen = set()
    for index in range(len(buffer.steps) * buffer.micro_batches_per_step):
        inputs = buffer[index]
        batch, level = trainer.with_tuple(inputs), inputs.level
        sampled, t = batch.sampled, trainer.sigmas[inputs.level].item()
        first = 2 * 3 * batch.number
        seen.add((batch.number, level))
        for n, (x_t, x_0) in enumerate(zip(sampled.x_t[level], sampled.endpoints.flatten(0, 1), strict=True)):
            seed = derive_seed(trainer.args.seed, 0, first + n, level, 0, FORWARD_NOISE)
            noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(x_t, (1 - t) * x_0 + t * noise, rtol=0, atol=1e-6)
            torch.testing.assert_close(target_velocity(batch, level)[n], noise - x_0, rtol=0, atol=1e-4)
        # Before the first step the trained weights are those that sampled.
        with torch.no_grad():
            assert torch.equal(trainer.flow.velocity(sampled, level), sampled.velocities[level])
    assert seen == {(number, level) for number in range(2) for level in range(4)}


@ONE
def test_noise_depends_neither_on_the_batch_nor_on_what_was_drawn_before(make_forward, trainer_class):  # noqa: F811
    noises = []
    for size in (1, 2):
        trainer = make_forward(trainer_class, num_rollouts=1, per_device_prompt_batch_size=size)
        trainer._buffer = buffer = trainer._roll_out(0)
        inputs = [buffer[index] for index in range(len(buffer.steps) * buffer.micro_batches_per_step)]
        of_level = sorted((each for each in inputs if each.level == 2), key=lambda each: each.batch.number)
        drawn = [trainer._noise(each.batch.sampled.endpoints.flatten(0, 1), each) for each in of_level]
        noises.append(torch.cat(drawn))
        # A second pass over the rollout draws anew.
        again = replace(of_level[0], step=of_level[0].step + trainer.args.optimizer_steps_per_rollout)
        assert not torch.equal(trainer._noise(drawn[0], again), drawn[0])
    assert torch.equal(*noises) and len(noises[0]) == 12
    assert abs(noises[0].std() - 1) < 0.1


@ONE
def test_a_condition_is_kept(make_forward, trainer_class):  # noqa: F811
    call = {
        name: value
        for name, value in ltx.CALLS_DENOISING_DECODER["plain"].items()
        if name not in ("height", "width", "guidance_scale")
    }
    trainer = make_forward(
        trainer_class,
        ltx.build_condition(),
        brightness,
        columns=[("image", conditioned.pictures(5) + conditioned.pictures(1))],
        num_rollouts=1,
        height=32,
        width=32,
        per_device_prompt_batch_size=1,
        pipeline_columns=["image"],
        pipeline_kwargs={**call, "image_cond_noise_scale": 0.0},
    )
    trainer._buffer = buffer = trainer._roll_out(0)
    inputs = buffer[0]
    batch = trainer.with_tuple(inputs)
    sampled, is_kept = batch.sampled, batch.sampled.is_kept
    assert 0 < is_kept.float().mean() < 1
    x_t, x_0 = sampled.x_t[inputs.level], sampled.endpoints.flatten(0, 1)
    assert torch.equal(x_t[is_kept], x_0[is_kept]) and (x_t != x_0)[~is_kept].all()
    for velocity in (target_velocity(batch, inputs.level), sampled.velocities[inputs.level]):
        assert not velocity[is_kept].any() and velocity[~is_kept].any()


@ONE
def test_what_cannot_be_noised_is_refused(make_forward, trainer_class):  # noqa: F811
    video = {name: value for name, value in skyreels_v2.VIDEO.items() if name not in ("height", "width")}
    size = {name: skyreels_v2.VIDEO[name] for name in ("height", "width")}
    with pytest.raises(ValueError, match="takes its latents apart before its first step"):
        make_forward(trainer_class, skyreels_v2.forcing(), brightness, pipeline_kwargs=video, **size)
    with pytest.raises(ValueError, match="changes its latents between two steps"):
        make_forward(
            trainer_class,
            conditioned.sd3_inpaint(),
            brightness,
            columns=[(n, values * 6) for n, values in conditioned.image_and_mask(1).items()],
            per_device_prompt_batch_size=1,
            pipeline_columns=["image", "mask_image"],
            pipeline_kwargs={"max_sequence_length": 8, "strength": 1.0},
        )


# Runs -----------------------------------------------------------------------------------------------------------------


@ONE
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1, "num_iterations": 2},
        {"offload_trajectories": True, "per_device_sampling_batch_size": 4, "timestep_fraction": 0.5},
        {"bf16": True},
        {"use_peft": False, "ema_decay": 0.5},
        TWO_TRANSFORMERS,
    ],
    ids=["beta", "offload", "bf16", "all weights", "two transformers"],
)
def test_options_train_with_an_exact_replay(make_forward, trainer_class, options):  # noqa: F811
    of_two = options is TWO_TRANSFORMERS
    trainer = make_forward(
        trainer_class, wan.build_two_transformers() if of_two else None, brightness, learning_rate=1e-2, **options
    )
    before = trained_weights(trainer)
    trainer.train()
    # Kernels for another batch size round in another way on some CPUs.
    largest = 1e-6 if "per_device_sampling_batch_size" in options else 0.0
    assert max(logged(trainer, "replay_error")) <= largest
    moved = {name for name, weight in trained_weights(trainer).items() if not torch.equal(weight, before[name])}
    assert (
        moved if not of_two else all(any(f".{n}.blocks" in m for m in moved) for n in ("transformer", "transformer_2"))
    )
    # The trained weights come back after each use of the others.
    if not trainer.has_old_policy:
        return
    trained = trained_weights(trainer)
    for weight in trainer.old_policy.average.shadow_params:
        weight.add_(1)
    with trainer.old_policy.applied():
        assert not any(torch.equal(weight, trained[name]) for name, weight in trained_weights(trainer).items())
    assert all(torch.equal(weight, trained[name]) for name, weight in trained_weights(trainer).items())


def test_a_replay_that_is_not_exact_ends_the_run(make_forward):  # noqa: F811
    trainer = make_forward(FORWARD["awm"])
    trainer.replay_tolerance = 1e-3
    checked = trainer.compare_replay
    trainer.compare_replay = lambda velocity, recorded, level: checked(1.01 * velocity, recorded, level)
    before = trained_weights(trainer)
    with pytest.raises(RuntimeError, match="The replay of StableDiffusion3Pipeline is not exact"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trained_weights(trainer).items())


@EACH
def test_a_resumed_run_ends_in_the_weights_of_the_whole_run(make_forward, trainer_class, tmp_path):  # noqa: F811
    follows = {"old_policy_decay": 0.5, "old_policy_decay_rate": 0.3} if trainer_class.has_old_policy else {}
    options = {"num_rollouts": 3, "save_strategy": "epoch", "learning_rate": 1e-2, **follows}
    whole = make_forward(trainer_class, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_forward(trainer_class, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 6
    for name, weight in trained_weights(resumed).items():
        assert torch.equal(weight, trained_weights(whole)[name]), name
    file = tmp_path / "whole" / "checkpoint-2" / "old_policy.safetensors"
    assert file.is_file() == trainer_class.has_old_policy
    if trainer_class.has_old_policy:
        for found, expected in zip(*(t.old_policy.average.shadow_params for t in (resumed, whole)), strict=True):
            assert torch.equal(found, expected)


# Memory ---------------------------------------------------------------------------------------------------------------


@ONE
@pytest.mark.parametrize("options", [{}, {"offload_trajectories": True}, {"per_device_sampling_batch_size": 4}])
def test_a_rollout_keeps_endpoints_alone(make_forward, trainer_class, options):  # noqa: F811
    trainer = make_forward(trainer_class, num_rollouts=1, plan=True, **options)
    plan = trainer.run_plan()
    buffer = trainer._roll_out(0)
    kept = 0
    for batch in {batch.number: batch for step in buffer.steps for batch, _ in step}.values():
        sampled = batch.sampled
        assert sampled.x_t == sampled.velocities == sampled.x_s == {} and sampled.images is None
        parts = tree_leaves([sampled.endpoints, sampled.remembered, batch.targets])
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        kept += sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
    assert plan.trajectory_bytes == kept
    # A rollout of 12 images would keep x_t and v at 4 levels, and keeps x_0.
    assert plan.saved_bytes == (2 * 4 - 1) * 12 * 4 * sampled.endpoints[0, 0].numel()
    parts = {part.name: part for part in plan.parts()}
    assert "endpoints alone: the tuples of all trained steps would be" in parts["trajectories"].note
    assert parts["policy that samples"].training == 2 * parts["trained weights"].training
    assert plan.algorithm in str(plan)


@EACH
def test_its_plan_needs_no_weights(trainer_class, tmp_path):
    tiny_pipelines.sd3().save_pretrained(tmp_path / "pipeline")
    for weights in (tmp_path / "pipeline").rglob("*.safetensors"):
        weights.unlink()
    config = planned(trainer_class.config_class)(output_dir=str(tmp_path), **OPTIONS)
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    plan = trainer_class.plan(config, tmp_path / "pipeline", ["tiny_runs:redness"], prompts)
    assert f"{trainer_class.algorithm} on StableDiffusion3Pipeline" in str(plan) and "endpoints alone" in str(plan)
    assert ("policy that samples" in str(plan)) == trainer_class.has_old_policy
    # A call of the policy that samples, or of the base model, comes to each update, and a replay to each batch that is sampled.
    assert plan._calls_beside_training == 1
