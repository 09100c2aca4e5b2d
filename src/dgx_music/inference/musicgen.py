"""The MusicGen engine: weights and text encoder and codec from transformers, tokens from the slots."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dgx_music.catalog import UNTRAINED_NOTICE, ModelInfo, find_model
from dgx_music.errors import EngineError, EngineUnavailableError
from dgx_music.inference.engine import Audio, Engine, EngineSettings, GenerationRequest, Run

try:
    import torch
    import transformers
    from huggingface_hub import snapshot_download
    from torch import Tensor
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        MusicgenConfig,
        MusicgenForConditionalGeneration,
        PreTrainedTokenizerBase,
    )

    from dgx_music.inference.decoder import Decoder
    from dgx_music.inference.loop import DecodingLoop
    from dgx_music.inference.slots import Row, Slots, delays
    from dgx_music.inference.tiny import build_tiny
except ImportError as error:
    raise EngineUnavailableError(
        "The musicgen engine needs torch and transformers; install `dgx-music[musicgen]`."
    ) from error

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PATIENCE_SECONDS = 0.1
_FILES = ["*.json", "*.safetensors", "*.model"]


def load(settings: EngineSettings) -> Engine:
    """Return the engine of ``settings.model``, loaded and ready.

    Raises ``EngineUnavailableError``, in one sentence, where device or weights are missing or damaged.
    """
    transformers.logging.set_verbosity_error()  # its warnings concern MusicGen's own configuration, not the user
    transformers.logging.disable_progress_bar()
    device = _choose_device(settings.device)
    info = find_model(settings.model)
    if info is None:
        raise EngineUnavailableError(f"The model {settings.model!r} is neither in the catalogue nor an absolute path.")
    weights = _find_weights(info, settings.revision, _choose_dtype(settings.dtype, device))
    if device.type == "cpu":
        _spare_a_core()
    return MusicGenEngine(weights, device, info, slots=settings.slots)


class MusicGenEngine:
    """One MusicGen model on one device. The language model may be in 16 bit; T5 and EnCodec stay in float32.

    ``generate`` is for one thread per slot. It reads the text there; the steps, which all generations share, are the
    decoding thread's, and the audio is made in a third thread, so that neither keeps the slots waiting.
    """

    def __init__(self, weights: _Weights, device: torch.device, info: ModelInfo, *, slots: int) -> None:
        model, config = weights.model.to(device), weights.model.config
        self._tokenizer = weights.tokenizer
        self._text_encoder = model.text_encoder
        self._codec = model.audio_encoder
        self._sample_rate: int = config.audio_encoder.sampling_rate
        self._frame_size: int = config.audio_encoder.hop_length
        self._longest_delay = delays(config.decoder.num_codebooks, config.decoder.audio_channels)[-1]
        max_steps = self._frame_count(round(info.max_duration_seconds * self._sample_rate)) + self._longest_delay
        self._decoder = Decoder(model.decoder, getattr(model, "enc_to_dec_proj", None), max_steps)
        self._loop = DecodingLoop(lambda: Slots(self._decoder, slots))
        self._reading = threading.Lock()
        self._codec_thread = ThreadPoolExecutor(1, "codec")  # clips that end together are sooner done one by one
        self._is_untrained = info.is_untrained
        self.slots = slots
        self.device = str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
        self.model_version = weights.version
        self.notice = weights.notice

    def generate(self, request: GenerationRequest, run: Run) -> Audio:
        """Return the request's audio in the model's own channels and sample rate, exactly as long as was asked for.

        The same seed gives the same audio on the same device. Raises ``EngineError`` where a number is not finite.
        """
        started = time.perf_counter()
        run.check_cancelled()
        sample_count = round(request.duration * self._sample_rate)
        codes = self._loop.decode(self._row(request, self._frame_count(sample_count)), run)  # [codebook, frame]
        samples = _wait(self._codec_thread.submit(self._sound, codes), run)[:, :sample_count].cpu().numpy()
        if not np.isfinite(samples).all():
            raise EngineError("The codec's samples are not finite; its weights may be damaged.")
        run.report_progress(1.0)
        return Audio(samples, self._sample_rate, self._facts(request, time.perf_counter() - started))

    def _frame_count(self, sample_count: int) -> int:
        return math.ceil(sample_count / self._frame_size)

    def _row(self, request: GenerationRequest, frame_count: int) -> Row:
        random = torch.Generator().manual_seed(request.effective_seed)  # on the CPU: the same numbers on every device
        shape = frame_count + self._longest_delay, self._decoder.codebook_count
        return Row(
            text=self._read(request.prompt),
            uniforms=torch.rand(shape, generator=random),
            frame_count=frame_count,
            guidance_scale=request.guidance_scale,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
        )

    @torch.inference_mode()
    def _read(self, prompt: str) -> Tensor:
        """Return what cross-attention sees of the prompt: ``[layer, 2, head, token, head size]``."""
        with self._reading:  # a fast tokenizer is not safe in two threads
            tokens = self._tokenizer(prompt, return_tensors="pt").to(self._decoder.device)
            states = self._text_encoder(**tokens).last_hidden_state  # [1, token, width]
        return self._decoder.read_text(states[0])

    @torch.inference_mode()
    def _sound(self, codes: Tensor) -> Tensor:
        """Return the samples ``[channel, sample]`` of codes ``[codebook, frame]``; stereo's codebooks alternate."""
        channels = self._decoder.channels
        sides = [self._codec.decode(codes[None, None, side::channels], [None]) for side in range(channels)]
        return torch.cat([side.audio_values[0] for side in sides])

    def _facts(self, request: GenerationRequest, device_seconds: float) -> dict[str, Any]:
        return {
            "engine": "musicgen",
            "seed": request.effective_seed,
            "device": self.device,
            "dtype": str(self._decoder.dtype).removeprefix("torch."),
            "device_seconds": round(device_seconds, 3),
            "is_untrained": self._is_untrained,
        }


