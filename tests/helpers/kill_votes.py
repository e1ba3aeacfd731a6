"""
Kills a run with a person as its reward, and its server, at random moments; resumed, it must end in the bytes of one that
nobody killed:

    python tests/helpers/kill_votes.py --kills 20
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import tiny_pipelines
import torch
from datasets import Dataset
from scripted_rater import ScriptedRater
from tiny_runs import PROMPTS, UnplannedTrainer

from trl_fdfo import FDFOConfig
from trl_fdfo.rewards.human_preference import human


def by_red(left, right, prompt):
    return left.resize((1, 1)).getpixel((0, 0))[0] - right.resize((1, 1)).getpixel((0, 0))[0]


def run_here(folder: Path, url: str, name: str = "whole", rollouts: int = 6) -> None:
    """The run, in this process; it goes on from its last checkpoint. Its weights are in `weights.pt` when it has ended."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whose number changes the last bits
    config = FDFOConfig(
        output_dir=str(folder / "out"),
        num_rollouts=rollouts,
        prompts_per_rollout=4,
        per_device_prompt_batch_size=2,
        num_inference_steps=4,
        height=16,
        width=16,
        pipeline_kwargs={"max_sequence_length": 8},
        churn=0.2,
        optimizer_steps_per_rollout=2,
        learning_rate=1e-3,
        lora_r=4,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    trainer = UnplannedTrainer(config, tiny_pipelines.sd3(), human(url, run=name), train_dataset=dataset)
    trainer.train(resume_from_checkpoint=True)
    weights = {key: weight.detach() for key, weight in trainer.model.named_parameters() if weight.requires_grad}
    torch.save(weights, folder / "weights.pt")
    torch.set_num_threads(threads)


def start(
    folder: Path, url: str, name: str = "killed", rollouts: int = 6, python: str = sys.executable
) -> subprocess.Popen:
    """The run in a process of its own, resumed if it has been killed."""
    command = [python, __file__, "--run", str(folder), url, name, str(rollouts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (torch.load(folder / "weights.pt") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(theirs[name], weight) for name, weight in ours.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--run", nargs=4, metavar=("FOLDER", "URL", "NAME", "ROLLOUTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        folder, url, name, rollouts = arguments.run
        run_here(Path(folder), url, name, int(rollouts))
        return
    from preference_server import Running

    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        server, over = Running(folder / "votes.sqlite"), threading.Event()
        # Slow enough for kills in the middle of voting.
        rater = ScriptedRater(server.url, prefer=lambda *pair: time.sleep(0.1) or by_red(*pair))
        threading.Thread(target=rater.run, args=(over.is_set,), daemon=True).start()
        rollouts = 3 * arguments.kills
        run_here(folder / "whole", server.url, rollouts=rollouts)
        print(f"whole: {rater.votes} votes")
        done = -1
        for number in range(arguments.kills):
            process = start(folder / "killed", server.url, rollouts=rollouts)
            # After it has taken some steps since the last time: else it would never get on.
            while (now := last_checkpoint(folder / "killed" / "out")) <= done:
                assert process.poll() is None, process.communicate()[1][-3000:]
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 1.5))
            if process.poll() is not None:
                print(f"it ended before kill {number + 1}")
                break
            if rng.random() < 0.5:
                server.stop()
                time.sleep(rng.uniform(0, 0.5))
                kill(process)
                server.start()
            else:
                kill(process)
            done = now
            print(f"kill {number + 1}: after checkpoint-{now}, {rater.votes} votes", flush=True)
        finish(start(folder / "killed", server.url, rollouts=rollouts))
        over.set()
        same = same_weights(folder / "whole", folder / "killed")
        print("the same bytes" if same else "OTHER WEIGHTS")
        server.stop()
        raise SystemExit(0 if same else 1)


def last_checkpoint(folder: Path) -> int:
    steps = [int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")]
    return max(steps, default=0)


if __name__ == "__main__":
    main()
