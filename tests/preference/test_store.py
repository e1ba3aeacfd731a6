"""The file of pairs and votes, without a server."""

import os
import random

import pytest

from trl_fdfo.preference.pairs import image_id, pair_key
from trl_fdfo.preference.store import LEASE, REPEATED_AFTER, Pair, Refused, Store


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    store = Store(tmp_path / "votes.sqlite", clock)
    yield store
    store.close()


def add(store, count=4, run="run", owner="me", votes_per_pair=1, rollout=1, start=0):
    """Pairs of two images of their own; the id of the run, and the keys."""
    number, keys = store.open_run(run, owner, votes_per_pair), []
    for place in range(start, start + count):
        files = [f"{run} {place} {side}".encode() for side in range(2)]
        ids = list(map(image_id, files))
        store.add(number, owner, rollout, [Pair(f"prompt {place}", *ids)], dict(zip(ids, files)))
        keys.append(pair_key(f"prompt {place}", *ids))
    return number, keys


def a_of(pair):
    return min(pair["left"], pair["right"])


def vote_for_a(store, rater, pair, for_a=True):
    choice = "left" if (pair["left"] == a_of(pair)) == for_a else "right"
    return store.vote(rater, pair["id"], choice, pair["left"], pair["repeated"])


def test_key_of_a_pair_is_its_content_in_any_order():
    assert pair_key("a", "1", "2") == pair_key("a", "2", "1")
    assert len({pair_key("a", "1", "2"), pair_key("b", "1", "2"), pair_key("a", "1", "3")}) == 3


def test_verdict_is_of_the_image_and_not_of_the_place(store):
    run, keys = add(store, 30)
    lefts = 0
    while pairs := store.next_pairs("ann"):
        [pair] = pairs
        lefts += pair["left"] == a_of(pair) and not pair["repeated"]
        vote_for_a(store, "ann", pair)
    assert lefts == 15, "each place gets half of the images"
    assert store.verdicts(run, "me", keys) == {key: {"a": 1, "b": 0, "tie": 0, "expired": False} for key in keys}


def test_a_pair_is_shown_to_a_rater_in_one_way(store):
    add(store, 1)
    shown = store.next_pairs("ann")
    assert all(store.next_pairs("ann") == shown for _ in range(10))


def test_pairs_loaded_ahead_are_others(store):
    add(store, 5)
    first = store.next_pairs("ann", 3)
    second = store.next_pairs("ann", 3, [pair["id"] for pair in first])
    assert len({pair["id"] for pair in first + second}) == 5


def test_tie_and_both_bad_are_for_neither(store):
    run, keys = add(store, 2)
    for choice in ("tie", "both_bad"):
        [pair] = store.next_pairs("ann")
        store.vote("ann", pair["id"], choice, pair["left"])
    assert all(verdict["tie"] == 1 for verdict in store.verdicts(run, "me", keys).values())
    assert [pair["choice"] for pair in store.past("ann")] == ["both_bad", "tie"]


def test_two_tabs_vote_once(store):
    run, keys = add(store, 1)
    [pair] = store.next_pairs("ann")
    assert vote_for_a(store, "ann", pair)
    assert not vote_for_a(store, "ann", pair, for_a=False)
    assert store.verdicts(run, "me", keys)[keys[0]]["a"] == 1


def test_several_votes_per_pair_and_a_rater_who_is_left_out(store):
    run, keys = add(store, 1, votes_per_pair=2)
    vote_for_a(store, "ann", store.next_pairs("ann")[0])
    assert store.verdicts(run, "me", keys) == {} and store.next_pairs("ann") == []
    vote_for_a(store, "bob", store.next_pairs("bob")[0], for_a=False)
    assert store.verdicts(run, "me", keys)[keys[0]] == {"a": 1, "b": 1, "tie": 0, "expired": False}
    assert store.next_pairs("cat") == []
    assert store.progress()["agreement"] == {"compared": 1, "same": 0}
    store.set_excluded("bob", True)
    assert store.verdicts(run, "me", keys) == {} and store.progress()["agreement"]["compared"] == 0
    vote_for_a(store, "cat", store.next_pairs("cat")[0])
    assert store.verdicts(run, "me", keys)[keys[0]]["a"] == 2
    with pytest.raises(Refused, match="no rater 'dan'"):
        store.set_excluded("dan", True)


def test_undo_and_change(store, clock):
    run, keys = add(store, 2)
    for _ in range(2):
        clock.now += 1
        [pair] = store.next_pairs("ann")
        vote_for_a(store, "ann", pair)
    back = store.undo("ann")
    assert back["id"] == pair["id"] and back["left"] == pair["left"] and len(store.past("ann")) == 1
    assert store.next_pairs("ann")[0]["id"] == pair["id"]
    [kept] = store.past("ann")
    other = {"left": "right", "right": "left"}[kept["choice"]]
    assert store.vote("ann", kept["id"], other, kept["left"], change=True)
    assert store.verdicts(run, "me", keys)[keys[0]] == {"a": 0, "b": 1, "tie": 0, "expired": False}
    assert store.undo("ann")["id"] == kept["id"] and store.undo("ann") is None


