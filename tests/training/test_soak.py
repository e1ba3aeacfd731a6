"""A long run holds what a short one does: memory, files and threads. As a script: the run, in a process of its own."""

import asyncio
import gc
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from transformers import TrainerCallback


ROLLOUTS, EVERY = 200, 20


class Usage(TrainerCallback):
    """What the process holds after every 20th rollout and its checkpoint."""

    def __init__(self):
        self.process = psutil.Process()
        self.samples = []

    def on_save(self, args, state, control, **kwargs):
        gc.collect()
        self.samples.append(
            {
                "rollout": state.global_step // args.steps_per_rollout,
                "memory": self.process.memory_info().rss,
                "objects": len(gc.get_objects()),
                "threads": self.process.num_threads(),
                # On Windows they are handles.
                "files": self.process.num_fds() if hasattr(self.process, "num_fds") else self.process.num_handles(),
            }
        )


def soak(output_dir: str) -> None:
    """200 rollouts, with an async reward and checkpoints of which two are kept; writes `usage.json`."""
    import tiny_pipelines
    import tiny_runs
    from datasets import Dataset

    from trl_fdfo import FDFOConfig

    async def reward(images, prompts):
        await asyncio.sleep(0.001)
        return tiny_runs.redness(images, prompts)

    usage = Usage()
    config = FDFOConfig(
        output_dir=output_dir,
        num_rollouts=ROLLOUTS,
        prompts_per_rollout=2,
        per_device_prompt_batch_size=1,
        num_inference_steps=2,
        optimizer_steps_per_rollout=1,
        height=16,
        width=16,
        churn=0.2,
        ema_decay=0.9,
        logging_images_steps=2 * EVERY,
        save_strategy="steps",
        save_steps=EVERY,
        save_total_limit=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    prompts = Dataset.from_dict({"prompt": tiny_runs.PROMPTS})
    tiny_runs.UnplannedTrainer(config, tiny_pipelines.sd3(), reward, prompts, callbacks=[usage]).train()
    Path(output_dir, "usage.json").write_text(json.dumps(usage.samples))


@pytest.mark.slow
def test_what_a_run_holds_does_not_grow(tmp_path, warm_python):
    subprocess.run([warm_python.path, __file__, str(tmp_path)], check=True, capture_output=True, timeout=280)
    samples = json.loads((tmp_path / "usage.json").read_text())
    assert [sample["rollout"] for sample in samples] == list(range(EVERY, ROLLOUTS + 1, EVERY))
    first, last = samples[0], samples[-1]
    assert last["memory"] <= 1.02 * first["memory"], samples
    assert (last["files"], last["threads"]) == (first["files"], first["threads"]), samples
    # A log for each rollout, and nothing else of it.
    assert last["objects"] - first["objects"] <= ROLLOUTS - EVERY, samples
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{ROLLOUTS - EVERY}", f"checkpoint-{ROLLOUTS}"]


if __name__ == "__main__":
    soak(sys.argv[1])
