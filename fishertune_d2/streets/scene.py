"""Draws a street scene from a seed: street, frontage, furniture, traffic, people."""

import math
from dataclasses import dataclass

import numpy as np

from .scene_traffic import add_junction, add_parked, add_traffic
from .world import (
    ROAD,
    SIDEWALK,
    TERRAIN,
    VISIBLE,
    Camera,
    Colour,
    Draft,
    Scene,
    Strip,
    as_colour,
    grey,
    shaded,
)


def draw_scene(seed: int) -> Scene:
    """Draws the scene of a seed: camera, street, frontage, furniture, traffic and people."""
    # One generator per scene decides where everything stands; each thing's own seed decides how it
    # looks.
    rng = np.random.default_rng(seed)
    drive = 1 if rng.random() < 0.5 else -1  # right-hand or left-hand traffic
    lanes = int(rng.choice([1, 1, 1, 2]))
    lane = rng.uniform(2.8, 3.7)
    tram = rng.random() < 0.3
    parking = {side: 2.1 if rng.random() < 0.5 else 0.0 for side in (-1, 1)}
    camera = Camera(
        field_of_view=math.radians(rng.uniform(46, 74)),
        height=rng.uniform(1.2, 1.9),
        lateral=drive * lane * (0.5 + int(rng.integers(lanes))) + rng.normal(0, 0.2),
        pitch=math.radians(rng.uniform(-2.5, 6.0)),
        yaw=math.radians(rng.normal(0, 2.5)),
        hood=rng.uniform(0.03, 0.10) if rng.random() < 0.35 else 0.0,
    )
    scene = Scene(
        seed,
        camera,
        bend=0.0 if rng.random() < 0.35 else float(rng.normal(0, 0.0035)),
        sun=_draw_sun(rng),
        clouds=float(rng.beta(0.8, 0.8)),
        mood=_draw_mood(rng),
    )
    junction = float(rng.uniform(13, 45)) if rng.random() < 0.65 else None
    kerbs = {side: side * (lanes * lane + parking[side]) for side in (-1, 1)}
    crossing = float(rng.uniform(9, 13))
    draft = Draft(scene, rng, drive, lanes, lane, tram, kerbs)
    _add_carriageway(draft)
    for side in (-1, 1):
        if junction is not None and rng.random() < 0.75:
            draft.gaps[side] = (junction, junction + crossing)
        _add_side(draft, side)
        if parking[side]:
            add_parked(draft, side)
    if junction is not None:
        add_junction(draft, junction, crossing)
    add_traffic(draft)
    scene.things.sort(key=lambda thing: -thing.distance)
    return scene


def _draw_mood(rng: np.random.Generator) -> tuple[float, float, float, float, float]:
    """Draws a white balance between warm and cool with little green or magenta, gamma, grain."""
    warm, green = rng.normal(0, 0.04), rng.normal(0, 0.012)
    gamma, grain = rng.uniform(0.8, 1.25), rng.uniform(0.5, 4.0)
    return float(1 + warm), float(1 + green), float(1 - warm), float(gamma), float(grain)


def _draw_sun(rng: np.random.Generator) -> tuple[float, float, float] | None:
    """Draws a direction towards the sun, or None for an overcast day (two in five)."""
    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(15, 60))
    overcast = rng.random() < 0.4
    flat = math.cos(elevation)
    sun = (flat * math.sin(azimuth), math.sin(elevation), flat * math.cos(azimuth))
    return None if overcast else sun