def test_repeated_pairs_tell_the_agreement_with_oneself_and_nothing_else(store, clock):
    run, keys = add(store, 400)
    rng, again = random.Random(0), 0
    while pairs := store.next_pairs("ann", 2):
        for pair in pairs:
            clock.now += 1
            again += pair["repeated"]
            # Always the same of fresh pairs, and half of the time of repeated ones.
            vote_for_a(store, "ann", pair, for_a=not pair["repeated"] or rng.random() < 0.5)
    assert 5 < again < 60 and REPEATED_AFTER == 10
    [ann] = store.progress()["raters"]
    assert ann["repeated"] == again and 0 < ann["same"] < again and ann["votes"] == 400 + again
    assert all(verdict["a"] == 1 for verdict in store.verdicts(run, "me", keys).values())


def test_resubmitted_pairs_have_their_verdicts(store, tmp_path, clock):
    run, keys = add(store, 3)
    vote_for_a(store, "ann", store.next_pairs("ann")[0])
    store.close()
    clock.now += LEASE + 1
    again = Store(tmp_path / "votes.sqlite", clock)
    same, same_keys = add(again, 3, owner="the resumed trainer")
    assert (same, same_keys) == (run, keys)
    assert list(again.verdicts(run, "the resumed trainer", keys)) == [keys[0]]
    again.close()
    store.__init__(tmp_path / "votes.sqlite", clock)  # to be closed again


def test_two_runs_of_one_name_are_refused(store, clock):
    run, keys = add(store, 1)
    assert store.open_run("run", "me", 1) == run  # another process of the trainer
    with pytest.raises(Refused, match="Another trainer is at work on the run 'run'.*another name") as refused:
        store.open_run("run", "you", 1)
    assert refused.value.status == 409
    clock.now += LEASE + 1
    assert store.open_run("run", "you", 1) == run
    for ask in (store.verdicts, store.expire):
        with pytest.raises(Refused, match="opened this run since"):
            ask(run, "me", keys)
    with pytest.raises(Refused, match="no run 77"):
        store.verdicts(77, "me", keys)


def test_a_clock_that_is_set_back_changes_nothing(store, clock):
    run, _ = add(store, 3)
    for _ in range(2):
        clock.now -= 86_400
        [last] = store.next_pairs("ann")
        vote_for_a(store, "ann", last)
    assert store.past("ann")[0]["id"] == last["id"]
    clock.now += 5
    assert store.idle_seconds(run) == 5 and store.progress()["raters"][0]["is_there"]
    assert store.undo("ann")["id"] == last["id"]
    assert store.open_run("run", "you", 1) == run  # its trainer was seen a day or two from now, and is not there


def test_a_file_that_is_deleted_is_said(store, tmp_path):
    run, keys = add(store, 1)
    [pair] = store.next_pairs("ann")
    path = tmp_path / "votes.sqlite"
    os.rename(path, tmp_path / "away")
    for copy in (False, True):
        if copy:
            path.write_bytes(b"")
        with pytest.raises(
            Refused, match="votes.sqlite, was deleted or replaced .* move it back, or end the server"
        ) as refused:
            vote_for_a(store, "ann", pair)
        assert refused.value.status == 503
    os.rename(tmp_path / "away", path)
    assert vote_for_a(store, "ann", pair) and store.verdicts(run, "me", keys)


def test_what_is_no_file_of_votes_is_said(tmp_path):
    (tmp_path / "other").write_text("no database at all")
    for path in (tmp_path / "other", tmp_path / "no folder" / "votes.sqlite"):
        with pytest.raises(ValueError, match="cannot be opened as a file of votes .*give the path"):
            Store(path)


def test_expired_pairs_are_not_asked_for(store):
    run, keys = add(store, 2)
    vote_for_a(store, "ann", store.next_pairs("ann")[0])
    store.expire(run, "me", keys)
    assert store.next_pairs("ann") == []
    verdicts = store.verdicts(run, "me", keys)
    assert not verdicts[keys[0]]["expired"] and verdicts[keys[1]] == {"a": 0, "b": 0, "tie": 0, "expired": True}


def test_forged_votes_are_refused(store):
    add(store, 2)
    first, second = store.next_pairs("ann", 2)
    with pytest.raises(Refused, match="no pair 99"):
        store.vote("ann", 99, "left", first["left"])
    with pytest.raises(Refused, match="not one of the pair's"):
        store.vote("ann", first["id"], "left", second["left"])
    with pytest.raises(Refused, match="choice='up' is not one of left, right, tie, both_bad"):
        store.vote("ann", first["id"], "up", first["left"])
    name = "x'); DROP TABLE votes; --"
    [pair] = store.next_pairs(name)
    assert store.vote(name, pair["id"], "left", pair["left"])
    assert store.past(name)[0]["choice"] == "left" and store.next_pairs("ann")


def test_runs_do_not_see_each_other(store):
    _, keys = add(store, 2, run="one", owner="a")
    other, _ = add(store, 2, run="two", owner="b")
    with pytest.raises(Refused, match="no pair"):
        store.verdicts(other, "b", keys)
    assert {pair["run"] for pair in store.next_pairs("ann", 4, run="one")} == {"one"}
    assert {pair["run"] for pair in store.next_pairs("ann", 4)} == {"one", "two"}
