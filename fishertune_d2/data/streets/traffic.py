"""How people and vehicles are built: figures from limbs, cycles from wheels, cars from profiles."""

import math

import numpy as np

from fishertune_d2.data.streets.canvas import Canvas
from fishertune_d2.data.streets.world import (
    BICYCLE,
    BUS,
    CAR,
    MOTORCYCLE,
    PERSON,
    RIDER,
    TRAIN,
    TRUCK,
    Thing,
)

SKINS = np.array([[224, 178, 148], [198, 150, 118], [142, 98, 72], [92, 62, 48]], float)
PAINTS = np.array(
    [
        [28, 29, 32],
        [60, 62, 66],
        [128, 130, 134],
        [186, 188, 190],
        [232, 232, 230],
        [22, 44, 96],
        [146, 24, 28],
        [64, 92, 130],
        [38, 74, 56],
        [196, 170, 60],
        [112, 84, 62],
    ],
    float,
)
PAINT_SHARES = np.array([20, 14, 14, 16, 16, 6, 7, 4, 2, 2, 2]) / 103
HEADLIGHT, TAILLIGHT, ROOM = (255, 244, 214), (210, 18, 14), (250, 226, 170)


def _limb(start: np.ndarray, end: np.ndarray, width: float, taper: float = 0.8) -> np.ndarray:
    """A tapered bar (6, 2) between two points of a plane, with rounded-off ends."""
    direction = end - start
    direction = direction / max(float(np.hypot(*direction)), 1e-6)
    normal = np.array([-direction[1], direction[0]]) * width / 2
    tip = normal * taper
    cap = direction * width * 0.3
    return np.array([start - normal, start - cap, start + normal, end + tip, end + cap, end - tip])


def _round(centre: tuple[float, float], radius: tuple[float, float], count: int = 12) -> np.ndarray:
    angle = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack(
        [centre[0] + np.cos(angle) * radius[0], centre[1] + np.sin(angle) * radius[1]], axis=1
    )


Parts = list[tuple[np.ndarray, np.ndarray, int]]  # what Canvas.cutouts takes


class _Figure:
    """Shapes (sideways, up) in metres in a vertical plane through a thing, appended to ``parts``.

    Args:
        thing: stands in the plane's origin.
        sideways: the plane's horizontal direction in the world.
        parts: painted later, in order; figures in several planes may share it.
    """

    def __init__(self, thing: Thing, sideways: np.ndarray, parts: Parts) -> None:
        self.sideways, self.parts = sideways, parts
        self.foot = np.array([thing.x, 0.0, thing.z])

    def part(self, flat: np.ndarray, colour: np.ndarray, label: int) -> None:
        points = self.foot + flat[:, :1] * self.sideways
        points[:, 1] += flat[:, 1]
        self.parts.append((points, colour, label))


