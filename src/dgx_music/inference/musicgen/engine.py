"""The MusicGen engine: weights, text encoder and codec from transformers, tokens from the slots."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any, TypeVar

from dgx_music.audio.samples import Audio
from dgx_music.catalog import WINDOW_SECONDS, ModelInfo, find_model
from dgx_music.errors import EngineUnavailableError, how_to_install
from dgx_music.inference.engine import Engine, EngineSettings, GenerationRequest, Run
from dgx_music.sampling import Sampling

try:
    import torch
    import transformers
    from torch import Tensor

    from dgx_music.inference.musicgen.batch import Row, delays
    from dgx_music.inference.musicgen.budget import (
        budget_of,
        check_room,
        max_positions_of,
        max_steps_of,
        plan,
    )
    from dgx_music.inference.musicgen.codec import Codec
    from dgx_music.inference.musicgen.codec_thread import CodecThread
    from dgx_music.inference.musicgen.conditioning import (
        Conditioner,
        Conditions,
        fit,
    )
    from dgx_music.inference.musicgen.decoder import Decoder
    from dgx_music.inference.musicgen.devices import (
        check_weights,
        choose_device,
        choose_dtype,
        describe,
        fitting_slots,
        keep_float32,
        leave_a_core_free,
    )
    from dgx_music.inference.musicgen.drift import (
        MAX_NATS,
        TRIAL_FRAMES,
        measure_change,
        trial_requests,
    )
    from dgx_music.inference.musicgen.heap import return_free_memory
    from dgx_music.inference.musicgen.live_clip import LiveClip
    from dgx_music.inference.musicgen.loop import DecodingLoop
    from dgx_music.inference.musicgen.slots import Slots
    from dgx_music.inference.musicgen.weights import Weights, load_weights, stored_bytes
    from dgx_music.inference.musicgen.windows import WindowRun, cut
except ImportError as error:
    raise EngineUnavailableError(
        f"The musicgen engine needs torch and transformers; {how_to_install('musicgen')}."
    ) from error

E = TypeVar("E", bound="MusicGenEngine")

_CANCEL_CHECK_SECONDS = 0.1


def load(settings: EngineSettings) -> Engine:
    """Return the engine of ``settings.model``, loaded and ready.

    Raises ``EngineUnavailableError``, in one sentence, if device or weights are missing or damaged.
    """
    return build(settings, MusicGenEngine)


def build(settings: EngineSettings, kind: type[E]) -> E:
    """Return an engine of this kind, loaded as ``load`` does."""
    transformers.logging.set_verbosity_error()  # its warnings are about MusicGen's own config
    transformers.logging.disable_progress_bar()
    device = choose_device(settings.device)
    check_weights(settings.weights, device)
    info = find_model(settings.model)
    if info is None:
        raise EngineUnavailableError(
            f"The model {settings.model!r} is neither in the catalogue nor an absolute path."
        )
    dtype = choose_dtype(settings.dtype, device)

    def check(config: Any) -> None:
        budget = plan(config, dtype, settings, device.type)
        check_room(budget.total(1), device, "the model with one slot")

    weights = load_weights(info, settings.revision, dtype, check)
    if device.type == "cpu":
        leave_a_core_free()
    else:
        keep_float32()
    return kind(weights, device, info, settings)


def estimate_bytes(settings: EngineSettings) -> int | None:
    """Return how much memory the engine would take besides its slots; ``None`` if unknown."""
    info = find_model(settings.model)
    return None if info is None else stored_bytes(info, settings.revision)


class MusicGenEngine:
    """One MusicGen model on one device.

    The language model may be in 16 bits; T5 and EnCodec stay in float32. One thread reads the
    requests; the decoding thread makes the steps, which all generations share; a third thread makes
    the audio. So the slots wait for neither.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        info: ModelInfo,
        settings: EngineSettings,
    ) -> None:
        model = weights.model
        for name, part in model.named_children():
            if name != "decoder":  # fused on the host: a GPU's memory would be left in fragments
                part.to(device)
        self._codec = Codec(model.audio_encoder, model.config.decoder.audio_channels)
        self._longest_window = round(WINDOW_SECONDS * self._codec.frame_rate)
        self._longest_delay = delays(model.config.decoder.num_codebooks, self._codec.channels)[-1]
        projection = getattr(model, "enc_to_dec_proj", None)
        max_positions = max_positions_of(model.config)
        self._decoder = Decoder(model.decoder, projection, max_positions, device)
        self._conditioner = Conditioner(
            model, weights.tokenizer, self._decoder, self._codec.sample_rate
        )
        self._number_facts = self._prepare_decoder(settings)
        self._max_steps = max_steps_of(model.config)
        self._budget = budget_of(model, self._decoder, device.type)
        slot_count = settings.slots or fitting_slots(self._budget, device, settings.model_count)
        self._loop = DecodingLoop(
            self._make_slots,
            slot_count,
        )
        self._codec_thread = CodecThread(self._codec.most_together)
        self._is_untrained = info.is_untrained
        self.device = describe(device)
        self.model_version = weights.version
        self.notice = weights.notice

    @property
    def slots(self) -> int:
        """How many generations are decoded at a time; shrinks if memory runs out."""
        return self._loop.slot_count

    @property
    def memory_bytes(self) -> int:
        """About how much memory the engine holds: text encoder, codec, language model and slots."""
        return self._budget.weights + self.slots * self._decoder.slot_bytes

    def close(self) -> None:
        """Drop everything; no generation may run, and none can run afterwards."""
        self._codec_thread.close()
        self._conditioner.close()
        vars(self).clear()

    def generate(self, request: GenerationRequest, run: Run) -> Audio:
        """Return the request's audio, exactly as long as requested.

        It has the model's own channels and sample rate. The same seed gives the same audio on the
        same device with the same kernels. Raises ``EngineError`` if a number is not finite, and
        ``GenerationRejectedError`` if this model cannot do what the request asks.
        """
        started = time.perf_counter()
        run.check_cancelled()
        sample_count = round(request.duration * self._codec.sample_rate)
        frame_count = math.ceil(sample_count / self._codec.frame_size)
        live = LiveClip(self._codec, self._codec_thread, frame_count, sample_count, run)
        try:
            codes = self._decode(request, live, run)  # [codebook, frame]
            run.free_slot()
            live.push_rest(codes)
            decoded = _result_of(live.result, run)  # [channel, sample]
        except BaseException:
            live.result.cancel()
            raise
        samples = decoded[:, :sample_count].numpy()
        run.report_progress(1.0)
        device_seconds = time.perf_counter() - started
        return Audio(samples, self._codec.sample_rate, self._facts(request, device_seconds))

    def _make_slots(self, count: int) -> Slots:
        needed = count * self._budget.slot + self._budget.work
        check_room(needed, self._decoder.device, f"a batch of {count}")
        return Slots(self._decoder, count, self._max_steps)

    def _decode(self, request: GenerationRequest, live: LiveClip, run: Run) -> Tensor:
        """Return the codes ``[codebook, frame]``; a long clip is decoded window by window."""
        frame_count = live.frame_count
        is_long = frame_count > self._longest_window
        read_window = self._conditioner.open(request, is_long=is_long)
        # On the CPU: the same numbers on every device.
        random = torch.Generator().manual_seed(request.effective_seed)
        codes = self._read_clip(request, run)[:, : frame_count - 1]  # [codebook, frame]
        for window in cut(frame_count, codes.shape[1], self._longest_window):
            if window.start:
                return_free_memory()  # or a clip of many windows would take more than one of one
            conditions = read_window(window.start / self._codec.frame_rate)
            given = codes[:, window.start :]
            row = self._row(request, conditions, given, window.frame_count, random)
            before = codes[:, : window.start]
            window_run = WindowRun(run, window, frame_count)
            decoded = self._loop.decode(row, window_run, live.seen_after(before))
            codes = torch.cat([before, decoded], dim=1)
        return codes

    def _row(
        self,
        request: GenerationRequest,
        conditions: Conditions,
        given: Tensor,
        frame_count: int,
        random: torch.Generator,
    ) -> Row:
        shape = (frame_count + self._longest_delay, self._decoder.codebook_count)
        uniforms = torch.rand(shape, generator=random)  # [step, codebook]
        sampling = Sampling(**Sampling.pick(vars(request)))  # without the request's clips
        return Row(
            # Copied to a GPU in the caller's thread: the decoding thread would wait for its steps.
            uniforms=uniforms.to(self._decoder.device),
            frame_count=frame_count,
            text=conditions.text,
            negative=conditions.negative,
            prefix=conditions.prefix,
            given=given.to(self._decoder.device) if given.shape[1] else None,
            sampling=sampling if conditions.is_guided else replace(sampling, guidance_scale=1.0),
        )

    def _read_clip(self, request: GenerationRequest, run: Run) -> Tensor:
        """Return the codes ``[codebook, frame]`` of the clip to continue, if any."""
        if request.continuation is None:
            return self._no_codes()
        clip = fit(request.continuation, self._codec.sample_rate, self._codec.channels)
        return _result_of(self._codec_thread.start(self._codec.encode(clip)), run)

    def _no_codes(self) -> Tensor:
        return torch.empty(self._decoder.codebook_count, 0, dtype=torch.long)

    def _prepare_decoder(self, settings: EngineSettings) -> dict[str, Any]:
        """Choose kernels and number formats; return the facts about them."""
        is_on_cpu = self._decoder.device.type == "cpu"
        if settings.kernels == "auto" and is_on_cpu:
            self._decoder.build_kernels()
        facts = self._reduce_bits(settings)
        if is_on_cpu:
            facts["kernels"] = "c" if self._decoder.has_native_kernels else "torch"
        return facts

    def _reduce_bits(self, settings: EngineSettings) -> dict[str, Any]:
        """Use 8 or 4 bits if the settings ask for it; return the facts about that.

        Raises ``EngineUnavailableError`` if the model then draws its tokens too differently.
        """
        wanted = {"weights": settings.weights, "kv_cache": settings.kv_cache}
        wanted = {name: bits for name, bits in wanted.items() if bits != "full"}
        if not wanted:
            return {}

        def change() -> None:
            if "weights" in wanted:
                self._decoder.quantise(wanted["weights"])
            if "kv_cache" in wanted:
                self._decoder.shrink_cache()

        requests = trial_requests(settings.model, hears_melody=not self._decoder.reads_text)
        rows = [self._trial(request) for request in requests]
        drift = measure_change(self._decoder, rows, change)
        if not drift <= MAX_NATS:  # true for NaN as well
            remedy = " and ".join(f"DGX_MUSIC_{name.upper()}=full" for name in wanted)
            raise EngineUnavailableError(
                f"With {' and '.join(wanted.values())} this model chooses too differently "
                f"({drift:.3g} nats a token, at most {MAX_NATS:g} are accepted); use {remedy}."
            )
        return {**wanted, "drift_nats": round(drift, 5)}

    def _trial(self, request: GenerationRequest) -> Row:
        """Return the row of a trial request: its clip's codes, and a few frames to decode."""
        given = self._no_codes()
        if request.continuation is not None:
            clip = fit(request.continuation, self._codec.sample_rate, self._codec.channels)
            given = self._codec.encode(clip).finish()
        random = torch.Generator().manual_seed(request.effective_seed)
        conditions = self._conditioner.read(request)
        return self._row(request, conditions, given, given.shape[1] + TRIAL_FRAMES, random)

    def _facts(self, request: GenerationRequest, device_seconds: float) -> dict[str, Any]:
        return {
            "engine": "musicgen",
            "seed": request.effective_seed,
            "device": self.device,
            "dtype": str(self._decoder.dtype).removeprefix("torch."),
            "device_seconds": round(device_seconds, 3),
            "is_untrained": self._is_untrained,
            **self._number_facts,
        }


def _result_of(work: Future[Tensor], run: Run) -> Tensor:
    """Return the result of the codec's thread; a cancelled generation does not wait for it."""
    while not wait((work,), _CANCEL_CHECK_SECONDS).done:
        try:
            run.check_cancelled()
        except BaseException:
            work.cancel()
            raise
    return work.result()
