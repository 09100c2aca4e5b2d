// What changes elsewhere: a stream of events while the page is seen, else a look every 5 seconds.
import { $, all, emit, idOf, on, root } from "./core.js";

const LOOK_MS = 5000;
let stream = null;
let watched = null;
let newest = null;
let lostAt = 0;
let timer, soon, refresh;

function tell(state, text, away) {
  if ($("live").dataset.state === state) return;
  $("live").dataset.state = state;
  $("live").textContent = text;
  $("stale").hidden = !away;
  $("stale").textContent = `${away} cannot be reached: this was so at ${new Date().toLocaleTimeString()}.`;
}

function queue({ counts, newest_id: latest }) {
  if (counts) $("counts").textContent = `${counts.processing ?? 0} running · ${counts.pending ?? 0} waiting`;
  if (newest !== null && latest !== newest) emit("look");
  newest = latest;
}

function alive({ stale } = {}) {
  if (stale) return tell("old", "waiting", "The database");
  if (lostAt) emit("look");
  lostAt = 0;
  tell("live", "live");
}

function open() {
  const unfinished = all(":is(.row, #of-detail):is([data-status=pending], [data-status=processing])").map(idOf);
  const query = unfinished.length ? `?ids=${[...new Set(unfinished)].slice(0, 200)}` : "";
  if (document.hidden || (stream?.readyState < 2 && query === watched)) return;
  stream?.close();
  watched = query;
  const opened = (stream = new EventSource(`${root}/v1/events${query}`));
  const hear = (name, run) => opened.addEventListener(name, ({ data }) => run(JSON.parse(data)));
  hear("generation", (row) => emit("row", { row }));
  hear("gone", ({ id }) => emit("gone", id));
  hear("queue", queue);
  hear("stale", alive);
  hear("snapshot", (data) => {
    for (const row of data.generations) emit("row", { row, isFirst: true });
    for (const id of data.gone) emit("gone", id);
    queue(data.queue ?? {});
    alive(data);
  });
  opened.onopen = () => alive();
  opened.onerror = () => {
    lostAt ||= Date.now();
    look();
  };
}

async function look() {
  clearTimeout(timer);
  if (document.hidden) return;
  timer = setTimeout(look, LOOK_MS);
  if (stream.readyState === 1) return;
  try {
    await refresh();
    tell("slow", "every 5 s");
    if (stream.readyState === 2 && Date.now() - lostAt > 6 * LOOK_MS) open();
  } catch {
    tell("off", "away", "The server");
  }
}

on("rows", () => {
  clearTimeout(soon);
  soon = setTimeout(open, 300);
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return stream.close();
  lostAt = Date.now();
  open();
  look();
});

export function begin(again) {
  refresh = again;
  open();
  timer = setTimeout(look, LOOK_MS);
}
