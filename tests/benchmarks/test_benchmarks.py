import dataclasses
import gc
import json
import subprocess

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import full_size, gpu_sd35, gpu_shapes, published_configs, recipe_plans, replay, scale
from benchmarks.common import TimedTrainer
from benchmarks.gpu_sd35 import TINY, Row
from trl_fdfo.planning.time import CARDS
from trl_fdfo.planning.without_weights import load_without_weights


CPU = torch.device("cpu")


# gpu_sd35.py -------------------------------------------------------------------------------------------------------


def test_counted_flops_are_those_of_its_layers_and_attentions(monkeypatch):
    work = gpu_sd35.count_work(TINY)
    counted = 0

    def linear(layer, inputs, output):
        nonlocal counted
        counted += 2 * layer.in_features * output.numel()

    def convolution(layer, inputs, output):
        nonlocal counted
        counted += 2 * layer.weight[0].numel() * output.numel()

    def attention(query, key, value, **kwargs):
        nonlocal counted
        counted += 4 * query.numel() * key.shape[-2]
        return scaled_dot_product_attention(query, key, value, **kwargs)

    model = gpu_sd35.build_adapted_transformer(TINY, CPU)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
        elif isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(convolution)
    # Attention is a function, not a module, so only a patch sees its inputs.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with gpu_sd35.building(CPU), torch.no_grad():
        model(**gpu_sd35.transformer_inputs(TINY, 1))
    assert work.forward == counted
    # The backward pass computes the gradient of each product's input, and the gradients of the adapter's weights.
    assert 2 < work.tuple / work.forward < 3
    assert work.of_image(10) == 10 * work.forward + work.decode
    assert work.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_a_row_fails_by_itself_and_leaves_nothing_behind(warm_python):
    # A process of its own: earlier tests may have left references to trainers.
    done = subprocess.run([warm_python.path, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def rows_fail_by_themselves_and_leave_nothing_behind():
    work = gpu_sd35.count_work(TINY)
    settings = {"device": CPU, "size": TINY, "work": work, "ceiling": 1e9, "steps": 2, "rounds": 1}
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    rows = [
        Row("plain", planned=True),
        Row("impossible", {"per_device_prompt_batch_size": 3}),
        Row("unknown", {"no_such_option": 1}),
        Row("compiled", compiled),
        Row("plain again"),
    ]
    environment = dict(gpu_sd35.os.environ)
    plain, impossible, unknown, compiled, again = (gpu_sd35.measure_or_fail(row, **settings) for row in rows)
    assert impossible["error"].startswith("ValueError: prompts_per_rollout=8 cannot be split evenly")
    assert unknown["error"] == "ValueError: FDFOConfig has no no_such_option"
    for row in (plain, compiled, again):
        assert "error" not in row, row["error"]
        # 16 images, and 32 tuples of them; the first rollout is not timed.
        assert row["images_per_second"] == pytest.approx(16 / row["sampling_seconds"][1])
        assert row["tuples_per_second"] == pytest.approx(32 / row["training_seconds"][1])
        assert row["sampling_mfu"] == pytest.approx(row["images_per_second"] * work.of_image(2) / 1e9)
        assert row["training_mfu"] == pytest.approx(row["tuples_per_second"] * work.tuple / 1e9)
    assert plain["plan_training_gib"] > plain["plan_sampling_gib"] > 0 and plain["replay_error"] == 0.0
    assert "plan_training_gib" not in again
    assert plain["compiled_frames"] == again["compiled_frames"] == 0 < compiled["compiled_frames"]
    assert gpu_sd35.os.environ == environment
    # On a GPU the memory of a trainer that is left would count in the next row.
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is TimedTrainer]


@pytest.mark.slow
def test_rehearsal_writes_a_file_that_the_model_on_paper_reads(tmp_path, capsys):
    output = tmp_path / "folder" / "tiny.json"
    rows = ["text encoders, offload_components", "2 prompts", "1 prompt"]
    gpu_sd35.main(["--tiny", "--rounds", "1", "--steps", "2", "--output", str(output), "--rows", *rows])
    results = json.loads(output.read_text())
    assert [row["name"] for row in results["rows"]] == rows
    assert all(row["images_per_second"] > 0 for row in results["rows"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows) and "tuples/s" in printed
    measured = scale.measured_batches(results)
    assert {prompts: row["name"] for prompts, row in measured.items()} == {2: rows[1], 1: rows[2]}
    work = gpu_sd35.count_work(TINY)
    parts = scale.parts_from_results(scale.Cluster(), work, results, steps=2, branches=2)
    assert parts.sample(4) == pytest.approx(4 / results["rows"][1]["images_per_second"])
    assert parts.train(2) == pytest.approx(2 / results["rows"][2]["tuples_per_second"])
    # Another run adds its parts to the file, and replaces rows of the same name.
    gpu_sd35.main(["--tiny", "--rounds", "2", "--steps", "2", "--output", str(output), "--rows", rows[1]])
    gpu_sd35.main(["--tiny", "--steps", "2", "--output", str(output), "--parts", "attention"])
    added = json.loads(output.read_text())
    assert [row["name"] for row in added["rows"]] == rows and added["rows"][0] == results["rows"][0]
    assert [len(row["training_seconds"]) for row in added["rows"]] == [2, 3, 2] and len(added["attention"]) == 12
    gpu_sd35.main(["--tiny", "--minutes", "0", "--steps", "2", "--output", str(output), "--parts", "rows"])
    assert json.loads(output.read_text())["rows"][:3] == added["rows"]  # no row was begun
    # Results with other steps are others, and begin the file anew.
    gpu_sd35.main(["--tiny", "--minutes", "0", "--steps", "4", "--output", str(output), "--rows", rows[2]])
    assert [row["name"] for row in json.loads(output.read_text())["rows"]] == [rows[2]]
    # The file has 2 steps, and 4 steps scale with the work.
    longer = scale.parts_from_results(scale.Cluster(), work, results, steps=4, branches=2)
    assert longer.sample(4) / parts.sample(4) == pytest.approx(work.of_image(4) / work.of_image(2))


def test_checks_come_first_and_no_row_is_begun_when_the_time_is_over(tmp_path, capsys):
    gpu_sd35.main(["--tiny", "--minutes", "0", "--steps", "2", "--output", str(tmp_path / "tiny.json")])
    results = json.loads((tmp_path / "tiny.json").read_text())
    assert len(results["rows"]) == len(gpu_sd35.ROWS) > 10
    assert all(row["error"] == "not begun: 0 minutes were over" for row in results["rows"])
    before, replayed, trained, loaded = results["checks"]
    assert before["value"] < 1e-5 and replayed["value"] == 0.0 and loaded["value"] < 1e-5 < 0.01 < trained["value"]
    names = ("forward without adapter", "forward", "forward and backward", "decoding")
    compiled = [("forward, compiled", 16), ("forward and backward, compiled", 16)]
    calls = [(call["name"], call["images"]) for call in results["calls"]]
    assert calls == [(name, images) for images in (4, 16) for name in names] + compiled
    assert all(call["seconds"] > 0 and call["host_seconds"] > 0 for call in results["calls"])
    flash = [kernel for kernel in results["attention"] if kernel["name"] == "FLASH_ATTENTION"]
    assert len(flash) == len(results["attention"]) / 2 == 6
    assert all(max(kernel["errors"]) < 0.01 for kernel in flash if kernel["score"] == 0)
    printed = capsys.readouterr().out
    assert printed.count("passed: ") == 4 and printed.index("passed: ") < printed.index("not begun")


def test_a_check_that_fails_ends_the_program_with_an_error_after_the_rows(tmp_path, capsys, monkeypatch):
    # In real runs nothing fails.
    monkeypatch.setattr(gpu_sd35, "SAME_VELOCITY", -1.0)
    monkeypatch.setattr(gpu_sd35.StableDiffusion3Pipeline, "load_lora_weights", lambda *arguments: None)
    output = tmp_path / "tiny.json"
    with pytest.raises(SystemExit) as end:
        gpu_sd35.main(["--tiny", "--minutes", "0", "--steps", "2", "--output", str(output)])
    assert end.value.code == 1
    results = json.loads(output.read_text())
    assert [check["passed"] for check in results["checks"]] == [True, False, True, False]
    assert len(results["rows"]) == len(gpu_sd35.ROWS)
    assert "FAILED: replay error: 0, at most -1" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_sd35.main([])
    assert "there is none here" in capsys.readouterr().out


def test_the_real_size_is_the_published_one():
    with gpu_sd35.building(torch.device("meta")):
        transformer = gpu_sd35.build_transformer(gpu_sd35.MEDIUM, torch.device("meta"))
        vae = gpu_sd35.build_vae(gpu_sd35.MEDIUM, torch.device("meta"))
        encoders = gpu_sd35.build_text_encoders(gpu_sd35.MEDIUM, torch.device("meta"), real=True)
    millions = lambda model: sum(p.numel() for p in model.parameters()) / 1e6
    # The model card's 2.5 billion count the table of positions, a buffer here.
    assert round(millions(transformer)) == 2243 and transformer.pos_embed.pos_embed.numel() == 384**2 * 1536
    assert round(millions(vae)) == 84
    sizes = [round(millions(encoders[name])) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    assert sizes[2] == 4762
    assert gpu_sd35.MEDIUM.latent_shape == (16, 64, 64) and gpu_sd35.MEDIUM.embedding_shape == (205, 4096)


# gpu_shapes.py -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_shapes_are_trained_in_each_precision_and_size(tmp_path, capsys):
    output = tmp_path / "shapes.json"
    short = ["--num_rollouts", "1", "--prompts_per_rollout", "4", "--per_device_prompt_batch_size", "2"]
    short += ["--optimizer_steps_per_rollout", "1", "--num_report_prompts", "2", "--images_per_report_prompt", "1"]
    short += ["--num_inference_steps", "2"]
    with pytest.raises(SystemExit):
        gpu_shapes.main(["--cpu", "--flow-steps", "1", "--dataset-size", "64", "--output", str(output), *short])
    runs = json.loads(output.read_text())["runs"]
    assert [run["name"] for run in runs] == ["packaged, float32", "packaged, bfloat16", "mid-size, bfloat16"]
    for run in runs:
        assert run["before"]["reward"] != run["after"]["reward"]
        assert run["before"].keys() == run["after"].keys() and "strict_accuracy" in run["after"]
    assert capsys.readouterr().out.count("FAILED") == 3  # one rollout is not enough


def test_a_run_passes_if_it_ends_as_high_as_the_readme_and_gained_as_much():
    assert gpu_shapes.judge(0.27, 0.82) and gpu_shapes.judge(0.3, 0.78)
    assert not gpu_shapes.judge(0.27, 0.76) and not gpu_shapes.judge(0.5, 0.82)


# full_size.py --------------------------------------------------------------------------------------------------------


def test_full_size_families_have_the_published_sizes():
    with torch.device("meta"):
        transformer = full_size.Lumina2Transformer2DModel(**full_size.LUMINA)
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(2.61, abs=0.02)


@pytest.mark.slow
def test_a_tiny_model_goes_through_all_parts(tmp_path):
    family, pixels = full_size.FAMILIES["tiny"], gpu_sd35.TINY.pixels
    first, loaded, resumed = (part(family, pixels, tmp_path) for part in full_size.PARTS.values())
    assert (first["rollouts"], resumed["rollouts"]) == (1, 2)
    assert first["replay_error"] == resumed["replay_error"] == 0.0
    # LoRA weights in float32, and the names of the tensors.
    assert 0 < first["files"]["adapter_model.safetensors"] - 4 * first["trained"] < 8192
    assert loaded["adapter"] < loaded["base"]
    # In a process with other tests the measured memory means nothing.
    for result in (first, resumed):
        result["peaks"] = {"sampling": (100 * 2**20, 111 * 2**20), "training": (100 * 2**20, 109 * 2**20)}
    printed = [line for result in (first, loaded, resumed) for line in full_size.report(result)]
    assert printed[-6].endswith("11.0%   more than a tenth") and printed[-5].endswith("9.0%")
    assert printed[-1] == "  largest replay error of 2 rollout(s): 0"


# scale.py ----------------------------------------------------------------------------------------------------------


FLAT = scale.Parts(sample=lambda images: images * 1.0, train=lambda images: images * 0.25, all_reduce=lambda gpus: 0.0)
SETTING = scale.Setting(trained_levels=4, optimizer_steps=4, batch_sizes=(1, 2, 4), growth=1.0)


def test_prediction_adds_up():
    parts = dataclasses.replace(FLAT, all_reduce=lambda gpus: gpus / 100)
    # 4 GPUs x 2 prompts x 2 images.
    row = scale.predict(parts, SETTING, 4, 8)
    assert (row.prompts, row.images) == (8, 16)
    assert (row.sampling, row.training, row.gradients) == (4.0, 4.0, 4 * 0.04)
    assert row.rewards == 0 and row.seconds == pytest.approx(8.16)
    assert row.images_per_second == pytest.approx(16 / 8.16)


def test_prompts_are_rounded_up_to_whole_batches():
    # A batch of 2 costs as much as a batch of 1, so 2 is better if the prompts fill whole batches.
    parts = dataclasses.replace(FLAT, sample=lambda images: 1.0 if images <= 4 else 100.0)
    row = scale.predict(parts, SETTING, 3, 12)
    assert (row.prompts, row.batch_size, row.sampling) == (12, 2, 2.0)
    row = scale.predict(parts, SETTING, 3, 9)
    assert (row.prompts, row.batch_size, row.sampling) == (9, 1, 3.0)
    row = scale.predict(parts, dataclasses.replace(SETTING, growth=1.4), 3, 9)
    assert (row.prompts, row.batch_size, row.sampling) == (12, 2, 2.0)
    # With more GPUs than prompts each GPU takes one.
    assert scale.predict(parts, SETTING, 100, 9).prompts == 100
    # Three levels in two optimizer steps need an even number of batches.
    odd = dataclasses.replace(SETTING, trained_levels=3, optimizer_steps=2)
    assert scale.predict(parts, odd, 1, 3).prompts == 4


def test_rewards_are_waited_for_after_the_last_batch_or_if_they_are_the_slowest():
    one = dataclasses.replace(SETTING, batch_sizes=(1,))
    wait = lambda score: scale.predict(dataclasses.replace(FLAT, score=score), one, 2, 8).rewards
    # 4 batches of 2 images on each of 2 GPUs, 2 s each. Fast servers leave the 4 images of the last batches.
    assert wait(0.01) == pytest.approx(4 * 0.01)
    # Slow servers score 16 images from the end of the first batch on, 6 s of it while the others are sampled.
    assert wait(1.0) == pytest.approx(16 * 1.0 - 6.0)


def test_all_reduce_of_a_ring_within_a_node_and_between_nodes():
    cluster = scale.Cluster(nvlink=100.0, network=10.0, latency=1.0, gpus_per_node=8)
    assert scale.ring_seconds(cluster, 400, 1) == 0
    assert scale.ring_seconds(cluster, 400, 2) == pytest.approx(400 / 100)
    assert scale.ring_seconds(cluster, 400, 8) == pytest.approx(2 * 7 / 8 * 400 / 100)
    assert scale.ring_seconds(cluster, 400, 16) == pytest.approx(2 * 15 / 16 * 400 / 10 + 2)


def test_times_from_flops_have_a_floor():
    work = gpu_sd35.Work(
        forward=10, tuple=20, decode=100, forward_kernels=30, tuple_kernels=60, trained_parameters=1000
    )
    parts = scale.parts_from_work(scale.Cluster(flops=1.0, launch=1.0, reward_gpus=2, reward_rate=5.0), work, steps=4)
    assert parts.sample(2) == 4 * 30 + 200 and parts.sample(8) == 4 * 80 + 800
    assert parts.train(2) == 60 and parts.train(8) == 160
    assert parts.score == pytest.approx(0.1)


def test_table_says_where_it_stops_and_why():
    prompts, gpus = lambda number: 16, [1, 2, 4]
    assert scale.table(FLAT, SETTING, prompts, gpus)[-1] == "Not below 80% up to 4 GPUs."
    slow_network = dataclasses.replace(FLAT, all_reduce=lambda number: 10.0 * (number == 4))
    assert scale.table(slow_network, SETTING, prompts, gpus)[-1] == "Below 80% from 4 GPUs on: adding up gradients."
    few_servers = dataclasses.replace(FLAT, score=1.0)
    assert scale.table(few_servers, SETTING, prompts, gpus)[-1] == "Below 80% from 2 GPUs on: the reward servers."
    # One image at a time costs as much as many, and 16 GPUs have one prompt each.
    idle = dataclasses.replace(FLAT, train=lambda images: 2.0)
    assert scale.table(idle, SETTING, prompts, [1, 16])[-1].endswith("too small to fill a GPU, in training.")


@pytest.mark.slow
def test_paper_goes_up_to_1024_gpus(capsys):
    scale.main(["--no-measure", "--reward-gpus", "4"])
    printed = capsys.readouterr().out
    assert "75.1 MB (18,776,064 LoRA weights" in printed
    strong = [line.split() for line in printed.splitlines() if line.startswith(("    1 ", " 1024 ")) and "%" in line]
    assert [int(line[0]) for line in strong[:2]] == [1, 1024]
    assert float(strong[1][8]) > 20 * float(strong[0][8]), "images/s"


@pytest.mark.slow
def test_one_process_and_two_take_turns(capsys, warm_python):
    measured = scale.measure(rounds=1, tiny=True, python=warm_python.path)
    assert list(measured["turns"]) == list(scale.TURNS)
    for turn in measured["turns"].values():
        assert len(turn) == 1 and turn[0]["seconds"] == pytest.approx(turn[0]["sampling"] + turn[0]["training"])
    traffic = measured["traffic"]
    # Each optimizer step adds up each gradient once.
    assert traffic["rollouts"] == 2
    assert sum(traffic["sizes"]) == traffic["trained"] * scale.OPTIMIZER_STEPS * traffic["rollouts"]
    scale.report(measured)
    printed = capsys.readouterr().out
    assert "strong scaling" in printed and "weak scaling" in printed and "predicted" in printed


# recipe_plans.py ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", (2243, 84, 124, 695, 4762)),
        ("black-forest-labs/FLUX.1-dev", (11901, 84, 123, 4762)),
        ("Qwen/Qwen-Image", (20430, 127, 8292)),
        ("Lightricks/LTX-2", (18876, 1222, 12187)),
    ],
)
def test_configs_have_the_published_sizes(model, millions, tmp_path):
    pipeline = load_without_weights(published_configs.write_configs(model, tmp_path), torch.bfloat16)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    names = ["transformer", "vae", *sorted(name for name in parts if name.startswith("text_encoder"))]
    size = lambda part: round(sum(parameter.numel() for parameter in part.parameters()) / 1e6)
    assert tuple(size(parts[name]) for name in names) == millions


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_plans.CARDS_OF)
def test_recipe_and_page_have_the_figures_of_the_plan(name):
    plan = recipe_plans.plan_of(name)
    assert plan.needed_memory() <= CARDS[plan.gpu].memory
    page, recipe = recipe_plans.PAGE.read_text(), (recipe_plans.RECIPES / f"{name}.yaml").read_text()
    hint = "run `python benchmarks/recipe_plans.py --write`"
    assert recipe_plans.plan_line(plan) in recipe.splitlines(), hint
    assert recipe_plans.table_row(name, plan) in page.splitlines(), hint


# replay.py ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "billions"), [("FLUX.1 Kontext", 11.9), ("Stable Diffusion 3", 2.2)])
def test_replay_of_a_family(name, billions):
    assert 0 < replay.replay_overhead(replay.FAMILIES[name], repeats=1) < 10
    assert replay.published_parameters(replay.FAMILIES[name]) / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize(
    ("gpu", "card"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", None),
    ],
)
def test_card_of_the_plan(gpu, card):
    assert gpu_sd35.plan_card({"gpu": gpu}) == card
    assert gpu_sd35.plan_card({}) is None


if __name__ == "__main__":
    rows_fail_by_themselves_and_leave_nothing_behind()
