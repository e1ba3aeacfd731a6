"""The server over HTTP: who may ask, and what is refused."""

import base64
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from trl_fdfo.preference import server as module
from trl_fdfo.preference.cli import main
from trl_fdfo.preference.pairs import image_id, pair_key
from trl_fdfo.rewards.human_preference import HumanPreference


def png(color, size=8):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png("red"), png("blue")


def text(data):
    return base64.b64encode(data).decode()


def ask(running, path, body=None, headers=None, raw=None):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
    headers = {**({"content-type": "application/json"} if data is not None else {}), **(headers or {})}
    connection.request("POST" if data is not None else "GET", path, data, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    return answer.status, answer.headers, json.loads(content) if is_json else content


def pairs_body(prompt="a", images=(RED, BLUE), **changes):
    ids = [image_id(image) for image in images]
    body = {"owner": "me", "rollout": 1, "pairs": [[prompt, *ids]], "images": dict(zip(ids, map(text, images)))}
    return body | changes


@pytest.fixture
def running(start_server):
    return start_server()


@pytest.fixture
def run(running):
    return ask(running, "/api/runs", {"name": "run", "owner": "me", "votes_per_pair": 1})[2]["run"]


def test_a_pair_goes_round(running, run):
    key = pair_key("a", image_id(RED), image_id(BLUE))
    assert ask(running, f"/api/runs/{run}/pairs", pairs_body())[0] == 200
    [pair] = ask(running, "/api/next?rater=ann")[2]["pairs"]
    images = {side: ask(running, f"/images/{pair[side]}.png") for side in ("left", "right")}
    assert {images["left"][2], images["right"][2]} == {RED, BLUE}
    assert images["left"][1]["content-type"] == "image/png" and "immutable" in images["left"][1]["cache-control"]

    answers = []
    waiting = threading.Thread(
        target=lambda: answers.append(
            ask(running, f"/api/runs/{run}/verdicts", {"owner": "me", "keys": [key], "wait": 20})
        )
    )
    waiting.start()
    time.sleep(0.3)
    assert not answers, "it waits for the vote"
    red = "left" if images["left"][2] == RED else "right"
    body = {"rater": "ann", "pair": pair["id"], "choice": red, "left": pair["left"]}
    assert ask(running, "/api/votes", body)[2] == {"stored": True}
    waiting.join(10)
    counts = answers[0][2]["verdicts"][key]
    assert counts["a" if image_id(RED) < image_id(BLUE) else "b"] == 1
    progress = ask(running, "/api/progress")[2]
    assert (progress["run"], progress["pairs"], progress["done"], progress["votes"]) == ("run", 1, 1, 1)


def test_page_asks_no_other_host(running):
    for path in ("/", "/page.js", "/style.css"):
        status, headers, content = ask(running, path)
        assert status == 200 and b"://" not in content.replace(b"http://www.w3.org/2000/svg", b"")
        assert "default-src 'self'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("pairs", pairs_body(images=(RED, RED)), 422, "nothing to choose"),
        ("pairs", pairs_body(pairs=[["a", "1", "2", "3"]]), 422, r"A pair must be \[prompt, image id, image id\]"),
        ("pairs", pairs_body(pairs="all"), 422, "'pairs' must be a list of at most 500"),
        ("pairs", pairs_body(prompt="a" * 20_001), 413, "20,001 characters"),
        ("pairs", pairs_body() | {"images": {}}, 422, "There is no image .* of a pair"),
        ("pairs", pairs_body() | {"images": {"0" * 64: text(RED)}}, 422, "another content"),
        ("pairs", pairs_body() | {"images": {"../../etc/passwd": text(RED)}}, 422, "another content"),
        ("pairs", pairs_body() | {"images": {"0": "not base64!"}}, 422, "not base64"),
        ("pairs", pairs_body(images=(b"GIF89a", RED)), 422, "not a PNG file"),
        ("pairs", pairs_body(images=(png("red", 9000), RED)), 413, "81,000,000 pixels"),
        ("pairs", pairs_body(owner="you"), 409, "Another trainer has opened this run"),
        ("pairs", pairs_body(images=(RED[:-20], BLUE)), 422, "not a PNG file, or not a whole one"),
        ("pairs", pairs_body(prompt="half a character \ud83d"), 422, "no valid Unicode"),
        ("pairs", pairs_body(rollout="one"), 422, "'rollout' must be a number from 0"),
        ("pairs", pairs_body(rollout=1.5), 422, "'rollout' must be a whole number, and is 1.5"),
        ("verdicts", {"owner": "me", "keys": ["\ud83d"]}, 422, "'keys' must be text"),
        ("state", {"owner": "me", "state": {"rollouts": float("nan")}}, 422, "'state' is not valid JSON"),
        ("state", {"owner": "me", "state": {"\ud83d": 1}}, 422, "'state' is not valid JSON"),
        ("verdicts", {"owner": "me", "keys": ["'; DROP TABLE pairs"]}, 404, "There is no pair"),
        ("verdicts", {"owner": "me", "keys": [], "wait": 1e9}, 422, "'wait' must be a number from 0 to 30"),
        ("state", {"owner": "me", "state": []}, 422, "'state' must be an object"),
    ],
)
def test_bad_input_of_a_trainer_is_refused_in_words(running, run, path, body, status, words):
    # An id is checked before the pair that needs it.
    got, _, said = ask(running, f"/api/runs/{run}/{path}", body)
    assert got == status, said
    assert re.search(words, said["error"])


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/api/votes", {"rater": "ann", "pair": 77, "choice": "left", "left": "0"}, 404, "no pair 77"),
        (
            "/api/votes",
            {"rater": "", "pair": 1, "choice": "left", "left": "0"},
            422,
            "'rater' must be 1 to 80 printable",
        ),
        (
            "/api/votes",
            {"rater": "a\nb", "pair": 1, "choice": "left", "left": "0"},
            422,
            "'rater' must be 1 to 80 printable",
        ),
        ("/api/votes", {"rater": "ann", "pair": True, "choice": "left", "left": "0"}, 422, "'pair' must be a number"),
        ("/api/votes", [1], 422, "must be a JSON object, and is a list"),
        ("/api/runs", {"name": "x" * 81, "owner": "me", "votes_per_pair": 1}, 422, "'name' must be 1 to 80"),
        (
            "/api/runs",
            {"name": "x", "owner": "me", "votes_per_pair": 0},
            422,
            "'votes_per_pair' must be a number from 1",
        ),
        ("/api/raters", {"rater": "nobody", "excluded": True}, 404, "no rater 'nobody'"),
        ("/api/undo", {"rater": "ann", "run": {"a": 1}}, 422, "'run' must be 1 to 80 printable"),
        (f"/api/runs/{'9' * 5000}/verdicts", {"owner": "me", "keys": []}, 404, "is not the number of a run"),
        ("/api/runs/7/verdicts", {"owner": "me", "keys": []}, 404, "another file than the one that the trainer began"),
        ("/api/nothing", {}, 404, "POST /api/nothing: Not Found"),
    ],
)
def test_bad_input_of_a_page_is_refused_in_words(running, path, body, status, words):
    got, _, said = ask(running, path, body)
    assert got == status and words in said["error"], said


