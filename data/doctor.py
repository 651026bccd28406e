"""What may be wrong with prepared pairs: registration, constant frames; one page with the worst."""

import base64
import html
import io
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 512  # pixels on the longer side that are compared
FAR = 3.0  # pixels of shift that are worth a look
SURE = 13.0  # peak of the correlation over its spread; unrelated images stay below
SHOWN = 8


class Finding(NamedTuple):
    """One pair: shift (rows, columns) in pixels that moves the visible onto the infrared."""

    name: str
    shift: tuple[float, float]
    score: float
    constant: bool

    def distance(self) -> float:
        return float(np.hypot(*self.shift))

    def suspect(self) -> bool:
        return self.constant or (self.score >= SURE and self.distance() >= FAR)


def edges(image: np.ndarray) -> np.ndarray:
    """(H,W) or (H,W,3) to (H,W) strength of edges without their sign, fading to 0 at the border."""
    grey = image.astype(np.float32)
    grey = grey.mean(axis=2) if grey.ndim == 3 else grey
    rows, columns = np.gradient(grey)
    strength = np.sqrt(np.hypot(rows, columns))  # the root: a few strong edges do not decide alone
    strength -= strength.mean()
    return strength * np.hanning(len(grey))[:, None] * np.hanning(grey.shape[1])


def registration(visible: np.ndarray, infrared: np.ndarray) -> tuple[tuple[float, float], float]:
    """Shift (rows, columns) that moves the visible (H,W,3) onto the infrared (H,W), and its score.

    Phase correlation of edges, to a part of a pixel by a parabola through the peak. The score is
    the peak over the spread of the correlation; below SURE the shift means nothing.
    """
    first, second = (np.fft.rfft2(edges(image)) for image in (visible, infrared))
    cross = second * first.conj()
    height, width = infrared.shape
    row, column = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    smooth = np.exp(-((row**2 + column**2) / (2 * 0.12**2)))  # fine grain differs in both bands
    plane = np.fft.irfft2(smooth * cross / (np.abs(cross) + 1e-9), s=(height, width))
    peak = np.unravel_index(plane.argmax(), plane.shape)
    spread = float(plane.std())
    score = float(plane[peak] / spread) if spread > 0 else 0.0
    shift = []
    for axis, size in enumerate(plane.shape):
        line = np.take(plane, peak[1 - axis], axis=1 - axis)
        around = [line[(peak[axis] + step) % size] for step in (-1, 0, 1)]
        bend = around[0] - 2 * around[1] + around[2]
        part = 0.5 * (around[0] - around[2]) / bend if bend else 0.0
        place = peak[axis] - size if peak[axis] > size // 2 else peak[axis]
        shift.append(float(place + part))
    return (shift[0], shift[1]), score


def examine(name: str, visible: np.ndarray, infrared: np.ndarray) -> Finding:
    """visible (H,W,3) and infrared (H,W) of any type, as they are stored."""
    constant = bool(np.ptp(infrared) == 0 or np.ptp(visible) == 0)
    step = -(-max(infrared.shape) // SIDE)
    shift, score = registration(visible[::step, ::step], infrared[::step, ::step])
    return Finding(name, (shift[0] * step, shift[1] * step), score, constant)


def summary(findings: list[Finding]) -> list[str]:
    """Sentences on the whole set."""
    sure = [f for f in findings if f.score >= SURE and not f.constant]
    lines = [f"{len(sure)} of {len(findings)} pairs have edges enough to measure their shift"]
    if sure:
        rows, columns = np.median([f.shift for f in sure], axis=0)
        lines.append(f"median shift {rows:+.1f} rows, {columns:+.1f} columns")
        far = sorted((f for f in sure if f.suspect()), key=lambda f: -f.distance())
        if far:
            first = f"first: {far[0].name}, {far[0].distance():.1f} pixels"
            lines.append(f"{len(far)} pairs are shifted by {FAR:g} pixels or more ({first})")
    dead = [f.name for f in findings if f.constant]
    if dead:
        lines.append(f"{len(dead)} pairs have a constant image (first: {dead[0]})")
    return lines


def report(title: str, findings: list[Finding], worst: Iterable[tuple]) -> str:
    """One HTML page without other files. worst: (finding, visible, infrared) to show."""
    rows = []
    for finding, visible, infrared in worst:
        low, high = float(infrared.min()), float(infrared.max())
        grey = (infrared.astype(np.float64) - low) / max(high - low, 1e-9) * 255
        text = (
            "constant image"
            if finding.constant
            else (
                f"shift {finding.shift[0]:+.1f} rows, {finding.shift[1]:+.1f} columns, "
                f"score {finding.score:.1f}"
            )
        )
        pictures = "".join(_picture(x) for x in (visible, grey.astype(np.uint8)))
        rows.append(f"<h3>{html.escape(finding.name)}</h3><p>{text}</p>{pictures}")
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in summary(findings))
    style = "body{font:16px sans-serif;max-width:900px;margin:2em auto}img{width:49%;margin:.3%}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1><ul>{lines}</ul>"
        f"<h2>The pairs to look at first</h2>{''.join(rows) or '<p>None stands out.</p>'}</html>\n"
    )


def _picture(image: np.ndarray) -> str:
    small = Image.fromarray(image)
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return (
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )
