"""What may be wrong with pairs: registration, sides, constant images, polarity; the worst shown."""

import base64
import html
import io
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import registration
from data.registration import Shift

FAR = 3.0  # pixels that a pair lies apart from the rest of its source
OFF = 1.0  # pixels that a whole source is displaced
SHOWN = 8
GREY = 1.0  # mean difference of the colour channels, of 255: no photograph in colour is below
SAME = 0.98  # correlation of the two sides: visible and infrared of one scene stay far below
OPPOSITE = -0.7  # correlation of two sources' mean infrared images; unlike scenes reach -0.6
FEWEST, SHARED = 5, 0.3  # images, and length of their mean image, for polarity to be compared
ALIKE, AGAINST = 0.3, -0.7  # of `likeness`: as the majority, as its negative; real sets reach -0.5
RIDGE, ROUNDS = 1.0, 10  # of `likeness`: weight of its penalty, regressions
MAJORITY, COMMON = 2 / 3, 0.5  # shares of a source that must run one way, and be ALIKE
NAMED = 10  # images of the other polarity in one note
MEASURED = 200  # pairs of a source whose shift is measured when a set is prepared


class Finding(NamedTuple):
    """One pair, as `examine` sees it."""

    name: str
    source: str
    size: tuple[int, int]
    surface: np.ndarray | None  # of registration.surface
    constant: bool
    grey: bool  # the visible image has no colour
    same: bool  # both sides show one image

    def shift(self) -> Shift | None:
        return (
            None
            if self.surface is None
            else registration.shift_of(self.surface, registration.step_of(self.size))
        )


def examine(
    name: str, source: str, visible: np.ndarray, infrared: np.ndarray, measured: bool = True
) -> Finding:
    """visible (H,W,3) and infrared (H,W) of any type, as they are stored; shift if `measured`."""
    constant = bool(np.ptp(infrared) == 0 or np.ptp(visible) == 0)
    small = visible[::4, ::4].astype(np.float32)
    grey = float(np.ptp(small, axis=2).mean()) < GREY
    same = False
    if not constant:
        first, second = small.mean(axis=2).ravel(), infrared[::4, ::4].astype(np.float64).ravel()
        if first.std() > 0 and second.std() > 0:
            same = bool(np.corrcoef(first, second)[0, 1] > SAME)
    surface = registration.surface(visible, infrared) if measured and not constant else None
    return Finding(name, source, infrared.shape, surface, constant, grey, same)


def sample(sources: list[str]) -> list[bool]:
    """Whether each pair is among the MEASURED of its source, evenly spaced."""
    chosen = [False] * len(sources)
    for source in dict.fromkeys(sources):
        own = [i for i, s in enumerate(sources) if s == source]
        for place in np.linspace(0, len(own) - 1, min(len(own), MEASURED)).astype(int):
            chosen[own[place]] = True
    return chosen


def source_shifts(findings: list[Finding]) -> dict[str, Shift]:
    """Shift of each source by all its pairs together, at the size that most of them have."""
    shifts = {}
    for source in dict.fromkeys(f.source for f in findings):
        totals: dict[int, list[np.ndarray]] = {}
        for f in findings:
            if f.source == source and f.surface is not None:
                totals.setdefault(registration.step_of(f.size), []).append(f.surface)
        if totals:
            step = max(totals, key=lambda s: len(totals[s]))
            total = np.stack(totals[step]).sum(axis=0)
            shifts[source] = registration.shift_of(total, step)
    return shifts


def astray(findings: list[Finding], shifts: dict[str, Shift]) -> list[tuple[Finding, float]]:
    """Pairs whose own clear shift is FAR from their source's, and how far; the farthest first.

    Where a source as a whole has no clear shift, far from none.
    """
    found = []
    for f in findings:
        own, rest = f.shift(), shifts.get(f.source)
        if own and own.clear():
            distance = own.distance(rest if rest and rest.clear() else None)
            if distance >= FAR:
                found.append((f, distance))
    return sorted(found, key=lambda pair: -pair[1])


