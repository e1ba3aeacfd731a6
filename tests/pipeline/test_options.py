"""Effects of the config's sections Memory and Speed, and of Trainer's options that save memory."""

import re
import warnings
from types import SimpleNamespace

import datasets
import pytest
import tiny_pipelines
import torch
from accelerate.utils import DistributedType
from checkpoint_contents import assert_equal, contents
from conftest import logged, trained_weights, warnings_of_the_package
from datasets import Dataset
from diffusers import AsymmetricAutoencoderKL, PipelineQuantizationConfig, SD3Transformer2DModel, TorchAoConfig
from peft import PeftModel
from tiny_pipelines import qwen_image
from tiny_runs import PROMPTS
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import TrainerCallback

from trl_fdfo import FDFOTrainer, shapes
from trl_fdfo.algorithm import constant_churn
from trl_fdfo.pipeline.options import SLICED_PIXELS, is_quantized, set_attention_backend, set_vae_options
from trl_fdfo.pipeline_flow import PipelineFlow, load_pipeline
from trl_fdfo.training.config_checks import check_device
from trl_fdfo.training.engines import prepare_for_engine
from trl_fdfo.training.setup import warn_of_lengths


bitsandbytes = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny SD3, to be loaded by its name."""
    folder = tmp_path_factory.mktemp("saved") / "sd3"
    tiny_pipelines.sd3().save_pretrained(folder)
    return folder


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """Unpacked by PyTorch: bitsandbytes' own kernels for CPUs with AVX512 are right for rows of whole blocks alone (0.50)."""

    def forward(self, x):
        state, packed = self.weight.quant_state, self.weight.view(-1).int()
        scales = state.absmax.repeat_interleave(state.blocksize)[: state.shape.numel()]
        weight = state.code[torch.stack([packed >> 4, packed & 15], dim=-1)].view(-1) * scales
        return torch.nn.functional.linear(x, weight.view(state.shape).to(x.dtype), self.bias)


def to_nf4(pipeline, dtype=torch.float32):
    """The pipeline with bitsandbytes' 4 bits in its transformer, on the CPU too, where diffusers refuses to do it."""
    options = {"quant_type": "nf4", "compress_statistics": False}
    for module in list(pipeline.transformer.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is not torch.nn.Linear:
                continue
            quantized = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, dtype, **options)
            quantized.bias = linear.bias
            quantized.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, **options)
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
NEEDS_GPU = {"nf4 by the option": "diffusers refuses bitsandbytes on a CPU, where 'nf4 by the user' stands for it"}
EACH_QUANTIZED = pytest.mark.parametrize(
    "quantized",
    [pytest.param(name, marks=pytest.mark.gpu(NEEDS_GPU[name]) if name in NEEDS_GPU else ()) for name in QUANTIZED],
)


# Quantization ---------------------------------------------------------------------------------------------------------


@EACH_QUANTIZED
def test_adapters_train_beside_quantized_weights(make_trainer, saved, quantized, tmp_path):
    options, pipeline = QUANTIZED[quantized](saved)
    trainer = make_trainer(pipeline, gradient_checkpointing=True, beta=0.1, ema_decay=0.5, **options)
    transformer = trainer.pipeline.transformer
    assert is_quantized(transformer)
    inputs = velocity_input(transformer)
    expected = load_pipeline(saved).transformer.to(transformer.device, transformer.dtype)
    with torch.no_grad(), trainer.model.disable_adapter():
        before = transformer(**inputs).sample
        difference = (before - expected(**inputs).sample).norm() / expected(**inputs).sample.norm()
    # Effect of rounding random weights on a velocity: 8 bits of the largest weight of a row, or 16 values.
    assert 1e-4 < difference < (0.02 if "int8" in quantized else 0.3)
    first = trained_weights(trainer)
    assert {weight.dtype for weight in first.values()} == {torch.float32}
    trainer.train()
    assert logged(trainer, "replay_error") == [0.0, 0.0]
    assert any(not torch.equal(weight, first[name]) for name, weight in trained_weights(trainer).items())
    with torch.no_grad(), trainer.model.disable_adapter():
        assert torch.equal(transformer(**inputs).sample, before)

    # The unquantised model gets the same adapter.
    trainer.save_model(str(tmp_path / "adapter"))
    weights = {name: weight.cpu() for name, weight in averaged(trainer).items()}
    for_peft = PeftModel.from_pretrained(load_pipeline(saved).transformer, tmp_path / "adapter")
    found = {name.replace(".default", ""): weight for name, weight in for_peft.state_dict().items() if "lora" in name}
    assert found.keys() == {name.replace(".default", "") for name in weights}
    for name, weight in weights.items():
        assert torch.equal(found[name.replace(".default", "")], weight), name
    for_diffusers = load_pipeline(saved)
    for_diffusers.load_lora_weights(tmp_path / "adapter")
    inputs = velocity_input(for_diffusers.transformer)
    with torch.no_grad():
        assert torch.equal(for_diffusers.transformer(**inputs).sample, for_peft(**inputs).sample)


