"""Describes a built-in street in metres: camera, strips of ground, and things.

The world has x to the right, y up and z along the street, with the ground at y = 0 and the camera
above the origin. A street is a parabola: its centre line is at ``x = bend / 2 * s**2`` for the
length s (read as z), and everything is placed by s and by its lateral offset from that line. A
scene says where things are and how they look; it knows neither pictures nor weather, so that one
scene can be painted under every domain.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN = range(8)
VEGETATION, TERRAIN, SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(8, 19)
VOID = 255

VISIBLE = 170.0  # metres of street that are built; a skyline closes the street behind them
Colour = tuple[float, float, float]
UP = np.array([0.0, 1.0, 0.0])


@dataclass(frozen=True)
class Camera:
    """A pinhole camera on a car.

    Attributes:
        field_of_view: Horizontal opening angle in radians.
        height: Metres above the ground.
        lateral: Metres right of the street's centre line.
        pitch: Radians, positive looks down.
        yaw: Radians, positive looks right.
        hood: Share of the picture's height that the own car's hood covers (0: out of view).
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
        x, z: The frame's origin on the ground.
        heading: Radians from the z axis towards x.
        length, width, height: Extent in metres; each model decides how to use it.
        distance: Painting order, farthest first.
        side: +1 or -1 where left and right differ (a house front looks towards the street).
        seed: Decides everything else about its appearance.
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

    @property
    def foot(self) -> np.ndarray:
        """The frame's origin in the world, (3,)."""
        return np.array([self.x, 0.0, self.z])

    def direction(
        self, along: float = 0.0, across: float = 0.0, up: float = 0.0
    ) -> tuple[float, float, float]:
        """Converts a direction in the thing's frame to a world vector."""
        sin, cos = math.sin(self.heading), math.cos(self.heading)
        return along * sin + across * cos, up, along * cos - across * sin

    def place(self, local: ArrayLike) -> np.ndarray:
        """Converts local points (..., 3) to world coordinates (..., 3)."""
        points = np.asarray(local, dtype=np.float64)
        sin, cos = math.sin(self.heading), math.cos(self.heading)
        along, across, up = points[..., 0], points[..., 1], points[..., 2]
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
        sun: Unit vector towards the sun, or None under a closed cloud cover.
        clouds: Share of the sky that clouds cover, 0..1.
        tracks: Bands that wheels keep free when snow lies.
        mood: The camera's white balance (3 gains), gamma, and grain (standard deviation, 0..255).
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
        """Returns world points (..., 3) on the ground at length ``s`` and lateral ``offset``."""
        s, offset = np.broadcast_arrays(np.asarray(s, float), np.asarray(offset, float))
        heading = np.arctan(self.bend * s)
        x = self.bend / 2 * s**2 + offset * np.cos(heading)
        return np.stack([x, np.zeros_like(x), s - offset * np.sin(heading)], axis=-1)


@dataclass
class Draft:
    """A scene that is being drawn, and the street that its things stand along.

    Attributes:
        scene: The scene, which grows.
        rng: Draws everything.
        drive: +1 for right-hand traffic, -1 for left-hand traffic.
        lanes: Number of lanes in each direction.
        lane: Width of a lane in metres.
        tram: Whether rails lie in the middle of the street.
        kerbs: Lateral offset of the kerb on each side (-1 left, +1 right).
        gaps: Start and end of the side street, in metres, on each side that has one.
    """

    scene: Scene
    rng: np.random.Generator
    drive: int
    lanes: int
    lane: float
    tram: bool
    kerbs: dict[int, float]
    gaps: dict[int, tuple[float, float]] = field(default_factory=dict)

    def free(self, side: int, s: float) -> bool:
        """Whether a thing at length ``s`` is off the camera and the side street."""
        if side in self.gaps and self.gaps[side][0] - 1 < s < self.gaps[side][1] + 1:
            return False
        return s > 3

    def add(
        self,
        kind: str,
        s: float,
        offset: float,
        size: tuple[float, float, float],
        turn: float = 0.0,
        side: int = 1,
        reach: float = 0.0,
    ) -> None:
        """Puts a thing on the street.

        Args:
            kind: A key of ``models.MODELS``.
            s: Length along the street of the frame's origin, metres.
            offset: Lateral offset of the frame's origin, metres.
            size: Length, width, height in metres.
            turn: Heading relative to the street, radians.
            side: See `Thing`.
            reach: Metres added to the painting distance: a long front that begins at ``s`` hides
                things beyond its far end, and nothing beside it.
        """
        x, _, z = self.scene.street(s, offset).tolist()
        heading = math.atan(self.scene.bend * s) + turn
        distance = s + reach + 0.5 * abs(offset - self.scene.camera.lateral)
        seed = int(self.rng.integers(1 << 31))
        self.scene.things.append(Thing(kind, x, z, heading, *size, distance, seed, side))

    def add_vehicle(
        self,
        kind: str,
        rear: float,
        offset: float,
        size: tuple[float, float, float],
        direction: int,
        turn: float = 0.0,
    ) -> None:
        """Puts a vehicle on the street from length ``rear``; ``direction`` -1 drives to the camera.

        The other arguments are those of :meth:`add`; ``turn`` is relative to the direction.
        """
        turn += 0.0 if direction > 0 else math.pi
        self.add(kind, rear + size[0] / 2, offset, size, turn, reach=-size[0] / 2)


def on_plane(flat: np.ndarray, origin: np.ndarray, along: ArrayLike) -> np.ndarray:
    """Converts metres (..., 2) along and up an upright plane to world points (..., 3)."""
    return origin + flat[..., :1] * np.asarray(along) + flat[..., 1:] * UP


def grey(rng: np.random.Generator, low: float, high: float, tint: float = 4.0) -> Colour:
    """Draws a grey between two levels (0..255) with a slight tint."""
    level = rng.uniform(low, high) + rng.normal(0, tint, 3)
    return as_colour(np.clip(level, 0, 255))


def as_colour(values: np.ndarray) -> Colour:
    """Returns an array (3,) as a tuple of floats."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def shaded(colour: Colour, share: float) -> Colour:
    """Returns a colour multiplied by ``share``."""
    return colour[0] * share, colour[1] * share, colour[2] * share
