"""Street scenes rendered twice from one world: a photograph and the view of a thermal camera.

The visible is albedo under sun, shadow and lamps. The infrared is radiance in the 8-14 um band,

    infrared = to_window(emissivity * band_radiance(temperature) + (1 - emissivity) * environment)

with the emissivities of `data/materials.py` and temperatures from a small model: air temperature
plus sunlight now, plus heat stored since morning, minus loss to a clear sky, plus what is special
to a thing (engines, bodies, lamps, heated rooms). The coefficients below are chosen for plausible
contrasts (asphalt stays warm at night, grass and car roofs get cold, water hardly moves, foliage
stays near the air), not fitted to measurements.

A scene is a function of (seed, index) alone: the same street at every size, no files.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import scene_objects as objects
from data.manifest import sha256
from data.materials import MATERIALS, TABLES
from data.radiometry import band_radiance, band_temperature, to_unit, to_window
from data.scene_surfaces import Canvas, draw_ground, draw_sky, draw_walls, new_canvas
from data.scene_world import CLASS, World, sample_world

# K per unit of: sunlight now, heat stored since morning, loss to a clear sky at full sky view
_THERMAL = {
    "road": (12.0, 15.0, 2.0),
    "road marking": (12.0, 15.0, 2.0),  # a coat of paint: no contrast in the infrared
    "pavement": (7.0, 10.0, 4.0),
    "brick wall": (13.0, 11.0, 2.0),
    "plaster wall": (9.0, 6.0, 3.0),
    "concrete wall": (8.0, 11.0, 2.0),
    "window": (1.5, 0.5, 2.0),
    "door": (9.0, 2.0, 2.0),
    "roof": (15.0, 4.0, 9.0),
    "grass": (9.0, -3.0, 9.0),  # transpires by day, cools fast at night
    "tree crown": (3.0, -2.0, 1.0),
    "trunk": (4.0, 3.0, 1.0),
    "soil": (14.0, 6.0, 6.0),
    "car body": (6.0, 2.0, 11.0),  # thin sheet; paint colour adds its own
    "car window": (4.0, 1.0, 6.0),
    "tyre": (8.0, 3.0, 2.0),
    "clothing": (6.0, 0.0, 2.0),
    "steelwork": (8.0, 1.0, 5.0),
}
_WATER_K = (277.0, 292.0)  # winter, summer: between day and night air
_READ_NOISE = (0.006, 0.022)  # of the visible, in image values: by day, by night

_COEFFICIENTS = np.zeros((3, len(CLASS)), np.float32)
for _name, _row in _THERMAL.items():
    _COEFFICIENTS[:, CLASS[_name]] = _row
_MATERIAL = TABLES["synthetic"]
_EMISSIVITY = np.array([MATERIALS[m].emissivity for m in _MATERIAL], np.float32)


class Scene(NamedTuple):
    """One scene; H x W numpy arrays.

    `infrared` equals clip(emissivity * to_unit(band_radiance(temperature_k))
    + (1 - emissivity) * environment, 0, 1) to 1e-4; it has optical blur and no noise.
    At the border of two things a pixel's emissivity is the mean over the pixel, its temperature
    that of a grey body of this emissivity with the same emission.
    """

    visible: np.ndarray  # (H, W, 3) float32 in [0, 1]
    infrared: np.ndarray  # (H, W) float32 in [0, 1]
    semantic: np.ndarray  # (H, W) uint8, ids of the label set "synthetic"
    material: np.ndarray  # (H, W) uint8, material ids
    temperature_k: np.ndarray  # (H, W) float32
    emissivity: np.ndarray  # (H, W) float32
    environment: np.ndarray  # (H, W) float32, reflected radiance in to_unit's unit
    night: bool
    name: str


def render_scene(seed: int, index: int, size: int | tuple[int, int]) -> Scene:
    """Scene number `index` of the collection `seed`, at a size of (H, W) pixels (or a square).

    Raises: ValueError for a negative seed or index, or a side below 16 pixels.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if seed < 0 or index < 0:
        raise ValueError(f"synthetic scene: seed and index must be >= 0, got {seed} and {index}")
    if min(height, width) < 16:
        raise ValueError(f"synthetic scene: sides must be >= 16 pixels, got {height} x {width}")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index))))
    world = sample_world(rng)
    canvas = new_canvas(2 * height, 2 * width)
    draw_sky(canvas, world, rng)
    draw_ground(canvas, world, rng)
    draw_walls(canvas, world)
    objects.draw_objects(canvas, world, rng)
    semantic = canvas.classes[::2, ::2].copy()
    infrared, temperature_k, emissivity, environment = _expose_infrared(canvas, world)
    return Scene(
        visible=_expose_visible(canvas, world, rng),
        infrared=infrared,
        semantic=semantic,
        material=_MATERIAL[semantic],
        temperature_k=temperature_k,
        emissivity=emissivity,
        environment=environment,
        night=world.weather.night,
        name=f"synthetic-{seed}-{index:06d}",
    )