class _Musicgen(MusicgenForConditionalGeneration):  # type: ignore[misc]
    """Loads its language model in the number format asked for, and the rest in float32."""

    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"text_encoder", "audio_encoder"}


class _Weights(NamedTuple):
    """A model in memory, its tokenizer, and what a user should know of them."""

    model: MusicgenForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    version: str
    notice: str | None


def _find_weights(info: ModelInfo, revision: str | None, dtype: torch.dtype) -> _Weights:
    if info.is_untrained:
        model, tokenizer = build_tiny(info.channels)
        model.decoder.to(dtype)
        model.enc_to_dec_proj.to(dtype)
        return _Weights(model, tokenizer, "untrained", UNTRAINED_NOTICE)
    if info.repository is None:
        return _Weights(*_read_folder(Path(info.name), dtype), "local", None)
    licence = f"the weights of {info.name} are licensed {info.licence}: no commercial use"
    folder = _find_snapshot(info.repository, revision or info.revision or "main", licence)
    return _Weights(*_read_folder(folder, dtype), folder.name, licence)


def _find_snapshot(repository: str, revision: str, licence: str) -> Path:
    """Return the folder, named for its commit, of the files in the Hugging Face cache; download them if need be."""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES, local_files_only=True))
    except OSError:  # absent, or a download that was cut short
        logger.warning("Before the first download: %s (https://huggingface.co/%s).", licence, repository)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES))
    except Exception as error:
        raise EngineUnavailableError(
            f"The model {repository} (revision {revision}) is not on this machine and cannot be downloaded "
            f"({_first_line(error)}); connect to the internet once, or point DGX_MUSIC_MODEL at a local folder, "
            "or use musicgen-tiny-untrained."
        ) from error


def _read_folder(folder: Path, dtype: torch.dtype) -> tuple[MusicgenForConditionalGeneration, PreTrainedTokenizerBase]:
    """Return the model and tokenizer that ``save_pretrained`` wrote to the folder; pickled weights are not read."""
    try:
        if not isinstance(AutoConfig.from_pretrained(folder, local_files_only=True), MusicgenConfig):
            raise ValueError("config.json is not that of a MusicGen model")
        model, report = _Musicgen.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):  # transformers has made them up at random
            raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} more")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer.unk_token_id in tokenizer("music").input_ids:  # transformers makes do without a vocabulary
            raise ValueError("its tokenizer has no vocabulary")
    except Exception as error:
        raise EngineUnavailableError(
            f"The model in {folder} cannot be loaded ({_first_line(error)}); it needs the safetensors weights, the "
            "configuration and the tokenizer that `save_pretrained` writes."
        ) from error
    return model, tokenizer


def _wait(audio: Future[Tensor], run: Run) -> Tensor:
    """Return the audio once it is made; a generation that is cancelled meanwhile does not wait for it."""
    while not wait((audio,), _PATIENCE_SECONDS).done:
        try:
            run.check_cancelled()
        except BaseException:
            audio.cancel()  # where it has not begun
            raise
    return audio.result()


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
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _spare_a_core() -> None:
    """Leave one core to the parent process; torch's threads wait for each other at every step, for a busy one too."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
