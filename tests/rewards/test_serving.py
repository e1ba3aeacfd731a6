"""Rewards over HTTP: a real server of Starlette and uvicorn on the loopback interface, and faulty ones of the standard library."""

import asyncio
import contextlib
import http.client
import inspect
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import uvicorn
from conftest import free_port
from faulty_server import FaultyServer
from PIL import Image, ImageChops
from tiny_clip import save_clip
from transformers import TrainerState

from trl_fdfo.media import Media, Outputs
from trl_fdfo.rewards import (
    CLIPScore,
    HTTPReward,
    JPEGCompressibility,
    PairwiseJudge,
    RewardFunctions,
    TemporalSmoothness,
    load_reward,
)
from trl_fdfo.rewards.by_name import reward_without_weights
from trl_fdfo.rewards.http_protocol import encode
from trl_fdfo.rewards.http_reward import HTTPRewardError
from trl_fdfo.rewards.serving import RewardServer, check_host
from trl_fdfo.serve import main


ROOT = Path(__file__).parents[2]
PROMPTS = ["a cat", "a cat", "two dogs", 'the "sea"\n{and} ☃']
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(4, 3, 40, 32, generator=GENERATOR)  # not multiples of 1/255
VIDEOS = torch.rand(4, 5, 3, 16, 24, generator=GENERATOR)
AUDIO = 2 * torch.rand(4, 2, 1000, generator=GENERATOR) - 1
STATE = TrainerState(global_step=7, max_steps=10)


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def first_value(images):
    return [image.flatten()[0].item() for image in images]


def loudness(audio, sampling_rate):
    return audio.square().mean(dim=(1, 2)) * sampling_rate


def speed(videos, frame_rate=1.0):
    return (videos.diff(dim=1).abs().mean(dim=(1, 2, 3, 4)) * frame_rate).tolist()


def in_sync(videos, audio, sampling_rate=None):
    return videos.mean(dim=(1, 2, 3, 4)) - audio.mean(dim=(1, 2))


async def labelled(images, prompts, label, trainer_state, num_generations):
    """The mean over the images of a prompt, and None without a label."""
    means = (
        images.mean(dim=(1, 2, 3)).unflatten(0, (-1, num_generations)).mean(dim=1).repeat_interleave(num_generations)
    )
    values = zip(means.tolist(), label, prompts)
    return [None if of is None else trainer_state.global_step * mean + of["bonus"] + len(p) for mean, of, p in values]


def positional(images, *rest):
    assert rest == ()
    return images.amax(dim=(1, 2, 3))


def everything(**kwargs):
    shown = sorted(name for name in kwargs if name != "trainer_state")
    return [float(len(", ".join(shown)) + n) for n in kwargs["number"]]


class Edited:
    """Compares PIL images with a column of PIL images of several sizes, which a row can have several of."""

    image_type = "pil"

    def __call__(self, images, source):
        firsts = [each[0] if isinstance(each, list) else each for each in source]
        return [
            sum(ImageChops.difference(image, first.resize(image.size)).histogram()[:99])
            for image, first in zip(images, firsts)
        ]


def brighter(first, second, prompts, label=None):
    return [
        None if p == "two dogs" else a.mean().item() - b.mean().item() + 5.0 for a, b, p in zip(first, second, prompts)
    ]


def raising(images, prompts):
    if "raise" in prompts:
        raise RuntimeError("out of memory, or so")
    return images.mean(dim=(1, 2, 3)) if "nan" not in prompts else images[:, 0, 0, 0] * torch.nan


@contextlib.contextmanager
def serving(*rewards, port=None, **options):
    """The URL of a server in a thread."""
    server = RewardServer(rewards, **options)
    port = port or free_port()
    config = uvicorn.Config(server.app, host="127.0.0.1", port=port, log_level="warning")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join()


def remote(url, name=None, **options):
    """The reward of a server; by default a request that fails is sent again in an instant."""
    return HTTPReward(url, name, **{"backoff": 0.01, "timeout": 10.0, **options})


