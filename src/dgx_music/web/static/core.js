// What all parts of the page share: its elements, the server, and what is said.
export const root = document.documentElement.dataset.root;
export const mine = new Set(); // made here: their start and end are told
export const $ = (id) => document.getElementById(id);
export const all = (selector, place = document) => [...place.querySelectorAll(selector)];
export const emit = (name, detail) => document.dispatchEvent(new CustomEvent(name, { detail }));
export const on = (name, run) => document.addEventListener(name, (event) => run(event.detail));
export const idOf = (place) => place?.dataset.id ?? place?.id;

// Such a request parses a page without running anything, and says how much was sent.
export function send(method, url, { body, headers = {}, type = "json", onprogress } = {}) {
  return new Promise((done, fail) => {
    const request = new XMLHttpRequest();
    request.open(method, url);
    request.responseType = type;
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = onprogress;
    request.onerror = () => fail(new Error("The server cannot be reached."));
    request.onload = () => {
      const { status, response } = request;
      const find = (id) => response?.getElementById?.(id);
      if (status === 401) location.reload();
      else if (type === "document" ? find("rows") : status < 300) done(response);
      else fail(new Error(response?.detail ?? find("reason")?.textContent ?? `The server answered ${status}.`));
    };
    request.send(body);
  });
}

export function call(method, path, body, headers) {
  const json = { body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers } };
  return send(method, `${root}/v1/${path}`, json);
}

// Returns the page that the server makes for a query.
export const read = async (query) => dress(await send("GET", `${root}/${query}`, { type: "document" }));

// Adds what only a browser can: the local time, and how far a row is.
export function dress(page) {
  for (const time of all("time", page)) {
    time.textContent = new Date(time.dateTime).toLocaleString([], { day: "numeric", month: "short", hour: "numeric", minute: "2-digit" });
  }
  for (const row of all("[data-done]", page)) showProgress(row, row.dataset.done);
  return page;
}

export function showProgress(row, done) {
  row.style.setProperty("--done", `${done * 100}%`);
  row.querySelector(".status").textContent = `running ${Math.round(done * 100)}%`;
}

const keyOf = (each) => each.id || each.dataset.do || each.name || each.textContent;

// Puts what is new in the place of what was there; the focus stays where it was.
export function swap(old, fresh) {
  if (!fresh) return;
  const details = all("details", old);
  all("details", fresh).forEach((each, at) => (each.open = details[at]?.open ?? each.open));
  if (old.isEqualNode(fresh)) return;
  const focused = old.contains(document.activeElement) && document.activeElement;
  old.replaceWith(fresh);
  if (!focused) return;
  const same = all("a, button, input, summary, h2", fresh).find((each) => keyOf(each) === keyOf(focused));
  (same ?? fresh.querySelector(".prompt, h2") ?? $("rows")).focus();
}

let silence;
export function toast(text) {
  $("toast").textContent = text;
  clearTimeout(silence);
  silence = setTimeout(toast, 8000, "");
}
