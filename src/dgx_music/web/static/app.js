// Puts the parts of the page that the server makes for each URL in their places.
import { $, all, call, dress, emit, idOf, mine, on, read, root, showProgress, swap, toast } from "./core.js";
import "./form.js";
import { begin } from "./live.js";
import * as player from "./player.js";

let changed = new Set(); // rows to look at soon; null: all
let turn = 0;
let soon, typing;

async function visit(url, replaces = url === location.href) {
  history[replaces ? "replaceState" : "pushState"](null, "", url);
  await load();
}

async function load() {
  turn += 1;
  $("list").ariaBusy = "true";
  await refresh().catch((error) => toast(error.message));
  $("list").ariaBusy = "false";
}

// Reads the page: another one, or of this one some rows, or with null all.
async function refresh(some) {
  const [asked, query, ids] = [turn, new URLSearchParams(location.search), all(".row").map(idOf).sort()];
  const newest = ids.at(-1);
  if (some !== undefined) query.set("limit", Math.min(200, ids.length + 60));
  if (newest) query.set("since", newest);
  if (newest && some?.size < 99) query.set("ids", [...some, newest]);
  const page = await read(`?${query}`);
  if (asked !== turn) return;
  const parts = Object.fromEntries(all("[id]", page).map((part) => [part.id, part]));
  for (const id of ["views", "chips", "idle", "counts", "workers"]) swap($(id), parts[id]);
  if (!$("filters").contains(document.activeElement)) swap($("filters"), parts.filters);
  $("home").hidden = parts.home.hidden;
  showDetail(parts.detail, parts["of-detail"]);
  if (newest && $("list").dataset.query === parts.list.dataset.query) {
    const found = [...parts.rows.children];
    for (const row of found) if ($(row.id)) swap($(row.id), row);
    for (const id of ids) if (!parts[id] && (some ? some.has(id) : !parts.older || id > found.at(-1).id)) leave($(id));
    for (const id of ["tools", "fresh"]) swap($(id), parts[id]);
  } else if (!query.has("ids")) {
    swap($("list"), parts.list);
    $("fresh").hidden = true;
  }
  emit("rows");
}

function leave(row) {
  const next = row.nextElementSibling?.querySelector(".prompt") ?? $("rows");
  if (row.contains(document.activeElement)) next.focus();
  row.remove();
}

function showDetail(part, of) {
  const [place, old] = [$("detail"), $("of-detail")];
  if (old && idOf(old) === idOf(of)) {
    const isTouched = all("input, textarea", old).some((each) => each.value !== each.defaultValue);
    return isTouched || swap(old, of);
  }
  if (place.isEqualNode(part)) return;
  place.hidden = part.hidden;
  place.replaceChildren(...part.childNodes);
  if (!part.hidden) $("detail-title").focus();
  else if (document.activeElement === document.body) $(idOf(old))?.querySelector(".prompt").focus();
}

function renew(id) {
  if (id) changed?.add(id);
  else changed = null;
  soon ??= setTimeout(() => {
    refresh(changed).catch(() => {}); // live.js tells it
    soon = null;
    changed = new Set();
  }, 100);
}

on("made", (row) => {
  mine.add(row.batch_id ?? row.id);
  delete $("list").dataset.query; // so that it is filled again
  const id = idOf($("of-detail"));
  visit(new URL(`${root}/${id ? `?show=${id}` : ""}`, location).href);
  toast("It waits in the queue.");
});
on("look", renew);
on("rows", player.mark);
on("row", ({ row, isFirst }) => {
  const item = $(row.id);
  const isSame = item?.dataset.status === row.status;
  if (isSame && row.status === "processing" && !row.cancel_requested) return showProgress(item, row.progress);
  if (isSame && isFirst) return;
  renew(row.id);
  const word = { processing: "running", completed: "done", failed: "failed" }[row.status];
  if (word && !isSame && (mine.has(row.id) || mine.has(row.batch_id))) toast(`${word}: ${(row.title || row.prompt).slice(0, 80)}`);
});
on("gone", (id) => {
  if ($(id)) leave($(id));
  if (idOf($("of-detail")) === id) visit($("close-detail").href, true);
});

const post = (id, path, body) => call("POST", `generations/${id}/${path}`, body);
const make = async (...request) => emit("made", await post(...request));

