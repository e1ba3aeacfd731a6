"""The engines of `accelerate launch`: the configs of trl_fdfo/accelerate_configs, and runs of two processes under ZeRO."""

import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_run
import engine_run
import pytest
import tiny_pipelines
import tiny_runs
import tiny_vlms
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, compare_versions
from conftest import free_port
from diffusers import StableDiffusion3Pipeline
from distributed_run import assert_same
from peft import PeftModel
from tiny_clip import clip_model, clip_tokenizer
from transformers import CLIPImageProcessorPil, CLIPProcessor
from warm_python import ON_CPUS, WarmPython

from trl_fdfo import FDFOConfig, shapes
from trl_fdfo.pipeline.loading import load_pipeline


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "trl_fdfo" / "accelerate_configs"

ENGINES = {"zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine", "fsdp2": "FSDP_Adapted"}

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


# The configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_config(path):
    config = load_config_from_file(str(path))
    kinds = {"single_gpu": DistributedType.NO, "fsdp2": DistributedType.FSDP, "ddp": DistributedType.MULTI_GPU}
    kinds["multi_node"] = DistributedType.MULTI_GPU
    assert config.distributed_type == kinds.get(path.stem, DistributedType.DEEPSPEED)
    assert not config.use_cpu and config.num_processes == {"single_gpu": 1, "multi_node": 16}.get(path.stem, 8)
    # Precision and accumulation are options of the run: said here too they could contradict it, or be ignored.
    assert config.mixed_precision in (None, "no")
    if config.distributed_type == DistributedType.DEEPSPEED:
        # From the root of the repository, where `accelerate launch` is run.
        file = ROOT / config.deepspeed_config["deepspeed_config_file"]
        assert file == path.with_suffix(".json") and file.is_file()
        assert config.deepspeed_config["zero3_init_flag"] is False


@needs_deepspeed
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_reads_the_config_filled_by_the_options_of_the_run(path, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations import unset_hf_deepspeed_config
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    options = FDFOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True, max_grad_norm=0.5, report_to=[])
    filled = HfTrainerDeepSpeedConfig(str(path))
    unset_hf_deepspeed_config()
    filled.trainer_config_process(options)
    assert not filled.mismatches
    config = DeepSpeedConfig(filled.config)
    # The paper's rollout: 864 images x 40 noise levels in 4 optimizer steps, of which 4 samples at a time.
    assert config.train_batch_size == 864 * 40 // 4
    assert config.train_micro_batch_size_per_gpu == 4
    assert config.gradient_accumulation_steps == options.gradient_accumulation_steps == 864 * 40 // 4 // 4
    assert config.gradient_clipping == 0.5
    assert config.bfloat16_config.enabled and not config.float16_config.enabled
    # Thousands of gradients are added up: in bfloat16 the sum would soon be too large for the next one to count.
    assert config.grad_accum_dtype == "fp32" and config.communication_data_type == torch.float32
    assert config.zero_optimization_stage == int(path.stem[4])
    assert (config.zero_config.offload_optimizer is not None) == path.stem.endswith("_offload")
    assert (config.zero_config.offload_param is not None) == (path.stem == "zero3_offload")


# Runs of two processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_pipelines.sd3().save_pretrained(folder / "pipeline")
    clip_model().save_pretrained(folder / "clip")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, clip_tokenizer()).save_pretrained(folder / "clip")
    tiny_vlms.llava(folder / "vlm")
    return folder


def with_models(folder: Path, models: Path) -> Path:
    for model in models.iterdir():
        (folder / model.name).symlink_to(model)
    return folder


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    """What a run without DeepSpeed ends with, with and without an adapter."""
    folder = tmp_path_factory.mktemp("one")
    options = distributed_run.SHORT
    trainer = distributed_run.build(str(folder / "out"), **options)
    before = trainer.generate(tiny_runs.PROMPTS[:5], range(5))
    _, without_adapter = distributed_run.run(str(folder / "without_adapter"), **engine_run.WITHOUT_ADAPTER, **options)
    return {
        "images before": before,
        "run": distributed_run.finished(trainer),
        "elements": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "without adapter": without_adapter,
        "sparse": distributed_run.run(str(folder / "sparse"), **distributed_run.SPARSE)[1],
        "scores": engine_run.scores(models),
    }


