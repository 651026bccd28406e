"""Cars, people, trees, lamps and steel boxes of a synthetic scene: flat figures, far ones first.

A figure is drawn in metres: p to the right of its foot point, q above the ground.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.scene_surfaces import Canvas, fill, grass_color
from data.scene_world import CLASS, TILE, World, noise, vector, wrap


@dataclass
class Figure:
    """Where a figure stands, and the window of the canvas it may touch."""

    u: float
    v: float
    depth: float
    rows: slice
    columns: slice
    p: np.ndarray       # (1, w) m
    q: np.ndarray       # (h, 1) m
    shape: tuple[int, int]


class Light(NamedTuple):
    """Light on a figure: numbers, or arrays (1, w)."""

    sun: np.ndarray
    stored: float
    lamp: float


def place(world: World, canvas: Canvas, u, v, half_width, height, nearest) -> Figure | None:
    """The figure's window on the canvas, or None if it is out of sight or too near."""
    x, depth = (float(n) for n in world.project(u, v))
    if depth < nearest or depth > 45:
        return None
    scale = world.focal / depth
    foot = world.horizon + world.camera_height * scale
    rows = slice(*np.searchsorted(canvas.y, [foot - height * scale, foot]))
    columns = slice(*np.searchsorted(canvas.x, [x - half_width * scale, x + half_width * scale]))
    if rows.stop - rows.start < 4 or columns.stop - columns.start < 2:
        return None
    p = (canvas.x[None, columns] - x) / scale
    q = (foot - canvas.y[rows, None]) / scale
    return Figure(float(u), float(v), float(depth), rows, columns, p, q, (q.size, p.size))


def light_on(world: World, figure: Figure, half_width: float) -> Light:
    """Sun on a rounded upright figure, brighter on the side that faces the sun."""
    weather = world.weather
    right = float(weather.sun[0] * np.cos(world.yaw) - weather.sun[1] * np.sin(world.yaw))
    seen = float(world.lit(figure.u, figure.v, 1.0, weather.sun))
    slope = np.clip(0.55 + 0.5 * right * figure.p / half_width, 0.1, 1.0)
    lamp = float(world.lamplight(figure.u, figure.v, 1.0)) if weather.night else 0.0
    return Light(weather.direct * seen * slope, 0.5 * weather.stored, lamp)


def paint(canvas: Canvas, figure: Figure, light: Light, mask, which: str, albedo, delta=0.0,
          skyview=0.4, glow=0.0) -> None:
    """Fill part of a figure. albedo, glow: (3,) or (3, h, w)."""
    def color(c):
        c = np.asarray(c)
        return c[:, None, None] if c.ndim == 1 else c

    fill(canvas, figure.rows, figure.columns, np.broadcast_to(mask, figure.shape), CLASS[which],
         color(albedo), light.sun, light.stored, skyview, delta, light.lamp, color(glow))


def cast_shadow(canvas: Canvas, world: World, u, v, half_width: float, height: float) -> None:
    """Shadow on the ground: now, and where it lay some hours ago (the ground there is cooler)."""
    weather = world.weather
    if weather.direct > 0:
        _shade(canvas.sun, 0.0, canvas, world, u, v, half_width, height, weather.sun)
    if weather.stored > 0:
        _shade(canvas.stored, 0.5, canvas, world, u, v, half_width, height, weather.earlier_sun)


def _shade(plane, keep, canvas, world, u, v, half_width, height, sun) -> None:
    flat = max(float(np.hypot(sun[0], sun[1])), 1e-3)
    length = min(height * flat / float(sun[2]), 3.0 * height)
    du, dv = -float(sun[0]) / flat, -float(sun[1]) / flat
    centre_u, centre_v = u + du * length / 2, v + dv * length / 2
    reach = length / 2 + half_width
    corners_u = centre_u + reach * np.array([-1, -1, 1, 1])
    corners_v = centre_v + reach * np.array([-1, 1, -1, 1])
    x, depth = world.project(corners_u, corners_v)
    if depth.max() < 1.0:
        return
    near, far = max(depth.min(), 1.0), depth.max()
    y = world.horizon + world.camera_height * world.focal / np.array([far, near])
    rows = slice(*np.searchsorted(canvas.y, y))
    columns = slice(None) if depth.min() < 1.0 else slice(
        *np.searchsorted(canvas.x, [x.min(), x.max()]))
    depth = world.camera_height * world.focal / (canvas.y[rows, None] - world.horizon)
    ray_u, ray_v = world.rays(canvas.x[None, columns])
    a = world.camera_u + depth * ray_u - centre_u
    b = depth * ray_v - centre_v
    along, across = (a * du + b * dv) / reach, (a * dv - b * du) / half_width
    ground = np.abs(world.camera_u + depth * ray_u) < world.front
    plane[rows, columns] *= np.where((along**2 + across**2 < 1) & ground, keep, 1.0)


