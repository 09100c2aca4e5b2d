"""MusicGen through transformers' own ``generate``: one generation at a time, the reference for any faster engine."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
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
    from torch import Tensor, nn
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        GenerationConfig,
        LogitsProcessor,
        LogitsProcessorList,
        MusicgenConfig,
        MusicgenForConditionalGeneration,
        PreTrainedTokenizerBase,
    )
    from transformers.modeling_outputs import BaseModelOutput

    from dgx_music.inference.tiny import build_tiny
except ImportError as error:
    raise EngineUnavailableError(
        "The musicgen engine needs torch and transformers; install `dgx-music[musicgen]`."
    ) from error

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FILES = ["*.json", "*.safetensors", "*.model"]
_COLDEST = 1e-4
"""Below this temperature the likeliest token is certain, and logits divided by it may overflow: decode greedily."""


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
    return MusicGenEngine(weights, device, is_untrained=info.is_untrained)


class MusicGenEngine:
    """One MusicGen model on one device. The language model may be in 16 bit; T5 and EnCodec stay in float32."""

    slots = 1

    def __init__(self, weights: _Weights, device: torch.device, *, is_untrained: bool) -> None:
        model = weights.model.to(device)
        model.generation_config = GenerationConfig()  # a file's own defaults (length, top_k) must not fill the gaps
        model.text_encoder.register_forward_hook(_match_text_states(model.decoder.dtype))
        self._model = model
        self._tokenizer = weights.tokenizer
        self._sample_rate: int = model.config.audio_encoder.sampling_rate
        self._frame_size: int = model.config.audio_encoder.hop_length
        self._longest_delay: int = model.config.decoder.num_codebooks // model.config.decoder.audio_channels - 1
        self._is_untrained = is_untrained
        self.device = str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
        self._device = device
        self.model_version = weights.version
        self.notice = weights.notice

    def generate(self, request: GenerationRequest, run: Run) -> Audio:
        """Return the request's audio in the model's own channels and sample rate, exactly as long as was asked for.

        The same seed gives the same audio on the same device. Raises ``EngineError`` where a number is not finite.
        """
        started = time.perf_counter()
        sample_count = round(request.duration * self._sample_rate)
        step_count = self._frame_count(sample_count) + self._longest_delay
        watch = _StepWatch(run, step_count)
        prompt = self._tokenizer(request.prompt, return_tensors="pt").to(self._device)
        torch.manual_seed(request.effective_seed)
        audio = self._model.generate(  # [1, channel, sample]
            **prompt,
            generation_config=self._generation_config(request, step_count),
            logits_processor=LogitsProcessorList([watch]),
        )
        samples = audio[0, :, :sample_count].cpu().numpy()
        if not np.isfinite(samples).all():
            raise EngineError("The codec's samples are not finite; its weights may be damaged.")
        run.report_progress(1.0)
        return Audio(samples, self._sample_rate, self._facts(request, time.perf_counter() - started))

    def _frame_count(self, sample_count: int) -> int:
        """Return how many frames hold the samples; with fewer than the longest delay ``generate`` would not delay."""
        return max(math.ceil(sample_count / self._frame_size), self._longest_delay)

    def _generation_config(self, request: GenerationRequest, step_count: int) -> GenerationConfig:
        """Return all options of ``generate`` that matter here: transformers' own defaults differ (its top_k is 50)."""
        pad = self._model.config.decoder.pad_token_id
        is_sampling = request.temperature >= _COLDEST
        sampling = {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p or 1.0}
        return GenerationConfig(
            max_new_tokens=step_count,
            guidance_scale=request.guidance_scale,
            do_sample=is_sampling,
            bos_token_id=pad,
            pad_token_id=pad,
            decoder_start_token_id=pad,
            **(sampling if is_sampling else {}),
        )

    def _facts(self, request: GenerationRequest, device_seconds: float) -> dict[str, Any]:
        return {
            "engine": "musicgen",
            "seed": request.effective_seed,
            "device": self.device,
            "dtype": str(self._model.decoder.dtype).removeprefix("torch."),
            "device_seconds": round(device_seconds, 3),
            "is_untrained": self._is_untrained,
        }


class _StepWatch(LogitsProcessor):  # type: ignore[misc]
    """What ``generate`` calls at every step: reports progress and raises on a cancel or an overflow.

    Raising is the only way out: where a stopping criterion ends the loop early, ``generate`` fails at its last reshape.
    """

    def __init__(self, run: Run, step_count: int) -> None:
        self._run = run
        self._done = 0
        self._total = step_count + 1  # decoding the audio is the last

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores unchanged, ``[batch * codebook, token]``."""
        self._run.check_cancelled()
        if not torch.isfinite(scores).all():
            raise EngineError("The model's numbers are not finite; try DGX_MUSIC_DTYPE=float32, or else other weights.")
        self._done += 1
        self._run.report_progress(self._done / self._total)
        return scores


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


def _match_text_states(dtype: torch.dtype) -> Callable[[nn.Module, Any, BaseModelOutput], BaseModelOutput]:
    """Return a hook for the text encoder that hands its float32 states on in the language model's number format."""

    def convert(_encoder: nn.Module, _args: Any, output: BaseModelOutput) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=output.last_hidden_state.to(dtype))

    return convert


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