def summary(findings: list[Finding]) -> list[str]:
    """Sentences on the whole set."""
    shifts = source_shifts(findings)
    lines = []
    for source in dict.fromkeys(f.source for f in findings):
        own = [f for f in findings if f.source == source]
        shift = shifts.get(source)
        if shift is None:
            lines.append(f"source '{source}': images too small or flat to measure a shift")
        elif not shift.clear():
            lines.append(
                f"source '{source}': no clear shift in all pairs together: "
                "do the names pair one scene?"
            )
        else:
            off = shift.distance() >= OFF
            lines.append(
                f"source '{source}': the infrared lies {shift.text()} from the visible over "
                f"{sum(f.surface is not None for f in own)} pairs"
                + "; --align translation crops that away"
                * off
            )
        for what, count in (
            ("show one image on both sides", sum(f.same for f in own)),
            ("have a visible image without colour: are the sides swapped?", _grey(own)),
        ):
            if count:
                lines.append(f"source '{source}': {count} of {len(own)} pairs {what}")
    if far := astray(findings, shifts):
        named = ", ".join(f"{f.name} by {distance:.1f}" for f, distance in far[:3])
        lines.append(f"{len(far)} pairs lie {FAR:g} or more pixels off their source: {named}")
    if dead := [f.name for f in findings if f.constant]:
        lines.append(f"{len(dead)} pairs have a constant image (first: {dead[0]})")
    return lines