def launch(
    config: Path, processes: int, *arguments: str | Path, python: WarmPython | None = None, **environment: str
) -> None:
    """What a user types, from the root of the repository; by a Python that starts at once if one is given."""
    command = [python.path if python else sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command += ["--num_processes", str(processes), "--main_process_port", "0", *arguments]
    environment |= python.environment if python else {}
    # DeepSpeed builds an extension with ninja, which is beside Python.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=270, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-8000:]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) for name in ENGINES],
)
def two_processes(request, models, tmp_path_factory, warm_python):
    """The engine, the folder of a run with it, and what it ended with."""
    engine, arguments = request.param, []
    folder = with_models(tmp_path_factory.mktemp(engine), models)
    if engine != "fsdp2":
        pytest.importorskip("deepspeed")
        config = json.loads((CONFIGS / f"{engine}.json").read_text())
        if engine == "zero3":
            # Else weights as small as these are not sharded.
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / "deepspeed.json").write_text(json.dumps(config))
        arguments = ["--deepspeed_config_file", folder / "deepspeed.json"]
    # With gloo, also where there are GPUs.
    cache = {"HF_DATASETS_CACHE": str(folder / "cache")}
    launch(CONFIGS / f"{engine}.yaml", 2, *arguments, engine_run.__file__, folder, python=warm_python, **cache)
    results = torch.load(folder / "results.pt", weights_only=True)
    assert results["run"]["processes"] == 2
    assert results["run"]["wrapper"] == ENGINES[engine]
    return engine, folder, results


def small_run(folder: Path, use_cpu: bool = False) -> list[str]:
    """
    The script with a smaller rollout of the demo, and what processes on CPUs ask for. Accelerate takes `use_cpu` for "not
    DeepSpeed".
    """
    script = [engine_run.__file__, "examples/train_sd3.py", "--config", "shapes"]
    script += ["--use_cpu", str(use_cpu), "--ddp_backend", "gloo", "--num_rollouts", "1", "--prompts_per_rollout", "4"]
    script += ["--per_device_prompt_batch_size", "1", "--optimizer_steps_per_rollout", "1"]
    script += ["--num_inference_steps", "4", "--num_report_prompts", "2", "--images_per_report_prompt", "1"]
    script += ["--output_dir", str(folder)]
    return script


def check_small_run(folder: Path) -> None:
    report = json.loads((folder / "results.json").read_text())
    assert 0 < abs(report["after"]["reward"] - report["before"]["reward"]) < 0.2
    shapes.load_pipeline().load_lora_weights(folder)
    assert (folder / "README.md").is_file() and (folder / "before_after.png").is_file()


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "processes"), [("zero3", 2), ("zero1", 1), ("zero2_offload", 1), ("zero3_offload", 1)]
)
def test_script_runs_with_the_config_as_it_is(engine, processes, tmp_path, warm_python):
    """The command of the docs. tests/saving/test_ctrl_c.py starts `accelerate launch` by a fresh Python."""
    launch(CONFIGS / f"{engine}.yaml", processes, *small_run(tmp_path), python=warm_python, **ON_CPUS)
    check_small_run(tmp_path)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


