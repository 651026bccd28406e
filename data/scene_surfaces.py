"""Sky, ground and houses of a synthetic scene, drawn by casting one ray per pixel.

The street lies between two rows of houses, planes of constant u; every pixel's ray meets the sky,
the ground or one of the planes, so that roads, bricks and windows are functions of street
coordinates.
"""

from dataclasses import dataclass

import numpy as np

from data.scene_world import (
    CLASS,
    NOISE,
    TILE,
    Side,
    Weather,
    World,
    house_index,
    noise,
    vector,
    wrap,
)

# (albedo, amplitude of fine texture, amplitude of coarse texture); shape and hue vary per scene
_GROUND = {
    "road": ((0.115, 0.115, 0.125), 0.10, 0.14),
    "road marking": ((0.78, 0.78, 0.74), 0.04, 0.08),
    "pavement": ((0.43, 0.41, 0.38), 0.05, 0.07),
    "soil": ((0.26, 0.15, 0.08), 0.22, 0.20),
    "water": ((0.04, 0.09, 0.11), 0.0, 0.0),
}


_WALL_SKYVIEW = np.full(len(CLASS), 0.35, np.float32)
_WALL_SKYVIEW[[CLASS["window"], CLASS["roof"]]] = 0.75, 0.70


@dataclass
class Canvas:
    """What the drawing fills in, at twice the image's resolution: (H, W), colours (3, H, W)."""

    classes: np.ndarray  # uint8
    albedo: np.ndarray
    sun: np.ndarray  # direct light, cosine and shadows included, 0..1
    stored: np.ndarray  # share of the day's heat received: shadows of some hours ago
    lamp: np.ndarray  # light of lamps
    glow: np.ndarray  # light emitted towards the camera
    delta: np.ndarray  # K above what the thermal model gives the class
    skyview: np.ndarray  # share of sky in what a surface reflects and radiates to
    y: np.ndarray  # (H,) centres of rows, in image heights
    x: np.ndarray  # (W,) centres of columns, from the image's centre, in image heights