def averaged(trainer) -> dict[str, torch.Tensor]:
    with trainer.averaged_weights():
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


def test_plan_counts_quantized_weights_as_they_are_stored(make_trainer, saved):
    plain, quantized = (
        next(part for part in trainer.run_plan().parts() if "frozen" in part.name)
        for trainer in (
            make_trainer(saved, trainer_class=FDFOTrainer, quantization=option) for option in (None, "int8")
        )
    )
    # Linear layers in 8 of 32 bits; the others, and the scales, are as they were.
    assert 0.25 * plain.training < quantized.training < 0.5 * plain.training
    assert quantized.note == "int8, float32" and plain.note == "float32"


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
    """On the packaged pipeline, at all noise levels: most at the last one, whose velocity is small."""
    pipelines = [shapes.load_pipeline() for _ in range(2)]
    if quantization == "nf4":
        to_nf4(pipelines[1])
    else:
        torchao.quantization.quantize_(pipelines[1].transformer, torchao.quantization.Int8WeightOnlyConfig())
    call = {"height": 32, "width": 32, "guidance_scale": 1.0, "max_sequence_length": 0}
    given, quantized = (PipelineFlow(p, num_generations=2, num_inference_steps=8, **call) for p in pipelines)
    prompts = shapes.captions()[:4]
    churn = constant_churn(given.rehearse(prompts[:1]).sigmas, 0.05)
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


# Host memory and activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["offload_components", "offload_trajectories", "vae_slicing"])
def test_memory_options_change_nothing_but_memory(make_trainer, option):
    results = []
    for value in (False, True):
        trainer = make_trainer(eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:3]}), **{option: value})
        trainer.train()
        assert logged(trainer, "replay_error") == [0.0, 0.0]
        results.append({**trained_weights(trainer), "images": trainer.generate(PROMPTS, range(6))})
    # One image at a time is another convolution than four at a time: equal to rounding.
    tolerance = 1e-5 if option == "vae_slicing" else 0.0
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=tolerance)


class Watched:
    """Mixed into the class of a module: logs its calls, and each time that it is put on a device."""

    log: list[str]

    def forward(self, *args, **kwargs):
        self.log.append(f"{type(self).__name__} called")
        return super().forward(*args, **kwargs)

    def _apply(self, *args, **kwargs):
        self.log.append(f"{type(self).__name__} placed")
        return super()._apply(*args, **kwargs)


def watch(pipeline) -> list[str]:
    """The log of the text encoders and the transformer from now on."""
    log = []
    for part, name in (("text_encoder", "encoder"), ("text_encoder_2", "encoder"), ("transformer", "transformer")):
        module = getattr(pipeline, part)
        module.__class__ = type(name, (Watched, type(module)), {"log": log})
    return log


