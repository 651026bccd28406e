"""The world of a synthetic scene: camera, street, weather, buildings, and how they meet a ray.

Street coordinates in metres: u across the street (0 = its middle), v along it, Y up. Image
coordinates: x to the right and y down, both in units of the image height.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.materials import CLASS_NAMES

CLASS = {name: i for i, name in enumerate(CLASS_NAMES["synthetic"])}

BUILDINGS = 16  # distinct houses a side; the row repeats behind the last
TILE = 256  # side of the noise tile


def _make_noise_tile() -> np.ndarray:
    """Periodic fractal noise (TILE, TILE), mean 0, standard deviation 1."""
    white = np.random.Generator(np.random.PCG64(0)).standard_normal((TILE, TILE))
    fy, fx = np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None]
    radius = np.hypot(fy, fx)
    radius[0, 0] = np.inf
    tile = np.fft.irfft2(np.fft.rfft2(white) / radius**1.1, s=(TILE, TILE))
    return ((tile - tile.mean()) / tile.std()).astype(np.float32)


NOISE = _make_noise_tile()
_FLAT_NOISE = NOISE.ravel()


def noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Noise tile at integer parts of a and b (broadcast together), periodic."""
    row = (a.astype(np.int32) & (TILE - 1)) * TILE
    return _FLAT_NOISE.take(row + (b.astype(np.int32) & (TILE - 1)), mode="clip")


def wrap(a: np.ndarray, period: float) -> np.ndarray:
    """a modulo period, in [0, period): several times faster than numpy's mod of floats."""
    return a - np.floor(a * (1.0 / period)) * period


@dataclass
class Weather:
    """Light and heat of a scene; temperatures in kelvin, sun as a unit vector (u, v, up)."""

    night: bool
    season: float  # 0 winter, 1 summer
    cloud: float  # 0 clear, 1 overcast
    direct: float  # sunlight on a surface facing the sun, 0..1
    ambient: float  # sky light
    stored: float  # heat stored since morning, 0..1
    cooling: float  # loss to a clear sky, 0..1
    air_k: float
    zenith_k: float  # brightness temperature of the sky overhead
    sun: np.ndarray  # towards the sun now
    earlier_sun: np.ndarray  # towards the sun two or three hours ago: its shadows are still cool
    sun_color: np.ndarray
    sky_color: np.ndarray  # overhead
    horizon_color: np.ndarray
    lamp_color: np.ndarray


@dataclass
class Side:
    """One side of the street; arrays have an entry per building."""

    open: bool  # no houses
    verge: str  # class between pavement and houses
    beyond: str  # class beyond the houses' line, seen where there is none
    length: float  # of a house, m
    phase: float
    height: np.ndarray  # m, 0 where there is a gap
    kind: np.ndarray  # class id of the wall
    color: np.ndarray  # (BUILDINGS, 3)
    roof: np.ndarray  # height of the roof's visible part, m
    roof_color: np.ndarray  # (BUILDINGS, 3)
    period: np.ndarray  # distance of windows, m
    glazing: np.ndarray  # share of the period that is glass
    shop: np.ndarray  # bool: the ground floor is a shop window
    lit: np.ndarray  # (32, 8) bool: window cells with light (and heating) behind them


