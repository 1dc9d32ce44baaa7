"""Sound files as log-mel spectrograms, computed with NumPy.

frame t     x[t * hop - window // 2 : ...] * hann, zeros outside the signal; hop 20 ms, window 25 ms
power       |FFT(frame)|^2, at the next power of two of the window
mel m       triangle from f[m] to f[m + 2] with its peak of 1 at f[m + 1]; f is even on 2595 * log10(1 + f / 700)
level       10 * log10(max(mel . power, 1e-10)) dB, less the loudest level, which is at least -60 dB
"""

from __future__ import annotations

from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mmkernels.pretrain.data.base import BrokenImageError

__all__ = ["AUDIO_SUFFIXES", "decode_audio", "log_mel", "require_soundfile"]

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
MELS, LOWEST, HIGHEST = 40, 60.0, 8000.0  # Hz
HOP, WINDOW = 0.020, 0.025  # seconds
LONGEST = 120.0  # seconds: more is a recording that nobody has cut
_RANGE = 80.0  # dB
_FRAMES = 1024  # transformed at a time


def require_soundfile() -> Any:
    """The package that reads sound files. Raise ValueError if it is missing."""
    try:
        import soundfile
    except (ModuleNotFoundError, OSError) as error:  # OSError: without its library
        raise ValueError(f"audio: needs the package soundfile: pip install 'mmkernels[audio]' ({error})") from error
    return soundfile


def decode_audio(source: Path | bytes) -> np.ndarray:
    """Read a sound file, mix its channels, and compute its log-mel spectrogram.

    Args:
        source: a file, or the bytes of one.

    Returns:
        float32 [frames, 40]: levels from 80 dB below the loudest, -1, to the loudest, 1. Bands above half the file's
        rate are silent.

    Raises:
        BrokenImageError: the file is missing, no sound, empty, or longer than two minutes.
    """
    soundfile = require_soundfile()
    try:
        with soundfile.SoundFile(BytesIO(source) if isinstance(source, bytes) else source) as file:
            seconds = file.frames / file.samplerate
            if seconds > LONGEST:
                raise BrokenImageError(f"expected at most {LONGEST:.0f} seconds of sound, got {seconds:.0f}")
            samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
    except (BrokenImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on broken files
        if isinstance(source, Path) and not source.exists():
            raise BrokenImageError(f"FileNotFoundError: {source.name}") from error
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error
    if not len(samples) or not np.isfinite(samples).all():
        raise BrokenImageError(f"expected finite samples, got {'none' if not len(samples) else 'others'}")
    levels = log_mel(samples.mean(1, dtype=np.float64), rate)
    return np.maximum(levels * (2 / _RANGE) + 1, -1).astype(np.float32)


def log_mel(samples: np.ndarray, rate: int) -> np.ndarray:
    """Levels in dB below the loudest, float64 [frames, 40].

    Args:
        samples: float64 [n] in [-1, 1].
        rate: samples a second.
    """
    hop, window = max(1, round(HOP * rate)), max(2, round(WINDOW * rate))
    points = 1 << (window - 1).bit_length()
    padded = np.pad(samples, (window // 2, window))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(samples) + 1 : hop]
    mels = np.empty((len(frames), MELS))
    for first in range(0, len(frames), _FRAMES):
        block = frames[first : first + _FRAMES] * np.hanning(window)
        power = np.abs(np.fft.rfft(block, points)) ** 2
        mels[first : first + _FRAMES] = np.einsum("tf,fm->tm", power, _filters(rate, points))  # no BLAS: reproducible
    levels = 10 * np.log10(np.maximum(mels, 1e-10))
    return levels - max(levels.max(), -60.0)


@cache
def _filters(rate: int, points: int) -> np.ndarray:
    """The mel filters, float64 [bins, 40]."""
    low, high = (2595 * np.log10(1 + np.array([LOWEST, HIGHEST]) / 700)).tolist()
    edges = 700 * (10 ** (np.linspace(low, high, MELS + 2) / 2595) - 1)
    frequencies = np.arange(points // 2 + 1)[:, None] * (rate / points)
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0.0)