def draw_tree(canvas: Canvas, world: World, figure: Figure, rng: np.random.Generator) -> None:
    """A trunk and a ragged crown; colour by season, sky seen through gaps."""
    height, weather = 6.5, world.weather
    light = light_on(world, figure, 2.0)
    p, q = figure.p, figure.q
    grain = noise(p * 25 + 9, q * 4)
    trunk = np.abs(p + 0.06 * np.sin(q)) < 0.32 - 0.02 * q
    paint(canvas, figure, light, trunk & (q < 0.7 * height), "trunk",
          vector(0.17, 0.11, 0.07)[:, None, None] * (1.0 + 0.35 * grain), 0.4 * grain)
    shift = float(rng.uniform(0, TILE))
    field = np.full(figure.shape, -1.0, np.float32)
    for _ in range(5):
        centre_p, centre_q = rng.uniform(-1.1, 1.1), height * rng.uniform(0.55, 0.8)
        radius = rng.uniform(0.9, 1.4)
        distance = ((p - centre_p) ** 2 + (q - centre_q) ** 2) / radius**2
        field = np.maximum(field, 1.0 - distance)
    leaves = noise(p * 30 + shift, q * 30 + shift)
    autumn = 0.35 < weather.season < 0.5
    color = vector(0.42, 0.20, 0.04) if autumn else grass_color(weather.season) * 0.62
    shade = 0.75 + 0.06 * q + 0.30 * leaves
    paint(canvas, figure, light, field + 0.30 * leaves > 0.12, "tree crown",
          color[:, None, None] * np.clip(shade, 0.3, 1.7), 0.4 * leaves)


def draw_person(canvas: Canvas, world: World, figure: Figure, rng: np.random.Generator) -> None:
    """A standing or walking person: bare head and hands, clothes that hide half the body heat."""
    weather = world.weather
    light = light_on(world, figure, 0.3)
    p, q = figure.p, figure.q
    body_k = 306.5 - weather.air_k
    coat = 0.40 + 0.25 * weather.season                 # thinner clothes in summer
    tops = rng.uniform(0.03, 0.65, 3) * vector(1.0, 0.9, 1.0)
    trousers = rng.uniform(0.02, 0.22) * rng.uniform(0.6, 1.4, 3)
    skin = vector(0.58, 0.36, 0.25) * rng.uniform(0.5, 1.25)
    hatted = bool(rng.random() < 0.6)
    stride = rng.uniform(0.05, 0.16)
    spread = stride * np.clip(1.0 - q / 0.85, 0, 1) + 0.09
    legs = (np.abs(np.abs(p) - spread) < 0.10) & (q < 0.9)
    torso = (np.abs(p) / 0.27) ** 3 + (np.abs(q - 1.15) / 0.36) ** 3 < 1
    arms = (np.abs(np.abs(p) - 0.24 - 0.10 * (1.4 - q)) < 0.075) & (q > 0.76) & (q < 1.38)
    folds = 0.8 * noise(p * 40, q * 25)
    cloth_k = coat * body_k
    paint(canvas, figure, light, legs, "clothing", trousers, 0.8 * cloth_k + folds)
    paint(canvas, figure, light, torso | arms, "clothing", tops, cloth_k + folds)
    bare = arms & (q < (1.12 if weather.season > 0.5 else 0.90))
    head = (p / 0.18) ** 2 + ((q - 1.61) / 0.21) ** 2 < 1
    neck = (np.abs(p) < 0.08) & (q > 1.4) & (q < 1.6)
    paint(canvas, figure, light, head | neck | bare, "skin", skin, body_k - 1.5)
    hat = head & (q > 1.71) & hatted
    paint(canvas, figure, light, hat, "clothing", trousers, 0.6 * body_k)


