"""Log-mel spectrograms with NumPy: the features of the speech pack.

frame t     x[t * HOP - WINDOW // 2 : ...] * hann, WINDOW samples, zeros outside the signal
power       |FFT_1024(frame)|^2
mel m       triangle from f[m] to f[m + 2] with its peak of 1 at f[m + 1]; f is even on 2595 * log10(1 + f / 700)
level       10 * log10(max(mel . power, 1e-10)) dB, less the loudest level of the utterance
"""

from __future__ import annotations

import numpy as np

RATE, HOP, WINDOW, POINTS = 22_050, 441, 551, 1024  # Hz; samples: 20 ms, 25 ms; of the FFT
MELS, LOWEST, HIGHEST = 40, 60.0, 8000.0  # Hz
QUIET = -45.0  # dB: frames before and after the speech that are nowhere louder are cut off


def filters() -> np.ndarray:
    """The mel filters, float64 [bins, MELS]."""
    bounds = 2595 * np.log10(1 + np.array([LOWEST, HIGHEST]) / 700)
    edges = 700 * (10 ** (np.linspace(*bounds, MELS + 2) / 2595) - 1)
    frequencies = np.arange(POINTS // 2 + 1)[:, None] * (RATE / POINTS)
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0.0)


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Levels in dB below the loudest, float64 [frames, MELS], of int16 [samples] at `RATE`; silent ends are cut off."""
    padded = np.pad(samples.astype(np.float64) / 32768, (WINDOW // 2, WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, POINTS)) ** 2
    mels = np.einsum("tf,fm->tm", power, filters())  # no BLAS: the same everywhere
    decibels = 10 * np.log10(np.maximum(mels, 1e-10))
    decibels -= decibels.max()
    loud = np.flatnonzero(decibels.max(1) > QUIET)
    return decibels[loud[0] : loud[-1] + 1]
