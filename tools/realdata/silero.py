"""Frames of synthesised speech and of other sounds, with the recurrent state before each frame."""

from __future__ import annotations

import io
import shutil
import subprocess
import wave
from pathlib import Path

import numpy as np
from scipy.signal import lfilter, resample_poly

from .dataset import Array, Arrays, DataError, DataSet, FloatModel

RATE, FRAME, CONTEXT = 16_000, 512, 64

# (voice, words a minute, pitch 0..99, text)
SPEECH = (
    ("en-us", 150, 45, "The ship left the harbour early in the morning, before the fog had lifted."),
    ("en-gb+f3", 170, 60, "Please remember to close the window and switch off the light."),
    ("en-us+m3", 140, 30, "Seven hundred and twenty one people signed the letter last week."),
    ("de", 160, 50, "Der Zug nach Hamburg hat heute leider zwanzig Minuten Verspaetung."),
    ("de+f2", 150, 65, "Wir treffen uns morgen um neun Uhr vor dem alten Rathaus."),
    ("fr", 165, 50, "Le petit chat dort sur la chaise pres de la fenetre ouverte."),
    ("es", 170, 55, "Manana por la tarde vamos a la playa con todos los amigos."),
    ("it", 160, 50, "La stazione si trova in fondo alla strada, sulla destra."),
    ("en-us+f4", 190, 70, "Nobody expected the answer to be so simple, and yet there it was."),
    ("en-gb+m5", 130, 25, "A model that is small enough can run on almost any machine."),
    ("nl", 155, 50, "Het heeft de hele nacht geregend en de straten zijn nat."),
    ("pl", 160, 45, "Jutro rano pojedziemy pociagiem do Krakowa na trzy dni."),
)
OTHERS = ("silence", "white", "pink", "hum", "tones", "chords", "clicks", "sweep", "babble_noise", "organ")

# Relative to the loudest frame of the clip: louder is speech, quieter is not, between is left out.
_SPEECH_DB, _QUIET_DB = -30.0, -50.0


