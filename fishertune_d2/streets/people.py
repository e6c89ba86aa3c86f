"""Paints people and cycles: figures made of limbs, cycles made of wheels, and riders."""

import math

import numpy as np
from numpy.typing import ArrayLike

from .canvas import Canvas, Cutout
from .vehicles import HEADLIGHT, PAINT_SHARES, PAINTS, TAILLIGHT, oval
from .world import BICYCLE, MOTORCYCLE, PERSON, RIDER, Thing, as_colour, on_plane

SKINS = np.array([[224, 178, 148], [198, 150, 118], [142, 98, 72], [92, 62, 48]], float)


class _Figure:
    """Collects shapes (sideways, up) in metres in a vertical plane through a thing.

    Args:
        thing: The thing, at the plane's origin.
        sideways: The plane's horizontal direction in the world.
        label: The train id of all shapes.
        parts: Receives the shapes, which are painted later, in order; None for a new list. Figures
            in several planes may share it.
    """

    def __init__(
        self, thing: Thing, sideways: np.ndarray, label: int, parts: list[Cutout] | None = None
    ) -> None:
        self.foot, self.sideways, self.label = thing.foot, sideways, label
        self.parts = [] if parts is None else parts

    def part(self, flat: np.ndarray, colour: np.ndarray) -> None:
        """Adds a shape (N, 2)."""
        self.parts.append((on_plane(flat, self.foot, self.sideways), colour, self.label))

    def limb(
        self, start: ArrayLike, end: ArrayLike, width: float, colour: np.ndarray, taper: float = 0.8
    ) -> None:
        """Adds a tapered bar between two points, with rounded ends."""
        begin, stop = np.asarray(start, float), np.asarray(end, float)
        direction = stop - begin
        direction = direction / max(float(np.hypot(*direction)), 1e-6)
        normal = np.array([-direction[1], direction[0]]) * width / 2
        tip, cap = normal * taper, direction * width * 0.3
        outline = [begin - normal, begin - cap, begin + normal, stop + tip, stop + cap, stop - tip]
        self.part(np.array(outline), colour)


