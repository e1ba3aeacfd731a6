"""Adapters in the weights of a pipeline, of an original file, and of one LoRA."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, WanTransformer3DModel
from original_files import sd3_file, wan_file
from peft import LoKrConfig, LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import wan

from trl_fdfo.cli import merge
from trl_fdfo.cli.models import model_options
from trl_fdfo.pipeline.adapter_files import read_adapter, save_diffusers_lora
from trl_fdfo.pipeline.loading import load_pipeline
from trl_fdfo.pipeline.lora import add_adapter
from trl_fdfo.pipeline.merging import adapted_layers
from trl_fdfo.pipeline.trained import restore_point


TARGETS = ["to_q", "attn2.to_v", "to_out.0", "add_k_proj", "ff.net.0.proj"]
CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=10, target_modules=TARGETS),
    "other": LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"]),
    "dora": LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, use_dora=True),
    "lokr": LoKrConfig(r=4, alpha=4, target_modules=TARGETS),
}
DIFFUSERS = "pytorch_lora_weights.safetensors"


def save_adapter(pipeline, config, folder) -> None:
    restore = restore_point(pipeline)
    model = add_adapter(pipeline, config)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(weight, std=0.2)
        elif weight.requires_grad:
            weight.data *= 1.2
    model.save_pretrained(folder)
    save_diffusers_lora(pipeline, model, folder)
    restore()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny SD3 with a second attention, as in SD 3.5 Medium, in `base/` and `base.safetensors`, and adapters on it."""
    folder = tmp_path_factory.mktemp("merge")
    torch.manual_seed(0)
    pipeline = tiny_pipelines.sd3()
    options = {**pipeline.transformer.config, "dual_attention_layers": (0,), "_use_default_values": []}
    pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(options))
    pipeline.save_pretrained(folder / "base")
    sd3_file(pipeline.transformer, folder / "base.safetensors")
    pipeline.register_modules(transformer=converted(folder / "base.safetensors", folder))
    pipeline.save_pretrained(folder / "base")
    for name, config in CONFIGS.items():
        save_adapter(pipeline, config, folder / name)
    return folder


def converted(file: Path, folder: Path) -> SD3Transformer2DModel:
    """An original file as diffusers opens it."""
    return SD3Transformer2DModel.from_single_file(str(file), config=str(folder / "base"), subfolder="transformer")


def run(files: Path, output: Path, *options) -> None:
    merge.main(["--model", str(files / "base"), "--output", str(output), *map(str, options)])


def image(pipeline) -> torch.Tensor:
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 8, "output_type": "pt"}
    return pipeline("a cat", generator=torch.Generator().manual_seed(0), **options).images


def distance(module, other) -> float:
    own, others = module.state_dict(), other.state_dict()
    assert own.keys() == others.keys()
    return max((weight.float() - others[name].float()).abs().max().item() for name, weight in own.items())


@pytest.mark.parametrize("adapter", ["lora", f"lora/{DIFFUSERS}", "dora", "lokr"])
def test_a_merged_pipeline_makes_the_images_of_base_and_adapter(files, tmp_path, adapter):
    pipeline = load_pipeline(files / "base")
    before = image(pipeline)
    add_adapter(pipeline, *read_adapter(pipeline, str(files / adapter))).eval()
    expected = image(pipeline)
    run(files, tmp_path / "merged", "--adapter", files / adapter)
    torch.testing.assert_close(image(load_pipeline(tmp_path / "merged")), expected, rtol=0, atol=2e-6)
    assert (before - expected).abs().max() > 0.01
    configs = [file.read_text() for file in (tmp_path / "merged").rglob("*.json")]
    assert len(configs) > 5 and not any(str(files) in config for config in configs), "a folder of this machine"


