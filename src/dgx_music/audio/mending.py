"""Audio that is not what it seems: at the wrong scale, too loud, or silent.

Each repair is told in a log line, which the command line shows on stderr.
"""

from __future__ import annotations

import logging
import math

import numpy as np

from dgx_music.audio.samples import Samples
from dgx_music.errors import InvalidRequestError

logger = logging.getLogger(__name__)

_LOUDEST = 2.0
"""+6 dBFS: audio above this is not just a little too loud."""
_MEANT_PEAK = 100.0
"""No music is mixed 40 dB too loud: such samples are integers, or were."""
_INTEGER_SCALES = (2**7, 2**15, 2**23, 2**31)
_STRAY_SHARE = 0.999
_QUIETEST = 1e-4
"""-80 dBFS: no recording is so quiet; its samples were divided once too often."""


def mend_scale(name: str, samples: Samples) -> Samples:
    """Return the samples at the scale they were meant to have; a little too loud is left alone."""
    peak = max(float(samples.max()), -float(samples.min()))
    if peak <= _LOUDEST:
        return samples
    usual = float(np.quantile(np.abs(samples), _STRAY_SHARE))
    if peak > _LOUDEST * _INTEGER_SCALES[-1] or peak > _MEANT_PEAK * max(usual, 1.0):
        problem = f"holds samples of {peak:.3g}, where 1 is full scale"
        raise InvalidRequestError(name, problem, "use another clip")
    if peak > _MEANT_PEAK or _are_integers(samples):
        scale = next(scale for scale in _INTEGER_SCALES if peak <= _LOUDEST * scale)
        tell(
            name,
            f"its samples reach {peak:,.0f}, where 1 is full scale; they are divided by {scale:,}",
        )
        return samples / np.float32(scale)
    tell(
        name,
        f"it is {20 * math.log10(peak):.0f} dB louder than full scale; it is turned down by that",
    )
    return samples / np.float32(peak)


def tell_silence(name: str, samples: Samples) -> None:
    """Warn if the clip is silent, and say whether it is empty or only too quiet."""
    loudest = float(np.ptp(samples, axis=1).max()) / 2
    if loudest == 0:
        tell(name, "it holds no sound, only silence or a constant level")
    elif loudest < _QUIETEST:
        below = -20 * math.log10(loudest)
        tell(
            name,
            f"its sound is {below:.0f} dB below full scale, as good as silence; is its scale right?",
        )


def _are_integers(samples: Samples) -> bool:
    return bool((samples == np.rint(samples)).all())


def tell(name: str, what: str) -> None:
    """Log a warning about a clip that is not what it seems; the command line shows it on stderr."""
    logger.warning("%s: %s", name, what)