def _clothes(rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.6:
        return np.full(3, rng.uniform(18, 120)) + rng.normal(0, 10, 3)
    bright = rng.uniform(25, 225, 3)
    return bright * 0.6 + bright.mean() * 0.4


def paint_person(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """A walking or standing person; the stride shows as far as the heading is across the view."""
    unit, stride = thing.height / 1.75, float(rng.uniform(0, 0.36))
    across = abs(math.sin(thing.heading)) + 0.25
    figure = _Figure(thing, canvas.projection.axes[0], parts := [])
    trousers, coat, skin = _clothes(rng) * 0.8, _clothes(rng), SKINS[rng.integers(len(SKINS))]
    hair = np.array([[40, 30, 24], [24, 22, 22], [120, 90, 56], [150, 146, 140]])[rng.integers(4)]
    hip, shoulder = 0.90 * unit, 1.45 * unit
    step = stride * across
    long_coat, bag = rng.random() < 0.3, rng.random() < 0.25
    shoes = np.array([34.0, 30, 28])
    for sign in (-1, 1):
        foot = np.array([sign * (step + 0.07) * unit, 0.04])
        knee = np.array([sign * (step * 0.4 + 0.09) * unit, 0.48 * unit])
        waist = np.array([sign * 0.08 * unit, hip])
        tone = trousers * (0.82 if sign < 0 else 1.0)
        figure.part(_limb(waist, knee, 0.17 * unit), tone, PERSON)
        figure.part(_limb(knee, foot, 0.13 * unit, 0.75), tone, PERSON)
        figure.part(_limb(foot, foot + [0.09 * sign * across, 0], 0.09 * unit), shoes, PERSON)
    broad = (0.21 if across < 0.8 else 0.17) * unit
    hem = 0.55 * unit if long_coat else hip - 0.08
    torso = np.array(
        [
            [-broad * 0.85, hem],
            [broad * 0.85, hem],
            [broad * 0.8, hip + 0.2],
            [broad, shoulder - 0.05],
            [broad * 0.45, shoulder + 0.05],
            [-broad * 0.45, shoulder + 0.05],
            [-broad, shoulder - 0.05],
            [-broad * 0.8, hip + 0.2],
        ]
    )
    figure.part(torso, coat, PERSON)
    for sign in (-1, 1):
        start = np.array([sign * broad * 0.95, shoulder - 0.06])
        elbow = start + np.array([sign * 0.06 - step * 0.3 * sign, -0.28]) * unit
        hand = elbow + np.array([step * 0.5 * sign, -0.25]) * unit
        figure.part(_limb(start, elbow, 0.11 * unit), coat * 0.88, PERSON)
        figure.part(_limb(elbow, hand, 0.09 * unit), coat * 0.84, PERSON)
        figure.part(_round((float(hand[0]), float(hand[1])), (0.045, 0.05), 7), skin, PERSON)
    if bag:
        colour = rng.uniform(20, 160, 3)
        figure.part(_round((broad * 1.1, hip + 0.02), (0.10, 0.15), 8), colour, PERSON)
    head = (0.0, 1.62 * unit)
    figure.part(_limb(np.array([0, shoulder]), np.array(head), 0.11 * unit), skin * 0.85, PERSON)
    figure.part(_round(head, (0.09 * unit, 0.125 * unit)), skin, PERSON)
    cap = _round((0, 1.67 * unit), (0.098 * unit, 0.085 * unit))
    figure.part(cap, hair.astype(float), PERSON)
    canvas.cutouts(parts)


def _cycle_plane(canvas: Canvas, thing: Thing) -> np.ndarray:
    """The direction of a cycle's length, never so far foreshortened that it vanishes."""
    direction = np.array([math.sin(thing.heading), 0.0, math.cos(thing.heading)])
    sideways = canvas.projection.axes[0]
    shown = float(direction @ sideways)
    if abs(shown) < 0.16:
        direction = direction + sideways * (math.copysign(0.16, shown) - shown)
    return direction


def _add_bicycle(figure: _Figure, rng: np.random.Generator) -> None:
    """Wheels, frame, bars and saddle in the plane of the bicycle."""
    colour = _clothes(rng) * 0.8
    tyre, radius = np.array([26.0, 26, 28]), 0.34
    for centre in (-0.53, 0.53):
        outer = _round((centre, radius), (radius, radius), 16)
        inner = _round((centre, radius), (radius - 0.055, radius - 0.055), 16)
        # Around outside, across, and back around inside: a ring as one outline.
        ring = np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])
        figure.part(ring, tyre, BICYCLE)
        for angle in np.linspace(0, math.pi, 4, endpoint=False):
            spoke = np.array([math.cos(angle), math.sin(angle)]) * (radius - 0.05)
            hub = np.array([centre, radius])
            figure.part(_limb(hub - spoke, hub + spoke, 0.012, 1), np.full(3, 120.0), BICYCLE)
    rear, crank, seat = np.array([-0.53, radius]), np.array([-0.08, 0.3]), np.array([-0.2, 0.86])
    head, fork = np.array([0.36, 0.86]), np.array([0.53, radius])
    for start, end in (
        (rear, crank),
        (rear, seat),
        (crank, seat),
        (crank, head),
        (seat, head),
        (head, fork),
    ):
        figure.part(_limb(start, end, 0.055, 1), colour, BICYCLE)
    figure.part(_limb(seat + [-0.12, 0.08], seat + [0.14, 0.06], 0.07), tyre, BICYCLE)
    figure.part(_limb(head, head + [-0.03, 0.2], 0.05), tyre, BICYCLE)
    figure.part(_limb(head + [-0.12, 0.2], head + [0.08, 0.18], 0.05), tyre, BICYCLE)