def test_a_merged_pipeline_is_sampled_as_its_adapters_were_trained(files, tmp_path, capsys):
    options = {"num_inference_steps": 2, "guidance_scale": 1.0}
    for name, steps in (("one", 2), ("same", 2), ("other", 3)):
        shutil.copytree(files / "lora", tmp_path / name)
        (tmp_path / name / "generation_config.json").write_text(json.dumps({**options, "num_inference_steps": steps}))
    adapters = lambda *names: [text for name in names for text in ("--adapter", tmp_path / name)]
    run(files, tmp_path / "merged", *adapters("one", "same"))
    assert (
        model_options(str(tmp_path / "merged")) == options and "trained with different" not in capsys.readouterr().out
    )
    run(files, tmp_path / "merged", *adapters("one", "other"), "--overwrite")
    assert model_options(str(tmp_path / "merged")) == {} and "trained with different steps" in capsys.readouterr().out


def test_adapters_are_chained_and_scaled(files, tmp_path):
    adapters = ("--adapter", files / "lora", "--adapter", files / "other")
    run(files, tmp_path / "merged", *adapters, "--scale", "0.5", "--scale", "-2")
    base, merged = (load_pipeline(folder).transformer for folder in (files / "base", tmp_path / "merged"))
    expected = {name: weight.clone() for name, weight in base.state_dict().items()}
    for adapter, scale, alpha in (("lora", 0.5, 10 / 3), ("other", -2, 1)):
        weights = load_file(files / adapter / "adapter_model.safetensors")
        for name, a in weights.items():
            if "lora_A" in name:
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                expected[f"{layer}.weight"] += scale * alpha * weights[name.replace("lora_A", "lora_B")] @ a
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_half_of_an_adapter_is_half_of_its_change(files):
    pipeline = load_pipeline(files / "base")
    for adapter in ("dora", "lokr"):
        restore = restore_point(pipeline)
        layers = adapted_layers(add_adapter(pipeline, *read_adapter(pipeline, str(files / adapter))))
        restore()
        assert len(layers) > 10 and "transformer_blocks.0.attn2.to_v" in layers
        for name, layer in layers.items():
            plain = {"weight": pipeline.transformer.get_submodule(name).weight.data}
            none, half, whole = (layer.merge(plain, scale)["weight"] for scale in (0.0, 0.5, 1.0))
            assert torch.equal(none, plain["weight"]) and not torch.equal(whole, none)
            torch.testing.assert_close(half, (none + whole) / 2, rtol=0, atol=1e-6)


