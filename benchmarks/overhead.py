"""
Measures what FDFO costs beyond the transformer: one rollout and its updates against as many forwards and
forward-backwards of the transformer alone, in turn in one run.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --small

The transformer has tens of millions of parameters; with `--small` a call of it takes about ten milliseconds, as little as
a large one's launches take the host of a GPU: there Python shows. The VAE and the text encoders are tiny, as they are
beside a real transformer, and the reward is free. Prints the ratio of each round and their median.
"""

import argparse
import os
import statistics
import time

import tiny_pipelines
import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.common import PROMPTS, QUIET, brightness, sd3_transformer
from trl_fdfo import FDFOConfig, FDFOTrainer


def build_pipeline(small: bool = False):
    """A tiny SD3 with a transformer of 31 M parameters on 256 image tokens, or of 0.6 M on 64."""
    pipeline = tiny_pipelines.sd3()
    torch.manual_seed(0)
    size = {"num_layers": 4, "num_attention_heads": 1} if small else {"num_layers": 6, "num_attention_heads": 6}
    transformer = sd3_transformer(**size, joint_attention_dim=32, pooled_projection_dim=32)
    pipeline.register_modules(transformer=transformer)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    rounds, size = arguments.rounds, 32 if arguments.small else 64

    config = FDFOConfig(
        output_dir="outputs/overhead",
        num_rollouts=rounds + 1,
        prompts_per_rollout=4,
        per_device_prompt_batch_size=2,
        num_inference_steps=40 if arguments.small else 8,
        optimizer_steps_per_rollout=2,
        height=size,
        width=size,
        pipeline_kwargs={"max_sequence_length": 8},
        use_cpu=True,
        **QUIET,
    )
    trainer = FDFOTrainer(config, build_pipeline(arguments.small), brightness, PROMPTS)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, torch {torch.__version__}, {torch.get_num_threads()} threads")

    # Both sides compute the same: the transformer alone gets the inputs that the pipeline passes to it.
    model, inputs = trainer.model, {}
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    trainer.generate(PROMPTS["prompt"][:4], range(4))
    hook.remove()
    assert inputs["hidden_states"].shape == (config.per_device_train_batch_size, 4, size // 2, size // 2)

    forwards = config.num_rollout_batches * config.num_inference_steps
    trained = config.steps_per_rollout * config.gradient_accumulation_steps

    def transformer_alone() -> tuple[float, float]:
        """Seconds of a rollout's forwards, and of its updates' forward-backwards."""
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(forwards):
                model(**inputs)
        sampled = time.perf_counter()
        for _ in range(trained):
            model(**inputs)[0].square().mean().backward()
        end = time.perf_counter()
        model.zero_grad()
        return sampled - start, end - sampled

    class Alternate(TrainerCallback):
        """
        Runs the transformer alone before each rollout and once at the end. A round of FDFO is compared with the mean of
        its two neighbours, so that a machine whose speed drifts favours neither side.
        """

        def __init__(self):
            self.alone, self.fdfo = [], []

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.alone.append(transformer_alone())
            self.start = time.perf_counter()

        def on_epoch_end(self, args, state, control, **kwargs):
            self.fdfo.append(time.perf_counter() - self.start)

        def on_train_end(self, args, state, control, **kwargs):
            self.alone.append(transformer_alone())

    alternate = Alternate()
    trainer.add_callback(alternate)
    trainer.pop_callback(PrinterCallback)
    trainer.train()
    ratios = []
    logs = [log for log in trainer.state.log_history if "rollout_time" in log]
    calls = rounds * (forwards + trained)
    alone = sum(map(sum, alternate.alone[1:-1]))
    print(f"{1000 * alone / calls:.1f} ms per call of the transformer alone, with its backward pass if it has one")
    print("seconds     rollout  forwards    updates  forward-backwards    ratio")
    for n in range(1, rounds + 1):  # the first round warms up
        sampling, training = (sum(pair) / 2 for pair in zip(alternate.alone[n], alternate.alone[n + 1]))
        ratios.append(alternate.fdfo[n] / (sampling + training))
        print(
            f"{n:7d} {logs[n]['rollout_time']:11.2f} {sampling:9.2f} {logs[n]['train_time']:10.2f} {training:18.2f} "
            f"{ratios[-1]:8.3f}"
        )
    print(f"median ratio {statistics.median(ratios):.3f} over {rounds} rounds, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
