
"use strict";
// The page of scored responses. perce/report/embedded.py says what the data are. Text from data becomes text nodes only.

const MARGIN = 1200; // pixels above and below the window in which responses are rendered
const MOST_MARKS = 500; // in one response: 5,000 take 0.2 s to draw, anew whenever a response comes into view
const LONG_PERSONA = 1200; // characters; a longer one is folded, so that it does not push the response off the screen

const $ = (id) => document.getElementById(id);
const state = { query: "", user: "", sort: "order", down: false, pass: 0, tint: "weight" };
let data, cards, shown, watcher, active;

/** An element with attributes, or properties where the name begins with a dot, and children. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith(".")) node[name.slice(1)] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

async function unpacked(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

// ---- numbers

function number(value, digits = 2, signed = false) {
  if (value === null || Number.isNaN(value)) return "–";
  const text = Math.abs(value).toFixed(digits);
  return (value < 0 && Number(text) ? "−" : signed ? "+" : "") + text;
}

const counted = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const minus = (a, b) => (a === null || b === null ? null : a - b);
const lower = (text) => text.replaceAll("İ", "i").toLowerCase(); // as long as it was: only İ would become two letters
const nats = (value) => (value === null ? null : value / 100);

/** What one token of a pass has; log-probabilities in nats. */
function numbersOf(pass, at) {
  const logp = nats(pass.logp[at]), cf = nats(pass.cf[at]), pir = minus(pass.logp[at], pass.cf[at]);
  const inUnits = (column) => (column[at] === null ? null : column[at] * data.unit);
  const signal = pass.signal ? inUnits(pass.signal) : nats(pir);
  return { logp, cf, pir: nats(pir), signal, weight: inUnits(pass.weight), end: pass.ends[at] };
}

/** [strength from −1 to 1, whether it is at an end] of a token under the tint that is chosen. */
function tintOf(response, pass, at) {
  if (state.tint === "weight") {
    const [low, high] = data.clip, weight = pass.weight[at] * data.unit, top = pass.ends[at] === "c";
    return [top ? 1 : Math.min(Math.max((weight - low) / (high - low) || 0, 0), 1), top];
  }
  const [first, last] = [response.passes[0], response.passes.at(-1)];
  const change = first && last && first.text === last.text ? minus(last.logp[at], first.logp[at]) : null;
  const value = state.tint === "pir" ? minus(pass.logp[at], pass.cf[at]) : change;
  const strength = Math.min(Math.max(nats(value) / data.span, -1), 1);
  return [strength, Math.abs(strength) === 1];
}

// ---- a response

const atCeiling = (pass) => pass.ends.split("c").length - 1;

/** A card per response: its place in the data, its article, and what it is sorted by. */
function cardOf(response, place) {
  const passes = response.passes.filter(Boolean), last = passes.at(-1), first = passes[0];
  const lengths = response.texts.map(([, cuts]) => cuts.length);
  const keys = {
    order: place, pir: last?.pir, loss: last?.loss, ceiling: last && atCeiling(last) / (lengths[last.text] || 1),
    change: passes.length > 1 ? minus(last.loss, first.loss) : null,
  };
  const node = make("article", { tabindex: "-1", "aria-label": `Response ${place + 1}` });
  const size = response.persona.reduce((sum, entry) => sum + data.strings[entry].length, 0);
  const card = { response, place, keys, node, filled: false, open: size <= LONG_PERSONA };
  node.card = card;
  return card;
}

/** About how high a card will be in pixels, so that the scroll bar is about right before it is rendered. */
function estimate(card, width) {
  const perLine = Math.max(width / 7.7, 20), { response } = card;
  const lines = (text) => text.split("\n").reduce((sum, line) => sum + Math.max(Math.ceil(line.length / perLine), 1), 0);
  const texts = response.turns.map(([, text]) => data.strings[text]);
  const persona = card.open ? response.persona.map((entry) => data.strings[entry]) : [];
  let height = 100 + 48 * response.turns.length;
  for (const text of [...texts, ...persona]) height += 26 * lines(text);
  for (const pass of passesShown(response)) height += 60 + 29.6 * lines(response.texts[pass.text][0]);
  return Math.round(height);
}

const passesShown = (response) =>
  (state.pass === "both" ? response.passes : [response.passes[state.pass]]).filter(Boolean);

