"""Task metrics of the real models, for `--metric tools/realdata/metrics.py:NAME`.

Each takes the outputs by name of all samples and the samples with their labels, and returns a
number of which more is better. This file is loaded by its path, so it imports nothing beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Sample = dict[str, Array]


def _only(outputs: Sample) -> Array:
    """The one output of a model that has one: its name is of no interest here."""
    if len(outputs) != 1:
        raise ValueError(f"a model with one output is wanted, not {sorted(outputs)}")
    return next(iter(outputs.values()))


def _label(sample: Sample) -> int:
    return int(np.asarray(sample["label"]).reshape(-1)[0])


def _top1(outputs: Sequence[Sample], samples: Sequence[Sample]) -> float:
    if not outputs:
        raise ValueError("no samples to score")
    pairs = zip(outputs, samples, strict=True)
    return float(np.mean([int(_only(output).argmax()) == _label(sample) for output, sample in pairs]))


def ctc_greedy(scores: Array) -> list[int]:
    """Class indices of [T, classes]: best of each step, repeats merged, blanks (0) dropped."""
    best = scores.argmax(axis=-1)
    keep = np.ones(len(best), dtype=bool)
    keep[1:] = best[1:] != best[:-1]
    return [int(index) for index in best[keep] if index != 0]


def rec_line_accuracy(outputs: list[Sample], samples: list[Sample]) -> float:
    """Share of text lines that are read without any error."""
    if not outputs:
        raise ValueError("no samples to score")
    right = []
    for output, sample in zip(outputs, samples, strict=True):
        target = np.asarray(sample["target"]).reshape(-1)
        right.append(ctc_greedy(_only(output)[0]) == [int(index) for index in target if index >= 0])
    return float(np.mean(right))


def cls_accuracy(outputs: list[Sample], samples: list[Sample]) -> float:
    """Share of text lines whose direction is right."""
    return _top1(outputs, samples)


def magika_accuracy(outputs: list[Sample], samples: list[Sample]) -> float:
    """Share of files whose type is right."""
    return _top1(outputs, samples)


def efficientnet_agreement(outputs: list[Sample], samples: list[Sample]) -> float:
    """Share of pictures with the float model's class."""
    return _top1(outputs, samples)


def db_boxes(probability: Array) -> Array:
    """[N, 4] boxes (x0, y0, x1, y1) of a DB probability map, with PP-OCR's thresholds.

    The lines of the data are upright, so axis-aligned boxes stand for the rotated ones of PP-OCR.
    """
    from scipy import ndimage

    # As PP-OCR: a 2x2 dilation closes gaps of one pixel inside a line.
    mask = ndimage.binary_dilation(probability > 0.3, structure=np.ones((2, 2), dtype=bool))
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3), dtype=int))
    boxes = []
    for index, found in enumerate(ndimage.find_objects(labels)):
        if found is None or probability[found][labels[found] == index + 1].mean() < 0.5:
            continue
        rows, columns = found
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if min(height, width) < 3:
            continue
        # The map shows shrunken lines; 1.6 is PP-OCR's unclip ratio.
        grow = width * height * 1.6 / (2 * (width + height))
        boxes.append((columns.start - grow, rows.start - grow, columns.stop + grow, rows.stop + grow))
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def iou(first: Array, second: Array) -> Array:
    """[N, M] intersection over union."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (first, second)]
    return np.asarray(both / (areas[0][:, None] + areas[1][None, :] - both))


def matched(found: Array, wanted: Array, threshold: float = 0.5) -> int:
    """Number of one-to-one pairs with at least `threshold` overlap, the best pairs first."""
    overlap = iou(found, wanted)
    pairs = 0
    while overlap.size and overlap.max() >= threshold:
        row, column = np.unravel_index(int(overlap.argmax()), overlap.shape)
        overlap[row, :] = -1
        overlap[:, column] = -1
        pairs += 1
    return pairs


def det_box_f1(outputs: list[Sample], samples: list[Sample]) -> float:
    """F1 of the text boxes at an overlap (IoU) of 0.5, over all pages together."""
    counts = [_box_counts(output, sample) for output, sample in zip(outputs, samples, strict=True)]
    total = sum(boxes for _, boxes in counts)
    return 2 * sum(hits for hits, _ in counts) / total if total else 0.0


_COUNTED: dict[tuple[bytes, bytes], tuple[int, int]] = {}
"""What was found on which map, with which boxes wanted: an interval asks for the same pages some hundred times."""


def _box_counts(output: Sample, sample: Sample) -> tuple[int, int]:
    """Pairs of one page, and boxes found and wanted."""
    page, boxes = np.ascontiguousarray(_only(output)), np.asarray(sample["boxes"], dtype=np.float64)
    key = hashlib.blake2b(page.tobytes(), digest_size=16).digest(), boxes.tobytes()
    if key not in _COUNTED:
        found = db_boxes(page[0, 0])
        wanted = boxes.reshape(-1, 4)
        wanted = wanted[wanted[:, 2] >= 0]
        _COUNTED[key] = matched(found, wanted), len(found) + len(wanted)
    return _COUNTED[key]


def vad_auc(outputs: list[Sample], samples: list[Sample]) -> float:
    """Area under the ROC curve of the speech probability of the frames."""
    scores = np.array([float(output["output"].reshape(-1)[0]) for output in outputs])
    speech = np.array([_label(sample) for sample in samples]) == 1
    positives, negatives = scores[speech], np.sort(scores[~speech])
    if not len(positives) or not len(negatives):
        raise ValueError("the area needs frames with speech and frames without")
    below = np.searchsorted(negatives, positives, side="left")
    not_above = np.searchsorted(negatives, positives, side="right")
    return float((below + not_above).mean() / (2 * len(negatives)))


# The three outputs of Basic Pitch carry no better names: 0 is contours, 1 notes, 2 onsets.
_NOTES = "StatefulPartitionedCall:1"


def note_frame_f1(outputs: list[Sample], samples: list[Sample]) -> float:
    """F1 of the sounding notes over all (frame, key) pairs, at Basic Pitch's threshold of 0.3."""
    hits = total = 0
    for output, sample in zip(outputs, samples, strict=True):
        found = output[_NOTES][0] > 0.3
        wanted = np.asarray(sample["notes"]).reshape(found.shape) > 0
        hits += int((found & wanted).sum())
        total += int(found.sum()) + int(wanted.sum())
    return 2 * hits / total if total else 0.0


def _nearest(vectors: Array) -> Array:
    """Index of the most similar other row."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.argmax(axis=1))


def retrieval_agreement(outputs: list[Sample], samples: list[Sample]) -> float:
    """Share of sentences whose nearest other sentence is the float model's (label `reference`)."""
    if len(outputs) < 2:
        raise ValueError("retrieval needs two sentences or more")
    found = np.stack([_only(output).reshape(-1) for output in outputs])
    wanted = np.stack([np.asarray(sample["reference"]).reshape(-1) for sample in samples])
    return float((_nearest(found) == _nearest(wanted)).mean())