def _clothes(rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.6:
        return np.full(3, rng.uniform(18, 120)) + rng.normal(0, 10, 3)
    bright = rng.uniform(25, 225, 3)
    return bright * 0.6 + bright.mean() * 0.4


def paint_person(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a walking or standing person; the stride shows as far as the heading is sideways."""
    unit, stride = thing.height / 1.75, float(rng.uniform(0, 0.36))
    across = abs(math.sin(thing.heading)) + 0.25
    figure = _Figure(thing, canvas.projection.axes[0], PERSON)
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
        figure.limb(waist, knee, 0.17 * unit, tone)
        figure.limb(knee, foot, 0.13 * unit, tone, 0.75)
        figure.limb(foot, foot + [0.09 * sign * across, 0], 0.09 * unit, shoes)
    broad = (0.21 if across < 0.8 else 0.17) * unit
    hem = 0.55 * unit if long_coat else hip - 0.08
    torso = np.array([
        [-broad * 0.85, hem], [broad * 0.85, hem], [broad * 0.8, hip + 0.2],
        [broad, shoulder - 0.05], [broad * 0.45, shoulder + 0.05],
        [-broad * 0.45, shoulder + 0.05], [-broad, shoulder - 0.05], [-broad * 0.8, hip + 0.2],
    ])  # fmt: skip
    figure.part(torso, coat)
    for sign in (-1, 1):
        start = np.array([sign * broad * 0.95, shoulder - 0.06])
        elbow = start + np.array([sign * 0.06 - step * 0.3 * sign, -0.28]) * unit
        hand = elbow + np.array([step * 0.5 * sign, -0.25]) * unit
        figure.limb(start, elbow, 0.11 * unit, coat * 0.88)
        figure.limb(elbow, hand, 0.09 * unit, coat * 0.84)
        figure.part(oval((float(hand[0]), float(hand[1])), (0.045, 0.05), 7), skin)
    if bag:
        colour = rng.uniform(20, 160, 3)
        figure.part(oval((broad * 1.1, hip + 0.02), (0.10, 0.15), 8), colour)
    head = (0.0, 1.62 * unit)
    figure.limb([0, shoulder], head, 0.11 * unit, skin * 0.85)
    figure.part(oval(head, (0.09 * unit, 0.125 * unit)), skin)
    cap = oval((0, 1.67 * unit), (0.098 * unit, 0.085 * unit))
    figure.part(cap, hair.astype(float))
    canvas.cutouts(figure.parts)


def _cycle_plane(canvas: Canvas, thing: Thing) -> np.ndarray:
    """Returns the direction of a cycle's length, turned so far that it does not vanish."""
    direction = np.array([math.sin(thing.heading), 0.0, math.cos(thing.heading)])
    sideways = canvas.projection.axes[0]
    shown = float(direction @ sideways)
    if abs(shown) < 0.16:
        direction = direction + sideways * (math.copysign(0.16, shown) - shown)
    return direction


def _bicycle(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> list[Cutout]:
    """Returns wheels, frame, bars and saddle in the plane of the bicycle."""
    figure = _Figure(thing, _cycle_plane(canvas, thing), BICYCLE)
    colour = _clothes(rng) * 0.8
    tyre, radius = np.array([26.0, 26, 28]), 0.34
    for centre in (-0.53, 0.53):
        outer = oval((centre, radius), (radius, radius), 16)
        inner = oval((centre, radius), (radius - 0.055, radius - 0.055), 16)
        # Around outside, across, and back around inside: a ring as one outline.
        ring = np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])
        figure.part(ring, tyre)
        for angle in np.linspace(0, math.pi, 4, endpoint=False):
            spoke = np.array([math.cos(angle), math.sin(angle)]) * (radius - 0.05)
            hub = np.array([centre, radius])
            figure.limb(hub - spoke, hub + spoke, 0.012, np.full(3, 120.0), 1)
    rear, crank, seat = np.array([-0.53, radius]), np.array([-0.08, 0.3]), np.array([-0.2, 0.86])
    head, fork = np.array([0.36, 0.86]), np.array([0.53, radius])
    frame = ((rear, crank), (rear, seat), (crank, seat), (crank, head), (seat, head), (head, fork))
    for start, end in frame:
        figure.limb(start, end, 0.055, colour, 1)
    figure.limb(seat + [-0.12, 0.08], seat + [0.14, 0.06], 0.07, tyre)
    figure.limb(head, head + [-0.03, 0.2], 0.05, tyre)
    figure.limb(head + [-0.12, 0.2], head + [0.08, 0.18], 0.05, tyre)
    return figure.parts


def paint_bicycle(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a parked bicycle."""
    canvas.cutouts(_bicycle(canvas, thing, rng))


def paint_cyclist(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a rider on a bicycle: the bicycle is class bicycle, the person class rider."""
    parts = _bicycle(canvas, thing, rng)
    _add_rider(canvas, thing, rng, parts, saddle=0.92, reach=0.30, hands=1.06, helmet=0.5)
    canvas.cutouts(parts)


def paint_motorcycle(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a motorcycle or scooter: two fat wheels, engine, tank, seat, windshield, lights."""
    sideways = canvas.projection.axes[0]
    figure = _Figure(thing, _cycle_plane(canvas, thing), MOTORCYCLE)
    body, dark = PAINTS[rng.choice(len(PAINTS), p=PAINT_SHARES)], np.array([32.0, 32, 34])
    wide = _Figure(
        thing, sideways, MOTORCYCLE, figure.parts
    )  # visible from the front and from behind
    wide.part(oval((0, 0.32), (0.09, 0.32)), dark)
    for centre in (-0.68, 0.72):
        figure.part(oval((centre, 0.32), (0.32, 0.32), 16), dark)
        figure.part(oval((centre, 0.32), (0.17, 0.17), 12), np.full(3, 130.0))
    engine = np.array([[-0.45, 0.3], [0.42, 0.26], [0.5, 0.6], [-0.4, 0.62]])
    figure.part(engine, dark * 1.9)
    tank_and_seat = np.array([
        [-0.9, 0.66], [-0.2, 0.56], [0.45, 0.62], [0.5, 0.95], [0.1, 0.98], [-0.3, 0.78],
        [-0.85, 0.84],
    ])  # fmt: skip
    figure.part(tank_and_seat, body)
    figure.limb([0.72, 0.32], [0.48, 1.0], 0.09, dark)
    shield = np.array([[-0.2, 0.45], [0.2, 0.45], [0.26, 0.85], [-0.26, 0.85]])
    wide.part(shield, body * 0.9)
    wide.limb([-0.36, 1.02], [0.36, 1.02], 0.06, dark)
    canvas.cutouts(figure.parts)
    toward = math.cos(thing.heading) < 0
    light = np.array(HEADLIGHT if toward else TAILLIGHT)
    lamp = on_plane(oval((0, 0.8), (0.09, 0.08), 8), thing.foot, sideways)
    canvas.surface(lamp, as_colour(light * 0.8), MOTORCYCLE, glow=as_colour(light))


def paint_motorcyclist(canvas: Canvas, thing: Thing, rng: np.random.Generator) -> None:
    """Paints a motorcycle and its rider."""
    paint_motorcycle(canvas, thing, rng)
    parts: list[Cutout] = []
    _add_rider(canvas, thing, rng, parts, saddle=0.84, reach=0.42, hands=1.04, helmet=1.0)
    canvas.cutouts(parts)


def _add_rider(
    canvas: Canvas,
    thing: Thing,
    rng: np.random.Generator,
    parts: list[Cutout],
    saddle: float,
    reach: float,
    hands: float,
    helmet: float,
) -> None:
    """Adds a seated person: legs to the pedals, back bent towards the bars."""
    plane, sideways = _cycle_plane(canvas, thing), canvas.projection.axes[0]
    figure = _Figure(thing, plane, RIDER, parts)
    wide = _Figure(thing, sideways, RIDER, parts)
    coat, trousers = _clothes(rng), _clothes(rng) * 0.8
    skin = SKINS[rng.integers(len(SKINS))]
    if rng.random() < 0.15:
        coat = np.array([206.0, 226, 40])  # high visibility
    hip, shoulder = np.array([-0.2, saddle + 0.04]), np.array([0.1, saddle + 0.56])
    for offset, pedal in ((-0.12, (0.05, 0.14)), (0.12, (-0.15, 0.42))):
        knee = np.array([0.22, (saddle + pedal[1]) / 2 + 0.12])
        figure.limb(hip, knee, 0.17, trousers * 0.9)
        figure.limb(knee, pedal, 0.13, trousers)
        wide.limb([offset * 0.8, saddle], [offset, pedal[1]], 0.14, trousers)
    figure.limb(hip, shoulder, 0.30, coat * 0.92, 1.0)
    torso = np.array([
        [-0.16, saddle - 0.05], [0.16, saddle - 0.05], [0.22, saddle + 0.5], [0.1, saddle + 0.6],
        [-0.1, saddle + 0.6], [-0.22, saddle + 0.5],
    ])  # fmt: skip
    wide.part(torso, coat)
    for sign in (-1, 1):
        wide.limb([sign * 0.2, saddle + 0.48], [sign * 0.28, hands], 0.1, coat * 0.85)
    figure.limb(shoulder, [reach, hands], 0.1, coat * 0.85)
    head = _Figure(thing, sideways, RIDER, parts)
    head.foot = head.foot + plane * (0.14 if abs(float(plane @ sideways)) > 0.3 else 0.0)
    top = saddle + 0.76
    head.part(oval((0, top), (0.1, 0.13)), skin)
    colour = rng.uniform(20, 230, 3) if rng.random() < helmet else np.array([44.0, 34, 28])
    head.part(oval((0, top + 0.05), (0.115, 0.1 if helmet < 1 else 0.13)), colour)
