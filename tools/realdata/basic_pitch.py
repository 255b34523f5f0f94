"""Synthesised music with known notes, in windows of Basic Pitch's input length."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .dataset import Array, Arrays, DataSet

INPUT = "serving_default_input_2:0"
# From the package's constants.py.
RATE, WINDOW, HOP, FRAMES, KEYS, LOWEST = 22_050, 43_844, 256, 172, 88, 21


def tone(rng: np.random.Generator, key: int, size: int) -> Array:
    """One note of a random instrument: partials that fall off, an attack, a decay, a release."""
    times = np.arange(size) / RATE
    pitch = 440.0 * 2 ** ((key - 69) / 12)
    rolloff = float(rng.uniform(0.8, 2.0))
    stretch = float(rng.uniform(0, 4e-4))  # a string's partials are slightly sharp
    sound = np.zeros(size)
    for partial in range(1, 13):
        frequency = pitch * partial * np.sqrt(1 + stretch * partial**2)
        if frequency < RATE / 2.2:
            phase = float(rng.uniform(0, 2 * np.pi))
            sound += partial**-rolloff * np.sin(2 * np.pi * frequency * times + phase)
    attack = np.minimum(times / float(rng.uniform(0.004, 0.03)), 1)
    decay = np.exp(-times * float(rng.uniform(0.3, 2.5)))
    release = np.minimum((size - np.arange(size)) / (0.02 * RATE), 1)
    return np.asarray(sound * attack * decay * release)


def window(rng: np.random.Generator) -> tuple[Array, Array]:
    """Audio [43844, 1], and 1 where a note sounds as uint8 [172, 88]."""
    audio = np.zeros(WINDOW)
    notes = np.zeros((FRAMES, KEYS), dtype=np.uint8)
    for _ in range(int(rng.integers(1, 4))):  # voices
        position = int(rng.uniform(0, 0.3) * RATE)
        key = int(rng.integers(40, 80))
        while position < WINDOW - RATE // 8:
            size = min(int(rng.uniform(0.15, 0.9) * RATE), WINDOW - position)
            audio[position : position + size] += tone(rng, key, size) * float(rng.uniform(0.3, 1))
            notes[round(position / HOP) : round((position + size) / HOP), key - LOWEST] = 1
            position += size + int(rng.choice([0, 0.05, 0.3]) * RATE)
            key = int(np.clip(key + rng.integers(-7, 8), 36, 88))
    audio *= float(rng.uniform(0.2, 0.9)) / np.abs(audio).max()
    audio += rng.normal(size=WINDOW) * 10 ** float(rng.uniform(-4, -2))
    return audio.astype(np.float32)[:, None], notes


def _windows(count: int, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    made = [window(rng) for _ in range(count)]
    return {INPUT: np.stack([audio for audio, _ in made]), "notes": np.stack([notes for _, notes in made])}


def build(model_path: Path) -> DataSet:
    """32 calibration and 64 evaluation windows of two seconds."""
    return DataSet(_windows(32, 501), _windows(64, 502))