def _add_carriageway(draft: Draft) -> None:
    """Adds road surface, repairs, lane marks, rails, and the tracks that snow leaves free."""
    rng, kerbs, lanes, lane = draft.rng, draft.kerbs, draft.lanes, draft.lane
    asphalt, paint = grey(rng, 62, 125, 3), grey(rng, 185, 240, 4)
    strips = draft.scene.strips
    strips.append(Strip(kerbs[-1], kerbs[1], -4, VISIBLE + 60, ROAD, asphalt))
    for _ in range(int(rng.integers(0, 6))):  # repaired patches
        left = rng.uniform(kerbs[-1], kerbs[1] - 1)
        s = rng.uniform(2, 60)
        shade = as_colour(np.array([v * rng.uniform(0.8, 1.15) for v in asphalt]))
        right = min(left + rng.uniform(0.6, 3), kerbs[1])
        strips.append(Strip(left, right, s, s + rng.uniform(1, 25), ROAD, shade))
    for _ in range(int(rng.integers(0, 3))):  # manhole covers
        left, s = rng.uniform(kerbs[-1] + 0.5, kerbs[1] - 1.2), rng.uniform(4, 25)
        strips.append(Strip(left, left + 0.65, s, s + 0.65, ROAD, (50, 48, 46)))

    def dashes(offset: float, dash: float, space: float, colour: Colour) -> None:
        for s in np.arange(-3 + rng.uniform(0, 3), 120, dash + space):
            strips.append(Strip(offset - 0.07, offset + 0.07, s, s + dash, ROAD, colour))

    def line(offset: float, colour: Colour, width: float = 0.12) -> None:
        strips.append(Strip(offset - width / 2, offset + width / 2, -4, VISIBLE, ROAD, colour))

    if draft.tram:
        for offset in (-2.42, -0.98, 0.98, 2.42):
            line(offset, (88, 84, 80), 0.16)
            line(offset, (168, 168, 172), 0.07)
    elif rng.random() < 0.75:
        if rng.random() < 0.7:
            dashes(0.0, rng.uniform(1.5, 4), rng.uniform(2, 6), paint)
        else:
            line(0.0, paint)
    for index in range(1, lanes):
        for side in (-1, 1):
            dashes(side * index * lane, 3.0, rng.uniform(3, 6), paint)
    yellow = (205, 165, 60) if rng.random() < 0.3 else paint
    for side in (-1, 1):
        if rng.random() < 0.5:
            line(kerbs[side] - side * 0.35, yellow)
            if yellow is not paint:
                line(kerbs[side] - side * 0.6, yellow)
    for index in range(-lanes, lanes):
        middle = (index + 0.5) * lane
        for offset in (middle - 0.75, middle + 0.75):
            # Slush: black under the snow cover that Canvas.surface adds.
            track = Strip(offset - 0.3, offset + 0.3, -4, VISIBLE, ROAD, (0, 0, 0))
            draft.scene.tracks.append(track)


def _add_side(draft: Draft, side: int) -> None:
    """Adds kerb, verge, sidewalk, frontage and furniture of one side of the street."""
    rng, kerb, strips = draft.rng, draft.kerbs[side], draft.scene.strips
    verge = rng.uniform(0.8, 2.6) if rng.random() < 0.4 else 0.0
    walk = rng.uniform(1.6, 4.5)
    front = kerb + side * (0.15 + verge + walk)
    stone = grey(rng, 115, 185, 4)
    paving = as_colour(np.array(stone) * rng.normal([1.02, 1.0, 0.98], 0.02))
    grass = _draw_grass(rng)

    def band(inner: float, outer: float, s0: float, s1: float, label: int, c: Colour) -> None:
        strips.append(Strip(min(inner, outer), max(inner, outer), s0, s1, label, c))

    far = front + side * 90
    band(kerb, far, -4, VISIBLE + 60, SIDEWALK, shaded(paving, 0.93))
    band(kerb, front, -4, VISIBLE + 60, SIDEWALK, paving)
    if rng.random() < 0.6:  # joints between the slabs
        joint = shaded(paving, 0.84)
        for s in np.arange(0, 40, rng.uniform(0.9, 2.4)):
            band(kerb, front, s, s + 0.04, SIDEWALK, joint)
    if verge:
        band(kerb, kerb + side * (0.15 + verge), -4, VISIBLE + 60, TERRAIN, grass)
    band(kerb, kerb + side * 0.15, -4, VISIBLE + 60, SIDEWALK, grey(rng, 135, 200, 3))
    band(kerb, kerb - side * 0.1, -4, VISIBLE + 60, ROAD, (70, 68, 66))
    _add_frontage(draft, side, front, grass)
    _add_furniture(draft, side, trees_wanted=bool(verge))
    _add_bicycles_and_people(draft, side, kerb + side * (0.15 + verge), front)
    if side in draft.gaps:  # the side street covers the side's bands
        start, end = draft.gaps[side]
        band(kerb, far, start - 2, end + 2, SIDEWALK, paving)
        band(kerb - side * 0.2, far, start, end, ROAD, strips[0].colour)


