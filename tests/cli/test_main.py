"""The command `trl-fdfo`: its commands, what is imported for a mistake, and how errors are told."""

import importlib
import json
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import trl_fdfo
from trl_fdfo.cli import errors
from trl_fdfo.cli.algorithms import ALGORITHMS, CONFIGS
from trl_fdfo.cli.main import COMMANDS, DEBUG, main


ROOT = Path(__file__).parents[2]
HEAVY = ("accelerate", "datasets", "diffusers", "pandas", "peft", "torch", "transformers")


def run(script: str) -> subprocess.CompletedProcess:
    """A program in a process of its own."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, cwd=ROOT)


def test_help_is_a_line_per_command(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("  ")] == list(COMMANDS)
    assert max(map(len, printed.splitlines())) < 120
    main(["--version"])
    assert capsys.readouterr().out == f"trl-fdfo {trl_fdfo.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: trl-fdfo {name if name != 'demo' else 'train'}")
    assert callable(importlib.import_module(COMMANDS[name][0], "trl_fdfo.cli").main)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_lists_options_of_the_algorithm_alone(algorithm, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--algorithm", algorithm, "--help"])
    listed = {word for line in capsys.readouterr().out.splitlines() for word in line.split()[:1] if "--" in word}
    idle = getattr(trl_fdfo, CONFIGS[algorithm]).idle_options
    others = ("epsilon", "beta", "old_policy_decay", "nft_beta", "reward_multiplier")
    own = {field.name for field in fields(getattr(trl_fdfo, CONFIGS[algorithm]))}
    assert {name for name in others if f"--{name}" in listed} == own.intersection(others) - idle.keys()


def test_the_package_has_the_command_and_its_files():
    project = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\ntrl-fdfo = "trl_fdfo.cli.main:main"\n' in project
    for name in ("recipes/shapes.yaml", "recipes/circles.txt", "accelerate_configs/zero2.json"):
        assert (Path(trl_fdfo.__file__).parent / name).is_file()


# What is typed, the exit code and what an error says.
QUICK = [
    ("--help", 0, None),
    ("recipes", 0, None),
    ("train --help", 0, None),
    ("train --help-all", 0, None),
    ("train --config shapes --num_rolouts 3", 2, "has no option num_rolouts. Did you mean `num_rollouts`"),
    ("train --config shapes --num_rollouts ten", 2, "invalid int value: 'ten'"),
    ("train --config shapes --num_rollouts 0", 2, "num_rollouts=0 must be at least 1"),
    ("train --config shapes --prompts_per_rollout 7", 2, "cannot be split evenly over 1 process"),
    ("train --config shapes --num_processes 5", 2, "cannot be split evenly over 5 process"),
    ("train --config shape", 2, "no such file. The packaged recipes: combined,"),
    ("train --config shaeps", 2, "Did you mean `shapes`?"),
    ("train --config trl_fdfo/recipes/circles.txt", 2, "circles.txt has a str, and a recipe has lines `option: value`"),
    ("train --config shapes --gpu h100", 2, "There is no `gpu`: it is an option of `trl-fdfo plan`"),
    ("train --config shapes --algorithm awm", 2, "There is no `churn`: it is an option of --algorithm fdfo"),
    ("train --config shapes --model ./nowhere", 2, "model='./nowhere': there is no such folder"),
    ("train --config shapes --model README.md", 2, "model='README.md' is a file and has no model_index.json"),
    ("generate --model docs --prompts a", 2, "model='docs' is a folder without model_index.json"),
    ("generate --model shapes --prompts none.txt", 2, "prompts='none.txt': there is no such file"),
    ("generate --model shapes --prompts a --output grid", 2, "output='grid' does not end in a format of pictures"),
    ("evaluate --model shapes --prompts none.csv --reward clip", 2, "prompts='none.csv': there is no such file"),
    ("merge --model a/b/c --adapter a --output b", 2, "model='a/b/c': there is no such folder"),
    (
        "train --config shapes --output_dir README.md",
        2,
        "output_dir='README.md' is a file, and the run writes a folder",
    ),
    ("train --config shapes --output_dir README.md/out", 2, "README.md', which is a file"),
    ("train --config shapes --resume_from_checkpoint nowhere", 2, "resume_from_checkpoint='nowhere': there is no such"),
    ("train --config shapes --reward_weights 1 2", 2, "reward_weights has 2 values for 1 reward function(s)"),
    ("train --config shapes --reward nowhere:reward", 2, "reward 'nowhere:reward': there is no module 'nowhere'"),
    ("train --config shapes --reward trl_fdfo.shapes:rewrad", 2, "has no 'rewrad'. Did you mean 'reward'?"),
    ("train --config shapes --reward examples/custom_reward.py:f", 2, "folder or .py: examples.custom_reward:f."),
    ("train --config shapes --metrics trl_fdfo.shapes:metric", 2, "metrics 'trl_fdfo.shapes:metric': module"),
    ("plan --config shapes --reward nowhere:reward --plan_processes 0", 2, "plan_processes=0 must be at least 1"),
    ("serve trl_fdfo.shapes:rewrad", 2, "has no 'rewrad'. Did you mean 'reward'?"),
    ("evaluate --model shapes --reward trl_fdfo.shapes:rewrad", 2, "has no 'rewrad'. Did you mean 'reward'?"),
    ("train --config shapes --accelerate_config zero9", 2, "is neither a file nor one of ddp, "),
    ("train --config shapes --reward pickscor", 2, "Did you mean `pickscore`?"),
    ("train --config shapes --dataset_name none.txt", 2, "dataset_name='none.txt': there is no such file"),
    ("plan --config shapes --gpu z80", 2, "invalid choice: 'z80' (choose from"),
    ("plan --config shapes --num_processes 5", 2, "cannot be split evenly over 5 process"),
    ("demo --churn 0", 2, "churn=0 leaves the images of a prompt identical"),
    ("generate --models shapes", 2, "has no option models. Did you mean `model`?"),
    ("evaluate --model shapes --batch_size 0", 2, "batch_size=0 must be at least 1"),
    ("tain", 2, "has no command 'tain': it has demo, train"),
]
ALL_OF_THEM = f"""
import contextlib, io, json, sys
from trl_fdfo.cli.main import main
for args in json.loads(sys.stdin.read()):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args.split())
        except SystemExit as ended:
            code = ended.code
    imported = [name for name in {HEAVY} if name in sys.modules]
    print(json.dumps([code, out.getvalue(), err.getvalue(), imported]))
