// The drawer with all of one generation, and the view of workers and models.
import { $, act, call, facts, h, icon, isOpen, mayEnqueue, mayOperate, models, moment, on, put, rows, seconds, titleOf, toast } from "./core.js";

let shown = null;
let opener = null;

export const isShown = () => shown !== null;

export async function show(id) {
  if (id === shown) return;
  const wasOpen = shown !== null;
  shown = id;
  $("detail").hidden = id === null;
  if (id === null) return wasOpen && (opener?.isConnected ? opener : $("rows")).focus();
  if (!wasOpen) opener = document.activeElement;
  $("detail").replaceChildren(h("p", {}, "Loading…"));
  await load(true);
}

async function load(takesFocus) {
  const id = shown;
  try {
    const [row, kin] = await Promise.all([call("GET", `generations/${id}`), family(id)]);
    if (id !== shown) return;
    build(put(row), kin);
  } catch (error) {
    if (id !== shown) return;
    $("detail").replaceChildren(closer(), h("h2", { id: "detail-title", tabIndex: -1 }, "It cannot be shown"), h("p.bad", {}, error.message));
  }
  if (takesFocus) $("detail-title").focus();
}

async function family(id) {
  const known = rows.get(id) ?? (await call("GET", `generations/${id}`));
  const list = async (query) => (await call("GET", `generations?${query}`)).generations;
  const [children, takes, parent] = await Promise.all([
    list(`parent=${id}`), known.batch_id ? list(`batch=${known.batch_id}`) : [],
    known.parent_id ? call("GET", `generations/${known.parent_id}`).catch(() => null) : null,
  ]);
  return [["Made from", parent ? [parent] : []], ["Made from this", children], ["Takes", takes.filter((take) => take.id !== id)]];
}

const closer = () => h("button.icon", { ariaLabel: "Close the details", "data-go": "close" }, icon("x"));
const button = (text, run, props = {}) => h("button.plain", { type: "button", onclick: run, ...props }, text);
const pairs = (list) => h("dl.facts", {}, list.filter(([, value]) => value != null && value !== "").flatMap(([name, value]) => [h("dt", {}, name), h("dd", { dir: "auto" }, value)]));

function build(row, kin) {
  const meta = h("p.meta", { id: "detail-meta" }, facts(row));
  $("detail").dataset.status = row.status;
  $("detail").replaceChildren(
    closer(), h("h2", { id: "detail-title", tabIndex: -1, dir: "auto" }, titleOf(row)), meta,
    row.error_message && isFailed(row) ? h("p.bad", {}, row.error_message) : "",
    buttons(row), ...outlook(row), h("h3", {}, "Request"), request(row),
    ...(mayEnqueue ? [h("h3", {}, "Labels"), labels(row)] : []),
    ...kin.filter(([, list]) => list.length).flatMap(([name, list]) => [h("h3", {}, name), h("ul.kin", {}, list.map((each) =>
      h("li", {}, h("a", { href: `?show=${each.id}`, "data-go": "show", "data-id": each.id, dir: "auto" }, `${titleOf(each)} · ${each.status}`))))]),
    ...(row.attempts.length ? [h("h3", {}, "Attempts"), tries(row)] : []),
    h("details", {}, h("summary", {}, "As a request"), h("pre", {}, curl(row))),
  );
}

const isFailed = (row) => row.status === "failed" || row.status === "pending";

function buttons(row) {
  const list = [];
  const add = (name, text) => list.push(button(text, () => act(name, row)));
  if (row.urls.audio) {
    const format = (row.metadata?.audio?.format ?? row.audio_format ?? "wav").toUpperCase();
    list.push(h("button.go", { onclick: () => act("play", row) }, "Play"));
    list.push(h("a.plain", { href: `${row.urls.audio}?download=1`, download: "" }, `Download ${format}`));
  }
  if (mayEnqueue) {
    if (row.urls.cancel) add("cancel", "Cancel");
    if (row.urls.retry) add("retry", "Retry");
    list.push(h("button.icon", { id: "detail-star", title: "Star", ariaLabel: "Star", ariaPressed: String(Boolean(row.starred)), onclick: () => act("star", rows.get(row.id)) }, icon("star")));
    add("again", "Again");
    if (row.sampling?.seed) add("same", "Same seed");
    if (row.urls.audio) {
      const more = h("input", { type: "number", min: 1, max: 270, value: 10, required: true, ariaLabel: "Seconds more" });
      list.push(h("form.unit", { onsubmit: (event) => (event.preventDefault(), act("more", row, more.valueAsNumber)) }, h("button.plain", {}, "Continue"), more, "s"));
    }
  }
  if (mayOperate && row.status !== "processing") add("remove", "Delete");
  return h("div.buttons", {}, list);
}

function outlook({ estimate, status }) {
  if (!estimate || !isOpen({ status })) return [];
  const { position, done_in_seconds: done, unknown_because: unknown } = estimate;
  const texts = [position && `number ${position} in the queue`, done ? `done in ${Math.ceil(done.low)}–${Math.ceil(done.high)} s` : unknown];
  return [h("p.hint", {}, texts.filter(Boolean).join(" · "))];
}