const actions = {
  play: (_, link) => player.play(link),
  example: (_, { textContent }) => (($("prompt").value = textContent), $("prompt").focus()),
  star: (id, button) => call(button.ariaPressed === "true" ? "DELETE" : "PUT", `generations/${id}/star`),
  cancel: (id) => post(id, "cancel"),
  retry: (id) => post(id, "retry"),
  again: (id) => make(id, "again", { seed: "new" }),
  same: (id) => make(id, "again", { seed: "same" }),
  more: (id, { dataset: { length }, seconds }) => make(id, "continue", { duration: Math.min(length, 30) + seconds.valueAsNumber }),
  turn: (_, { dataset: { path, model } }) => call("POST", path, model ? { model } : {}),
  filter(_, form) {
    clearTimeout(typing);
    const fields = new URLSearchParams([...new FormData(form)].filter(([, value]) => value.trim()));
    visit(`${root}/?${fields}`, fields.has("q") && location.search.includes("q="));
  },
  async label(id, form) {
    const [title, tags, notes] = ["title", "tags", "notes"].map((name) => form[name].value.trim() || null);
    await call("PATCH", `generations/${id}`, { title, notes, tags: tags && tags.split(",").map((tag) => tag.trim()).filter(Boolean) });
    for (const field of form.elements) field.defaultValue = field.value;
    toast("Saved.");
  },
  async remove(id) {
    if (!confirm(`Delete “${$("detail-title").textContent.slice(0, 80)}” and its audio?`)) return;
    await call("DELETE", `generations/${id}`);
    emit("gone", id);
  },
  async bulk(_, { textContent, dataset: { count, filters } }) {
    if (!confirm(`${textContent}?`)) return;
    await call("POST", "generations/cancel", { filters: JSON.parse(filters), expected: Number(count) });
    toast(`${count} cancelled.`);
  },
};

async function act(element) {
  const id = idOf(element.closest(".row, [data-id]"));
  await actions[element.dataset.do](id, element)?.catch((error) => toast(error.message));
  if (!["play", "example", "filter"].includes(element.dataset.do)) renew();
}

document.addEventListener("click", async (event) => {
  const element = event.target.closest("a, button");
  if (!element || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const isOurs = element.pathname === `${root}/` && !element.hash;
  if (!isOurs && !element.dataset.do) return;
  event.preventDefault();
  if (element.dataset.do) return act(element);
  const isMore = ["fresh", "older"].includes(element.id);
  if (isMore) delete $("list").dataset.query;
  await visit(element.href);
  if (isMore) $("rows").querySelector(".prompt")?.focus();
});
document.addEventListener("submit", (event) => {
  if (!event.target.dataset.do) return;
  event.preventDefault();
  act(event.target);
});
document.addEventListener("input", ({ target }) => {
  if (target.form !== $("filters")) return;
  clearTimeout(typing);
  typing = setTimeout(act, 300, target.form);
});

$("keys-on").checked = !localStorage.keysOff;
$("keys-on").onchange = ({ target }) => (localStorage.keysOff = target.checked ? "" : 1);

function step(by) {
  const rows = all(".row");
  const at = rows.indexOf(document.activeElement.closest(".row"));
  (rows[at + by] ?? rows[at] ?? rows[0])?.querySelector(".prompt").focus();
}

const keys = {
  "/": () => $("q").focus(),
  n: () => $("prompt")?.focus(),
  j: () => step(1),
  k: () => step(-1),
  ArrowLeft: () => player.seekBy(-5),
  ArrowRight: () => player.seekBy(5),
  s: (row) => row?.querySelector("[data-do=star]")?.click(),
  "?": () => $("help").togglePopover(),
  " ": (row, target) => (target.closest("button, summary") ? false : player.play(row?.querySelector("a.disc"))),
};
document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (document.querySelector(":popover-open")) return;
  if (key === "Escape" && !$("detail").hidden) return visit($("close-detail").href);
  if (!$("keys-on").checked || event.ctrlKey || event.metaKey || event.altKey) return;
  if (!keys[key] || target.closest("input:not(#seek), textarea, select")) return;
  if (keys[key](target.closest(".row") ?? player.current(), target) !== false) event.preventDefault();
});

addEventListener("popstate", load);
setInterval(() => document.hidden || emit("look", "-"), 15000);
dress(document);
begin(() => refresh(null));
