"""The options of the config's sections Memory and Speed, and those of Trainer that save memory: what they change."""

from types import SimpleNamespace

import pytest
import tiny_pipelines
import torch
from accelerate.utils import DistributedType
from conftest import trained_weights
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from peft import PeftModel
from test_checkpoints import assert_equal, contents
from test_fdfo_trainer import metrics_of

from trl_fdfo import shapes
from trl_fdfo.algorithm import constant_churn
from trl_fdfo.memory_and_speed import is_quantized
from trl_fdfo.pipeline_flow import PipelineFlow, load_pipeline
from trl_fdfo.trainer_compat import prepare_for_engine


bitsandbytes = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny SD3, to be loaded by its name."""
    folder = tmp_path_factory.mktemp("saved") / "sd3"
    tiny_pipelines.sd3().save_pretrained(folder)
    return folder


def to_nf4(pipeline, dtype=torch.float32):
    """The pipeline with bitsandbytes' 4 bits in its transformer, on the CPU too, where diffusers refuses to do it."""
    for module in list(pipeline.transformer.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is not torch.nn.Linear:
                continue
            quantized = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4"
            )
            quantized.bias = linear.bias
            quantized.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            setattr(module, name, quantized.to("cpu"))
    return pipeline


def to_int8(saved):
    """A pipeline that its user has quantised with diffusers."""
    config = TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig())
    return load_pipeline(
        saved,
        dtype=torch.float32,
        quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": config}),
    )


QUANTIZED = {
    "int8 by the option": lambda saved: ({"quantization": "int8"}, saved),
    "int8 by the user": lambda saved: ({}, to_int8(saved)),
    "nf4 by the user": lambda saved: ({}, to_nf4(load_pipeline(saved))),
    "nf4 by the option": lambda saved: ({"quantization": "nf4", "use_cpu": False}, saved),
}
EACH_QUANTIZED = pytest.mark.parametrize(
    "quantized", [pytest.param(name, marks=[pytest.mark.gpu] * ("nf4 by the option" in name)) for name in QUANTIZED]
)


# Quantization ---------------------------------------------------------------------------------------------------------


@EACH_QUANTIZED
def test_adapters_train_beside_quantized_weights(make_trainer, saved, quantized, tmp_path):
    options, pipeline = QUANTIZED[quantized](saved)
    trainer = make_trainer(pipeline, gradient_checkpointing=True, beta=0.1, ema_decay=0.5, **options)
    transformer = trainer.pipeline.transformer
    assert is_quantized(transformer)
    inputs, expected = velocity_input(transformer), load_pipeline(saved).transformer.to(transformer.device)
    with torch.no_grad(), trainer.model.disable_adapter():
        before = transformer(**inputs).sample
        difference = (before - expected(**inputs).sample).norm() / expected(**inputs).sample.norm()
    # What the rounding of random weights does to a velocity: 8 bits of the largest weight of a row, or 16 values.
    assert 1e-4 < difference < (0.02 if "int8" in quantized else 0.3)
    first = trained_weights(trainer)
    assert {weight.dtype for weight in first.values()} == {torch.float32}
    trainer.train()
    assert metrics_of(trainer, "replay_error") == [0.0, 0.0]
    assert any(not torch.equal(weight, first[name]) for name, weight in trained_weights(trainer).items())
    with torch.no_grad(), trainer.model.disable_adapter():
        assert torch.equal(transformer(**inputs).sample, before)

    # The adapter is that of the unquantised model.
    trainer.save_model(str(tmp_path / "adapter"))
    weights = {name: weight.cpu() for name, weight in averaged(trainer).items()}
    for_peft = PeftModel.from_pretrained(load_pipeline(saved).transformer, tmp_path / "adapter")
    found = {name.replace(".default", ""): weight for name, weight in for_peft.state_dict().items() if "lora" in name}
    assert found.keys() == {name.replace(".default", "") for name in weights}
    for name, weight in weights.items():
        assert torch.equal(found[name.replace(".default", "")], weight), name
    for_diffusers = load_pipeline(saved)
    for_diffusers.load_lora_weights(tmp_path / "adapter")
    with torch.no_grad():
        inputs = {name: value.cpu() for name, value in inputs.items()}
        assert torch.equal(for_diffusers.transformer(**inputs).sample, for_peft(**inputs).sample)


