"""
A rater that is a program: it votes over HTTP for the image that the reward of the demo prefers, and errs now and then.

    python tests/helpers/scripted_rater.py http://localhost:8300 --wrong 0.1
"""

import argparse
import io
import json
import random
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import torch
from PIL import Image

from trl_fdfo import shapes


class ScriptedRater:
    """
    Args:
        url (`str`): The server.
        name (`str`): The rater's.
        wrong (`float`): Share of votes for the other image.
        prefer (`Callable`, *optional*): `(left, right, prompt) -> preference for the left`, of PIL images. Default: by the
            reward of the demo.
        seed (`int`): Which votes are wrong: a function of the seed and the pair, so that a repeated run errs on the same.
        patient (`bool`): Wait for a server that does not answer.
    """

    def __init__(self, url, name="script", wrong=0.0, prefer=None, seed=0, patient=True):
        self.url, self.name, self.wrong, self.prefer = url.rstrip("/"), name, wrong, prefer or by_reward
        self.seed, self.patient, self.votes = seed, patient, 0
        self.seconds = []  # of each vote, until it is on the server's disk

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"content-type": "application/json"})
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return answer.read()
            except urllib.error.HTTPError:
                raise
            except OSError:
                if not self.patient:
                    raise
                time.sleep(0.2)

    def vote(self, count=1):
        """Vote on the next pairs; the number of those that there were."""
        pairs = json.loads(self.ask(f"api/next?rater={urllib.parse.quote(self.name)}&count={count}"))["pairs"]
        for pair in pairs:
            left, right = (Image.open(io.BytesIO(self.ask(f"images/{pair[side]}.png"))) for side in ("left", "right"))
            preference = self.prefer(left.convert("RGB"), right.convert("RGB"), pair["prompt"])
            if random.Random(f"{self.seed} {sorted((pair['left'], pair['right']))}").random() < self.wrong:
                preference = -preference
            choice = "left" if preference > 0 else "right" if preference < 0 else "tie"
            body = {"rater": self.name, "pair": pair["id"], "choice": choice, "left": pair["left"]}
            start = time.perf_counter()
            self.ask("api/votes", body | {"repeated": pair["repeated"]})
            self.seconds.append(time.perf_counter() - start)
            self.votes += 1
        return len(pairs)

    def run(self, until=lambda: False):
        """Vote until `until()`."""
        while not until():
            if not self.vote(4):
                time.sleep(0.02)


def by_reward(left, right, prompt):
    images = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in (left, right)])
    first, second = torch.as_tensor(shapes.reward(images, [prompt, prompt])).tolist()
    return first - second


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--name", default="script")
    parser.add_argument("--wrong", type=float, default=0.0)
    arguments = parser.parse_args()
    rater = ScriptedRater(arguments.url, arguments.name, arguments.wrong)
    try:
        rater.run()
    except KeyboardInterrupt:
        print(f"{rater.votes} votes")
