"""Paints houses: walls of a material, fronts with windows, shops, roofs and chimneys."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .canvas import Canvas
from .world import BUILDING, UP, Colour, Thing, as_colour, on_plane

WARM, COLD = (255, 206, 132), (226, 236, 255)  # light of lamps and rooms
MATERIALS = np.array([  # bricks, stones, renders and concretes
    [150, 82, 64], [128, 70, 58], [172, 142, 98], [188, 160, 116], [206, 200, 186], [224, 218, 204],
    [158, 150, 140], [120, 116, 112], [196, 176, 140], [182, 150, 136], [140, 132, 120],
    [214, 190, 150], [92, 84, 80],
], float)  # fmt: skip


@dataclass(frozen=True)
class Front:
    """An upright plane of a thing in view, on which details are painted.

    Attributes:
        canvas: The canvas, whose last surface is the plane.
        origin: (3,) its lower left corner in world coordinates.
        along: Its horizontal unit vector.
        light: (3,) the light on it.
    """

    canvas: Canvas
    origin: np.ndarray
    along: tuple[float, float, float]
    light: np.ndarray

    def paint(
        self,
        boxes: ArrayLike,
        colours: np.ndarray,
        glow: np.ndarray | None = None,
        shadow: float = 1.0,
    ) -> None:
        """Paints rectangles.

        Args:
            boxes: (M, 4) along, up, length, height in metres.
            colours: (M, 3) or (3,) under white light.
            glow: (M, 3) or (3,), emitted light when lamps are on; None emits nothing.
            shadow: Share of the light that reaches them.
        """
        a, u, length, height = np.asarray(boxes, float).reshape(-1, 4).T
        corners = [[a, u], [a + length, u], [a + length, u + height], [a, u + height]]
        flat = np.transpose(corners, (2, 0, 1))
        polygons = on_plane(flat, self.origin, self.along)
        self.canvas.details(polygons, colours, self.light * shadow, glow)


def paint_front(
    canvas: Canvas,
    thing: Thing,
    height: float,
    colour: Colour | None,
    label: int,
    two_sided: bool = False,
) -> Front | None:
    """Paints a thing's front, from its origin along its length; returns it if it is in view."""
    length = thing.length
    corners = thing.place([[0.0, 0, 0], [length, 0, 0], [length, 0, height], [0, 0, height]])
    normal = None if two_sided else thing.direction(across=-thing.side)
    light = canvas.surface(corners, colour, label, normal)
    return None if light is None else Front(canvas, corners[0], thing.direction(1), light)


