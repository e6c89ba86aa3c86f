"""Paints things beside the road: plants, boundaries, furniture; holds the table of all models."""

import math

import numpy as np

from .canvas import Canvas, Cutout
from .houses import MATERIALS, WARM, paint_front, paint_house, upright
from .people import paint_bicycle, paint_cyclist, paint_motorcycle, paint_motorcyclist, paint_person
from .vehicles import paint_vehicle
from .world import (
    FENCE,
    POLE,
    TRAFFIC_LIGHT,
    TRAFFIC_SIGN,
    UP,
    VEGETATION,
    WALL,
    Thing,
    as_colour,
    grey,
    on_plane,
)

SHADOWLESS = ("lamp", "bollard", "sign", "traffic_light", "fence", "bicycle")


def _blob(
    centre: np.ndarray,
    radius: np.ndarray,
    sideways: np.ndarray,
    rng: np.random.Generator,
    count: int = 14,
    ragged: float = 0.22,
) -> np.ndarray:
    """Returns a ragged round outline (count, 3) facing the camera; ``radius`` is (across, up)."""
    angle = np.linspace(0, 2 * math.pi, count, endpoint=False)
    reach = 1 + rng.uniform(-ragged, ragged, count)
    across, rise = np.cos(angle) * reach * radius[0], np.sin(angle) * reach * radius[1]
    return on_plane(np.stack([across, rise], 1), centre, sideways)