function request(row) {
  const { seed, guidance_scale: guidance, temperature, negative_prompt: avoided } = row.sampling ?? {};
  const licence = models.get(row.model_name)?.licence;
  return pairs([
    ["Prompt", row.title && row.prompt], ["Not like", row.negative_prompt ?? avoided], ["Model", row.model_name],
    ["Weights", licence && `licence ${licence}: it may limit what the audio is used for`], ["Length", seconds(row.duration_seconds)],
    ["Seed", seed && h("span", {}, seed, " ", button("copy", () => navigator.clipboard?.writeText(seed).then(() => toast("Copied."))))],
    ["Guidance", guidance != null && String(guidance)], ["Temperature", temperature != null && String(temperature)],
    ["Made by", row.model_version === "tone" ? "the tone engine: sine waves for tests, not music" : null],
    ["Took", row.generation_time_seconds && seconds(row.generation_time_seconds)],
    ["Tenant", row.tenant], ["Created", moment(row.created_at)], ["Id", row.id],
  ].filter(([, value]) => value !== false));
}

function labels(row) {
  const title = h("input", { value: row.title ?? "", dir: "auto" });
  const tags = h("input", { value: (row.tags ?? []).join(", "), dir: "auto", placeholder: "night, draft" });
  const notes = h("textarea.line", { value: row.notes ?? "", rows: 2, dir: "auto" });
  const save = async (event) => {
    event.preventDefault();
    const list = tags.value.split(",").map((tag) => tag.trim()).filter(Boolean);
    try {
      put(await call("PATCH", `generations/${row.id}`, { title: title.value.trim() || null, notes: notes.value.trim() || null, tags: list.length ? list : null }));
      toast("Saved.");
    } catch (error) {
      toast(error.message);
    }
  };
  return h("form.fields", { onsubmit: save }, h("label", {}, "Title", title), h("label", {}, "Tags", tags), h("label", {}, "Notes", notes), h("button.plain", {}, "Save labels"));
}

const tries = (row) => h("ol.tries", {}, row.attempts.map((each) => h("li", {},
  `${each.attempt}. ${each.outcome ?? "running"} `, moment(each.started_at), each.error_message ? h("span.bad", {}, ` ${each.error_message}`) : "")));

function curl(row) {
  const body = { prompt: row.prompt, model: row.model_name, duration: row.duration_seconds, seed: row.sampling?.seed };
  return `curl -X POST ${location.origin}${row.urls.self.replace(/\/[^/]+$/, "")} \\\n  -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
}

on("row", ({ row }) => {
  if (row.id !== shown || !$("detail-meta")) return;
  $("detail-meta").replaceChildren(...facts(row));
  $("detail-title").textContent = titleOf(row);
  if ($("detail-star")) $("detail-star").ariaPressed = String(Boolean(row.starred));
  const focused = $("detail").contains(document.activeElement) && document.activeElement;
  if ($("detail").dataset.status !== row.status && !(focused && focused.form)) load(Boolean(focused));
});

export async function workers() {
  const place = $("workers");
  try {
    const [{ workers: list }, { models: all }] = await Promise.all([call("GET", "workers"), call("GET", "models")]);
    const paused = all.length > 0 && all.every((model) => model.is_paused);
    place.replaceChildren(
      h("h1.unseen", {}, "Workers and models"), h("h2", {}, "Workers"), list.length ? h("ul.cards", {}, list.map(worker)) : h("p", {}, "No worker has been seen within a day. Start one: ", h("code", {}, "dgx-music worker")),
      h("h2", {}, "Models"), mayOperate ? h("p.buttons", {}, turn(null, paused)) : "",
      h("ul.cards", {}, all.filter((model) => model.is_served || model.is_paused || model.is_default).map((model) => h("li", {}, h("h3", {}, model.name), pairs([
        ["Served", model.is_served ? "by a worker" : "by none"], ["Paused", model.is_paused && "yes"], ["Licence", model.licence], ["Audio", model.is_untrained && "noise: untrained weights"],
      ].filter(([, value]) => value)), mayOperate && turn(model.name, model.is_paused)))),
    );
  } catch (error) {
    place.replaceChildren(h("p.bad", {}, error.message), button("Try again", workers));
  }
}

const worker = (each) => h("li", { className: each.is_alive ? "" : "gone" }, h("h3", {}, each.host ? `${each.host} · ${each.pid}` : each.model_name ?? "worker"), pairs([
  ["State", each.is_alive ? each.state : `ended${each.end_reason ? `: ${each.end_reason}` : ""}`], ["Model", each.model_name], ["Device", each.device],
  ["In hand", `${each.running_count} of ${each.slots}`], ["Seen", moment(each.heartbeat_at)],
]));

function turn(model, isPaused) {
  const text = `${isPaused ? "Resume" : "Pause"} ${model === null ? "all models" : ""}`;
  const run = () => call("POST", isPaused ? "resume" : "pause", model === null ? {} : { model }).then(workers, (error) => toast(error.message));
  return button(text.trim(), run, { ariaLabel: `${text}${model ?? ""}` });
}
