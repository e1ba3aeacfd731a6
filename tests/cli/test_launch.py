"""Options of accelerate's launcher on the command line of a run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException

from trl_fdfo.cli import launch, quick
from trl_fdfo.cli.arguments import Parser, RunArguments


@pytest.fixture(scope="module")
def parser():
    return Parser([RunArguments, *quick.sections(quick.config_class("FDFOConfig"))], elsewhere=launch.options())


def test_options_are_those_of_accelerate():
    real = {flag[2:] for action in launch_command_parser()._actions for flag in action.option_strings if "--" in flag}
    real = {name.replace("-", "_") for name in real} - {"help", "module", "no_python"}
    assert launch.options().keys() - {"accelerate_config"} == real
    assert launch.options()["num_processes"] and not launch.options()["multi_gpu"]


@pytest.mark.parametrize(
    ("given", "own", "launched"),
    [
        ("--num_processes 8 --num_rollouts 3", "--num_rollouts 3", "--num_processes 8"),
        ("--num-processes=8 --churn 0.1", "--churn 0.1", "--num-processes=8"),
        ("--reward a b --multi_gpu --plan", "--reward a b --plan", "--multi_gpu"),
        ("--accelerate_config zero2 --reward a b", "--reward a b", "--accelerate_config zero2"),
        # What both have is the run's.
        ("--use_cpu true --debug underflow_overflow", "--use_cpu true --debug underflow_overflow", ""),
        ("--num_rolouts 3", "--num_rolouts 3", ""),
    ],
)
def test_each_option_goes_where_it_belongs(parser, given, own, launched):
    assert launch.split(given.split(), launch.options(), parser) == (own.split(), launched.split())


def test_a_recipe_may_have_them(parser, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_rollouts: 3\nnum_processes: 4\nmulti_gpu: true\naccelerate_config: ddp\n")
    _, *sections = parser.parse_args_and_config(["--config", str(recipe)])
    launched = launch.as_arguments(parser.passed_over)
    assert launched == ["--multi_gpu", "--num_processes=4", "--accelerate_config=ddp"]
    assert launch.processes(launched) == 4
    assert launch.processes(["--accelerate_config", "zero3"]) == 8
    assert launch.processes(["--main_process_port", "0"]) is None


@pytest.mark.parametrize("name", launch.configs())
def test_a_packaged_config_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = launch._config_arguments(name)
    files = [Path(argument) for argument in arguments if not argument.startswith("--")]
    options = yaml.safe_load(files[0].read_text())
    assert [file.suffix for file in files] == [".yaml", *([".json"] if "deepspeed_config" in options else [])]
    assert all(file.is_file() and file.stem == name for file in files)


@pytest.mark.parametrize(
    ("given", "is_distributed"),
    [
        ("", False),
        ("--multi_gpu", True),
        ("--use_fsdp", True),
        (f"--config_file {launch.CONFIGS / 'zero2.yaml'}", True),
        (f"--config_file {launch.CONFIGS / 'single_gpu.yaml'}", False),
    ],
)
def test_whether_accelerate_knows_a_way_to_start_several_processes(given, is_distributed, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))
    assert launch._is_distributed(launch_command_parser().parse_args([*given.split(), "script.py"])) == is_distributed


def test_several_processes_that_would_be_one_are_refused():
    with pytest.raises(ValueError, match="starts one process.*--use_cpu true"):
        launch.launch(["train"], ["--cpu", "--num_processes", "2"])


RECIPE = """
model: shapes
reward: trl_fdfo.shapes:reward
num_rollouts: 1
prompts_per_rollout: 2
per_device_prompt_batch_size: 1
num_inference_steps: 2
optimizer_steps_per_rollout: 1
height: 32
width: 32
pipeline_kwargs: {max_sequence_length: 0}
num_report_prompts: 1
images_per_report_prompt: 1
use_cpu: true
ddp_backend: gloo
report_to: [none]
save_strategy: "no"
"""


@pytest.mark.slow
def test_a_run_in_two_processes(tmp_path, warm_python):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [warm_python.path, "-m", "trl_fdfo", "train", "--config", "recipe.yaml", "--output_dir", "out"]
    command += [
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]  # of which accelerate, without GPUs, would start one
    environment = {**os.environ, **warm_python.environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Trained in") == 1 and "2 process(es)" in done.stdout + done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


RUN_OF_A_LAUNCHER = """
import signal, subprocess, sys
from trl_fdfo.cli import launch

child = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: (print('saved', flush=True), sys.exit()));"
child += "print('ready', flush=True); time.sleep(60)"
run = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
assert run.stdout.readline() == "ready\\n"
launch._pass_on_interrupts()
print(run.stdout.read())
launch._pass_on_interrupts()  # with none left
"""


def test_an_interrupt_of_the_launcher_is_passed_on_and_waited_for():
    done = subprocess.run(
        [sys.executable, "-c", RUN_OF_A_LAUNCHER],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "saved\n\n", done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_torchrun_has_passed_on_is_the_exit_code(monkeypatch, number):
    def signalled(arguments):
        raise SignalException("it got a signal", number)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", signalled)
    with pytest.raises(SystemExit) as ended:
        launch.launch(["train"], ["--num_processes", "2"])
    assert ended.value.code == 128 + number