@pytest.mark.slow
def test_two_machines_run_the_command_of_the_docs(tmp_path, warm_python):
    """Two launchers stand in for the machines, each with one process in the place of eight."""
    page = (ROOT / "docs" / "distributed.md").read_text()
    command = re.search(r"exec (trl-fdfo train .*?)--config", page, re.DOTALL)[1]
    assert "--accelerate_config multi_node" in command
    command = command.replace("trl-fdfo", f"{warm_python.path} -m trl_fdfo")
    port = free_port()
    command = command.replace("8 * SLURM_NNODES", "SLURM_NNODES").replace("29500", str(port))
    options = shlex.join(small_run(tmp_path / "run", use_cpu=True)[2:])
    environment = {**os.environ, **warm_python.environment, "SLURM_NNODES": "2", "MAIN": "localhost"}
    logs = [tmp_path / f"machine_{number}.log" for number in range(2)]
    machines = []
    for number, log in enumerate(logs):
        with log.open("w") as file:
            machine = {**environment, "SLURM_NODEID": str(number)}
            machines.append(
                subprocess.Popen(["bash", "-c", command + options], env=machine, cwd=ROOT, stdout=file, stderr=file)
            )
        # Here the second one could take the port before the first one does.
        while number == 0 and machines[0].poll() is None and not listens(port):
            time.sleep(0.2)
    try:
        ends = [machine.wait(timeout=250) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert ends == [0, 0], "".join(log.read_text()[-4000:] for log in logs)
    check_small_run(tmp_path / "run")


def test_two_processes_leave_out_the_same_number_of_ties(two_processes, one_process):
    two = two_processes[2]["sparse"]
    assert_same(two, one_process["sparse"])
    assert all(share > 0 for share in two["left_out"]) and len(two["left_out"]) == 2


def test_weights_are_sharded(two_processes, one_process):
    engine, _, results = two_processes
    whole = one_process["elements"]
    # ZeRO-2 shards gradients and the optimizer's state alone.
    assert results["elements"] == {"zero2": [whole, whole], "zero3": [0, 0]}.get(engine, results["elements"])
    if engine == "fsdp2":
        assert sum(results["elements"]) == whole and max(results["elements"]) < 0.6 * whole


def test_result_is_that_of_one_process(two_processes, one_process):
    _, _, results = two_processes
    torch.testing.assert_close(results["images before"], one_process["images before"], rtol=0, atol=1e-5)
    assert_same(results["run"], one_process["run"])


def test_resumed_run_ends_in_the_same_bits(two_processes):
    engine, _, results = two_processes
    if engine == "fsdp2" and not compare_versions("transformers", ">=", "5.23"):
        pytest.skip("with transformers 5.17 and accelerate 1.14 FSDP2 goes on with other numbers")
    for name, weight in results["run"]["weights"].items():
        assert torch.equal(results["resumed"]["weights"][name], weight)
    assert torch.equal(results["resumed"]["images"], results["run"]["images"])


def test_a_resumed_run_takes_its_new_learning_rate(two_processes):
    changed = two_processes[2]["changed"]
    assert changed["logged"] == [1e-2, 1e-3]
    assert changed["groups"] and all(group == [1e-3, 0.9, 1e-3] for group in changed["groups"])


def generated(pipeline: StableDiffusion3Pipeline) -> torch.Tensor:
    """The images that the trainer generates, by diffusers alone."""
    return pipeline(
        2 * tiny_runs.PROMPTS[:5],
        generator=[torch.Generator().manual_seed(seed) for seed in range(10)],
        num_inference_steps=4,
        guidance_scale=1.0,
        height=16,
        width=16,
        max_sequence_length=8,
        output_type="pt",
    ).images


def test_saved_adapter_is_whole_in_both_formats(two_processes):
    _, folder, results = two_processes
    with_diffusers = tiny_pipelines.sd3()
    with_diffusers.load_lora_weights(folder / "out")
    with_peft = tiny_pipelines.sd3()
    with_peft.transformer = PeftModel.from_pretrained(with_peft.transformer, folder / "out").base_model.model
    expected = results["run"]["images"]
    assert (expected[:5] - results["images before"]).abs().max() > 1e-3
    for pipeline in (with_diffusers, with_peft):
        torch.testing.assert_close(generated(pipeline), expected, rtol=0, atol=1e-5)


def test_checkpoint_has_the_averaged_adapter_for_pipelines_and_the_trained_one_to_go_on_from(two_processes):
    _, folder, results = two_processes
    averaged, trained = tiny_pipelines.sd3(), tiny_pipelines.sd3()
    averaged.load_lora_weights(folder / "out" / "checkpoint-4")
    torch.testing.assert_close(generated(averaged), results["run"]["images"], rtol=0, atol=1e-5)
    model = PeftModel.from_pretrained(trained.transformer, folder / "out" / "checkpoint-4")
    weights = dict(model.named_parameters())
    for name, weight in results["run"]["weights"].items():
        assert torch.equal(weights[name], weight)


def test_model_without_adapter_is_saved_whole(two_processes, one_process):
    _, folder, results = two_processes
    found, expected = results["without adapter"], one_process["without adapter"]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["images"], expected["images"], rtol=0, atol=1e-4)
    pipeline = load_pipeline(folder / "without_adapter")
    torch.testing.assert_close(generated(pipeline), found["images"], rtol=0, atol=1e-5)


def test_rewards_and_text_encoders_are_not_sharded(two_processes, one_process):
    _, _, results = two_processes
    for when in ("scores after the config", "scores after the run"):
        assert results[when] == pytest.approx(one_process["scores"], abs=1e-5)
    assert len(set(one_process["scores"])) == 6


def test_a_signal_to_one_process_ends_all_after_the_same_batches(two_processes):
    _, folder, results = two_processes
    assert results["exit"] == 1  # of the process that was not told
    assert [path.name for path in (folder / "interrupted").glob("checkpoint-*")] == ["checkpoint-2"]


def test_pipeline_of_another_dtype_is_refused(two_processes):
    engine, _, results = two_processes
    if engine == "fsdp2":
        return  # computes in what the weights are, where neither bf16 nor fp16 is set
    assert "DEEPSPEED computes in torch.float32 without autocast" in results["refused"]
    assert "is in torch.bfloat16" in results["refused"] and "set bf16=True" in results["refused"]


# In bfloat16, on GPUs if there are some ---------------------------------------------------------------------------------

FLOAT32_ON_CPUS = pytest.mark.gpu("DeepSpeed and FSDP2 train in float32 on CPUs, and the tests above run them there")


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    ["single_gpu", "ddp", *(pytest.param(name, marks=FLOAT32_ON_CPUS) for name in ENGINES)],
)
def test_run_in_bfloat16(engine, models, tmp_path, warm_python):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder = with_models(tmp_path, models)
    processes = 1 if engine == "single_gpu" else min(torch.cuda.device_count() or 2, 2)
    python = None if torch.cuda.is_available() else warm_python
    launch(CONFIGS / f"{engine}.yaml", processes, engine_run.__file__, folder, "bfloat16", python=python)
    results = torch.load(folder / "results.pt", weights_only=True)
    assert results["run"]["processes"] == processes
    assert results["run"]["wrapper"] == ENGINES.get(engine, "DistributedDataParallel" if processes > 1 else "_Adapted")
    for name, weight in results["run"]["weights"].items():
        assert weight.isfinite().all()
        torch.testing.assert_close(results["resumed"]["weights"][name], weight, rtol=0, atol=1e-3)
    assert (results["run"]["images"][:5] - results["images before"]).abs().max() > 1e-3
