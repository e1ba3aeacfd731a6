"""People as a reward, who are programs here: the whole way from a trainer over HTTP to the page's interface and back."""

import asyncio
import contextlib
import io
import json
import math
import sys
import threading
import time
from types import SimpleNamespace

import kill_votes
import pytest
import torch
from conftest import logged, trained_weights
from kill_votes import by_red
from PIL import Image
from scripted_rater import ScriptedRater
from transformers import TrainerState

from trl_fdfo.media import to_pil
from trl_fdfo.preference.cli import main
from trl_fdfo.preference.server import MAX_BODY, MAX_IMAGE, MAX_PAIRS
from trl_fdfo.preference.store import LEASE
from trl_fdfo.rewards import JPEGCompressibility, PairwiseJudge, RewardFunctions, load_reward
from trl_fdfo.rewards.human_preference import HumanPreference, HumanPreferenceError, human
from trl_fdfo.rewards.reward_functions import settings_of


@pytest.fixture
def voting(start_server):
    """Starts a server and raters; `voting(n, ...)` adds one."""
    running, over, raters = start_server(), threading.Event(), []

    def add(name="ann", **options):
        rater = ScriptedRater(running.url, name, **{"prefer": by_red, **options})
        thread = threading.Thread(target=rater.run, args=(over.is_set,), daemon=True)
        thread.start()
        raters.append((rater, thread))
        return rater

    add.url, add.running = running.url, running
    yield add
    over.set()
    for _, thread in raters:
        thread.join(10)