function fill(card) {
  const { response, node } = card, held = node.contains(document.activeElement);
  node.replaceChildren(header(card), ...persona(card));
  for (const [role, text] of response.turns) {
    const words = make("p", { class: "text", dir: "auto" }, data.strings[text]);
    node.append(make("div", { class: "turn" }, make("div", { class: "label", dir: "auto" }, role), words));
  }
  response.passes.forEach((pass, which) => {
    if (pass && (state.pass === "both" || state.pass === which)) node.append(passOf(card, pass, which));
  });
  if (!passesShown(response).length) node.append(make("p", { class: "label" }, `Not scored ${data.passes[state.pass] ?? "at all"}.`));
  if (held) node.focus({ preventScroll: true }); // what had the focus is gone
  card.filled = true;
  node.style.removeProperty("--height");
}

function empty(card, height) {
  card.node.replaceChildren();
  card.filled = false;
  card.node.style.setProperty("--height", `${height}px`);
}

function header(card) {
  const { response, place } = card;
  const title = `Response ${(place + 1).toLocaleString("en")}`;
  const node = make("header", {}, make("h2", {}, title, response.source && " · ", make("span", { class: "source" }, response.source)));
  if (response.user !== null) {
    const user = make("button", { class: "user", type: "button", dir: "auto", title: "Show this user's responses" });
    user.append(data.users[response.user]);
    user.onclick = () => choose("user", String(response.user));
    node.append(user);
  }
  return node;
}

function persona(card) {
  const entries = card.response.persona;
  if (!entries.length) return data.documents ? [] : [make("p", { class: "label" }, "No persona")];
  const count = `Persona, ${entries.length} ${entries.length === 1 ? "entry" : "entries"}`;
  const items = entries.map((entry) => make("li", { dir: "auto" }, data.strings[entry]));
  const found = state.query && entries.some((entry) => lower(data.strings[entry]).includes(state.query));
  const summary = make("summary", {}, count);
  const node = make("details", { class: "persona", ".open": card.open || found }, summary, make("ul", {}, ...items));
  summary.onclick = () => (card.open = !node.open); // what a search opens is closed after it
  return [node];
}

function passOf(card, pass, which) {
  const { response } = card, [text, lengths] = response.texts[pass.text];
  const name = data.passes[which], first = response.passes.find(Boolean);
  const was = pass === first || pass.loss === null ? "" : `, was ${number(first.loss)}`;
  const numbers = lengths.length
    ? `${counted(lengths.length, "token")} · mean PIR ${number(pass.pir)} · loss ${number(pass.loss)}${was} · ` +
      `${atCeiling(pass).toLocaleString("en")} at the ceiling`
    : "no tokens";
  const words = make("p", { class: "tokens", dir: "auto", role: "group", "aria-label": `${name}, tokens` });
  Object.assign(words, { card, which });
  let from = 0;
  lengths.forEach((length, at) => words.append(token(response, pass, at, text.slice(from, (from += length)))));
  if (words.firstChild) words.firstChild.tabIndex = 0;
  const head = make("header", {}, make("h3", {}, name), make("span", { class: "label" }, numbers));
  return make("section", { class: "pass" }, head, words);
}

function token(response, pass, at, text) {
  const [strength, end] = tintOf(response, pass, at);
  const ends = end ? (strength < 0 ? " low" : " top") : "";
  const node = make("span", { class: `t${strength < 0 ? " minus" : ""}${ends}`, ".at": at });
  if (strength) node.style.setProperty("--w", Math.abs(strength).toFixed(3));
  const [line, ...lines] = text.split("\n");
  node.append(line);
  for (const next of lines) node.append(make("i", { class: "nl" }), `\n${next}`);
  return node;
}

// ---- the numbers of a token, at the bottom edge

const placeOf = (node) => ({ card: node.parentNode.card, which: node.parentNode.which, at: node.at });
const nodeOf = ({ card, which, at }) =>
  [...card.node.querySelectorAll(".tokens")].find((words) => words.which === which)?.children[at];