def repairs(findings: list[Finding]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Whole rows and columns to crop from each source that is clearly displaced, and notes."""
    crops, notes = {}, []
    for source, shift in source_shifts(findings).items():
        whole = round(shift.rows), round(shift.columns)
        if not shift.clear() or shift.distance() < OFF or not any(whole):
            why = f"{shift.text()}" if shift.clear() else "no clear shift"
            notes.append(f"source '{source}' stays as it is ({why})")
            continue
        crops[source] = whole
        notes.append(
            f"source '{source}' is cropped on both sides by {abs(whole[0])} rows and "
            f"{abs(whole[1])} columns, so that its infrared no longer lies {shift.text()} away"
        )
    return crops, notes


def _grey(own: list[Finding]) -> int:
    """Pairs with a grey visible image that are not counted for another reason."""
    return sum(f.grey and not f.same and not f.constant for f in own)


def polarity_notes(
    names: list[str], sources: list[str], infrared: np.ndarray, inverted: list[int]
) -> list[str]:
    """Images and sources whose infrared runs the other way. infrared: thumbnails (N,256).

    What most images of a source share (a cold sky above warm ground) makes its mean image. Where
    those of two sources are each other's negative, one of them may be black-hot.

    inverted: numbers of the images that `inversions` gives.
    """
    means = {}
    for source in dict.fromkeys(sources):
        own = infrared[np.array([s == source for s in sources])]
        mean = own.mean(axis=0)
        length = float(np.linalg.norm(mean))
        if len(own) >= FEWEST and length >= SHARED:
            means[source] = mean / length
    notes = [_inverted_note(names, sources, source, inverted) for source in dict.fromkeys(sources)]
    known = list(means)
    for i, first in enumerate(known):
        for second in known[i + 1 :]:
            agreement = float(means[first] @ means[second])
            if agreement < OPPOSITE:
                notes.append(
                    f"the mean infrared images of sources '{first}' and '{second}' are opposite "
                    f"(correlation {agreement:+.2f}): is one of them black-hot?"
                )
    return [note for note in notes if note]


def _inverted_note(names: list[str], sources: list[str], source: str, inverted: list[int]) -> str:
    own = [names[i] for i in inverted if sources[i] == source]
    count = sources.count(source)
    if not own:
        return ""
    more = f" and {len(own) - NAMED} more" if len(own) > NAMED else ""
    return (
        f"source '{source}': {len(own)} of {count} infrared images look like negatives of the"
        f" others ({', '.join(own[:NAMED])}{more}): is their polarity the other one?"
    )


def inversions(sources: list[str], infrared: np.ndarray) -> list[int]:
    """Numbers of the images that run against the majority of their source, the clearest first."""
    found: dict[int, float] = {}
    for source in dict.fromkeys(sources):
        own = np.array([i for i, s in enumerate(sources) if s == source])
        for i, value in zip(own, likeness(infrared[own])):
            if value < AGAINST:
                found[int(i)] = float(value)
    return sorted(found, key=lambda i: found[i])


def likeness(infrared: np.ndarray) -> np.ndarray:
    """How each thumbnail of a source runs: about 1 as the majority, -1 as its negative, 0 unclear.

    A ridge regression asks of thumbnails (N,256) that weights times thumbnail be 1, so that what
    differs between scenes anyhow weighs little: in a plain mean image it does not. Images that run
    the other way are left out and the rest asked again; each image is judged without itself. All 0
    where the images have no common layout: then any of them may run either way.
    """
    images = infrared.astype(np.float64)
    rest = np.ones(len(images), bool)
    values = np.zeros(len(images))
    for _ in range(ROUNDS):
        chosen = images[rest]
        inverse = np.linalg.inv(chosen.T @ chosen + RIDGE * np.eye(images.shape[1]))
        values = images @ (inverse @ chosen.sum(axis=0))
        own = np.einsum("ij,jk,ik->i", chosen, inverse, chosen)  # of each value, by its own image
        values[rest] = (values[rest] - own) / (1 - own)
        before, rest = rest, values > 0
        if rest.sum() < max(FEWEST, MAJORITY * len(rest)):
            return np.zeros(len(images))
        if np.array_equal(before, rest):
            break
    return values if np.mean(values > ALIKE) >= COMMON else np.zeros(len(images))


# ---------------------------------------------------------------------------- the page


def worst(findings: list[Finding], inverted: list[int]) -> list[tuple[int, str]]:
    """Numbers of the pairs to look at first, and why. inverted: of `inversions`."""
    reasons: dict[int, str] = {}
    place = {id(f): i for i, f in enumerate(findings)}
    for i, f in enumerate(findings):
        if f.constant or f.same:
            reasons[i] = "constant image" if f.constant else "one image on both sides"
    for i in inverted:
        reasons.setdefault(i, "the infrared looks like a negative of its source's others")
    for f, distance in astray(findings, source_shifts(findings)):
        shift = f.shift()
        if shift:
            reasons.setdefault(place[id(f)], f"{shift.text()}: {distance:.1f} pixels off")
    return list(reasons.items())[:SHOWN]


def report(title: str, lines: list[str], shown: Iterable[tuple]) -> str:
    """One HTML page without other files. shown: (name, reason, visible, infrared) of pairs."""
    rows = []
    for name, reason, visible, infrared in shown:
        low, high = (float(x) for x in np.percentile(infrared, (0.5, 99.5)))
        grey = np.clip((infrared.astype(np.float64) - low) / max(high - low, 1e-9), 0, 1) * 255
        pictures = "".join(_picture(x) for x in (visible, grey.astype(np.uint8)))
        rows.append(
            f"<section><h3>{html.escape(name)}</h3><p>{html.escape(reason)}</p>{pictures}</section>"
        )
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    style = (
        "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "h3{margin:1.5em 0 0}p{margin:.2em 0}img{width:49.5%;vertical-align:top}"
        "img+img{margin-left:1%}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1><ul>{listed}</ul>"
        f"<h2>The pairs to look at first</h2>{''.join(rows) or '<p>None stands out.</p>'}</html>\n"
    )


def _picture(image: np.ndarray) -> str:
    small = Image.fromarray(image)
    small.thumbnail((registration.SIDE, registration.SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return (
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )
