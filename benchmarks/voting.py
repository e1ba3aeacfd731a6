"""
Trains the packaged pipeline by votes, with a program in the place of the person, which errs in a tenth of its votes:

    OMP_NUM_THREADS=1 python benchmarks/voting.py --num_rollouts 24     # other options replace the recipe's of `make vote`
    OMP_NUM_THREADS=1 python benchmarks/voting.py --green         # the recipe, by a person who likes green
    OMP_NUM_THREADS=1 python benchmarks/voting.py --load          # 8 trainers and 20 raters for two minutes

The first prints the number of clicks, and the shares of images in the caption's colour and of all images that pass the strict
check, before and after; its pictures go to docs/voting.png. The second prints the latency of a vote until it is on the disk, and
checks that no vote is lost or counted twice.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image, ImageStat
from scripted_rater import ScriptedRater
from transformers import TrainerState

from trl_fdfo import shapes
from trl_fdfo.cli import train as command
from trl_fdfo.media import to_pil
from trl_fdfo.rewards.human_preference import human


ROOT = Path(__file__).parents[1]


def metrics(images: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    """Those of the demo, the share of images whose shape is in the caption's colour, and how green they are, of 255."""
    right = shapes.inspect(images)["color"] == shapes.parse(prompts)[:, 0]
    green = statistics.mean(map(greenness, to_pil(images)))
    return {"color_accuracy": right.double().mean().item(), "greenness": green, **shapes.metrics(images, prompts)}


def start_server(folder: Path) -> tuple[subprocess.Popen, str]:
    """A preference server in a process of its own, and its address."""
    command = [sys.executable, "-m", "trl_fdfo.preference", "--port", "0", "--database", str(folder / "votes.sqlite")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return server, server.stdout.readline().strip().removeprefix("Vote at ").rstrip("/")


def greener(left: Image.Image, right: Image.Image, prompt: str) -> float:
    """A person who likes green, whatever the caption says."""
    return greenness(left) - greenness(right)


def greenness(image: Image.Image) -> float:
    red, green, blue = ImageStat.Stat(image).mean
    return green - (red + blue) / 2


def train(options: list[str], wrong: float, seed: int, picture: Path | None, green: bool) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, over = Path(temporary), threading.Event()
        server, url = start_server(folder)
        rater = ScriptedRater(url, wrong=wrong, seed=seed, prefer=greener if green else None)
        threading.Thread(target=rater.run, args=(over.is_set,), daemon=True).start()
        arguments = [
            "--config",
            "shapes_vote",
            "--reward",
            f"human(url={url!r})",
            "--metrics",
            "benchmarks.voting:metrics",
        ]
        arguments += ["--output_dir", str(folder / "out"), "--seed", str(seed), *options]
        command.main(arguments)
        over.set()
        results = json.loads((folder / "out" / "results.json").read_text())
        if picture is not None:
            shutil.copy(folder / "out" / "before_after.png", picture)
        server.terminate()
    print(
        f"\n{rater.votes} clicks, {100 * wrong:g}% of them wrong, in {results['train_seconds']:.0f} s; before and after:"
    )
    for name in ("greenness",) if green else ("color_accuracy", "strict_accuracy"):
        print(f"  {name:18}{results['before'][name]:8.3f}{results['after'][name]:8.3f}")


def load(seconds: float, trainers: int, raters: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        server, url = start_server(Path(temporary))
        end, over, pairs, errors = time.monotonic() + seconds, threading.Event(), [0] * trainers, []

        def trainer(number: int) -> None:
            reward, batch = human(url, run=f"run {number}"), 0
            try:
                while time.monotonic() < end:
                    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1000 * number + batch))
                    prompts = [f"{number} {batch} {place // 2}" for place in range(8)]
                    scores = asyncio.run(
                        reward(images=to_pil(images), prompts=prompts, num_generations=2, trainer_state=TrainerState())
                    )
                    brighter = images.mean(dim=(1, 2, 3)).view(4, 2).diff().flatten() < 0
                    assert scores[::2] == [0.5 if first else -0.5 for first in brighter.tolist()]
                    pairs[number] += 4
                    batch += 1
            except Exception as error:
                errors.append(error)

        def by_mean(left, right, prompt):
            one, other = (
                torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).double().mean()
                for image in (left, right)
            )
            return (one - other).item()

        voters = [ScriptedRater(url, f"rater {number}", prefer=by_mean) for number in range(raters)]
        threads = [threading.Thread(target=trainer, args=(number,)) for number in range(trainers)]
        voting = [threading.Thread(target=voter.run, args=(over.is_set,), daemon=True) for voter in voters]
        for thread in voting + threads:
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        for thread in voting:
            thread.join(30)
        progress = [json.loads(voters[0].ask(f"api/progress?run=run%20{number}")) for number in range(trainers)]
        counted = sum(run["votes"] for run in progress)
        sent, repeated = sum(voter.votes for voter in voters), sum(one["repeated"] for one in progress[0]["raters"])
        server.terminate()
    latencies = sorted(second for voter in voters for second in voter.seconds)
    print(f"{trainers} trainers, {raters} raters, {seconds:g} s: {sum(pairs)} pairs with a verdict, {sent} votes sent")
    print(f"  counted {counted}, repeats {repeated}; a pair has at least one vote, each of another rater")
    print(
        f"  a vote is on the disk after {1e3 * statistics.median(latencies):.0f} ms (median), "
        f"{1e3 * latencies[int(0.99 * len(latencies))]:.0f} ms (of 99%)"
    )
    if errors or not sum(pairs) <= counted <= sent - repeated:
        raise SystemExit(f"lost or counted twice: {errors}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrong", type=float, default=0.1, help="share of wrong votes")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--picture", type=Path, help="where the pictures go, such as docs/voting.png")
    parser.add_argument("--green", action="store_true", help="vote for the greener image, whatever the caption")
    parser.add_argument("--load", action="store_true", help="many trainers and raters instead")
    parser.add_argument("--seconds", type=float, default=120.0, help="of --load")
    args, options = parser.parse_known_args()
    if args.load:
        load(args.seconds, 8, 20)
    else:
        train(options, args.wrong, args.seed, args.picture, args.green)


if __name__ == "__main__":
    main()