function tell(node) {
  $("list").querySelector(".active")?.classList.remove("active");
  node.classList.add("active");
  active = placeOf(node);
  const { card, which, at } = active, { passes } = card.response;
  const same = (pass, index) => pass && (index === which || pass.text === passes[which].text);
  const own = data.signal === "PIR" ? [] : [data.signal];
  const names = ["", data.weight, ...own, "PIR", `log p ${data.full}`, `log p ${data.short}`, `p ${data.full}`];
  const rows = passes.flatMap((pass, index) => (same(pass, index) ? [[data.passes[index], ...cells(numbersOf(pass, at), own)]] : []));
  const text = make("b", { dir: "auto" }, node.textContent.replaceAll("\n", "↵").replaceAll("\t", "⇥"));
  const where = `token ${at + 1} of response ${card.place + 1}`;
  $("told").ariaLive = node === document.activeElement ? "polite" : "off"; // not whatever the mouse passes over
  $("told").replaceChildren(make("div", { class: "what" }, text, where), make("div", { class: "wide" }, tableOf([names, ...rows])));
  $("detail").hidden = false;
}

function cells(found, own) {
  const digits = Math.max(Math.round(-Math.log10(data.unit)), 2), end = { c: " (ceiling)", f: " (floor)" }[found.end] ?? "";
  return [
    number(found.weight, digits) + end, ...own.map(() => number(found.signal, digits)), number(found.pir, 2, true),
    number(found.logp), number(found.cf), found.logp === null ? "–" : `${(100 * Math.exp(found.logp)).toPrecision(2)} %`,
  ];
}

/** A table of rows of texts; turned on a phone, where it is too wide. */
function tableOf(rows) {
  const turned = matchMedia("(max-width: 40rem)").matches ? rows[0].map((_, column) => rows.map((row) => row[column])) : rows;
  const cell = (row, column, text) =>
    row && column ? make("td", {}, text) : make("th", { scope: row ? "row" : "col" }, text);
  return make("table", {}, ...turned.map((texts, row) => make("tr", {}, ...texts.map((text, column) => cell(row, column, text)))));
}

function untell() {
  $("list").querySelector(".active")?.classList.remove("active");
  $("detail").hidden = true;
  active = null;
}

function focusToken(node) {
  for (const other of node.parentNode.querySelectorAll("[tabindex]")) other.removeAttribute("tabindex");
  node.tabIndex = 0;
  node.focus({ preventScroll: true });
  const box = node.getBoundingClientRect(), bottom = innerHeight - $("detail").offsetHeight;
  if (box.top < $("bar").offsetHeight || box.bottom > bottom) node.scrollIntoView({ block: "center" });
}

/** The token that an arrow key leads to: by the order of the text sideways, by place up and down. */
function neighbour(node, key) {
  const forward = getComputedStyle(node.parentNode).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
  if (key === "ArrowLeft" || key === "ArrowRight") return key === forward ? node.nextSibling : node.previousSibling;
  const box = node.getBoundingClientRect(), down = key === "ArrowDown", middle = (box.left + box.right) / 2;
  const boxes = [...node.parentNode.children].map((other) => [other, other.getBoundingClientRect()]);
  const beyond = boxes.filter(([, b]) => (down ? b.top >= box.bottom - 4 : b.bottom <= box.top + 4));
  const edge = down ? Math.min(...beyond.map(([, b]) => b.top)) : Math.max(...beyond.map(([, b]) => b.top));
  const away = ([, b]) => Math.abs((b.left + b.right) / 2 - middle);
  return beyond.filter(([, b]) => Math.abs(b.top - edge) < 4).sort((a, b) => away(a) - away(b))[0]?.[0];
}

// ---- which responses are shown, and in which order

function matches() {
  const { query, user } = state, found = (text) => lower(text).includes(query);
  const strings = query ? data.strings.map(found) : [], users = query ? data.users.map(found) : [];
  return cards.filter(({ response }) => {
    if (user !== "" && response.user !== Number(user)) return false;
    return (
      !query || users[response.user] || found(response.source) || response.persona.some((entry) => strings[entry]) ||
      response.turns.some(([, text]) => strings[text]) || response.texts.some(([text]) => found(text))
    );
  });
}

