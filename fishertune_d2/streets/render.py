"""Paints a street scene: sky, ground, shadows, things from far to near, texture."""

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from .canvas import Canvas, Painting, Projection, Value
from .models import MODELS, SHADOWLESS
from .world import (
    BUILDING,
    FENCE,
    POLE,
    ROAD,
    SIDEWALK,
    SKY,
    TERRAIN,
    VEGETATION,
    VISIBLE,
    VOID,
    WALL,
    Colour,
    Scene,
    Strip,
    Thing,
)

# Strength of the surface texture, per class; others: 0.03.
ROUGHNESS = {
    ROAD: 0.08,
    SIDEWALK: 0.09,
    BUILDING: 0.10,
    WALL: 0.16,
    FENCE: 0.08,
    POLE: 0.05,
    VEGETATION: 0.36,
    TERRAIN: 0.25,
}


@dataclass(frozen=True)
class Look:
    """Properties of a domain that painting needs; effects follow afterwards.

    Attributes:
        sunny: Whether the scene's sun, if it has one, shines and casts shadows.
        zenith, horizon, cloud: Colours of the sky.
        cover: Least share of clouds, 0..1.
        lamps: Whether lights are on (painted into a separate picture of emitted light).
        snow: Whether snow lies.
    """

    sunny: bool
    zenith: Colour
    horizon: Colour
    cloud: Colour
    cover: float
    lamps: bool = False
    snow: bool = False


@lru_cache(maxsize=4)
def noise_tile(roughness: float, seed: int, side: int = 512) -> np.ndarray:
    """Returns tiling (side, side) float32 noise: mean 0, deviation 1, amplitude f^-roughness."""
    white = np.random.default_rng(seed).normal(size=(side, side))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None, :])
    frequency[0, 0] = np.inf
    tile = np.fft.ifft2(np.fft.fft2(white) / frequency**roughness).real
    return (tile / tile.std()).astype(np.float32)


def _add_texture(painting: Painting, seed: int) -> None:
    """Multiplies every surface by noise fixed in the world: stains, and grain up close."""
    strength = np.full(256, 0.03, np.float32)
    for label, value in ROUGHNESS.items():
        strength[label] = value
    strength[[SKY, VOID]] = 0
    world, depth = painting.world, painting.depth
    # Texture coordinates: x + z and y for walls of any direction, x and z for the ground.
    across = np.where(painting.up, world[..., 0], world[..., 0] + world[..., 2])
    along = np.where(painting.up, world[..., 2], world[..., 1])
    offset = seed % 509

    def sample(tile: np.ndarray, texels_per_metre: float) -> np.ndarray:
        column = (across * texels_per_metre).astype(np.int32) + offset
        row = (along * texels_per_metre).astype(np.int32) + 3 * offset
        return tile[row & 511, column & 511]

    noise = 0.55 * sample(noise_tile(1.3, 1), 5.0)
    noise += sample(noise_tile(0.7, 2), 28.0) * (12 / (12 + depth))
    painting.colour *= (1 + strength[painting.label] * noise)[..., None]


def paint_sky(scene: Scene, look: Look, size: tuple[int, int], mirrored: bool) -> np.ndarray:
    """Paints (H, W, 3) uint8: a gradient from the horizon up, and clouds on a level ceiling."""
    projection = Projection(scene.camera, size)
    x, y = projection.rays()
    right, rise, forward = projection.world_rays()
    rise = -rise if mirrored else rise
    height = np.clip(rise / np.sqrt(1 + x * x + y * y), 0, 1)
    blend = np.sqrt(np.clip(height * 1.6, 0, 1))[..., None]
    sky = np.array(look.horizon, np.float32) * (1 - blend)
    sky = sky + np.array(look.zenith, np.float32) * blend
    ceiling = 160 / np.maximum(rise, 0.04)
    column = (right * ceiling).astype(np.int32) + scene.seed * 37
    row = (forward * ceiling).astype(np.int32) + scene.seed * 91
    noise = noise_tile(1.7, 3)[row & 511, column & 511]
    noise = cv2.blur(noise, (5, 3)) + cv2.blur(noise, (31, 9))
    cover = max(scene.clouds, look.cover)
    share = np.clip((noise + 6 * (cover - 0.5)) * 0.6, 0, 1)[..., None]
    cloud = np.array(look.cloud, np.float32) * (1 + 0.07 * np.clip(noise, -2, 2))[..., None]
    return np.clip(sky * (1 - share) + cloud * share, 0, 255).astype(np.uint8)


def paint(scene: Scene, look: Look, size: tuple[int, int]) -> Painting:
    """Paints a scene: ground, shadows, skyline, things from far to near, the car's hood."""
    canvas = _canvas(scene, look, size)
    _paint_ground(canvas, scene)
    _paint_shadows(canvas, scene)
    _paint_things(canvas, scene)
    _paint_hood(canvas, scene)
    painting = canvas.finish()
    _add_texture(painting, scene.seed)
    return painting


def paint_reflection(scene: Scene, look: Look, size: tuple[int, int]) -> np.ndarray:
    """Paints the (H, W, 3) float32 picture that a mirror in place of the ground would show."""
    canvas = _canvas(scene, look, size, mirrored=True)
    _paint_things(canvas, scene)
    shown = canvas.colour if canvas.glow is None else cv2.add(canvas.colour, canvas.glow)
    return cv2.resize(shown, size, interpolation=cv2.INTER_AREA).astype(np.float32)