def _draw_grass(rng: np.random.Generator) -> Colour:
    """Draws a colour between lush grass, dry grass and bare earth."""
    lush, dry, earth = np.array([88, 122, 52]), np.array([150, 142, 84]), np.array([120, 98, 72])
    weights = rng.dirichlet([2.2, 0.9, 0.5])
    mixed = (weights[0] * lush + weights[1] * dry + weights[2] * earth) * rng.uniform(0.75, 1.15)
    return as_colour(mixed)


def _add_frontage(draft: Draft, side: int, front: float, grass: Colour) -> None:
    """Adds houses, gardens, parks and walls in a row along the sidewalk."""
    rng, gap = draft.rng, draft.gaps.get(side)
    town, suburb = rng.dirichlet([1.6, 1.0, 0.7])[:2]
    storeys = rng.uniform(2, 5.5)
    style = int(rng.integers(1 << 16))  # neighbours share a style, within limits
    s = -14.0 + rng.uniform(0, 6)
    while s < VISIBLE:
        length = float(rng.uniform(7, 22))
        if gap is not None and gap[0] - 2 < s + length and s < gap[1] + 2:
            length = gap[0] - 2 - s
            if length < 4:
                s = gap[1] + 2
                continue
        choice = rng.random()
        height = float(np.clip(rng.normal(storeys, 1.2), 1, 9)) * rng.uniform(2.8, 3.5)
        plot = _Plot(side, front, s, length, height)
        if choice < town:
            _add_town_house(draft, plot, style)
        else:
            _add_garden(draft, plot, 8.0 if choice < town + suburb else 70.0, grass)
        s += length + (rng.uniform(1, 4) if rng.random() < 0.12 else 0.0)


@dataclass(frozen=True)
class _Plot:
    """A piece of land along the sidewalk, from s to s + length, with a building height."""

    side: int
    front: float
    s: float
    length: float
    height: float


def _add_town_house(draft: Draft, plot: _Plot, style: int) -> None:
    """Adds a house or a shop that stands at the sidewalk."""
    rng = draft.rng
    setback = float(rng.choice([0.0, 0.0, rng.uniform(0, 1.5)]))
    kind = "shop" if (style % 3 != 0 and rng.random() < 0.6) else "house"
    size = (plot.length, float(rng.uniform(8, 14)), plot.height)
    offset = plot.front + plot.side * setback
    draft.add(kind, plot.s, offset, size, side=plot.side, reach=plot.length)


def _add_garden(draft: Draft, plot: _Plot, deep: float, grass: Colour) -> None:
    """Adds a garden with a house, or a park if the plot is deep, with boundary and trees."""
    rng, side, front, s, length = draft.rng, plot.side, plot.front, plot.s, plot.length
    setback = float(rng.uniform(2.5, 7))
    near, outer = sorted((front, front + side * deep))
    draft.scene.strips.append(Strip(near, outer, s, s + length, TERRAIN, grass))
    boundary = str(rng.choice(["wall", "fence", "hedge", "fence", "wall", "none"]))
    if boundary != "none":
        size = (length, 0.3, float(rng.uniform(0.7, 2.4)))
        draft.add(boundary, s, front + side * 0.3, size, side=side, reach=length)
    garden = deep < 10
    if garden:
        size = (max(length - 1.6, 4), 9.0, min(plot.height, 10))
        draft.add("house", s + 0.8, front + side * setback, size, side=side, reach=length)
    for _ in range(int(rng.integers(0, 3 if garden else 9))):
        away = rng.uniform(1.5, setback + 1.0 if garden else 26)
        _add_tree(draft, s + rng.uniform(0, length), front + side * away, 0.6)


