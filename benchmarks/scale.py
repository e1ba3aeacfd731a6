"""
Measures how FDFO scales from one process to two on this machine, and predicts it on paper up to 1,024 GPUs.

    python benchmarks/scale.py                # both; --no-measure for the paper alone

**Measured.** Groups of processes live side by side and take turns, rollout by rollout, so that a machine whose speed
drifts favours none: one process with all prompts, one with half of them, two with all. Two single processes that run at
the same time without each other show what the machine itself loses with two: memory bandwidth, shared caches, other
people's jobs. The model below predicts the time of two processes from the time of one. Both times are printed.

**On paper.** A rollout and its updates take the sum of sampling, waiting for rewards, training and adding up gradients.
The numbers behind each are printed first. Strong scaling: the paper's 432 prompts (864 images) on ever more GPUs. Weak
scaling: 54 prompts per GPU, as the 432 on 8 GPUs. The times of SD 3.5 Medium on a GPU come from a results file of
gpu_sd35.py if there is one, otherwise from its counted FLOPs at an assumed rate.

Not modelled: GPUs that are slower than others, saving, and whether a larger rollout teaches more.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny_pipelines
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

from benchmarks import gpu_sd35, overhead
from benchmarks.common import QUIET, Phases, TimedTrainer, median_seconds, timed_trainer
from trl_fdfo import FDFOConfig


# The model on paper ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """
    Seconds of the parts of a rollout on one GPU.

    Attributes:
        sample (`Callable`): Seconds to sample and decode a batch, by its number of images.
        train (`Callable`): Seconds to train a micro-batch, forward and backward at one noise level, by its number of
            images.
        all_reduce (`Callable`): Seconds to add up gradients, by the number of GPUs.
        score (`float`): Seconds to score an image, over all reward servers. 0: rewards take no time.
    """

    sample: Callable[[int], float]
    train: Callable[[int], float]
    all_reduce: Callable[[int], float]
    score: float = 0.0


@dataclass(frozen=True)
class Setting:
    """The paper's setting. The paper leaves the number of trained levels and the batch sizes open."""

    branches: int = 2
    trained_levels: int = 40
    optimizer_steps: int = 4
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)  # prompts at a time that a GPU may take
    growth: float = 1.25  # factor by which the prompts may grow to fill whole batches


@dataclass(frozen=True)
class Prediction:
    """Seconds of one rollout and its updates on `gpus` GPUs, in batches of `batch_size` prompts."""

    gpus: int
    prompts: int
    batch_size: int
    images: int
    sampling: float
    rewards: float  # wait for them after sampling
    training: float
    gradients: float

    @property
    def seconds(self) -> float:
        return self.sampling + self.rewards + self.training + self.gradients

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def gpu_seconds_per_image(self, part: str) -> float:
        return self.gpus * getattr(self, part) / self.images


def predict(parts: Parts, setting: Setting, gpus: int, prompts: int) -> Prediction:
    """
    The split with the most images/s that the trainer accepts. A GPU compares the images of a prompt, so it takes whole
    batches of whole prompts, at least one. The prompts are rounded up to fill the batches, to at most `growth` times as
    many except at the smallest batch size.
    """
    options = []
    for batch_size in setting.batch_sizes:
        batches = math.ceil(prompts / (gpus * batch_size))
        while (micro_batches := batches * setting.trained_levels) % setting.optimizer_steps:
            batches += 1
        rounded = batches * gpus * batch_size
        if rounded > setting.growth * prompts and batch_size != min(setting.batch_sizes):
            continue
        images = batch_size * setting.branches
        sampling = batches * parts.sample(images)
        # Servers score a batch while the next one is sampled. Scoring begins after the first batch, and the last batch
        # is scored after sampling.
        total = rounded * setting.branches
        scored = max(parts.sample(images) + total * parts.score, sampling + gpus * images * parts.score)
        options.append(
            Prediction(
                gpus=gpus,
                prompts=rounded,
                batch_size=batch_size,
                images=total,
                sampling=sampling,
                rewards=scored - sampling,
                training=micro_batches * parts.train(images),
                gradients=setting.optimizer_steps * parts.all_reduce(gpus),
            )
        )
    return max(options, key=lambda option: option.images_per_second)


CAUSES = {
    "sampling": "batches too small to fill a GPU, in sampling",
    "training": "batches too small to fill a GPU, in training",
    "rewards": "the reward servers",
    "gradients": "adding up gradients",
}


