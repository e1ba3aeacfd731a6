"use strict";

// Votes on pairs of images. The next pairs are loaded ahead; a vote is on the server's disk before the page moves on.

const AHEAD = 3;
const KEYS = {
  ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "both_bad",
  a: "left", d: "right", w: "tie", s: "both_bad",
};
const ACTIONS = { u: "undo", Backspace: "undo", z: "zoom", p: "past", r: "run" };
const element = (id) => document.getElementById(id);
let rater = localStorage.getItem("rater") || "";
let queue = [];          // pairs that are loaded, the shown one first
let busy = false;        // a vote is on its way
let view = "vote";       // or "past", "run", "who"
let loading = null;
let numbers = null;      // what the server last said of the run
let silent = false;      // the server does not answer, or cannot keep votes

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  const answer = await fetch(path, options);
  const said = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(said.error), { said: true, refused: answer.status < 500 });
  return said;
}

// Asks again until the server answers: a vote is lost neither to a network, nor to a server that starts anew or cannot write.
async function insist(path, body) {
  for (let attempt = 0; ; attempt++) {
    try {
      const said = await ask(path, body);
      if (attempt) answers();
      return said;
    } catch (error) {
      if (error.refused) throw error;
      silent = true;
      trouble(error.said ? `${error.message} Trying again ...` : "The server does not answer. Trying again ...");
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

function answers() {
  silent = false;
  trouble("");
}

function trouble(text) {
  element("status").classList.toggle("trouble", text !== "");
  if (text) element("status").textContent = text; else showNumbers();
}

const url = (id) => `images/${id}.png`;
const query = (fields) => new URLSearchParams({ rater, run: element("runs").value, ...fields });

async function loaded(pair) {
  pair.images = await Promise.all([pair.left, pair.right].map(async (id) => {
    const image = make("img", { src: url(id) });
    await image.decode().catch(() => { throw new Error(`The browser cannot show an image of "${pair.prompt.slice(0, 80)}". Trying again ...`); });
    return image;
  }));
  return pair;
}

// Fills the queue. Only one request is on its way at a time, so no pair comes twice.
function fill() {
  loading = loading || (async () => {
    try {
      const but_not = queue.filter((pair) => !pair.repeated).map((pair) => pair.id).join(",");
      const { pairs } = await insist("api/next?" + query({ count: AHEAD - queue.length, but_not }));
      const fresh = pairs.filter((pair) => !queue.some((known) => known.id === pair.id && known.repeated === pair.repeated));
      const tried = await Promise.allSettled(fresh.map(loaded));
      queue.push(...tried.filter((one) => one.status === "fulfilled").map((one) => one.value));
      const failed = tried.find((one) => one.status === "rejected");
      if (failed) trouble(failed.reason.message); else if (fresh.length) answers();
    } catch (error) {
      trouble(error.message);
    } finally {
      loading = null;
    }
    show();
  })();
  return loading;
}

function show() {
  const pair = queue[0];
  for (const name of ["who", "past", "run"]) element(name).hidden = view !== name;
  element("vote").hidden = view !== "vote" || !pair;
  element("waiting").hidden = view !== "vote" || Boolean(pair) || loading !== null;
  for (const name of ["past", "run"]) document.querySelector(`[data-action=${name}]`).setAttribute("aria-pressed", view === name);
  element("rater").textContent = rater;
  element("prompt").textContent = view === "vote" && pair ? pair.prompt : "Which image is better?";
  if (!pair) return;
  ["left", "right"].forEach((side, place) => {
    const shown = element(side), image = pair.images[place];
    if (shown.dataset.id === pair[side]) return;
    shown.dataset.id = pair[side];
    shown.src = image.src;
    // Tiny images are shown larger, by a whole number.
    const factor = Math.floor(192 / Math.max(image.naturalWidth, image.naturalHeight));
    shown.classList.toggle("small", factor > 1);
    if (factor > 1) shown.width = factor * image.naturalWidth; else shown.removeAttribute("width");
    shown.alt = `${side} image for: ${pair.prompt}`;
  });
}

async function vote(choice) {
  const pair = queue[0];
  if (busy || view !== "vote" || !pair) return;
  busy = true;
  try {
    const body = { rater, pair: pair.id, choice, left: pair.left, repeated: pair.repeated };
    await insist("api/votes", body);
    queue.shift();
    fill();
    show();
  } catch (error) {
    queue.shift();
    trouble(error.message);
    fill();
  } finally {
    busy = false;
  }
}

async function undo() {
  if (busy || !rater) return;
  busy = true;
  try {
    if (loading) await loading;
    const { pair } = await insist("api/undo", { rater, run: element("runs").value });
    if (pair) {
      queue = queue.filter((known) => known.id !== pair.id || known.repeated !== pair.repeated);
      queue.unshift(await loaded(pair));
    }
    view = "vote";
    show();
  } catch (error) {
    trouble(error.message);
  } finally {
    busy = false;
  }
}

// Shows on the page what the server refuses.
function tell(act) {
  return act().catch((error) => trouble(error.message));
}

async function showPast() {
  const { pairs } = await insist("api/past?" + query({}));
  const rows = pairs.map((pair) => {
    const row = make("li");
    const images = ["left", "right"].map((side) => make("img", { src: url(pair[side]), alt: `${side} image`, className: pair.choice === side ? "chosen" : "" }));
    const choose = make("select", { ariaLabel: `Vote on: ${pair.prompt}` });
    for (const choice of ["left", "right", "tie", "both_bad"]) {
      choose.append(make("option", { value: choice, textContent: choice.replace("_", " "), selected: choice === pair.choice }));
    }
    choose.addEventListener("change", () => tell(async () => {
      await insist("api/votes", { rater, pair: pair.id, choice: choose.value, left: pair.left, change: true });
      images.forEach((image, place) => image.classList.toggle("chosen", choose.value === ["left", "right"][place]));
    }));
    row.append(...images, make("p", { textContent: pair.prompt, dir: "auto" }), choose);
    return row;
  });
  element("votes").replaceChildren(...rows);
}

function curve(name, points) {
  const namespace = "http://www.w3.org/2000/svg";
  const draw = (tag, attributes, text = "") => {
    const made = document.createElementNS(namespace, tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  };
  const [xs, ys] = [0, 1].map((place) => points.map((point) => point[place]));
  const range = (values) => [Math.min(...values), Math.max(...values)];
  const [[x0, x1], [y0, y1]] = [range(xs), range(ys)];
  const place = ([x, y]) => `${50 + 340 * (x - x0) / (x1 - x0 || 1)},${120 - 100 * (y - y0) / (y1 - y0 || 1)}`;
  const svg = draw("svg", { viewBox: "0 0 400 150", role: "img", "aria-label": `${name}: from ${ys[0]} to ${ys[ys.length - 1]}` });
  svg.append(
    draw("line", { x1: 50, y1: 120, x2: 390, y2: 120 }), draw("polyline", { points: points.map(place).join(" ") }),
    draw("text", { x: 50, y: 14 }, name), draw("text", { x: 2, y: 24 }, y1.toPrecision(3)), draw("text", { x: 2, y: 120 }, y0.toPrecision(3)),
    draw("text", { x: 50, y: 138 }, `rollout ${x0}`), draw("text", { x: 390, y: 138, "text-anchor": "end" }, String(x1)),
  );
  return svg;
}

const percent = (part, whole) => (whole ? `${Math.round(100 * part / whole)}% of ${whole}` : "-");

function showNumbers() {
  if (!numbers || element("status").classList.contains("trouble")) return;
  const { run, rollout, pairs = 0, done = 0, state = {}, raters, runs } = numbers;
  element("bar").setAttribute("aria-valuemax", Math.max(1, pairs));
  element("bar").setAttribute("aria-valuenow", done);
  element("done").style.width = `${pairs ? 100 * done / pairs : 0}%`;
  const me = raters.find((one) => one.name === rater);
  const others = raters.filter((one) => one.is_there && one.name !== rater).map((one) => one.name);
  element("status").textContent = run === null ? "No trainer has asked yet." : [
    `rollout ${rollout}${state.rollouts ? ` of ${state.rollouts}` : ""}: ${done} of ${pairs} pairs`,
    me ? `you: ${me.votes} ${me.votes === 1 ? "vote" : "votes"}, ${me.per_minute} in the last minute` : "",
    others.length ? `here too: ${others.join(", ")}` : "",
    numbers.trainer_is_there ? "" : "the trainer is not there",
  ].filter(Boolean).join("  ·  ");
  const select = element("runs");
  if (select.options.length !== runs.length + 1) {
    const before = select.value;
    select.replaceChildren(make("option", { value: "", textContent: "all" }), ...runs.map((name) => make("option", { value: name, textContent: name })));
    select.value = runs.includes(before) ? before : "";
  }
  if (view !== "run") return;
  element("run-name").textContent = run === null ? "No run yet" : `Run ${run}`;
  const { all_pairs = 0, all_done = 0, votes = 0, expired = 0, agreement = {} } = numbers;
  element("numbers").textContent = `${all_done} of ${all_pairs} pairs have a verdict, by ${votes} votes; ${expired} went on without one. ` +
    (agreement.compared ? `Two raters agree on ${percent(agreement.same, agreement.compared)} common pairs.` : "No pair has the votes of two raters.");
  const curves = Object.entries(state.curves || {}).filter(([, points]) => points.length > 1);
  element("curves").replaceChildren(...curves.map(([name, points]) => curve(name, points)));
  element("raters").tBodies[0].replaceChildren(...raters.map((one) => {
    const out = make("input", { type: "checkbox", checked: one.excluded, ariaLabel: `Leave ${one.name} out` });
    out.addEventListener("change", () => tell(() => insist("api/raters", { rater: one.name, excluded: out.checked }).then(refresh)));
    const cells = [one.name, one.votes, one.per_minute, percent(one.same, one.repeated)].map((text) => make("td", { textContent: text }));
    return make("tr", {}, ...cells, make("td", {}, out));
  }));
  const known = JSON.stringify(numbers.latest);
  if (element("sheet").dataset.known !== known) {
    element("sheet").dataset.known = known;
    element("sheet").replaceChildren(...(numbers.latest || []).map((pair) => make("figure", {},
      make("img", { src: url(pair.a), alt: "", className: pair.for_a > pair.for_b ? "chosen" : "" }),
      make("img", { src: url(pair.b), alt: "", className: pair.for_b > pair.for_a ? "chosen" : "" }),
      make("figcaption", { textContent: pair.prompt, dir: "auto" }))));
  }
}

async function refresh() {
  try {
    numbers = await ask("api/progress?" + new URLSearchParams({ run: element("runs").value }));
    if (silent && !busy) answers(); else showNumbers();
  } catch (error) {
    if (error.refused) trouble(error.message);
  }
}

function act(action) {
  if (action === "undo") undo();
  if (action === "zoom") {
    const zoomed = document.body.classList.toggle("zoomed");
    document.querySelector("[data-action=zoom]").setAttribute("aria-pressed", zoomed);
  }
  if (action === "past" || action === "run") {
    view = view === action ? "vote" : action;
    show();
    if (view === "past") tell(showPast);
    if (view === "run") refresh();
  }
  if (action === "who") {
    view = "who";
    show();
    element("name").value = rater;
    element("name").focus();
  }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || ["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!rater || !(key in KEYS || key in ACTIONS)) return;
  event.preventDefault();
  if (key in KEYS) vote(KEYS[key]); else act(ACTIONS[key]);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.choice) vote(button.dataset.choice);
  if (button.dataset.action) act(button.dataset.action);
});
element("who").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = element("name").value.trim();
  if (!name) return;
  rater = name;
  localStorage.setItem("rater", rater);
  queue = [];
  view = "vote";
  document.activeElement.blur();
  fill();
  show();
  refresh();
});
element("runs").addEventListener("change", () => { queue = []; element("runs").blur(); fill(); show(); refresh(); });

if (rater) { fill(); show(); } else act("who");
setInterval(() => { if (rater && view === "vote" && queue.length < AHEAD && !busy) fill(); }, 700);
setInterval(refresh, 1500);
refresh();