def _add_tree(draft: Draft, s: float, offset: float, smallest: float = 1.0) -> None:
    """Adds a tree, unless its crown would reach the camera."""
    rng = draft.rng
    height = float(rng.uniform(smallest * 4, 13))
    width = height * rng.uniform(0.4, 0.75)
    if s > 3 + width / 2:
        # The kind follows the scene, not the tree: streets have a season.
        leafless = (draft.scene.seed * 2654435761 >> 7) % 4 == 0
        kind = "bare_tree" if leafless and rng.random() < 0.8 else "tree"
        draft.add(kind, s, offset, (width, width, height))


def _add_furniture(draft: Draft, side: int, trees_wanted: bool) -> None:
    """Adds lamps, trees, signs, bollards, motorcycles and a railing along one kerb."""
    rng, kerb, gap = draft.rng, draft.kerbs[side], draft.gaps.get(side)
    edge = kerb + side * 0.5
    spacing, height = rng.uniform(16, 34), rng.uniform(5, 9)
    arm = float(rng.uniform(0.6, 2.2))
    for s in np.arange(rng.uniform(3, spacing), 140, spacing):
        if draft.free(side, s):
            draft.add("lamp", s, edge, (arm, 0.16, height), side=side)
    if trees_wanted or rng.random() < 0.3:
        spacing = rng.uniform(7, 16)
        for s in np.arange(rng.uniform(2, spacing), 150, spacing):
            if draft.free(side, s) and rng.random() < 0.85:
                _add_tree(draft, s, kerb + side * 0.9)
    for _ in range(int(rng.poisson(3))):
        s = 5 + rng.exponential(16)
        if draft.free(side, s):
            size = (0.0, rng.uniform(0.55, 0.95), rng.uniform(2.1, 3.0))
            draft.add("sign", s, edge, size, rng.normal(0, 0.15), side)
    for _ in range(int(rng.poisson(1.0))):
        s, step = rng.uniform(4, 50), rng.uniform(1.3, 2.5)
        for index in range(int(rng.integers(2, 9))):
            if draft.free(side, s + index * step):
                draft.add("bollard", s + index * step, edge, (0, 0.16, 0.95))
    for _ in range(int(rng.poisson(0.4))):  # some park on the sidewalk
        s = 5 + rng.exponential(12)
        if draft.free(side, s):
            turn = rng.uniform(-1.6, 1.6)
            draft.add("motorcycle", s, kerb + side * 1.0, (2.1, 0.7, 1.15), turn)
    if rng.random() < 0.3:
        s, length = rng.uniform(5, 40), rng.uniform(6, 25)
        beside_gap = gap is None or (s > gap[1]) == (s + length > gap[1])
        if draft.free(side, s) and draft.free(side, s + length) and beside_gap:
            draft.add("fence", s, edge, (length, 0.05, 1.05), side=side)


def _add_bicycles_and_people(draft: Draft, side: int, verge: float, front: float) -> None:
    """Adds parked bicycles and people between the verge and the frontage."""
    rng = draft.rng

    def walkable() -> float:
        return float(rng.uniform(min(verge, front) + 0.4, max(verge, front) - 0.4))

    for _ in range(int(rng.poisson(1.2))):
        s, offset = 4 + rng.exponential(14), walkable()
        for index in range(int(rng.integers(1, 5))):
            at = s + index * 0.8
            if draft.free(side, at):
                turn = rng.uniform(-1.6, 1.6)
                draft.add("bicycle", at, offset, (1.75, 0.5, 1.05), turn)
    for _ in range(int(rng.poisson(rng.choice([2.0, 5.0, 11.0])))):
        s = 4 + rng.exponential(22)
        if s < 110:
            offset, size = walkable(), (0.5, 0.5, rng.normal(1.71, 0.1))
            turn = rng.choice([0, math.pi]) + rng.normal(0, 0.5)
            draft.add("person", s, offset, size, turn)