def test_the_dtypes_of_the_base_stay(files, tmp_path, capsys):
    pipeline = load_pipeline(files / "base", dtype=torch.bfloat16)
    pipeline.vae.float()
    pipeline.save_pretrained(tmp_path / "base")
    run(tmp_path, tmp_path / "merged", "--adapter", files / "lora")
    assert "Rounding changes what the adapters add by 0." in capsys.readouterr().out
    stored = lambda folder, part: load_file(next(Path(folder, part).glob("*.safetensors")))
    for part, dtype in (("transformer", torch.bfloat16), ("text_encoder", torch.bfloat16), ("vae", torch.float32)):
        assert {weight.dtype for weight in stored(tmp_path / "merged", part).values()} == {dtype}, part
    run(tmp_path, tmp_path / "merged", "--adapter", files / "lora", "--dtype", "float32", "--overwrite")
    exact, rounded = (stored(folder, "transformer") for folder in (tmp_path / "merged", tmp_path / "base"))
    assert exact.keys() == rounded.keys() and {weight.dtype for weight in exact.values()} == {torch.float32}
    run(tmp_path, tmp_path / "merged", "--adapter", files / "lora", "--scale", "0.01", "--overwrite")
    assert "keep the adapter as a LoRA file" in capsys.readouterr().out, "a small change is lost in the rounding"


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_checkpoint_in_the_original_layout_is_the_merged_model(files, tmp_path, adapter):
    output = tmp_path / "merged.safetensors"
    run(files, tmp_path / "merged", "--adapter", files / adapter)
    run(files, output, "--adapter", files / adapter, "--format", "checkpoint", "--original", files / "base.safetensors")
    merged = load_pipeline(tmp_path / "merged").transformer
    assert (
        distance(converted(output, files), merged)
        < 1e-6
        < 0.1
        < distance(load_pipeline(files / "base").transformer, merged)
    )
    before, after = load_file(files / "base.safetensors"), load_file(output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and len(changed) == 10 and all(".weight" in name for name in changed)
    # Query and value of the fused projection have an adapter in the second attention, query alone in the first.
    width = 16
    for attention, rows in (("attn", [0]), ("attn2", [0, 2])):
        name = f"model.diffusion_model.joint_blocks.0.x_block.{attention}.qkv.weight"
        thirds = [bool((before[name] != after[name])[n * width : (n + 1) * width].any()) for n in range(3)]
        assert [n for n, moved in enumerate(thirds) if moved] == rows
    with safe_open(output, "pt") as stored:
        assert stored.metadata() == {"title": "tiny"}
    assert list(tmp_path.glob("*.unfinished")) == []


def test_a_checkpoint_keeps_the_dtype_of_its_file(files, tmp_path):
    sd3_file(load_pipeline(files / "base").transformer, tmp_path / "half.safetensors", torch.bfloat16)
    output = tmp_path / "merged.safetensors"
    original = ("--format", "checkpoint", "--original", tmp_path / "half.safetensors")
    run(files, output, "--adapter", files / "lora", *original)
    before, after = load_file(tmp_path / "half.safetensors"), load_file(output)
    assert all(after[name].dtype == weight.dtype for name, weight in before.items())
    assert sum(not torch.equal(after[name], weight) for name, weight in before.items()) == 10


def test_one_lora_with_the_names_of_diffusers(files, tmp_path):
    adapters = ("--adapter", files / "lora", "--adapter", files / "other")
    run(files, tmp_path / "merged", *adapters)
    run(files, tmp_path / "lora.safetensors", *adapters, "--format", "lora")
    pipeline = load_pipeline(files / "base")
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    expected = image(load_pipeline(tmp_path / "merged"))
    torch.testing.assert_close(image(pipeline), expected, rtol=0, atol=1e-5)


def test_one_lora_with_the_names_of_the_original_adds_what_the_checkpoint_has(files, tmp_path):
    original = ("--adapter", files / "lora", "--original", files / "base.safetensors")
    run(files, tmp_path / "merged.safetensors", *original, "--format", "checkpoint")
    run(files, tmp_path / "lora.safetensors", *original, "--format", "lora")
    before, after, lora = (
        load_file(file)
        for file in (files / "base.safetensors", *map(tmp_path.joinpath, ("merged.safetensors", "lora.safetensors")))
    )
    assert not any("alpha" in name for name in lora)
    # The names of a quantised file do as well.
    small = {name: weight.to(torch.float8_e4m3fn) for name, weight in before.items()}
    save_file(small, tmp_path / "small.safetensors")
    names = ("--adapter", files / "lora", "--format", "lora", "--original", tmp_path / "small.safetensors")
    run(files, tmp_path / "again.safetensors", *names)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == lora.keys() and all(torch.equal(again[name], lora[name]) for name in lora)
    layers = {name.rpartition(".lora_")[0] for name in lora}
    for name, weight in before.items():
        layer = name.removeprefix("model.").removesuffix(".weight")
        if layer in layers:
            added = lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
            torch.testing.assert_close(weight + added, after[name], rtol=0, atol=1e-5)
            layers.remove(layer)
        else:
            assert torch.equal(weight, after[name])
    assert not layers


def test_each_of_several_transformers(tmp_path):
    pipeline = wan.build_two_transformers()
    pipeline.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "ffn.net.2"])
    save_adapter(pipeline, config, tmp_path / "out")
    run(tmp_path, tmp_path / "merged", "--adapter", tmp_path / "out")
    merged = load_pipeline(tmp_path / "merged")
    for name in ("transformer", "transformer_2"):
        base, output = tmp_path / f"{name}.safetensors", tmp_path / f"{name}_merged.safetensors"
        wan_file(getattr(pipeline, name), base)
        original = ("--component", name, "--original", base)
        run(tmp_path, output, "--adapter", tmp_path / "out", "--format", "checkpoint", *original)
        place = {"config": str(tmp_path / "base"), "subfolder": name}
        own = WanTransformer3DModel.from_single_file(str(output), **place)
        assert distance(own, getattr(merged, name)) < 1e-6 < 0.1 < distance(own, getattr(pipeline, name))
        run(
            tmp_path,
            tmp_path / "lora.safetensors",
            "--adapter",
            tmp_path / "out",
            "--format",
            "lora",
            *original,
            "--overwrite",
        )
        assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in load_file(tmp_path / "lora.safetensors")


