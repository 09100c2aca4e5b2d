// The one player, outside the list: nothing that the list does stops it.
import { $, all, idOf, on, send, toast } from "./core.js";

const audio = $("audio");
let id = null;

export const current = () => $(id);
const clock = (value) => `${Math.floor(value / 60)}:${String(Math.floor(value % 60)).padStart(2, "0")}`;
const show = (button, shape) => button.querySelector("use").setAttribute("href", `#i-${shape}`);

// Plays what a link leads to, or goes on with what was played; a second time it pauses.
export async function play(link) {
  const place = link?.closest(".row, [data-id]");
  if (place && link.href !== audio.src) open(link.href, place);
  else if (!id) return false;
  else if (!audio.paused) return audio.pause();
  await audio.play().catch(() => {}); // the audio's own error is told below
}

function open(url, place) {
  const opened = (id = idOf(place));
  audio.src = url;
  $("player").hidden = false;
  $("now").textContent = place.querySelector(".prompt, h2").textContent;
  $("now").href = `?show=${id}`;
  $("now-what").textContent = place.querySelector(".what").textContent;
  const isWhole = url.endsWith("/audio");
  $("save").hidden = !isWhole;
  $("save").href = `${url}?download=1`;
  draw([]);
  if (isWhole) send("GET", url.replace(/audio$/, "waveform?points=120")).then(({ peaks }) => id === opened && draw(peaks), () => {});
}

function draw(peaks) {
  const top = Math.max(0.05, ...peaks);
  const bars = peaks.map((peak, at) => `M${at * 4 + 2} ${49 - (peak / top) * 46}V${51 + (peak / top) * 46}`);
  $("wave").setAttribute("d", bars.join("") || "M0 50H480");
}

export function seekBy(by) {
  if (!id) return false;
  audio.currentTime += by;
}

export function mark() {
  const shape = audio.paused ? "play" : "pause";
  show($("toggle"), shape);
  $("toggle").ariaLabel = audio.paused ? "Play" : "Pause";
  for (const row of all(".row:has(a.disc)")) {
    row.classList.toggle("on", row.id === id);
    show(row, row.id === id ? shape : "play");
  }
  where();
}

function where() {
  const [at, end] = [audio.currentTime, audio.duration || 0];
  $("time").textContent = `${clock(at)} / ${clock(end)}`;
  Object.assign($("seek"), { max: end, value: at, ariaValueText: `${clock(at)} of ${clock(end)}` });
  $("player").style.setProperty("--done", `${end ? (100 * at) / end : 0}%`);
}

for (const name of ["play", "pause", "loadedmetadata"]) audio.addEventListener(name, mark);
audio.addEventListener("timeupdate", where);
audio.addEventListener("error", () => id && toast("The audio is gone, or cannot be played."));
$("toggle").onclick = () => play();
$("close-player").onclick = () => {
  audio.pause();
  id = null;
  audio.removeAttribute("src");
  $("player").hidden = true;
  mark();
};
$("seek").oninput = ({ target }) => (audio.currentTime = target.value);
on("gone", (gone) => gone === id && $("close-player").click());
