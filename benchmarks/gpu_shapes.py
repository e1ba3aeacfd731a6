"""
Trains pipelines on the captions of `trl_fdfo.shapes` on one CUDA GPU, with the recipe of the demo, and compares the
results with the README's, which a CPU has reached.

    python benchmarks/gpu_shapes.py                # estimated to end within ten minutes on an H100
    python benchmarks/gpu_shapes.py --cpu ...      # the same on a CPU; options of trl-fdfo train make it shorter

The packaged pipeline is trained in float32 and in mixed precision with bfloat16. A mid-size pipeline has a transformer
of 92 M parameters in the place of the packaged one's of 1.3 M; the script first pretrains it on rendered shapes with
wrong colour words, as `examples/shapes/pretrain.py` does. Prints a row for each run, and writes it to
`benchmarks/results/gpu_shapes-<name of the device>.json` as soon as the run has ended.

A run passes if the share of its images that pass the strict check ends no lower than the README's, less what seeds and
kernels may change, and if at least as much was gained. The program ends with an error if one does not.
"""

import argparse
import contextlib
import io
import json
import random
import re
import runpy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import sd3_transformer
from trl_fdfo import shapes
from trl_fdfo.cli import train as command


EXAMPLES = Path(__file__).parents[1] / "examples"
# Strict accuracy of the README before and after training. Two seeds of 864 images differ by 0.02 and more.
BEFORE, AFTER, MARGIN = 0.27, 0.82, 0.05


def pretrain(folder: Path, device: torch.device, flow_steps: int, dataset_size: int) -> None:
    """Saves the mid-size pipeline. The VAE and the text encoders are the packaged ones; the latter are trained along."""
    script = runpy.run_path(str(EXAMPLES / "shapes" / "pretrain.py"))
    random.seed(0)
    torch.manual_seed(0)
    pipeline = shapes.load_pipeline()
    latents, prompts = script["encode_dataset"](pipeline.vae, dataset_size)
    transformer = sd3_transformer(
        num_layers=10, num_attention_heads=8, joint_attention_dim=96, pooled_projection_dim=96
    )
    pipeline.register_modules(transformer=transformer)
    pipeline.to(device).set_progress_bar_config(disable=True)
    with torch.device(device):
        script["train_flow"](pipeline, latents.to(device), prompts, flow_steps, 0.5, learning_rate=3e-4)
    pipeline.to("cpu").save_pretrained(folder)


def train(options: list[str]) -> dict[str, Any]:
    """`results.json` of the demo's recipe with other options."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            command.main(["--config", "shapes", "--output_dir", folder, *options])
        return json.loads(Path(folder, "results.json").read_text())


def judge(before: float, after: float) -> bool:
    """If strict accuracies before and after training are the README's or better, up to `MARGIN`."""
    return after >= AFTER - MARGIN and after - before >= AFTER - BEFORE - 2 * MARGIN


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="use the CPU, also where there is a GPU")
    parser.add_argument(
        "--flow-steps", type=int, default=5500, help="steps of the pretraining of the mid-size pipeline"
    )
    parser.add_argument("--dataset-size", type=int, default=40000, help="rendered images that it is pretrained on")
    parser.add_argument("--output", type=Path, help="file of the results; default: see above")
    args, options = parser.parse_known_args(arguments)
    if not torch.cuda.is_available() and not args.cpu:
        print("This benchmark trains on a CUDA GPU, and there is none here. --cpu trains on the CPU.")
        return
    device = torch.device("cpu" if args.cpu else "cuda")
    machine = "CPU" if args.cpu else torch.cuda.get_device_name()
    name = f"gpu_shapes-{re.sub(r'[^A-Za-z0-9]+', '-', machine)}.json"
    output = args.output or Path(__file__).with_name("results") / name
    output.parent.mkdir(parents=True, exist_ok=True)  # now, and not after an hour
    results: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "options": options, "runs": []}
    print(f"{machine}, torch {torch.__version__}; the README has {BEFORE:.2f} before and {AFTER:.2f} after")
    print(f"{'':24}{'reward':>16}{'strict accuracy':>18}{'seconds':>9}")
    options = ["--use_cpu", str(args.cpu).lower(), *options]
    with tempfile.TemporaryDirectory() as folder:
        captions = Path(folder, "captions.txt")
        captions.write_text("\n".join(shapes.captions()))
        mid_size = Path(folder, "mid-size")
        runs = {
            "packaged, float32": ["--bf16", "false"],
            "packaged, bfloat16": ["--bf16", "true"],
            "mid-size, bfloat16": ["--bf16", "true", "--model", str(mid_size), "--dataset_name", str(captions)],
        }
        for name, own in runs.items():
            run: dict[str, Any] = {"name": name}
            if str(mid_size) in own:
                start = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    pretrain(mid_size, device, args.flow_steps, args.dataset_size)
                run["pretraining_seconds"] = time.perf_counter() - start
            run |= train([*own, *options])
            before, after = run["before"], run["after"]
            run["passed"] = judge(before["strict_accuracy"], after["strict_accuracy"])
            results["runs"].append(run)
            print(
                f"{name:24}{before['reward']:8.3f}{after['reward']:8.3f}{before['strict_accuracy']:10.3f}"
                f"{after['strict_accuracy']:8.3f}{run['train_seconds']:9.0f}{'' if run['passed'] else '   FAILED'}",
                flush=True,
            )
            output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {output}")
    if not all(run["passed"] for run in results["runs"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
