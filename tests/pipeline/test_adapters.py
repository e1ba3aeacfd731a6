"""Which layers get an adapter, which files are read, and what a refused adapter leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import trained_weights
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from fake_hub import Commit, FakeHub, Repo
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny_pipelines import prx, qwen_image
from tiny_runs import PROMPTS

from trl_fdfo.pipeline.adapter_files import (
    OtherComponentsError,
    read_adapter,
    read_call_options,
    save_call_options,
    save_diffusers_lora,
)
from trl_fdfo.pipeline.flow import PipelineFlow
from trl_fdfo.pipeline.lora import add_adapter, attention_projections, check_stored_weights, default_lora_config
from trl_fdfo.pipeline.schedulers import RolloutScheduler
from trl_fdfo.pipeline.trained import restored_on_error
from trl_fdfo.saving.checkpoint_files import MANIFEST, commit


DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
PUBLISHED_TARGETS = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


def dual_sd3() -> StableDiffusion3Pipeline:
    """A tiny SD3 whose first block has a second attention, of the image alone, as in SD 3.5 Medium."""
    pipeline = tiny_pipelines.sd3()
    torch.manual_seed(0)
    config = {**pipeline.transformer.config, "dual_attention_layers": (0,), "_use_default_values": []}
    parts = {**pipeline.components, "transformer": SD3Transformer2DModel.from_config(config)}
    pipeline = StableDiffusion3Pipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def adapted_layers(model) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]


def changes_of(model) -> dict[str, torch.Tensor]:
    """What the adapter adds to the weights of each layer."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def with_values(pipeline, **options) -> PeftModel:
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": attention_projections(pipeline.transformer), **options}
    model = add_adapter(pipeline, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def state(pipeline) -> dict:
    """All that a refused adapter might change in the transformer."""
    modules = dict(pipeline.transformer.named_modules())
    return {
        "modules": {name: (module, module.training) for name, module in modules.items()},
        "gradients": {name: weight.requires_grad for name, weight in pipeline.transformer.named_parameters()},
        "attributes": pipeline.transformer.__dict__.keys() - {"_modules"},
        "hooks": {name: dict(module._forward_pre_hooks) for name, module in modules.items()},
    }


# The layers that get an adapter ---------------------------------------------------------------------------------------


def test_default_is_the_published_adapter_at_its_size(tmp_path):
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
        config = default_lora_config(32, 64, None, transformer)
        model = PeftModel(transformer.requires_grad_(False), config)
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (32, 64, "gaussian")
    assert {target.removeprefix("attn.") for target in config.target_modules} == PUBLISHED_TARGETS
    layers = adapted_layers(model)
    assert len(layers) == 191 and not any("attn2" in name for name in layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 18_776_064
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: torch.zeros(value.shape) for name, value in weights.items()}, tmp_path / PEFT, {"format": "pt"})
    assert (tmp_path / PEFT).stat().st_size == 75_156_544


def test_second_attention_of_a_joint_block_has_no_adapter(make_trainer):
    pipeline = dual_sd3()
    assert "transformer_blocks.0.attn2.to_q" in dict(pipeline.transformer.named_modules())
    layers = adapted_layers(make_trainer(pipeline).model)
    # The last block of two has no `to_add_out`.
    assert len(layers) == 8 + 7 and not any("attn2" in name for name in layers)
    # By name it can still have one.
    layers = adapted_layers(make_trainer(dual_sd3(), lora_target_modules=["attn2.to_q"]).model)
    assert [name.removeprefix("base_model.model.") for name in layers] == ["transformer_blocks.0.attn2.to_q"]


def test_attention_without_a_joint_one_beside_it_keeps_its_adapter():
    transformer = tiny_pipelines.flux().transformer  # joint blocks, and blocks of one stream
    model = add_adapter(tiny_pipelines.flux(), LoraConfig(r=2, target_modules=attention_projections(transformer)))
    layers = adapted_layers(model)
    assert sum("single_transformer_blocks" in name for name in layers) == 3 and len(layers) == 11