_PAINTS = np.array([[0.75, 0.75, 0.74], [0.45, 0.46, 0.48], [0.03, 0.03, 0.035],
                    [0.50, 0.03, 0.03], [0.04, 0.09, 0.42], [0.66, 0.48, 0.04],
                    [0.03, 0.24, 0.10], [0.10, 0.10, 0.11]], np.float32)


def draw_car(canvas: Canvas, world: World, figure: Figure, rng: np.random.Generator,
             across: bool, driving: bool) -> None:
    """A car from the side or from an end. One that drives has its lights on and a hot engine."""
    color = _PAINTS[rng.integers(len(_PAINTS))] * rng.uniform(0.85, 1.15)
    front = bool(rng.random() < 0.5)
    light = light_on(world, figure, 2.0)
    (_car_side if across else _car_end)(canvas, world, figure, light, color, front, driving)


def _body_heat(world: World, light: Light, color: np.ndarray) -> np.ndarray:
    """K: dark paint takes up more sun than light paint does."""
    return 16.0 * (0.75 - float(color.mean())) * light.sun


def _car_side(canvas, world, figure, light, color, front, driving) -> None:
    p, q = figure.p * (1 if front else -1), figure.q        # the engine is at positive p
    weather = world.weather
    bumper = np.clip((np.abs(p) - 1.9) / 0.2, 0, 1)
    lower = (np.abs(p) < 2.1) & (q > 0.25 + 0.1 * bumper) & (q < 0.85 - 0.12 * bumper)
    roofline = np.clip((q - 0.85) / 0.62, 0, 1)
    cabin = (p > -1.75 + 0.5 * roofline) & (p < 1.15 - 0.75 * roofline) & (q >= 0.85) & (q < 1.47)
    heat = _body_heat(world, light, color)
    engine = driving * 20.0 * np.exp(-((p - 1.45) / 0.5) ** 2 - ((q - 0.65) / 0.35) ** 2)
    shine = color[:, None, None] * (0.80 + 0.3 * np.clip(q / 1.4, 0, 1))
    paint(canvas, figure, light, lower | cabin, "car body", shine, heat + engine, 0.55)
    glass = cabin & (q > 0.92) & (q < 1.36) & (np.abs(p + 0.25) > 0.06)
    glass &= (p > -1.55 + 0.5 * roofline) & (p < 0.95 - 0.75 * roofline)
    reflected = weather.sky_color * 0.45 + weather.horizon_color * 0.12
    paint(canvas, figure, light, glass, "car window", (0.02, 0.02, 0.02),
          2.0 * driving, 0.8, glow=reflected)
    for wheel in (-1.3, 1.3):
        radius = (p - wheel) ** 2 + (q - 0.33) ** 2
        paint(canvas, figure, light, radius < 0.36**2, "tyre", (0.025, 0.025, 0.028),
              driving * 13.0, 0.3)
        paint(canvas, figure, light, radius < 0.14**2, "steelwork", (0.45, 0.45, 0.47),
              driving * 18.0, 0.3)
    if driving:
        _lamp(canvas, figure, light, (p > 1.85) & (p < 2.1) & (np.abs(q - 0.66) < 0.09), True)
        _lamp(canvas, figure, light, (p < -1.88) & (p > -2.1) & (np.abs(q - 0.70) < 0.09), False)


