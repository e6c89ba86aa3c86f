"""Adds a scene's traffic: parked vehicles, a junction, moving vehicles, riders, the tram."""

import math

import numpy as np

from .world import ROAD, Draft, Strip, grey

# Length, width, height in metres. A van counts as a car, as in Cityscapes.
VEHICLES = {
    "car": (4.3, 1.78, 1.48),
    "van": (5.0, 1.95, 2.2),
    "truck": (7.5, 2.4, 3.2),
    "bus": (11.5, 2.55, 3.2),
    "train": (26.0, 2.4, 3.5),
}


def _vehicle_size(rng: np.random.Generator, kind: str) -> tuple[float, float, float]:
    length, width, height = VEHICLES[kind]
    scale = rng.uniform(0.88, 1.1, 3)
    return float(length * scale[0]), float(width * (0.5 + scale[1] / 2)), float(height * scale[2])


def add_parked(draft: Draft, side: int) -> None:
    """Adds a row of parked vehicles along a kerb, which face as the traffic beside them."""
    rng, gap = draft.rng, draft.gaps.get(side)
    offset, direction = draft.kerbs[side] - side * 1.05, side * draft.drive
    s, filled = rng.uniform(1, 8), rng.uniform(0.25, 0.95)
    while s < 130:
        kind = str(rng.choice(["car", "van", "truck"], p=[0.87, 0.09, 0.04]))
        size = _vehicle_size(rng, kind)
        blocked = gap is not None and gap[0] - 7 < s < gap[1] + 4
        if rng.random() < filled and not blocked:
            if rng.random() < 0.16 and s > 5:
                for place in np.arange(s, s + size[0], 1.3):
                    turn = direction * math.pi / 2 + rng.normal(0, 0.35)
                    draft.add("motorcycle", place, offset, (2.1, 0.7, 1.15), turn)
            elif s + size[0] / 2 > 4.5:
                draft.add_vehicle(kind, s, offset, size, direction)
        s += size[0] + rng.uniform(0.6, 1.6)


def add_junction(draft: Draft, s: float, crossing: float) -> None:
    """Adds a zebra or stop line, traffic lights, and people who cross.

    Args:
        draft: The scene.
        s: Length along the street where the side street begins, metres.
        crossing: Width of the side street in metres.
    """
    rng, kerbs, drive, strips = draft.rng, draft.kerbs, draft.drive, draft.scene.strips
    paint = grey(rng, 190, 240, 3)
    left, right = kerbs[-1], kerbs[1]
    if rng.random() < 0.6:
        for offset in np.arange(left + 0.3, right - 0.5, 1.0):
            strips.append(Strip(offset, offset + 0.5, s - 5.5, s - 2.5, ROAD, paint))
        for _ in range(int(rng.poisson(1.5))):
            at, offset = s - rng.uniform(2.5, 5.5), rng.uniform(left, right)
            size = (0.5, 0.5, rng.normal(1.71, 0.1))
            draft.add("person", at, offset, size, rng.choice([-1, 1]) * math.pi / 2)
    inner, outer = sorted((0.2 * drive, kerbs[drive] * 0.98))
    strips.append(Strip(inner, outer, s - 7.0, s - 6.6, ROAD, paint))
    if rng.random() < 0.75:
        for at, side in ((s - 6.2, drive), (s - 6.2, -drive), (s + crossing + 1, drive)):
            if at > 5 and rng.random() < 0.85:
                size = (0, 0.44, rng.uniform(2.9, 3.6))
                draft.add("traffic_light", at, kerbs[side] + side * 0.5, size, side=side)


def add_traffic(draft: Draft) -> None:
    """Adds moving vehicles lane by lane, then riders near the kerb, then the tram on its rails."""
    rng, drive, lanes, lane = draft.rng, draft.drive, draft.lanes, draft.lane
    tram_s = float(rng.uniform(14, 55)) if draft.tram and rng.random() < 0.9 else None
    tram_direction = int(rng.choice([-1, 1]))
    density = rng.uniform(10, 50)  # mean gap in metres
    for direction in (-1, 1):
        for index in range(lanes):
            offset = direction * drive * lane * (index + 0.5)
            own = abs(offset - draft.scene.camera.lateral) < lane / 2
            first = rng.uniform(9, 22) if own else rng.uniform(3, 12)
            taken = None
            if tram_s is not None and index == 0 and direction == tram_direction:
                taken = (tram_s - 6, tram_s + 34)
            _add_lane(draft, offset, direction, first, density, taken)
    for direction in (-1, 1):
        for _ in range(int(rng.poisson(1.1))):
            s = 6 + rng.exponential(20)
            kerb = draft.kerbs[direction * drive]
            inside = rng.uniform(0.7, 1.1) + (2.1 if abs(kerb) > lanes * lane + 1 else 0.0)
            kind = "cyclist" if rng.random() < 0.75 else "motorcyclist"
            offset = kerb - math.copysign(inside, kerb)
            turn = 0.0 if direction > 0 else math.pi
            draft.add(kind, s, offset, (1.75, 0.55, 1.75), turn)
    if tram_s is not None:
        size = _vehicle_size(rng, "train")
        draft.add_vehicle("train", tram_s, tram_direction * drive * 1.7, size, tram_direction)


def _add_lane(
    draft: Draft,
    offset: float,
    direction: int,
    first: float,
    density: float,
    taken: tuple[float, float] | None,
) -> None:
    """Adds the moving vehicles of one lane from length ``first``, except where it is taken."""
    rng = draft.rng
    s = first + rng.exponential(density / 2)
    kinds, shares = ["car", "van", "truck", "bus", "motorcyclist"], [0.66, 0.09, 0.11, 0.09, 0.05]
    while s < 150:
        kind = str(rng.choice(kinds, p=shares))
        size = (2.1, 0.7, 1.75) if kind == "motorcyclist" else _vehicle_size(rng, kind)
        if taken is None or s + size[0] <= taken[0] or s >= taken[1]:
            turn, across = rng.normal(0, 0.02), offset + rng.normal(0, 0.15)
            draft.add_vehicle(kind, s, across, size, direction, turn)
        s += size[0] + 2 + rng.exponential(density)