def test_targets_are_the_shortest_names_that_no_other_module_has():
    class TinyAttention(torch.nn.Module):
        def __init__(self, out):
            super().__init__()
            self.to_q, self.to_out = torch.nn.Linear(2, 2), out

    class Block(torch.nn.Module):
        def __init__(self, out):
            super().__init__()
            self.attn, self.to_q = TinyAttention(out), torch.nn.Linear(2, 2)

    linear = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"a": Block(torch.nn.ModuleList([linear])), "b": Block(torch.nn.Linear(2, 2))})
    assert attention_projections(model) == ["attn.to_q", "b.attn.to_out", "to_out.0"]


# Wrapped and fused layers ---------------------------------------------------------------------------------------------


def compile_it(pipeline):
    pipeline.transformer = torch.compile(pipeline.transformer)


def compile_a_block(pipeline):
    blocks = pipeline.transformer.transformer_blocks
    blocks[1] = torch.compile(blocks[1])


def compile_everything(pipeline):
    compile_it(pipeline)
    pipeline.vae = torch.compile(pipeline.vae)
    pipeline.text_encoder = torch.compile(pipeline.text_encoder)


def data_parallel(pipeline):
    pipeline.transformer = torch.nn.DataParallel(pipeline.transformer)


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compile_it, "`pipeline.transformer` is a OptimizedModule, a wrapper.*`_orig_mod`.*set torch_compile=True"),
        (compile_a_block, "`pipeline.transformer.transformer_blocks.1` is a OptimizedModule, a wrapper"),
        (compile_everything, "`pipeline.transformer` is a OptimizedModule, a wrapper"),
        (data_parallel, "`pipeline.transformer` is a DataParallel, a wrapper.*Give the module itself, its `module`"),
        (
            lambda pipeline: pipeline.transformer.fuse_qkv_projections(),
            "0.attn` is fused, by `fuse_qkv_projections`.*Load the pipeline anew",
        ),
    ],
)
def test_other_names_of_weights_are_refused(make_trainer, use_peft, change, message):
    pipeline = tiny_pipelines.sd3()
    change(pipeline)
    with pytest.raises(ValueError, match=message):
        make_trainer(pipeline, use_peft=use_peft)


def test_unwrapped_as_the_message_says_it_is_the_same_run(make_trainer):
    pipeline = tiny_pipelines.sd3()
    compile_it(pipeline)
    pipeline.transformer = pipeline.transformer._orig_mod
    runs = [make_trainer(pipeline, num_rollouts=1), make_trainer(num_rollouts=1)]
    for trainer in runs:
        trainer.train()
    unwrapped, plain = map(trained_weights, runs)
    assert unwrapped.keys() == plain.keys() and all(torch.equal(unwrapped[name], plain[name]) for name in plain)


def test_unfused_where_that_removes_the_fused_layers():
    pipeline = tiny_pipelines.flux()
    before = attention_projections(pipeline.transformer)
    pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="is fused"):
        add_adapter(pipeline, LoraConfig(target_modules=["to_q"]))
    pipeline.transformer.unfuse_qkv_projections()
    assert attention_projections(pipeline.transformer) == before
    assert len(adapted_layers(add_adapter(pipeline, LoraConfig(target_modules=before)))) == 11