def _car_end(canvas, world, figure, light, color, front, driving) -> None:
    p, q = figure.p, figure.q
    weather = world.weather
    heat = _body_heat(world, light, color)
    for side in (-1, 1):
        tyre = (np.abs(p - 0.66 * side) < 0.19) & (q < 0.5)
        paint(canvas, figure, light, tyre, "tyre", (0.025, 0.025, 0.028), driving * 13.0, 0.3)
    body = (np.abs(p) < 0.88) & (q > 0.28) & (q < 0.95)
    cabin = (np.abs(p) < 0.86 - 0.32 * np.clip((q - 0.9) / 0.55, 0, 1)) & (q >= 0.9) & (q < 1.47)
    spread = np.exp(-(p / 0.6) ** 2 - ((q - 0.6) / 0.3) ** 2)
    exhaust = np.exp(-((p - 0.45) / 0.2) ** 2 - ((q - 0.34) / 0.14) ** 2)
    engine = driving * (20.0 * spread if front else 3.0 * spread + 18.0 * exhaust)
    shine = color[:, None, None] * (0.80 + 0.3 * np.clip(q / 1.4, 0, 1))
    paint(canvas, figure, light, body | cabin, "car body", shine, heat + engine, 0.55)
    glass = (np.abs(p) < 0.72 - 0.28 * np.clip((q - 0.9) / 0.55, 0, 1)) & (q > 0.96) & (q < 1.36)
    reflected = weather.sky_color * 0.45 + weather.horizon_color * 0.12
    paint(canvas, figure, light, glass, "car window", (0.02, 0.02, 0.02), 2.0 * driving, 0.85,
          glow=reflected)
    paint(canvas, figure, light, (np.abs(p) < 0.26) & (np.abs(q - 0.5) < 0.07), "car body",
          (0.7, 0.7, 0.66), heat + 0.6 * engine, 0.4)
    if driving:
        _lamp(canvas, figure, light, (np.abs(np.abs(p) - 0.66) < 0.15) & (np.abs(q - 0.72) < 0.1),
              front)


def _lamp(canvas, figure, light, mask, white: bool) -> None:
    glow = vector(1.3, 1.25, 1.0) if white else vector(0.9, 0.04, 0.02)
    paint(canvas, figure, light, mask, "car window", (0.1, 0.1, 0.1), 8.0 if white else 4.0,
          0.3, glow=glow)


def draw_lamp(canvas: Canvas, world: World, figure: Figure) -> None:
    """A galvanised pole; its head shines at night."""
    light = light_on(world, figure, 0.3)
    p, q = figure.p, figure.q
    steel = vector(0.40, 0.42, 0.45)[:, None, None] * (1.0 - 2.0 * np.abs(p) + 0 * q)
    paint(canvas, figure, light, (np.abs(p) < 0.14) & (q < 5.2), "steelwork", steel)
    head = (np.abs(p) < 0.42) & (q > 5.0) & (q < 5.3)
    night = world.weather.night
    paint(canvas, figure, light, head, "steelwork", (0.35, 0.36, 0.38), 10.0 * night,
          glow=world.weather.lamp_color * (1.4 * night))


def draw_cabinet(canvas: Canvas, world: World, figure: Figure) -> None:
    """A box of bare ribbed steel: it mirrors a cold sky, whatever its temperature."""
    light = light_on(world, figure, 0.8)
    p, q = figure.p, figure.q
    rib = 0.85 + 0.35 * (wrap(p, 0.22) < 0.11) + 0.1 * q
    paint(canvas, figure, light, (np.abs(p) < 0.8) & (q < 1.5), "steelwork",
          vector(0.50, 0.53, 0.57)[:, None, None] * rib, 0.0, 0.6)


class _Item(NamedTuple):
    kind: str
    u: float
    v: float
    driving: bool
    seed: int


def _spot(world: World, u: float, share: float) -> float:
    """v for a thing at u that lands inside the view: share 0..1 runs across it, or away from us."""
    across = abs(world.yaw) > 0.8
    if not across:
        return 4.5 * 5.0**share
    x = 1.1 * (share - 0.5)
    sin, cos = np.sin(world.yaw), np.cos(world.yaw)
    return (u - world.camera_u) * (world.focal * cos - x * sin) / (x * cos + world.focal * sin)