def test_what_is_no_json_is_refused(running):
    status, _, said = ask(running, "/api/votes", raw=b"{")
    assert status == 400 and "not valid JSON" in said["error"]
    status, _, said = ask(
        running, "/api/votes", raw=b"a=1", headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert status == 415 and "must be JSON" in said["error"]
    status, _, said = ask(running, "/images/..%2f..%2fvotes.sqlite.png")
    assert status == 404
    assert ask(running, "/images/nothing.png")[0] == 404
    names = {"rater": "\u0645\u06cc\u200c\u0646\u0627 \U0001f468\u200d\U0001f469\u200d\U0001f467"}
    assert ask(running, "/api/undo", names)[0] == 200
    for query in ("count", "but_not"):
        assert ask(running, f"/api/next?rater=ann&{query}={'9' * 5000}")[2] == {"pairs": []}


def test_oversized_requests_end_before_they_are_read(running, run):
    status, _, said = ask(
        running, f"/api/runs/{run}/pairs", raw=b"{}", headers={"content-length": str(module.MAX_BODY + 1)}
    )
    assert status == 413 and "more than 128 MiB" in said["error"]


def test_a_vote_that_cannot_be_kept_is_refused_in_words(running, run):
    """A full disk passes: the page and the trainer send again what is answered by 503."""
    ask(running, f"/api/runs/{run}/pairs", pairs_body())
    [pair] = ask(running, "/api/next?rater=ann")[2]["pairs"]
    body = {"rater": "ann", "pair": pair["id"], "choice": "left", "left": pair["left"]}
    [pages] = running.store._one("PRAGMA page_count")
    running.store._db.execute(f"PRAGMA max_page_count = {pages}")
    for number in range(200):  # votes of others fill the pages that there are
        status, _, said = ask(running, "/api/votes", body | {"rater": f"rater {number:070}"})
        if status != 200:
            break
    assert (
        status == 503 and "The file of the votes cannot be read or written (database or disk is full)" in said["error"]
    )
    running.store._db.execute("PRAGMA max_page_count = 100000")
    assert ask(running, "/api/votes", body)[2] == {"stored": True}


def test_other_hosts_and_pages_are_refused(running):
    status, _, said = ask(running, "/", headers={"host": "evil.example:80"})
    assert status == 400 and "names the host 'evil.example': open http://localhost" in said["error"]
    body = {"rater": "ann"}
    status, _, said = ask(running, "/api/undo", body, headers={"origin": "http://evil.example"})
    assert status == 403 and "may not vote here" in said["error"]
    assert ask(running, "/api/undo", body, headers={"origin": running.url})[0] == 200


def test_token(start_server, capfd):
    running = start_server(token="secret-of-the-link")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": f"{module.COOKIE}=wrong"}):
        status, _, said = ask(running, "/api/progress", headers=headers)
        assert status == 401 and "token is missing or wrong" in said["error"] and "secret-of" not in said["error"]
    assert ask(running, "/?token=wrong")[0] == 401
    status, headers, _ = ask(running, "/?token=secret-of-the-link")
    cookie = headers["set-cookie"]
    assert status == 303 and headers["location"] == "./" and "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert ask(running, "/", headers={"cookie": cookie.split(";")[0]})[0] == 200
    assert ask(running, "/api/progress", headers={"authorization": "Bearer secret-of-the-link"})[0] == 200
    # Beyond loopback the name of the machine is not known, and the token lets in.
    assert (
        ask(running, "/api/progress", headers={"host": "m:1", "authorization": "Bearer secret-of-the-link"})[0] == 200
    )
    assert "secret-of-the-link" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("token", ["", "a+b/c=&d;e"])
def test_beyond_loopback_there_is_a_token(tmp_path, token):
    """Also where it is empty, as a variable that is not set; and the link lets in as soon as it is printed."""
    command = [sys.executable, "-m", "trl_fdfo.preference", "--host", "0.0.0.0", "--port", "0", "--token", token]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, cwd=tmp_path, text=True) as process:
        try:
            port, path = re.fullmatch(r"Vote at http://[^/]+:(\d+)(/.*)\n", process.stdout.readline()).groups()
            there = SimpleNamespace(port=int(port))
            assert ask(there, "/")[0] == ask(there, "/?token=")[0] == 401
            status, headers, _ = ask(there, path)
            assert status == 303
            assert ask(there, "/", headers={"cookie": headers["set-cookie"].split(";")[0]})[0] == 200
            sent = HumanPreference(f"http://127.0.0.1:{port}{path}")._token
            assert sent == (token or sent) and len(sent) > 8
            assert ask(there, "/", headers={"authorization": f"Bearer {sent}"})[0] == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_command_says_what_is_wrong(tmp_path, capsys, running):
    (tmp_path / "text").write_text("no votes")
    for arguments, words in (
        (["--database", str(tmp_path / "text")], "cannot be opened as a file of votes"),
        (["--port", "99999", "--database", str(tmp_path / "v.sqlite")], "cannot be listened on"),
        (["--port", str(running.port), "--database", str(tmp_path / "v.sqlite"), "serve"], "cannot be listened on"),
        (["--token", "a b", "--database", str(tmp_path / "v.sqlite")], "no header can carry it"),
        (["export", str(tmp_path / "none.sqlite"), str(tmp_path / "out")], "There is no file"),
        (["import", str(tmp_path / "none"), str(tmp_path / "out")], "no folder of an exported data set"),
        (["--port", str(running.port), "--database", str(tmp_path / "v.sqlite")], "cannot be listened on"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert words in str(ended.value), arguments