def main_loss(first: Prediction, many: Prediction) -> str:
    """The part of a rollout whose GPU time per image has grown most from the first prediction to the other."""
    return max(CAUSES, key=lambda part: many.gpu_seconds_per_image(part) - first.gpu_seconds_per_image(part))


@dataclass(frozen=True)
class Cluster:
    """
    Assumptions, each with its source.

    Attributes:
        flops (`float`): Sustained FLOP/s of a GPU in bfloat16. 400e12 is half of the rate of a matrix product on an
            H100 or H200, which gpu_sd35.py measures: an assumption until a results file replaces it.
        launch (`float`): Seconds of the host per kernel. 5 microseconds is the usual order for eager PyTorch: an
            assumption too. A forward pass takes at least this for each of its kernels, however small the batch.
        gpus_per_node (`int`): GPUs of a node. A DGX H100 has 8.
        nvlink (`float`): Bytes/s in each direction between the GPUs of a node. The H100's data sheet says 450e9.
        network (`float`): Bytes/s from a node to others. 50e9 is one network card of 400 Gb/s; a DGX H100 has eight.
        latency (`float`): Seconds of a message between nodes. 20 microseconds is a cautious guess for NCCL.
        reward_gpus (`int`): GPUs that score, beside the GPUs that train.
        reward_rate (`float`): Images/s of one of these GPUs: [`vlm_rate`] of the same `flops`.
    """

    flops: float = 400e12
    launch: float = 5e-6
    gpus_per_node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    latency: float = 20e-6
    reward_gpus: int = 8
    reward_rate: float = 54.0


def vlm_rate(flops: float) -> float:
    """
    Images/s of Qwen2.5-VL-7B on one GPU, with one Yes or No for each, from FLOPs = 2 x parameters x tokens at the
    sustained rate of the transformer. By its published config the language model of 7.6 billion parameters reads 324
    image tokens (512 pixels / 28, squared) and 50 tokens of the question, and the vision tower of 0.68 billion 1,296
    patches of 14 pixels.
    """
    return flops / (2 * 7.6e9 * (324 + 50) + 2 * 0.68e9 * 1296)


def ring_seconds(cluster: Cluster, size: int, gpus: int) -> float:
    """
    Seconds of an all-reduce of `size` bytes. In a ring of W GPUs each sends and receives 2 (W - 1) / W of them, over
    NVLink in a node and over the network between nodes; there the latency is a tree's 2 log2(nodes) messages.
    """
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    bandwidth = cluster.nvlink if nodes == 1 else cluster.network
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * math.log2(nodes) * cluster.latency


def parts_from_work(cluster: Cluster, work: gpu_sd35.Work, steps: int) -> Parts:
    """Predicts the parts from counted FLOPs and kernels."""

    def forward(images: int) -> float:
        return max(images * work.forward / cluster.flops, work.forward_kernels * cluster.launch)

    return Parts(
        sample=lambda images: steps * forward(images) + images * work.decode / cluster.flops,
        train=lambda images: max(images * work.tuple / cluster.flops, work.tuple_kernels * cluster.launch),
        all_reduce=lambda gpus: ring_seconds(cluster, 4 * work.trained_parameters, gpus),
        score=1 / (cluster.reward_gpus * cluster.reward_rate) if cluster.reward_gpus else 0.0,
    )


