"""What is in a built-in street: a description in metres, drawn from a seed.

The world has x to the right, y up and z along the street, with the ground at y = 0 and the camera
above the origin. A street is a parabola: its centre line is at ``x = bend / 2 * s**2`` for the
length s (read as z), and everything is placed by s and by its lateral offset from that line. A
scene says where things are and how they look; it knows neither pictures nor weather, so that one
scene can be painted under every domain.
"""

import math
from dataclasses import dataclass, field

import numpy as np

ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN = range(8)
VEGETATION, TERRAIN, SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(8, 19)
VOID = 255

VISIBLE = 170.0  # metres of street that are built; a skyline closes what lies beyond
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera on a car.

    Attributes:
        field_of_view: horizontal opening angle in radians.
        height: metres above the ground.
        lateral: metres right of the street's centre line.
        pitch: radians, positive looks down.
        yaw: radians, positive looks right.
        hood: share of the picture's height that the own car's hood covers (0: out of view).
    """

    field_of_view: float
    height: float
    lateral: float
    pitch: float
    yaw: float
    hood: float


@dataclass(frozen=True)
class Thing:
    """One object: a kind (a key of ``models.MODELS``) in a frame of its own.

    Local coordinates are (along, across, up) in metres: along the heading, to its right, up.

    Attributes:
        x, z: the frame's origin on the ground.
        heading: radians from the z axis towards x.
        length, width, height: extent in metres; what they span is up to the model.
        distance: painting order, farthest first.
        side: +1 or -1 where left and right differ (a house front looks towards the street).
        seed: everything else about its appearance.
    """

    kind: str
    x: float
    z: float
    heading: float
    length: float
    width: float
    height: float
    distance: float
    seed: int
    side: int = 1

    def place(self, local: np.ndarray) -> np.ndarray:
        """Local points (..., 3) in world coordinates (..., 3)."""
        local = np.asarray(local, dtype=np.float64)
        sin, cos = math.sin(self.heading), math.cos(self.heading)
        along, across, up = local[..., 0], local[..., 1], local[..., 2]
        return np.stack(
            [self.x + along * sin + across * cos, up, self.z + along * cos - across * sin], axis=-1
        )


@dataclass(frozen=True)
class Strip:
    """A band of ground that follows the street, from offset ``left`` to ``right``, s0 to s1."""

    left: float
    right: float
    s0: float
    s1: float
    label: int
    colour: Colour


@dataclass
class Scene:
    """A street scene; the lists of strips are in painting order.

    Attributes:
        sun: unit vector towards the sun, or None under a closed cloud cover.
        clouds: share of the sky that clouds cover, 0..1.
        tracks: bands that wheels keep free when snow lies.
        mood: the camera's white balance (3 gains), gamma, and grain (standard deviation, 0..255).
    """

    seed: int
    camera: Camera
    bend: float
    sun: tuple[float, float, float] | None
    clouds: float
    mood: tuple[float, float, float, float, float]
    strips: list[Strip] = field(default_factory=list)
    tracks: list[Strip] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)

    def street(self, s: np.ndarray | float, offset: np.ndarray | float) -> np.ndarray:
        """World points (..., 3) on the ground at length ``s`` and lateral ``offset``, in metres."""
        s, offset = np.broadcast_arrays(np.asarray(s, float), np.asarray(offset, float))
        heading = np.arctan(self.bend * s)
        x = self.bend / 2 * s**2 + offset * np.cos(heading)
        return np.stack([x, np.zeros_like(x), s - offset * np.sin(heading)], axis=-1)

    def add(
        self,
        rng: np.random.Generator,
        kind: str,
        s: float,
        offset: float,
        size: tuple[float, float, float],
        turn: float = 0.0,
        side: int = 1,
        reach: float = 0.0,
    ) -> None:
        """Put a thing on the street.

        Args:
            rng: gives the thing's seed.
            kind: a key of ``models.MODELS``.
            s: length along the street of the frame's origin, metres.
            offset: its lateral offset, metres.
            size: length, width, height in metres.
            turn: heading relative to the street, radians.
            side: see :class:`Thing`.
            reach: metres added to the painting distance: a long front that begins at ``s`` hides
                what stands beyond its far end, and nothing beside it.
        """
        x, _, z = self.street(s, offset)
        heading = math.atan(self.bend * s) + turn
        distance = s + reach + 0.5 * abs(offset - self.camera.lateral)
        seed = int(rng.integers(1 << 31))
        self.things.append(Thing(kind, float(x), float(z), heading, *size, distance, seed, side))


def grey(rng: np.random.Generator, low: float, high: float, tint: float = 4.0) -> Colour:
    """A grey between two levels (0..255) with a slight random tint."""
    level = rng.uniform(low, high) + rng.normal(0, tint, 3)
    return tuple(float(v) for v in np.clip(level, 0, 255))