def test_names_in_a_checkpoint_are_compared(make_trainer, tmp_path):
    model = with_values(tiny_pipelines.sd3())
    model.save_pretrained(tmp_path)
    check_stored_weights(model, tmp_path)
    check_stored_weights(model, tmp_path / "of an engine")
    weights = load_file(tmp_path / PEFT)
    compiled = {name.replace("base_model.model.", "base_model.model._orig_mod."): w for name, w in weights.items()}
    name, rest = min(weights), {name: weight for name, weight in weights.items() if name != min(weights)}
    for stored, count in ((compiled, 2 * len(weights)), (rest, 1), ({**weights, "more": weights[name].clone()}, 1)):
        save_file(stored, tmp_path / PEFT)
        with pytest.raises(ValueError, match=f"{count} names of weights are only in .* or only in the model, such as"):
            check_stored_weights(model, tmp_path)
    whole = tiny_pipelines.sd3().transformer
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    check_stored_weights(whole, tmp_path)
    save_file({f"_orig_mod.{name}": w for name, w in whole.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="such as _orig_mod.*in the file.*wrapped, compiled or fused. Start anew"):
        check_stored_weights(whole, tmp_path)


@pytest.mark.parametrize("use_peft", [True, False])
def test_resume_from_other_names_is_refused(make_trainer, use_peft):
    options = {"use_peft": use_peft, "save_strategy": "epoch"}
    trainer = make_trainer(num_rollouts=1, **options)
    trainer.train()
    # As an earlier run with a compiled transformer would have written it.
    checkpoint = Path(trainer.args.output_dir, "checkpoint-2")
    written = checkpoint.rename(checkpoint.with_name("written"))
    file = written / (PEFT if use_peft else "model.safetensors")
    save_file({f"_orig_mod.{name}": weight for name, weight in load_file(file).items()}, file, {"format": "pt"})
    (written / MANIFEST).unlink()
    commit(written, checkpoint, trainer.checkpointer.fingerprint)
    with pytest.raises(ValueError, match="such as _orig_mod.* in the file: a run cannot go on"):
        make_trainer(num_rollouts=2, **options).train(resume_from_checkpoint=str(checkpoint))


# A refused adapter ----------------------------------------------------------------------------------------------------


def unsupported(pipeline):
    add_adapter(pipeline, LoraConfig(target_modules=["to_q", "norm_q"]))  # PEFT stops in the middle


def of_another_model(pipeline):
    add_adapter(pipeline, LoraConfig(r=2, target_modules=["to_q"]), {"x": torch.zeros(1)})


def fails_later(pipeline):
    with restored_on_error(pipeline):
        pipeline.transformer.requires_grad_(False).train()
        accelerate.cpu_offload_with_hook(pipeline.text_encoder, torch.device("cpu"))
        add_adapter(pipeline, LoKrConfig(r=2, target_modules=["to_q"]))
        raise ValueError("later")


@pytest.mark.parametrize("fail", [unsupported, of_another_model, fails_later])
def test_refused_adapter_leaves_the_pipeline_as_it_was(fail):
    pipeline = tiny_pipelines.sd3()
    pipeline.transformer.eval()
    before = state(pipeline)
    forward = pipeline.text_encoder.forward
    with pytest.raises(ValueError):
        fail(pipeline)
    assert state(pipeline) == before and pipeline.text_encoder.forward == forward
    # Both libraries can put one on it.
    pipeline.transformer.add_adapter(LoraConfig(target_modules=["to_q"]), adapter_name="default")
    pipeline.unload_lora_weights()
    assert adapted_layers(add_adapter(pipeline, LoraConfig(r=2, target_modules=["to_q"])))


def test_restored_weights_stay_where_they_were_moved():
    pipeline = tiny_pipelines.sd3()
    with pytest.raises(ValueError), restored_on_error(pipeline):
        pipeline.transformer.to(torch.float64)
        raise ValueError
    tensors = [*pipeline.transformer.parameters(), *pipeline.transformer.buffers()]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), None)},
        {"pipeline_kwargs": {"max_sequence_length": 9999}},
        {"pipeline_kwargs": {"max_sequence_length": 8, "sigmas": [1.0, 0.5]}},
        {"lora_target_modules": ["norm_q"]},
    ],
)
def test_corrected_second_try_is_the_first_try_of_another(make_trainer, wrong):
    pipeline = tiny_pipelines.sd3()
    before = state(pipeline)
    with pytest.raises(ValueError):
        make_trainer(pipeline, **wrong)
    assert state(pipeline) == before
    first, second = make_trainer(num_rollouts=1), make_trainer(pipeline, num_rollouts=1)
    for trainer in (first, second):
        trainer.train()
    expected, weights = trained_weights(first), trained_weights(second)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


