"""Every family of pipelines goes through the same checks; docs/pipelines.md must show the results."""

import importlib
import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import families_run
import pytest
import torch
from conftest import trained_weights
from datasets import Dataset
from diffusers import ModelMixin
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny_pipelines.families import CALLS, FAMILIES, REFUSED, columns_for, columns_of, first_call, num_prompts
from tiny_runs import UnplannedTrainer

from trl_fdfo.fdfo.churn import constant_churn
from trl_fdfo.media import by_kind
from trl_fdfo.pipeline.adapter_files import diffusers_file, read_adapter
from trl_fdfo.pipeline.lora import add_adapter, attention_projections
from trl_fdfo.pipeline.trained import trained_module, trained_modules
from trl_fdfo.pipeline_flow import PipelineFlow, ReplayError, check_replay
from trl_fdfo.planning.cost import Precision, training_cost


STEPS = 4


def as_loaded(pipeline, dtype):
    """The pipeline as `from_pretrained(..., torch_dtype=dtype)` loads it: some layers of some models stay float32."""
    pipeline.to(dtype)
    for part in pipeline.components.values():
        kept = set(part._keep_in_fp32_modules or ()) if isinstance(part, ModelMixin) else ()
        for name, weight in part.named_parameters() if kept else ():
            if not kept.isdisjoint(name.split(".")):
                weight.data = weight.data.float()
    return pipeline


def make_flow(name, call, dtype=torch.float32, steps=STEPS):
    pipeline = as_loaded(FAMILIES[name].build(), dtype)
    return PipelineFlow(pipeline, num_generations=2, **{"num_inference_steps": steps, **call})


def rollout_arguments(flow, name, churned_level=None):
    """Arguments of a rollout with churn at each level, or at one alone: before it the branches of a prompt are identical."""
    count = num_prompts(name)
    columns, prompts = columns_of(name, count), FAMILIES[name].prompts[:count]
    sigmas = flow.rehearse(prompts[:1], {column: values[:1] for column, values in columns.items()}, 2).sigmas
    gammas = constant_churn(sigmas, 0.2)
    if churned_level is not None:
        gammas = torch.zeros(len(sigmas))
        gammas[churned_level] = 0.2
    return {
        "prompts": prompts,
        "noise_amounts": gammas,
        "seeds": range(count),
        "noise_seeds": range(10, 10 + 2 * count),
        "levels": range(len(sigmas) - 1),
        "columns": columns,
    }


def roll_out(flow, name):
    return flow.rollout(**rollout_arguments(flow, name))


def largest_error(flow, batch):
    """The largest difference between a replayed and a recorded velocity; their gradients are finite."""
    error, reached = 0.0, False
    weights = [weight for weight in flow.model.parameters() if weight.ndim > 1]
    for level, recorded in batch.velocities.items():
        velocity = flow.velocity(batch, level)
        error = max(error, (velocity - recorded).abs().max().item())
        # Of several transformers, a step may call one.
        gradients = torch.autograd.grad(velocity.float().square().sum(), weights, allow_unused=True)
        known = [gradient for gradient in gradients if gradient is not None]
        assert all(gradient.isfinite().all() for gradient in known)
        reached = reached or len(known) > 0
    assert reached
    return error


def check_samples(samples, count):
    """Images and videos in [0, 1], or sounds, of each sample."""
    for kind, made in by_kind(samples).items():
        assert len(made) == count and made.dtype == torch.float32 and made.isfinite().all() and made.std() > 0
        if kind != "audio":
            assert made.shape[-3] == 3 and made.min() >= 0


def apart_error(flow, batch):
    return max(
        check_replay(flow.velocity(batch, level), batch.velocities[level], flow.pipeline, level) for level in batch.x_t
    )


def assert_close(samples, others):
    for made, expected in zip(by_kind(samples).values(), by_kind(others).values(), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=3e-5)


def check_other_inputs_are_far(flow, batch):
    """The negative control of the replay: other latents, or another step."""
    check_replay(flow.velocity(batch, 1), batch.velocities[1], flow.pipeline, 1)
    wrong_latents = flow.velocity(replace(batch, x_t={1: -batch.x_t[1]}), 1)
    wrong_step = flow.velocity(replace(batch, x_t={2: batch.x_t[1]}), 2)
    for wrong in (wrong_latents, wrong_step):
        with pytest.raises(ReplayError):
            check_replay(wrong, batch.velocities[1], flow.pipeline, 1)


