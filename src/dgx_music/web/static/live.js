// What changes elsewhere: a stream of events while the page is seen, else a look every 5 seconds.
import { $, call, emit, isOpen, on, put, root, rows, seesAll } from "./core.js";

const LOOK_MS = 5000;
let stream = null;
let watched = "";
let timer = null;
let newest = null;
let isAway = false;

function tell(state, text, away = "") {
  if ($("live").dataset.state === state) return;
  $("live").dataset.state = state;
  $("live").textContent = text;
  $("stale").hidden = !away;
  $("stale").textContent = `${away} cannot be reached: this was so at ${new Date().toLocaleTimeString()}.`;
}

const tellOld = () => tell("old", "waiting", "The database");

function count({ pending = 0, processing = 0 }) {
  $("counts").textContent = `${processing} running · ${pending} waiting`;
}

function queue(data) {
  if (!data) return;
  count(data.counts);
  if (newest !== null && data.newest_id !== newest) emit("look");
  newest = data.newest_id;
}

function open() {
  const ids = [...rows.values()].filter(isOpen).slice(0, 200).map((row) => row.id).join();
  if (stream?.readyState < 2 && ids === watched) return;
  stream?.close();
  watched = ids;
  const mine = (stream = new EventSource(`${root}/v1/events${ids && `?ids=${ids}`}`));
  const read = (name, run) => mine.addEventListener(name, (event) => {
    alive();
    run(JSON.parse(event.data));
  });
  read("generation", put);
  read("queue", queue);
  read("gone", (data) => emit("gone", data.id));
  read("stale", (data) => data.stale && tellOld());
  read("snapshot", (data) => {
    data.generations.forEach(put);
    data.gone.forEach((id) => emit("gone", id));
    queue(data.queue);
    if (data.stale) tellOld();
  });
  mine.onopen = alive;
  mine.onerror = () => look();
}

const alive = () => (isAway && ((isAway = false), emit("look")), tell("live", "live"));

export async function look() {
  clearTimeout(timer);
  if (document.hidden) return;
  timer = setTimeout(look, LOOK_MS);
  if (stream?.readyState === 1) return;
  try {
    const counts = await call("GET", seesAll ? "stats" : "models"); // a tenant's token gets no counts
    if (seesAll) count({ pending: counts.pending_generations, processing: counts.processing_generations });
    emit("look");
    isAway = false;
    tell("slow", "every 5 s");
    if (stream?.readyState === 2) setTimeout(open, LOOK_MS * 6);
  } catch {
    isAway = true;
    tell("off", "away", "The server");
  }
}

let soon = null;
on("row", ({ row, old }) => {
  if (old && isOpen(old) === isOpen(row)) return;
  clearTimeout(soon);
  soon = setTimeout(() => document.hidden || open(), 300);
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return stream?.close();
  isAway = true;
  open();
  look();
});

export function begin() {
  open();
  timer = setTimeout(look, LOOK_MS);
}
