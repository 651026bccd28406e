"""`prepare.py --align`: which sources are displaced as a whole, and how their pairs are moved.

The visible side is moved, and both sides are cropped to what they share: the infrared, which a
model learns to make, keeps its values.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import affine, doctor
from data.affine import Affine
from data.folders import Item
from data.inspection import Inspection, Options, decode_item, in_workers, without_ends

ROUNDS = 3  # of measuring what the map found so far leaves
SURE = 3.0  # standard errors by which a map must differ from a shift at the farthest corner
CLEARLY = 5.0  # standard errors by which the edge correlation of the pairs must rise
FEWEST, MOST = 5, 100  # pairs of a source that are measured


class Look(NamedTuple):
    """One pair of a source, and the maps to try on it; plain values, for worker processes."""

    item: Item
    found: Inspection
    options: Options
    maps: tuple[Affine, ...]


class Verdict(NamedTuple):
    """Whether a source is to be turned and scaled, and why."""

    note: str
    move: Affine | None = None
    improbable: bool = False  # so far from right that a shift would not help


def aligned(
    items: list[Item], found: list[Inspection], options: Options, turned: bool, workers: int
) -> tuple[list[Inspection], dict[str, list], list[str]]:
    """Inspections with the moves that align their sources, those moves, and notes.

    Args: turned: whether a source may be turned and scaled too, where that is clearly better.
    Returns: for the manifest, of each moved source [rows, columns] by which it was cropped or the
        six numbers of its `Affine`.
    Raises: ValueError: a pair shares nothing after the move.
    """
    moves: dict[str, Affine] = {}
    applied: dict[str, list] = {}
    notes = []
    for source in dict.fromkeys(item.source for item in items):
        own = [i for i, item in enumerate(items) if item.source == source]
        if turned:
            looks = [Look(items[i], found[i], options, ()) for i in own]
            verdict = judge(source, looks, workers)
            notes.append(verdict.note)
            if verdict.move:
                moves[source], applied[source] = verdict.move, list(verdict.move)
            if verdict.move or verdict.improbable:
                continue
        crops, more = doctor.repairs([found[i].finding for i in own])
        notes += more
        if crop := crops.get(source):
            moves[source], applied[source] = Affine(c=-crop[0], f=-crop[1]), list(crop)
    return [_with(item, f, moves.get(item.source)) for item, f in zip(items, found)], applied, notes


def _with(item: Item, found: Inspection, move: Affine | None) -> Inspection:
    if move is None:
        return found
    top, bottom, left, right = move.inside(found.size)
    if bottom <= top or right <= left:
        raise ValueError(f"{item.where()}: nothing of {found.size[1]} x {found.size[0]} is left")
    return found._replace(move=move, size=(bottom - top, right - left))


def judge(source: str, looks: list[Look], workers: int) -> Verdict:
    """Is an affine map of this source clearly better than leaving or shifting it?"""
    shift = doctor.source_shifts([look.found.finding for look in looks]).get(source)
    sizes = {look.found.size for look in looks}
    looks = [look for look in looks if look.found.finding.surface is not None]
    refused = f"source '{source}' is not turned or scaled: "
    if len(sizes) > 1:
        return Verdict(f"{refused}its images have {len(sizes)} sizes")
    if len(looks) < FEWEST:
        return Verdict(f"{refused}{len(looks)} pairs can be measured, {FEWEST} are needed")
    (size,) = sizes
    chosen = np.linspace(0, len(looks) - 1, min(len(looks), MOST)).astype(int)
    looks = [looks[i] for i in chosen]
    fit = _fitted(source, looks, size, workers)
    if fit is None:
        return Verdict(f"{refused}too few parts of its images have a clear displacement")
    found, text = fit.affine, fit.affine.text(size)
    if not found.probable():
        limits = f"over {affine.STEEPEST:g} degrees or {affine.LARGEST:.0%}"
        why = f"its infrared seems {text}, which is improbable ({limits})"
        return Verdict(f"source '{source}' stays as it is: {why}", improbable=True)
    corners = found.corners(size)
    beyond = float(np.hypot(*(corners - corners.mean(axis=0)).T).max())
    if beyond < max(doctor.OFF, SURE * fit.error):
        differs = f"{beyond:.1f} +- {fit.error:.1f} pixels at the corners"
        return Verdict(f"{refused}what is found differs from a shift by {differs}")
    plain = Affine(c=-shift.rows, f=-shift.columns) if shift and shift.clear() else Affine()
    looks = [look._replace(maps=(Affine(), plain, found)) for look in looks]
    edges = np.array(_each(_edges, looks, f"compare {source}", workers))
    as_is, shifted, moved = edges.mean(axis=0)
    evidence = f"edge correlation {as_is:.3f} as it is, {shifted:.3f} shifted, {moved:.3f} so moved"
    gain = edges[:, 2] - edges[:, :2].max(axis=1)
    if gain.mean() <= CLEARLY * gain.std(ddof=1) / np.sqrt(len(gain)):
        return Verdict(f"{refused}{text} is not clearly better than a shift ({evidence})")
    top, bottom, left, right = found.inside(size)
    shared = f"both are cropped to the {right - left} x {bottom - top} pixels that they share"
    return Verdict(
        f"source '{source}': its infrared was {text}; the visible side is moved, class images with "
        f"it, and {shared} ({evidence})",
        found,
    )


def _fitted(
    source: str, looks: list[Look], size: tuple[int, int], workers: int
) -> affine.Fit | None:
    fit = affine.Fit(Affine(), 0.0)
    for number in range(ROUNDS):
        now = [look._replace(maps=(fit.affine,)) for look in looks]
        what = f"align {source} {number + 1}/{ROUNDS}"
        total = np.sum(_each(_parts, now, what, workers), axis=0)
        found = affine.fit(total, fit.affine, size)
        if found is None or not found.affine.probable():
            return found
        fit = found
    return fit


def _each(function: Callable, looks: list[Look], what: str, workers: int) -> list:
    done = in_workers(function, looks, workers)
    return list(tqdm(done, total=len(looks), desc=what, unit="pair"))


def _sides(look: Look) -> tuple[np.ndarray, np.ndarray]:
    pair = decode_item(look.item, look.options)
    return pair.visible, without_ends(pair.infrared, look.found.values)


def _parts(look: Look) -> np.ndarray:
    return affine.parts(*_sides(look), look.maps[0])


def _edges(look: Look) -> list[float]:
    sides = _sides(look)
    return [affine.edge_correlation(*sides, each) for each in look.maps]