def _temperature(canvas: Canvas, world: World) -> np.ndarray:
    weather = world.weather
    classes = canvas.classes.astype(np.intp)
    sun, stored, cooling = (row.take(classes, mode="clip") for row in _COEFFICIENTS)
    water = _WATER_K[0] + weather.season * (_WATER_K[1] - _WATER_K[0]) - weather.air_k
    own = np.zeros(len(CLASS), np.float32)
    own[CLASS["water"]] = water
    return (
        weather.air_k
        + own.take(classes, mode="clip")
        + canvas.delta
        + sun * canvas.sun
        + stored * canvas.stored
        - cooling * weather.cooling * canvas.skyview
    )


def _expose_infrared(canvas: Canvas, world: World) -> tuple[np.ndarray, ...]:
    """(infrared, temperature_k, emissivity, environment) at half the canvas' resolution.

    A detector averages radiance. Emission and reflection are averaged apart, each over the same
    pixel and blur, so that the rendering equation stays exact for the averaged maps.
    """
    weather = world.weather
    emissivity = _EMISSIVITY.take(canvas.classes)
    sky, around = band_radiance(
        np.array([0.7 * weather.zenith_k + 0.3 * weather.air_k, weather.air_k])
    )
    emission = emissivity * band_radiance(_temperature(canvas, world)).astype(np.float32)
    incoming = float(around) + float(sky - around) * canvas.skyview
    mean_emissivity = _blur(_halve(emissivity))
    temperature_k = band_temperature(_blur(_halve(emission)) / mean_emissivity)
    share = _blur(_halve(1.0 - emissivity)) + 1e-6
    environment = _blur(_halve((1.0 - emissivity + 1e-6) * incoming)) / share
    infrared = to_window(
        mean_emissivity * band_radiance(temperature_k) + (1.0 - mean_emissivity) * environment
    )
    maps = infrared, temperature_k, mean_emissivity, to_unit(environment)
    return tuple(m.astype(np.float32) for m in maps)


def _expose_visible(canvas: Canvas, world: World, rng: np.random.Generator) -> np.ndarray:
    """The photograph (H, W, 3): auto exposure, gamma, sensor noise; brighter lamps saturate."""
    weather = world.weather
    sky_light = weather.ambient * (0.45 + 0.55 * canvas.skyview)
    tint = weather.sky_color / weather.sky_color.mean() * 0.4 + 0.6
    channels = []
    for c in range(3):
        light = (
            1.1 * weather.sun_color[c] * canvas.sun
            + tint[c] * sky_light
            + 0.55 * weather.lamp_color[c] * canvas.lamp
        )
        channels.append(_halve(canvas.albedo[c] * light + canvas.glow[c]))
    image = np.sqrt(np.clip(np.stack(channels, axis=-1), 0.0, 1.0))
    amplitude = _READ_NOISE[int(weather.night)]
    image += amplitude * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0.0, 1.0).astype(np.float32)


def _halve(plane: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 samples."""
    rows = plane[0::2] + plane[1::2]
    return 0.25 * (rows[:, 0::2] + rows[:, 1::2])


def _blur(plane: np.ndarray) -> np.ndarray:
    """Optical blur of about 0.6 pixels (standard deviation): [1 4 1] / 6 along both axes."""
    for axis in (0, 1):
        padded = np.pad(plane, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        n = plane.shape[axis]
        first, last = (np.take(padded, np.arange(n) + k, axis=axis) for k in (0, 2))
        plane = (first + last + 4.0 * plane) / 6.0
    return plane


@cache
def renderer_hash() -> str:
    """Of the code that draws a scene."""
    files = sorted(Path(__file__).parent.glob("scene_*.py"))
    here = [Path(__file__).parent / name for name in ("synthetic.py", "materials.py")]
    return sha256(b"".join(file.read_bytes() for file in (*files, *here)))
