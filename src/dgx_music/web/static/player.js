// The one player, outside the list: no update of the list stops it.
import { $, actions, call, facts, icon, on, titleOf, toast } from "./core.js";

const audio = $("audio");
const canvas = $("seek").firstElementChild;
let row = null;
let peaks = [];

export const current = () => row;
const clock = (value) => `${Math.floor(value / 60)}:${String(Math.floor(value % 60)).padStart(2, "0")}`;
const total = () => (Number.isFinite(audio.duration) ? audio.duration : row?.duration_seconds) || 0;

export async function play(wanted) {
  if (wanted && wanted.id !== row?.id) await open(wanted);
  else if (!audio.paused) return audio.pause();
  await audio.play().catch((error) => {
    if (error.name !== "AbortError") toast("This audio cannot be played.");
  });
}
actions.play = play;

async function open(wanted) {
  row = wanted;
  peaks = [];
  audio.src = row.urls.audio;
  $("player").hidden = false;
  $("now").href = `?show=${row.id}`;
  $("save").href = `${row.urls.audio}?download=1`;
  tell();
  show();
  const { id, urls } = row;
  call("GET", `${urls.waveform}?points=240`).then((found) => {
    if (row?.id === id) [peaks] = [found.peaks, tell()];
    draw();
  }, () => {});
}

function tell() {
  $("now").textContent = titleOf(row);
  $("now-meta").replaceChildren(...facts(row).filter((each) => each.className !== "status").slice(0, 3));
}

export function seek(to) {
  if (row) audio.currentTime = Math.max(0, Math.min(total(), to));
}
export const seekBy = (by) => seek(audio.currentTime + by);

function show() {
  const isOn = !audio.paused;
  $("toggle").replaceChildren(icon(isOn ? "pause" : "play"));
  $("toggle").ariaLabel = isOn ? "Pause" : "Play";
  for (const each of document.querySelectorAll(".row")) {
    const isThis = each.dataset.id === row?.id;
    if (!isThis && !each.classList.contains("on")) continue;
    each.classList.toggle("on", isThis);
    each.firstElementChild.replaceChildren(icon(isThis && isOn ? "pause" : "play"));
  }
  where();
}

function where() {
  const [at, end] = [audio.currentTime, total()];
  $("time").textContent = `${clock(at)} / ${clock(end)}`;
  $("seek").ariaValueMax = end.toFixed(1);
  $("seek").ariaValueNow = at.toFixed(1);
  $("seek").ariaValueText = `${clock(at)} of ${clock(end)}`;
  draw();
}

function draw() {
  const { width, height } = canvas.getBoundingClientRect();
  const scale = devicePixelRatio || 1;
  const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
  const [pen, style] = [canvas.getContext("2d"), getComputedStyle(document.documentElement)];
  pen.clearRect(0, 0, wide, high);
  const count = Math.max(1, Math.floor(width / 4));
  const done = total() ? audio.currentTime / total() : 0;
  const top = Math.max(0.05, ...peaks);
  for (let bar = 0; bar < count; bar += 1) {
    const part = peaks.slice(Math.floor((bar * peaks.length) / count), Math.ceil(((bar + 1) * peaks.length) / count));
    const tall = Math.max(2 * scale, (Math.max(0, ...part) / top) * high * 0.92);
    pen.fillStyle = style.getPropertyValue(bar / count < done ? "--accent" : "--soft");
    pen.globalAlpha = bar / count < done ? 1 : 0.45;
    pen.beginPath();
    pen.roundRect(bar * 4 * scale, (high - tall) / 2, 2.5 * scale, tall, 2 * scale);
    pen.fill();
  }
}

function animate() {
  where();
  if (!audio.paused && !matchMedia("(prefers-reduced-motion: reduce)").matches) requestAnimationFrame(animate);
}

export function mark() {
  if (row) show();
}

for (const name of ["play", "pause", "ended", "loadedmetadata", "seeked"]) audio.addEventListener(name, show);
audio.addEventListener("play", animate);
audio.addEventListener("timeupdate", where);
audio.addEventListener("error", () => row && toast("The audio is gone, or cannot be played."));
$("toggle").addEventListener("click", () => play());
$("close-player").addEventListener("click", () => {
  audio.pause();
  row = null;
  audio.removeAttribute("src");
  $("player").hidden = true;
  show();
});
const point = (event) => {
  const box = canvas.getBoundingClientRect();
  seek(((event.clientX - box.left) / box.width) * total());
};
$("seek").addEventListener("pointerdown", (event) => {
  $("seek").setPointerCapture(event.pointerId);
  point(event);
});
$("seek").addEventListener("pointermove", (event) => event.buttons && point(event));
$("seek").addEventListener("keydown", (event) => {
  const by = { ArrowRight: 5, ArrowUp: 5, ArrowLeft: -5, ArrowDown: -5, PageUp: 15, PageDown: -15 }[event.key];
  if (by) seekBy(by);
  else if (event.key === "Home" || event.key === "End") seek(event.key === "Home" ? 0 : total());
  else return;
  event.preventDefault();
  event.stopPropagation();
});
new ResizeObserver(draw).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
on("row", (change) => change.row.id === row?.id && ((row = change.row), tell()));
on("gone", (id) => id === row?.id && $("close-player").click());