DOCS = Path(__file__).parents[2] / "docs" / "pipelines.md"


def rows(table):
    """The rows of a table of docs/pipelines.md: of the pipelines that are "exact", or of those that are "refused"."""
    shown = DOCS.read_text(encoding="utf-8")
    [lines] = re.findall(rf"<!-- {table}: .*? -->\n(.*?)<!-- end of {table} -->\n", shown, re.DOTALL)
    return lines.splitlines()[2:]


def exact_row(name, pipeline, opened):
    """What the checks of a family find. They fail where an error is not 0."""
    return f"| {name} | `{type(pipeline).__name__}` | {', '.join(FAMILIES[name].calls)} | 0.0 | 0.0 | {opened} |"


def test_docs_show_each_family_in_order():
    shown = [row.removeprefix("| ").partition(" | ")[0] for row in rows("exact")]
    lacking = [name for name in FAMILIES if name not in shown]
    assert shown == list(FAMILIES), (
        f"The table of docs/pipelines.md lacks {lacking}, or shows others, or in another order than FAMILIES. "
        "test_whole_trainer_and_saved_lora of a family prints its row, which goes there by hand."
    )


def test_docs_say_why_pipelines_are_refused():
    made = [f"| {name} | `{type(family.build()).__name__}` | {family.reason} |" for name, family in REFUSED.items()]
    assert rows("refused") == made, "\n".join(["The refused pipelines of docs/pipelines.md must be:", *made])


# Of each family the guided call, or its first; and the first call of each other kind. Guidance does the same as a plain call
# does, with more calls of the transformer or larger ones.
TAKEN_APART = {
    (name, "guided" if "guided" in family.calls else next(iter(family.calls))) for name, family in FAMILIES.items()
}
TAKEN_APART |= {
    (name, call) for call, name in {call: name for name, call in reversed(CALLS) if call != "plain"}.items()
}


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_a_call_is_replayed_exactly_and_taken_apart(name, call):
    flow = make_flow(name, FAMILIES[name].calls[call])
    count = num_prompts(name)
    arguments = rollout_arguments(flow, name, churned_level=2)
    apart = flow.rollout(**arguments)
    assert largest_error(flow, apart) == 0.0
    check_samples(apart.images, 2 * count)
    assert not torch.equal(apart.endpoints[:, 0], apart.endpoints[:, 1])
    # Prompts of different length: a branch that got the other's attention mask would show.
    for level in range(2):
        assert torch.equal(apart.x_t[level][0::2], apart.x_t[level][1::2])
        assert torch.equal(apart.velocities[level][0::2], apart.velocities[level][1::2])
    if call == next(iter(FAMILIES[name].calls)):
        check_other_inputs_are_far(flow, apart)
    if (name, call) not in TAKEN_APART:
        return

    if count > 1:
        first, second = flow.split(replace(apart, images=None), [[0, 2], [1, 3]])
        assert list(first.x_t) == [0, 2] and list(second.velocities) == [1, 3]
        assert torch.equal(torch.cat([first.endpoints, second.endpoints]), apart.endpoints)
        # Another batch size computes in another order; with the embeddings of the other prompt it would be 1e-1.
        assert max(apart_error(flow, first), apart_error(flow, second)) < 1e-5

    # The last step that the branches share, and the first that they do not.
    arguments["levels"] = [1, 2]
    flow.shared_prefix = True
    shared = flow.rollout(**arguments)
    flow.shared_prefix = False
    assert_close(shared.images, apart.images)
    assert apart_error(flow, shared) < 1e-5
    if not arguments["columns"]:
        # Their embeddings are of one length, and make a batch.
        arguments["prompts"] = ["a cat", "a dog"][:count]
        apart = flow.rollout(**arguments)
        flow.prompt_embeddings = {prompt: flow.encode([prompt]) for prompt in arguments["prompts"]}
        cached = flow.rollout(**arguments)
        assert_close(cached.images, apart.images)
        assert apart_error(flow, cached) < 1e-5


# One batch, with an image in the call, one call per sample, momentum, noise drawn in each step.
CHOSEN = [
    "Stable Diffusion 3",
    "Qwen-Image-Edit",
    "OmniGen",
    "ACE-Step with momentum (audio)",
    "LTX-Video with conditions",
]


