"""Models on one pipeline, beyond the tests of the scripts."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from trl_fdfo.cli.arguments import InferenceArguments
from trl_fdfo.cli.models import BASE, call_options, each_model
from trl_fdfo.evaluation.evaluator import Evaluator
from trl_fdfo.pipeline.adapter_files import CALL_OPTIONS, DIFFUSERS_FILE, save_diffusers_lora
from trl_fdfo.pipeline.flow import PipelineFlow
from trl_fdfo.pipeline.lora import add_adapter
from trl_fdfo.pipeline.schedulers import RolloutScheduler
from trl_fdfo.rewards.reward_functions import RewardFunctions


OPTIONS = {"num_inference_steps": 3, "height": 16, "width": 16, "guidance_scale": 3.0}


def make_flow(pipeline, **options):
    return PipelineFlow(pipeline, num_generations=2, scheduler_class=RolloutScheduler, **OPTIONS, **options)


@pytest.mark.parametrize("make_pipeline", [tiny_pipelines.sd3, tiny_pipelines.flux])
def test_the_batch_does_not_matter(make_pipeline):
    words = {"negative_prompt": "blue"} if make_pipeline is tiny_pipelines.sd3 else {"prompt_2": "blue"}
    flow = make_flow(make_pipeline(), **words, max_sequence_length=8)

    def sample(seeds, batch_size=1):
        evaluator = Evaluator(flow.generate, RewardFunctions(lambda images: images), batch_size=batch_size)
        return evaluator.generate(["a cat"] * len(seeds), seeds, {})

    one_by_one = sample(range(5))
    assert one_by_one.shape == (5, 3, 16, 16) and one_by_one.dtype == torch.float32
    assert 0 <= one_by_one.min() and one_by_one.max() <= 1
    assert (one_by_one[1:] - one_by_one[:1]).abs().amax(dim=(1, 2, 3)).min() > 0.01
    torch.testing.assert_close(sample(range(5), batch_size=2), one_by_one, rtol=0, atol=1e-4)
    torch.testing.assert_close(sample([3])[0], one_by_one[3], rtol=0, atol=0)
    assert flow.call_kwargs == OPTIONS | words | {"max_sequence_length": 8}


def test_each_model_leaves_the_base_as_it_was(make_trainer, tmp_path):
    trainer = make_trainer(num_rollouts=1, learning_rate=0.05, output_dir=str(tmp_path / "both"))
    trainer.train()
    trainer.save_model()
    shutil.copytree(tmp_path / "both", tmp_path / "peft", ignore=lambda *_: ["pytorch_lora_weights.safetensors"])
    adapters = {name: Path(tmp_path, name) for name in ("both", "peft")}
    pipeline = tiny_pipelines.sd3()
    flow = make_flow(pipeline, max_sequence_length=8)
    before = flow.generate(["a cat"], [0])
    images = {name: flow.generate(["a cat"], [0]) for name in each_model(pipeline, adapters)}
    assert list(images) == [BASE, "both", "peft"]
    assert torch.equal(images[BASE], before) and torch.equal(images["both"], images["peft"])
    assert not torch.equal(images["both"], before)
    assert torch.equal(flow.generate(["a cat"], [0]), before)


def arguments(**options) -> InferenceArguments:
    return InferenceArguments(model="base", prompts=["a cat"], **options)


def test_unknown_settings_of_an_adapter_are_asked_for(tmp_path):
    for folder in ("published", "own"):
        (tmp_path / folder).mkdir()
    (tmp_path / "own" / "generation_config.json").write_text('{"num_inference_steps": 5, "guidance_scale": 2.0}')
    file = tmp_path / "published" / "x.safetensors"
    for path in (tmp_path / "published", file):
        with pytest.raises(
            ValueError, match="adapter='p' has no generation_config.json.*set num_inference_steps and gui"
        ):
            call_options(arguments(), {"p": path})
    with pytest.raises(ValueError, match="adapter='p' has no generation_config.json.*set guidance_scale, and height"):
        call_options(arguments(num_inference_steps=40), {"p": tmp_path / "published"})
    paper = {"num_inference_steps": 40, "guidance_scale": 1.0}
    assert call_options(arguments(**paper), {"p": file}) == paper
    in_one = '{"num_inference_steps": 40, "guidance_scale": 1.0, "max_sequence_length": 128}'
    assert call_options(arguments(pipeline_kwargs=in_one), {"p": file}) == {**paper, "max_sequence_length": 128}
    assert call_options(arguments(pipeline_kwargs="{}"), {"p": file}) == {}
    # Beside an adapter that says how it was trained, it is sampled like that one; a file has the settings beside it.
    own = {"num_inference_steps": 5, "guidance_scale": 2.0}
    assert call_options(arguments(), {"p": file, "own": tmp_path / "own" / "y.safetensors"}) == own
    assert call_options(arguments(), {}) == {}


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter in diffusers' format, whose weights are no numbers of bfloat16."""
    pipeline = tiny_pipelines.sd3()
    torch.manual_seed(1)
    model = add_adapter(pipeline, LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q", "attn.to_v"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_diffusers_lora(pipeline, model, tmp_path / "diffusers")
    model.save_pretrained(tmp_path / "peft")
    return model, tmp_path / "diffusers" / DIFFUSERS_FILE


def images_of(flow, paths):
    return {name: flow.generate(["a cat"], [0]) for name in each_model(flow.pipeline, paths)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formats_and_files_give_the_images_of_the_adapter_as_it_was_trained(adapter, dtype):
    model, file = adapter
    trained = tiny_pipelines.sd3().to(dtype)
    add_adapter(trained, model.peft_config["default"], get_peft_model_state_dict(model))
    expected = make_flow(trained, max_sequence_length=8).generate(["a cat"], [0])
    paths = {"folder": file.parent, "file": file, "peft": file.parent.with_name("peft")}
    flow = make_flow(tiny_pipelines.sd3().to(dtype), max_sequence_length=8)
    images = images_of(flow, paths)
    assert not torch.equal(images.pop(BASE), expected)
    assert all(torch.equal(image, expected) for image in images.values()) and len(images) == 3


def test_names_of_a_compiled_transformer_are_refused_and_leave_the_base(adapter):
    _, file = adapter
    weights = {name.replace("transformer.", "transformer._orig_mod.", 1): w for name, w in load_file(file).items()}
    save_file(weights, file)
    flow = make_flow(tiny_pipelines.sd3(), max_sequence_length=8)
    before = flow.generate(["a cat"], [0])
    with pytest.raises(ValueError, match="weights, such as _orig_mod.* would be left out"):
        images_of(flow, {"compiled": file.parent})
    assert torch.equal(flow.generate(["a cat"], [0]), before) and before.isfinite().all()


def test_weights_for_a_text_encoder_are_loaded_and_taken_off_too(adapter):
    _, file = adapter
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.v_proj"
    more = {f"{layer}.lora_A.weight": torch.randn(4, 16), f"{layer}.lora_B.weight": torch.randn(16, 4)}
    without = load_file(file)
    save_file(without, file.with_name("without.safetensors"))
    save_file(without | more, file)
    flow = make_flow(tiny_pipelines.sd3(), max_sequence_length=8)
    paths = {"with": file, "without": file.with_name("without.safetensors")}
    images = images_of(flow, paths)
    assert torch.equal(images[BASE], flow.generate(["a cat"], [0]))
    assert not torch.equal(images["with"], images["without"]) and not torch.equal(images["with"], images[BASE])
    assert not any(isinstance(layer, BaseTunerLayer) for layer in flow.pipeline.text_encoder.modules())


def test_other_steps_than_those_of_an_adapters_schedule_are_refused(tmp_path):
    (tmp_path / CALL_OPTIONS).write_text(json.dumps({"num_inference_steps": 2, "sigmas": [1.0, 0.5]}))
    adapters = {"p": tmp_path}
    with pytest.raises(ValueError, match="num_inference_steps=40 would change nothing: `sigmas`, which has 2 values"):
        call_options(arguments(num_inference_steps=40), adapters)
    assert (
        call_options(arguments(num_inference_steps=40, pipeline_kwargs='{"sigmas": null}'), adapters)["sigmas"] is None
    )
    assert call_options(arguments(), adapters)["sigmas"] == [1.0, 0.5]