def averaged(trainer) -> dict[str, torch.Tensor]:
    with trainer._averaged_weights():
        return trained_weights(trainer)


def velocity_input(transformer) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(transformer.device, transformer.dtype)
    return {
        "hidden_states": draw(2, 4, 8, 8),
        "timestep": torch.tensor([900.0, 300.0], device=transformer.device),
        "encoder_hidden_states": draw(2, 8, 32),
        "pooled_projections": draw(2, 32),
    }


@EACH_QUANTIZED
def test_a_quantized_run_goes_on_to_the_bit(make_trainer, saved, quantized, tmp_path):
    folders = []
    for name, stops in (("whole", (2,)), ("resumed", (1, 2))):
        for rollouts in stops:
            options, pipeline = QUANTIZED[quantized](saved)
            options |= {"num_rollouts": rollouts, "save_strategy": "epoch", "output_dir": str(tmp_path / name)}
            trainer = make_trainer(pipeline, **options)
            trainer.train(resume_from_checkpoint=True)
        folders.append(tmp_path / name / "checkpoint-4")
    whole, resumed = map(contents, folders)
    assert_equal(resumed, whole)


@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.03), ("nf4", 0.5)])
def test_how_far_the_velocity_of_a_trained_model_moves(quantization, tolerance):
    """On the packaged pipeline, at all noise levels: most at the last one, where what is left of the velocity is small."""
    pipelines = [shapes.load_pipeline() for _ in range(2)]
    if quantization == "nf4":
        to_nf4(pipelines[1])
    else:
        torchao.quantization.quantize_(pipelines[1].transformer, torchao.quantization.Int8WeightOnlyConfig())
    call = {"height": 32, "width": 32, "guidance_scale": 1.0, "max_sequence_length": 0}
    given, quantized = (PipelineFlow(p, num_generations=2, num_inference_steps=8, **call) for p in pipelines)
    prompts = shapes.captions()[:4]
    churn = constant_churn(given.noise_levels(prompts[0]), 0.05)
    batch = given.rollout(prompts, churn, range(4), range(8), range(8))
    errors = []
    for level, velocity in batch.velocities.items():
        with torch.no_grad():
            errors.append(((quantized.velocity(batch, level) - velocity).norm() / velocity.norm()).item())
    assert 1e-3 < min(errors) and errors[0] < tolerance / 3 and max(errors) < tolerance, errors


def test_quantized_weights_are_refused_where_they_cannot_be_trained_or_sharded(make_trainer, saved):
    with pytest.raises(
        ValueError, match=r"use_peft=False would train the quantised weights of this StableDiffusion3Pip"
    ):
        make_trainer(to_nf4(load_pipeline(saved)), use_peft=False)
    with pytest.raises(ValueError, match=r"use_peft=False would train the quantised weights"):
        make_trainer(to_int8(saved), use_peft=False)
    for engine, state in ((DistributedType.DEEPSPEED, {}), (DistributedType.FSDP, {"fsdp_plugin": object()})):
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), distributed_type=engine, state=SimpleNamespace(**state)
        )
        with pytest.raises(
            ValueError, match=rf"is quantised, and {engine.value} shards.*Train it with DDP or on one GPU"
        ):
            prepare_for_engine(accelerator, to_int8(saved))


def test_nf4_is_refused_without_a_gpu(make_trainer, saved):
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=r"quantization='nf4' needs a GPU.*set quantization='int8'"):
        make_trainer(saved, quantization="nf4")
