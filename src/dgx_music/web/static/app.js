// The list, what the URL says, the form and the keys.
import { $, act, ask, call, emit, facts, h, icon, isOpen, mayEnqueue, mayOperate, mine, models, on, put, root, rows, say, seesAll, statusOf, titleOf, toast } from "./core.js";
import * as detail from "./detail.js";
import { begin } from "./live.js";
import * as player from "./player.js";

const NUMBERS = ["bpm_from", "bpm_to"];
const items = new Map();
const fresh = new Set();
let shownQuery = null;
let next = null;
let turn = 0;
let top = "";
let isBroken = false;

// ---- the URL
const url = () => new URLSearchParams(location.search);
function listQuery() {
  const query = url();
  for (const name of ["show", "view", "after"]) query.delete(name);
  return query;
}

function go(query, replaces = false) {
  const text = query.toString();
  history[replaces ? "replaceState" : "pushState"](null, "", `${root}/${text && "?"}${text}`);
  follow();
}

function change(changes, replaces) {
  const query = url();
  for (const [name, value] of Object.entries(changes)) value ? query.set(name, value) : query.delete(name);
  go(query, replaces);
}

function follow() {
  const query = url();
  const isWorkers = query.get("view") === "workers";
  $("home").hidden = isWorkers;
  $("workers").hidden = !isWorkers;
  for (const link of document.querySelectorAll("nav a")) mark(link, (link.dataset.go === "workers") === isWorkers);
  if (isWorkers) detail.workers();
  const wanted = listQuery().toString();
  if (wanted !== shownQuery) {
    shownQuery = wanted;
    fill();
    load();
  }
  detail.show(query.get("show"));
}

