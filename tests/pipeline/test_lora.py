"""Adapters on disk: what is written loads in either library, and what others wrote can be continued."""

import json
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from conftest import trained_weights
from peft import LoraConfig, PeftModel, PromptTuningConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_runs import PROMPTS

from trl_fdfo import FDFOConfig
from trl_fdfo.pipeline.adapter_files import read_adapter, save_diffusers_lora
from trl_fdfo.pipeline.lora import add_adapter
from trl_fdfo.pipeline_flow import PipelineFlow


TARGETS = ["attn.to_q", "attn.to_v", "attn.to_out.0"]
DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """An adapter of another rank and alpha than the options', moved away from its start, in one folder per format."""

    def save(pipeline=None, **options):
        pipeline = pipeline if pipeline is not None else tiny_pipelines.sd3()
        torch.manual_seed(1)
        config = LoraConfig(**{"r": 6, "lora_alpha": 12, "target_modules": TARGETS, **options})
        model = add_adapter(pipeline, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        for folder in ("peft", "diffusers"):
            (tmp_path / folder).mkdir()
        model.save_pretrained(tmp_path / "peft")
        save_diffusers_lora(pipeline, model, tmp_path / "diffusers")
        return model

    return save


def as_published(folder):
    """PEFT's files as older versions and other scripts leave them: a task, dropout, and options of the future."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"task_type": "FEATURE_EXTRACTION", "lora_dropout": 0.05, "inference_mode": True, "not_yet_known": 1}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("format", ["peft", "diffusers", "file"])
def test_either_format_is_continued_with_its_rank_and_alpha(make_trainer, saved, tmp_path, format):
    model = saved()
    as_published(tmp_path / "peft")
    adapter = tmp_path / {"file": f"diffusers/{DIFFUSERS}"}.get(format, format)
    trainer = make_trainer(adapter=str(adapter), lora_r=32, beta=0.1, num_rollouts=1)
    config = trainer.model.peft_config["default"]
    # Diffusers' file has alpha = rank: the scale of 2 is in the weights.
    alpha, scale = (12, 1) if format == "peft" else (6, 2)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (6, alpha, 0.0)
    expected = {name: p * (scale if "lora_B" in name else 1) for name, p in model.named_parameters() if "lora" in name}
    start = trained_weights(trainer)
    assert start.keys() == expected.keys() and len(start) > 10
    for name, weight in start.items():
        assert torch.equal(weight, expected[name]), name
    images = trainer.generate(PROMPTS, range(6))
    by_peft = make_trainer()
    assert not torch.equal(images, by_peft.generate(PROMPTS, range(6)))
    # The base is the model without the adapter: it is far from it already.
    trainer.train()
    log = next(log for log in trainer.state.log_history if "base_distance" in log)
    assert log["replay_error"] == 0.0 and log["base_distance"] > 1e-6
    assert any(not torch.equal(weight, start[name]) for name, weight in trained_weights(trainer).items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn.to_v": 2}},
        {"alpha_pattern": {"attn.to_v": 3}, "lora_alpha": 7},
    ],
)
def test_a_program_that_knows_no_alpha_takes_the_file_at_its_full_strength(saved, tmp_path, options):
    """ComfyUI and others take alpha = rank for a layer that has no tensor `.alpha`."""
    model = saved(**options)
    weights = load_file(tmp_path / "diffusers" / DIFFUSERS)
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    assert len(weights) == 2 * len(layers) > 10
    for name, layer in layers.items():
        a, b = (weights[f"transformer.{name}.lora_{matrix}.weight"] for matrix in "AB")
        torch.testing.assert_close(b @ a, layer.get_delta_weight("default"))
    # And one that reads the metadata, as diffusers does.
    pipeline = tiny_pipelines.sd3()
    pipeline.load_lora_weights(tmp_path / "diffusers", adapter_name="default")
    scales = {module.scaling["default"] for module in pipeline.transformer.modules() if isinstance(module, LoraLayer)}
    assert scales == {1.0}


def test_published_rank_32_alpha_64(make_trainer, saved, tmp_path):
    saved(r=32, lora_alpha=64, init_lora_weights="gaussian")
    config = make_trainer(adapter=str(tmp_path / "peft"), lora_r=32).model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (32, 64)


def test_weights_keep_the_precision_of_the_file(saved, tmp_path):
    model = saved()
    pipeline = tiny_pipelines.sd3().to(torch.bfloat16)
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    _, weights = read_adapter(pipeline, str(tmp_path / "diffusers"))
    expected = {name: p * (2 if "lora_B" in name else 1) for name, p in model.named_parameters()}
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name.replace(".weight", ".default.weight")]), name
    # And nothing of it stays in the pipeline.
    after = pipeline.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


def test_file_without_metadata_is_taken_as_diffusers_takes_it(make_trainer, saved, tmp_path):
    saved()
    file = tmp_path / "diffusers" / DIFFUSERS
    save_file(load_file(file), tmp_path / "bare.safetensors")
    config = make_trainer(adapter=str(tmp_path / "bare.safetensors"), lora_r=32).model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (6, 6)


def test_own_result_is_continued(make_trainer, tmp_path):
    first = make_trainer(ema_decay=0.5, num_rollouts=2)
    first.train()
    first.save_model(str(tmp_path / "first"))
    images = first.generate(PROMPTS, range(6))
    second = make_trainer(adapter=str(tmp_path / "first"), lora_r=32)
    assert torch.equal(second.generate(PROMPTS, range(6)), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 8}, "lora_r=8 was given together with adapter='.*peft', which brings its own: 6. Leave lora_r out"),
        ({"lora_alpha": 6}, "lora_alpha=6 was given together.*its own: 12"),
        ({"lora_r": 6, "lora_target_modules": ["to_q"]}, r"lora_target_modules=\['to_q'\] was given together"),
        ({"peft_config": LoraConfig(target_modules=["to_q"])}, "peft_config was given together with adapter"),
    ],
)
def test_options_that_contradict_the_files_are_refused(make_trainer, saved, tmp_path, options, message):
    saved()
    with pytest.raises(ValueError, match=message):
        make_trainer(**{"adapter": str(tmp_path / "peft"), "lora_r": 32, **options})


def test_what_is_no_adapter_of_this_pipeline_is_refused(make_trainer, saved, tmp_path):
    def refused(adapter, message, pipeline=None):
        with pytest.raises(ValueError, match=message):
            make_trainer(pipeline, adapter=str(adapter), lora_r=32)

    saved(target_modules=["attn.to_q"])
    refused(tmp_path / "none", "is no folder or file here, and was not found on the Hub")
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path / "empty", "has neither pytorch_lora_weights.safetensors .* nor adapter_config.json .*, and 0 other"
    )
    # One matrix missing; of another size; another family.
    weights = load_file(tmp_path / "peft" / PEFT)
    name, value = next(iter(weights.items()))
    save_file({n: v for n, v in weights.items() if n != name}, tmp_path / "peft" / PEFT)
    refused(tmp_path / "peft", "1 of the adapter's weights do not fit SD3Transformer2DModel.*missing in the file")
    save_file({**weights, name: value[:, :8].contiguous()}, tmp_path / "peft" / PEFT)
    refused(tmp_path / "peft", r"do not fit SD3Transformer2DModel.*\(6, 8\) in the file, \(6, 16\) in the model")
    (tmp_path / "peft" / PEFT).write_bytes(b"cut short")
    refused(tmp_path / "peft", "adapter='.*peft' cannot be read")
    file = tmp_path / "diffusers" / DIFFUSERS
    weights = load_file(file)
    save_file({**weights, "text_encoder.x.lora_A.weight": value}, file)
    refused(tmp_path / "diffusers", "has weights for text_encoder, and only the transformer is trained")


def test_adapter_of_another_family_is_refused(make_config, make_trainer, saved, tmp_path):
    flux = tiny_pipelines.flux()
    saved(flux, target_modules=["single_transformer_blocks.0.attn.to_q"])
    for folder in ("peft", "diffusers"):
        with pytest.raises(ValueError, match="adapter='.*' (does not fit|cannot be read)"):
            make_trainer(adapter=str(tmp_path / folder), lora_r=32)


def test_prompt_learning_is_refused():
    with pytest.raises(ValueError, match="PromptTuningConfig, which trains the prompt of a language model"):
        add_adapter(tiny_pipelines.sd3(), PromptTuningConfig(num_virtual_tokens=4))


def test_adapter_needs_peft():
    with pytest.raises(ValueError, match="adapter='x' was given together with use_peft=False"):
        FDFOConfig(output_dir="unused", adapter="x", use_peft=False, use_cpu=True, report_to=[])


def test_resumed_run_must_have_begun_from_the_same_adapter(make_trainer, saved, tmp_path):
    model = saved(lora_alpha=6)
    options = {"lora_r": 32, "save_strategy": "epoch", "num_rollouts": 2}
    whole = make_trainer(adapter=str(tmp_path / "peft"), **options)
    whole.train()
    # The same adapter from another place, in the other format.
    resumed = make_trainer(adapter=str(tmp_path / "diffusers"), **options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    for name, weight in trained_weights(resumed).items():
        assert torch.equal(weight, trained_weights(whole)[name]), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(tmp_path / "other")
    other = make_trainer(adapter=str(tmp_path / "other"), **options)
    with pytest.raises(ValueError, match="is from another run: adapter .checksum of the weights to go on from"):
        other.train(resume_from_checkpoint=f"{other.args.output_dir}/checkpoint-2")


def test_both_formats_of_one_folder_are_the_averaged_weights(make_trainer, tmp_path):
    trainer = make_trainer(ema_decay=0.5, num_rollouts=3, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path))
    image = trainer.generate(PROMPTS[:1], [0])
    by_diffusers, by_peft = tiny_pipelines.sd3(), tiny_pipelines.sd3()
    by_diffusers.load_lora_weights(str(tmp_path))
    PeftModel.from_pretrained(by_peft.transformer, tmp_path)
    for pipeline in (by_diffusers, by_peft):
        loaded = PipelineFlow(pipeline, num_generations=2, **trainer.flow.call_kwargs)
        assert torch.equal(loaded.generate(PROMPTS[:1], [0]), image)


def test_an_adapter_from_a_checkpoint_is_the_average(make_trainer, tmp_path):
    trainer = make_trainer(ema_decay=0.5, num_rollouts=3, learning_rate=1e-2, save_strategy="epoch")
    trainer.train()
    checkpoint = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
    expected = {name: weight.clone() for name, weight in trainer.averaging.state_dict().items()}
    trained = trained_weights(trainer)
    assert not all(torch.equal(weight, trained[name]) for name, weight in expected.items())
    continued = trained_weights(make_trainer(adapter=str(checkpoint), output_dir=str(tmp_path / "next")))
    assert continued.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in continued.items())
    (checkpoint / "averaged_weights.safetensors").unlink()  # as if it had none
    continued = trained_weights(make_trainer(adapter=str(checkpoint), output_dir=str(tmp_path / "next")))
    assert all(torch.equal(weight, trained[name]) for name, weight in continued.items())


def test_what_load_lora_weights_makes_of_the_names_of_peft_and_of_bfloat16(saved, tmp_path):
    """As docs/sharing.md says: it loads nothing of PEFT's file, and rounds its own to the dtype of the pipeline."""
    saved(r=4)
    base = tiny_pipelines.sd3().transformer.state_dict()
    pipeline = tiny_pipelines.sd3()
    pipeline.load_lora_weights(str(tmp_path / "peft"), weight_name=PEFT)
    assert pipeline.transformer.state_dict().keys() == base.keys()
    by_diffusers, by_peft = (tiny_pipelines.sd3().to(torch.bfloat16) for _ in range(2))
    by_diffusers.load_lora_weights(str(tmp_path / "diffusers"))
    PeftModel.from_pretrained(by_peft.transformer, tmp_path / "peft")
    for pipeline, dtype in ((by_diffusers, torch.bfloat16), (by_peft, torch.float32)):
        weights = [weight for name, weight in pipeline.transformer.named_parameters() if "lora_" in name]
        assert {weight.dtype for weight in weights} == {dtype}


def test_lora_of_parameters_has_no_file_that_diffusers_cannot_load(saved, tmp_path):
    saved(target_modules=[], target_parameters=["attn.to_q.weight"])
    assert (tmp_path / "peft" / PEFT).is_file() and not (tmp_path / "diffusers" / DIFFUSERS).exists()