def _scatter(world: World, rng: np.random.Generator) -> list[_Item]:
    """Things of a scene, with places and a seed each, so that what is seen changes no draw."""
    items = []
    road, walk = world.road, world.road + world.pavement
    far_side = np.sign(world.yaw) if abs(world.yaw) > 0.8 else 0.0

    def add(kind: str, count: int, inner: float, outer: float, driving: bool = False) -> None:
        shares = (rng.permutation(max(count, 1)) + rng.uniform(0.1, 0.9, max(count, 1))) / max(
            count, 1)
        for share in shares[:count]:
            sign = far_side if far_side and kind in ("tree", "cabinet") else rng.choice([-1, 1])
            u = sign * rng.uniform(inner, outer)
            items.append(_Item(kind, float(u), float(_spot(world, u, share)), driving,
                               int(rng.integers(2**31))))

    add("tree", int(rng.integers(0, 5)), walk + 0.3, max(walk + 0.4, world.front - 0.3))
    add("cabinet", int(rng.integers(0, 3)), walk - 0.5, walk)
    add("car", int(rng.integers(0, 3)), 0.45 * road, 0.52 * road, driving=True)
    add("car", int(rng.integers(0, 3)), road - 1.0, road - 0.8)
    add("person", int(rng.integers(1, 5)), road + 0.4, walk)
    add("person", int(rng.integers(0, 2)), 0.0, road)
    for sign, shift in ((-1, 0.0), (1, 0.5)):
        for step in range(-2, 3):
            v = (world.lamp_v + shift + step) * world.lamp_spacing
            items.append(_Item("lamp", sign * (road + 0.3), float(v), False, 0))
    return items


# half width, height, least depth, half width of the shadow (0: none), height of the shadow; metres
_EXTENT = {
    "tree": (2.7, 7.2, 3.0, 1.6, 6.5),
    "cabinet": (0.8, 1.5, 4.0, 0.8, 1.5),
    "car": (2.15, 1.5, 6.5, 1.15, 1.1),
    "person": (0.5, 1.85, 4.2, 0.3, 1.8),
    "lamp": (0.5, 5.4, 5.0, 0.0, 0.0),
}


def draw_objects(canvas: Canvas, world: World, rng: np.random.Generator) -> None:
    """Shadows on the ground first, then the figures from far to near."""
    items = _scatter(world, rng)
    across = abs(world.yaw) > 0.8
    items.sort(key=lambda item: -float(world.project(item.u, item.v)[1]))
    placed = []
    for item in items:
        half_width, height, nearest, shade_width, shade_height = _EXTENT[item.kind]
        figure = place(world, canvas, item.u, item.v, half_width, height, nearest)
        placed.append((item, figure))
        depth = float(world.project(item.u, item.v)[1])
        if shade_width and nearest < depth < 45:
            cast_shadow(canvas, world, item.u, item.v, shade_width, shade_height)
            if item.kind == "car":
                _warm_ground(canvas, world, item)
    for item, figure in placed:
        if figure is None:
            continue
        own = np.random.Generator(np.random.PCG64(item.seed))
        if item.kind == "car":
            draw_car(canvas, world, figure, own, across, item.driving)
        elif item.kind == "tree":
            draw_tree(canvas, world, figure, own)
        elif item.kind == "person":
            draw_person(canvas, world, figure, own)
        elif item.kind == "lamp":
            draw_lamp(canvas, world, figure)
        else:
            draw_cabinet(canvas, world, figure)


def _warm_ground(canvas: Canvas, world: World, item: _Item) -> None:
    """Under a car the road is dark; it is warm under one that drives."""
    depth = float(world.project(item.u, item.v)[1])
    y = world.horizon + world.camera_height * world.focal / np.array([depth + 2.0,
                                                                      max(depth - 2.0, 1.5)])
    rows = slice(*np.searchsorted(canvas.y, y))
    away = world.camera_height * world.focal / (canvas.y[rows, None] - world.horizon)
    du, dv = world.rays(canvas.x[None])
    u = (world.camera_u + away * du - item.u) / 0.95
    v = (away * dv - item.v) / 2.1
    under = np.exp(-(u**4 + v**4) * 1.5)
    canvas.sun[rows] *= 1.0 - 0.9 * under
    canvas.lamp[rows] *= 1.0 - 0.8 * under
    canvas.albedo[:, rows] *= 1.0 - 0.6 * under
    canvas.delta[rows] += (6.0 if item.driving else -1.0) * under
