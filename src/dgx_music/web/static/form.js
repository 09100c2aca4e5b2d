// The form: one request for each press of the button, with audio of the visitor's if there is some.
import { $, call, emit, root, send } from "./core.js";

const form = $("composer");
let isSending = false;
let clip = null;

async function enqueue(event) {
  event.preventDefault();
  if (isSending) return;
  const { idempotency_key: key, ...fields } = Object.fromEntries([...new FormData(form)].filter(([, value]) => value));
  const body = { prompt: "", ...fields, duration: Number(fields.duration), variations: Number(fields.variations) };
  if (clip) body[$("clip-use").value] = clip;
  busy(true);
  $("problem").textContent = "";
  try {
    emit("made", await call("POST", "generations", body, { "Idempotency-Key": key }));
    renew();
  } catch (error) {
    $("problem").textContent = error.message;
  }
  busy(false);
}

function busy(isBusy) {
  isSending = isBusy;
  $("generate").ariaDisabled = isBusy; // a disabled button would lose the focus
}

function renew() {
  form.idempotency_key.value = crypto.getRandomValues(new Uint32Array(4)).join("-");
}

async function upload() {
  const [file] = $("clip").files;
  const isLatest = () => file === $("clip").files[0];
  const tell = (text) => isLatest() && ($("clip-said").textContent = text);
  const onprogress = ({ loaded, total }) => tell(`${Math.round((100 * loaded) / total)}% sent`);
  clip = null;
  tell("");
  if (!file) return;
  try {
    const headers = { "Content-Type": "application/octet-stream" };
    const made = await send("POST", `${root}/v1/uploads`, { body: file, headers, onprogress });
    if (isLatest()) clip = made.id;
    tell(`${made.duration_seconds.toFixed(1)} s of audio are there.`);
  } catch (error) {
    tell(error.message);
  }
}

form?.addEventListener("submit", enqueue);
form?.addEventListener("input", renew);
$("clip")?.addEventListener("change", upload);
$("prompt")?.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
