"""Options that change how a rollout is sampled, but not the result of the training."""

from types import SimpleNamespace

import datasets
import pytest
import tiny_pipelines
import torch
from conftest import logged, trained_weights, warnings_of_the_package
from datasets import Dataset
from PIL import Image
from tiny_pipelines import hidream, krea2, prx, qwen_image, sana, z_image
from tiny_runs import PROMPTS, redness

from trl_fdfo.fdfo.scheduler import ChurnScheduler
from trl_fdfo.pipeline import checks
from trl_fdfo.pipeline.checksums import by_content, checksum
from trl_fdfo.pipeline.prompt_embeddings import PromptEmbeddings, encoding_key
from trl_fdfo.pipeline_flow import PipelineFlow


# One batch size computes in another order than the next: differences of 1e-7 that Adam, which divides by the size of the
# gradient, makes larger.
TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of `datasets` of its own. (It reads its environment variable once, at import.)"""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def large_sana():
    """Of a size at which the pipeline knows resolutions."""
    pipeline = sana.build()
    pipeline.transformer.register_to_config(sample_size=16)
    return pipeline


def count_samples(trainer):
    """Samples of each call of the transformer from now on."""
    counts = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return counts


def assert_same_run(trainer, other):
    for name, weight in trained_weights(trainer).items():
        torch.testing.assert_close(trained_weights(other)[name], weight, **TOLERANCE)
    torch.testing.assert_close(torch.tensor(logged(other, "reward")), torch.tensor(logged(trainer, "reward")))
    assert max(logged(other, "replay_error")) < 1e-5


@pytest.mark.parametrize(
    ("build", "options", "call", "changes_nothing"),
    [
        (tiny_pipelines.sd3, {}, {"negative_prompt": "bad"}, True),
        (tiny_pipelines.sd3, {"guidance_scale": 3.0}, {"negative_prompt": "bad"}, False),
        (tiny_pipelines.sd3, {}, {"negative_prompt": ""}, False),
        (tiny_pipelines.flux, {}, {"negative_prompt": "bad"}, True),
        (tiny_pipelines.flux, {}, {"negative_prompt": "bad", "true_cfg_scale": 3.0}, False),  # guidance by another name
    ],
)
def test_a_negative_prompt_without_guidance_is_reported(make_trainer, caplog, build, options, call, changes_nothing):
    make_trainer(build(), pipeline_kwargs={"max_sequence_length": 8, **call}, **options)
    warnings = [warning for warning in warnings_of_the_package(caplog) if "negative_prompt" in warning]
    assert ["negative_prompt in pipeline_kwargs changes nothing" in warning for warning in warnings] == [
        True
    ] * changes_nothing


@pytest.mark.parametrize(
    ("build", "length", "guidance_scale", "guides"),
    [
        (tiny_pipelines.sd3, 8, 1.0, False),
        (tiny_pipelines.flux, 8, 1.0, False),
        (z_image.build, 24, 1.0, True),
        (z_image.build, 24, 0.0, False),
        (krea2.build, 16, 1.0, True),
    ],
)
def test_guidance_at_a_scale_of_one_is_reported(make_trainer, caplog, build, length, guidance_scale, guides):
    make_trainer(build(), pipeline_kwargs={"max_sequence_length": length}, guidance_scale=guidance_scale)
    warnings = [warning for warning in warnings_of_the_package(caplog) if "is guidance in" in warning]
    assert [
        "each step computes 2 times as much as without. Set guidance_scale=0" in warning for warning in warnings
    ] == [True] * guides


def test_later_noise_that_is_too_little_for_a_model_is_refused(make_trainer):
    # This one starts from noise of a standard deviation of 2.
    options = {"pipeline_kwargs": {"use_resolution_binning": False}, "per_device_prompt_batch_size": 1}
    for noise in ({"churn": 0.05, "churn_schedule": "constant"}, {"churn": 0.05, "churn_schedule": "interval"}):
        with pytest.raises(
            ValueError, match=r"starts from noise of a standard deviation of 2,.*churn_schedule='prior'"
        ):
            make_trainer(prx.build_pixel(), **noise, **options)
    make_trainer(prx.build_pixel(), churn=0.05, churn_schedule="prior", **options)


@pytest.mark.parametrize(
    ("build", "call", "asked", "said"),
    [
        (hidream.build, hidream.CALLS["plain"], 32, "computes 16 x 16 pixels. Set height=16 and width=16"),
        (hidream.build, hidream.CALLS["plain"], 16, None),
        (
            large_sana,
            sana.CALLS["plain"] | {"use_resolution_binning": True},
            64,
            "scales back. Set use_resolution_binning=False",
        ),
        (large_sana, sana.CALLS["plain"], 64, None),
    ],
)
def test_another_size_than_asked_for_is_reported(caplog, build, call, asked, said):
    checks.logger.warning_once.cache_clear()  # another test in this process may have been warned
    call = {**call, "num_inference_steps": 2, "height": asked, "width": asked}
    PipelineFlow(build(), num_generations=1, scheduler_class=ChurnScheduler, **call).rehearse(["a cat"])
    warnings = [warning for warning in warnings_of_the_package(caplog) if f"height={asked} and" in warning]
    assert len(warnings) == (said is not None) and all(said in warning for warning in warnings)


@pytest.mark.parametrize("timestep_fraction", [1.0, 0.5])
@pytest.mark.parametrize(("prompts", "sampled"), [(8, [8, 8]), (6, [8, 4])])
def test_larger_sampling_batches(make_trainer, timestep_fraction, prompts, sampled):
    options = {"prompts_per_rollout": prompts, "timestep_fraction": timestep_fraction, "guidance_scale": 3.0}
    options |= {"optimizer_steps_per_rollout": 1, "num_generations": 2}
    seen = []

    def reward(images, prompts):
        seen.append(len(images))
        return redness(images, prompts)

    alone = make_trainer(**options)
    start = trained_weights(alone)
    alone.train()
    together = make_trainer(**options, reward_fn=reward, per_device_sampling_batch_size=4)
    counts = count_samples(together)
    together.train()
    assert_same_run(alone, together)
    assert any(not torch.equal(weight, start[name]) for name, weight in trained_weights(together).items())
    assert seen == [samples for _ in range(2) for samples in sampled]
    # Sampled and, of the same batch and its negative prompt, trained.
    assert max(counts) == 2 * max(sampled) and counts.count(8) >= together.args.gradient_accumulation_steps


def test_shared_prefix_samples_one_branch_until_the_churn_begins(make_trainer):
    options = {
        "num_inference_steps": 8,
        "churn_schedule": "interval",
        "churn_kwargs": {"width": 0.1},
        "num_generations": 3,
    }
    apart = make_trainer(**options)
    apart.train()
    shared = make_trainer(**options, shared_prefix=True)
    gammas = shared.noise_amounts(0, range(4))
    counts = count_samples(shared)
    shared.train()
    assert_same_run(apart, shared)
    # The first batch has two prompts: one branch each while both are without churn.
    churned = (gammas[:2] > 0).any(dim=0).tolist().index(True)
    assert 0 < churned < 8
    assert counts[:8] == [2] * churned + [6] * (8 - churned)


def test_prompts_are_encoded_once_and_not_in_the_next_run(make_trainer, cache):
    options = {"num_rollouts": 3}
    plain = make_trainer(**options)
    plain.train()
    cached = make_trainer(**options, cache_prompt_embeds=True)
    cached.train()
    assert_same_run(plain, cached)
    torch.testing.assert_close(cached.generate(PROMPTS[:2], [0, 1]), plain.generate(PROMPTS[:2], [0, 1]), **TOLERANCE)
    files = {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}
    assert len(files) == 1

    # As if there were no room for the text encoders: they get one prompt only, in the rehearsals.
    pipeline = tiny_pipelines.sd3()
    encoded = []
    pipeline.text_encoder.register_forward_pre_hook(lambda module, args: encoded.append(args[0].shape))
    again = make_trainer(pipeline, **options, cache_prompt_embeds=True)
    del encoded[:]
    again.train()
    assert not encoded
    for name, weight in trained_weights(again).items():
        assert torch.equal(weight, trained_weights(cached)[name])
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")} == files
    # Another prompt, or another way to call, is encoded when it comes.
    again.generate(["something else"], [0])
    again.generate(PROMPTS[:1], [0], guidance_scale=4.0)
    assert len(encoded) == 3  # with its negative prompt


def test_prompts_for_evaluation_are_cached_too(make_trainer, cache):
    prompts = Dataset.from_dict({"prompt": ["a hat", "a tree"]})
    trainer = make_trainer(eval_dataset=prompts, cache_prompt_embeds=True)
    assert set(trainer.flow.prompt_embeddings) == {*PROMPTS, "a hat", "a tree"}
    encoded = []
    trainer.pipeline.text_encoder.register_forward_pre_hook(lambda module, args: encoded.append(args))
    cached = trainer.evaluate()
    assert not encoded
    plain = make_trainer(eval_dataset=prompts).evaluate()
    assert cached["eval_reward"] == pytest.approx(plain["eval_reward"], abs=1e-6)
    # Other steps have the same embeddings; guidance needs those of the negative prompt.
    for of_use, times in (({"num_inference_steps": 6}, 0), ({"guidance_scale": 4.0}, 2)):
        options = {"eval_dataset": prompts, "eval_pipeline_kwargs": of_use}
        other = make_trainer(cache_prompt_embeds=True, **options)
        del encoded[:]
        other.pipeline.text_encoder.register_forward_pre_hook(lambda module, args: encoded.append(args))
        cached = other.evaluate()
        assert len(encoded) == times
        assert cached["eval_reward"] == pytest.approx(make_trainer(**options).evaluate()["eval_reward"], abs=1e-6)


def test_embeddings_are_found_by_the_pipeline_and_its_arguments(make_trainer, cache):
    flows = {
        "as it is": make_trainer().flow,
        "again": make_trainer().flow,
        "guided": make_trainer(guidance_scale=3.0).flow,
        "longer": make_trainer(pipeline_kwargs={"max_sequence_length": 4}).flow,
        "other weights": make_trainer(tiny_pipelines.sd3(seed=1)).flow,
        "another encoder": make_trainer(tiny_pipelines.sd3(with_t5=True)).flow,
        "other steps": make_trainer(num_inference_steps=3, timestep_fraction=1.0).flow,
    }
    keys = {name: encoding_key(flow) for name, flow in flows.items()}
    assert keys.pop("again") == keys.pop("other steps") == keys["as it is"]
    flows["longer"].pipeline.tokenizer.chat_template = "{{ messages }}"  # as a language model's
    keys["another template"] = encoding_key(flows["longer"])
    assert len(set(keys.values())) == len(keys)
    embeddings = PromptEmbeddings(flows["guided"], ["two dogs", "a cat", "two dogs"])
    assert list(embeddings) == ["two dogs", "a cat"] and embeddings.same_shapes and embeddings.nbytes > 0
    for read, encoded in zip(embeddings["a cat"][0], flows["guided"].encode(["a cat"])[0], strict=True):
        assert torch.equal(read, encoded)


def test_many_prompts_go_to_several_files(make_trainer, cache, monkeypatch):
    monkeypatch.setattr("trl_fdfo.pipeline.prompt_embeddings.PROMPTS_PER_FILE", 2)
    flow = make_trainer().flow
    embeddings = PromptEmbeddings(flow, PROMPTS[:5])
    assert len(list(cache.rglob("*.arrow"))) == 3 and list(embeddings) == PROMPTS[:5]
    for prompt in PROMPTS[:5]:
        assert torch.equal(embeddings[prompt][0][0], flow.encode([prompt])[0][0])


def test_only_prompts_that_the_run_draws_are_encoded(make_trainer, cache):
    drawn, cached = [], {}

    def reward(images, prompts):
        drawn.extend(prompts)
        return redness(images, prompts)

    for rollouts in (2, 3):
        prompts = [f"prompt {n}" for n in range(20)]
        trainer = make_trainer(prompts=prompts, reward_fn=reward, num_rollouts=rollouts, cache_prompt_embeds=True)
        del drawn[:]
        trainer.train()
        cached[rollouts] = list(trainer.flow.prompt_embeddings)
        assert cached[rollouts] == list(dict.fromkeys(drawn)) and len(cached[rollouts]) == 4 * rollouts
    # More rollouts draw these first.
    assert cached[3][:8] == cached[2]


def test_disk_is_counted_beforehand(make_trainer, cache, monkeypatch):
    flow, titles = make_trainer().flow, []

    def progress(files, title):
        titles.append(title)
        return files

    prompts = [f"prompt {n}" for n in range(200)]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100_000))
    with pytest.raises(
        ValueError, match="would write 0.00 GiB of embeddings of 200 prompts .*has 0.00 GiB left.*_CACHE"
    ):
        PromptEmbeddings(flow, prompts, progress)
    assert not list(cache.rglob("*.arrow")) and not titles
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10_000_000))
    size = PromptEmbeddings(flow, prompts, progress).nbytes
    assert titles == ["encoding 200 prompts, 0.00 GiB on disk"]
    assert 100_000 < size < 10_000_000
    PromptEmbeddings(flow, prompts, progress)
    assert titles[1:] == ["reading embeddings"]


def test_embeddings_of_different_length_need_batches_of_one(make_trainer, cache):
    options = {"pipeline_kwargs": {}, "guidance_scale": None, "optimizer_steps_per_rollout": 1}
    with pytest.raises(ValueError, match="to different lengths.*per_device_prompt_batch_size=1"):
        make_trainer(qwen_image.build(), **options, cache_prompt_embeds=True)
    options["per_device_prompt_batch_size"] = 1
    plain = make_trainer(qwen_image.build(), **options)
    plain.train()
    cached = make_trainer(qwen_image.build(), **options, cache_prompt_embeds=True)
    cached.train()
    assert_same_run(plain, cached)


def test_text_encoders_wait_in_host_memory(make_trainer, cache):
    trainer = make_trainer(cache_prompt_embeds=True)
    assert len(trainer._offload_hooks) == 2
    assert len(make_trainer(offload_components=True)._offload_hooks) == 3


def test_the_key_of_embeddings_tells_images_apart_by_their_content():
    keys = []
    for color in ("red", "red", "blue"):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(color, (8, 8, 56, 56))
        keys.append(checksum(by_content({"image": image, "mask": torch.full((64, 64), len(color))})))
    assert keys[0] == keys[1] != keys[2]