def images_of(count, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def score(reward, images, prompts, num_generations=2):
    result = reward(
        images=to_pil(images), prompts=prompts, num_generations=num_generations, trainer_state=TrainerState()
    )
    return asyncio.run(result)


def test_rewards_are_half_the_votes(voting):
    voting()
    images, prompts = images_of(6), ["a", "a", "b", "b", "c", "c"]
    images[5] = images[4]
    scores = score(human(voting.url), images, prompts)
    expected = [by_red(one, other, "") for one, other in zip(to_pil(images)[::2], to_pil(images)[1::2])]
    assert scores[0::2] == [0.5 * ((value > 0) - (value < 0)) for value in expected]
    assert scores[1::2] == [-value for value in scores[0::2]] and scores[4:] == [0.0, 0.0], "the same image twice"


def test_four_images_of_a_prompt_are_compared_in_pairs(voting):
    rater = voting()
    scores = score(human(voting.url), images_of(4), ["a"] * 4, num_generations=4)
    assert sum(scores) == pytest.approx(0, abs=1e-9) and rater.votes == 6
    reds = [by_red(image, image.point(lambda _: 0), "") for image in to_pil(images_of(4))]
    assert max(zip(scores, reds))[1] == max(reds)


def test_a_rollout_shows_for_how_many_votes_it_waits(voting, make_trainer, capsys):
    reward = human(voting.url)
    rewards = [reward, lambda images: images.mean(dim=(1, 2, 3))]
    trainer = make_trainer(reward_fn=rewards, disable_tqdm=False, num_rollouts=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    while reward.waiting() < 4:  # a pair of each prompt of the rollout
        time.sleep(0.01)
    time.sleep(0.3)
    voting()
    thread.join(60)
    assert reward.waiting() == 0
    assert logged(trainer, "rewards/human/waiting") == [4.0] and not logged(trainer, "rewards/lambda/waiting")
    assert "human waits for 4" in capsys.readouterr().err


def test_where_the_votes_are_asked_for_does_not_change_the_run():
    here = human("http://localhost:1", run="a", database="a.sqlite", votes_per_pair=2)
    there = human("http://localhost:2", run="b", votes_per_pair=2)
    assert settings_of(here) == settings_of(there) != settings_of(human("http://localhost:1", run="a"))
    assert "'votes_per_pair': '2'" in settings_of(here)
    assert not any(word in settings_of(here) for word in ("localhost", "run", "sqlite", "no_effect"))


def test_a_run_says_that_its_pairs_have_votes(voting, caplog):
    voting()
    images, prompts = images_of(4), ["a", "a", "b", "b"]
    first = human(voting.url, run="again")
    scores = score(first, images, prompts)
    assert "asked for before" not in caplog.text
    voting.running.store._clock = lambda: time.time() + LEASE  # the first trainer has ended
    assert score(human(voting.url, run="again"), images, prompts) == scores
    assert "2 pairs of the run 'again' were asked for before: their votes count. Another `run` asks anew" in caplog.text


def test_votes_of_several_people(voting):
    voting("ann")
    voting("bob", prefer=lambda *pair: -by_red(*pair))
    voting("cat")
    images, prompts = images_of(2), ["a", "a"]
    one = abs(score(human(voting.url, run="mean", votes_per_pair=3), images, prompts)[0])
    assert one == pytest.approx((2 - 1) / 3 / 2)
    odds = abs(score(human(voting.url, run="odds", votes_per_pair=3, scale="log_odds"), images, prompts)[0])
    assert odds == pytest.approx(torch.tensor(2.5 / 1.5).log().item() / 2)


def test_a_video_is_an_animation(voting):
    seen = []

    def watch(left, right, prompt):
        seen.append(prompt)
        return 1

    rater = voting(prefer=watch)
    videos = images_of(8).unflatten(0, (2, 4))
    reward = human(voting.url)
    scores = asyncio.run(
        reward(images=to_pil(videos), prompts=["a", "a"], num_generations=2, trainer_state=None, frame_rate=4.0)
    )
    assert sorted(scores) == [-0.5, 0.5]
    pair = voting.running.store.past("ann")[0]
    animated = Image.open(io.BytesIO(rater.ask(f"images/{pair['left']}.png")))
    assert animated.n_frames == 4 and animated.info["duration"] == 250 and seen == ["a"]


def test_a_run_goes_on_without_the_pairs_that_nobody_votes_on(voting):
    images, prompts = images_of(4), ["a", "a", "b", "b"]
    start = time.monotonic()
    assert score(human(voting.url, patience=0.5), images, prompts) == [None] * 4
    assert time.monotonic() - start >= 0.5
    # For good: the resumed run must not differ.
    voting()
    time.sleep(0.3)
    voting.running.store._clock = lambda: time.time() + LEASE  # the first trainer has ended
    assert score(human(voting.url, patience=0.5), images, prompts) == [None] * 4


def test_a_second_reward_stands_in(voting):
    def darkness(images, prompts):
        return -images.mean(dim=(1, 2, 3))

    images, prompts = images_of(4), ["a", "a", "b", "b"]
    scores = score(human(voting.url, patience=0.3, stand_in=darkness), images, prompts)
    darker = images[0::2].mean(dim=(1, 2, 3)) < images[1::2].mean(dim=(1, 2, 3))
    assert scores[0::2] == [0.5 if first else -0.5 for first in darker]


class Slow:
    """In a thread of its own, as learned rewards of other services are."""

    background = True

    def __call__(self, images, prompts):
        return images[:, 0].mean(dim=(1, 2))


async def answered_later(images, prompts):
    await asyncio.sleep(0.01)
    return images[:, 0].mean(dim=(1, 2))


def by_pairs(first, second, prompts):
    return [float((a - b)[0].mean()) for a, b in zip(first, second)]


@pytest.mark.parametrize(
    "stand_in", [answered_later, Slow(), PairwiseJudge(by_pairs)], ids=["async", "thread", "judge"]
)
def test_any_kind_of_reward_stands_in(voting, stand_in):
    images = images_of(4)
    functions = RewardFunctions(human(voting.url, patience=0.3, stand_in=stand_in))  # on the event loop of the package
    scores = functions(images, ["a", "a", "b", "b"], TrainerState(), {}, 2).flatten().tolist()
    redder = images[0::2, 0].mean(dim=(1, 2)) > images[1::2, 0].mean(dim=(1, 2))
    assert scores[0::2] == [0.5 if first else -0.5 for first in redder]


def test_a_server_that_is_back_is_asked_again(start_server):
    running = start_server()
    reward, images = human(running.url, patience=0.3), images_of(2)
    running.stop()
    module = sys.modules[HumanPreference.__module__]
    original, module._FIRST_ANSWER = module._FIRST_ANSWER, 0.1
    try:
        with pytest.raises(HumanPreferenceError):
            score(reward, images, ["a", "a"])
    finally:
        module._FIRST_ANSWER = original
    running.start()
    assert score(reward, images, ["a", "a"]) == [None, None]


@pytest.mark.parametrize(("wins", "losses", "ties"), [(1, 0, 0), (0, 3, 0), (1, 1, 2), (2, 1, 1)])
def test_votes_and_their_exported_mean_have_the_same_log_odds(wins, losses, ties):
    reward, votes = HumanPreference(scale="log_odds"), wins + losses + ties
    expected = math.log((wins + ties / 2 + 0.5) / (losses + ties / 2 + 0.5))
    assert reward._preference({"a": wins, "b": losses, "tie": ties}) == pytest.approx(expected)
    reward._exported = {"key": ((wins - losses) / votes, votes)}
    assert reward._replayed("key", "a prompt", "a", "b") == pytest.approx(expected)
    assert reward._replayed("key", "a prompt", "b", "a") == pytest.approx(-expected)


def test_a_vote_can_be_taken_back_until_the_last_one_is_there(start_server):
    running = start_server()
    reward = human(running.url)
    images, rater, scores = images_of(4), ScriptedRater(running.url), []
    thread = threading.Thread(target=lambda: scores.append(score(reward, images, ["a", "a", "b", "b"])))
    thread.start()

    def vote_for(pair, index):
        """For the image of this index of its prompt, whichever place it is in."""
        place = {"a": 0, "b": 2}[pair["prompt"]] + index
        left = Image.open(io.BytesIO(rater.ask(f"images/{pair['left']}.png")))
        choice = "left" if left.tobytes() == to_pil(images)[place].tobytes() else "right"
        rater.ask("api/votes", {"rater": "ann", "pair": pair["id"], "choice": choice, "left": pair["left"]})

    while len(pairs := json.loads(rater.ask("api/next?rater=ann&count=2"))["pairs"]) < 2:
        time.sleep(0.02)
    vote_for(pairs[0], 0)
    while reward.waiting() != 1:  # the trainer has this vote
        time.sleep(0.01)
    again = json.loads(rater.ask("api/undo", {"rater": "ann"}))["pair"]
    assert again["id"] == pairs[0]["id"]
    vote_for(pairs[1], 0)
    while reward.waiting() != 1:  # it has the second, and asks for the first again
        time.sleep(0.01)
    vote_for(again, 1)
    thread.join(20)
    rewards = {"a": scores[0][:2], "b": scores[0][2:]}
    assert rewards[pairs[0]["prompt"]] == [-0.5, 0.5] and rewards[pairs[1]["prompt"]] == [0.5, -0.5]


class Recorded(HumanPreference):
    """Keeps its requests instead of sending them; each pair has a vote."""

    async def _connect(self):
        self._client = SimpleNamespace(session=contextlib.nullcontext)
        self.sent = []

    async def _post(self, session, path, body):
        self.sent.append((path, body))
        verdict = {"a": 1, "b": 0, "tie": 0, "expired": False}
        verdicts = dict.fromkeys(body.get("keys", ()), verdict)
        return {"added": len(body.get("pairs", ())), "verdicts": verdicts, "idle": 0.0}


def test_requests_stay_within_the_limits_of_the_server():
    preference, png = Recorded(), b"x" * (11 * 2**20)
    many = {f"key {n}": ("a", (f"{n} left", f"{n} right"), (b"l", b"r")) for n in range(1201)}
    large = {f"large {n}": ("a", (f"L{n}", f"R{n}"), (png, png)) for n in range(3)}
    assert len(asyncio.run(preference._ask(many | large, None))) == 1204
    sizes, seen = [], set()
    for path, body in preference.sent:
        if path == "/verdicts":
            assert 0 < len(body["keys"]) <= MAX_PAIRS
        if path == "/pairs":
            sizes.append(len(json.dumps(body)))
            seen |= body["images"].keys()
            assert all({left, right} <= seen for _, left, right in body["pairs"])
    assert max(sizes) < MAX_BODY / 2 and len(seen) == 2 * 1204
    # An image at the limit still fits into a request of its own.
    assert MAX_IMAGE * 4 / 3 < MAX_BODY


def test_two_trainers_with_one_name(voting):
    voting()
    images, prompts = images_of(2), ["a", "a"]
    first = human(voting.url)
    score(first, images, prompts)
    now = time.time()
    voting.running.store._clock = lambda: now  # the first one is at work
    other = HumanPreference(voting.url)
    import trl_fdfo.rewards.human_preference as module

    with pytest.raises(HumanPreferenceError, match="Another trainer is at work on the run 'run'"):
        original, module._FIRST_ANSWER = module._FIRST_ANSWER, 0.5
        try:
            asyncio.run(other.compare(*zip(to_pil(images)), ["a"]))
        finally:
            module._FIRST_ANSWER = original


def test_wrong_token_is_said(start_server):
    running = start_server(token="right")
    with pytest.raises(HumanPreferenceError, match="401.*token is missing or wrong"):
        score(human(running.url, token="another"), images_of(2), ["a", "a"])


def test_bad_arguments_are_refused():
    for arguments, words in (
        ({"url": "localhost:8300"}, "must be an address such as http://localhost:8300"),
        ({"votes_per_pair": 0}, "must be at least 1"),
        ({"scale": "odds"}, "not one of 'mean', 'log_odds'"),
        ({"patience": 0}, "more than 0 seconds"),
        ({"stand_in": by_red}, "set patience="),
        (
            {"stand_in": lambda images, tag: images, "patience": 1},
            "needs the argument 'tag', and a pair that is voted on has",
        ),
        ({"url": "http://localhost:1", "verdicts": "folder"}, "leave url out"),
        ({"verdicts": "no folder"}, "no folder is no folder of an exported data set"),
    ):
        with pytest.raises(ValueError, match=words):
            HumanPreference(**arguments)


def test_by_name():
    spec = "human(url='http://localhost:1', patience=3, stand_in='jpeg_compressibility', run='x')"
    preference = load_reward(spec).compare.__self__
    assert isinstance(preference.stand_in, JPEGCompressibility) and preference.run == "x"
    with pytest.raises(ValueError, match="reward 'human.ran='x'.': got an unexpected keyword argument 'ran'"):
        load_reward("human(ran='x')")


def test_a_process_of_several_needs_a_server(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start one by `trl-fdfo vote`"):
        HumanPreference()
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert HumanPreference("http://localhost:1")._owner == HumanPreference("http://localhost:1")._owner == "host:1234"


def test_a_run_is_replayed_from_an_export_without_people(voting, make_trainer, tmp_path, capsys):
    voting()
    trainer = make_trainer(reward_fn=load_reward(f"human(url='{voting.url}', run='first')"))
    trainer.train()
    assert "Vote on the run 'first' at http://127.0.0.1" in capsys.readouterr().out
    # Eight pairs, fewer if two images of a pair are the same.
    assert 0 < voting.running.store.progress("first")["all_pairs"] <= 8
    weights = trained_weights(trainer)
    database, folder = voting.running.database, tmp_path / "votes"
    main(["export", str(database), str(folder), "--run", "first"])
    replayed = make_trainer(reward_fn=human(verdicts=str(folder)))
    replayed.train()
    for name, weight in trained_weights(replayed).items():
        assert torch.equal(weight, weights[name])
    with pytest.raises(ValueError, match="have none on a pair of the prompt .* another run, pipeline, seed"):
        make_trainer(reward_fn=human(verdicts=str(folder)), seed=7).train()

    # The same by a database that has got the export.
    main(["import", str(tmp_path / "other.sqlite"), str(folder), "--run", "again"])
    voting.running.stop()
    voting.running.database = tmp_path / "other.sqlite"
    voting.running.start()
    time.sleep(0.1)
    third = make_trainer(reward_fn=human(voting.url, run="again", patience=60))
    third.train()
    for name, weight in trained_weights(third).items():
        assert torch.equal(weight, weights[name])


def test_server_that_is_killed_and_started_again(voting, make_trainer):
    rater = voting()
    whole = make_trainer(reward_fn=human(voting.url, run="whole"), num_rollouts=4)
    whole.train()
    votes = rater.votes
    trainer = make_trainer(reward_fn=human(voting.url, run="broken"), num_rollouts=4)
    over = threading.Event()

    def interrupt():
        while not over.wait(0.4):
            voting.running.stop()
            time.sleep(0.2)
            voting.running.start()

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    try:
        trainer.train()
    finally:
        over.set()
        interrupting.join()
    for name, weight in trained_weights(trainer).items():
        assert torch.equal(weight, trained_weights(whole)[name])
    assert logged(trainer, "reward_std") == logged(whole, "reward_std") and rater.votes >= votes


def test_the_trainer_starts_a_server_of_its_own(make_trainer, tmp_path):
    reward = human(database=str(tmp_path / "votes.sqlite"))
    owner = reward.compare.__self__
    trainer = make_trainer(reward_fn=reward, num_rollouts=1)
    rater, killed, over = [], [], threading.Event()

    def vote():
        while owner.waiting() == 0:
            time.sleep(0.05)
        killed.append(owner._process)
        owner._process.kill()  # another takes its place, on the same port
        rater.append(ScriptedRater(owner.url, prefer=by_red))
        rater[0].run(over.is_set)

    thread = threading.Thread(target=vote, daemon=True)
    thread.start()
    trainer.train()
    over.set()
    thread.join(10)
    assert rater[0].votes > 0
    process = owner._process
    assert process.pid != killed[0].pid
    owner._end_server()
    assert process.wait(10) is not None


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit_with_a_person(voting, tmp_path, warm_python):
    """The trainer is killed after its first checkpoint, and the server too; then both go on."""
    voting()
    kill_votes.run_here(tmp_path / "whole", voting.url)
    checkpoint = tmp_path / "killed" / "out" / "checkpoint-2"
    process = kill_votes.start(tmp_path / "killed", voting.url, python=warm_python.path)
    while not (checkpoint / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    kill_votes.kill(process)
    assert not (tmp_path / "killed" / "weights.pt").exists()
    voting.running.stop()
    voting.running.start()
    kill_votes.finish(kill_votes.start(tmp_path / "killed", voting.url, python=warm_python.path))
    assert kill_votes.same_weights(tmp_path / "whole", tmp_path / "killed")
