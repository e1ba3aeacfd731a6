"""A LoRA of float32 on a transformer of 16 bits, computed without autocast."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import tiny_pipelines
import torch
from conftest import trained_weights
from peft import LoraConfig, get_peft_model
from tiny_runs import PROMPTS
from torch import nn
from torch.nn import functional

from trl_fdfo.pipeline.own_dtype import can_run_in_own_dtype, run_in_own_dtype
from trl_fdfo.training.engines import check_attention_backend, leave_out_autocast


CALL = {"height": 16, "width": 16, "max_sequence_length": 8, "guidance_scale": 1.0}


class Experts(nn.Module):
    """Adds what its matrices add, which is nothing without an adapter."""

    def __init__(self, dtype):
        super().__init__()
        self.matrices = nn.Parameter(torch.zeros(2, 4, 4, dtype=dtype))

    def forward(self, x):
        return x + x @ self.matrices.sum(dim=0)


class Layer(nn.Module):
    dtype = torch.bfloat16

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 4, dtype=self.dtype)
        self.words = nn.Embedding.from_pretrained(torch.zeros(3, 6, dtype=self.dtype))
        self.experts = Experts(self.dtype)

    def forward(self, x):
        return self.experts(self.inner(x + self.words(torch.zeros(x.shape[:-1], dtype=torch.long))))


def adapted(**options):
    torch.manual_seed(0)
    model = get_peft_model(Layer(), LoraConfig(r=2, lora_alpha=6, **{"target_modules": ["inner"], **options}))
    randomize(model)
    return model


def randomize(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32)


def test_the_adapter_computes_in_the_dtype_of_the_layer():
    model = adapted()
    assert can_run_in_own_dtype(model, torch.bfloat16)
    run_in_own_dtype(model)
    layer = model.get_base_model().inner
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 5, 6, dtype=torch.bfloat16, requires_grad=True)
    output = model(x)
    hidden = functional.linear(x, a.bfloat16())
    expected = torch.addmm(layer.base_layer(x).view(15, 4), hidden.view(15, 2), b.bfloat16().t(), alpha=3).view(3, 5, 4)
    assert torch.equal(output, expected) and output.dtype == torch.bfloat16
    exact = functional.linear(x.float(), layer.base_layer.weight.float() + 3 * b @ a, layer.base_layer.bias.float())
    torch.testing.assert_close(output.float(), exact, rtol=2e-2, atol=2e-2)

    weights = torch.randn_like(output)
    found = torch.autograd.grad((output * weights).sum(), (x, a, b))
    expected = torch.autograd.grad((exact * weights).sum(), (x, a, b))
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32, torch.float32]
    for gradient, other in zip(found, expected):
        torch.testing.assert_close(gradient.float(), other.float(), rtol=5e-2, atol=5e-2)

    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x).float(), exact, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"use_rslora": True},
        {"target_modules": ["words", "inner"]},
        {"target_parameters": ["experts.matrices"]},
    ],
    ids=str,
)
def test_what_other_adapters_compute(options):
    model = adapted(**options)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    expected = model(x)
    if "use_dora" in options:
        assert not can_run_in_own_dtype(model, torch.bfloat16)
        return
    run_in_own_dtype(model)
    torch.testing.assert_close(model(x).float(), expected.float(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"r": 3}], ids=str)
def test_an_adapter_that_a_user_adds_later_computes_what_it_would(options):
    models = adapted(), adapted()
    run_in_own_dtype(models[0])
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    for model in models:
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(target_modules=["inner"], **options))
        model.set_adapter("other")
        randomize(model)
    own, expected = (model(x).float() for model in models)
    torch.testing.assert_close(own, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_computes_the_same_with_weights_of_its_own(copied):
    model = adapted()
    run_in_own_dtype(model)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    expected, copy_of_model = model(x), copied(model)
    model.get_base_model().inner.lora_B["default"].weight.data.zero_()
    assert torch.equal(copy_of_model(x), expected) and not torch.equal(model(x), expected)


def test_autocast_stays_where_it_is_needed(make_trainer):
    for dtype, enabled in ((torch.float32, True), (torch.bfloat16, False)):
        trainer = make_trainer(tiny_pipelines.sd3().to(dtype), bf16=True)
        assert {weight.dtype for weight in trained_weights(trainer).values()} == {torch.float32}
        seen = set()
        block = trainer.pipeline.transformer.transformer_blocks[0]
        block.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))  # noqa: B023
        before = {name: weight.clone() for name, weight in trained_weights(trainer).items()}
        trainer.train()
        assert seen == {enabled}
        still = [name for name, weight in trained_weights(trainer).items() if torch.equal(weight, before[name])]
        assert all("transformer_blocks.1.attn.add_q_proj" in name for name in still), still  # which has no say
        assert [log["replay_error"] for log in trainer.state.log_history if "replay_error" in log] == [0.0, 0.0]


def test_a_run_samples_the_images_that_the_pipeline_makes(make_trainer):
    pipeline = tiny_pipelines.sd3().to(torch.bfloat16)
    trainer = make_trainer(pipeline, bf16=True)
    steps = trainer.args.num_inference_steps
    own = trainer.generate(["a cat"], [5])
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        images = pipeline(["a cat"], generator=generator, num_inference_steps=steps, output_type="pt", **CALL)[0]
    # The pipeline rounds its latents after each step and decodes in bfloat16.
    torch.testing.assert_close(own, images.float(), rtol=0, atol=0.03)


# Autocast where it is needed ----------------------------------------------------------------------------------------------


def test_images_before_a_run_are_in_its_precision(make_trainer):
    autocasts = []
    pipeline = tiny_pipelines.sd3()
    pipeline.transformer.proj_out.register_forward_pre_hook(
        lambda *_: autocasts.append(torch.is_autocast_enabled("cpu"))
    )
    trainer = make_trainer(pipeline, bf16=True, num_rollouts=1, learning_rate=1e-30)
    assert len(autocasts) > 4 and all(autocasts)  # of the rehearsal and the trial of the replay
    before = trainer.generate(PROMPTS[:2], [0, 1])
    trainer.train()
    assert torch.equal(trainer.generate(PROMPTS[:2], [0, 1]), before) and all(autocasts)
    exact = make_trainer(num_rollouts=1).generate(PROMPTS[:2], [0, 1])
    assert 1e-5 < (before - exact).abs().max() < 0.1


@pytest.mark.parametrize(("policy", "enabled"), [(object(), False), (None, None)])
def test_fsdp2_that_casts_by_its_own_policy_has_no_autocast(policy, enabled):
    plugin = SimpleNamespace(mixed_precision_policy=policy)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", autocast_handler=None
    )
    leave_out_autocast(accelerator, tiny_pipelines.sd3().transformer)  # all of its weights are trained, in float32
    assert getattr(accelerator.autocast_handler, "enabled", None) is enabled


def test_kernels_of_16_bits_alone_are_refused_under_autocast(make_trainer):
    trainer = make_trainer(bf16=True)
    with pytest.raises(
        ValueError, match=r"attention_backend='flash' takes queries and keys in 16 bits.*load the pipeline in"
    ):
        check_attention_backend(trainer.accelerator, "flash")
    for backend in (None, "native", "_native_cudnn", "flex"):
        check_attention_backend(trainer.accelerator, backend)
    # A LoRA on 16 bits, and float32, which the kernel itself refuses.
    for trainer in (make_trainer(tiny_pipelines.sd3().to(torch.bfloat16), bf16=True), make_trainer()):
        check_attention_backend(trainer.accelerator, "flash")
