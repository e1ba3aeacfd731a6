"""
Kills a run again and again and resumes it, beside a whole run that is never killed:

    python tests/helpers/kill_run.py FOLDER PROCESSES KILLS SEED

A run is one process, or several with gloo. They are forked from this process, which has only imported their modules.
Each kill is a SIGKILL to all of them, in turn while images are sampled, while they are trained on, and while a
checkpoint is written. Writes FOLDER/result.json, and leaves the outputs of both runs in FOLDER.
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import tiny_pipelines
import tiny_runs
import torch
from datasets import Dataset
from transformers.trainer_utils import sort_checkpoints

from trl_fdfo import FDFOConfig
from trl_fdfo.saving.checkpoint_files import SAVING


with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401  accelerate would import it in every run


PHASES = ("rollout", "update", "save")
ROLLOUTS = 8
CONTEXT = multiprocessing.get_context("fork")


class MarkedTrainer(tiny_runs.UnplannedTrainer):
    """Tells the killing process which phase it is in."""

    phase = None  # a shared integer
    times = None  # how often each phase has begun, shared

    def _mark(self, name):
        if self.is_world_process_zero():
            self.phase.value = PHASES.index(name)
            self.times[PHASES.index(name)] += 1

    def _roll_out(self, rollout):
        self._mark("rollout")
        buffer = super()._roll_out(rollout)
        self._mark("update")
        return buffer

    def _save_checkpoint(self, *args, **kwargs):
        self._mark("save")
        super()._save_checkpoint(*args, **kwargs)
        self._mark("update")


def run(output_dir, rank, processes, port, phase, times, resume):
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    MarkedTrainer.phase, MarkedTrainer.times = phase, times
    config = FDFOConfig(
        output_dir=str(output_dir),
        num_rollouts=ROLLOUTS,
        prompts_per_rollout=8,
        per_device_prompt_batch_size=2,
        num_inference_steps=4,
        optimizer_steps_per_rollout=2,
        height=16,
        width=16,
        pipeline_kwargs={"max_sequence_length": 8},
        churn=0.2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        ema_decay=0.5,
        lora_r=4,
        logging_images_steps=0,
        report_to=[],
        save_strategy="epoch",
        eval_strategy="epoch",
        metric_for_best_model="eval_reward",
        load_best_model_at_end=False,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = MarkedTrainer(
        config,
        tiny_pipelines.sd3(),
        tiny_runs.redness,
        train_dataset=Dataset.from_dict({"prompt": tiny_runs.PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": tiny_runs.PROMPTS[:2]}),
    )
    assert trainer.args.world_size == processes
    trainer.train(resume_from_checkpoint=resume)
    # The threads of gloo do not survive an orderly exit of a forked process.
    os._exit(0)


def start(output_dir, processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    phase, times = CONTEXT.Value("i", -1, lock=False), CONTEXT.Array("i", 3, lock=False)
    resume = any(Path(output_dir).glob("checkpoint-*"))
    runs = [
        CONTEXT.Process(target=run, args=(output_dir, rank, processes, port, phase, times, resume))
        for rank in range(processes)
    ]
    for process in runs:
        process.start()
    return runs, phase, times


def killed_at(runs, phase, times, target, number, delay):
    """
    Kill the run `delay` seconds after the phase `target` has begun for the `number`th time.

    Returns:
        `str` or `None`: The phase that the kill hit; None if the run ended before.
    """
    while times[PHASES.index(target)] < number or PHASES[phase.value] != target:
        if not all(process.is_alive() for process in runs):
            return None
        time.sleep(0.0005)  # leaves the core to the run
    time.sleep(delay)
    hit = PHASES[phase.value] if all(process.is_alive() for process in runs) else None
    for process in runs:
        process.kill()
    for process in runs:
        process.join()
    # A run that ended by itself in that moment was not killed.
    return hit if any(process.exitcode == -signal.SIGKILL for process in runs) else None


def main(folder, processes, kills, seed):
    rng = random.Random(seed)
    whole, killed = Path(folder, "whole"), Path(folder, "killed")
    runs, *_ = start(whole, processes)
    for process in runs:
        process.join()
    assert all(process.exitcode == 0 for process in runs), "the whole run failed"
    hits, half, codes = [], 0, []
    while len(hits) < kills:
        target = PHASES[len(hits) % 3]
        runs, phase, times = start(killed, processes)
        # About the lengths of the phases on a CPU.
        delay = rng.uniform(0, {"rollout": 0.02, "update": 0.08, "save": 0.005}[target])
        hit = killed_at(runs, phase, times, target, rng.choice([1, 1, 2]), delay)
        if hit is None:  # the run ended before the kill: start again from its middle
            for process in runs:
                process.join()
            codes += [process.exitcode for process in runs]
            for checkpoint in sort_checkpoints(str(killed))[ROLLOUTS // 2 :]:
                shutil.rmtree(checkpoint)
            continue
        hits.append(hit)
        half += hit == "save" and (killed / SAVING).is_dir()
    runs, *_ = start(killed, processes)
    for process in runs:
        process.join()
    codes += [process.exitcode for process in runs]
    result = {"kills": {phase: hits.count(phase) for phase in PHASES}, "half_written": half, "exit_codes": codes}
    Path(folder, "result.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