def test_what_cannot_be_merged_is_refused(files, tmp_path):
    def refused(message, *options, output=tmp_path / "new.safetensors", base=files):
        with pytest.raises(ValueError, match=message):
            run(base, output, *options)
        assert output in kept or not output.exists()

    kept = [tmp_path / "old.safetensors", tmp_path / "folder", files / "base.safetensors", files / "base"]
    save_file({"x": torch.ones(1)}, kept[0])
    kept[1].mkdir()
    lora = ("--adapter", files / "lora")
    file = ("--format", "checkpoint", "--original", files / "base.safetensors")
    refused("old.safetensors' exists: take another name, or set `overwrite`", *lora, *file, output=kept[0])
    refused("is no folder of a pipeline: it is not overwritten", *lora, "--overwrite", output=kept[1])
    refused("is no folder of a pipeline", *lora, "--overwrite", output=kept[0])
    run_folder = tmp_path / "run"
    (run_folder / "checkpoint-1").mkdir(parents=True)
    (run_folder / "model_index.json").write_text("{}")
    kept.append(run_folder)
    refused("has the checkpoints of a run, which would go", *lora, "--overwrite", output=run_folder)
    refused("model itself", *lora, "--overwrite", output=files / "base")
    refused("original itself", *lora, *file, "--overwrite", output=Path(file[-1]))
    refused("end its name in .safetensors", *lora, *file, output=tmp_path / "new")
    refused("name it in `original`", *lora, *file[:2])
    refused("is not read for format='pipeline'", *lora, *file[2:], output=tmp_path / "new")
    refused("keeps the dtype of its original", *lora, *file, "--dtype", "float16")
    refused("must be one number, or one for each of the 1 adapters", *lora, "--scale", "1", "--scale", "2")
    refused("change no weight", *lora, "--scale", "0", output=tmp_path / "new")
    refused("change no weight", *lora, *file, "--scale", "0")
    refused("change no weight", *lora, "--format", "lora", "--scale", "0")
    refused("is no plain LoRA of layers but DoRA", "--adapter", files / "dora", "--format", "lora")
    refused("is no plain LoRA of layers but LoKr", "--adapter", files / "lokr", "--format", "lora")
    refused("component='other' is no transformer of .*: it has transformer", *lora, *file, "--component", "other")
    refused(
        "cannot be converted to SD3Transformer2DModel.*The file has 1 tensors, such as x", *lora, *file[:3], kept[0]
    )
    refused("is no safetensors file", *lora, *file[:3], files / "lora" / "adapter_config.json")
    # A file of the same kind with another width.
    other = tiny_pipelines.sd3().transformer
    options = {**other.config, "num_attention_heads": 4, "caption_projection_dim": 32, "_use_default_values": []}
    sd3_file(SD3Transformer2DModel.from_config(options), tmp_path / "wide.safetensors")
    refused("is the file of another model", *lora, *file[:3], tmp_path / "wide.safetensors")
    small = {name: weight.to(torch.float8_e4m3fn) for name, weight in load_file(file[-1]).items()}
    save_file(small, tmp_path / "small.safetensors")
    refused("is quantised .*float8_e4m3fn.*--format lora", *lora, *file[:3], tmp_path / "small.safetensors")
    tiny_pipelines.flux().save_pretrained(tmp_path / "base")
    refused("match no layer of FluxTransformer2DModel", *lora, output=tmp_path / "new", base=tmp_path)
    refused("match no layer of FluxTransformer2DModel", *lora, "--format", "lora", base=tmp_path)


def test_a_folder_is_replaced_only_by_a_whole_one(files, tmp_path, monkeypatch):
    output = tmp_path / "merged"
    run(files, output, "--adapter", files / "lora", "--dtype", "float32")
    before = {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def on_a_full_disk(pipeline, folder):
        Path(folder).mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(files, output, "--adapter", files / "lora", "--dtype", "float32", "--overwrite")
    assert {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [output]
