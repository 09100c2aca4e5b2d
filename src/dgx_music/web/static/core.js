// What all parts of the page share: elements, calls, rows, and what can be done with a row.
const html = document.documentElement;
export const root = html.dataset.root;
export const seesAll = Boolean(html.dataset.seesAll);
export const mayEnqueue = html.dataset.role !== "read";
export const mayOperate = html.dataset.role === "operate";
export const rows = new Map();
export const models = new Map();
export const mine = new Set();
export const $ = (id) => document.getElementById(id);
export const emit = (name, detail) => document.dispatchEvent(new CustomEvent(name, { detail }));
export const on = (name, run) => document.addEventListener(name, (event) => run(event.detail));
export const isOpen = (row) => row.status === "pending" || row.status === "processing";
export const titleOf = (row) => row.title || row.prompt || "(no prompt)";
export const keyName = (key) => key.replace("#", "♯");

export function h(tag, props = {}, ...children) {
  const [name, className = ""] = tag.split(".");
  const element = Object.assign(document.createElement(name), { className });
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

export function icon(name) {
  const [svg, use] = ["svg", "use"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export async function call(method, path, body, headers = {}) {
  let answer;
  try {
    answer = await fetch(path[0] === "/" ? path : `${root}/v1/${path}`, {
      method,
      headers: body ? { "Content-Type": "application/json", ...headers } : headers,
      body: body && JSON.stringify(body),
    });
  } catch {
    throw Object.assign(new Error("The server cannot be reached."), { status: 0 });
  }
  if (answer.status === 401) location.reload();
  const data = answer.status === 204 ? null : await answer.json().catch(() => null);
  if (answer.ok) return data;
  throw Object.assign(new Error(data?.detail ?? `The server answered ${answer.status}.`), { status: answer.status });
}

export function put(row) {
  const old = rows.get(row.id);
  const now = { ...old, ...row };
  rows.set(row.id, now);
  emit("row", { row: now, old });
  return now;
}

export const say = (text) => ($("say").textContent = text);

let silence;
export function toast(text) {
  $("toast").textContent = text;
  clearTimeout(silence);
  silence = setTimeout(() => ($("toast").textContent = ""), 8000);
}

export function ask(question, yes) {
  $("ask-title").textContent = question;
  $("ask-yes").textContent = yes;
  $("ask").returnValue = "";
  $("ask").showModal();
  return new Promise((done) =>
    $("ask").addEventListener("close", () => done($("ask").returnValue === "yes"), { once: true }));
}

export const seconds = (value) =>
  value < 60 ? `${Math.round(value * 10) / 10} s` : `${Math.floor(value / 60)}:${String(Math.round(value % 60)).padStart(2, "0")} min`;

export function moment(text) {
  const time = new Date(text);
  const isToday = time.toDateString() === new Date().toDateString();
  const shape = isToday ? { hour: "2-digit", minute: "2-digit" } : { day: "numeric", month: "short" };
  return h("time", { dateTime: text, title: time.toLocaleString() }, time.toLocaleString([], shape));
}

const WORDS = { pending: "waiting", processing: "running", completed: "done", failed: "failed", cancelled: "cancelled" };
export function statusOf(row) {
  if (row.cancel_requested && row.status === "processing") return "stopping";
  return WORDS[row.status] + (row.status === "processing" ? ` ${Math.round(row.progress * 100)} %` : "");
}

export const noise = (row) => models.get(row.model_name)?.is_untrained &&
  h("span.noise", { title: "untrained weights: the audio is noise" }, "noise");

export function facts(row) {
  const texts = [
    seconds(row.duration_seconds), row.model_name, row.take && `take ${row.take}`,
    row.bpm && `~${Math.round(row.bpm)} BPM`, row.musical_key && keyName(row.musical_key),
    ...(row.tags ?? []).map((tag) => `#${tag}`), moment(row.created_at),
  ];
  return [noise(row), h("span.status", {}, statusOf(row)), ...texts.filter(Boolean).map((text) => h("span", {}, text))]
    .filter(Boolean);
}

async function made(row, path, changes) {
  const fresh = await call("POST", `generations/${row.id}/${path}`, changes);
  mine.add(fresh.id);
  emit("made", [put(fresh)]);
}

export const actions = {
  async star(row) {
    put({ id: row.id, starred: !row.starred });
    try {
      await call(row.starred ? "DELETE" : "PUT", `generations/${row.id}/star`);
    } catch (error) {
      put({ id: row.id, starred: row.starred });
      throw error;
    }
  },
  cancel: async (row) => put(await call("POST", row.urls.cancel)),
  retry: async (row) => put(await call("POST", row.urls.retry)),
  again: (row) => made(row, "again", { seed: "new" }),
  same: (row) => made(row, "again", { seed: "same" }),
  more: (row, more) => made(row, "continue", { duration: Math.min(row.duration_seconds, 30) + more }),
  async remove(row) {
    if (!(await ask(`Delete “${titleOf(row).slice(0, 80)}” and its audio?`, "Delete"))) return;
    await call("DELETE", `generations/${row.id}`);
    emit("gone", row.id);
  },
};

export async function act(name, row, ...rest) {
  try {
    await actions[name](row, ...rest);
  } catch (error) {
    toast(error.message);
  }
}
