"""
Serves rewards by HTTP, in the protocol of [`http_protocol`]; [`HTTPReward`] asks them.

A request is refused by its headers before its body is received (token, length, a full queue), its line of JSON is checked,
and it waits in the queue of its reward. A worker that becomes free scores the requests at the head of the queue that are
of one kind, together, up to `max_batch_size` samples. The workers of a reward share one queue, so several GPUs are equally
busy however the connections are spread.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from transformers import TrainerState

from ..media import Media, Outputs
from .by_name import load_reward
from .http_protocol import BadRequest, ScoreRequest, joined
from .http_reward import TOKEN
from .reward_functions import RewardFunction, RewardFunctions, attribute_of, parameters_of, settings_of


try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError("Serving rewards needs starlette and uvicorn: pip install 'trl_fdfo[server]'.") from error


logger = logging.getLogger(__name__)

STALLED = 30.0  # seconds without a byte after which the body of a request is given up
_LAST = 30  # seconds that a server which is told to end leaves to the requests that it has


@dataclass
class Failure:
    """Why a request has no rewards: the HTTP status and the message of its answer."""

    status: int
    message: str


Outcome = list[float | None] | Failure


class Scorer:
    """A reward that scores requests, several of one kind at a time."""

    def __init__(self, reward: RewardFunction):
        self.functions = RewardFunctions(reward, argument="reward")
        (self.name,), (function,) = self.functions.names, self.functions.functions
        parameters = parameters_of(self.name, function)
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        needs = [p.name for p in named if p.default is p.empty]
        self.functions.check_columns(needs, "a request", sampled_columns=needs)
        self.description = {
            "name": self.name,
            "needs": needs,
            "takes": [p.name for p in named if p.name not in needs],
            "takes_all": any(p.kind is p.VAR_KEYWORD for p in parameters),
            "image_type": attribute_of(function, "image_type", "pt"),
            "pairwise": bool(attribute_of(function, "pairwise", False)),
            "settings": settings_of(function),
        }

    def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Score requests of one kind; if that fails, each by itself, so that it fails for the cause alone."""
        try:
            return self._together(requests)
        except Exception as error:
            if len(requests) > 1:
                return [outcome for request in requests for outcome in self.score([request])]
            if isinstance(error, BadRequest):
                return [Failure(error.status, str(error))]
            logger.exception("The reward %s raised an error.", self.name)
            notes = " ".join(["", *getattr(error, "__notes__", [])])
            return [Failure(500, f"The reward '{self.name}' raised {type(error).__name__}: {error}{notes}")]

    def _together(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        first = requests[0]
        each = [request.samples() for request in requests]
        samples = each[0] if len(each) == 1 else {name: torch.cat([one[name] for one in each]) for name in each[0]}
        images = samples.get("images", samples.get("videos"))
        audio = samples.get("audio")
        made = audio if images is None else images if audio is None else Media(images, audio)
        kinds = tuple(first.given & {"images", "videos", "audio"})
        self.functions.expect(Outputs(kinds, **first.rates))
        columns = [request.pictured_columns() for request in requests]
        rewards = self.functions(
            made,
            joined([request.prompts or [""] * request.count for request in requests]),
            TrainerState(**first.trainer_state),
            {name: joined([values[name] for values in columns]) for name in columns[0]},
            first.num_generations,
        )
        values = iter(None if math.isnan(value) else value for value in rewards[:, 0].tolist())
        return [[next(values) for _ in range(request.count)] for request in requests]


class _Here:
    """A worker in this process."""

    def __init__(self, reward: str | RewardFunction):
        self._reward = reward

    def load(self) -> dict[str, Any]:
        """Load the reward, and say what it takes."""
        reward = self._reward
        scorer = Scorer(load_reward(reward) if isinstance(reward, str) else reward)
        self.score = scorer.score
        return scorer.description

    def revive(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Process:
    """A worker in a process of its own, which sees one device. If the process dies, another takes its place."""

    _starting = threading.Lock()  # the environment is changed meanwhile

    def __init__(self, reward: str, device: str | None):
        self._reward, self._device = reward, device
        self._process = self._connection = None
        self._closed = False

    def load(self) -> dict[str, Any]:
        """
        Start the process, wait until it has loaded the reward, and say what that takes.

        Raises:
            RuntimeError: The reward cannot be loaded.
        """
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        ours, theirs = context.Pipe()
        with self._starting, _visible(self._device):
            self._process = context.Process(target=_work_in_process, args=(theirs, self._reward), daemon=True)
            self._process.start()
        theirs.close()
        try:
            description = ours.recv()
        except EOFError:
            self._process.join()
            description = f"its process ended with exit code {self._process.exitcode}"
        if isinstance(description, str):
            raise RuntimeError(f"The reward {self._reward!r} cannot be loaded: {description}.")
        self._connection = ours
        return description

    def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        try:
            if self._connection is None:
                self.load()
            self._connection.send(requests)
            return self._connection.recv()
        except RuntimeError as error:
            return [Failure(503, str(error))] * len(requests)
        except (EOFError, OSError):
            self._connection = None
            self._process.join(timeout=10)
            message = f"The process of the reward {self._reward!r} ended (exit code {self._process.exitcode})."
            if not self._closed:
                logger.error("%s Another is started.", message)
            return [Failure(503, message)] * len(requests)

    def revive(self) -> None:
        """Start a process again that has ended. If it cannot be loaded, the next request tries, and says why."""
        if self._connection is None and not self._closed:
            with contextlib.suppress(RuntimeError):
                self.load()

    def close(self) -> None:
        self._closed = True
        if self._process is not None:
            self._process.terminate()
            self._process.join()


def _work_in_process(connection: Any, reward: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; this one ends with its connection
    try:
        scorer = Scorer(load_reward(reward))
    except Exception as error:
        logger.exception("The reward %s cannot be loaded.", reward)
        connection.send(f"{type(error).__name__}: {error}".rstrip("."))
        return
    connection.send(scorer.description)
    with contextlib.suppress(EOFError, OSError):  # the server has ended
        while True:
            connection.send(scorer.score(connection.recv()))


@contextlib.contextmanager
def _visible(device: str | None) -> Iterator[None]:
    """Let a process that is started see this device alone, so that any reward takes it without being told."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    if device is not None:
        _, _, index = device.partition(":")
        visible = before.split(",") if before else [str(number) for number in range(torch.cuda.device_count())]
        os.environ[name] = visible[int(index)] if index else ""
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        else:
            os.environ.pop(name, None)


class _Thread:
    """A thread that calls one function after the other. The process ends without it: a reward may hang for good."""

    def __init__(self):
        self._calls = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    async def run(self, function: Callable, *arguments: Any) -> Any:
        future = Future()
        self._calls.put((future, function, arguments))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)


@dataclass(eq=False)
class _Place:
    """A request's place in a queue, which it has from its headers until it is scored."""

    request: ScoreRequest | None = None
    outcome: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _Queue:
    """The requests that wait for a reward, and its workers."""

    def __init__(self, description: dict[str, Any], workers: list[Any], max_batch_size: int, max_waiting: int):
        self.description, self.workers = description, workers
        self.max_batch_size, self.max_waiting = max_batch_size, max_waiting
        self._seconds = 0.0  # that each request of the last call took
        self._places: set[_Place] = set()
        self._waiting: deque[_Place] = deque()
        self._arrival = asyncio.Event()

    @contextlib.contextmanager
    def place(self) -> Iterator[_Place]:
        """A place of a request, which it leaves at the latest when it is answered."""
        if len(self._places) >= self.max_waiting:
            raise _Refusal(
                429,
                f"{len(self._places)} requests wait already (max_waiting={self.max_waiting}): ask again later.",
                {"retry-after": str(max(1, math.ceil(self._seconds * len(self._places) / len(self.workers))))},
            )
        place = _Place()
        self._places.add(place)
        try:
            yield place
        finally:
            place.outcome.cancel()
            self._places.discard(place)
            if place in self._waiting:  # the client has left
                self._waiting.remove(place)

    def add(self, place: _Place) -> None:
        """A request has been received."""
        self._waiting.append(place)
        self._arrival.set()

    async def work(self, worker: Any) -> None:
        """Let a worker score what arrives, for good."""
        with contextlib.closing(_Thread()) as thread:  # a reward need not be safe for threads
            while True:
                while not (batch := self._take()):
                    self._arrival.clear()
                    await self._arrival.wait()
                start = time.monotonic()
                requests = [place.request for place in batch]
                try:
                    outcomes = await thread.run(worker.score, requests)
                except Exception as error:  # no request waits for a worker that is gone
                    logger.exception("A worker failed.")
                    outcomes = [Failure(500, f"{type(error).__name__}: {error}")] * len(requests)
                self._seconds = (time.monotonic() - start) / len(batch)
                for place, outcome in zip(batch, outcomes):
                    if not place.outcome.done():  # the client may have left
                        place.outcome.set_result(outcome)
                await thread.run(worker.revive)

    def _take(self) -> list[_Place]:
        """The requests at the head of the queue that are of one kind, up to `max_batch_size` samples or one request."""
        batch, count = [], 0
        while self._waiting:
            request = self._waiting[0].request
            count += request.count
            if batch and (count > self.max_batch_size or request.kind != batch[0].request.kind):
                break
            batch.append(self._waiting.popleft())
        self._places.difference_update(batch)
        return batch


class _Refusal(Exception):
    """An answer with an error."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers


class RewardServer:
    """
    An ASGI application, `app`, that serves rewards.

    Args:
        rewards (`Sequence[str | Callable]`): Names, as [`load_reward`] takes them, or callables.
        processes (`int`, *optional*): Processes of each reward. Default: one per device. A single one without devices is this
            process.
        devices (`Sequence[str]`): What the processes of a reward see in turn: `"cuda:0"`, `"cuda:1"`, `"cpu"`. Default: what
            this process sees.
        max_batch_size (`int`): Most samples of requests that are scored together. A request is never divided.
        max_waiting (`int`): Most requests that wait for a reward; a further one is answered by 429.
        max_megabytes (`float`): Largest body of a request, in 10^6 bytes; a larger one is answered by 413.
        token (`str`): What requests must have as their bearer token. Default: none is asked for.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: Two rewards have one name, or a reward cannot be loaded in its process. In this process its own error.
    """

    def __init__(
        self,
        rewards: Sequence[str | RewardFunction],
        *,
        processes: int | None = None,
        devices: Sequence[str] = (),
        max_batch_size: int = 64,
        max_waiting: int = 64,
        max_megabytes: float = 512.0,
        token: str = "",
    ):
        processes = max(1, len(devices)) if processes is None else processes
        numbers = {"processes": processes, "max_batch_size": max_batch_size, "max_waiting": max_waiting}
        for name, number in {**numbers, "max_megabytes": max_megabytes}.items():
            if not number > 0:
                raise ValueError(f"{name}={number} of a server of rewards must be more than 0.")
        if not rewards or isinstance(rewards, str):
            raise ValueError(f"rewards={rewards!r} must be a list with at least one reward to serve.")
        for device in devices:
            kind, _, index = device.partition(":")
            there = torch.cuda.device_count()
            if device != "cpu" and not (kind == "cuda" and index.isdigit() and int(index) < there):
                raise ValueError(f"devices has {device!r}: there are cpu and {there} GPU(s), cuda:0 and so on.")
        here = processes == 1 and not devices
        if not here and not all(isinstance(reward, str) for reward in rewards):
            raise ValueError(
                f"processes={processes} load their rewards by name, and {rewards!r} has an object: give module:name."
            )
        self._max_bytes, self._token = int(max_megabytes * 1e6), token.strip()
        self._queues = {}
        every = [[_Here(r)] if here else _in_processes(r, processes, devices) for r in rewards]
        loading = [worker for workers in every for worker in workers]
        try:
            # Processes load at the same time; this one, one reward after the other.
            with ThreadPoolExecutor(1 if here else len(loading)) as threads:
                described = dict(zip(loading, threads.map(lambda worker: worker.load(), loading)))
            for workers in every:
                queue = _Queue(described[workers[0]], workers, max_batch_size, max_waiting)
                name = queue.description["name"]
                if name in self._queues:
                    raise RuntimeError(
                        f"Two rewards have the name {name!r}, by which they are asked: serve them on two ports, or give one "
                        "another `__name__`."
                    )
                self._queues[name] = queue
        except BaseException:
            for worker in loading:
                worker.close()
            raise
        routes = [
            Route("/health", self._health),
            Route("/rewards", self._rewards),
            Route("/score/{name:path}", self._score, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={_Refusal: _refused})

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """What `GET /rewards` lists."""
        return [queue.description for queue in self._queues.values()]

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        each = [(queue, worker) for queue in self._queues.values() for worker in queue.workers]
        tasks = [asyncio.ensure_future(queue.work(worker)) for queue, worker in each]
        try:
            yield
        finally:
            for _, worker in each:
                worker.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _rewards(self, request: Request) -> Response:
        self._check_token(request)
        return JSONResponse({"rewards": self.descriptions})

    async def _score(self, request: Request) -> Response:
        self._check_token(request)
        name = request.path_params["name"]
        queue = self._queues.get(name)
        if queue is None:
            raise _Refusal(404, f"There is no reward {name!r} here, but {', '.join(self._queues)}.")
        with queue.place() as place:
            body = await self._body(request)
            try:
                place.request = await asyncio.to_thread(ScoreRequest.read, body)
                _check_fits(place.request, queue.description)
            except BadRequest as error:
                raise _Refusal(error.status, str(error)) from None
            queue.add(place)
            left = asyncio.ensure_future(request.receive())  # after the body, that the client has left
            await asyncio.wait([place.outcome, left], return_when=asyncio.FIRST_COMPLETED)
            left.cancel()
            if not place.outcome.done():
                return Response(status_code=499)  # to no one; and nothing is scored
            outcome = place.outcome.result()
        if isinstance(outcome, Failure):
            raise _Refusal(outcome.status, outcome.message)
        return JSONResponse({"rewards": outcome})

    def _check_token(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if self._token and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            has = "another token" if given else "none"
            raise _Refusal(
                401,
                f"A token is needed as `Authorization: Bearer ...`, and the request has {has}: HTTPReward takes it from {TOKEN}.",
            )

    async def _body(self, request: Request) -> bytearray:
        length, body = int(request.headers.get("content-length", "0")), bytearray()
        while max(length, len(body)) <= self._max_bytes:
            try:
                message = await asyncio.wait_for(request.receive(), STALLED)
            except TimeoutError:
                raise _Refusal(408, f"After {len(body)} bytes of the body, no more came for {STALLED:g} s.") from None
            if message["type"] == "http.disconnect":
                raise _Refusal(499, "The client has left.")
            body += message.get("body", b"")
            if not message.get("more_body") and len(body) <= self._max_bytes:
                return body
        raise _Refusal(
            413,
            f"The body is longer than {self._max_bytes} bytes (max_megabytes={self._max_bytes / 1e6:g}): send fewer samples at a "
            "time (batch_size of HTTPReward), or let the server take more.",
        )


def _in_processes(reward: Any, processes: int, devices: Sequence[str]) -> list[_Process]:
    return [_Process(reward, devices[number % len(devices)] if devices else None) for number in range(processes)]


def _check_fits(request: ScoreRequest, description: dict[str, Any]) -> None:
    """Raise a [`BadRequest`] if a request lacks something that the reward needs, or has nothing that it scores."""
    missing = [name for name in description["needs"] if name not in request.given]
    has = ", ".join(sorted(request.given - {"num_generations", "trainer_state"}))
    if missing:
        raise BadRequest(
            f"The reward '{description['name']}' needs {', '.join(missing)}, and the request has {has}: send samples in `tensors`, "
            "columns of the dataset in `columns`."
        )
    scored = {"images", "videos", "audio"} & {*description["needs"], *description["takes"]}
    if not description["takes_all"] and not scored & request.given:
        raise BadRequest(
            f"The reward '{description['name']}' takes {', '.join(scored) or 'no samples'}, and the request has {has}."
        )


async def _refused(request: Request, refusal: _Refusal) -> Response:
    # In ASCII: an error may quote what UTF-8 does not have, such as half of a character.
    return Response(json.dumps({"error": str(refusal)}), refusal.status, refusal.headers, "application/json")


def check_host(host: str, token: str) -> None:
    """Raise a ValueError if other machines reach this address, and no token is asked for."""
    try:
        own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = host == "localhost"
    if not own and not token.strip():
        raise ValueError(
            f"host={host!r} is reached by other machines, which could all use this one: set a token ({TOKEN} in the environment), or "
            "host='127.0.0.1'."
        )


def serve(
    rewards: Sequence[str | RewardFunction],
    *,
    host: str = "127.0.0.1",
    port: int = 8200,
    token: str = "",
    **options: Any,
) -> None:
    """
    Load rewards and serve them until the process is told to end.

    Args:
        rewards, token, **options: As in [`RewardServer`].
        host (`str`): Address to listen at. Beyond this machine, such as `"0.0.0.0"`, a token is needed.
        port (`int`): Port to listen at.

    Raises:
        ValueError, RuntimeError: As [`RewardServer`] raises them, or the host is reached by others without a token.
    """
    check_host(host, token)
    server = RewardServer(rewards, token=token, **options)
    for each in server.descriptions:
        takes = ", ".join([*each["needs"], *(f"{name} (optional)" for name in each["takes"])])
        print(f"{each['name']}: {takes}", flush=True)
    uvicorn.run(server.app, host=host, port=port, access_log=False, timeout_graceful_shutdown=_LAST)