@pytest.mark.parametrize("name", CHOSEN)
def test_some_samples_of_a_batch_are_replayed(name):
    flow, count = make_flow(name, first_call(name)), num_prompts(name)
    flow.num_generations = 3
    arguments = rollout_arguments(flow, name) | {"noise_seeds": range(3 * count)}
    batch = flow.rollout(**arguments)
    places = [0, 2, 4, 5][: 2 * count]
    chosen = flow.choose(replace(batch, images=None), places, arguments["prompts"], arguments["columns"])
    assert torch.equal(chosen.endpoints.flatten(0, 1), batch.endpoints.flatten(0, 1)[places])
    assert all(torch.equal(chosen.velocities[level], batch.velocities[level][places]) for level in range(STEPS))
    assert apart_error(flow, chosen) < 1e-5


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_replay_in_bfloat16_is_exact(name, call):
    # Two steps: all but the dtype is as in float32.
    flow = make_flow(name, FAMILIES[name].calls[call], torch.bfloat16, steps=2)
    batch = roll_out(flow, name)
    assert largest_error(flow, batch) == 0.0
    check_samples(batch.images, 2 * num_prompts(name))


# Layers that have no say in the velocity. The last joint block drops its text, so what the text asks for is lost, and
# where the block projects it, the projection too.
WITHOUT_SAY = {
    "Stable Diffusion 3": ["transformer_blocks.1.attn.add_q_proj"],
    "Qwen-Image 2.1": [],  # one stream of text and image
    "Qwen-Image": ["transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out"],
    "JoyImage": ["double_blocks.1.attn.txt_attn_proj"],
    "EasyAnimate": ["transformer_blocks.1.attn1.add_q_proj", "transformer_blocks.1.attn1.to_add_out"],
    "HunyuanVideo 1.5": ["transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out"],
    "Cosmos 3": ["layers.0.self_attn.to_q", "layers.0.self_attn.to_out"],
    "Kandinsky 6 without sound": [
        *(f"audio_text_transformer_blocks.0.attn.{name}" for name in ("to_query", "to_key", "to_value", "out_layer")),
        *(
            f"visual_transformer_blocks.0.{part}.{name}"
            for part in (
                "audio_dec_block.self_attention",
                "audio_dec_block.cross_attention",
                "va_cross_attention",
                "av_cross_attention",
            )
            for name in ("to_query", "to_key", "to_value", "out_layer")
        ),
    ],
    # The sound is thrown away, or there is none.
    "LTX-2 HDR": [f"transformer_blocks.0.video_to_audio_attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")],
    "Mochi": ["transformer_blocks.1.attn1.add_q_proj"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_lora_matrix(name):
    flow = make_flow(name, first_call(name), steps=2)
    targets = attention_projections(trained_module(flow.pipeline).requires_grad_(False))
    flow.model = add_adapter(flow.pipeline, LoraConfig(r=2, target_modules=targets)).train()
    layers = {name: layer for name, layer in flow.model.named_modules() if isinstance(layer, LoraLayer)}
    torch.manual_seed(0)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        layer.get_base_layer().weight.requires_grad_(True)
    batch = roll_out(flow, name)
    # Of two transformers each has one of two steps.
    for level in (0, max(batch.x_t)):
        velocity = flow.velocity(batch, level)
        assert torch.equal(velocity, batch.velocities[level])
        velocity.square().sum().backward()

    def reached(weight):
        return weight.grad is not None and bool((weight.grad != 0).any())

    unreached = set()
    for layer_name, layer in layers.items():
        # A layer that has a say in the output (its own weight tells) has it through both matrices.
        weights = [layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        assert len({reached(weight) for weight in weights}) == 1, layer_name
        if not reached(weights[0]):
            unreached.add(layer_name.removeprefix("base_model.model."))
    expected = next((layers for family, layers in WITHOUT_SAY.items() if name.startswith(family)), [])
    assert unreached == set(expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_trainer_and_saved_lora(name, make_config, tmp_path):
    call = dict(first_call(name))
    call.pop("num_inference_steps", None)  # the trainer finds it
    columns = columns_of(name, 4)
    # A dataset has no tensors: one for all prompts.
    call |= {column: values[0] for column, values in columns.items() if isinstance(values[0], torch.Tensor)}
    columns = {column: values for column, values in columns.items() if column not in call}
    config = make_config(
        num_rollouts=1,
        prompts_per_rollout=2,
        num_inference_steps=len(call["sigmas"]) if "sigmas" in call else 2,
        per_device_prompt_batch_size=num_prompts(name),
        optimizer_steps_per_rollout=1,
        learning_rate=1e-2,
        height=call.pop("height", None),
        width=call.pop("width", None),
        guidance_scale=call.pop("guidance_scale", None),
        pipeline_columns=list(columns) or None,
        pipeline_kwargs=call,
        # Its noise is larger than what a sampler adds.
        churn_schedule="prior" if name == "PRX Pixel" else "constant",
    )

    def strength(prompts, images=None, audio=None, **kwargs):
        assert columns.keys() - {"images"} <= kwargs.keys()
        made = audio if images is None else images
        return made.abs().flatten(1).mean(dim=1)

    prompts = list(FAMILIES[name].prompts)
    dataset = Dataset.from_dict({"prompt": prompts, **columns})
    trainer = UnplannedTrainer(config, FAMILIES[name].build(), strength, train_dataset=dataset)
    before = trained_weights(trainer)
    trainer.train()
    assert next(log for log in trainer.state.log_history if "reward" in log)["replay_error"] == 0.0
    assert any(not torch.equal(weight, before[key]) for key, weight in trained_weights(trainer).items())

    pipeline = FAMILIES[name].build()
    # PRX has a loader, for another kind of model.
    has_loader = "transformer" in getattr(pipeline, "_lora_loadable_modules", ())
    [_, *others] = trained_modules(pipeline)
    trainer.save_model(str(tmp_path))
    arguments = (prompts[:1], [0], {column: values[:1] for column, values in columns.items()})
    expected = by_kind(trainer.generate(*arguments))
    flow = PipelineFlow(pipeline, num_generations=2, **trainer.flow.call_kwargs)
    flow.rehearse(prompts[:1], arguments[2], 2)  # finds the way to call it

    def difference():
        made = by_kind(flow.generate(*arguments))
        return max((values - expected[kind]).abs().max().item() for kind, values in made.items())

    opened = "has none"
    assert difference() > 1e-5
    if has_loader:
        if not others:
            # The same adapter, to go on from, with its scale in the weights.
            scale = trainer.args.lora_alpha / trainer.args.lora_r
            _, weights = read_adapter(pipeline, str(tmp_path / "pytorch_lora_weights.safetensors"))
            trained = {key.replace(".default", ""): weight for key, weight in trained_weights(trainer).items()}
            assert weights.keys() == trained.keys()
            for key, weight in weights.items():
                assert torch.equal(weight, trained[key] * scale if "lora_B" in key else trained[key]), key
            # PEFT's file has the trained weights under PEFT's names.
            in_peft = load_file(tmp_path / "adapter_model.safetensors")
            assert in_peft.keys() == trained.keys()
            assert all(torch.equal(weight, trained[key]) for key, weight in in_peft.items())
        # Then the same samples.
        pipeline.load_lora_weights(str(tmp_path))
        for other in others:
            file = diffusers_file(other)
            getattr(pipeline, other).load_lora_adapter(str(tmp_path), weight_name=file, prefix="transformer")
        for weight_name, weight in trained_module(pipeline).named_parameters():
            # As in the trainer: where inputs are strided, torch multiplies by frozen weights in another order.
            weight.requires_grad_("lora_" in weight_name)
        error = difference()
        assert error < 1e-6
        opened = "bit-equal samples" if error == 0 else "samples within 1e-6"
    if others or not has_loader:
        if has_loader:
            pipeline.unload_lora_weights()
            for other in others:
                getattr(pipeline, other).unload_lora()
            assert not any("lora_" in key for key, _ in trained_module(pipeline).named_parameters())
        PeftModel.from_pretrained(trained_module(pipeline), tmp_path, is_trainable=True)
        assert difference() < 1e-6
    row = exact_row(name, pipeline, opened)
    assert row in rows("exact"), f"docs/pipelines.md must show this row, in the order of the names:\n{row}"


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_pipeline_says_why(name):
    family = REFUSED[name]
    for call in family.calls.values():
        with pytest.raises(ValueError, match=family.error):
            flow = PipelineFlow(family.build(), num_generations=2, **{"num_inference_steps": STEPS, **call})
            flow.rehearse(family.prompts[:1], columns_for(family, 1), 2)


# Their transformers compute with the values of tensors, such as where a mask is true: a plan says that activations are missing.
UNCOUNTED = {
    *(
        "FramePack video of one section",
        "GLM-Image",
        "HiDream",
        "HunyuanImage 2.1",
        "HunyuanVideo 1.5",
        "Nucleus-Image",
    ),
    "Qwen-Image 2.1",
}


@pytest.mark.slow
def test_a_plan_counts_every_kind_of_transformer_but_those_that_read_values():
    kinds, failed = set(), set()
    for name, family in FAMILIES.items():
        flow = PipelineFlow(family.build(), num_generations=2, **{"num_inference_steps": 2, **first_call(name)})
        kind = tuple(type(part) for part in trained_modules(flow.pipeline).values())
        if kind in kinds:
            continue
        kinds.add(kind)
        calls = flow.rehearse(family.prompts[:1], columns_of(name, 1), 2).model_calls
        try:
            assert training_cost(trained_module(flow.pipeline), calls, Precision("cpu")).flops > 0, name
        except RuntimeError:  # of fake tensors, which have no values
            failed.add(name)
    assert failed == UNCOUNTED


# What can differ for DDP: weights without a gradient in some steps or in all, two transformers, experts that get no token,
# streams of sound, a call per sample.
FINDS_UNUSED = ["EasyAnimate (video)", "HunyuanVideo 1.5", "JoyImage", "Qwen-Image", "Wan 2.2 A14B (video)"]
USES_ALL = [
    "Cosmos 3 (video)",
    "Ideogram 4",
    "LTX-2 (video and audio)",
    "Nucleus-Image",
    "OmniGen",
    "Stable Diffusion 3",
]


@pytest.mark.slow
def test_two_processes_train_transformers_of_each_way_to_lack_gradients(tmp_path, warm_python):
    command = [warm_python.path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, **warm_python.environment, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    names = FINDS_UNUSED + USES_ALL
    done = subprocess.run(
        [*command, families_run.__file__, tmp_path, *names],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "families.json").read_text(encoding="utf-8"))
    assert list(results) == names
    for name, result in results.items():
        assert (result["wrapper"], result["processes"], result["steps"]) == ("DistributedDataParallel", 2, 2), name
        assert result["replay_error"] == 0.0 and result["spread"] == 0.0 and result["moved"] > 0.0, name
        # The search costs time: it is on only where a weight gets no gradient, in some steps or in all.
        assert result["finds_unused"] == (name in FINDS_UNUSED), name


def test_no_line_of_the_package_names_a_family():
    package = Path(__file__).parents[2] / "trl_fdfo"
    names = (
        r"sd3|stable.?diffusion|flux|qwen|\bsana|aura.?flow|lumina|z.?image\b|hidream|\bchroma\b|cogview|\bwan\b(?!,)"
        r"|longcat|\bovis|visual.?cloze|kontext|klein|kandinsky|hunyuan|\bltx|mochi|krea|\bbria|\bfibo|nucleus|\bprx\b|cosmos"
        r"|skyreels|helios|chronoedit|anyflow|ernie|omnigen|joyimage|ideogram|ace.?step|stable.?audio|easyanimate|motif|glm"
    )
    # A reward may well name the model that judges, and a command the one that it takes by default or shows in its help; "Wan," is
    # the family name of an author.
    files = [file for file in sorted(package.rglob("*.py")) if file.parent.name not in ("rewards", "cli")]
    assert len(files) > 15
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            assert not re.search(names, line, flags=re.IGNORECASE), f"{file.name}:{number}: {line}"


@pytest.mark.parametrize("name", ["sana", "hidream", "wan"])
def test_usual_scheduler_of_another_kind_is_replaced(name):
    module = importlib.import_module(f"tiny_pipelines.{name}")
    pipeline = module.build()
    pipeline.scheduler = module.usual_scheduler()
    flow = PipelineFlow(pipeline, num_generations=2, num_inference_steps=STEPS, **module.CALLS["plain"])
    batch = flow.rollout(["a cat"], constant_churn(flow.rehearse(["a"]).sigmas, 0.2), [0], [1, 2], range(STEPS))
    for level in range(STEPS):
        assert torch.equal(flow.velocity(batch, level), batch.velocities[level])


def test_transparent_images_lie_on_white():
    module = importlib.import_module("tiny_pipelines.qwen_image21")
    pipeline = module.build()
    flow = PipelineFlow(pipeline, num_generations=2, num_inference_steps=STEPS, **module.CALLS["plain"])
    images = flow.generate(["a cat"], [0])
    generator = torch.Generator().manual_seed(0)
    [own] = pipeline(
        "a cat", num_inference_steps=STEPS, generator=generator, output_type="pt", return_dict=False, **module.SHARED
    )
    colors, opacity = own[:, :3], own[:, 3:]
    torch.testing.assert_close(images, opacity * colors + 1 - opacity, rtol=0, atol=1e-4)