# Adapters that cannot be trained here ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoHaConfig(rank_dropout=0.1, target_modules=["to_q"]), "rank_dropout=0.1 would make every replayed"),
        (LoHaConfig(module_dropout=0.1, target_modules=["to_q"]), "module_dropout=0.1 would make every replayed"),
        (OFTConfig(oft_block_size=4, module_dropout=0.2, target_modules=["to_q"]), "module_dropout=0.2 would make"),
        (
            AdaLoraConfig(total_step=10, target_modules=["to_q"]),
            "is a AdaLoraConfig, whose ranks move between layers only",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(make_trainer, config, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(peft_config=config)


@pytest.mark.parametrize(
    ("offload", "part"),
    [
        (lambda pipeline: pipeline.enable_sequential_cpu_offload(device="cpu"), "vae"),
        (lambda pipeline: pipeline.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"), "vae"),
        (lambda pipeline: accelerate.cpu_offload(pipeline.text_encoder, torch.device("cpu")), "text_encoder"),
        (lambda pipeline: accelerate.cpu_offload(pipeline.transformer, torch.device("cpu")), "transformer"),
    ],
)
def test_offloading_layer_by_layer_is_refused(make_trainer, offload, part):
    pipeline = tiny_pipelines.sd3()
    offload(pipeline)
    with pytest.raises(
        ValueError, match=f"`{part}` of this .* is offloaded layer by layer.*set offload_components=True"
    ):
        make_trainer(pipeline)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    """A folder as the published ones: PEFT's two files, of an older version, that name no base model."""
    folder = tmp_path / "fdfo-run" / "epoch-0000100"
    torch.manual_seed(3)
    config = LoraConfig(
        r=32,
        lora_alpha=64,
        init_lora_weights="gaussian",
        target_modules=[
            name if name.startswith("add_") or name == "to_add_out" else f"attn.{name}" for name in PUBLISHED_TARGETS
        ],
    )
    model = PeftModel(dual_sd3().transformer, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    file = folder / "adapter_config.json"
    stored = json.loads(file.read_text())
    stored |= {"base_model_name_or_path": None, "peft_version": "0.18.1", "inference_mode": True, "auto_mapping": None}
    file.write_text(json.dumps(stored))
    return folder


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_published_layout_is_continued_and_saved(make_trainer, published, tmp_path):
    trainer = make_trainer(dual_sd3(), adapter=str(published), lora_r=32, num_rollouts=1)
    stored = load_file(published / PEFT)
    start = {name.replace(".default", ""): weight for name, weight in trained_weights(trainer).items()}
    assert start.keys() == stored.keys() and all(torch.equal(start[name], stored[name]) for name in stored)
    trainer.train()
    trainer.save_model(str(tmp_path / "next"))
    saved = load_file(tmp_path / "next" / PEFT)
    assert {name: value.shape for name, value in saved.items()} == {name: value.shape for name, value in stored.items()}
    assert any(not torch.equal(saved[name], stored[name]) for name in saved)
    # The other file in it, and a plain pipeline by either library: the same images.
    images = trainer.generate(PROMPTS[:1], [0])
    for load in (
        lambda pipeline: pipeline.load_lora_weights(str(tmp_path / "next")),
        lambda pipeline: PeftModel.from_pretrained(pipeline.transformer, tmp_path / "next"),
    ):
        pipeline = dual_sd3()
        load(pipeline)
        flow = PipelineFlow(pipeline, num_generations=2, scheduler_class=RolloutScheduler, **trainer.flow.call_kwargs)
        assert torch.equal(flow.generate(PROMPTS[:1], [0]), images)


FIND = """
import sys
from trl_fdfo.pipeline.adapter_files import find_adapter
for name in sys.argv[1:]:
    try:
        path = find_adapter(name)
        files = sorted(file.name for file in path.iterdir()) if path.is_dir() else path.name
        print(files, path.read_bytes() if path.is_file() else (path / "adapter_model.safetensors").read_bytes())
    except ValueError as error:
        print(str(error).replace("\\n", " "))
"""


def test_adapters_of_the_hub_by_name_revision_folder_and_address(tmp_path):
    """Names as `owner/name@revision/folder`, the address of a page, and what is in no such place."""
    repo, run = "me/results", "fdfo-run/epoch-0000100"
    files = {
        f"{folder}{name}": f"{commit} {folder}".encode()
        for commit in ("new",)
        for folder in ("", f"{run}/", f"{run}/deeper/", "other/")
        for name in ("adapter_config.json", PEFT, "big.bin")
    }
    older = {name: content.replace(b"new", b"old") for name, content in files.items()}
    commits = [Commit("a" * 40, "old", older, 0.0), Commit("b" * 40, "new", files, 1.0)]
    names = {
        repo: "['adapter_config.json', 'adapter_model.safetensors'] b'new '",
        f"{repo}/{run}": f"['adapter_config.json', 'adapter_model.safetensors', 'deeper'] b'new {run}/'",
        f"{repo}/{run}/{PEFT}": f"{PEFT} b'new {run}/'",
        f"{repo}@{'a' * 40}/{run}": f"['adapter_config.json', 'adapter_model.safetensors'] b'old {run}/'",
        f"HUB/{repo}/tree/main/{run}": f"b'new {run}/'",
        f"HUB/{repo}/blob/{'a' * 40}/{run}/{PEFT}?download=true": f"{PEFT} b'old {run}/'",
        f"https://huggingface.co/{repo}/tree/main/{run}": f"b'new {run}/'",
        f"hf://{repo}/{run}": f"b'new {run}/'",
        f"{repo}/{run}/away": f"me/results has no adapter in '{run}/away'",
        "me/nothing": "adapter='me/nothing' is no folder or file here, and was not found on the Hub",
        f"{repo}@away": "was not found on the Hub",
        "datasets/me/results": "a dataset of the Hub holds no adapter",
        "https://example.com/x": "Unrecognized host 'example.com'",
    }
    with FakeHub("hf_x") as hub:
        hub.repos[repo] = Repo(private=False, branches={"main": commits})
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": "hf_x",
        }
        arguments = [name.replace("HUB", hub.url) for name in names]
        run = [sys.executable, "-c", FIND, *arguments]
        found = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120, check=True)
    lines = found.stdout.splitlines()
    assert len(lines) == len(names), found.stdout
    for (name, expected), line in zip(names.items(), lines):
        assert expected.replace(", 'deeper'", "") in line, name


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A model with an adapter, and the adapter's weights without a prefix."""
    pipeline = qwen_image.build()
    model = with_values(pipeline)
    folder = tmp_path_factory.mktemp("qwen")
    save_diffusers_lora(pipeline, model, folder)
    weights = {name.removeprefix("transformer."): weight for name, weight in load_file(folder / DIFFUSERS).items()}
    return model, weights


def kohya(prefix, separator):
    """Names of kohya's scripts, with the alpha of each layer."""

    def convert(weights):
        layer = lambda name: prefix + name.rpartition(".lora_")[0].replace(".", separator)
        kinds = {"A": "lora_down", "B": "lora_up"}
        named = {f"{layer(name)}.{kinds[name[-len('A.weight')]]}.weight": weight for name, weight in weights.items()}
        return named | {f"{layer(name)}.alpha": torch.tensor(8.0) for name in weights if ".lora_A" in name}

    return convert


def prefixed(prefix):
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def old_names(weights):
    new = {".lora_A": ".lora.down", ".lora_B": ".lora.up"}
    return {
        f"transformer.{name}".replace(*item): w
        for name, w in weights.items()
        for item in new.items()
        if item[0] in name
    }


@pytest.mark.parametrize(
    ("convert", "alpha"),
    [
        (prefixed("transformer."), 4),
        (prefixed("diffusion_model."), 4),
        (prefixed(""), 4),
        (old_names, 4),
        (kohya("diffusion_model.", "."), 8),
        (kohya("lora_unet_", "_"), 8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_of_other_programs_are_read_by_the_converters_of_diffusers(qwen, tmp_path, convert, alpha, dtype):
    model, weights = qwen
    save_file({name: w.contiguous() for name, w in convert(weights).items()}, tmp_path / "other.safetensors")
    pipeline = qwen_image.build().to(dtype)
    before = state(pipeline)
    config, read = read_adapter(pipeline, str(tmp_path / "other.safetensors"))
    assert state(pipeline) == before
    # A file without alpha is taken as diffusers takes it, alpha = rank = 4.
    changes, expected = changes_of(add_adapter(pipeline, config, read)), changes_of(model)
    assert changes.keys() == expected.keys() and len(changes) == 16
    for name, change in changes.items():
        assert torch.equal(change.float(), expected[name] * (alpha / 4)), name


def dora(weights):
    return prefixed("transformer.")(weights) | {"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(3)}


def text_encoder(weights):
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    return prefixed("transformer.")(weights) | {name: torch.zeros(4, 16)}


def without_b(weights):
    return {name: w for name, w in prefixed("transformer.")(weights).items() if "lora_A" in name}


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (prefixed("diffusion_model."), "names such as diffusion_model.*which diffusers does not convert for Stable"),
        (kohya("lora_unet_", "_"), "names such as lora_unet_.*which diffusers does not convert for Stable"),
        (
            prefixed("base_model.model."),
            "names such as base_model.model.*as PEFT's files, an adapter_config.json beside",
        ),
        (prefixed("transformer._orig_mod."), "60 of its weights, such as _orig_mod.*would be left out"),
        (without_b, "cannot be read"),
        (dora, "is a DoRA, whose `dora_scale` diffusers would drop"),
    ],
)
def test_layouts_that_nobody_converts_are_refused_without_harm(tmp_path, convert, message):
    made = tiny_pipelines.sd3()
    save_diffusers_lora(made, with_values(made), tmp_path)
    weights = {name.removeprefix("transformer."): w for name, w in load_file(tmp_path / DIFFUSERS).items()}
    save_file(convert(weights), tmp_path / "other.safetensors")
    pipeline = tiny_pipelines.sd3()
    before = state(pipeline)
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(pipeline, str(tmp_path / "other.safetensors"))
    assert state(pipeline) == before
    # `load_lora_weights` would load nothing of these, so `fuse_lora` would fuse nothing.
    assert "fuse_lora" not in str(caught.value)


def test_weights_of_a_text_encoder_are_told_apart(tmp_path):
    made = tiny_pipelines.sd3()
    save_diffusers_lora(made, with_values(made), tmp_path)
    weights = {name.removeprefix("transformer."): w for name, w in load_file(tmp_path / DIFFUSERS).items()}
    save_file(text_encoder(weights), tmp_path / DIFFUSERS)
    with pytest.raises(OtherComponentsError, match="has weights for text_encoder, and only.*`fuse_lora`"):
        read_adapter(tiny_pipelines.sd3(), str(tmp_path))


def test_loader_of_another_model_is_none(tmp_path):
    made = tiny_pipelines.sd3()
    save_diffusers_lora(made, with_values(made), tmp_path)
    pipeline = prx.build()
    assert hasattr(pipeline, "load_lora_weights")  # for a unet
    with pytest.raises(ValueError, match="PRXPipeline has no LoRA loader of its own: give it PEFT's files"):
        read_adapter(pipeline, str(tmp_path))


def test_file_of_peft_is_read_with_the_config_beside_it(published):
    config, weights = read_adapter(dual_sd3(), str(published / PEFT))
    assert (config.r, config.lora_alpha) == (32, 64) and weights.keys() == load_file(published / PEFT).keys()


def test_arguments_of_the_call_are_kept_as_json_has_them(tmp_path, caplog):
    call = {
        "sigmas": np.linspace(1, 0.5, 2),
        "size": (16, np.int64(8)),
        "guidance_scale": np.float32(2),
        "prompt_2": None,
    }
    lost = {"timesteps": [torch.tensor(1.0)], "image": np.zeros((2, 2)), "strength": float("nan")}
    save_call_options(call | lost, tmp_path)
    kept = {"sigmas": [1.0, 0.5], "size": [16, 8], "guidance_scale": 2.0, "prompt_2": None}
    assert read_call_options(tmp_path) == kept
    for name in lost:
        assert f"is called with {name}, which JSON does not hold" in caplog.text
    assert "(a Tensor): its users must pass it" in caplog.text
