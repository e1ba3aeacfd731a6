"""
What FDFO costs beyond the transformer: one rollout and its updates against the pure cost of the same number of
transformer forwards and forward-backwards, alternating in one run.

    python benchmarks/overhead.py

The transformer has tens of millions of parameters; the VAE and the text encoders are tiny, as they are beside a real
transformer. The reward is free. Prints the ratio of each round and their median.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from diffusers import SD3Transformer2DModel


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny_pipelines

from trl_fdfo import FDFOConfig, FDFOTrainer


def build_pipeline():
    """A tiny SD3 with a transformer of 38 M parameters on 256 image tokens."""
    pipeline = tiny_pipelines.sd3()
    torch.manual_seed(0)
    pipeline.register_modules(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            num_layers=6,
            attention_head_dim=64,
            num_attention_heads=6,
            joint_attention_dim=32,
            caption_projection_dim=384,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
        )
    )
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    config = FDFOConfig(
        output_dir="outputs/overhead",
        num_rollouts=rounds + 1,
        prompts_per_rollout=4,
        per_device_prompt_batch_size=2,
        num_inference_steps=8,
        optimizer_steps_per_rollout=2,
        height=64,
        width=64,
        pipeline_kwargs={"max_sequence_length": 8},
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    prompts = Dataset.from_dict({"prompt": ["a cat", "two dogs", "the sea", "an old man"]})
    trainer = FDFOTrainer(config, build_pipeline(), lambda images: images.mean(dim=(1, 2, 3)), train_dataset=prompts)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{parameters / 1e6:.0f} M parameters, torch {torch.__version__}, {torch.get_num_threads()} threads")

    model, samples = trainer.model, config.per_device_train_batch_size
    inputs = {
        "hidden_states": torch.randn(samples, 4, 32, 32),
        "encoder_hidden_states": torch.randn(samples, 16, 32),
        "pooled_projections": torch.randn(samples, 32),
        "timestep": torch.full((samples,), 500.0),
    }
    forwards = config.num_rollout_batches * config.num_inference_steps
    trained = config.steps_per_rollout * config.gradient_accumulation_steps

    def transformer_alone() -> float:
        """Seconds of the forwards of a rollout and the forward-backwards of its updates."""
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(forwards):
                model(**inputs)
        for _ in range(trained):
            model(**inputs).sample.square().mean().backward()
        seconds = time.perf_counter() - start
        model.zero_grad()
        return seconds

    from transformers import TrainerCallback

    class Alternate(TrainerCallback):
        """After each rollout and its updates, the transformer alone."""

        ratios: list[float] = []
        start = time.perf_counter()

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_epoch_end(self, args, state, control, **kwargs):
            fdfo, alone = time.perf_counter() - self.start, transformer_alone()
            if state.epoch > 1:  # the first round warms up
                self.ratios.append(fdfo / alone)
                print(f"FDFO {fdfo:6.2f} s, transformer alone {alone:6.2f} s, ratio {fdfo / alone:.3f}")

    alternate = Alternate()
    trainer.add_callback(alternate)
    trainer.train()
    print(f"median ratio {statistics.median(alternate.ratios):.3f} over {rounds} rounds on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