def espeak(voice: str, speed: int, pitch: int, text: str) -> Array:
    """Synthesised speech at 16 kHz, peak 1."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise DataError("espeak-ng is missing: apt-get install espeak-ng")
    command = [program, "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise DataError(f"espeak-ng failed for voice {voice}: {done.stderr.decode(errors='replace').strip()}")
    with wave.open(io.BytesIO(done.stdout)) as file:
        rate = file.getframerate()
        pcm = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    audio = resample_poly(pcm.astype(np.float64), RATE, rate)
    return np.asarray(audio / np.abs(audio).max())


def pink(rng: np.random.Generator, size: int) -> Array:
    """Noise that falls by 3 dB an octave (Kellet's filter)."""
    b = [0.049922035, -0.095993537, 0.050612699, -0.004408786]
    a = [1, -2.494956002, 2.017265875, -0.522189400]
    noise = lfilter(b, a, rng.normal(size=size))
    return np.asarray(noise / np.abs(noise).max())


def _partials(times: Array, pitch: float, count: int) -> Array:
    waves = [np.sin(2 * np.pi * pitch * k * times) / k for k in range(1, count + 1)]
    return np.asarray(np.sum(waves, axis=0))


def other_sound(kind: str, rng: np.random.Generator, size: int) -> Array:
    """A sound that is no speech, peak about 1."""
    times = np.arange(size) / RATE
    if kind == "silence":
        return np.zeros(size)
    if kind == "white":
        return rng.normal(size=size) / 4
    if kind == "pink":
        return pink(rng, size)
    if kind == "hum":
        return _partials(times, 50.0, 6) / 2
    if kind == "tones":
        pitches = rng.choice([440.0, 660.0, 880.0, 1200.0], size=size // 4000 + 1)
        return np.asarray(np.sin(2 * np.pi * np.cumsum(np.repeat(pitches, 4000)[:size]) / RATE))
    if kind in ("chords", "organ"):
        step = 6000 if kind == "chords" else 20_000
        sound = np.zeros(size)
        for start in range(0, size, step):
            base = 110.0 * 2 ** (rng.integers(0, 24) / 12)
            part = times[: min(step, size - start)]
            chord = sum(_partials(part, base * ratio, 5) for ratio in (1.0, 1.26, 1.5))
            decay = np.exp(-part * (4 if kind == "chords" else 0))
            sound[start : start + len(part)] = chord * decay / 4
        return sound
    if kind == "clicks":
        sound = np.zeros(size)
        sound[rng.integers(0, size, size=size // 2000)] = rng.choice([-1.0, 1.0], size=size // 2000)
        return np.asarray(lfilter([1.0], [1, -1.6, 0.8], sound)) / 2
    if kind == "sweep":
        return np.asarray(np.sin(2 * np.pi * (100 * times + 300 * times**2)))
    return pink(rng, size) * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * times))


def speech_clip(index: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Speech between pauses under noise, and for each frame 1 (speech), 0 (none) or -1 (unclear)."""
    speech = espeak(*SPEECH[index])
    pause = np.zeros(int(rng.uniform(0.6, 1.2) * RATE))
    clean = np.concatenate([pause, speech, pause])
    clean = clean[: len(clean) // FRAME * FRAME]
    power = (clean.reshape(-1, FRAME) ** 2).mean(axis=1)
    level = 10 * np.log10(power / power.max() + 1e-12)
    labels = np.where(level > _SPEECH_DB, 1, np.where(level < _QUIET_DB, 0, -1))
    loudness = np.sqrt((speech**2).mean())
    snr = float(rng.uniform(-8, 18))
    noise = pink(rng, len(clean)) if rng.random() < 0.5 else rng.normal(size=len(clean))
    noise *= loudness / np.sqrt((noise**2).mean()) * 10 ** (-snr / 20)
    mixed = (clean + noise) * float(rng.uniform(0.1, 0.8))
    return mixed, labels


def clips(seed: int, speech: range, rng: np.random.Generator) -> list[tuple[Array, Array]]:
    """The speech clips of `speech`, then one clip of each other sound."""
    made = [speech_clip(index, rng) for index in speech]
    for kind in OTHERS:
        size = 60 * FRAME
        sound = other_sound(kind, rng, size) * float(rng.uniform(0.05, 0.6))
        sound = sound + rng.normal(size=size) * 10 ** float(rng.uniform(-4, -2.5))
        made.append((sound, np.zeros(size // FRAME, dtype=np.int64)))
    return made


def frames(model: FloatModel, clip: tuple[Array, Array]) -> list[tuple[Array, Array, int]]:
    """(input with context, state before it, label) of each frame, the float model run in order."""
    audio, labels = clip
    signal = np.clip(audio, -1, 1).astype(np.float32)
    padded = np.concatenate([np.zeros(CONTEXT, dtype=np.float32), signal])
    state = np.zeros((2, 1, 128), dtype=np.float32)
    rows = []
    for position, label in enumerate(labels):
        frame = padded[position * FRAME : (position + 1) * FRAME + CONTEXT][None]
        rows.append((frame, state, int(label)))
        feeds = {"input": frame, "state": state, "sr": np.array(RATE, dtype=np.int64)}
        state = model.run(feeds)["stateN"]
    return rows


def _stack(rows: list[tuple[Array, Array, int]]) -> Arrays:
    """Stacked frames and labels; the state has its batch axis second and `sr` has none: members."""
    arrays: Arrays = {
        "input": np.concatenate([frame for frame, _, _ in rows]),
        "label": np.array([label for _, _, label in rows], dtype=np.int64),
    }
    for index, (_, state, _) in enumerate(rows):
        arrays[f"state/{index}"] = state
        arrays[f"sr/{index}"] = np.array(RATE, dtype=np.int64)
    return arrays


def _balanced(model: FloatModel, seed: int, speech: range, per_class: int) -> Arrays:
    rng = np.random.default_rng(seed)
    rows = [row for clip in clips(seed, speech, rng) for row in frames(model, clip)]
    picked: list[int] = []
    for label in (0, 1):
        of_label = [index for index, row in enumerate(rows) if row[2] == label]
        picked += [int(i) for i in rng.choice(of_label, size=per_class, replace=False)]
    return _stack([rows[i] for i in rng.permutation(picked)])


def build(model_path: Path) -> DataSet:
    """64 calibration and 600 evaluation frames, half of them speech, from different sentences."""
    model = FloatModel(model_path)
    return DataSet(_balanced(model, 401, range(4), 32), _balanced(model, 402, range(4, len(SPEECH)), 300))
