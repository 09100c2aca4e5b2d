// The form: one request for each press, with audio of the visitor if there is some.
import { $, call, emit, root, send } from "./core.js";

const form = $("composer");
let isSending = false;
let clip = null; // a promise of the id of the chosen file

async function enqueue(event) {
  event.preventDefault();
  if (isSending) return;
  const { idempotency_key: key, ...fields } = Object.fromEntries([...new FormData(form)].filter(([, value]) => value));
  const body = { prompt: "", ...fields, duration: Number(fields.duration), variations: Number(fields.variations) };
  isSending = $("generate").ariaDisabled = true; // a disabled button would lose the focus
  $("problem").textContent = "";
  try {
    if (clip) body[$("clip-use").value] = await clip;
    emit("made", await call("POST", "generations", body, { "Idempotency-Key": key }));
    renew();
  } catch (error) {
    $("problem").textContent = error.message;
  }
  isSending = $("generate").ariaDisabled = false;
}

function renew() {
  form.idempotency_key.value = crypto.getRandomValues(new Uint32Array(4)).join("-");
}

function upload() {
  const [file] = $("clip").files;
  const tell = (text) => clip === mine && ($("clip-said").textContent = text);
  const mine = (clip = file && send("POST", `${root}/v1/uploads`, {
    body: file,
    headers: { "Content-Type": "application/octet-stream" },
    onprogress: ({ loaded, total }) => tell(`${Math.round((100 * loaded) / total)}% sent`),
  }).then(({ id, duration_seconds: length }) => (tell(`${length.toFixed(1)} s of audio are there.`), id)));
  tell("");
  mine?.catch(({ message }) => tell(message));
}

form?.addEventListener("submit", enqueue);
form?.addEventListener("input", renew);
$("clip")?.addEventListener("change", upload);
$("prompt")?.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