"""


@pytest.fixture(scope="module")
def told():
    """Of each of `QUICK` the exit code, what is printed, and which packages that take seconds have been imported."""
    typed = json.dumps([args for args, *_ in QUICK])
    command = [sys.executable, "-c", ALL_OF_THEM]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(zip([args for args, *_ in QUICK], map(json.loads, done.stdout.splitlines())))


@pytest.mark.parametrize(("args", "code", "message"), QUICK, ids=[args for args, *_ in QUICK])
def test_help_and_mistakes_wait_for_no_import(told, args, code, message):
    found, out, err, imported = told[args]
    assert (found, imported) == (code, [])
    if message is None:
        assert out and not err
    else:
        assert message in err and len(err.splitlines()) <= 2 and not out


RAISING = """
import sys
from trl_fdfo.cli import generate
from trl_fdfo.cli.main import main
def broken(args):
    {}
generate.main = broken
main(["generate"])
"""


def test_a_bug_shows_its_traceback():
    done = run(RAISING.format("int('ten')"))
    assert done.returncode == 1 and "Traceback" in done.stderr and "invalid literal for int()" in done.stderr


def test_a_reward_that_raises_is_told_by_its_own_lines(tmp_path, monkeypatch, capsys):
    (tmp_path / "raising.py").write_text("def reward(images, prompts):\n    return {}['missing']\n")
    monkeypatch.syspath_prepend(tmp_path)
    args = "evaluate --model shapes --reward raising:reward --diversity pixels --images_per_prompt 2 --prompts".split()
    with pytest.raises(SystemExit) as ended:
        main([*args, "a red circle on a white background", "--output", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in told
    assert "trl-fdfo evaluate: KeyError: 'missing'\nRaised by the reward 'reward' on a batch of 2 images" in told
    assert told.splitlines()[-2] == f"  {tmp_path / 'raising.py'}, line 2, in reward: return {{}}['missing']"


def test_an_error_of_the_user_shows_it_on_request(monkeypatch, capsys):
    wrong = ["generate", "--model", "shapes", "--prompts", "a", "--num_inference_steps", "0"]
    with pytest.raises(SystemExit):
        main(wrong)
    assert capsys.readouterr().err == (
        "trl-fdfo generate: error: num_inference_steps=0 must be at least 1.\n"
        "(trl-fdfo --debug generate ... shows where)\n"
    )
    monkeypatch.setenv(DEBUG, "")  # so that it is taken away again
    for args in (["--debug", *wrong], [*wrong, "--debug"]):
        monkeypatch.delenv(DEBUG)
        with pytest.raises(ValueError, match="num_inference_steps=0"):
            main(args)


@pytest.mark.slow
def test_one_process_of_several_tells_an_error():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "trl_fdfo", "train", "--config", "shapes", "--num_rollouts", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode != 0
    assert len(re.findall("num_rollouts=0 must be at least 1", done.stderr)) == 1


def test_who_can_mend_an_error():
    def error_of(call):
        try:
            call()
        except Exception as error:
            return errors.is_of_the_user(error)

    assert error_of(lambda: open("nowhere"))
    assert not error_of(lambda: int("ten"))
    assert not error_of(lambda: [][0])


def test_ctrl_c_is_told_in_one_line(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt("SIGINT ended the run after step 18. To go on: ...")

    monkeypatch.setattr(importlib.import_module("trl_fdfo.cli.recipes"), "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["recipes"])
    assert ended.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "trl-fdfo recipes: SIGINT ended the run after step 18. To go on: ...\n"


def test_the_packaged_pipeline_is_called_as_it_was_trained(capsys):
    options = ["--model", "shapes", "--reward", "trl_fdfo.shapes:reward", "--use_cpu", "true"]
    main(["plan", *options])
    own = capsys.readouterr().out
    main(["plan", *options, "--height", "32", "--width", "32", "--pipeline_kwargs", '{"max_sequence_length": 0}'])
    assert capsys.readouterr().out == own
    main(["plan", *options, "--pipeline_kwargs", '{"negative_prompt": "x"}'])
    assert capsys.readouterr().out == own
    main(["plan", *options, "--pipeline_kwargs", '{"max_sequence_length": 8}'])
    assert capsys.readouterr().out != own
    with pytest.raises(SystemExit):
        main(["plan", *options, "--height", "512"])
    assert capsys.readouterr().err.startswith("trl-fdfo plan: error: StableDiffusion3Pipeline cannot be called with")