@pytest.mark.parametrize(("option", "turns"), [("offload_components", 2), ("cache_prompt_embeds", 4)])
def test_text_encoders_leave_before_the_transformer_is_called(make_trainer, option, turns, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pipeline = tiny_pipelines.sd3()
    log = watch(pipeline)
    options = {option: True, "images_per_eval_prompt": 2, "per_device_eval_batch_size": 4}
    trainer = make_trainer(pipeline, eval_dataset=Dataset.from_dict({"prompt": PROMPTS[3:]}), **options)
    # The transformer makes room, two encoders encode and leave, and it comes back: in a rehearsal and in the trial, and with
    # a cache in two rehearsals more, which find the axes of the samples.
    turn = "transformer placed (encoder called )+(encoder placed ){2}transformer placed transformer called"
    assert len(re.findall(turn, " ".join(log))) == turns
    assert len(re.findall("encoder called (encoder placed ){2}", " ".join(log))) == turns

    def logged(function, *args) -> tuple[list[str], list[str]]:
        del log[:]
        function(*args)
        return log[: log.index("transformer called")], log[log.index("transformer called") :]

    # Two batches each. The prompts of all are encoded before the first is sampled.
    calls = [] if option == "cache_prompt_embeds" else 2 * 2 * ["encoder called"] + 2 * ["encoder placed"]
    for function, *args in ((trainer._roll_out, 0), (trainer.evaluate,), (trainer.generate, 2 * PROMPTS[3:], range(6))):
        encoding, sampling = logged(function, *args)
        assert encoding == calls and "encoder called" not in sampling
    # Prompts that nobody has announced.
    encoding, _ = logged(trainer.generate, ["something else"], [0])
    assert encoding == 2 * ["encoder called"] + 2 * ["encoder placed"]


@pytest.mark.parametrize("pipeline", [tiny_pipelines.sd3, tiny_pipelines.flux])
def test_gradient_checkpointing_changes_nothing_but_memory(make_trainer, pipeline):
    results = []
    for checkpointing in (False, True):
        saved_for_backward = []
        count = lambda tensor, saved=saved_for_backward: saved.append(tensor.numel()) or tensor
        with (
            warnings.catch_warnings(record=True) as warned,
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            warnings.simplefilter("always")
            trainer = make_trainer(pipeline(), gradient_checkpointing=checkpointing)
            trainer.train()
        assert not [str(warning.message) for warning in warned if "checkpoint" in str(warning.message).lower()]
        assert logged(trainer, "replay_error") == [0.0, 0.0]
        results.append((sum(saved_for_backward), trained_weights(trainer)))
    (plain_size, plain), (checkpointed_size, checkpointed) = results
    assert checkpointed_size < plain_size / 2
    for name, weight in plain.items():
        torch.testing.assert_close(checkpointed[name], weight, rtol=0, atol=1e-6)


# The VAE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slicing", "pixels", "expected"),
    [
        (None, SLICED_PIXELS, False),
        (None, SLICED_PIXELS + 1, True),
        (False, SLICED_PIXELS + 1, False),
        (True, 1, True),
    ],
)
def test_large_batches_are_decoded_one_image_at_a_time(slicing, pixels, expected):
    pipeline = tiny_pipelines.sd3()
    set_vae_options(pipeline, slicing, False, pixels)
    assert pipeline.vae.use_slicing is expected


def test_a_vae_that_cannot_slice_is_asked_only_if_the_option_says_so():
    pipeline = tiny_pipelines.sd3()
    pipeline.register_modules(vae=AsymmetricAutoencoderKL())
    set_vae_options(pipeline, None, False, SLICED_PIXELS + 1)
    with pytest.raises(ValueError, match="vae_slicing=True, but the VAE"):
        set_vae_options(pipeline, True, False, 1)


@pytest.mark.parametrize(
    ("options", "pixels"),
    [
        ({}, 4 * 16 * 16),
        ({"per_device_sampling_batch_size": 4, "num_generations": 3}, 12 * 16 * 16),
        ({"per_device_eval_batch_size": 5}, 5 * 16 * 16),
        ({"height": None}, 4 * 1024 * 16),
    ],
)
def test_pixels_that_are_decoded_at_a_time(make_config, options, pixels):
    assert make_config(**options).decoded_pixels() == pixels


def test_tiles_are_decoded_on_their_own_and_blended(make_trainer):
    plain, tiled = make_trainer(), make_trainer(vae_tiling=True)
    # Up to the size of a tile, 16 pixels, nothing changes.
    assert torch.equal(tiled.generate(PROMPTS, range(6)), plain.generate(PROMPTS, range(6)))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, image = (trainer.pipeline.vae.decode(latents).sample for trainer in (plain, tiled))
        tile = plain.pipeline.vae.decode(latents[:, :, :8, :8]).sample
    assert image.shape == whole.shape
    # A quarter of the tile is blended with the next one. The rest is not what it is in the whole image: each tile has
    # its own statistics of the group norms, and its own edges.
    torch.testing.assert_close(image[:, :, :12, :12], tile[:, :, :12, :12], rtol=0, atol=1e-6)
    assert 0.01 < (image - whole).square().mean().sqrt() < whole.std()


# Trainer's optimizers -------------------------------------------------------------------------------------------------


def bytes_of(value) -> int:
    if not isinstance(value, torch.Tensor):
        return 0
    if is_traceable_wrapper_subclass(value):
        return sum(bytes_of(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


@pytest.fixture
def eagerly():
    """Without torch.compile: torchao's optimizers compile their step, which takes a minute and changes nothing but time."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_torch_8bit"])
def test_optimizers_of_8_bits(make_trainer, eagerly, optim, tmp_path):
    # On a model whose adapters have matrices of more than 4,096 numbers: smaller ones stay in 32 bits.
    shape = {"height": 32, "width": 32, "pipeline_kwargs": {"max_sequence_length": 0}, "lora_r": 64, "lora_alpha": 128}
    first, weights, sizes = trained_weights(make_trainer(shapes.load_pipeline(), **shape)), {}, {}
    for name, stops in (("adamw_torch", (2,)), (optim, (2,)), (f"{optim} resumed", (1, 2))):
        for rollouts in stops:
            trainer = make_trainer(
                shapes.load_pipeline(),
                output_dir=str(tmp_path / name),
                optim=name.removesuffix(" resumed"),
                num_rollouts=rollouts,
                save_strategy="epoch",
                **shape,
            )
            trainer.train(resume_from_checkpoint=True)
        weights[name] = trained_weights(trainer)
        sizes[name] = sum(bytes_of(value) for state in trainer.optimizer.state.values() for value in state.values())
    flat = lambda of: torch.cat([weight.flatten() for weight in of.values()])
    moved = flat(weights["adamw_torch"]) - flat(first)
    # Moments in 8 bits, a scale for each block of them: a few hundredths of each step.
    assert (flat(weights[optim]) - flat(weights["adamw_torch"])).norm() < 0.06 * moved.norm()
    assert sizes[optim] < sizes["adamw_torch"] / 3
    assert_equal(weights[f"{optim} resumed"], weights[optim])


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reset_attention():
    yield
    # Diffusers keeps the last backend for all models of the process.
    tiny_pipelines.flux().transformer.reset_attention_backend()


def test_cudnn_attention_whose_backward_pass_returns_nan_is_off(make_trainer):
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_trainer(num_rollouts=1)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_cudnn_attention_can_be_had_where_a_transformer_knows_no_backends(make_trainer):
    make_trainer(attention_backend="_native_cudnn")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    make_trainer()  # the next trainer has not asked for it
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_what_was_compiled_with_other_kernels_is_not_taken_from_the_cache(dynamo):
    attend = torch.compile(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q), dynamic=False)
    hits, q = [], torch.randn(1, 2, 16, 8)
    both = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # a CPU takes the first, which is not compiled
    with fresh_cache(), torch.compiler.config.patch(cache_key_tag="mine"):
        for allowed, tag in ((both, "flash,math"), (both[:1], "flash"), (both, "flash,math")):
            with sdpa_kernel(allowed):
                torch._dynamo.reset()
                set_attention_backend(tiny_pipelines.sd3(), None)
                attend(q)
            assert torch.compiler.config.cache_key_tag == f"mine attention={tag}"
            hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 0, 1]


FLEX = pytest.param("flex", marks=pytest.mark.gpu("on a CPU PyTorch has no backward pass of flex attention"))


@pytest.mark.parametrize("backend", ["native", "_native_math", FLEX])
def test_attention_backends_train_the_same(make_trainer, reset_attention, backend):
    results = []
    for option in (None, backend):
        # In float32: in 16 bits a gradient near 0 may change its sign, and Adam's first steps are as large for it as for others.
        options = {"attention_backend": option, "use_cpu": backend != "flex", "bf16": False}
        trainer = make_trainer(tiny_pipelines.flux(), **options)
        trainer.train()
        assert max(logged(trainer, "replay_error")) < 1e-6
        results.append(trained_weights(trainer))
    processors = {module.processor for module in trainer.model.modules() if hasattr(module, "processor")}
    assert {processor._attention_backend.value for processor in processors} == {backend}
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=1e-5 if backend != "flex" else 1e-4)


# Compilation ----------------------------------------------------------------------------------------------------------


def sd3(num_layers: int, dual_attention_layers: tuple = ()):
    """As version 3.5 is: blocks with a second attention, plain ones, and a last one without its text stream."""
    pipeline = tiny_pipelines.sd3()
    torch.manual_seed(0)
    config = {**pipeline.transformer.config, "num_layers": num_layers, "dual_attention_layers": dual_attention_layers}
    pipeline.register_modules(transformer=SD3Transformer2DModel(**config))
    return pipeline


class CompiledGraphs(TrainerCallback):
    """Number of graphs after each rollout."""

    def __init__(self):
        self.counts = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            self.counts.append(counters["stats"]["unique_graphs"])


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.slow
def test_repeated_blocks_are_compiled_once_per_kind_and_use(make_trainer, dynamo, tmp_path):
    options = {"num_rollouts": 3, "num_inference_steps": 2, "beta": 0.1, "ema_decay": 0.5, "save_strategy": "epoch"}
    plain = make_trainer(sd3(5, dual_attention_layers=(0,)), output_dir=str(tmp_path / "plain"), **options)
    plain.train()
    assert counters["stats"]["unique_graphs"] == 0

    graphs = CompiledGraphs()
    options |= {"torch_compile": True, "torch_compile_backend": "eager", "output_dir": str(tmp_path / "compiled")}
    compiled = make_trainer(sd3(5, dual_attention_layers=(0,)), callbacks=[graphs], **options)
    compiled.train()
    # Three kinds, in the rollout, in the update and without the adapter, whatever the number of blocks: more than
    # PyTorch's limit of 8, beyond which it would go on without compiling.
    assert graphs.counts == [9, 9, 9] and not counters["recompiles"]
    assert max(logged(compiled, "replay_error")) < 1e-6
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    for name, weight in trained_weights(plain).items():
        torch.testing.assert_close(trained_weights(compiled)[name], weight, rtol=0, atol=1e-6)

    # A run goes on, and what was saved is what a run without compilation saves.
    resumed = make_trainer(sd3(5, dual_attention_layers=(0,)), **{**options, "output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=str(tmp_path / "compiled" / "checkpoint-4"))
    assert_equal(trained_weights(resumed), trained_weights(compiled))
    found, expected = (contents(tmp_path / name / "checkpoint-6") for name in ("compiled", "plain"))
    assert found.keys() == expected.keys()
    # Other batch sizes get graphs of their own.
    for size in (3, 2):
        made = counters["stats"]["unique_graphs"]
        assert torch.isfinite(resumed.generate(PROMPTS[:size], range(size))).all()
        assert counters["stats"]["unique_graphs"] == made + 3


@pytest.mark.slow
def test_the_default_compiler_trains_the_same(make_trainer, dynamo):
    """One block alone, as each graph takes the compiler its time."""
    plain = make_trainer(sd3(1), num_inference_steps=2)
    plain.train()
    compiled = make_trainer(sd3(1), num_inference_steps=2, torch_compile=True)
    compiled.train()
    assert counters["stats"]["unique_graphs"] == 2 and not counters["recompiles"]
    # Fused kernels round otherwise in a pass with gradients than in one without.
    assert max(logged(compiled, "replay_error")) < 1e-5
    for name, weight in trained_weights(plain).items():
        torch.testing.assert_close(trained_weights(compiled)[name], weight, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("build", "is_told"), [(qwen_image.build, True), (tiny_pipelines.sd3, False)])
def test_lengths_that_blocks_are_compiled_for_are_told(make_trainer, caplog, build, is_told):
    trainer = make_trainer(build(), pipeline_kwargs={"max_sequence_length": 64})
    warn_of_lengths(trainer.flow, trainer.args, Dataset.from_dict({"prompt": ["a cat", "two dogs in the snow"]}))
    told = [message for message in warnings_of_the_package(caplog) if "compiled anew for each length" in message]
    assert len(told) == is_told
    caplog.clear()
    warn_of_lengths(trainer.flow, trainer.args, Dataset.from_dict({"prompt": ["a cat", "a dog"]}))
    assert not [message for message in warnings_of_the_package(caplog) if "for each length" in message]


def test_a_device_without_float64_is_refused():
    """Trainer takes it by itself on a Mac, and rewards are float64."""
    check_device(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"Apple's GPU \(mps\).*Set use_cpu=True"):
        check_device(torch.device("mps"))
