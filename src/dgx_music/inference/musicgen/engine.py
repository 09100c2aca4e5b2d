"""The MusicGen engine: weights, text encoder and codec from transformers, tokens from the slots."""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np

from dgx_music.audio.samples import Audio
from dgx_music.catalog import WINDOW_SECONDS, ModelInfo, find_model
from dgx_music.errors import EngineError, EngineUnavailableError
from dgx_music.inference.engine import Engine, EngineSettings, GenerationRequest, Run

try:
    import torch
    import transformers
    from torch import Tensor

    from dgx_music.inference.musicgen.codec import Codec
    from dgx_music.inference.musicgen.conditioning import LONGEST_PREFIX_TEXT, Conditioner, Conditions, fit
    from dgx_music.inference.musicgen.decoder import Decoder
    from dgx_music.inference.musicgen.drift import MOST_NATS, TRIAL_FRAMES, measure_change, trial_requests
    from dgx_music.inference.musicgen.loop import DecodingLoop
    from dgx_music.inference.musicgen.slots import Row, Slots, delays
    from dgx_music.inference.musicgen.weights import Weights, load_weights, stored_bytes
    from dgx_music.inference.musicgen.windows import WindowRun, cut
    from dgx_music.inference.residents import free_bytes
    from dgx_music.inference.trouble import give_back_memory
except ImportError as error:
    raise EngineUnavailableError(
        "The musicgen engine needs torch and transformers; install `dgx-music[musicgen]`."
    ) from error

E = TypeVar("E", bound="MusicGenEngine")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PATIENCE_SECONDS = 0.1
_MOST_SLOTS = {"cpu": 8, "cuda": 64}
"""More would hardly add to what is made in a second, and make each generation slower. On an H100 64 slots make a third more
than 32, of small and of large."""
_SLOTS_SHARE = {"cpu": 0.4, "cuda": 0.8}
"""Of the free memory; the rest is for steps, text and codec, and on a CPU for everybody else."""


def load(settings: EngineSettings) -> Engine:
    """Return the engine of ``settings.model``, loaded and ready.

    Raises ``EngineUnavailableError``, in one sentence, where device or weights are missing or damaged.
    """
    return build(settings, MusicGenEngine)


def build(settings: EngineSettings, kind: type[E]) -> E:
    """Return an engine of this kind, loaded as ``load`` does."""
    transformers.logging.set_verbosity_error()  # its warnings concern MusicGen's own configuration, not the user
    transformers.logging.disable_progress_bar()
    device = _choose_device(settings.device)
    info = find_model(settings.model)
    if info is None:
        raise EngineUnavailableError(f"The model {settings.model!r} is neither in the catalogue nor an absolute path.")
    weights = load_weights(info, settings.revision, _choose_dtype(settings.dtype, device))
    if device.type == "cpu":
        _spare_a_core()
    return kind(weights, device, info, settings)


def estimate_bytes(settings: EngineSettings) -> int | None:
    """Return how much memory the engine of ``settings.model`` would take besides its slots, where that is known."""
    info = find_model(settings.model)
    return None if info is None else stored_bytes(info, settings.revision)