def score(reward, made=IMAGES, prompts=PROMPTS, columns=None, num_generations=2, rates=None):
    functions = RewardFunctions(reward)
    columns = columns or {}
    functions.check_columns([*columns])
    kinds = {3: ("audio",), 4: ("images",), 5: ("images", "videos")}
    made_kinds = ("images", "videos", "audio") if isinstance(made, Media) else kinds[made.ndim]
    functions.expect(Outputs(made_kinds, **(rates or {})))
    return functions(made, prompts, STATE, columns, num_generations)[:, 0]


def send(url, path, body=b"", method="POST", **headers):
    """Status, headers and JSON of an answer."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
    return answer.status, answer.headers, json.loads(text) if text[:1] == b"{" else text


def request_body(images=IMAGES, as_bytes=False, **head):
    return encode({"images": images}, {"prompts": PROMPTS[: len(images)], **head}, as_bytes)


# Values


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return CLIPScore(str(folder), device="cpu")


@pytest.fixture(scope="module")
def everywhere(clip):
    """The URL of a server of many rewards, and the rewards by name."""
    rewards = [
        *(brightness, first_value, loudness, speed, in_sync, labelled, everything, Edited(), raising, positional),
        *(clip, JPEGCompressibility(), TemporalSmoothness(), PairwiseJudge(brighter)),
    ]
    with serving(*rewards) as url:
        yield url, dict(zip(RewardFunctions(rewards).names, rewards))


CASES = {
    "brightness": {},
    "first_value": {},
    "positional": {},
    "CLIPScore": {},
    "JPEGCompressibility": {},
    "TemporalSmoothness": {"made": VIDEOS},
    "CLIPScore of videos": {"made": VIDEOS},
    "loudness": {"made": AUDIO, "rates": {"sampling_rate": 16000}},
    "speed": {"made": VIDEOS, "rates": {"frame_rate": 24.0}},
    "speed without a rate": {"made": VIDEOS},
    "in_sync": {"made": Media(VIDEOS, AUDIO)},
    "labelled": {"columns": {"label": [{"bonus": 0.1}] * 2 + [None] * 2}},
    "everything": {"made": VIDEOS, "columns": {"number": [1, 2.5, 3, 4], "text": [["a", None]] * 4}},
    "brighter": {"made": VIDEOS},
    "brighter among four": {"prompts": ["a"] * 4, "num_generations": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_in_process(everywhere, case):
    url, rewards = everywhere
    name, options = case.split(" ")[0], CASES[case]
    expected = score(rewards[name], **options)
    assert len(expected.unique()) > 1  # or nothing is compared
    for batch_size in (16, 3):
        served = score(remote(url, name, batch_size=batch_size), **options)
        # The rounding of a model depends on its batch.
        tolerance = 1e-4 if name == "CLIPScore" and batch_size == 3 else 0
        torch.testing.assert_close(served, expected, rtol=0, atol=tolerance, equal_nan=True)
    if name in ("labelled", "brighter") and len(case.split()) == 1:
        assert served.isnan().tolist() == [False, False, True, True]


def test_pictures_in_a_column_travel(everywhere):
    url, rewards = everywhere
    pictures = [Image.effect_noise((size, 20), 90).convert(mode) for size, mode in zip((9, 20, 30, 50), ["RGB"] * 4)]
    columns = {"source": [*pictures[:2], pictures[2:], pictures[3:]]}
    expected = score(rewards["Edited"], columns=columns)
    assert torch.equal(score(remote(url, "Edited"), columns=columns), expected) and expected.min() > 0


def test_the_reward_is_known_by_what_is_served(everywhere):
    url, rewards = everywhere
    for name, reward in rewards.items():
        asked = remote(url, name)
        local, served = RewardFunctions(reward), RewardFunctions(asked)
        assert served.names == [name] and served.scores == local.scores
        assert inspect.iscoroutinefunction(type(asked).__call__)
    clip = remote(url, "CLIPScore")
    assert "batch_size=16" in RewardFunctions(clip).describe()["CLIPScore"]
    # The checks of a trainer see what the reward needs.
    with pytest.raises(ValueError, match="'labelled' needs the argument 'label', and train_dataset has no such column"):
        RewardFunctions(remote(url, "labelled")).check_columns(["prompt"])
    with pytest.raises(ValueError, match="'loudness' scores audio, and the pipeline makes images"):
        RewardFunctions(remote(url, "loudness")).expect(Outputs(("images",)))


def test_by_name_and_in_a_plan(everywhere):
    url, _ = everywhere
    reward = load_reward(f"http(url='{url}', name='brightness', batch_size=2)")
    assert isinstance(reward, HTTPReward) and reward.batch_size == 2
    assert isinstance(reward_without_weights("http(url='http://nowhere:1')"), HTTPReward)

    async def in_a_notebook():  # where a loop runs
        return await HTTPReward(url, "first_value")(images=IMAGES)

    assert asyncio.run(in_a_notebook()) == first_value(IMAGES)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, r"serves brightness, first_value, .*: say which, HTTPReward\(url, 'brightness'\)"),
        ({"name": "other"}, ValueError, "serves no reward 'other': take one of brightness, "),
        ({"batch_size": 0}, ValueError, "batch_size=0 of HTTPReward must be at least 1"),
        ({"max_concurrency": 0}, ValueError, "max_concurrency=0 of HTTPReward must be between 1 and 100"),
        ({"url": "here:1"}, ValueError, "url='here:1' of HTTPReward must be a base URL such as http://localhost:8000."),
    ],
)
def test_arguments(everywhere, options, error, message):
    with pytest.raises(error, match=message):
        remote(**{"url": everywhere[0], **options})


def test_a_column_that_is_not_json_is_named(everywhere):
    with pytest.raises(ValueError, match=r"The columns label go to the server as JSON.*\{1, 2\}, a set"):
        score(remote(everywhere[0], "labelled"), columns={"label": [{1, 2}] * 4})


# The server


class Gate:
    """A reward that waits until it is opened, and counts the images of its calls."""

    def __init__(self):
        self.calls, self.open, self.entered = [], threading.Event(), threading.Event()

    def __call__(self, images):
        self.calls.append(len(images))
        self.entered.set()
        assert self.open.wait(20)
        return images.mean(dim=(1, 2, 3))


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


@contextlib.contextmanager
def calls(url, bodies, path="/score/Gate"):
    """Send bodies from threads, in their order; yields the list of what is answered."""
    answers, threads = [None] * len(bodies), []

    def call(number):
        answers[number] = send(url, path, bodies[number])

    for number in range(len(bodies)):
        threads.append(threading.Thread(target=call, args=(number,)))
        threads[-1].start()
        time.sleep(0.2)  # they arrive in this order
    yield answers
    for thread in threads:
        thread.join()


def test_requests_that_wait_are_scored_together():
    gate = Gate()
    wide = torch.rand(2, 3, 8, 16)
    parts = [IMAGES[:1], IMAGES[:2], IMAGES[2:3], IMAGES[1:3], wide, IMAGES]
    with serving(gate, max_batch_size=4) as url:
        with calls(url, [request_body(part) for part in parts]) as answers:
            gate.open.set()
        # The first is alone; then up to four images of one shape and in their order; the last is one request.
        assert gate.calls == [1, 3, 2, 2, 4]
    for part, (status, _, answer) in zip(parts, answers):
        assert status == 200
        assert answer["rewards"] == part.mean(dim=(1, 2, 3)).tolist()


def test_requests_of_other_groups_are_apart():
    gate = Gate()
    bodies = [request_body(num_generations=g) for g in (1, 2, 2, 4)]
    with serving(gate) as url, calls(url, bodies) as answers:
        gate.open.set()
    assert gate.calls == [4, 8, 4] and all(answer[0] == 200 for answer in answers)


def test_a_full_queue_says_when_to_come_back():
    gate = Gate()
    body = request_body()
    with serving(gate, max_waiting=1) as url:
        reward = remote(url, max_retries=9, max_concurrency=2, batch_size=1)
        with calls(url, [body] * 2) as answers:
            assert gate.entered.wait(10)
            status, headers, answer = send(url, "/score/Gate", body)
            assert (status, headers["retry-after"]) == (429, "1")
            assert answer["error"] == "1 requests wait already (max_waiting=1): ask again later."
            # Four requests at once: some are told to come back, and do.
            threading.Timer(0.5, gate.open.set).start()
            start = time.monotonic()
            assert torch.equal(score(reward), IMAGES.mean(dim=(1, 2, 3)).double())
            assert time.monotonic() - start > 1
    assert [answer[0] for answer in answers] == [200, 200]


def test_a_client_that_leaves_is_not_scored():
    gate = Gate()
    with serving(gate, max_waiting=2, max_batch_size=1) as url:
        with calls(url, [request_body()]) as answers:
            with pytest.raises(HTTPRewardError, match="did not answer: 1 attempts in .*no answer within 0.2 s"):
                score(remote(url, timeout=0.2, max_retries=0))
            # It gave its place in the queue to the next ones.
            wait_until(lambda: gate.entered.is_set())
            time.sleep(0.1)
            with calls(url, [request_body()] * 2) as later:
                gate.open.set()
    assert [answer[0] for answer in [*answers, *later]] == [200] * 3
    assert gate.calls == [4, 4, 4]


def test_a_server_ends_though_a_reward_hangs():
    gate = Gate()
    with serving(gate) as url:
        with pytest.raises(HTTPRewardError, match="no answer within 0.2 s"):
            score(remote(url, timeout=0.2, max_retries=0))
        start = time.monotonic()
    assert gate.entered.is_set() and time.monotonic() - start < 10
    gate.open.set()


def test_a_body_is_bounded_before_it_is_received():
    with serving(brightness, max_megabytes=0.02) as url:
        status, _, answer = send(url, "/score/brightness", request_body())
        assert status == 413
        assert "longer than 20000 bytes (max_megabytes=0.02): send fewer samples at a time" in answer["error"]
        # Without a length, as it comes; and one that lies about it does not get far.
        status, _, _ = send(url, "/score/brightness", iter([b"x" * 1000] * 30))
        assert status == 413
        with socket.create_connection(url.removeprefix("http://").split(":")) as connection:
            connection.sendall(b"POST /score/brightness HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
            assert b" 413 " in connection.recv(100)
        with pytest.raises(HTTPRewardError, match="refused a request with HTTP 413.*batch_size of HTTPReward"):
            score(remote(url))
        assert score(remote(url, batch_size=1)).tolist() == IMAGES.mean(dim=(1, 2, 3)).tolist()


def test_a_body_that_stops_ends_its_request():
    with serving(brightness) as url:
        for half_closed in (False, True):
            connection = socket.create_connection(url.removeprefix("http://").split(":"))
            with contextlib.closing(connection):
                connection.sendall(b"POST /score/brightness HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
                if half_closed:
                    connection.shutdown(socket.SHUT_WR)
                    assert connection.recv(100) == b""
        assert send(url, "/score/brightness", request_body())[0] == 200


def test_a_token_is_asked_for_and_told_to_no_one(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    token = "".join(["tok", "-", "secret"])
    with serving(brightness, token=token) as url:
        for headers, has in (({}, "none"), ({"Authorization": "Bearer other"}, "another token")):
            for method, path in (("GET", "/rewards"), ("POST", "/score/brightness"), ("POST", "/score/x")):
                status, _, answer = send(url, path, request_body(), method, **headers)
                assert status == 401 and f"the request has {has}" in answer["error"]
        assert send(url, "/health", method="GET")[::2] == (200, {"status": "ok"})
        with pytest.raises(HTTPRewardError, match=r"HTTP 401: .*Check the url.*the api_key \(REWARD_SERVER_TOKEN\)"):
            remote(url)
        with pytest.raises(HTTPRewardError, match="HTTP 401") as error:
            remote(url, api_key=token + "x")
        assert token not in str(error.value)
        assert torch.equal(score(remote(url, api_key=token)), score(brightness))
    assert token not in caplog.text + "".join(capfd.readouterr())


def test_the_token_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("REWARD_SERVER_TOKEN", "tok-other\n")
    with serving(brightness, token="tok-other") as url:
        assert torch.equal(score(remote(url)), score(brightness))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "rewards.example"])
def test_other_machines_need_a_token(host):
    with pytest.raises(ValueError, match=f"host='{host}' is reached by other machines.*set a token"):
        main(["trl_fdfo.shapes:reward", "--host", host, "--token", " "])
    check_host(host, "x")
    for own in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        check_host(own, "")


@pytest.mark.parametrize(
    ("rewards", "options", "error", "message"),
    [
        ([], {}, ValueError, r"rewards=\[\] must be a list with at least one reward"),
        ([brightness, brightness], {}, RuntimeError, "Two rewards have the name 'brightness'"),
        (
            [brightness],
            {"processes": 2},
            ValueError,
            "load their rewards by name, and .* has an object: give module:name",
        ),
        ([brightness], {"max_waiting": 0}, ValueError, "max_waiting=0 of a server of rewards must be more than 0"),
        (["clip"], {"devices": ["cuda:9999"]}, ValueError, "devices has 'cuda:9999': there are cpu and "),
        (["nothing"], {}, ValueError, "reward 'nothing' is neither one of pickscore"),
    ],
)
def test_servers_that_cannot_be(rewards, options, error, message):
    with pytest.raises(error, match=message):
        RewardServer(rewards, **options)


# Requests that are refused


def body(head, values=b""):
    return (head if isinstance(head, bytes) else json.dumps(head).encode()) + b"\n" + values


def tensors(shape=(1, 3, 2, 2), name="images", type="uint8"):
    return [{"name": name, "type": type, "shape": list(shape)}]


ONE = bytes(12)


@pytest.mark.parametrize(
    ("path", "sent", "status", "message"),
    [
        ("brightness", b"", 400, "The body begins with b'', and must begin with a line of JSON, an object"),
        ("brightness", b"\x89PNG\n\x00", 400, "The body begins with b'.x89PNG"),
        ("brightness", b"[" * 100_000 + b"\n", 400, "must begin with a line of JSON"),
        ("brightness", body({"prompt": ["a"]}), 400, "has 'prompt'; it may have tensors, prompts, num_generations"),
        ("brightness", body({"\ud83d": 1}), 400, "has '.'; it may have tensors"),
        (
            "brightness",
            body({"tensors": tensors((10**4000, 3, 10**4000, 10**4000))}, ONE),
            422,
            r"shape=\[10000.*; it must be \[N, 3, H, W\]",
        ),
        ("brightness", body({}), 400, "tensors=None must be a list of at least one"),
        ("brightness", body({"tensors": [1]}), 400, "tensors has 1, which must be of the form"),
        (
            "brightness",
            body({"tensors": tensors(name="image")}, ONE),
            400,
            "has the name 'image'; it must be one of images",
        ),
        ("brightness", body({"tensors": tensors(type="f")}, ONE), 400, "type='f'; it must be one of uint8, float32"),
        (
            "brightness",
            body({"tensors": tensors((3, 2, 2))}, ONE),
            422,
            r"shape=\[3, 2, 2\]; it must be \[N, 3, H, W\]",
        ),
        ("brightness", body({"tensors": tensors((1, 2, 2, 3))}, ONE), 422, r"shape=\[1, 2, 2, 3\]; it must be"),
        ("brightness", body({"tensors": tensors((1, 3, -2, -2))}, ONE), 422, r"shape=\[1, 3, -2, -2\]"),
        (
            "brightness",
            body({"tensors": tensors((10**9, 3, 2, 2))}, ONE),
            400,
            "take 12000000000 bytes .*, and 12 follow",
        ),
        ("brightness", body({"tensors": tensors() * 2}, ONE * 2), 422, "send either images or videos, and audio, once"),
        ("brightness", body({"tensors": tensors(), "prompts": []}, ONE), 422, "prompts has 0 values for 1 samples"),
        ("brightness", body({"tensors": tensors(), "prompts": "a"}, ONE), 422, "prompts must be a list of 1 values"),
        ("brightness", body({"tensors": tensors(), "prompts": [3]}, ONE), 422, "prompts has 3, which is no text"),
        (
            "brightness",
            body({"tensors": tensors()}, ONE),
            422,
            "'brightness' needs prompts, and the request has images",
        ),
        (
            *("brightness", body({"tensors": tensors(), "prompts": ["a"], "num_generations": 2}, ONE), 422),
            "num_generations=2 must divide the 1 samples",
        ),
        ("brightness", body({"tensors": tensors(), "columns": {"images": [1]}}, ONE), 422, "rename it"),
        (
            "brightness",
            body({"tensors": tensors(), "columns": {"a": 1}}, ONE),
            422,
            "The column 'a' must be a list of 1",
        ),
        ("brightness", body({"tensors": tensors(), "frame_rate": "24"}, ONE), 422, "frame_rate='24' must be a number"),
        (
            "brightness",
            body({"tensors": tensors(), "trainer_state": {"x": 1}}, ONE),
            422,
            "may have the numbers global",
        ),
        ("Edited", body({"tensors": tensors()}, ONE), 422, "needs source, and the request has images: send samples in"),
        (
            "Edited",
            body({"tensors": tensors(), "columns": {"source": [{"$png": "x"}]}}, ONE),
            422,
            "'source' .* no PNG file",
        ),
        ("loudness", body({"tensors": tensors()}, ONE), 422, "needs audio, sampling_rate, and the request has images"),
        (
            *("loudness", body({"tensors": tensors((1, 3, 4), "audio"), "sampling_rate": 9}, ONE), 422),
            "The audio has type='uint8'; its values, of about -1 to 1, are sent as 'float32'",
        ),
        (
            "first_value",
            encode({"images": -IMAGES}, {}, False),
            422,
            r"hold values from -0.99\d* to .*must be in \[0, 1\]",
        ),
        ("first_value", encode({"images": IMAGES * 255}, {}, False), 422, r"must be in \[0, 1\]"),
        ("first_value", encode({"images": IMAGES * torch.nan}, {}, False), 422, "values from nan to nan"),
        ("other", ONE, 404, "There is no reward 'other' here, but brightness, first_value"),
        ("a%2Fb", ONE, 404, "There is no reward 'a/b' here"),
    ],
)
def test_requests_that_are_refused_say_why(everywhere, path, sent, status, message):
    answered, _, answer = send(everywhere[0], f"/score/{path}", sent)
    assert answered == status
    assert re.search(message, answer["error"], re.DOTALL), answer["error"]


def test_a_reward_that_raises_names_itself_and_the_next_request_works(everywhere):
    url, _ = everywhere
    reward = remote(url, "raising", max_retries=1)
    with pytest.raises(
        HTTPRewardError, match="2 attempts .*HTTP 500.*'raising' raised RuntimeError: out of memory, or so"
    ):
        score(reward, prompts=["a", "raise", "b", "c"])
    with pytest.raises(
        HTTPRewardError, match="HTTP 500.*ValueError: Reward 'raising' returned nan for the prompt 'nan'"
    ):
        score(reward, prompts=["nan", "nan", "b", "c"])
    assert torch.equal(score(reward), score(brightness))


def test_a_reward_that_raises_fails_for_its_cause_alone():
    gate = Gate()

    def guarded(images, prompts):
        values = gate(images)
        return raising(values[:, None, None, None].expand(-1, 3, 1, 1), prompts)

    bodies = [encode({"images": IMAGES[:1]}, {"prompts": [p]}, False) for p in ("first", "a", "raise", "b")]
    with serving(guarded) as url, calls(url, bodies, "/score/guarded") as answers:
        gate.open.set()
    assert gate.calls == [1, 3, 1, 1, 1]
    assert [answer[0] for answer in answers] == [200, 200, 500, 200]


# Servers that are not ours, or not well


class Faulty(FaultyServer):
    """Serves the mean of images. The n-th of `faults` is that of the n-th request; the last lasts."""

    listing = '{"rewards": [{"name": "mean", "needs": ["images"]}]}'

    def __init__(self, *faults, **options):
        super().__init__(lambda n: faults[min(n, len(faults) - 1)] if faults else None, **options)

    def answer(self, body):
        head, _, values = body.partition(b"\n")
        (tensor,) = json.loads(head)["tensors"]
        images = torch.frombuffer(bytearray(values), dtype=torch.float32).reshape(tensor["shape"])
        return json.dumps({"rewards": images.mean(dim=(1, 2, 3)).tolist()})


MEANS = IMAGES.mean(dim=(1, 2, 3)).tolist()


@pytest.mark.parametrize(
    "fault",
    [500, 503, 429, 408, "close", "half", "hang", "<html>", "[]", "{}", '{"rewards', (503, "", {"Retry-After": "0.2"})],
)
def test_failures_that_pass_are_tried_again(fault):
    with Faulty(fault, fault, None) as server:
        assert score(remote(server.url, timeout=0.5 if fault == "hang" else 5, max_retries=2)).tolist() == MEANS
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, r"the last with HTTP 500.*Is it up \(`trl-fdfo serve REWARD --port 8200`\)"),
        ("close", "the last with RemoteProtocolError"),
        ("half", "the last with RemoteProtocolError"),
        ("hang", "no answer within 0.3 s.*timeout=0.3 s and max_concurrency=4"),
        ("<html>Log in</html>", "the last with no rewards in HTTP 200: <html>Log in"),
        ((302, "", {"Location": "/rewards"}), r"no number|answered 1 values"),
    ],
)
def test_failures_that_last_are_errors(fault, message):
    with Faulty(fault) as server, pytest.raises(HTTPRewardError, match=message):
        score(remote(server.url, timeout=0.3, max_retries=1))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('{"rewards": [1, 2, 3]}', r"server of mean answered 3 values for 4 samples \(HTTP 200: .*one number, or null"),
        ('{"rewards": 1.5}', "answered a float for 4 samples"),
        (
            '{"rewards": [1, 2, NaN, 4]}',
            "answered nan, which is no finite number.*null where the reward does not apply",
        ),
        ('{"rewards": [1, 2, Infinity, 4]}', "answered inf, which"),
        ('{"rewards": [1, 2, 1e999, 4]}', "answered inf, which"),
        ('{"rewards": [1, 2, "3", 4]}', "answered '3', which"),
        ('{"rewards": [1, 2, true, 4]}', "answered True, which"),
    ],
)
def test_a_server_that_lies_is_an_error_at_once(answer, message):
    with Faulty(answer) as server:
        with pytest.raises(HTTPRewardError, match=message):
            score(remote(server.url))
        assert len(server.bodies) == 1


def test_a_redirect_is_named():
    with (
        Faulty((307, "", {"Location": "http://127.0.0.1:1/x"})) as server,
        pytest.raises(HTTPRewardError, match="ConnectError"),
    ):
        score(remote(server.url, max_retries=1))
    with Faulty() as other, Faulty((302, "", {"Location": f"{other.url}/login"})) as server:
        with pytest.raises(HTTPRewardError, match=rf"HTTP 200 of {other.url}/login, to which it redirects: "):
            score(remote(server.url))


def test_a_list_of_arguments_may_repeat_itself_and_must_hold_names():
    with Faulty() as server:
        server.listing = (
            '{"rewards": [{"name": "mean", "needs": ["images", "images"], "takes": ["label", "images", "label"]}]}'
        )
        assert [*remote(server.url).__signature__.parameters] == ["images", "label", "prompts"]
        server.listing = '{"rewards": [{"name": "mean", "needs": ["images"], "takes": ["class"]}]}'
        with pytest.raises(HTTPRewardError, match='no list of rewards in HTTP 200: .*"class"'):
            remote(server.url, max_retries=0)


def test_no_server_and_no_list_of_rewards():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(HTTPRewardError, match=f"{url} did not answer: 2 attempts in .*ConnectError.*Is it up"):
        remote(url, max_retries=1)


def test_servers_take_turns_and_fill_in():
    state = random.getstate()
    dead = f"http://127.0.0.1:{free_port()}"
    with Faulty(delay=0.05) as one, Faulty(delay=0.05) as other:
        assert score(remote([one.url, other.url], batch_size=1, max_concurrency=2)).tolist() == MEANS
        assert (len(one.bodies), len(other.bodies)) == (2, 2) and one.peak + other.peak <= 4
        assert score(remote([dead, other.url], batch_size=1, max_retries=1)).tolist() == MEANS
        assert len(other.bodies) == 6
        score(remote(one.url, batch_size=1, max_concurrency=2))
        assert one.peak == 2
    assert random.getstate() == state


# Another language: from the protocol's description alone, without numpy or torch


class Minimal(BaseHTTPRequestHandler):
    """The server of docs/rewards.md."""

    def do_GET(self):
        self.answer({"rewards": [{"name": "red", "needs": ["images"], "image_type": "pil"}]})

    def do_POST(self):
        head, _, data = self.rfile.read(int(self.headers["Content-Length"])).partition(b"\n")
        count, channels, height, width = json.loads(head)["tensors"][0]["shape"]
        size = height * width
        reds = [data[n * channels * size :][:size] for n in range(count)]
        self.answer({"rewards": [sum(red) / size / 255 for red in reds]})

    def answer(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *args):
        pass


def test_a_server_of_the_standard_library():
    with HTTPServer(("127.0.0.1", 0), Minimal) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served = score(remote(f"http://127.0.0.1:{server.server_port}", batch_size=3))
        server.shutdown()
        thread.join()
    expected = (IMAGES[:, 0] * 255).round().mean(dim=(1, 2)) / 255
    torch.testing.assert_close(served, expected.double(), rtol=0, atol=1e-6)


def test_the_server_of_the_docs_is_this_one():
    docs = (ROOT / "docs" / "rewards.md").read_text()
    shown = inspect.getsource(Minimal).replace('    """The server of docs/rewards.md."""\n\n', "")
    assert shown.partition("    def log_message")[0].strip() in docs


# Processes


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "import os, time\n\n\n"
        "def process(images, prompts):\n"
        "    if 'die' in prompts:\n        os._exit(3)\n"
        "    time.sleep(0.3)\n    return [float(os.getpid())] * len(images)\n\n\n"
        "def slow(images, prompts):\n"
        "    open('state', 'w').write(str(os.getpid()))\n    time.sleep(1)\n    return images.mean(dim=(1, 2, 3))\n\n\n"
        "def broken():\n    raise OSError('no weights here')\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_two_processes_share_the_requests_and_one_that_dies_is_replaced(my_rewards):
    with serving("my_rewards:process", processes=2, devices=["cpu"], max_batch_size=1) as url:
        reward = remote(url, batch_size=1, max_concurrency=4)
        first = score(reward, IMAGES[:, :, :8])
        assert len(first.unique()) == 2 and os.getpid() not in first.tolist()
        with pytest.raises(HTTPRewardError, match=r"HTTP 503.*'my_rewards:process' ended \(exit code 3\)"):
            score(remote(url, max_retries=0), IMAGES[:1], ["die"], num_generations=1)
        pids = {*map(int, first)}
        # The other goes on, and a third joins it.
        while len(pids) < 3:
            pids |= {*map(int, score(reward))}
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_a_reward_that_cannot_be_loaded_ends_the_server(my_rewards):
    with pytest.raises(RuntimeError, match=r"'my_rewards:broken\(\)' cannot be loaded: OSError: no weights here"):
        RewardServer(["my_rewards:broken()"], devices=["cpu"])


@contextlib.contextmanager
def command(*args, folder):
    """A server from the command line, as soon as it listens."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_fdfo.serve", *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_and_comes_back(my_rewards):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    values, state = [], Path("state")
    with command("my_rewards:slow", "--port", str(port), "--devices", "cpu", folder=my_rewards) as process:
        assert process.stdout.readline() == "slow: images, prompts\n"
        asking = threading.Thread(target=lambda: values.append(score(remote(url, max_retries=30, backoff=0.5))))
        asking.start()
        wait_until(state.exists)
        process.send_signal(signal.SIGKILL)
    with serving(brightness_named_slow(), port=port):
        asking.join()
    assert values[0].tolist() == MEANS
    # Its process of the reward, which would hold a GPU's memory, has ended too.
    wait_until(lambda: not Path(f"/proc/{state.read_text()}").exists())


def brightness_named_slow():
    def slow(images, prompts):
        return images.mean(dim=(1, 2, 3))

    return slow
