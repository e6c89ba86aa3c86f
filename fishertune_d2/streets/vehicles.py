"""Paints cars, trucks, buses and trams: side profiles pulled to a width, flanks and ends."""

import math
from typing import NamedTuple

import numpy as np

from .canvas import Canvas
from .world import BUS, CAR, TRAIN, TRUCK, Colour, Thing, as_colour

PAINTS = np.array([
    [28, 29, 32], [60, 62, 66], [128, 130, 134], [186, 188, 190], [232, 232, 230], [22, 44, 96],
    [146, 24, 28], [64, 92, 130], [38, 74, 56], [196, 170, 60], [112, 84, 62],
], float)  # fmt: skip
PAINT_SHARES = np.array([20, 14, 14, 16, 16, 6, 7, 4, 2, 2, 2]) / 103
BUS_PAINTS = [
    [186, 34, 34], [222, 222, 216], [40, 96, 150], [226, 180, 48], [52, 122, 84], [210, 118, 40],
]  # fmt: skip
LABELS = {"car": CAR, "van": CAR, "truck": TRUCK, "bus": BUS, "train": TRAIN}
HEADLIGHT, TAILLIGHT, ROOM = (255, 244, 214), (210, 18, 14), (250, 226, 170)

# A profile runs from the rear bumper over the roof to the front: (along, up) in shares of length
# (-0.5 rear, 0.5 front) and height, then the indices of the segments between points that are glass.
Profile = tuple[tuple[tuple[float, float], ...], tuple[int, ...]]
SALOON: Profile = (
    (-0.49, 0.20), (-0.5, 0.58), (-0.36, 0.66), (-0.24, 0.97), (0.04, 1.0), (0.24, 0.64),
    (0.46, 0.53), (0.5, 0.38), (0.49, 0.18),
), (2, 4)  # fmt: skip
HATCHBACK: Profile = (
    (-0.49, 0.20), (-0.5, 0.62), (-0.44, 0.94), (0.0, 1.0), (0.22, 0.63), (0.46, 0.52),
    (0.5, 0.38), (0.49, 0.18),
), (1, 3)  # fmt: skip
ESTATE: Profile = (  # or an off-roader
    (-0.49, 0.22), (-0.5, 0.60), (-0.46, 0.96), (0.08, 1.0), (0.26, 0.66), (0.47, 0.60),
    (0.5, 0.40), (0.49, 0.20),
), (1, 3)  # fmt: skip
CAR_PROFILES = (SALOON, HATCHBACK, ESTATE)
VAN_PROFILE: Profile = (
    (-0.5, 0.15), (-0.5, 0.97), (0.2, 1.0), (0.36, 0.58), (0.49, 0.44), (0.5, 0.14),
), (2,)  # fmt: skip
BOX_PROFILE: Profile = (
    (-0.5, 0.12), (-0.5, 1.0), (0.46, 1.0), (0.49, 0.86), (0.5, 0.4), (0.5, 0.12),
), (3,)  # fmt: skip


def oval(centre: tuple[float, float], radius: tuple[float, float], count: int = 12) -> np.ndarray:
    """Returns an upright ellipse (count, 2) around a point; ``radius`` is (across, up)."""
    angle = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack(
        [centre[0] + np.cos(angle) * radius[0], centre[1] + np.sin(angle) * radius[1]], axis=1
    )