/** Filter, sort, and begin at the top of the list. */
function list() {
  const sign = state.down ? -1 : 1, read = document.activeElement.closest("article");
  const key = (card) => card.keys[state.sort] ?? NaN; // what has no number is last, whichever way
  shown = matches().sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y) || a.place - b.place;
  });
  untell();
  for (const card of shown) if (card.filled) fill(card);
  $("list").replaceChildren(...shown.map((card) => card.node));
  measure();
  $("nothing").hidden = shown.length > 0;
  const all = counted(cards.length, "response");
  $("count").textContent = shown.length < cards.length ? `${shown.length.toLocaleString("en")} of ${all}` : all;
  if ($("bar").getBoundingClientRect().top <= 0) scrollTo(0, $("list").offsetTop - $("bar").offsetHeight);
  read?.focus(); // which it lost when it left the page
  watch();
}

function measure() {
  const width = $("list").clientWidth - 90;
  for (const card of cards) if (!card.filled) card.node.style.setProperty("--height", `${estimate(card, width)}px`);
}

/** Render what comes near the window; let go of what is far from it. */
function watch() {
  watcher?.disconnect();
  watcher = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting, boundingClientRect } of entries) {
        const { card } = target, held = target.contains(document.activeElement) || active?.card === card;
        if (isIntersecting && !card.filled) fill(card);
        else if (!isIntersecting && card.filled && !held && target.isConnected) empty(card, boundingClientRect.height);
      }
      mark();
    },
    { rootMargin: `${MARGIN}px 0px` },
  );
  for (const card of shown) watcher.observe(card.node);
}

/** Render what is rendered once more, with the response that is read staying where it is. */
function redraw() {
  const anchor = current(), before = anchor?.node.getBoundingClientRect().top, was = active && { ...active };
  const focused = was && document.activeElement.classList.contains("t");
  for (const card of cards) if (card.filled) fill(card);
  measure();
  if (anchor) scrollBy(0, anchor.node.getBoundingClientRect().top - before);
  document.body.dataset.tint = state.tint;
  if (was) {
    const node = nodeOf(was) ?? nodeOf({ ...was, which: state.pass });
    untell();
    if (node) focused ? focusToken(node) : tell(node);
  }
  mark();
}

/** Mark where the query occurs, in browsers that can without a change of the page. */
function mark() {
  if (!CSS.highlights) return;
  const found = new Highlight();
  for (const { node, filled } of state.query ? shown : []) {
    let left = filled ? MOST_MARKS : 0;
    for (const words of node.querySelectorAll(".user, .source, .persona li, .text, .tokens")) {
      for (const range of occurrences(words, state.query, left)) left -= 1, found.add(range);
    }
  }
  CSS.highlights.set("found", found);
}

/** Ranges of a node's text that are the query in lower case, at most so many. */
function occurrences(node, query, most) {
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT), parts = [], ranges = [];
  for (let length = 0; walker.nextNode(); length += walker.currentNode.length) parts.push([length, walker.currentNode]);
  const text = lower(node.textContent), partOf = (place) => parts.findLast(([start]) => start <= place);
  for (let at = text.indexOf(query); at >= 0 && ranges.length < most; at = text.indexOf(query, at + query.length)) {
    const [from, first] = partOf(at), [to, last] = partOf(at + query.length - 1), range = new Range();
    range.setStart(first, at - from);
    range.setEnd(last, at + query.length - to);
    ranges.push(range);
  }
  return ranges;
}

/** The response that is read: with the focus, else the first below the bar. */
function current() {
  const focused = document.activeElement.closest("article");
  const top = $("bar").offsetHeight, inView = ({ bottom, top: start }) => bottom > top + 40 && start < innerHeight;
  if (focused && inView(focused.getBoundingClientRect())) return focused.card;
  return shown.find(({ node }) => inView(node.getBoundingClientRect()));
}

function step(by) {
  const card = current(), top = card?.node.getBoundingClientRect().top;
  const begun = card && (card.node.contains(document.activeElement) || top < $("bar").offsetHeight);
  const next = shown[(card ? shown.indexOf(card) : -1) + (by > 0 && card && !begun ? 0 : by)];
  if (!next) return;
  if (!next.filled) fill(next);
  next.node.scrollIntoView({ block: "start" });
  next.node.focus({ preventScroll: true });
}

// ---- controls

function turn(down) {
  state.down = down;
  $("direction").textContent = down ? "↓" : "↑";
  $("direction").setAttribute("aria-pressed", down);
}