def new_canvas(height: int, width: int) -> Canvas:
    """An empty canvas of height x width samples: sky everywhere."""

    def plane() -> np.ndarray:
        return np.zeros((height, width), np.float32)

    return Canvas(
        classes=np.full((height, width), CLASS["sky"], np.uint8),
        albedo=np.zeros((3, height, width), np.float32),
        sun=plane(),
        stored=plane(),
        lamp=plane(),
        glow=np.zeros((3, height, width), np.float32),
        delta=plane(),
        skyview=plane(),
        y=((np.arange(height, dtype=np.float32) + 0.5) / height),
        x=((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / height),
    )


def grass_color(season: float) -> np.ndarray:
    """Albedo of grass: dull in winter, green in spring, dry at the height of summer."""
    stops = np.array(
        [[0.17, 0.17, 0.08], [0.10, 0.27, 0.05], [0.13, 0.30, 0.05], [0.24, 0.27, 0.08]], np.float32
    )
    place = season * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    return stops[i] + (place - i) * (stops[i + 1] - stops[i])


def draw_sky(canvas: Canvas, world: World, rng: np.random.Generator) -> None:
    """Sky with clouds, and a distant line of trees on the horizon."""
    weather = world.weather
    rows = slice(0, int(np.searchsorted(canvas.y, world.horizon + 0.01)))
    up = np.maximum((world.horizon - canvas.y[rows]) / world.focal, 0.0)[:, None]
    bearing = canvas.x[None] / world.focal + world.yaw
    shift = rng.uniform(0, TILE, 4).astype(np.float32)
    spread = 1.0 / (up + 0.25)
    veil = noise(bearing * spread * 30 + shift[0], spread * 60 + shift[1])
    veil = veil + 0.3 * noise(bearing * 140 + shift[2], up * 260 + shift[3])
    density = np.clip((veil - 1.6 + 3.2 * weather.cloud) * 0.8 + 0.3, 0, 1)
    haze = np.exp(-up / 0.22)
    clear = _mix(weather.sky_color, weather.horizon_color, haze)
    white = (
        weather.sky_color * 1.6 + 0.004
        if weather.night
        else (vector(0.86, 0.87, 0.90) - 0.28 * max(weather.cloud - 0.5, 0))
    )
    shade = 1.0 - 0.10 * np.clip(noise(bearing * 60 + shift[3], up * 160 + shift[0]), -1, 2)
    canvas.glow[:, rows] = clear + (white[:, None, None] * shade - clear) * density
    clear_k = weather.zenith_k + (weather.air_k - 3.0 - weather.zenith_k) * haze
    cloud_k = weather.air_k - 9.0 - 5.0 * (1 - haze)
    canvas.delta[rows] = clear_k + (cloud_k - clear_k) * density - weather.air_k
    _draw_treeline(canvas, world, rng, rows, up, bearing)


def _draw_treeline(canvas, world, rng, rows, up, bearing) -> None:
    start = int(rng.integers(TILE))
    line = NOISE[start][(bearing[0] * 60).astype(np.int32) & (TILE - 1)]
    leaves = noise(bearing * 200, up * 200 + start)
    mask = up < 0.045 + 0.012 * line + 0.006 * leaves
    tone = grass_color(world.weather.season)[:, None, None] * (0.45 + 0.10 * leaves)
    haze = 0.25 * world.weather.horizon_color[:, None, None]
    fill(
        canvas,
        rows,
        slice(None),
        mask,
        CLASS["tree crown"],
        0.75 * tone,
        sun=0.5 * world.weather.direct,
        stored=0.5 * world.weather.stored,
        skyview=0.4,
        delta=0.3 * leaves,
        glow=haze * (0.3 if world.weather.night else 1.0),
    )


def _mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Colours a to b by weight (H, W) -> (3, H, W)."""
    return a[:, None, None] + (b - a)[:, None, None] * weight


def fill(
    canvas: Canvas,
    rows,
    columns,
    mask,
    which,
    albedo,
    sun,
    stored,
    skyview,
    delta=0.0,
    lamp=0.0,
    glow=0.0,
) -> None:
    """Write values (broadcast) into the window [rows, columns] (slices) where mask is true."""
    for plane, value in (
        ("classes", which),
        ("sun", sun),
        ("stored", stored),
        ("delta", delta),
        ("skyview", skyview),
        ("lamp", lamp),
    ):
        np.copyto(getattr(canvas, plane)[rows, columns], value, where=mask, casting="unsafe")
    for plane, value in (("albedo", albedo), ("glow", glow)):
        np.copyto(getattr(canvas, plane)[:, rows, columns], value, where=mask, casting="unsafe")


def _ground_classes(world: World, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Class ids of the ground at street coordinates."""
    out = np.full(u.shape, CLASS["pavement"], np.uint8)
    across = np.abs(u)
    for sign, side in zip((-1, 1), world.sides):
        here = u * sign > 0
        out[here & (across > world.road + world.pavement)] = CLASS[side.verge]
        out[here & (across > world.front + 0.4)] = CLASS[side.beyond]
    out[across < world.road] = CLASS["road"]
    dash = (across < 0.08) & (wrap(v, 5.0) < 2.5)
    edge = np.abs(across - world.road + 0.4) < 0.07
    out[dash | edge] = CLASS["road marking"]
    crossing = (np.abs(v - world.crossing_v) < 1.5) & (across < world.road - 0.2)
    out[crossing] = CLASS["road"]
    out[crossing & (wrap(u, 1.1) < 0.55)] = CLASS["road marking"]
    return out


def _ground_albedo(world, rng, classes, u, v, depth, patches) -> np.ndarray:
    """Albedo (3, H, W) of the ground, textures fading where a pixel covers them."""
    base = np.zeros((len(CLASS), 3), np.float32)
    fine, coarse = np.zeros(len(CLASS), np.float32), np.zeros(len(CLASS), np.float32)
    for name, (color, f, c) in _GROUND.items():
        base[CLASS[name]] = np.array(color) * rng.uniform(0.75, 1.25) * rng.uniform(0.95, 1.05, 3)
        fine[CLASS[name]], coarse[CLASS[name]] = f, c
    base[CLASS["grass"]] = grass_color(world.weather.season) * rng.uniform(0.85, 1.15)
    fine[CLASS["grass"]], coarse[CLASS["grass"]] = 0.30, 0.20
    fade = np.minimum(1.0, 7.0 / depth)
    texture = (
        1.0 + fine.take(classes) * fade * noise(u * 22, v * 22) + coarse.take(classes) * patches
    )
    slab = (wrap(u, 0.9) < 0.07) | (wrap(v, 0.9) < 0.07)
    texture -= 0.30 * fade * (slab & (classes == CLASS["pavement"]))
    return np.take(base.T, classes, axis=1) * np.clip(texture, 0.25, 2.0)


def draw_ground(canvas: Canvas, world: World, rng: np.random.Generator) -> None:
    """Road, markings, pavement, verge, grass or water, with the shadows of the houses."""
    weather = world.weather
    first = int(np.searchsorted(canvas.y, world.horizon + 0.008))
    rows = slice(first, None)
    depth = world.camera_height * world.focal / (canvas.y[rows, None] - world.horizon)
    du, dv = world.rays(canvas.x[None])
    u, v = world.camera_u + depth * du, depth * dv
    classes = _ground_classes(world, u, v)
    patches = noise(u * 3.1 + 40, v * 1.6)  # repairs, wear: seen in both bands
    albedo = _ground_albedo(world, rng, classes, u, v, depth, patches)
    cosine = float(weather.sun[2])
    sun = weather.direct * cosine * world.lit(u, v, 0.0, weather.sun)
    earlier = world.lit(u, v, 0.0, weather.earlier_sun)
    stored = weather.stored * (0.35 + 0.65 * earlier)
    canvas.classes[rows], canvas.albedo[:, rows] = classes, albedo
    canvas.sun[rows], canvas.stored[rows] = sun, stored
    canvas.skyview[rows] = 0.75
    canvas.delta[rows] = 0.5 * patches + 0.35 * noise(u * 14, v * 14)
    canvas.glow[:, rows] = 0.0
    if weather.night:
        canvas.lamp[rows] = world.lamplight(u, v, 0.0)
    water = classes == CLASS["water"]
    if water.any():
        ripple = noise(u * 5, v * 9 + 3 * depth)
        mirror = _mix(weather.sky_color, weather.horizon_color, np.clip(depth / 60, 0, 1))
        tint = vector(0.55, 0.75, 0.85)[:, None, None] * (0.62 + 0.13 * ripple)
        np.copyto(canvas.glow[:, rows], mirror * tint, where=water)
        np.copyto(canvas.skyview[rows], 0.9, where=water)
    fog(canvas, rows, slice(None), depth, weather)


def fog(canvas: Canvas, rows, columns, depth, weather: Weather, where=True) -> None:
    """Aerial perspective of the visible: distant things fade towards the horizon's colour."""
    weight = np.where(where, 0.45 * (1.0 - np.exp(-depth / 110.0)), 0.0).astype(np.float32)
    canvas.albedo[:, rows, columns] *= 1.0 - weight
    canvas.glow[:, rows, columns] += weather.horizon_color[:, None, None] * weight


def draw_walls(canvas: Canvas, world: World) -> None:
    """Both rows of houses."""
    du, dv = world.rays(canvas.x)
    for sign, side in zip((-1, 1), world.sides):
        with np.errstate(divide="ignore"):
            depth = np.where(du * sign > 1e-3, (sign * world.front - world.camera_u) / du, np.inf)
        seen = (depth > 0.5) & (depth < 90.0)
        along = np.where(seen, depth, 1.0) * dv
        house = house_index(side, along)
        seen &= side.height[house] > 0
        if not seen.any():
            continue
        first, last = np.flatnonzero(seen)[[0, -1]]
        columns = slice(first, last + 1)
        _draw_side(
            canvas,
            world,
            side,
            sign,
            columns,
            seen[columns],
            np.where(seen, depth, 1.0)[columns],
            along[columns],
            house[columns],
        )


def _draw_side(canvas, world, side, sign, columns, seen, depth, along, house) -> None:
    weather = world.weather
    top_y = world.horizon - world.focal * (side.height[house] - world.camera_height) / depth
    foot_y = world.horizon + world.focal * world.camera_height / depth
    rows = slice(*np.searchsorted(canvas.y, [top_y[seen].min(), foot_y[seen].max()]))
    up = world.camera_height - (canvas.y[rows, None] - world.horizon) / world.focal * depth
    mask = seen & (up >= 0) & (up < side.height[house])
    pixel = depth / (world.focal * len(canvas.y) / 2)
    classes, albedo, glow, delta = _facade(world, side, along, up, house, pixel)
    facing = max(0.0, -sign * float(weather.sun[0]))
    before = max(0.0, -sign * float(weather.earlier_sun[0]))
    u = sign * world.front
    sun = weather.direct * facing * world.lit(u, along, up, weather.sun)
    stored = weather.stored * (0.3 + 0.7 * before * world.lit(u, along, up, weather.earlier_sun))
    skyview = _WALL_SKYVIEW.take(classes)
    lamp = world.lamplight(u, along, up) if weather.night else 0.0
    fill(canvas, rows, columns, mask, classes, albedo, sun, stored, skyview, delta, lamp, glow)
    fog(canvas, rows, columns, depth, weather, mask)


def _facade(world: World, side: Side, along, up, house, pixel):
    """Classes (H, W), albedo (3, H, W), glow (3, H, W), kelvin (H, W) of a row of houses."""
    period, roof_from = side.period[house], (side.height - side.roof)[house]
    cell = along / period
    place = cell - np.floor(cell)
    storey = up / 2.8
    rise = storey - np.floor(storey)
    half = side.glazing[house] / 2
    column = np.abs(place - 0.5) < half
    upper = (up > 2.8) & (rise > 0.3) & (rise < 0.8) & (up + 2.0 < roof_from + 0.8)
    shop = side.shop[house] & (np.abs(place - 0.5) < 0.42) & (up > 0.5) & (up < 2.3)
    slot = np.floor(cell).astype(np.int32)
    door = (np.mod(slot, 3) == 1) & (np.abs(place - 0.5) < 0.26) & (up < 2.2)
    low = ~side.shop[house] & column & (up > 1.0) & (up < 2.2) & (np.mod(slot, 3) != 1)
    window = ((column & upper) | low | shop) & ~door
    classes = np.broadcast_to(side.kind[house].astype(np.uint8), up.shape).copy()
    classes[up >= roof_from] = CLASS["roof"]
    classes[window], classes[door] = CLASS["window"], CLASS["door"]
    albedo = side.color[house].T[:, None] * _wall_texture(classes, along, up, house, pixel)
    roof = side.roof_color[house].T[:, None] * (0.75 + 0.5 * (wrap(up, 0.36) < 0.2))
    np.copyto(albedo, roof, where=classes == CLASS["roof"])
    wood = vector(0.30, 0.17, 0.08)[:, None, None] * (0.85 + 0.3 * (wrap(along, 0.3) < 0.2))
    np.copyto(albedo, wood, where=door)
    eave = np.abs(up - roof_from + 0.12) < 0.12
    albedo *= np.where(eave, 0.55, 1.0)
    lit = side.lit[slot & 31, storey.astype(np.int32) & 7] & window & world.weather.night
    glow = _window_glow(world.weather, lit, window, up, along, albedo)
    delta = 0.4 * noise(along * 6, up * 6) + (4.0 - 3.0 * world.weather.season) * lit
    return classes, albedo, glow, delta


def _wall_texture(classes, along, up, house, pixel) -> np.ndarray:
    """Brightness factor (H, W) of bare walls: courses of brick, stained plaster, panels."""
    course = np.floor(up / 0.34).astype(np.int32)
    joint = (wrap(up, 0.34) < 0.08) | (wrap(along + 0.4 * (course & 1), 0.8) < 0.09)
    sharp = np.clip(1.6 - pixel * 7.0, 0.15, 1.0)
    brick = 1.0 + sharp * (0.75 * joint + 0.10 * noise(along * 2.5 + 7 * course, up * 3.0))
    stain = noise(along * 7, up * 2)
    plaster = 1.0 + 0.07 * stain
    panel = (wrap(up, 1.4) < 0.10) | (wrap(along, 2.4) < 0.10)
    concrete = 1.0 + 0.12 * stain - 0.35 * panel
    return np.where(
        classes == CLASS["brick wall"],
        brick,
        np.where(classes == CLASS["plaster wall"], plaster, concrete),
    )


def _window_glow(weather: Weather, lit, window, up, along, albedo) -> np.ndarray:
    """Light from windows (3, H, W): lamps behind them, or sky in them. Darkens their albedo."""
    albedo *= np.where(window, 0.0, 1.0)
    sky = weather.sky_color * 0.16 + weather.horizon_color * 0.04
    wave = 0.75 + 0.25 * np.clip(up / 8, 0, 1) + 0.15 * noise(along * 3, up * 2)
    glass = (sky + vector(0.01, 0.02, 0.03) * (not weather.night))[:, None, None] * wave
    if weather.night:
        inside = vector(0.85, 0.62, 0.28)[:, None, None] * (0.75 + 0.2 * noise(along * 8, up * 8))
        np.copyto(glass, inside, where=lit)
    return glass * window