const mark = (link, isIt) => (isIt ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"));

function fill() {
  const query = listQuery();
  const chip = query.get("starred") ? "starred" : query.getAll("status").join();
  for (const each of document.querySelectorAll(".chips a")) mark(each, each.dataset.status === chip);
  for (const field of $("filters").elements) if (field.name) field.value = query.get(field.name) ?? "";
  const finer = ["key", "bpm_from", "bpm_to", "tag", "model"].filter((name) => query.has(name));
  $("finer").firstElementChild.textContent = finer.length ? `Filter (${finer.length})` : "Filter";
}

// ---- the list
async function load(isMore = false) {
  const mineTurn = (turn += 1);
  const query = listQuery();
  if (isMore) query.set("after", next);
  $("rows").ariaBusy = "true";
  isBroken = false;
  try {
    const page = await call("GET", `generations?${query}`);
    if (mineTurn !== turn) return;
    if (!isMore) reset();
    add(page);
  } catch (error) {
    if (mineTurn !== turn) return;
    if (!isMore) reset();
    isBroken = true;
    $("nothing").hidden = false;
    $("nothing").replaceChildren(h("p.bad", {}, error.message), h("button.plain", { onclick: () => load() }, "Try again"));
  }
  $("rows").ariaBusy = "false";
  tools();
}

function add(page) {
  next = page.next;
  $("rows").append(...page.generations.map((row) => item(put(row))));
  for (const { id } of page.generations) if (id > top) top = id;
  player.mark();
  nothing();
}

function reset() {
  top = "";
  items.clear();
  fresh.clear();
  $("rows").replaceChildren();
}

const examples = [...document.querySelectorAll("#nothing .examples")];
function nothing() {
  $("nothing").hidden = items.size > 0;
  if (items.size) return;
  const isAll = shownQuery === "";
  $("nothing").replaceChildren(
    h("p", {}, isAll ? `Nothing here yet.${mayEnqueue ? " Write what you would like to hear, or begin with one of these:" : ""}` : "Nothing fits."),
    ...(isAll ? (mayEnqueue ? examples : []) : [h("a.plain", { href: `${root}/`, "data-go": "home" }, "Show all")]),
  );
}

function tools() {
  $("older").hidden = !next;
  $("fresh").hidden = fresh.size === 0;
  $("fresh").textContent = `${fresh.size} new`;
  const query = listQuery();
  const isOpenOnly = query.getAll("status").every((status) => status === "pending" || status === "processing");
  const open = [...items.keys()].some((id) => rows.get(id).status === "pending");
  $("bulk").hidden = !mayOperate || !open || query.has("q") || !isOpenOnly;
  const count = [...items.keys()].filter((id) => rows.get(id).status === "pending").length;
  $("bulk").textContent = next ? "Cancel what waits…" : `Cancel the ${count} that wait${count === 1 ? "s" : ""}`;
}

function item(row) {
  const old = items.get(row.id);
  if (old) return old.element;
  const button = (name, label, shape) => h("button.icon", { "data-do": name, title: label }, icon(shape));
  const disc = h("button.disc", { "data-do": "play" });
  const prompt = h("a.prompt", { dir: "auto", href: `?show=${row.id}`, "data-go": "show", "data-id": row.id });
  const meta = h("p.meta", {});
  const [star, cancel, retry] = [button("star", "Star", "star"), button("cancel", "Cancel", "x"), button("retry", "Retry", "retry")];
  const element = h("li.row", { "data-id": row.id }, disc, h("div.what", {}, prompt, meta), h("div.acts", {}, mayEnqueue ? [cancel, retry, star] : []));
  let was = "";
  const update = (now) => {
    const title = titleOf(now);
    prompt.textContent = title;
    meta.replaceChildren(...facts(now));
    element.style.setProperty("--done", `${now.progress * 100}%`);
    star.ariaPressed = String(Boolean(now.starred));
    if (was !== now.status + now.urls.audio) {
      was = now.status + now.urls.audio;
      element.dataset.status = now.status;
      const hasFocus = element.contains(document.activeElement);
      cancel.hidden = !now.urls.cancel;
      retry.hidden = !now.urls.retry;
      disc.disabled = !now.urls.audio;
      const shape = { completed: "play", failed: "fail", cancelled: "off" }[now.status];
      disc.replaceChildren(...(shape ? [icon(shape)] : []));
      if (hasFocus && (!element.contains(document.activeElement) || document.activeElement.closest("[hidden], :disabled"))) prompt.focus();
    }
    disc.ariaLabel = now.urls.audio ? `Play ${title}` : `${title}: ${statusOf(now)}`;
    for (const [each, word] of [[star, "Star"], [cancel, "Cancel"], [retry, "Retry"]]) each.ariaLabel = `${word} ${title}`;
  };
  items.set(row.id, { element, update });
  fresh.delete(row.id);
  update(row);
  return element;
}

async function look() {
  const query = shownQuery;
  if ($("rows").ariaBusy === "true") return;
  try {
    const page = await call("GET", `generations?${query}`);
    if (query !== shownQuery) return;
    if (!items.size) add(page);
    for (const row of page.generations) {
      if (!items.has(row.id) && row.id > top) fresh.add(row.id);
      put(row);
    }
    for (const row of [...rows.values()].filter((each) => isOpen(each) && !page.generations.some(({ id }) => id === each.id)).slice(0, 20)) put(await call("GET", `generations/${row.id}`));
    tools();
  } catch { /* the banner says it */ }
}

on("look", () => (isBroken ? load() : look()));
on("gone", (id) => {
  rows.delete(id);
  items.get(id)?.element.remove();
  items.delete(id);
  if (url().get("show") === id) change({ show: null }, true);
  nothing();
});
on("row", ({ row, old }) => {
  items.get(row.id)?.update(row);
  if (old && old.status !== row.status) {
    tools();
    if (mine.has(row.id) && row.status !== "pending") say(`${statusOf(row).split(" ")[0]}: ${titleOf(row).slice(0, 80)}`);
  }
});
on("made", (made) => {
  $("rows").prepend(...made.filter(({ id }) => !items.has(id)).map(item));
  nothing();
  tools();
  toast(made.length > 1 ? `${made.length} takes wait in the queue.` : "It waits in the queue.");
});

async function bulk() {
  const query = listQuery();
  query.delete("status");
  query.append("status", "pending");
  const filters = Object.fromEntries([...query].map(([name, value]) => [name, NUMBERS.includes(name) ? Number(value) : name === "starred" ? true : value]));
  try {
    const expected = await countAll(query);
    if (!expected) return toast("Nothing waits here.");
    const many = expected === 1 ? "1 generation that waits" : `${expected} generations that wait`;
    if (!(await ask(`Cancel ${many}?`, `Cancel ${expected}`))) return;
    const done = await call("POST", "generations/cancel", { filters, expected });
    toast(`${done.changed} cancelled.`);
  } catch (error) {
    toast(error.status === 409 ? `Meanwhile another number waits, so nothing is changed. ${error.message}` : error.message);
  }
  look();
}

async function countAll(query) {
  query = new URLSearchParams(query);
  if (seesAll && [...query].length === 1) return (await call("GET", "stats")).pending_generations;
  query.set("limit", 200);
  let count = 0;
  for (let after = ""; after !== null; query.set("after", after)) {
    const page = await call("GET", `generations?${query}`);
    count += page.generations.length;
    after = page.next;
    if (!after) break;
  }
  return count;
}

// ---- the form
const composer = $("composer");
let isSending = false;
function renew() {
  composer.elements.idempotency_key.value = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function enqueue(event) {
  event.preventDefault();
  if (isSending) return;
  const { idempotency_key: key, ...fields } = Object.fromEntries(new FormData(composer));
  const body = { prompt: fields.prompt, model: fields.model, duration: Number(fields.duration) };
  for (const name of ["seed", "negative_prompt"]) if (fields[name]) body[name] = fields[name];
  if (Number(fields.variations) > 1) body.variations = Number(fields.variations);
  isSending = true;
  $("generate").ariaDisabled = "true"; // a disabled button would lose the focus
  $("problem").textContent = "";
  try {
    const first = await call("POST", "generations", body, { "Idempotency-Key": key });
    const takes = body.variations ? (await call("GET", `generations?batch=${first.batch_id}`)).generations : [first];
    for (const take of takes) mine.add(take.id);
    emit("made", takes.map(put));
    if (composer.contains(document.activeElement)) $("prompt").select();
    renew();
  } catch (error) {
    $("problem").textContent = error.message;
  }
  isSending = false;
  $("generate").ariaDisabled = "false";
}

if (composer) {
  composer.addEventListener("submit", enqueue);
  composer.addEventListener("input", () => {
    renew();
    const takes = composer.elements.variations.value;
    $("generate").textContent = takes > 1 ? `Generate ${takes}` : "Generate";
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    composer.requestSubmit();
  });
}

// ---- filters, clicks, keys
let typing;
function filter(replaces) {
  clearTimeout(typing);
  const fields = Object.fromEntries([...new FormData($("filters"))].map(([name, value]) => [name, value.trim()]));
  change(fields, replaces);
}
$("filters").addEventListener("submit", (event) => (event.preventDefault(), filter()));
$("filters").addEventListener("change", (event) => event.target !== $("q") && filter());
$("q").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(filter, 300, url().has("q"));
});
$("fresh").addEventListener("click", async () => {
  await load();
  $("rows").querySelector(".prompt")?.focus();
});
$("older").addEventListener("click", () => load(true));
$("bulk").addEventListener("click", bulk);
$("help-button").addEventListener("click", () => $("help").showModal());