function choose(id, value) {
  state[id] = value;
  if (id === "sort") turn(["pir", "loss", "ceiling"].includes(value)); // what is looked for comes first
  $(id).value = value;
  id === "tint" ? redraw() : list();
}

function find(text) {
  if ($("search").value !== text) $("search").value = text;
  const query = lower(text.trim()), changed = query !== state.query;
  state.query = query;
  if (changed) list();
}

function choosePass(value) {
  state.pass = value;
  for (const input of $("passes").querySelectorAll("input")) input.checked = input.value === String(value);
  redraw();
}

function options(id, entries) {
  $(id).append(...entries.map(([value, text]) => make("option", { value }, text)));
  $(id).onchange = () => choose(id, $(id).value);
}

function controls() {
  const several = data.passes.length > 1, users = new Map(), change = several ? [["change", "change of loss"]] : [];
  for (const { response } of cards) if (response.user !== null) users.set(response.user, (users.get(response.user) ?? 0) + 1);
  options("user", [...users].map(([user, n]) => [String(user), `${data.users[user]} (${n})`]));
  $("user").hidden = users.size < 2;
  options("sort", [
    ["order", "order in the data"], ["pir", "mean PIR"], ["loss", "loss"], ...change, ["ceiling", "share at the ceiling"],
  ]);
  options("tint", [["weight", data.weight.replace(/^weight/, "token weight")], ["pir", "PIR, signed"], ...(several ? [["change", "change of log p"]] : [])]);
  state.pass = data.passes.length - 1;
  if (several) {
    const first = data.passes.map((name) => name.split(" ")[0]);
    const names = new Set(first).size === first.length ? first : data.passes;
    const values = [...names.map((name, place) => [place, name]), ["both", names.length > 2 ? "all" : "both"]];
    for (const [value, name] of values) {
      const input = make("input", { type: "radio", name: "pass", value, ".checked": value === state.pass });
      input.onchange = () => choosePass(value);
      $("passes").append(make("label", { title: data.passes[value] ?? "below each other" }, input, name));
    }
    $("passes").hidden = false;
  }
  $("search").oninput = () => find($("search").value);
  $("direction").onclick = () => (turn(!state.down), list());
  $("help").onclick = () => $("keys").showModal();
}

const KEYS = {
  "/": () => ($("search").focus(), $("search").select()),
  "?": () => $("keys").showModal(),
  j: () => step(1),
  k: () => step(-1),
  b: () => data.passes.length > 1 && choosePass(state.pass === 0 ? data.passes.length - 1 : 0),
  t: () => choose("tint", $("tint").options[($("tint").selectedIndex + 1) % $("tint").length].value),
  Escape: () => (active ? untell() : find("")),
};

function onKey(event) {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (target.matches("input[type=search], select")) {
    if (key === "Escape" && target.id === "search") find("");
    if (key === "Escape" || key === "Enter") target.blur();
    return;
  }
  if (key.startsWith("Arrow") && target.classList.contains("t")) {
    const next = neighbour(target, key);
    if (next) focusToken(next);
  } else if (KEYS[key]) KEYS[key]();
  else return;
  event.preventDefault();
}

async function start() {
  data = await unpacked($("data").textContent);
  cards = data.responses.map(cardOf);
  $("nothing").hidden = cards.length > 0;
  if (!cards.length) return;
  $("bar").hidden = false;
  controls();
  list();
  const onTokens = (name, act) =>
    $("list").addEventListener(name, (event) => event.target.closest(".t") && act(event.target.closest(".t"), event));
  onTokens("pointerover", (node, { pointerType }) => pointerType !== "touch" && tell(node));
  onTokens("focusin", tell);
  onTokens("click", focusToken);
  document.addEventListener("click", ({ target }) => target.closest(".t, #detail, #bar") || untell());
  $("close").onclick = () => (active.card.node.focus({ preventScroll: true }), untell());
  document.addEventListener("keydown", onKey);
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--bar", `${$("bar").offsetHeight + 8}px`);
    measure();
  }).observe($("bar"));
  addEventListener("beforeprint", () => {
    watcher.disconnect();
    for (const card of shown) if (!card.filled) fill(card);
  });
  addEventListener("afterprint", watch);
}

start().catch((error) => {
  $("nothing").hidden = false;
  $("nothing").textContent = `The responses cannot be shown (${error}). A browser of 2023 or newer can show them.`;
});