def measured_batches(results: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Rows of a results file of gpu_sd35.py that change the prompts at a time and no other option, by their number."""
    rows = [row for row in results["rows"] if "error" not in row and not row.get("text_encoders")]
    plain = [row for row in rows if row["options"].keys() <= {"per_device_prompt_batch_size"}]
    # The default is 2. Of equal rows the first counts.
    return {row["options"].get("per_device_prompt_batch_size", 2): row for row in reversed(plain)}


def parts_from_results(
    cluster: Cluster, work: gpu_sd35.Work, results: dict[str, Any], steps: int, branches: int
) -> Parts:
    """The parts as [`measured_batches`] has them. Sampling with another number of steps scales with its FLOPs."""
    rows = measured_batches(results)
    longer = work.of_image(steps) / work.of_image(results["steps"])
    return replace(
        parts_from_work(cluster, work, steps),
        sample=lambda images: images / rows[images // branches]["images_per_second"] * longer,
        train=lambda images: images / rows[images // branches]["tuples_per_second"],
    )


def table(parts: Parts, setting: Setting, prompts: Callable[[int], int], gpus: list[int]) -> list[str]:
    """Predictions as lines, and a sentence that says where the efficiency falls below 80% and why."""
    # A single GPU does not wait for servers that are sized for many.
    first = predict(replace(parts, score=0.0), setting, 1, prompts(1))
    lines = [
        f"{'GPUs':>5} {'images':>7} {'batch':>5} {'sampling':>9} {'rewards':>8} {'training':>9} {'gradients':>9} "
        f"{'seconds':>8} {'images/s':>9} {'efficiency':>10}  {'most is lost to'}"
    ]
    stops = None
    for number in gpus:
        row = predict(parts, setting, number, prompts(number))
        efficiency = row.images_per_second / number / first.images_per_second
        cause = main_loss(first, row) if efficiency < 0.99 else ""
        if stops is None and efficiency < 0.8:
            stops = f"Below 80% from {number} GPUs on: {CAUSES[cause]}."
        lines.append(
            f"{number:5d} {row.images:7d} {row.batch_size:5d} {row.sampling:9.2f} {row.rewards:8.2f} "
            f"{row.training:9.2f} {row.gradients:9.3f} {row.seconds:8.1f} {row.images_per_second:9.1f} "
            f"{100 * efficiency:9.0f}%  {cause}"
        )
    return [*lines, stops or f"Not below 80% up to {gpus[-1]} GPUs."]


def paper(args: argparse.Namespace) -> None:
    work = gpu_sd35.count_work(gpu_sd35.MEDIUM)
    flops = 1e12 * args.tflops
    cluster = Cluster(
        flops=flops,
        launch=1e-6 * args.launch_us,
        gpus_per_node=args.gpus_per_node,
        nvlink=1e9 * args.nvlink_gbs,
        network=1e9 * args.network_gbs,
        latency=1e-6 * args.latency_us,
        reward_gpus=args.reward_gpus,
        reward_rate=args.reward_rate or vlm_rate(flops),
    )
    setting = Setting(trained_levels=round(args.steps * args.timestep_fraction))
    if args.results:
        results = json.loads(args.results.read_text())
        setting = replace(setting, batch_sizes=tuple(sorted(measured_batches(results))))
        parts = parts_from_results(cluster, work, results, args.steps, setting.branches)
        source = f"measured on {results['machine'].get('gpu', 'a CPU')} ({args.results.name})"
    else:
        parts = parts_from_work(cluster, work, args.steps)
        source = f"ASSUMED: counted FLOPs at {args.tflops:g} TFLOP/s and {args.launch_us:g} us of the host per kernel"
    print(f"\nOn paper: SD 3.5 Medium, 512 px, {args.steps} steps, {setting.trained_levels} trained; times {source}")
    for prompts in setting.batch_sizes:
        images = prompts * setting.branches
        print(f"  {images:2d} images: sampled in {parts.sample(images):.2f} s, micro-batch {parts.train(images):.3f} s")
    size = 4 * work.trained_parameters
    print(
        f"  gradients: {size / 1e6:.1f} MB ({work.trained_parameters:,} LoRA weights in float32), "
        f"{setting.optimizer_steps} times per rollout; within a node {cluster.nvlink / 1e9:g} GB/s, between nodes "
        f"{cluster.network / 1e9:g} GB/s and {1e6 * cluster.latency:g} us"
    )
    print(f"  rewards: {cluster.reward_gpus} GPUs with a 7B VLM, {cluster.reward_rate:.0f} images/s each")
    gpus = [2**n for n in range(11)]
    print("\nStrong scaling: 432 prompts per rollout, or up to a quarter more where that fills the GPUs better")
    print("\n".join(table(parts, setting, lambda number: 432, gpus)))
    print("\nThe same, as many reward GPUs as it takes")
    print("\n".join(table(replace(parts, score=0.0), setting, lambda number: 432, gpus)))
    print("\nWeak scaling: 54 prompts per GPU, and reward GPUs in proportion")
    for number in gpus:
        # Enough reward GPUs to keep up with the sampling.
        row = predict(replace(parts, score=0.0), setting, number, 54 * number)
        needed = math.ceil(row.images / row.sampling / cluster.reward_rate)
        print(
            f"{number:5d} GPUs {row.images:7d} images {row.seconds:8.1f} s {row.images_per_second:9.1f} images/s, "
            f"gradients {100 * row.gradients / row.seconds:.2f}% of the time, {needed} reward GPUs"
        )


# Measured ----------------------------------------------------------------------------------------------------------

BATCH = 2  # prompts at a time
STEPS, OPTIMIZER_STEPS = 4, 2
PROMPTS = {"all": 8, "half": 4}
# Processes of each group, and its share of the prompts.
GROUPS = {"one": (1, "all"), "one, half": (1, "half"), "another, half": (1, "half"), "two": (2, "all")}
# Groups that run at the same time. A round has each turn once.
TURNS = (("one",), ("two",), ("one, half",), ("one, half", "another, half"))


class TakeTurns(TrainerCallback):
    """Waits for the group's turn before each rollout, and reports the seconds after it."""

    def __init__(self, store: dist.TCPStore, group: str, rank: int, phases: Phases):
        self.store, self.group, self.rank, self.phases = store, group, rank, phases
        self.rollout = 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.store.wait([f"{self.group}/{self.rollout}"])

    def on_epoch_end(self, args, state, control, **kwargs):
        seconds = {"sampling": self.phases.sampling[-1], "training": self.phases.training[-1]}
        self.store.set(f"{self.group}/{self.rollout}/{self.rank}", json.dumps(seconds))
        self.rollout += 1


class CountGradients(TrainerCallback):
    """Notes how many numbers each all-reduce of DDP adds up, over all rollouts."""

    def __init__(self, trainer: TimedTrainer):
        self.trainer = trainer
        self.sizes: list[int] = []

    def on_train_begin(self, args, state, control, **kwargs):
        def count(group, bucket):
            self.sizes.append(bucket.buffer().numel())
            return allreduce_hook(group, bucket)

        self.trainer.model_wrapped.register_comm_hook(None, count)


def work_in_turns(group: str, port: int, rollouts: int, tiny: bool) -> None:
    """Runs as one process of a group, which torchrun starts if there are several."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    processes, share = GROUPS[group]
    rank = int(os.environ.get("RANK", 0))
    with tempfile.TemporaryDirectory() as folder:
        config = FDFOConfig(
            output_dir=folder,
            num_rollouts=rollouts,
            prompts_per_rollout=PROMPTS[share],
            per_device_prompt_batch_size=BATCH,
            num_inference_steps=STEPS,
            optimizer_steps_per_rollout=OPTIMIZER_STEPS,
            height=16 if tiny else 64,
            width=16 if tiny else 64,
            pipeline_kwargs={"max_sequence_length": 8},
            churn=0.1,
            use_cpu=True,
            ddp_backend="gloo" if processes > 1 else None,
            **QUIET,
        )
        assert config.world_size == processes
        pipeline = tiny_pipelines.sd3() if tiny else overhead.build_pipeline()
        trainer = timed_trainer(config, pipeline)
        trainer.add_callback(TakeTurns(store, group, rank, trainer.phases))
        gradients = CountGradients(trainer)
        if processes > 1:
            trainer.add_callback(gradients)
        trainer.train()
        if processes > 1:
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            numbers = torch.zeros(trained)
            dist.barrier()
            seconds = median_seconds(lambda: dist.all_reduce(numbers), torch.device("cpu"), repeats=20)
            report = {"trained": trained, "all_reduce": seconds, "sizes": gradients.sizes, "rollouts": rollouts}
            if rank == 0:
                store.set("traffic", json.dumps(report))
            dist.barrier()
            dist.destroy_process_group()


def measure(rounds: int, tiny: bool, python: str = sys.executable) -> dict[str, Any]:
    """
    Seconds of each turn, `{turn: [{"sampling": s, "training": s, "seconds": s}, one per round]}`, and the traffic of
    the group of two. A turn of several processes takes as long as the slowest of them. `python` starts each process.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    done = dict.fromkeys(GROUPS, 0)  # rollouts

    def take_turn(groups: tuple[str, ...]) -> dict[str, float]:
        for group in groups:
            store.set(f"{group}/{done[group]}", "go")
        reports = []
        for group in groups:
            for rank in range(GROUPS[group][0]):
                key = f"{group}/{done[group]}/{rank}"
                while not store.check([key]):
                    if any(process.poll() for process in launched.values()):
                        raise RuntimeError(f"a process has ended; see its output in {logs}")
                    time.sleep(0.01)
                reports.append(json.loads(store.get(key)))
            done[group] += 1
        slowest = max(reports, key=lambda report: sum(report.values()))
        return {**slowest, "seconds": sum(slowest.values())}

    rollouts = {group: 1 + rounds * sum(group in turn for turn in TURNS) for group in GROUPS}
    logs = Path(tempfile.mkdtemp(prefix="scale-"))
    launched = {}
    try:
        for group, (processes, _) in GROUPS.items():
            command = [python]
            if processes > 1:
                command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            command += [__file__, "--worker", group, "--port", str(store.port), "--rollouts", str(rollouts[group])]
            with open(logs / f"{group}.log", "w") as log:
                launched[group] = subprocess.Popen(
                    command + ["--tiny"] * tiny,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python},
                )
        for group in GROUPS:
            take_turn((group,))  # to warm up
        seconds = {turn: [] for turn in TURNS}
        for number in range(rounds):
            # The order is reversed in every other round.
            for turn in TURNS if number % 2 == 0 else TURNS[::-1]:
                seconds[turn].append(take_turn(turn))
        store.wait(["traffic"])
        traffic = json.loads(store.get("traffic"))
        for process in launched.values():
            process.wait(timeout=60)
        return {"turns": seconds, "traffic": traffic}
    finally:
        for process in launched.values():
            process.terminate()  # does nothing to a process that has ended