class MusicGenEngine:
    """One MusicGen model on one device. The language model may be in 16 bit; T5 and EnCodec stay in float32.

    ``generate`` reads the request in its own thread; the steps, which all generations share, are the decoding thread's,
    and the audio is made in a third thread, so that neither keeps the slots waiting.
    """

    def __init__(self, weights: Weights, device: torch.device, info: ModelInfo, settings: EngineSettings) -> None:
        model = weights.model.to(device)
        others = (model.text_encoder, model.audio_encoder)
        self._others_bytes: int = sum(weight.nbytes for part in others for weight in part.parameters())
        self._codec = Codec(model.audio_encoder, model.config.decoder.audio_channels)
        self._longest_window = round(WINDOW_SECONDS * self._codec.frame_rate)
        self._longest_delay = delays(model.config.decoder.num_codebooks, self._codec.channels)[-1]
        max_steps = self._longest_window + self._longest_delay
        prefix = getattr(model.config, "chroma_length", 0)  # of the models that hear a melody
        room = prefix and prefix + LONGEST_PREFIX_TEXT
        self._decoder = Decoder(model.decoder, getattr(model, "enc_to_dec_proj", None), room + max_steps + 1)
        self._conditioner = Conditioner(model, weights.tokenizer, self._decoder, self._codec.sample_rate)
        is_traced = settings.compile == "on"
        if settings.compile == "auto" and device.type == "cpu":
            self._decoder.build_kernels()
        self._facts_of_numbers = self._save_bits(settings)
        if device.type == "cpu":
            self._facts_of_numbers["kernels"] = "c" if self._decoder.has_native_kernels else "torch"
        if is_traced:
            self._decoder.compile()
        slot_count = settings.slots or _fitting_slots(self._decoder, settings.model_count)
        self._loop = DecodingLoop(
            lambda count: Slots(self._decoder, count, max_steps),
            slot_count,
            guard=torch.no_grad if is_traced else torch.inference_mode,
        )
        self._codec_thread = ThreadPoolExecutor(1, "codec")  # clips that end together are sooner done one by one
        self._is_untrained = info.is_untrained
        self.device = str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
        self.model_version = weights.version
        self.notice = weights.notice

    @property
    def slots(self) -> int:
        """How many generations are decoded at a time; fewer than at first where memory turns out not to suffice."""
        return self._loop.slot_count

    @property
    def memory_bytes(self) -> int:
        """About how much memory the engine holds: text encoder, codec, language model and slots."""
        return self._others_bytes + self._decoder.weight_bytes + self.slots * self._decoder.slot_bytes

    def close(self) -> None:
        """Drop all that is held; nothing may run, and nothing can afterwards."""
        self._codec_thread.shutdown()
        vars(self).clear()

    def generate(self, request: GenerationRequest, run: Run) -> Audio:
        """Return the request's audio in the model's own channels and sample rate, exactly as long as was asked for.

        The same seed gives the same audio on the same device, with the same kernels. Raises ``EngineError`` where a number is
        not finite, and ``GenerationRejectedError`` for what this model cannot do.
        """
        started = time.perf_counter()
        run.check_cancelled()
        sample_count = round(request.duration * self._codec.sample_rate)
        codes = self._decode(request, math.ceil(sample_count / self._codec.frame_size), run)  # [codebook, frame]
        run.free_slot()
        samples = self._in_codec_thread(run, self._codec.decode, codes)[:, :sample_count].numpy()
        if not np.isfinite(samples).all():
            raise EngineError("The codec's samples are not finite; its weights may be damaged.")
        run.report_progress(1.0)
        return Audio(samples, self._codec.sample_rate, self._facts(request, time.perf_counter() - started))

    def _decode(self, request: GenerationRequest, frame_count: int, run: Run) -> Tensor:
        """Return the codes ``[codebook, frame]``, decoded window by window where the clip is longer than one."""
        is_long = frame_count > self._longest_window
        random = torch.Generator().manual_seed(request.effective_seed)  # on the CPU: the same numbers on every device
        codes = self._read_clip(request, run)[:, : frame_count - 1]
        for window in cut(frame_count, codes.shape[1], self._longest_window):
            conditions = self._conditioner.read(request, window.start / self._codec.frame_rate if is_long else None)
            row = self._row(request, conditions, codes[:, window.start :], window.frame_count, random)
            decoded = self._loop.decode(row, WindowRun(run, window, frame_count))
            codes = torch.cat([codes[:, : window.start], decoded], dim=1)
        return codes

    def _row(
        self,
        request: GenerationRequest,
        conditions: Conditions,
        given: Tensor,
        frame_count: int,
        random: torch.Generator,
    ) -> Row:
        return Row(
            # Copied to a GPU here, in the request's own thread: the decoding thread would have to wait for its steps.
            uniforms=torch.rand(frame_count + self._longest_delay, self._decoder.codebook_count, generator=random).to(
                self._decoder.device
            ),
            frame_count=frame_count,
            text=conditions.text,
            negative=conditions.negative,
            prefix=conditions.prefix,
            given=given.to(self._decoder.device) if given.shape[1] else None,
            guidance_scale=request.guidance_scale if conditions.is_guided else 1.0,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
        )

    def _read_clip(self, request: GenerationRequest, run: Run) -> Tensor:
        """Return the codes ``[codebook, frame]`` of the clip to be continued, none where there is none."""
        if request.continuation is None:
            return torch.empty(self._decoder.codebook_count, 0, dtype=torch.long)
        clip = fit(request.continuation, self._codec.sample_rate, self._codec.channels)
        return self._in_codec_thread(run, self._codec.encode, clip)

    def _in_codec_thread(self, run: Run, work: Any, tensor: Tensor) -> Tensor:
        """Return what the codec makes of the tensor; a generation that is cancelled meanwhile does not wait for it."""
        result: Future[Tensor] = self._codec_thread.submit(work, tensor)
        while not wait((result,), _PATIENCE_SECONDS).done:
            try:
                run.check_cancelled()
            except BaseException:
                result.cancel()  # where it has not begun
                raise
        return result.result()

    def _save_bits(self, settings: EngineSettings) -> dict[str, Any]:
        """Use 8 bits where the settings say so and the model bears it; return what a user should know of that."""
        asked = {"weights": settings.weights, "kv_cache": settings.kv_cache}
        asked = {name: bits for name, bits in asked.items() if bits != "full"}
        if not asked:
            return {}
        if "weights" in asked and self._decoder.device.type == "cuda":
            raise EngineUnavailableError(
                "DGX_MUSIC_WEIGHTS=int8 makes a GPU slower, not faster (a step of musicgen-small takes 3.6 times as long on an "
                "H100); use DGX_MUSIC_WEIGHTS=full, and DGX_MUSIC_KV_CACHE=fp8 for many slots."
            )

        def change() -> None:
            if "weights" in asked:
                self._decoder.quantise()
            if "kv_cache" in asked:
                self._decoder.shrink_cache()

        requests = trial_requests(settings.model, hears_melody=not self._decoder.reads_text)
        drift = measure_change(self._decoder, [self._trial(request) for request in requests], change)
        if not drift <= MOST_NATS:  # NaN is not
            remedy = " and ".join(f"DGX_MUSIC_{name.upper()}=full" for name in asked)
            raise EngineUnavailableError(
                f"With {' and '.join(asked.values())} this model chooses too differently ({drift:.3g} nats a token, at most "
                f"{MOST_NATS:g} are accepted); use {remedy}."
            )
        return {**asked, "drift_nats": round(drift, 5)}

    def _trial(self, request: GenerationRequest) -> Row:
        """Return the row of a request that the model is tried with: what it is given, and a few frames of its own."""
        given = torch.empty(self._decoder.codebook_count, 0, dtype=torch.long)
        if request.continuation is not None:
            given = self._codec.encode(fit(request.continuation, self._codec.sample_rate, self._codec.channels))
        random = torch.Generator().manual_seed(request.effective_seed)
        return self._row(request, self._conditioner.read(request), given, given.shape[1] + TRIAL_FRAMES, random)

    def _facts(self, request: GenerationRequest, device_seconds: float) -> dict[str, Any]:
        return {
            "engine": "musicgen",
            "seed": request.effective_seed,
            "device": self.device,
            "dtype": str(self._decoder.dtype).removeprefix("torch."),
            "device_seconds": round(device_seconds, 3),
            "is_untrained": self._is_untrained,
            **self._facts_of_numbers,
        }


def _fitting_slots(decoder: Decoder, model_count: int) -> int:
    """Return how many slots this model's share of the free memory holds, no more than still make it faster."""
    kind = decoder.device.type
    give_back_memory()  # what loading has left behind would count as taken
    free = free_bytes(str(decoder.device))
    if free is None:
        return 1
    return max(1, min(_MOST_SLOTS[kind], int(free * _SLOTS_SHARE[kind] / model_count) // decoder.slot_bytes))


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineUnavailableError(f"The device {name} was asked for, but torch does not find it; use auto or cpu.")
    return device


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cpu":
        return torch.bfloat16 if _multiplies_bfloat16() else torch.float32
    with torch.cuda.device(device):  # it asks the current one
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for that; without, it would be slower than float32."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.13 cannot say
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def _spare_a_core() -> None:
    """Leave one core to the parent process; torch's threads wait for each other at every step, for a busy one too."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