def _profile(thing: Thing, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
    """Returns the (N, 2) profile in metres, and the indices of its glass segments."""
    if thing.kind == "car":
        points, glass = CAR_PROFILES[rng.integers(len(CAR_PROFILES))]
    else:
        points, glass = VAN_PROFILE if thing.kind == "van" else BOX_PROFILE
    return np.array(points) * [thing.length, thing.height], glass


def paint_vehicle(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a side profile pulled to the vehicle's width, with wheels, windows and lights."""
    label = LABELS[thing.kind]
    profile, glass = _profile(thing, rng)
    paint = np.clip(PAINTS[rng.choice(len(PAINTS), p=PAINT_SHARES)] + rng.normal(0, 6, 3), 8, 245)
    if label in (BUS, TRAIN):
        paint = rng.choice(BUS_PAINTS) * rng.uniform(0.75, 1.05)
    half = thing.width / 2
    inset = np.where(profile[:, 1] > thing.height * 0.7, 0.80 if label == CAR else 0.98, 1.0) * half
    left = np.column_stack([profile[:, 0], -inset, profile[:, 1]])
    right = np.column_stack([profile[:, 0], inset, profile[:, 1]])
    window = np.array([36.0, 42, 48]) * rng.uniform(0.7, 1.6)
    rear, front = profile[0, 0], profile[-1, 0]
    corners = ((rear, -0.9), (rear, 0.9), (front, 0.9), (front, -0.9))
    under = np.array([[along, half * across, 0.06] for along, across in corners])
    for pair in ((0, 1), (2, 3), (1, 2), (3, 0)):  # the dark space under the body
        low = under[list(pair)]
        quad = np.concatenate([low, (low + [0, 0, thing.height * 0.2])[::-1]])
        canvas.surface(thing.place(quad), (16, 16, 18), label)
    strips = []
    for index in range(len(profile) - 1):
        quad = thing.place(np.array([left[index], left[index + 1], right[index + 1], right[index]]))
        run = profile[index + 1] - profile[index]
        length = max(float(np.hypot(*run)), 1e-6)
        normal = thing.direction(-run[1] / length, up=run[0] / length)
        strips.append((quad, normal, index in glass))
    strips.sort(key=lambda strip: -float(np.linalg.norm(strip[0].mean(axis=0) - canvas.eye)))
    for quad, normal, glazed in strips:
        shade = canvas.surface(quad, as_colour(paint), label, normal)
        if shade is not None and glazed:
            centre = quad.mean(axis=0)
            pane = centre + (quad - centre) * 0.86
            sky = np.array([120.0, 132, 146]) * 0.5 + window * 0.5
            canvas.details(pane[None], sky, shade)
    for sign, flank in ((-1, left), (1, right)):
        normal = thing.direction(across=sign)
        outline, colour = thing.place(flank), as_colour(paint * 0.94)
        shade = canvas.surface(outline, colour, label, normal, convex=False)
        if shade is not None:
            _paint_flank(canvas, thing, rng, sign, window, paint, shade)
    _paint_ends(canvas, thing, rng, paint)


class _Pane(NamedTuple):
    """A flat part of a vehicle's side, from rear to front and from low to high in metres.

    Attributes:
        slant: Metres by which the upper edge is shorter at either end.
        tuck: Share of the vehicle's half width at the upper edge.
        glow: Emitted light.
    """

    rear: float
    front: float
    low: float
    high: float
    colour: np.ndarray
    slant: float = 0.0
    tuck: float = 1.0
    glow: Colour = (0, 0, 0)

    def corners(self, half: float) -> list[list[float]]:
        """Returns (4, 3) local corners, at ``half`` metres from the middle of the vehicle."""
        return [
            [self.rear, half, self.low],
            [self.front, half, self.low],
            [self.front - self.slant, half * self.tuck, self.high],
            [self.rear + self.slant, half * self.tuck, self.high],
        ]


def _side_panes(
    thing: Thing, rng: np.random.Generator, window: np.ndarray, paint: np.ndarray
) -> list[_Pane]:
    """Returns side windows, gaps, stripes and loads."""
    length, height = thing.length, thing.height
    if thing.kind == "car":
        low, high = 0.64 * height, 0.92 * height
        return [
            _Pane(-0.34 * length, -0.04 * length, low, high, window, 0.3, 0.86),
            _Pane(-0.01 * length, 0.19 * length, low, high, window, 0.25, 0.86),
            _Pane(-0.48 * length, 0.48 * length, 0.36 * height, 0.39 * height, paint * 0.7),
            _Pane(-0.025 * length, -0.02 * length, 0.25 * height, low, paint * 0.6),
        ]
    if thing.kind == "van":
        return [
            _Pane(0.1 * length, 0.3 * length, 0.56 * height, 0.88 * height, window, 0.2),
            _Pane(0.05 * length, 0.06 * length, 0.15 * height, 0.95 * height, paint * 0.7),
        ]
    if thing.kind == "truck":
        load = np.clip(PAINTS[rng.integers(len(PAINTS))] * 1.1, 0, 240)
        sign = rng.uniform(30, 230, 3)
        return [
            _Pane(-0.5 * length, 0.24 * length, 0.3 * height, 1.0 * height, load),
            _Pane(0.24 * length, 0.27 * length, 0.25 * height, 1.0 * height, np.full(3, 24.0)),
            _Pane(-0.4 * length, 0.1 * length, 0.5 * height, 0.75 * height, sign),
            _Pane(0.32 * length, 0.44 * length, 0.55 * height, 0.82 * height, window),
        ]
    count, panes = int(length / 1.5), []
    room = as_colour(np.array(ROOM) * 0.55)
    for k in range(count):
        at = -0.47 * length + k * 0.94 * length / count
        panes.append(_Pane(at, at + 1.3, 0.42 * height, 0.80 * height, window, glow=room))
    accent = rng.uniform(30, 230, 3)
    panes += [
        _Pane(-0.5 * length, 0.5 * length, 0.14 * height, 0.22 * height, paint * 0.55),
        _Pane(-0.5 * length, 0.5 * length, 0.85 * height, 0.93 * height, accent),
    ]
    door, glass = as_colour(np.array(ROOM) * 0.4), window * 1.2
    for at in (-0.22 * length, 0.18 * length, 0.42 * length):
        panes.append(_Pane(at, at + 1.1, 0.14 * height, 0.82 * height, glass, glow=door))
    return panes


def _paint_flank(
    canvas: Canvas,
    thing: Thing,
    rng: np.random.Generator,
    sign: int,
    window: np.ndarray,
    paint: np.ndarray,
    shade: np.ndarray,
) -> None:
    """Paints side windows, stripes and wheels."""
    half, label = sign * thing.width / 2, LABELS[thing.kind]
    panes = _side_panes(thing, rng, window, paint)
    canvas.details(
        thing.place([pane.corners(half) for pane in panes]),
        np.array([pane.colour for pane in panes]),
        shade,
        np.array([pane.glow for pane in panes], float),
    )
    radius = {CAR: 0.33, TRUCK: 0.48, BUS: 0.48, TRAIN: 0.3}[label]
    at_wheels = (-0.31, 0.31) if label != TRAIN else (-0.4, -0.34, -0.03, 0.03, 0.34, 0.4)
    for at in at_wheels:
        for size, colour in ((radius, (20.0, 20, 22)), (radius * 0.6, (118.0, 120, 124))):
            flat = oval((at * thing.length, radius), (size, size), 14)
            wheel = np.column_stack([flat[:, 0], np.full(len(flat), half * 1.005), flat[:, 1]])
            if size == radius:
                canvas.surface(thing.place(wheel), colour, label)
            else:
                canvas.details(thing.place(wheel)[None], np.array(colour), shade)


def _paint_ends(canvas: Canvas, thing: Thing, rng: np.random.Generator, paint: np.ndarray) -> None:
    """Paints lights, number plate, grille and large windows on the end that faces the camera."""
    half, height, kind = thing.width / 2, thing.height, thing.kind
    plate = np.array([[236.0, 234, 226], [232, 196, 60]])[rng.integers(2)]
    display = rng.random() < 0.7
    for end in (-1, 1):
        normal = thing.direction(end)
        at = end * thing.length * 0.503
        if float(np.dot(normal, canvas.eye - thing.place([at, 0, 0]))) <= 0:
            continue
        shade = canvas.shade(normal)

        def boxes(edges: list[list[float]], at: float = at) -> np.ndarray:
            corners = [[[at, a, u], [at, b, u], [at, b, v], [at, a, v]] for a, b, u, v in edges]
            return thing.place(corners)

        if {"car": False, "van": end < 0, "truck": end > 0}.get(kind, True):
            pane = boxes([[-half * 0.86, half * 0.86, height * 0.45, height * 0.82]])
            glow = np.array(ROOM) * (0.5 if kind in ("bus", "train") else 0.0)
            canvas.details(pane, np.array([46.0, 54, 62]), shade, glow)
            if display and kind in ("bus", "train"):
                amber = np.array([230.0, 150, 40])
                sign = boxes([[-half * 0.6, half * 0.6, height * 0.86, height * 0.95]])
                canvas.details(sign, amber, shade, amber)
        if kind == "truck" and end < 0:
            canvas.details(boxes([[-0.03, 0.03, height * 0.25, height * 0.95]]), paint * 0.6, shade)
        low = height * (0.44 if kind == "car" else 0.24)
        deep = max(height * 0.07, 0.13)
        left = [-half * 0.92, -half * 0.55, low, low + deep]
        lights = boxes([left, [half * 0.55, half * 0.92, low, low + deep]])
        light = np.array(HEADLIGHT if end > 0 else TAILLIGHT, float)
        colour = np.array([214.0, 216, 214]) if end > 0 else np.array([168.0, 24, 22])
        canvas.details(lights, colour, shade, light)
        bumper = boxes([[-half * 0.97, half * 0.97, height * 0.17, height * 0.27]])
        canvas.details(bumper, np.minimum(paint * 0.55, 90), shade)
        canvas.details(boxes([[-0.26, 0.26, low - 0.16, low - 0.05]]), plate, shade)
        if end > 0:
            grille = boxes([[-half * 0.45, half * 0.45, low, low + deep * 0.8]])
            canvas.details(grille, np.array([26.0, 26, 28]), shade)