@dataclass
class World:
    """All that is decided before a pixel is drawn."""

    yaw: float
    camera_u: float
    camera_height: float
    horizon: float  # y of the horizon
    focal: float
    road: float  # half widths, m
    pavement: float
    front: float  # |u| of the houses
    lamp_v: float
    lamp_spacing: float
    crossing_v: float
    weather: Weather
    sides: tuple[Side, Side]  # left (-u), right (+u)

    def rays(self, x_from_centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(du, dv): metres across and along the street per metre of depth, for image columns."""
        slope = x_from_centre / self.focal
        sin, cos = float(np.sin(self.yaw)), float(np.cos(self.yaw))
        return slope * cos + sin, cos - slope * sin

    def project(
        self, u: np.ndarray | float, v: np.ndarray | float
    ) -> tuple[np.ndarray, np.ndarray]:
        """(x from the image centre, depth in m) of points of the ground."""
        sin, cos = np.sin(self.yaw), np.cos(self.yaw)
        depth = (u - self.camera_u) * sin + v * cos
        right = (u - self.camera_u) * cos - v * sin
        return self.focal * right / np.maximum(depth, 1e-3), depth

    def lamplight(
        self, u: np.ndarray | float, v: np.ndarray | float, height: np.ndarray | float
    ) -> np.ndarray:
        """Light of both rows of street lamps at points (u, v, height); 1 right below a lamp."""
        total: Any = 0.0
        for sign, shift in ((-1, 0.0), (1, 0.5)):
            along = v / self.lamp_spacing - self.lamp_v - shift
            along = (along - np.round(along)) * self.lamp_spacing
            across = u - sign * (self.road - 0.6)
            total = total + 1 / (1 + (along**2 + across**2 + (np.maximum(height - 3, 0)) ** 2) / 9)
        return total

    def lit(self, u, v, height, sun: np.ndarray) -> np.ndarray:
        """Is the sun seen past the houses from points (u, v, height)? Broadcasts; bool."""
        sign = 1.0 if sun[0] > 0 else -1.0
        side = self.sides[int(sun[0] > 0)]
        distance = (self.front - sign * u) / max(abs(float(sun[0])), 0.05)
        house = house_index(side, v + distance * float(sun[1]))
        return (distance <= 0) | (height + distance * float(sun[2]) >= side.height[house])


def house_index(side: Side, v: np.ndarray) -> np.ndarray:
    """Index of the house at v along the street."""
    return np.floor((v - side.phase) / side.length).astype(np.int32) & (BUILDINGS - 1)


def vector(*values: float) -> np.ndarray:
    """Numbers as float32: one float64 scalar would make every array it meets float64."""
    return np.array(values, dtype=np.float32)


def _sun_vector(azimuth: float, elevation: float) -> np.ndarray:
    flat = np.cos(elevation)
    return vector(flat * np.sin(azimuth), flat * np.cos(azimuth), np.sin(elevation))


def sample_weather(rng: np.random.Generator) -> Weather:
    night = bool(rng.random() < 0.4)
    season = float(rng.uniform())
    overcast = rng.random() < 0.3
    cloud = float(rng.uniform(0.75, 1.0) if overcast else rng.uniform(0.0, 0.55))
    clear = 1.0 - cloud
    hour = rng.uniform(7.0, 18.5)
    elevation = (0.25 + (0.5 + 0.4 * season) * np.sin(np.pi * (hour - 6.5) / 12.5)) * 0.95
    azimuth = rng.uniform(0, 2 * np.pi)
    shining = 0.0 if cloud > 0.7 else 1.0 - 0.5 * cloud
    morning = np.clip((hour - 6.5) / 8.0, 0.05, 1.0)
    mean_k = 273.0 + 21.0 * season
    low_sun = np.clip(1.0 - elevation / 0.6, 0.0, 1.0)
    day_sky = vector(0.16, 0.34, 0.72) * clear + vector(0.52, 0.55, 0.60) * cloud
    night_sky = vector(0.010, 0.014, 0.030) + vector(0.022, 0.018, 0.015) * cloud
    air_k = mean_k + (-5.0 + 3.0 * cloud if night else 5.0 * np.sin(np.pi * (hour - 8.5) / 13))
    warm = rng.uniform()
    return Weather(
        night=night,
        season=season,
        cloud=cloud,
        direct=0.0 if night else shining,
        ambient=float(rng.uniform(0.035, 0.06)) if night else 0.30 + 0.25 * cloud,
        stored=float((shining + 0.35 * (shining == 0)) * (0.5 if night else morning)),
        cooling=clear * (1.0 if night else 0.2),
        air_k=float(air_k),
        zenith_k=float(air_k - 10.0 - 34.0 * clear),
        sun=_sun_vector(azimuth, elevation),
        earlier_sun=_sun_vector(azimuth - 0.7, min(elevation + 0.15, 1.2)),
        sun_color=vector(1.0, 0.93 - 0.18 * low_sun, 0.82 - 0.40 * low_sun),
        sky_color=night_sky if night else day_sky,
        horizon_color=night_sky * 2.5 if night else day_sky * 0.3 + 0.48,
        lamp_color=vector(1.0, 0.72 + 0.2 * warm, 0.38 + 0.5 * warm),
    )


_PLASTERS = np.array(
    [
        [0.76, 0.62, 0.36],
        [0.76, 0.56, 0.18],
        [0.36, 0.53, 0.72],
        [0.76, 0.42, 0.34],
        [0.86, 0.78, 0.56],
        [0.46, 0.66, 0.36],
    ]
)
_ROOFS = np.array([[0.46, 0.17, 0.09], [0.36, 0.12, 0.07], [0.13, 0.14, 0.18]])


def sample_side(rng: np.random.Generator, across: bool) -> Side:
    """One side of the street. across: the camera looks straight at it, so houses stay low."""
    n = BUILDINGS
    kind = rng.choice([CLASS["brick wall"], CLASS["plaster wall"], CLASS["concrete wall"]], n)
    brick = np.array([0.42, 0.15, 0.09]) * rng.uniform(0.7, 1.3, (n, 1))
    concrete = np.array([0.37, 0.37, 0.36]) * rng.uniform(0.75, 1.25, (n, 1))
    plaster = _PLASTERS[rng.integers(len(_PLASTERS), size=n)] * rng.uniform(0.8, 1.1, (n, 1))
    which = kind[:, None]
    color = np.where(
        which == CLASS["brick wall"],
        brick,
        np.where(which == CLASS["plaster wall"], plaster, concrete),
    )
    height = rng.uniform(4.5, 8.0, n) if across else rng.uniform(5.0, 15.0, n)
    is_open = bool(rng.random() < 0.25)
    height[rng.random(n) < (1.0 if is_open else 0.2)] = 0.0
    pitched = rng.random(n) < 0.6
    return Side(
        open=is_open,
        verge=str(rng.choice(["grass", "soil", "pavement"], p=[0.5, 0.25, 0.25])),
        beyond=str(rng.choice(["water", "grass"], p=[0.6, 0.4])) if is_open else "grass",
        length=float(rng.uniform(7, 14)),
        phase=float(rng.uniform(0, 14)),
        height=height.astype(np.float32),
        kind=kind,
        color=color.astype(np.float32),
        roof=np.where(pitched, rng.uniform(1.4, 2.4, n), 0.0).astype(np.float32),
        roof_color=(
            _ROOFS[rng.integers(len(_ROOFS), size=n)] * rng.uniform(0.8, 1.2, (n, 1))
        ).astype(np.float32),
        period=rng.uniform(2.0, 3.2, n).astype(np.float32),
        glazing=rng.uniform(0.35, 0.6, n).astype(np.float32),
        shop=rng.random(n) < 0.35,
        lit=rng.random((32, 8)) < 0.35,
    )


def sample_world(rng: np.random.Generator) -> World:
    """Draw camera, street and weather; a fixed number of draws decides the layout first."""
    across = bool(rng.random() < 0.4)
    road, pavement = rng.uniform(3.0, 4.5), rng.uniform(1.5, 2.8)
    front = road + pavement + rng.uniform(0.8, 4.0)
    if across:
        yaw = float(rng.choice([-1, 1]) * rng.uniform(1.25, 1.5))
        camera_u = -np.sign(yaw) * (road + rng.uniform(4.5, 8.0))
    else:
        yaw = float(rng.uniform(-0.22, 0.22))
        camera_u = rng.uniform(-0.6, 0.6) * road
    return World(
        yaw=yaw,
        camera_u=float(camera_u),
        camera_height=float(rng.uniform(1.8, 2.8)),
        horizon=float(rng.uniform(0.40, 0.50)),
        focal=float(rng.uniform(0.85, 1.05)),
        road=float(road),
        pavement=float(pavement),
        front=float(front),
        lamp_v=float(rng.uniform()),
        lamp_spacing=float(rng.uniform(12, 20)),
        crossing_v=float(rng.uniform(5, 16)) if rng.random() < 0.4 else -1e3,
        weather=sample_weather(rng),
        sides=(sample_side(rng, across), sample_side(rng, across)),
    )
