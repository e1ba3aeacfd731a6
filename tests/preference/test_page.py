"""The page in a real browser, Chromium without a window: a person at the keyboard."""

import itertools
import shutil
import threading
from collections import Counter

import pytest
from PIL import Image

from trl_fdfo.preference.pairs import as_png, image_id, pair_key
from trl_fdfo.preference.store import Pair


sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium browser")
PHONE, SCREEN = {"width": 360, "height": 740}, {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, running):
    """Opens the page for a rater. All that it asks for must be of the server, and it must log no error."""
    requests, errors, contexts = [], [], {}

    def make(rater="ann", size=SCREEN, dark=False, tab_of=None):
        context = (
            tab_of.context if tab_of else browser.new_context(viewport=size, color_scheme="dark" if dark else "light")
        )
        contexts[id(context)] = context
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(running.url)
        if tab_of is None:
            page.keyboard.type(rater)  # the field has the focus
            page.keyboard.press("Enter")
        return page

    yield make
    for context in contexts.values():
        context.close()
    assert not errors
    assert requests and all(url.startswith(running.url + "/") or url.startswith("data:") for url in requests)


@pytest.fixture
def running(start_server):
    return start_server()


def add_pairs(running, count, size=32, prompt="a {} on a white background", votes_per_pair=1):
    """Pairs of a brighter and a darker image, each of its own; the ids of the brighter ones."""
    run, keys, brighter = running.store.open_run("demo", "me", votes_per_pair), [], set()
    for place in range(count):
        files = [as_png(Image.new("RGB", (size, size), (base + place % 50, 80, place // 50))) for base in (20, 180)]
        ids = list(map(image_id, files))
        brighter.add(ids[1])
        running.store.add(run, "me", 1, [Pair(prompt.format(place), *ids)], dict(zip(ids, files)))
        keys.append(pair_key(prompt.format(place), *ids))
    return run, keys, brighter


def shown(page):
    """The ids of both images, once they are there."""
    page.wait_for_selector("#vote:not([hidden])")
    return page.evaluate("[element('left').dataset.id, element('right').dataset.id]")


def press_and_wait(page, key):
    """Press a key, and wait until another pair is shown, or none."""
    before = shown(page)
    page.keyboard.press(key)
    page.wait_for_function(
        "before => element('vote').hidden ? !element('waiting').hidden && !loading && !busy :"
        " element('left').dataset.id + element('right').dataset.id !== before",
        arg="".join(before),
    )
    return before


def votes_on(running, run, keys):
    return running.store.verdicts(run, "me", keys)


@pytest.mark.slow
def test_two_hundred_pairs_by_keys_alone(running, open_page):
    """With ties, undo, a reload and a server that ends and starts again in the middle."""
    run, keys, brighter = add_pairs(running, 200)
    page, expected = open_page(), {}
    number = 0
    page.wait_for_selector("#vote:not([hidden])")
    while page.evaluate("element('waiting').hidden"):
        left, right = shown(page)
        pair, is_repeated = frozenset((left, right)), page.evaluate("queue[0].repeated")
        keys_of_choice = ("ArrowLeft", "a") if left in brighter else ("ArrowRight", "d")
        is_tie = number % 20 == 5
        press_and_wait(page, "ArrowUp" if is_tie else keys_of_choice[number % 2])
        if not is_repeated:  # which does not count
            expected[pair] = "tie" if is_tie else max(pair & brighter)
        number += 1
        if number == 60:
            page.keyboard.press("u")  # back to the last pair, which is shown as it was
            page.wait_for_function("id => element('left').dataset.id === id", arg=left)
            assert shown(page) == [left, right]
        if number == 100:
            page.reload()
        if number == 140:
            running.stop()
            restart = threading.Timer(1.5, running.start)
            restart.start()
        if number == 141:
            restart.join()
    for left_key, verdict in votes_on(running, run, keys).items():
        assert verdict["a"] + verdict["b"] + verdict["tie"] == 1, left_key
    counts = Counter()
    for pair, choice in expected.items():
        verdict = next(v for k, v in votes_on(running, run, keys).items() if k in keys_of(running, pair))
        name = "tie" if choice == "tie" else "a" if choice == min(pair) else "b"
        assert verdict[name] == 1
        counts[name] += 1
    assert counts["tie"] >= 5 and sum(counts.values()) == 200


def keys_of(running, pair):
    rows = running.store._db.execute("SELECT key FROM pairs WHERE a = ? AND b = ?", sorted(pair)).fetchall()
    return {row["key"] for row in rows}


def test_two_raters_at_once(running, open_page):
    run, keys, brighter = add_pairs(running, 12, votes_per_pair=2)
    ann, bob = open_page("ann"), open_page("bob")
    for number in range(12):
        for page in (ann, bob):
            left, _ = shown(page)
            press_and_wait(page, "ArrowLeft" if (left in brighter) == (page is ann or number % 4 > 0) else "ArrowRight")
    ann.wait_for_selector("#waiting:not([hidden])")
    verdicts = votes_on(running, run, keys)
    assert len(verdicts) == 12 and all(v["a"] + v["b"] == 2 for v in verdicts.values())
    assert sum(v["a"] == v["b"] for v in verdicts.values()) == 3
    ann.wait_for_function("() => element('status').textContent.includes('here too: bob')")
    ann.keyboard.press("r")
    ann.wait_for_function("() => element('numbers').textContent.includes('agree on 75% of 12 common pairs')")
    assert ann.locator("#raters tbody tr").count() == 2
    ann.locator("#raters input").nth(1).check()  # bob is left out, and his votes are asked for again
    ann.wait_for_function("() => element('numbers').textContent.startsWith('0 of 12')")


def test_two_tabs_vote_once(running, open_page):
    run, keys, _ = add_pairs(running, 3)
    one = open_page()
    other = open_page(tab_of=one)
    assert shown(one) == shown(other)
    press_and_wait(one, "ArrowLeft")
    press_and_wait(other, "ArrowRight")
    verdict = list(votes_on(running, run, keys).values())[0]
    assert verdict["a"] + verdict["b"] == 1 and running.store.progress()["votes"] == 1


def test_a_vote_waits_for_a_server_that_cannot_keep_it(running, open_page):
    run, keys, _ = add_pairs(running, 2)
    page = open_page()
    before = shown(page)
    away = running.database.with_name("away")
    running.database.rename(away)
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => element('status').textContent.includes('was deleted or replaced')")
    assert shown(page) == before
    away.rename(running.database)
    page.wait_for_function(
        "before => element('left').dataset.id + element('right').dataset.id !== before", arg="".join(before)
    )
    page.wait_for_function("() => element('status').textContent.startsWith('rollout 1')")
    assert len(votes_on(running, run, keys)) == 1


def test_any_text_is_shown_as_it_is(running, open_page):
    run = running.store.open_run("<b>run</b>", "me", 1)
    prompts = [
        "<img src=x onerror=alert(1)><script>document.title = 1</script>",
        "חתול על גג",
        "\U0001f98a" * 300,
        "w" * 20_000,
    ]
    for place, prompt in enumerate(prompts):
        files = [as_png(Image.new("RGB", (1, 1), (place, side, 0))) for side in (0, 90)]
        ids = list(map(image_id, files))
        running.store.add(run, "me", 1, [Pair(prompt, *ids)], dict(zip(ids, files)))
    page = open_page("<i>ann</i>", size=PHONE)
    for prompt in prompts:
        shown(page)
        page.wait_for_function("prompt => element('prompt').textContent === prompt", arg=prompt)
        assert overlaps(page) == ([], False)
        if prompt is prompts[1]:
            assert page.evaluate("getComputedStyle(element('prompt')).direction") == "rtl"
        page.keyboard.press("ArrowUp")
    for key in "pr":
        page.keyboard.press(key)
        page.wait_for_timeout(150)
        assert overlaps(page) == ([], False)
    assert page.locator("main b, main i, main script").count() == 0 and page.title() == "Which image is better?"


def test_past_votes_can_be_corrected(running, open_page):
    run, keys, _ = add_pairs(running, 2)
    page = open_page()
    left, _ = press_and_wait(page, "ArrowLeft")
    page.keyboard.press("p")
    choose = page.locator("#votes select")
    assert choose.input_value() == "left"
    choose.select_option("right")
    page.wait_for_function("() => document.querySelectorAll('#votes img')[1].className === 'chosen'")
    [verdict] = votes_on(running, run, keys).values()
    other = max(page.locator("#votes img").nth(n).get_attribute("src") for n in range(2))
    assert verdict["a" if f"images/{left}.png" == other else "b"] == 1
    page.keyboard.press("p")
    shown(page)


def overlaps(page):
    """Pairs of visible controls that lie over each other, and whether the page is wider than its window."""
    boxes = page.evaluate(
        "[...document.querySelectorAll('button, select, h1, #status, #bar')].filter(e => e.offsetParent).map(e => "
        "{ const b = e.getBoundingClientRect(); return [e.textContent || e.id, b.left, b.top, b.right, b.bottom]; })"
    )
    over = [
        (a[0], b[0])
        for a, b in itertools.combinations(boxes, 2)
        if min(a[3], b[3]) - max(a[1], b[1]) > 1 and min(a[4], b[4]) - max(a[2], b[2]) > 1
    ]
    wide = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    return over, wide


@pytest.mark.parametrize("size", [PHONE, SCREEN], ids=["phone", "screen"])
@pytest.mark.parametrize("pixels", [32, 512, 1024])
def test_nothing_overlaps(running, open_page, size, pixels, tmp_path):
    add_pairs(running, 3, pixels, prompt="a long prompt of a painting of a {} " + 12 * "on a white background, ")
    page = open_page(size=size, dark=pixels == 512)
    for keys in ("", "z", "p", "r"):
        if keys:
            page.keyboard.press(keys)
        page.wait_for_timeout(150)
        assert overlaps(page) == ([], False), keys
        page.screenshot(path=tmp_path / f"{pixels}-{size['width']}-{keys or 'vote'}.png")
        if keys == "z":
            page.keyboard.press("z")
        elif keys:
            page.keyboard.press(keys)
        sides = page.evaluate(
            "['left', 'right'].map(e => { const b = element(e).getBoundingClientRect(); return b.width - b.height; })"
        )
        assert keys in ("p", "r") or max(map(abs, sides)) < 1, "squares are squares"
    if size == SCREEN and pixels == 512:
        width = page.evaluate("element('left').getBoundingClientRect().width")
        assert width == 512, "its true size"


def test_everything_has_a_name_and_contrast(running, open_page):
    add_pairs(running, 1)
    for dark in (False, True):
        page = open_page(f"rater {dark}", dark=dark)
        shown(page)
        nameless = page.evaluate(
            "[...document.querySelectorAll('button, select, input, img')].filter(e => e.offsetParent && "
            "!(e.textContent.trim() || e.getAttribute('aria-label') || e.alt || e.labels?.length)).map(e => e.outerHTML)"
        )
        assert nameless == []
        ratios = page.evaluate(
            """[...document.querySelectorAll('h1, button, #status')].filter(e => e.offsetParent && e.textContent.trim()).map(e => {
              const parse = (text) => text.match(/[\\d.]+/g).map(Number);
              const light = (c) => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
              let behind = e, back;
              do { back = parse(getComputedStyle(behind).backgroundColor); behind = behind.parentElement; } while (back[3] === 0 && behind);
              const [x, y] = [light(parse(getComputedStyle(e).color)), light(back)];
              return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
            })"""
        )
        assert len(ratios) > 5 and min(ratios) >= 4.5  # WCAG AA