def _canvas(scene: Scene, look: Look, size: tuple[int, int], mirrored: bool = False) -> Canvas:
    sun = np.array(scene.sun) if look.sunny and scene.sun is not None else None
    sky = paint_sky(scene, look, (size[0] // 2, size[1] // 2), mirrored)
    return Canvas(Projection(scene.camera, size), sky, sun, look.lamps, look.snow, mirrored)


def _paint_ground(canvas: Canvas, scene: Scene) -> None:
    plane = np.array([[-900, 0, 0], [900, 0, 0], [900, 0, 900], [-900, 0, 900]], float)
    up = (0.0, 1.0, 0.0)
    canvas.surface(plane, (108, 112, 84), TERRAIN, up)
    for strip in scene.strips + (scene.tracks if canvas.snow else []):
        canvas.surface(_outline(scene, strip), strip.colour, strip.label, up, convex=False)


def _outline(scene: Scene, strip: Strip) -> np.ndarray:
    """Returns a strip as a polygon (N, 3), with dense points if the street bends."""
    count = 2 if scene.bend == 0 else 2 + int((strip.s1 - strip.s0) / 8)
    s = np.linspace(strip.s0, strip.s1, count)
    return np.concatenate([scene.street(s, strip.left), scene.street(s[::-1], strip.right)])


def _paint_shadows(canvas: Canvas, scene: Scene) -> None:
    """Paints shadows on the ground: shadows of the sun, and soft ones under things."""
    cast, contact = [], []
    for thing in scene.things:
        if thing.kind in SHADOWLESS or thing.z > 90:
            continue
        foot = _footprint(thing)
        if thing.kind not in ("tree", "bare_tree", "house", "shop"):
            contact.append(foot)
        if canvas.sun is not None:
            away = -canvas.sun * (thing.height / canvas.sun[1])
            lifted = foot + np.array([away[0], 0, away[2]])
            if thing.kind in ("tree", "bare_tree"):  # the crown's shadow; the trunk is too thin
                middle = foot.mean(axis=0) * 0.4 + lifted.mean(axis=0) * 0.6
                cast.append((foot - foot.mean(axis=0)) * 0.8 + middle)
            else:
                cast.append(np.concatenate([foot, lifted]))
    canvas.darken_ground(contact, 0.55)
    canvas.darken_ground(cast, 0.55)


def _footprint(thing: Thing) -> np.ndarray:
    """Returns (4, 3) corners on the ground; the origin is a corner of a front, else the centre."""
    from_front = thing.kind in ("house", "shop", "wall", "hedge")
    along = (0, thing.length) if from_front else (-thing.length / 2, thing.length / 2)
    half = thing.width / 2
    across = (0, thing.side * thing.width) if from_front else (-half, half)
    return thing.place(
        np.array([[along[i], across[j], 0] for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))])
    )


def _paint_things(canvas: Canvas, scene: Scene) -> None:
    _paint_skyline(canvas, scene)
    for thing in scene.things:
        reach = thing.length + thing.width + 1.5
        if canvas.may_show(thing.foot, reach):
            MODELS[thing.kind](canvas, thing, np.random.default_rng(thing.seed))


def _paint_skyline(canvas: Canvas, scene: Scene) -> None:
    """Paints roofs and tree tops far away, so that no street runs into the open sky."""
    rng = np.random.default_rng([scene.seed, 1])
    x, built = -330.0, rng.uniform(0.2, 0.8)
    while x < 330:
        width, z = rng.uniform(8, 34), VISIBLE + rng.uniform(30, 60)
        if rng.random() < built:
            top, label = rng.uniform(7, 22), BUILDING
            colour = tuple(rng.uniform(95, 165) + rng.normal(0, 6, 3))
            outline = [[0, 0], [0, top], [0.5, top + rng.uniform(0, 4)], [1, top], [1, 0]]
        else:
            top, label = rng.uniform(5, 15), VEGETATION
            colour = tuple(np.array([82, 96, 66]) * rng.uniform(0.7, 1.2))
            edge = rng.uniform(0.65, 1.0, 9) * np.sin(np.linspace(0.35, math.pi - 0.35, 9)) * top
            outline = [[0, 0], *np.stack([np.linspace(0, 1, 9), edge], 1).tolist(), [1, 0]]
        flat = np.array(outline)
        points = np.stack([x + flat[:, 0] * width * 1.2, flat[:, 1], np.full(len(flat), z)], 1)
        canvas.surface(points, colour, label, convex=False)
        x += width


def _paint_hood(canvas: Canvas, scene: Scene) -> None:
    """Paints the own car's hood at the lower edge, unlabelled as in Cityscapes."""
    if scene.camera.hood == 0:
        return
    rows, columns = canvas.ids.shape
    share = int(2 * scene.camera.hood * rows)
    rng = np.random.default_rng([scene.seed, 2])
    body = np.minimum(rng.choice([40.0, 90.0, 150.0, 200.0]) * canvas.shade((0, 1, 0)), 230)

    def fill(picture: np.ndarray, value: Value) -> None:
        centre, axes = (columns // 2, rows), (int(columns * 0.62), share // 2)
        cv2.ellipse(picture, centre, axes, 0, 0, 360, value, -1)

    fill(canvas.colour, body.tolist())
    canvas.add(fill, VOID, plane=(0.0, 0.0, 1.0))
