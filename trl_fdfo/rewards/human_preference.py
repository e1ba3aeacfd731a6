"""A person as the reward: asks a preference server, where people compare the images of a prompt."""

import asyncio
import base64
import logging
import math
import os
import secrets
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import TrainerState

from ..preference.pairs import as_png, image_id, pair_key
from .http_client import RetryingClient, ServerError
from .pairwise_judge import PairwiseJudge
from .reward_functions import RewardFunctions


logger = logging.getLogger(__name__)

# Seconds: of a request that waits for votes, less than after which the server takes the trainer for ended; between two tries;
# until a server that never answered is given up; between logs.
_WAIT, _AGAIN, _FIRST_ANSWER, _LOG_EVERY = 8.0, 1.0, 30.0, 60.0
# Of a request: pairs, bytes of their images (or one that is larger), and pairs that are waited for. The server has limits.
_PAIRS, _BYTES, _KEYS = 8, 24 * 2**20, 500

_starting = threading.Lock()  # several requests may find that a server has ended


class HumanPreferenceError(ServerError):
    """A preference server refused a request, or never answered."""


class HumanPreference:
    """
    Preferences of people for one image of a prompt over another; [`human`] makes a reward of them.

    A pair is known by its prompt and the content of its images. A run that is killed and resumed asks for the same pairs
    again, and gets the votes that they have.

    Args:
        url (`str`, *optional*): Address of the server, as it prints it, such as `http://localhost:8300`. The token may be in
            it. Default: a server that this process starts and ends.
        run (`str`): Name of the run on the server. Two runs at the same time need two names.
        votes_per_pair (`int`): Number of people who vote on a pair.
        scale (`str`): `"mean"` of the votes, in [-1, 1]; or `"log_odds"`, log((w + 1/2) / (l + 1/2)), where a vote for the
            image adds 1 to w, one for the other adds 1 to l, and one for neither adds 1/2 to both.
        patience (`float`, *optional*): After this many seconds without a vote in the run it goes on without the open pairs,
            for good. Default: it waits.
        stand_in (`Callable`, *optional*): A reward whose choice (1, 0, -1) counts for a pair that nobody has voted on
            within `patience`. Default: such a pair has no preference.
        verdicts (`str`, *optional*): Folder of exported votes, to replay a run without people and without a server.
        database (`str`): File of the votes, if this process starts the server.
        token (`str`, *optional*): Token of the server.

    Raises:
        ValueError: An argument is out of range, or excludes another, or `stand_in` needs a column of the dataset.
        HumanPreferenceError: In a call: see there.
    """

    # Where the votes are asked for: the same people give the same votes there.
    no_effect = ("url", "run", "database")

    def __init__(
        self,
        url: str | None = None,
        run: str = "run",
        votes_per_pair: int = 1,
        scale: str = "mean",
        patience: float | None = None,
        stand_in: Callable | None = None,
        verdicts: str | None = None,
        database: str = "votes.sqlite",
        token: str | None = None,
    ):
        if votes_per_pair < 1:
            raise ValueError(f"votes_per_pair={votes_per_pair} of HumanPreference must be at least 1.")
        if scale not in ("mean", "log_odds"):
            raise ValueError(f"scale={scale!r} of HumanPreference is not one of 'mean', 'log_odds'.")
        if patience is not None and not patience > 0:
            raise ValueError(f"patience={patience} of HumanPreference must be more than 0 seconds, or None to wait.")
        if stand_in is not None and patience is None:
            raise ValueError("stand_in of HumanPreference counts after `patience`: set patience=..., in seconds.")
        stand_in_rewards = None if stand_in is None else RewardFunctions(stand_in, argument="stand_in")
        if stand_in_rewards is not None:
            stand_in_rewards.check_columns([], dataset="a pair that is voted on")
        if verdicts is not None and url is not None:
            raise ValueError("verdicts=... of HumanPreference replays votes without a server: leave url out.")
        if verdicts is not None:
            from ..preference.exports import read_votes

            read_votes(verdicts)  # says before a run that the folder has none
        if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc):
            raise ValueError(f"url={url!r} of HumanPreference must be an address such as http://localhost:8300.")
        if url is None and verdicts is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "HumanPreference without a url starts a server, and each of several processes would start its own: start one "
                "by `trl-fdfo vote`, and give its address, url='http://localhost:8300'."
            )
        parts = urlsplit(url or "")
        if token is None:
            # A + of the link stands for itself.
            token = parse_qs(parts.query.replace("+", "%2B")).get("token", [None])[0]
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}" if url else None
        self.run, self.votes_per_pair, self.scale = run, votes_per_pair, scale
        self.patience, self.stand_in, self.verdicts, self.database = patience, stand_in, verdicts, database
        self._token, self._owner = token, _owner()
        self._process: subprocess.Popen | None = None
        self._answers: dict[str, asyncio.Task] = {}
        self._run_id: int | None = None
        self._answered = False
        self._locks: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}
        self._exported: dict[str, tuple[float, int]] | None = None
        self._open: set[str] = set()
        self._logged = 0.0
        self._knows_pairs = False
        self._stand_in, self._stand_in_lock = stand_in_rewards, threading.Lock()

    async def compare(
        self,
        first: Sequence[Any],
        second: Sequence[Any],
        prompts: Sequence[str],
        trainer_state: TrainerState | None = None,
        frame_rate: float | None = None,
    ) -> list[float | None]:
        """
        The preference for the first of two images (or videos) of each prompt, on `scale`; None for a pair that nobody has
        voted on within `patience`.

        Raises:
            HumanPreferenceError: The server refused a request, or has not answered within 30 s of the first.
            ValueError: `verdicts` has no vote on a pair.
        """
        files = await asyncio.to_thread(
            lambda: [(as_png(one, frame_rate), as_png(other, frame_rate)) for one, other in zip(first, second)]
        )
        ids = [(image_id(one), image_id(other)) for one, other in files]
        keys = [pair_key(prompt, *pair) for prompt, pair in zip(prompts, ids)]
        if self.verdicts is not None:
            return [self._replayed(key, prompt, *pair) for key, prompt, pair in zip(keys, prompts, ids)]
        # A judge asks in both orders: the second question waits for the answer to the first.
        fresh = {
            key: (prompt, pair, images)
            for key, prompt, pair, images in zip(keys, prompts, ids, files)
            if pair[0] != pair[1] and not self._is_asked(key)
        }
        if fresh:
            asking = asyncio.ensure_future(self._ask(fresh, trainer_state))
            for key in fresh:
                self._answers[key] = asking
        preferences: list[float | None] = []
        for place, (key, pair) in enumerate(zip(keys, ids)):
            if pair[0] == pair[1]:
                preferences.append(0.0)
                continue
            verdict = (await self._answers[key])[key]
            if verdict["expired"] and not sum(verdict[name] for name in ("a", "b", "tie")):
                # In a thread: a stand-in may itself be awaited on this event loop.
                arguments = (first[place], second[place], prompts[place], trainer_state)
                preferences.append(await asyncio.to_thread(self._by_stand_in, *arguments))
            else:
                preferences.append(self._preference(verdict) * (1 if pair[0] < pair[1] else -1))
        return preferences

    compare.image_type = "pil"

    def waiting(self) -> int:
        """Number of pairs that have been shown and lack a vote."""
        return len(self._open)

    def on_rollout_end(self) -> None:
        """The next rollout has other pairs."""
        self._answers = {key: asked for key, asked in self._answers.items() if not asked.done()}

    def _is_asked(self, key: str) -> bool:
        """True if a pair waits for its votes, or has them; False after a failure, as the server may be back."""
        task = self._answers.get(key)
        return task is not None and not (task.done() and (task.cancelled() or task.exception() is not None))

    def _preference(self, verdict: dict[str, Any]) -> float:
        wins, losses, ties = verdict["a"], verdict["b"], verdict["tie"]
        return self._scaled((wins - losses) / (wins + losses + ties), wins + losses + ties)

    def _scaled(self, mean: float, votes: int) -> float:
        """A mean of some votes on `scale`."""
        if self.scale == "mean":
            return mean
        return math.log((votes * (1 + mean) + 1) / (votes * (1 - mean) + 1))

    # The server ---------------------------------------------------------------------------------------------------------

    async def _ask(self, pairs: dict[str, tuple], trainer_state: TrainerState | None) -> dict[str, dict]:
        """The verdicts on some pairs, which are sent first; waits for them."""
        await self._connect()
        async with self._client.session() as session:
            rollout = _rollout(trainer_state)
            await self._post(session, "/state", {"state": _state(trainer_state, rollout)})
            known = await self._send(session, rollout, list(pairs.values()))
            if known and not self._knows_pairs:
                self._knows_pairs = True
                logger.warning(
                    "%d pairs of the run %r were asked for before: their votes count. Another `run` asks anew.",
                    known,
                    self.run,
                )
            if not self._open:
                self._logged = time.monotonic()
            self._open |= pairs.keys()
            found: dict[str, dict] = {}
            since = time.monotonic()
            while True:
                left, wait = [key for key in pairs if key not in found], min(_WAIT, self.patience or _WAIT)
                asked = [left[:_KEYS]]
                if (
                    not left
                ):  # votes may be taken back or corrected until all are there: then all are asked for once more
                    found, wait, asked = {}, 0.0, _parts(list(pairs), _KEYS)
                for keys in asked:
                    said = await self._post(session, "/verdicts", {"keys": keys, "wait": wait})
                    found |= said["verdicts"]
                self._open = (self._open | pairs.keys()) - found.keys()
                if not left and len(found) == len(pairs):
                    return found
                self._say_what_is_open()
                waited = min(said["idle"], time.monotonic() - since)
                if self.patience is not None and waited > self.patience:
                    for keys in _parts([key for key in pairs if key not in found], _KEYS):
                        await self._post(session, "/expire", {"keys": keys})

    async def _send(self, session: Any, rollout: int, pairs: list[tuple]) -> int:
        """Send pairs and their images; the number of pairs that the server had before."""
        known = 0
        for some in _parts(pairs, _PAIRS):
            images: dict[str, bytes] = {}
            for id, png in {id: png for _, ids, files in some for id, png in zip(ids, files)}.items():
                if images and sum(map(len, images.values())) + len(png) > _BYTES:
                    await self._post(session, "/pairs", _pairs_body(rollout, [], images))
                    images = {}
                images[id] = png
            said = await self._post(session, "/pairs", _pairs_body(rollout, some, images))
            known += len(some) - said["added"]
        return known

    async def _connect(self) -> None:
        """Find the server and open the run, once per process."""
        async with self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            if self._run_id is not None:
                return
            if self.url is None:
                await asyncio.to_thread(self._start_server)
            self._client = RetryingClient(
                self.url,
                owner="HumanPreference",
                advice="Is a preference server up (`trl-fdfo vote`)?",
                refusal_advice="",
                error=HumanPreferenceError,
                max_concurrency=100,  # of which each may wait for votes
                timeout=_WAIT + 30,
                max_retries=0,  # of one request; a run is not given up as soon
                api_key=self._token or "",
            )
            body = {"name": self.run, "votes_per_pair": self.votes_per_pair}
            end = time.monotonic() + _FIRST_ANSWER
            async with self._client.session() as session:
                while self._run_id is None:
                    try:
                        self._run_id = (await self._post(session, "", body))["run"]
                    except HumanPreferenceError as error:
                        # After a crash the name is free when the server has missed the trainer.
                        if error.status != 409 or time.monotonic() > end:
                            raise
                        await asyncio.sleep(_AGAIN)
            link = f"{self.url}/" + (f"?token={self._token}" if self._token and self._process is not None else "")
            show_link(link, self.run)

    async def _post(self, session: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """
        The answer to a request of the run (of the server, if `path` is empty), which is sent again while there is none.

        Raises:
            HumanPreferenceError: The server refused it, or has never answered.
        """
        path = f"/api/runs/{self._run_id}{path}" if path else "/api/runs"
        begin = logged = time.monotonic()
        while True:
            try:
                said = await self._client.post(
                    session, path, {"owner": self._owner, **body}, lambda answer: answer.json()
                )
            except HumanPreferenceError as error:
                now = time.monotonic()
                if error.status is not None or (not self._answered and now - begin > _FIRST_ANSWER):
                    raise
                if await asyncio.to_thread(self._revived):
                    continue
                if now - logged > _LOG_EVERY / 4:
                    logged = now
                    logger.warning("The run waits for the preference server: %s", error)
                await asyncio.sleep(_AGAIN)
            else:
                self._answered = True
                return said

    def _say_what_is_open(self) -> None:
        now = time.monotonic()
        if self._open and now - self._logged > _LOG_EVERY:
            self._logged = now
            logger.warning("The run waits for votes on %d pairs: %s/", len(self._open), self.url)

    def _start_server(self) -> None:
        """Start a server on a free port, or again on the port that the page knows."""
        port = urlsplit(self.url).port if self.url else 0
        command = [sys.executable, "-m", "trl_fdfo.preference", "--port", str(port), "--database", self.database]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._end_server = weakref.finalize(self, self._process.terminate)  # at the latest when this process ends
        line = self._process.stdout.readline().strip()
        if not line.startswith("Vote at "):
            raise HumanPreferenceError(f"The server did not start: {line or 'see its errors above'}.")
        self.url = line.removeprefix("Vote at ").rstrip("/")

    def _revived(self) -> bool:
        """Whether the server that this process started had failed, and another has taken its place."""
        with _starting:
            if self._process is None or self._process.poll() in (None, 0):  # 0: Ctrl-C, which ends this process too
                return False
            logger.warning("The server of the votes ended (exit code %d): another starts.", self._process.returncode)
            self._start_server()
            return True

    # Without people -----------------------------------------------------------------------------------------------------

    def _replayed(self, key: str, prompt: str, one: str, other: str) -> float:
        if one == other:
            return 0.0
        if self._exported is None:
            self._exported = _exported(self.verdicts)
        if key not in self._exported:
            raise ValueError(
                f"The votes in {self.verdicts} have none on a pair of the prompt {prompt!r}: they are of another run, pipeline, "
                "seed or machine, the run went on without this pair (patience), or votes were corrected after it had learnt from "
                "them. A run replays only with all that it was made with."
            )
        return self._scaled(*self._exported[key]) * (1 if one < other else -1)

    def _by_stand_in(self, one: Any, other: Any, prompt: str, trainer_state: TrainerState | None) -> float | None:
        if self._stand_in is None:
            return None
        images = torch.stack([_tensor(one), _tensor(other)])
        with self._stand_in_lock:
            scores = self._stand_in(images, [prompt, prompt], trainer_state, {}, num_generations=2)
        first, second = scores.flatten().tolist()
        return None if math.isnan(first - second) else float(np.sign(first - second))


def human(url: str | None = None, **options: Any) -> PairwiseJudge:
    """
    People, who say on a page which image of a prompt is better: 1, 0 or -1.

    Args:
        url (`str`, *optional*): Address of a server that `trl-fdfo vote` has started. Default: this process
            starts one.
        **options: Further arguments of [`HumanPreference`].
    """
    judge = PairwiseJudge(HumanPreference(url, **options).compare)
    judge.__name__ = "human"
    return judge


def show_link(link: str, run: str) -> None:
    """Print where to vote; in a notebook, as a link."""
    tqdm.write(f"Vote on the run {run!r} at {link}")  # `print` would write into a progress bar
    sys.stdout.flush()
    try:
        from IPython import get_ipython
        from IPython.display import HTML, display
    except ImportError:
        return
    if getattr(get_ipython(), "kernel", None) is not None:
        display(HTML(f'<a href="{link}" target="_blank" rel="noopener">Vote on the images</a>'))


def _owner() -> str:
    """A secret of this trainer, which its processes share: the launcher gives them one address."""
    address = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    return ":".join(address) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else secrets.token_hex(16)


def _rollout(trainer_state: TrainerState | None) -> int:
    """The number of the rollout, from 1 on: Trainer's epochs are rollouts."""
    return int(trainer_state.epoch or 0) + 1 if trainer_state is not None else 1


def _state(trainer_state: TrainerState | None, rollout: int) -> dict[str, Any]:
    """What the page shows of a run: the number of rollouts, and the curves of its rewards."""
    if trainer_state is None:
        return {}
    curves: dict[str, list] = {}
    for log in trainer_state.log_history:
        for name, value in log.items():
            is_reward = name in ("reward_std", "eval_reward") or name.startswith(("rewards/", "eval_rewards/"))
            if (
                is_reward
                and isinstance(value, float)
                and math.isfinite(value)
                and not name.startswith("rewards/human/")
            ):
                curves.setdefault(name, []).append([round(log.get("epoch", 0)), value])
    shown = {name: points[-500:] for name, points in list(curves.items())[:8]}
    return {"rollouts": trainer_state.num_train_epochs, "rollout": rollout, "curves": shown}


def _pairs_body(rollout: int, pairs: list[tuple], images: dict[str, bytes]) -> dict[str, Any]:
    files = {id: base64.b64encode(png).decode() for id, png in images.items()}
    return {"rollout": rollout, "pairs": [[prompt, *ids] for prompt, ids, _ in pairs], "images": files}


def _parts(values: list, size: int) -> list[list]:
    """The values in lists of at most `size`."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def _tensor(image: Any) -> torch.Tensor:
    """An image [3, H, W], or a video [F, 3, H, W], in [0, 1]."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return torch.stack([_tensor(frame) for frame in image])


def _exported(folder: str) -> dict[str, tuple[float, int]]:
    """The mean of the votes for `a` of each exported pair, by its key, and how many they are."""
    from ..preference.exports import read_votes, voted_pairs

    preferences = {}
    for prompt, *files, preference, number in voted_pairs(read_votes(folder)):
        chosen, rejected = map(image_id, files)
        mean = preference if chosen < rejected else -preference
        preferences[pair_key(prompt, chosen, rejected)] = (mean, number)
    return preferences
