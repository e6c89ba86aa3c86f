"""Paints houses: walls of a material, fronts with windows, shops, roofs and chimneys."""

import math

import numpy as np

from fishertune_d2.streets.canvas import Canvas
from fishertune_d2.streets.world import BUILDING, Colour, Thing, as_colour

WARM, COLD = (255, 206, 132), (226, 236, 255)  # light of lamps and rooms
MATERIALS = np.array([  # bricks, stones, renders and concretes
    [150, 82, 64], [128, 70, 58], [172, 142, 98], [188, 160, 116], [206, 200, 186], [224, 218, 204],
    [158, 150, 140], [120, 116, 112], [196, 176, 140], [182, 150, 136], [140, 132, 120],
    [214, 190, 150], [92, 84, 80],
], float)  # fmt: skip


def rectangles(plane: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns upright rectangles on a plane.

    Args:
        plane: (3, 3) origin, and unit vectors along and up, in world coordinates.
        boxes: (M, 4) along, up, length, height in metres.

    Returns:
        (M, 4, 3) world corners.
    """
    origin, along, up = plane
    a0, u0 = boxes[:, 0], boxes[:, 1]
    a1, u1 = a0 + boxes[:, 2], u0 + boxes[:, 3]
    corners = np.stack([np.stack([a0, a1, a1, a0], 1), np.stack([u0, u0, u1, u1], 1)], axis=-1)
    return origin + corners[..., :1] * along + corners[..., 1:] * up


def facing(thing: Thing, along: float, across: float) -> tuple[float, float, float]:
    """Converts a horizontal direction in a thing's frame to a world vector."""
    sin, cos = math.sin(thing.heading), math.cos(thing.heading)
    return (along * sin + across * cos, 0.0, along * cos - across * sin)


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
        shade = canvas.surface(gable, tuple(wall * 0.96), BUILDING, facing(thing, direction, 0))
        if shade is not None and direction < 0 and rng.random() < 0.6:
            boxes = np.array([[depth * 0.3, h, 0.9, 1.3] for h in np.arange(1, height - 2, 3)])
            if len(boxes):
                plane = np.array([thing.place([0, 0, 0]), facing(thing, 0, side), (0, 1, 0)])
                canvas.details(rectangles(plane, boxes), np.array([58, 62, 70]), shade)
    if pitched:
        slope = math.hypot(rise, depth / 2)
        tilt = facing(thing, 0, -side * rise / slope)
        normal = (tilt[0], depth / 2 / slope, tilt[2])
        eave, ridge = [-side * 0.4, height - 0.1], [far / 2, height + rise]
        slopes = [[-0.2, *eave], [length + 0.2, *eave], [length + 0.2, *ridge], [-0.2, *ridge]]
        canvas.surface(thing.place(slopes), tuple(roof.astype(float)), BUILDING, normal)
        for at in rng.uniform(0.1, 0.9, int(rng.integers(0, 3))) * length:
            top = height + rise + rng.uniform(0.8, 1.6)
            foot, brick = thing.place([at, far / 2, 0]), as_colour(wall * 0.8)
            upright(canvas, foot, height + rise * 0.6, top, 0.9, brick, BUILDING)
    front = thing.place([[0.0, 0, 0], [length, 0, 0], [length, 0, height], [0, 0, height]])
    shade = canvas.surface(front, tuple(wall), BUILDING, facing(thing, 0, -side))
    if shade is not None:
        plane = np.array([front[0], facing(thing, 1, 0), (0, 1, 0)])
        _paint_front(canvas, thing, rng, plane, wall, shade)


def _paint_front(
    canvas: Canvas,
    thing: Thing,
    rng: np.random.Generator,
    plane: np.ndarray,
    wall: np.ndarray,
    shade: np.ndarray,
) -> None:
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
    _paint_windows(canvas, rng, plane, boxes, trim, shade, thing.distance, bars=not modern)
    band = rng.uniform(0.2, 0.6)
    cornice = rectangles(plane, np.array([[0, height - band, length, band]]))
    canvas.details(cornice, np.clip(wall * rng.uniform(0.75, 1.25), 0, 245), shade)
    if shop:
        _paint_shop(canvas, rng, plane, length, min(storey, 4.2), shade)
    else:
        at = rng.integers(columns) * pitch + pitch / 2 - 0.5
        door = np.array([[at - 0.12, 0, 1.24, 2.35], [at, 0, 1.0, 2.15]])
        colours = np.array([trim, rng.uniform(25, 150, 3)])
        canvas.details(rectangles(plane, door), colours, shade)
    if rng.random() < 0.5:
        drainpipe = rectangles(plane, np.array([[0.15, 0, 0.1, height]]))
        canvas.details(drainpipe, np.full(3, rng.uniform(30, 120)), shade)


def _paint_windows(
    canvas: Canvas,
    rng: np.random.Generator,
    plane: np.ndarray,
    boxes: np.ndarray,
    trim: np.ndarray,
    shade: np.ndarray,
    distance: float,
    bars: bool,
) -> None:
    """Paints equal windows (M, 4) as in `rectangles`; far fronts get only the coarse features."""
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
        grown = boxes + [-frame, -frame, 2 * frame, 2 * frame]
        canvas.details(rectangles(plane, grown), trim, shade)
    canvas.details(rectangles(plane, boxes), panes, shade, rooms)
    if distance < 28 and bars:  # glazing bars, sills
        wide, tall = boxes[0, 2:]
        upright_bars = boxes * [1, 1, 0, 1] + [wide / 2 - 0.03, 0, 0.06, 0]
        level_bars = boxes * [1, 1, 1, 0] + [0, tall * 0.55, 0, 0.06]
        both = np.concatenate([upright_bars, level_bars])
        canvas.details(rectangles(plane, both), trim, shade)
        sills = boxes * [1, 1, 1, 0] + [-0.12, -0.16, 0.24, 0.14]
        canvas.details(rectangles(plane, sills), trim * 0.9, shade)


def _paint_shop(
    canvas: Canvas,
    rng: np.random.Generator,
    plane: np.ndarray,
    length: float,
    storey: float,
    shade: np.ndarray,
) -> None:
    """Paints shop windows under a coloured fascia, with goods, a door and sometimes an awning."""
    colour = rng.uniform(20, 220, 3)
    colour = colour * 0.55 + colour.mean() * 0.45
    lettering = rng.uniform(170, 250, 3) if colour.mean() < 130 else rng.uniform(20, 80, 3)
    count = max(int(length / rng.uniform(2.2, 3.6)), 1)
    pitch = length / count
    shine = np.array(WARM if rng.random() < 0.6 else COLD) * rng.uniform(0.5, 1.0)
    lit = rng.random() < 0.6
    base = np.array([[0.0, 0, length, storey * 0.98]])
    canvas.details(rectangles(plane, base), colour * 0.75, shade)
    panes = np.array(
        [[k * pitch + 0.18, 0.45 if k else 0.05, pitch - 0.36, storey * 0.68] for k in range(count)]
    )
    glass = np.array([66, 70, 76]) * rng.uniform(0.5, 1.4, (count, 1))
    canvas.details(rectangles(plane, panes), glass, shade, shine * lit)
    goods = np.stack(
        [
            rng.uniform(low, high, 3 * count)
            for low, high in ((0, length - 0.8), (0.5, 1.3), (0.2, 0.8), (0.2, 0.9))
        ],
        1,
    )
    wares = rng.uniform(60, 190, (len(goods), 1)) + rng.normal(0, 22, (len(goods), 3))
    wares = np.clip(wares, 0, 255)
    canvas.details(rectangles(plane, goods), wares, shade * 0.7, wares * 0.6 * lit)
    fascia = np.array([[0.05, storey * 0.76, length - 0.1, storey * 0.19]])
    canvas.details(rectangles(plane, fascia), colour, shade, colour * 0.5 * lit)
    letters = np.array(
        [
            [length * 0.25 + 0.38 * k, storey * 0.80, 0.24, storey * 0.1]
            for k in range(int(length * 0.5 / 0.38))
        ]
    )
    if len(letters):
        canvas.details(rectangles(plane, letters), lettering, shade, lettering * 0.8 * lit)
    if rng.random() < 0.3:
        origin, along, _ = plane
        out = np.cross(along, (0, 1, 0))
        out = out if np.dot(out, canvas.eye - origin) > 0 else -out
        top, low = storey * 0.76, storey * 0.56
        cloth = rng.uniform(60, 230, 3)
        start, end = origin + along * 0.2, origin + along * (length - 0.2)
        corners = [
            start + [0, top, 0],
            end + [0, top, 0],
            end + out * 1.2 + [0, low, 0],
            start + out * 1.2 + [0, low, 0],
        ]
        canvas.surface(np.array(corners), tuple(cloth), BUILDING)


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