def paint_bicycle(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """A parked bicycle."""
    _add_bicycle(_Figure(thing, _cycle_plane(canvas, thing), parts := []), rng)
    canvas.cutouts(parts)


def paint_cyclist(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """A rider on a bicycle: the bicycle is class bicycle, the person class rider."""
    plane = _cycle_plane(canvas, thing)
    _add_bicycle(_Figure(thing, plane, parts := []), rng)
    _add_rider(canvas, thing, rng, parts, saddle=0.92, reach=0.30, hands=1.06, helmet=0.5)
    canvas.cutouts(parts)


def paint_motorcycle(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """A motorcycle or scooter: two fat wheels, engine, tank, seat, windshield, lights."""
    plane = _cycle_plane(canvas, thing)
    sideways = canvas.projection.axes[0]
    figure = _Figure(thing, plane, parts := [])
    body, dark = PAINTS[rng.choice(len(PAINTS), p=PAINT_SHARES)], np.array([32.0, 32, 34])
    wide = _Figure(thing, sideways, parts)  # what shows from the front and from behind
    wide.part(_round((0, 0.32), (0.09, 0.32)), dark, MOTORCYCLE)
    for centre in (-0.68, 0.72):
        figure.part(_round((centre, 0.32), (0.32, 0.32), 16), dark, MOTORCYCLE)
        figure.part(_round((centre, 0.32), (0.17, 0.17), 12), np.full(3, 130.0), MOTORCYCLE)
    figure.part(
        np.array([[-0.45, 0.3], [0.42, 0.26], [0.5, 0.6], [-0.4, 0.62]]), dark * 1.9, MOTORCYCLE
    )
    figure.part(
        np.array(
            [
                [-0.9, 0.66],
                [-0.2, 0.56],
                [0.45, 0.62],
                [0.5, 0.95],
                [0.1, 0.98],
                [-0.3, 0.78],
                [-0.85, 0.84],
            ]
        ),
        body,
        MOTORCYCLE,
    )
    figure.part(_limb(np.array([0.72, 0.32]), np.array([0.48, 1.0]), 0.09), dark, MOTORCYCLE)
    wide.part(
        np.array([[-0.2, 0.45], [0.2, 0.45], [0.26, 0.85], [-0.26, 0.85]]), body * 0.9, MOTORCYCLE
    )
    wide.part(_limb(np.array([-0.36, 1.02]), np.array([0.36, 1.02]), 0.06), dark, MOTORCYCLE)
    canvas.cutouts(parts)
    toward = math.cos(thing.heading) < 0
    light = np.array(HEADLIGHT if toward else TAILLIGHT)
    lamp = figure.foot + _round((0, 0.8), (0.09, 0.08), 8)[:, :1] * sideways
    lamp = lamp + _round((0, 0.8), (0.09, 0.08), 8)[:, 1:] * np.array([0, 1.0, 0])
    canvas.surface(lamp, tuple(light * 0.8), MOTORCYCLE, glow=tuple(light.tolist()))


def paint_motorcyclist(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """A motorcycle and its rider."""
    paint_motorcycle(canvas, thing, rng)
    parts: Parts = []
    _add_rider(canvas, thing, rng, parts, saddle=0.84, reach=0.42, hands=1.04, helmet=1.0)
    canvas.cutouts(parts)


def _add_rider(
    canvas: Canvas,
    thing: Thing,
    rng: np.random.Generator,
    parts: Parts,
    saddle: float,
    reach: float,
    hands: float,
    helmet: float,
) -> None:
    """A seated person: legs to the pedals, back bent towards the bars."""
    plane = _cycle_plane(canvas, thing)
    figure = _Figure(thing, plane, parts)
    wide = _Figure(thing, canvas.projection.axes[0], parts)
    coat, trousers = _clothes(rng), _clothes(rng) * 0.8
    skin = SKINS[rng.integers(len(SKINS))]
    if rng.random() < 0.15:
        coat = np.array([206.0, 226, 40])  # high visibility
    hip, shoulder = np.array([-0.2, saddle + 0.04]), np.array([0.1, saddle + 0.56])
    for offset, pedal in ((-0.12, (0.05, 0.14)), (0.12, (-0.15, 0.42))):
        knee = np.array([0.22, (saddle + pedal[1]) / 2 + 0.12])
        figure.part(_limb(hip, knee, 0.17), trousers * 0.9, RIDER)
        figure.part(_limb(knee, np.array(pedal), 0.13), trousers, RIDER)
        wide.part(
            _limb(np.array([offset * 0.8, saddle]), np.array([offset, pedal[1]]), 0.14),
            trousers,
            RIDER,
        )
    figure.part(_limb(hip, shoulder, 0.30, 1.0), coat * 0.92, RIDER)
    wide.part(
        np.array(
            [
                [-0.16, saddle - 0.05],
                [0.16, saddle - 0.05],
                [0.22, saddle + 0.5],
                [0.1, saddle + 0.6],
                [-0.1, saddle + 0.6],
                [-0.22, saddle + 0.5],
            ]
        ),
        coat,
        RIDER,
    )
    for sign in (-1, 1):
        wide.part(
            _limb(np.array([sign * 0.2, saddle + 0.48]), np.array([sign * 0.28, hands]), 0.1),
            coat * 0.85,
            RIDER,
        )
    figure.part(_limb(shoulder, np.array([reach, hands]), 0.1), coat * 0.85, RIDER)
    shift = plane * (0.14 if abs(float(plane @ canvas.projection.axes[0])) > 0.3 else 0.0)
    head = _Figure(thing, canvas.projection.axes[0], parts)
    head.foot = head.foot + shift
    top = saddle + 0.76
    head.part(_round((0, top), (0.1, 0.13)), skin, RIDER)
    colour = rng.uniform(20, 230, 3) if rng.random() < helmet else np.array([44.0, 34, 28])
    head.part(_round((0, top + 0.05), (0.115, 0.1 if helmet < 1 else 0.13)), colour, RIDER)


# A profile is drawn from the rear bumper over the roof to the front: (along, up) in shares of
# length (-0.5 rear, 0.5 front) and height. "glass": which strips between two points are windows.
CAR_PROFILES = [
    (
        (
            (-0.49, 0.20),
            (-0.5, 0.58),
            (-0.36, 0.66),
            (-0.24, 0.97),
            (0.04, 1.0),
            (0.24, 0.64),
            (0.46, 0.53),
            (0.5, 0.38),
            (0.49, 0.18),
        ),
        (2, 4),
    ),  # saloon
    (
        (
            (-0.49, 0.20),
            (-0.5, 0.62),
            (-0.44, 0.94),
            (0.0, 1.0),
            (0.22, 0.63),
            (0.46, 0.52),
            (0.5, 0.38),
            (0.49, 0.18),
        ),
        (1, 3),
    ),  # hatchback
    (
        (
            (-0.49, 0.22),
            (-0.5, 0.60),
            (-0.46, 0.96),
            (0.08, 1.0),
            (0.26, 0.66),
            (0.47, 0.60),
            (0.5, 0.40),
            (0.49, 0.20),
        ),
        (1, 3),
    ),  # estate, off-roader
]
VAN_PROFILE = (
    ((-0.5, 0.15), (-0.5, 0.97), (0.2, 1.0), (0.36, 0.58), (0.49, 0.44), (0.5, 0.14)),
    (2,),
)
BOX_PROFILE = (
    ((-0.5, 0.12), (-0.5, 1.0), (0.46, 1.0), (0.49, 0.86), (0.5, 0.4), (0.5, 0.12)),
    (3,),
)


def _profile(thing: Thing, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
    if thing.kind == "car":
        points, glass = CAR_PROFILES[rng.integers(len(CAR_PROFILES))]
    else:
        points, glass = VAN_PROFILE if thing.kind == "van" else BOX_PROFILE
    return np.array(points) * [thing.length, thing.height], glass


def paint_vehicle(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """A side profile pulled to the vehicle's width, with wheels, windows and lights."""
    label = {"car": CAR, "van": CAR, "truck": TRUCK, "bus": BUS, "train": TRAIN}[thing.kind]
    profile, glass = _profile(thing, rng)
    paint = np.clip(PAINTS[rng.choice(len(PAINTS), p=PAINT_SHARES)] + rng.normal(0, 6, 3), 8, 245)
    if label in (BUS, TRAIN):
        paint = rng.choice(
            [
                [186, 34, 34],
                [222, 222, 216],
                [40, 96, 150],
                [226, 180, 48],
                [52, 122, 84],
                [210, 118, 40],
            ]
        ) * rng.uniform(0.75, 1.05)
    body = thing.height * 0.56
    half = thing.width / 2
    inset = np.where(profile[:, 1] > thing.height * 0.7, 0.80 if label == CAR else 0.98, 1.0) * half
    left = np.column_stack([profile[:, 0], -inset, profile[:, 1]])
    right = np.column_stack([profile[:, 0], inset, profile[:, 1]])
    window = np.array([36.0, 42, 48]) * rng.uniform(0.7, 1.6)
    under = np.array(
        [
            [profile[0, 0], -half * 0.9, 0.06],
            [profile[0, 0], half * 0.9, 0.06],
            [profile[-1, 0], half * 0.9, 0.06],
            [profile[-1, 0], -half * 0.9, 0.06],
        ]
    )
    for pair in ((0, 1), (2, 3), (1, 2), (3, 0)):  # the dark space under the body
        low = under[list(pair)]
        quad = np.concatenate([low, (low + [0, 0, thing.height * 0.2])[::-1]])
        canvas.surface(thing.place(quad), (16, 16, 18), label)
    strips = []
    for index in range(len(profile) - 1):
        quad = thing.place(np.array([left[index], left[index + 1], right[index + 1], right[index]]))
        run = profile[index + 1] - profile[index]
        length = max(float(np.hypot(*run)), 1e-6)
        normal = _world_normal(thing, -run[1] / length, 0.0, run[0] / length)
        strips.append((quad, normal, paint, index in glass))
    strips.sort(key=lambda item: -float(np.linalg.norm(item[0].mean(axis=0) - canvas.eye)))
    sides = []
    for sign, flank in ((-1, left), (1, right)):
        sides.append((sign, flank, _world_normal(thing, 0.0, float(sign), 0.0)))
    for quad, normal, colour, glazed in strips:
        shade = canvas.surface(quad, tuple(colour), label, normal)
        if shade is not None and glazed:
            centre = quad.mean(axis=0)
            pane = centre + (quad - centre) * 0.86
            sky = np.array([120.0, 132, 146]) * 0.5 + window * 0.5
            canvas.details(pane[None], sky, shade)
    for sign, flank, normal in sides:
        shade = canvas.surface(thing.place(flank), tuple(paint * 0.94), label, normal, convex=False)
        if shade is not None:
            _paint_flank(canvas, thing, rng, sign, label, body, window, paint, shade)
    _paint_ends(canvas, thing, rng, label, paint)


def _world_normal(
    thing: Thing, along: float, across: float, up: float
) -> tuple[float, float, float]:
    sin, cos = math.sin(thing.heading), math.cos(thing.heading)
    return (along * sin + across * cos, up, along * cos - across * sin)


def _paint_flank(
    canvas: Canvas,
    thing: Thing,
    rng: np.random.Generator,
    sign: int,
    label: int,
    body: float,
    window: np.ndarray,
    paint: np.ndarray,
    shade: np.ndarray,
) -> None:
    """Side windows, stripes, wheels."""
    length, height, half = thing.length, thing.height, sign * thing.width / 2
    quads, colours, shine = [], [], []

    def quad(
        a0: float,
        a1: float,
        u0: float,
        u1: float,
        colour: np.ndarray,
        slant: float = 0.0,
        glow: tuple[float, float, float] = (0, 0, 0),
        tuck: float = 1.0,
    ) -> None:
        quads.append(
            [
                [a0, half, u0],
                [a1, half, u0],
                [a1 - slant, half * tuck, u1],
                [a0 + slant, half * tuck, u1],
            ]
        )
        colours.append(colour)
        shine.append(glow)

    if label == CAR and thing.kind == "car":
        quad(-0.34 * length, -0.04 * length, 0.64 * height, 0.92 * height, window, 0.3, tuck=0.86)
        quad(-0.01 * length, 0.19 * length, 0.64 * height, 0.92 * height, window, 0.25, tuck=0.86)
        quad(-0.48 * length, 0.48 * length, 0.36 * height, 0.39 * height, paint * 0.7)
        quad(-0.025 * length, -0.02 * length, 0.25 * height, 0.64 * height, paint * 0.6)
    elif label == CAR:
        quad(0.1 * length, 0.3 * length, 0.56 * height, 0.88 * height, window, 0.2)
        quad(0.05 * length, 0.06 * length, 0.15 * height, 0.95 * height, paint * 0.7)
    elif label == TRUCK:
        load = np.clip(PAINTS[rng.integers(len(PAINTS))] * 1.1, 0, 240)
        quad(-0.5 * length, 0.24 * length, 0.3 * height, 1.0 * height, load)
        quad(0.24 * length, 0.27 * length, 0.25 * height, 1.0 * height, np.full(3, 24.0))
        quad(-0.4 * length, 0.1 * length, 0.5 * height, 0.75 * height, rng.uniform(30, 230, 3))
        quad(0.32 * length, 0.44 * length, 0.55 * height, 0.82 * height, window)
    else:
        count = int(length / 1.5)
        room = tuple(np.array(ROOM) * 0.55)
        for k in range(count):
            at = -0.47 * length + k * 0.94 * length / count
            quad(at, at + 1.3, 0.42 * height, 0.80 * height, window, glow=room)
        quad(-0.5 * length, 0.5 * length, 0.14 * height, 0.22 * height, paint * 0.55)
        accent = rng.uniform(30, 230, 3)
        quad(-0.5 * length, 0.5 * length, 0.85 * height, 0.93 * height, accent)
        for at in (-0.22, 0.18, 0.42):
            quad(
                at * length,
                at * length + 1.1,
                0.14 * height,
                0.82 * height,
                window * 1.2,
                glow=tuple(np.array(ROOM) * 0.4),
            )
    canvas.details(thing.place(np.array(quads)), np.array(colours), shade, np.array(shine, float))
    radius = {CAR: 0.33, TRUCK: 0.48, BUS: 0.48, TRAIN: 0.3}[label]
    at_wheels = (-0.31, 0.31) if label != TRAIN else (-0.4, -0.34, -0.03, 0.03, 0.34, 0.4)
    for at in at_wheels:
        for size, colour in ((radius, (20.0, 20, 22)), (radius * 0.6, (118.0, 120, 124))):
            flat = _round((at * length, radius), (size, size), 14)
            wheel = np.column_stack([flat[:, 0], np.full(len(flat), half * 1.005), flat[:, 1]])
            if size == radius:
                canvas.surface(thing.place(wheel), colour, label)
            else:
                canvas.details(thing.place(wheel)[None], np.array(colour), shade)


def _paint_ends(
    canvas: Canvas, thing: Thing, rng: np.random.Generator, label: int, paint: np.ndarray
) -> None:
    """Lights, number plate, grille, large windows on the end that faces the camera."""
    half, height = thing.width / 2, thing.height
    plate = np.array([[236.0, 234, 226], [232, 196, 60]])[rng.integers(2)]
    display = rng.random() < 0.7
    for end in (-1, 1):
        normal = _world_normal(thing, float(end), 0.0, 0.0)
        at = end * thing.length * 0.503
        if float(np.dot(normal, canvas.eye - thing.place([at, 0, 0]))) <= 0:
            continue
        shade = canvas.shade(normal)

        def boxes(rows: list[list[float]], at: float = at) -> np.ndarray:
            return thing.place(
                np.array([[[at, a, u], [at, b, u], [at, b, v], [at, a, v]] for a, b, u, v in rows])
            )

        tall = label in (BUS, TRAIN, TRUCK) or thing.kind == "van"
        if tall and not (label == TRUCK and end < 0) and not (thing.kind == "van" and end > 0):
            pane = boxes([[-half * 0.86, half * 0.86, height * 0.45, height * 0.82]])
            glow = np.array(ROOM) * (0.5 if label in (BUS, TRAIN) else 0.0)
            canvas.details(pane, np.array([46.0, 54, 62]), shade, glow)
            if display and label in (BUS, TRAIN):
                canvas.details(
                    boxes([[-half * 0.6, half * 0.6, height * 0.86, height * 0.95]]),
                    np.array([230.0, 150, 40]),
                    shade,
                    np.array([230.0, 150, 40]),
                )
        if label == TRUCK and end < 0:
            canvas.details(boxes([[-0.03, 0.03, height * 0.25, height * 0.95]]), paint * 0.6, shade)
        low = height * (0.44 if label == CAR and thing.kind == "car" else 0.24)
        deep = max(height * 0.07, 0.13)
        lights = boxes(
            [
                [-half * 0.92, -half * 0.55, low, low + deep],
                [half * 0.55, half * 0.92, low, low + deep],
            ]
        )
        light = np.array(HEADLIGHT if end > 0 else TAILLIGHT, float)
        colour = np.array([214.0, 216, 214]) if end > 0 else np.array([168.0, 24, 22])
        canvas.details(lights, colour, shade, light)
        bumper = boxes([[-half * 0.97, half * 0.97, height * 0.17, height * 0.27]])
        canvas.details(bumper, np.minimum(paint * 0.55, 90), shade)
        canvas.details(boxes([[-0.26, 0.26, low - 0.16, low - 0.05]]), plate, shade)
        if end > 0:
            grille = boxes([[-half * 0.45, half * 0.45, low, low + deep * 0.8]])
            canvas.details(grille, np.array([26.0, 26, 28]), shade)


TRAFFIC_MODELS = {
    "person": paint_person,
    "bicycle": paint_bicycle,
    "cyclist": paint_cyclist,
    "motorcycle": paint_motorcycle,
    "motorcyclist": paint_motorcyclist,
    **dict.fromkeys(("car", "van", "truck", "bus", "train"), paint_vehicle),
}
"""What paints each kind of thing in traffic: ``model(canvas, thing, rng)``."""