document.addEventListener("click", (event) => {
  const example = event.target.closest("[data-example]");
  if (example) {
    $("prompt").value = example.textContent;
    $("prompt").focus();
  }
  const doing = event.target.closest("[data-do]");
  if (doing) act(doing.dataset.do, rows.get(doing.closest("[data-id]").dataset.id));
  const link = event.target.closest("[data-go], .chips a, #now");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  const { go: where, id, status } = link.dataset;
  if (where === "home") go(new URLSearchParams());
  else if (where === "workers") go(new URLSearchParams("view=workers"));
  else if (where === "close") change({ show: null });
  else if (where === "show") change({ show: id });
  else if (link.id === "now") change({ show: player.current()?.id, view: null });
  else change({ status: status === "starred" ? null : status, starred: status === "starred" ? "1" : null });
});

const keysAreOn = () => localStorage.getItem("keys") !== "off";
$("keys-on").checked = keysAreOn();
$("keys-on").addEventListener("change", () => localStorage.setItem("keys", $("keys-on").checked ? "on" : "off"));

function step(by) {
  const all = [...$("rows").children];
  const at = all.indexOf(document.activeElement?.closest(".row"));
  const to = all[Math.max(0, Math.min(all.length - 1, at + by))];
  to?.querySelector(".prompt").focus();
  to?.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && detail.isShown() && !document.querySelector("dialog[open]")) return change({ show: null });
  const { target, key } = event;
  if (!keysAreOn() || event.ctrlKey || event.metaKey || event.altKey || target.closest("input, textarea, select, dialog")) return;
  const row = rows.get(target.closest?.(".row")?.dataset.id);
  const focused = (id) => ($(id)?.focus(), true);
  const run = {
    "/": () => focused("q"), n: () => mayEnqueue && focused("prompt"), j: () => step(1), k: () => step(-1),
    ArrowLeft: () => player.current() && player.seekBy(-5), ArrowRight: () => player.current() && player.seekBy(5),
    s: () => mayEnqueue && (row ?? player.current()) && act("star", row ?? rows.get(player.current().id)),
    "?": () => $("help").showModal(),
    " ": () => {
      if (target.closest("button, summary")) return false;
      const wanted = row?.urls.audio ? row : null;
      return wanted || player.current() ? player.play(wanted) : false;
    },
  }[key];
  if (run && run() !== false) event.preventDefault();
});

// ---- the beginning
addEventListener("popstate", follow);
async function learn() {
  for (const model of (await call("GET", "models")).models) models.set(model.name, model);
  $("idle").hidden = [...models.values()].some((model) => model.is_served);
  if (!$("workers").hidden) detail.workers();
}
setInterval(() => document.hidden || learn().catch(() => {}), 15000);
await learn().catch(() => {});
follow();
begin();