def paint_tree(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a trunk, and a crown of leaf clusters, lighter towards the top and the sun."""
    foot, sideways = thing.foot, canvas.projection.axes[0]
    height, radius = thing.height, thing.width / 2
    bark = np.array([88, 74, 58]) * rng.uniform(0.6, 1.3)
    width = 0.05 * height * rng.uniform(0.6, 1.1)
    upright(canvas, foot, 0, height * 0.6, width, as_colour(bark), VEGETATION, 0.6)
    hue = rng.dirichlet([3, 1, 0.5, 0.35])
    leaf = hue @ np.array([[72, 104, 40], [102, 122, 50], [48, 78, 44], [150, 108, 44]])
    leaf = leaf * rng.uniform(0.75, 1.35)
    count = 60 if thing.distance < 25 else 32 if thing.distance < 50 else 12
    conifer = rng.random() < 0.12
    level = np.sort(rng.random(count)) if conifer else rng.random(count)
    angle = rng.uniform(0, 2 * math.pi, count)
    spread = np.sqrt(rng.random(count)) * radius
    bottom = height * (0.15 if conifer else rng.uniform(0.25, 0.38))
    leaves: list[Cutout] = []
    for index in range(count):
        part = level[index]
        narrow = (1.05 - part) if conifer else math.sqrt(max(1 - (2 * part - 0.9) ** 2 * 0.75, 0.1))
        out = spread[index] * narrow * 0.75
        centre = foot + sideways * (math.cos(angle[index]) * out)
        rise = bottom + part * (height * 0.93 - bottom)
        centre = centre + [0, rise, math.sin(angle[index]) * out]
        size = radius * rng.uniform(1.1, 2.0) / count**0.4 * (narrow if conifer else 1)
        light = 0.62 + 0.45 * part + rng.uniform(-0.13, 0.13)
        if canvas.sun is not None:
            light += 0.3 * math.cos(angle[index]) * float(canvas.sun @ sideways) - 0.1
        colour = leaf * light
        if canvas.snow and part > 0.3:
            white = 0.75 * min((part - 0.3) * 2, 1) * rng.uniform(0.4, 1)
            colour = colour * (1 - white) + 225 * white
        else:  # the same number of draws under every domain
            rng.uniform(0.4, 1)
        outline = _blob(centre, np.array([size, size * 0.8]), sideways, rng)
        leaves.append((outline, colour, VEGETATION))
    canvas.cutouts(leaves)


def paint_bare_tree(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a leafless tree: branches in a haze of twigs; the label is the crown's outline."""
    foot, sideways = thing.foot, canvas.projection.axes[0]
    height, radius = thing.height, thing.width / 2
    bark = np.array([82, 72, 62]) * rng.uniform(0.45, 1.15)
    centre = foot + [0, height * 0.63, 0]
    crown = _blob(centre, np.array([radius, height * 0.38]), sideways, rng, 22, 0.18)
    canvas.haze(crown, tuple(bark), VEGETATION, rng.uniform(0.2, 0.4))
    upright(canvas, foot, 0, height * 0.55, 0.035 * height, tuple(bark), VEGETATION, 0.6)
    branches = []
    grow = [(0.0, height * 0.28, math.pi / 2, height * 0.3, 0.03 * height, 0)]
    while grow:
        x, y, angle, length, width, depth = grow.pop()
        x1, y1 = x + math.cos(angle) * length, y + math.sin(angle) * length
        nx, ny = -math.sin(angle) * width / 2, math.cos(angle) * width / 2
        base, tip = [[x - nx, y - ny], [x + nx, y + ny]], (nx * 0.6, ny * 0.6)
        branches.append([*base, [x1 + tip[0], y1 + tip[1]], [x1 - tip[0], y1 - tip[1]]])
        if depth < (5 if thing.distance < 45 else 3):
            for turn in rng.normal([-0.45, 0.45], 0.2):
                shorter = length * rng.uniform(0.62, 0.82)
                grow.append((x1, y1, angle + turn, shorter, width * 0.62, depth + 1))
    flat = np.array(branches)
    flat[..., 1] = np.minimum(flat[..., 1], height)
    canvas.details(on_plane(flat, foot, sideways), bark, canvas.shade(None))


def paint_hedge(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a row of bushes along the sidewalk."""
    leaf = np.array([66, 92, 42]) * rng.uniform(0.7, 1.2) + rng.normal(0, 6, 3)
    height, sideways = min(thing.height, 1.9), canvas.projection.axes[0]
    paint_front(canvas, thing, height * 0.85, as_colour(leaf * 0.75), VEGETATION)
    bushes: list[Cutout] = []
    for along in np.arange(thing.length, 0, -0.75 if thing.distance < 40 else -1.6):
        for level in (0.35, 0.75):
            at = thing.place([along, thing.side * 0.3, height * level])
            radius = np.array([0.62, 0.33]) * height * rng.uniform(0.6, 0.9)
            colour = leaf * (0.6 + 0.5 * level + rng.uniform(-0.1, 0.1))
            if canvas.snow and level > 0.5:
                colour = colour * 0.3 + 160
            bushes.append((_blob(at, radius, sideways, rng, 11), colour, VEGETATION))
    canvas.cutouts(bushes)


def paint_wall(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a free-standing wall with a coping, of brick, stone or concrete."""
    colour = MATERIALS[rng.integers(len(MATERIALS))] * rng.uniform(0.6, 1.0)
    length, height, inner = thing.length, thing.height, thing.side * thing.width
    end = thing.place([[0.0, 0, 0], [0, inner, 0], [0, inner, height], [0, 0, height]])
    canvas.surface(end, as_colour(colour * 0.95), WALL, thing.direction(-1))
    top = [[0, 0, height], [length, 0, height], [length, inner, height], [0, inner, height]]
    canvas.surface(thing.place(top), as_colour(colour), WALL, (0, 1, 0))
    front = paint_front(canvas, thing, height, as_colour(colour), WALL)
    if front is not None:
        courses = [[0, h, length, 0.03] for h in np.arange(0.2, height - 0.1, 0.3)]
        front.paint(courses, colour * 0.85)
        coping = [0, height - 0.12, length, 0.12]
        front.paint(coping, np.clip(colour * 1.2, 0, 240))
        piers = [[a, 0, 0.4, height] for a in np.arange(0, length - 0.4, 3.5)]
        front.paint(piers, colour * 1.08)


def paint_fence(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a see-through railing, or planks. The label is the whole fence, as people draw it."""
    length, height = thing.length, thing.height
    solid = thing.width > 0.2 and rng.random() < 0.5
    wood = np.array([132, 104, 74]) * rng.uniform(0.6, 1.3)
    metal = np.array(grey(rng, 25, 190, 5))
    planks = as_colour(wood) if solid else None
    front = paint_front(canvas, thing, height, planks, FENCE, two_sided=True)
    if front is None:
        return
    step = 0.16 if solid else 0.14
    if thing.distance > 30:
        step *= 3
    posts = [[a, 0, 0.025, height] for a in np.arange(0, length, step)]
    rails = [[0, h * height, length, 0.06] for h in (0.12, 0.92)]
    strong = [[a, 0, 0.09, height] for a in np.arange(0, length, 2.2)]
    front.paint(posts + rails + strong, wood * 0.7 if solid else metal)


def paint_lamp(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a street lamp: a mast with an arm over the road."""
    colour, foot = grey(rng, 40, 170), thing.foot
    upright(canvas, foot, 0, thing.height, thing.width, colour, POLE, 0.6)
    head = thing.place([0, -thing.side * thing.length, thing.height])
    lift, reach = np.array([0, 0.1, 0]), (head - foot) * [1, 0, 1]
    top = foot + [0, thing.height, 0]
    arm = np.array([top - lift, top + reach - lift / 2, top + reach + lift / 2, top])
    canvas.surface(arm, colour, POLE)
    flat = np.array([[-0.3, -0.16], [0.3, -0.16], [0.3, 0], [-0.3, 0]])
    bulb = on_plane(flat, head, canvas.projection.axes[0])
    canvas.surface(bulb, (190, 190, 180), POLE, glow=WARM)


def lamp_heads(things: list[Thing]) -> np.ndarray:
    """Returns (N, 3) world positions of the street lamps' bulbs."""
    heads = [t.place([0, -t.side * t.length, t.height]) for t in things if t.kind == "lamp"]
    return np.array(heads).reshape(-1, 3)


def paint_bollard(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a bollard."""
    upright(canvas, thing.foot, 0, thing.height, thing.width, grey(rng, 25, 150), POLE)


def regular(count: int, turn: float = 0.0) -> np.ndarray:
    """Returns (count, 2) corners of a regular polygon of radius 1, the first on top at turn 0."""
    angle = np.linspace(0, 2 * math.pi, count, endpoint=False) + turn
    return np.stack([np.sin(angle), np.cos(angle)], axis=1)


def paint_sign(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a sign on a post: round, triangular, octagonal or a panel; some show their back."""
    foot = thing.foot
    upright(canvas, foot, 0, thing.height + 0.3, 0.08, grey(rng, 90, 170), POLE)
    red, blue, white = (186, 30, 36), (28, 76, 160), (232, 232, 228)
    square = regular(4, math.pi / 4)
    rim, face, shape = [
        (red, white, regular(16)),
        (red, white, regular(3)),
        (blue, blue, regular(16)),
        (white, red, regular(8, math.pi / 8)),
        (white, blue, square),
        ((40, 40, 40), (238, 196, 40), regular(4)),
        (white, (24, 104, 64), square * [1.7, 1.0]),
    ][rng.integers(7)]
    if rng.random() < 0.2:
        rim = face = (128, 130, 132)
    radius, symbol = thing.width / 2, rng.uniform(-0.5, 0.5, (3, 2))
    mark = white if face in (blue, red, (24, 104, 64)) else (34, 34, 36)
    centre = foot + [0, thing.height - radius * 0.3, 0] + thing.direction(-0.06)
    across = thing.direction(across=1)
    light = canvas.surface(on_plane(shape * radius, centre, across), rim, TRAFFIC_SIGN)
    if light is not None:
        inside = on_plane(shape * 0.78 * radius, centre, across)
        canvas.details(inside[None], np.array(face), light)
        if rim != (128, 130, 132):
            corners = on_plane(symbol * 0.8 * radius, centre, across)
            canvas.details(corners[None], np.array(mark), light)


def paint_traffic_light(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints three lamps in a dark box on a post; one of them is lit."""
    foot, width, across = thing.foot, thing.width, thing.direction(across=1)
    upright(canvas, foot, 0, thing.height - 0.6, 0.12, grey(rng, 40, 120), POLE)
    centre = foot + [0, thing.height - 1.5 * width, 0]
    housing = np.array([[-0.62, -1.5], [0.62, -1.5], [0.62, 1.5], [-0.62, 1.5]]) * width
    in_view = canvas.surface(on_plane(housing, centre, across), (26, 27, 28), TRAFFIC_LIGHT)
    lit = rng.choice([0, 1, 2], p=[0.45, 0.1, 0.45])
    if in_view is None:
        return
    bright = [(255, 48, 32), (255, 176, 32), (40, 255, 150)]
    for index in range(3):
        middle = centre + UP * ((1 - index) * 0.95 * width)
        disc = on_plane(regular(10) * width * 0.4, middle, across)
        on = index == lit
        colour = np.array(bright[index]) * (1.0 if on else 0.16)
        canvas.details(disc[None], colour, np.ones(3), np.array(bright[index]) * float(on))


MODELS = {
    "house": paint_house,
    "shop": paint_house,
    "tree": paint_tree,
    "bare_tree": paint_bare_tree,
    "hedge": paint_hedge,
    "wall": paint_wall,
    "fence": paint_fence,
    "lamp": paint_lamp,
    "bollard": paint_bollard,
    "sign": paint_sign,
    "traffic_light": paint_traffic_light,
    "person": paint_person,
    "bicycle": paint_bicycle,
    "cyclist": paint_cyclist,
    "motorcycle": paint_motorcycle,
    "motorcyclist": paint_motorcyclist,
    **dict.fromkeys(("car", "van", "truck", "bus", "train"), paint_vehicle),
}
"""The painter of each kind of thing, called as ``model(canvas, thing, rng)``.

The generator comes from the thing's seed, so that a thing looks the same under every domain: the
same numbers are drawn whether or not a light is on.
"""