def paint_house(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a house from its front-near corner: gable ends, roof, chimneys, front."""
    length, depth, height, side = thing.length, thing.width, thing.height, thing.side
    material = MATERIALS[rng.integers(len(MATERIALS))]
    wall = np.clip(material * rng.uniform(0.75, 1.12) + rng.normal(0, 6, 3), 20, 250)
    pitched = rng.random() < 0.65
    rise = rng.uniform(1.5, 3.8) if pitched else 0.0
    roof = np.array([[128, 74, 58], [84, 82, 86], [104, 92, 84]])[rng.integers(3)]
    far = side * depth
    outline = ((0, 0), (far, 0), (far, height), (far / 2, height + rise), (0, height))
    for at, direction in ((length, 1.0), (0.0, -1.0)):
        gable = thing.place([(at, *corner) for corner in outline])
        shade = canvas.surface(gable, tuple(wall * 0.96), BUILDING, thing.direction(direction))
        if shade is not None and direction < 0 and rng.random() < 0.6:
            boxes = [[depth * 0.3, h, 0.9, 1.3] for h in np.arange(1, height - 2, 3)]
            end = Front(canvas, thing.foot, thing.direction(across=side), shade)
            end.paint(boxes, np.array([58, 62, 70]))
    if pitched:
        slope = math.hypot(rise, depth / 2)
        normal = thing.direction(0.0, -side * rise / slope, depth / 2 / slope)
        eave, ridge = [-side * 0.4, height - 0.1], [far / 2, height + rise]
        slopes = [[-0.2, *eave], [length + 0.2, *eave], [length + 0.2, *ridge], [-0.2, *ridge]]
        canvas.surface(thing.place(slopes), tuple(roof.astype(float)), BUILDING, normal)
        for at in rng.uniform(0.1, 0.9, int(rng.integers(0, 3))) * length:
            top = height + rise + rng.uniform(0.8, 1.6)
            foot, brick = thing.place([at, far / 2, 0]), as_colour(wall * 0.8)
            upright(canvas, foot, height + rise * 0.6, top, 0.9, brick, BUILDING)
    front = paint_front(canvas, thing, height, tuple(wall), BUILDING)
    if front is not None:
        _paint_facade(front, thing, rng, wall)


def _paint_facade(front: Front, thing: Thing, rng: np.random.Generator, wall: np.ndarray) -> None:
    """Paints windows, door or shop, cornice and drainpipe on a front."""
    length, height = thing.length, thing.height
    storey = rng.uniform(2.7, 3.5)
    floors = max(int(height / storey), 1)
    storey = height / floors
    modern = rng.random() < 0.25
    pitch = rng.uniform(1.6, 2.4) if modern else rng.uniform(2.0, 3.8)
    columns = max(int(length / pitch), 1)
    pitch = length / columns
    wide = pitch * (rng.uniform(0.75, 0.94) if modern else rng.uniform(0.3, 0.55))
    tall = storey * (rng.uniform(0.6, 0.85) if modern else rng.uniform(0.42, 0.62))
    if modern:
        trim = np.clip(wall * rng.uniform(0.7, 1.35), 20, 245)
    else:
        trim = np.full(3, rng.uniform(60, 235))
    shop = thing.kind == "shop"
    column, floor = np.meshgrid(np.arange(columns), np.arange(1 if shop else 0, floors))
    along = column.ravel() * pitch + (pitch - wide) / 2
    up = floor.ravel() * storey + (storey - tall) * 0.55
    size = np.broadcast_to([wide, tall], (len(along), 2))
    boxes = np.column_stack([along, up, size])
    _paint_windows(front, rng, boxes, trim, thing.distance, bars=not modern)
    band = rng.uniform(0.2, 0.6)
    cornice = np.clip(wall * rng.uniform(0.75, 1.25), 0, 245)
    front.paint([0, height - band, length, band], cornice)
    if shop:
        _paint_shop(front, rng, length, min(storey, 4.2))
    else:
        at = rng.integers(columns) * pitch + pitch / 2 - 0.5
        door = np.array([trim, rng.uniform(25, 150, 3)])
        front.paint([[at - 0.12, 0, 1.24, 2.35], [at, 0, 1.0, 2.15]], door)
    if rng.random() < 0.5:
        front.paint([0.15, 0, 0.1, height], np.full(3, rng.uniform(30, 120)))  # a drainpipe


def _paint_windows(
    front: Front,
    rng: np.random.Generator,
    boxes: np.ndarray,
    trim: np.ndarray,
    distance: float,
    bars: bool,
) -> None:
    """Paints equal windows (M, 4) as in `Front.paint`; far fronts get only the coarse features."""
    glass = rng.choice([[44, 50, 58], [70, 80, 92], [110, 124, 138], [30, 32, 36]])
    panes = glass * rng.uniform(0.6, 1.35, (len(boxes), 1))
    curtains = rng.random(len(boxes)) < 0.2
    panes[curtains] = [168, 160, 146]
    lit = (rng.random(len(boxes)) < 0.28)[:, None]
    light = np.where(rng.random((len(boxes), 1)) < 0.75, WARM, COLD)
    rooms = lit * light * rng.uniform(0.45, 1.0, (len(boxes), 1))
    if not len(boxes):
        return
    if distance < 75:
        frame = 0.09
        front.paint(boxes + [-frame, -frame, 2 * frame, 2 * frame], trim)
    front.paint(boxes, panes, rooms)
    if distance < 28 and bars:  # glazing bars, sills
        wide, tall = boxes[0, 2:]
        upright_bars = boxes * [1, 1, 0, 1] + [wide / 2 - 0.03, 0, 0.06, 0]
        level_bars = boxes * [1, 1, 1, 0] + [0, tall * 0.55, 0, 0.06]
        front.paint(np.concatenate([upright_bars, level_bars]), trim)
        front.paint(boxes * [1, 1, 1, 0] + [-0.12, -0.16, 0.24, 0.14], trim * 0.9)


def _paint_shop(front: Front, rng: np.random.Generator, length: float, storey: float) -> None:
    """Paints shop windows under a coloured fascia, with goods, a door and sometimes an awning."""
    colour = rng.uniform(20, 220, 3)
    colour = colour * 0.55 + colour.mean() * 0.45
    lettering = rng.uniform(170, 250, 3) if colour.mean() < 130 else rng.uniform(20, 80, 3)
    count = max(int(length / rng.uniform(2.2, 3.6)), 1)
    pitch = length / count
    shine = np.array(WARM if rng.random() < 0.6 else COLD) * rng.uniform(0.5, 1.0)
    lit = rng.random() < 0.6
    front.paint([0, 0, length, storey * 0.98], colour * 0.75)
    panes = [
        [k * pitch + 0.18, 0.45 if k else 0.05, pitch - 0.36, storey * 0.68] for k in range(count)
    ]
    glass = np.array([66, 70, 76]) * rng.uniform(0.5, 1.4, (count, 1))
    front.paint(panes, glass, shine * lit)
    ranges = ((0, length - 0.8), (0.5, 1.3), (0.2, 0.8), (0.2, 0.9))
    goods = np.stack([rng.uniform(low, high, 3 * count) for low, high in ranges], 1)
    wares = rng.uniform(60, 190, (len(goods), 1)) + rng.normal(0, 22, (len(goods), 3))
    wares = np.clip(wares, 0, 255)
    front.paint(goods, wares, wares * 0.6 * lit, shadow=0.7)
    fascia = [0.05, storey * 0.76, length - 0.1, storey * 0.19]
    front.paint(fascia, colour, colour * 0.5 * lit)
    starts = [length * 0.25 + 0.38 * k for k in range(int(length * 0.5 / 0.38))]
    letters = [[start, storey * 0.80, 0.24, storey * 0.1] for start in starts]
    front.paint(letters, lettering, lettering * 0.8 * lit)
    if rng.random() < 0.3:
        _paint_awning(front, length, storey, rng.uniform(60, 230, 3))


def _paint_awning(front: Front, length: float, storey: float, cloth: np.ndarray) -> None:
    """Paints a slope of cloth that hangs over the sidewalk."""
    out = np.cross(front.along, UP)
    out = out if np.dot(out, front.canvas.eye - front.origin) > 0 else -out
    top, low = storey * 0.76, storey * 0.56
    flat = np.array([[0.2, top], [length - 0.2, top], [length - 0.2, low], [0.2, low]])
    corners = on_plane(flat, front.origin, front.along)
    corners[2:] += out * 1.2
    front.canvas.surface(corners, as_colour(cloth), BUILDING)


def upright(
    canvas: Canvas,
    foot: np.ndarray,
    bottom: float,
    top: float,
    width: float,
    colour: Colour,
    label: int,
    taper: float = 1.0,
) -> np.ndarray | None:
    """Paints a post, in metres, at a ground point; it faces the camera. Returns its light."""
    sideways = canvas.projection.axes[0]
    low, high = sideways * (width / 2), sideways * (width / 2 * taper)
    base, tip = np.array([foot[0], bottom, foot[2]]), np.array([foot[0], top, foot[2]])
    points = np.array([base - low, base + low, tip + high, tip - high])
    shade = canvas.surface(points, colour, label)
    if shade is not None and width > 0.1:  # a darker flank makes it look round
        flank = points.copy()
        flank[[0, 3]] += (points[[1, 2]] - points[[0, 3]]) * 0.62
        canvas.details(flank[None], np.array(colour) * 0.66, shade)
    return shade