def report(measured: dict[str, Any]) -> None:
    turns, traffic = measured["turns"], measured["traffic"]
    one, two, half, halves = (turns[turn] for turn in TURNS)
    ratio = lambda a, b: statistics.median(x["seconds"] / y["seconds"] for x, y in zip(a, b))
    median = lambda turn, part: statistics.median(row[part] for row in turn)
    print(f"Measured: {os.cpu_count()} cores, one thread per process, torch {torch.__version__}, {len(one)} rounds")
    for name, turn in zip(
        ("one process, all prompts", "two, all", "one, half", "two that are strangers, half each"), turns.values()
    ):
        print(
            f"  {name:34} {median(turn, 'seconds'):6.2f} s: sampling {median(turn, 'sampling'):.2f}, "
            f"training {median(turn, 'training'):.2f}"
        )
    rollouts, trained = traffic["rollouts"], traffic["trained"]
    print(
        f"  between two, per rollout: {len(traffic['sizes']) / rollouts:g} all-reduces of together "
        f"{4 * sum(traffic['sizes']) / rollouts / 1e6:.1f} MB of gradients ({trained:,} weights, "
        f"{OPTIMIZER_STEPS} optimizer steps); one of all takes {1e3 * traffic['all_reduce']:.1f} ms"
    )
    strong, weak, machine = ratio(one, two), ratio(half, two), ratio(half, halves)
    # The model predicts two processes from the times of one process with half of the prompts.
    batches = PROMPTS["half"] // BATCH
    setting = Setting(trained_levels=STEPS, optimizer_steps=OPTIMIZER_STEPS, batch_sizes=(BATCH,))
    parts = Parts(
        sample=lambda images: median(half, "sampling") / batches,
        train=lambda images: median(half, "training") / (batches * setting.trained_levels),
        all_reduce=lambda gpus: traffic["all_reduce"] if gpus > 1 else 0.0,
    )
    alone, together = (predict(parts, setting, processes, PROMPTS["all"]).seconds for processes in (1, 2))
    print(f"  two strangers at once run at {machine:.2f} of the speed of one alone: what the machine loses")
    expected = alone / together
    print(
        f"  strong scaling, all prompts:      {strong:.2f}x with two; predicted {expected:.2f}x, x {machine:.2f} = "
        f"{expected * machine:.2f}x"
    )
    expected = median(half, "seconds") / together
    print(
        f"  weak scaling, half for each:      {weak:.2f}; predicted {expected:.2f}, x {machine:.2f} = "
        f"{expected * machine:.2f}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: a rehearsal")
    parser.add_argument("--no-measure", action="store_true", help="the model on paper alone")
    parser.add_argument("--results", type=Path, help="file of gpu_sd35.py; default: the last of benchmarks/results/")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--timestep-fraction", type=float, default=1.0)
    parser.add_argument("--tflops", type=float, default=400.0, help="sustained rate of a GPU")
    parser.add_argument("--launch-us", type=float, default=5.0, help="microseconds of the host per kernel")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--nvlink-gbs", type=float, default=450.0, help="GB/s per GPU in each direction")
    parser.add_argument("--network-gbs", type=float, default=50.0, help="GB/s of a node")
    parser.add_argument("--latency-us", type=float, default=20.0)
    parser.add_argument("--reward-gpus", type=int, default=8, help="GPUs that score; 0: rewards take no time")
    parser.add_argument("--reward-rate", type=float, help="images/s of each; default: a 7B VLM's, from its FLOPs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rollouts", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        work_in_turns(args.worker, args.port, args.rollouts, args.tiny)
        return
    found = sorted(Path(__file__).with_name("results").glob("gpu_sd35-*.json"))
    if args.results is None and found:
        args.results = found[-1]
    if not args.no_measure:
        report(measure(args.rounds, args.tiny))
    paper(args)


if __name__ == "__main__":
    main()
