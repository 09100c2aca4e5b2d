// What changes elsewhere: a stream of events while the page is seen, else a look every 5 s.
import { $, all, emit, idOf, on, root } from "./core.js";

let stream = null;
let watched = null;
let newest; // null while there is none
let wasLost = false;
let soon, refresh;

function tell(state, text, away) {
  if ($("live").dataset.state === state) return;
  $("live").dataset.state = state;
  $("live").textContent = text;
  $("stale").hidden = !away;
  $("stale").textContent = `${away} cannot be reached: this was so at ${new Date().toLocaleTimeString()}.`;
}

function queue({ counts, newest_id: latest }) {
  if (counts) $("counts").textContent = `${counts.processing ?? 0} running · ${counts.pending ?? 0} waiting`;
  if (newest !== undefined && latest !== newest) emit("look", latest);
  newest = latest;
}

function alive({ stale } = {}) {
  if (stale) return tell("old", "waiting", "The database");
  if (wasLost) emit("look");
  wasLost = false;
  tell("live", "live");
}

function open() {
  const ids = [...new Set(all(".row, #of-detail").map(idOf))].slice(0, 200);
  const query = ids.length ? `?ids=${ids}` : "";
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
    wasLost = true;
    look();
  };
}

async function look() {
  if (document.hidden || stream.readyState === 1) return;
  try {
    await refresh();
    if (stream.readyState !== 1) tell("slow", "every 5 s");
    open(); // if it ended for good
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
  wasLost = true;
  open();
  look();
});

export function begin(again) {
  refresh = again;
  open();
  setInterval(look, 5000);
}
