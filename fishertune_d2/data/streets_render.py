"""From a street scene to a picture: projection, painting far to near, label and depth.

Everything is painted twice as large as wanted. The colour is then averaged over 2 x 2 pixels, the
label is taken from one of them: edges are smooth in the picture and crisp in the label. Beside the
colour, the canvas keeps the number of the surface at every pixel, and for every surface its class
and its plane. The inverse depth of a plane is affine in the pixel coordinates, so that label, depth
and world position of every pixel follow from that one number.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from fishertune_d2.data.streets_models import MODELS, SHADOWLESS
from fishertune_d2.data.streets_scene import (
    BUILDING, FENCE, POLE, ROAD, SIDEWALK, SKY, TERRAIN, VEGETATION, VISIBLE, VOID, WALL,
    Camera, Colour, Scene, Strip, Thing,
)

NEAR = 0.4  # metres; what is closer to the camera is cut off
SCALE = 2  # supersampling
SUBPIXEL_BITS = 4  # of the coordinates that OpenCV is given
# How much of a surface that faces up is covered when snow lies, per class; others: 0.85.
SNOW_COVER = {ROAD: 0.72, SIDEWALK: 0.9, TERRAIN: 0.97, VEGETATION: 0.8}
SNOW: Colour = (228, 232, 240)
# Strength of the surface texture, per class; others: 0.03.
ROUGHNESS = {ROAD: 0.13, SIDEWALK: 0.13, BUILDING: 0.10, WALL: 0.16, FENCE: 0.08, POLE: 0.05,
             VEGETATION: 0.42, TERRAIN: 0.25}


@dataclass(frozen=True)
class Look:
    """What of a domain must be known while painting; the rest happens afterwards.

    Attributes:
        sunny: the scene's sun, if it has one, shines and casts shadows.
        zenith, horizon, cloud: colours of the sky.
        cover: least share of clouds, 0..1.
        lamps: lights are on (painted into a separate picture of what glows).
        snow: snow lies.
    """

    sunny: bool
    zenith: Colour
    horizon: Colour
    cloud: Colour
    cover: float
    lamps: bool = False
    snow: bool = False


@dataclass
class Painting:
    """A painted scene.

    Attributes:
        colour: (H, W, 3) float32, 0..255, as under the look's light, without weather.
        glow: (H, W, 3) float32, 0..255, what shines by itself; zeros where lamps are off.
        label: (H, W) uint8 train ids, 255 for the hood.
        depth: (H, W) float32, metres along the optical axis; infinite in the sky.
        world: (H, W, 3) float32, the world point at each pixel (far away in the sky).
        up: (H, W) bool, the surface faces up.
    """

    colour: np.ndarray
    glow: np.ndarray
    label: np.ndarray
    depth: np.ndarray
    world: np.ndarray
    up: np.ndarray


class Projection:
    """The pinhole camera at a picture size; pixel centres have integer coordinates.

    Args:
        camera: position, direction and opening angle.
        size: width and height of the picture in pixels.
    """

    def __init__(self, camera: Camera, size: tuple[int, int]) -> None:
        self.size = size
        self.focal = size[0] / 2 / math.tan(camera.field_of_view / 2)
        self.centre = ((size[0] - 1) / 2, (size[1] - 1) / 2)
        self.position = np.array([camera.lateral, camera.height, 0.0])
        sp, cp = math.sin(camera.pitch), math.cos(camera.pitch)
        sy, cy = math.sin(camera.yaw), math.cos(camera.yaw)
        # Rows: the camera's right, down and forward in world coordinates.
        self.axes = np.array([[cy, 0, -sy], [-sy * sp, -cp, -cy * sp], [sy * cp, -sp, cy * cp]])

    @property
    def horizon(self) -> float:
        """The row on which a flat ground vanishes."""
        down, forward = self.axes[1], self.axes[2]
        level = np.array([forward[0], 0, forward[2]])
        return self.centre[1] + self.focal * float(down @ level / (forward @ level))

    def to_camera(self, points: np.ndarray) -> np.ndarray:
        """World points (..., 3) as (right, down, forward) from the camera, in metres."""
        return (points - self.position) @ self.axes.T

    def to_pixels(self, seen: np.ndarray) -> np.ndarray:
        """Camera points (..., 3) with positive depth as pixel coordinates (..., 2), x then y."""
        return seen[..., :2] * (self.focal / seen[..., 2:]) + self.centre

    def rays(self) -> tuple[np.ndarray, np.ndarray]:
        """(1, W) and (H, 1) float32: right and down per unit of depth for columns and rows."""
        x = (np.arange(self.size[0], dtype=np.float32) - self.centre[0]) / self.focal
        y = (np.arange(self.size[1], dtype=np.float32) - self.centre[1]) / self.focal
        return x[None, :].astype(np.float32), y[:, None].astype(np.float32)


def clip_near(seen: np.ndarray) -> np.ndarray:
    """The part of a polygon (N, 3) in camera coordinates that lies beyond the near plane."""
    kept = []
    for here, after in zip(seen, np.roll(seen, -1, axis=0), strict=True):
        inside, next_inside = here[2] >= NEAR, after[2] >= NEAR
        if inside:
            kept.append(here)
        if inside != next_inside:
            kept.append(here + (after - here) * ((NEAR - here[2]) / (after[2] - here[2])))
    return np.array(kept).reshape(-1, 3)


class Canvas:
    """What models paint on: surfaces, which are labelled, and details on them, which are not.

    Args:
        projection: of the wanted picture.
        scene, look: sky, sun and snow.
        mirrored: paint the scene as the ground would mirror it (each point below the ground as
            far as it is above), for wet roads.
    """

    def __init__(self, projection: Projection, scene: Scene, look: Look,
                 mirrored: bool = False) -> None:
        width, height = projection.size
        self.projection, self.look, self.mirrored = projection, look, mirrored
        self.seed = scene.seed
        self.sun = np.array(scene.sun) if look.sunny and scene.sun is not None else None
        self.eye = projection.position * ((1, -1, 1) if mirrored else (1, 1, 1))
        sky = paint_sky(projection, scene, look, mirrored)
        self.colour = cv2.resize(sky, (width * SCALE, height * SCALE))
        self.ids = np.zeros(self.colour.shape[:2], np.int32)
        self.glow = np.zeros_like(self.colour) if look.lamps else None
        self.classes, self.planes, self.faces_up = [SKY], [(0.0, 0.0, 1e-4)], [False]

    def shade(self, normal: tuple[float, float, float] | None) -> np.ndarray:
        """The light (3,) on a surface with this world normal (None: round or facing anywhere)."""
        if normal is None:
            normal, soften = (0.0, 0.3, -0.4), 0.5
        else:
            soften = 0.0
        ambient = 0.80 + 0.17 * normal[1] + 0.07 * normal[0] - 0.04 * normal[2]
        if self.sun is None:
            return np.full(3, ambient)
        direct = max(0.0, float(np.dot(normal, self.sun))) * (1 - soften) + 0.4 * soften
        return ambient * np.array([0.56, 0.60, 0.68]) + direct * np.array([0.82, 0.76, 0.66])

    def surface(self, points: np.ndarray, colour: Colour | None, label: int,
                normal: tuple[float, float, float] | None = None, convex: bool = True,
                glow: Colour | None = None) -> np.ndarray | None:
        """Paint a flat polygon.

        Args:
            points: (N, 3) world coordinates in order around the polygon.
            colour: under white light; None leaves the picture as it is (a see-through fence).
            label: train id.
            normal: unit normal in the world. The polygon is left out if it looks away.
            convex: False costs a little more.
            glow: what it emits when lamps are on.

        Returns:
            The light (3,) that fell on it, for its details, or None if it is not in view.
        """
        points = np.asarray(points, dtype=np.float64)
        if normal is not None and float(np.dot(normal, self.eye - points[0])) <= 0:
            return None
        seen = self._see(points)
        if seen[:, 2].min() < NEAR:
            seen = clip_near(seen)
            if len(seen) < 3:
                return None
        pixels = self._pixels(seen)
        if self._outside(pixels):
            return None
        shade = self.shade(normal)
        fill = cv2.fillConvexPoly if convex else _fill
        up = normal is not None and normal[1] > 0.3
        if colour is not None:
            if up and self.look.snow and label != VOID:
                cover = SNOW_COVER.get(label, 0.85)
                colour = np.array(colour) * (1 - cover) + np.array(SNOW) * cover
            lit = np.minimum(np.asarray(colour) * shade, 255).tolist()
            fill(self.colour, pixels, lit, shift=SUBPIXEL_BITS)
        if self.glow is not None:
            fill(self.glow, pixels, glow or (0, 0, 0), shift=SUBPIXEL_BITS)
        fill(self.ids, pixels, len(self.classes), shift=SUBPIXEL_BITS)
        self.classes.append(label)
        self.planes.append(_inverse_depth(seen))
        self.faces_up.append(up)
        return shade

    def details(self, polygons: np.ndarray, colours: np.ndarray, shade: np.ndarray,
                glow: np.ndarray | None = None) -> None:
        """Paint convex polygons on the surface painted last; its label and depth hold for them.

        Args:
            polygons: (M, N, 3) world coordinates; those that reach behind the camera are left out.
            colours: (M, 3) or (3,) under white light.
            shade: the light (3,) on them.
            glow: (M, 3) or (3,) emitted when lamps are on; None: nothing.
        """
        polygons = np.asarray(polygons, dtype=np.float64)
        seen = self._see(polygons)
        ahead = seen[..., 2].min(axis=1) >= NEAR
        if not ahead.any():
            return
        lit = np.minimum(np.broadcast_to(colours, (len(polygons), 3)) * shade, 255)[ahead].tolist()
        pixels = self._pixels(seen[ahead])
        for polygon, colour in zip(pixels, lit, strict=True):
            cv2.fillConvexPoly(self.colour, polygon, colour, shift=SUBPIXEL_BITS)
        if self.glow is not None:
            shine = np.zeros(3) if glow is None else glow
            shine = np.broadcast_to(shine, (len(polygons), 3))[ahead].astype(float).tolist()
            for polygon, colour in zip(pixels, shine, strict=True):
                cv2.fillConvexPoly(self.glow, polygon, colour, shift=SUBPIXEL_BITS)

    def haze(self, points: np.ndarray, colour: Colour, label: int, share: float) -> None:
        """A surface (N, 3), not convex, of which only a share covers what is behind (twigs)."""
        behind = self.colour
        seen = self._see(np.asarray(points, dtype=np.float64))
        if seen[:, 2].min() < NEAR:
            return
        pixels = self._pixels(seen)
        x0, y0 = np.maximum((pixels.min(axis=0) >> SUBPIXEL_BITS) - 1, 0)
        x1, y1 = (pixels.max(axis=0) >> SUBPIXEL_BITS) + 2
        behind = self.colour[y0:y1, x0:x1].copy()
        if behind.size == 0 or self.surface(points, colour, label, convex=False) is None:
            return
        region = self.colour[y0:y1, x0:x1]
        cv2.addWeighted(region, share, behind, 1 - share, 0, dst=region)

    def darken_ground(self, polygons: list[np.ndarray], share: float) -> None:
        """Leave only a share of the light inside convex ground polygons (N, 3): shadows."""
        mask = np.zeros(self.ids.shape, np.uint8)
        for points in polygons:
            seen = self._see(points)
            if seen[:, 2].min() < NEAR:
                seen = clip_near(seen)
            if len(seen) >= 3:
                hull = cv2.convexHull(self._pixels(seen))
                cv2.fillConvexPoly(mask, hull, 255, shift=SUBPIXEL_BITS)
        top = max(int(self.projection.horizon * SCALE), 0)
        if top < len(mask) and mask[top:].any():
            light = 255 - cv2.blur(mask[top:], (5, 5)) * (1 - share)
            ground = self.colour[top:]
            light = cv2.merge([light.astype(np.uint8)] * 3)
            cv2.multiply(ground, light, dst=ground, scale=1 / 255)

    def finish(self) -> Painting:
        """Scale down; look up label, depth and world position; add the surfaces' texture."""
        width, height = self.projection.size
        colour = cv2.resize(self.colour, (width, height), interpolation=cv2.INTER_AREA)
        colour = colour.astype(np.float32)
        glow = np.zeros_like(colour)
        if self.glow is not None:
            glow = cv2.resize(self.glow, (width, height), interpolation=cv2.INTER_AREA)
            glow = glow.astype(np.float32)
        ids = self.ids[::SCALE, ::SCALE]
        label = np.array(self.classes, np.uint8)[ids]
        planes = np.array(self.planes, np.float32)
        x, y = self.projection.rays()
        inverse = planes[:, 0][ids] * x + planes[:, 1][ids] * y + planes[:, 2][ids]
        depth = 1 / np.clip(inverse, 1e-4, 1 / NEAR)
        axes = self.projection.axes.astype(np.float32)
        world = np.stack(
            [depth * (axes[0, k] * x + axes[1, k] * y + axes[2, k])
             + np.float32(self.projection.position[k]) for k in range(3)], axis=-1)
        up = np.array(self.faces_up)[ids]
        painting = Painting(colour, glow, label, depth, world, up)
        _add_texture(painting, self.seed)
        depth[label == SKY] = np.inf
        return painting

    def _see(self, points: np.ndarray) -> np.ndarray:
        return self.projection.to_camera(points * (1, -1, 1) if self.mirrored else points)

    def _pixels(self, seen: np.ndarray) -> np.ndarray:
        """Camera points as OpenCV's fixed-point coordinates on the enlarged canvas."""
        enlarged = self.projection.to_pixels(seen) * SCALE + (SCALE - 1) / 2
        return np.rint(np.clip(enlarged, -3e4, 3e4) * (1 << SUBPIXEL_BITS)).astype(np.int32)

    def _outside(self, pixels: np.ndarray) -> bool:
        low, high = pixels.min(axis=0) >> SUBPIXEL_BITS, pixels.max(axis=0) >> SUBPIXEL_BITS
        rows, columns = self.ids.shape
        return high[0] < 0 or high[1] < 0 or low[0] >= columns or low[1] >= rows


def _fill(picture: np.ndarray, pixels: np.ndarray, colour: Colour, shift: int) -> None:
    cv2.fillPoly(picture, [pixels], colour, shift=shift)


def _inverse_depth(seen: np.ndarray) -> tuple[float, float, float]:
    """The plane n . P = d of a polygon (N, 3) as n / d: 1 / depth = (n / d) . (x, y, 1).

    Newell's normal, which any order of vertices and any vertex on a line leaves well defined. A
    polygon seen edge-on gets the mean depth instead.
    """
    after = np.roll(seen, -1, axis=0)
    normal = [float(np.dot(seen[:, i] - after[:, i], seen[:, j] + after[:, j]))
              for i, j in ((1, 2), (2, 0), (0, 1))]
    centre = seen.mean(axis=0)
    size = math.sqrt(sum(v * v for v in normal))
    offset = sum(n * c for n, c in zip(normal, centre.tolist(), strict=True))
    if size == 0 or abs(offset) < 1e-3 * size:
        return 0.0, 0.0, 1 / float(centre[2])
    return normal[0] / offset, normal[1] / offset, normal[2] / offset


@lru_cache(maxsize=4)
def noise_tile(roughness: float, seed: int, side: int = 512) -> np.ndarray:
    """(side, side) float32 noise that tiles, zero mean, unit deviation, spectrum 1 / f^roughness."""
    white = np.random.default_rng(seed).normal(size=(side, side))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None, :])
    frequency[0, 0] = np.inf
    tile = np.fft.ifft2(np.fft.fft2(white) / frequency**roughness).real
    return (tile / tile.std()).astype(np.float32)


def _add_texture(painting: Painting, seed: int) -> None:
    """Multiply every surface by noise that is fixed in the world: stains, and grain up close."""
    strength = np.full(256, 0.03, np.float32)
    for label, value in ROUGHNESS.items():
        strength[label] = value
    strength[[SKY, VOID]] = 0
    world, depth = painting.world, painting.depth
    # Walls of any direction are covered by x + z against y, the ground by x against z.
    across = np.where(painting.up, world[..., 0], world[..., 0] + world[..., 2])
    along = np.where(painting.up, world[..., 2], world[..., 1])
    offset = seed % 509

    def sample(tile: np.ndarray, texels_per_metre: float) -> np.ndarray:
        column = (across * texels_per_metre).astype(np.int32) + offset
        row = (along * texels_per_metre).astype(np.int32) + 3 * offset
        return tile[row & 511, column & 511]

    noise = 0.55 * sample(noise_tile(1.3, 1), 5.0)
    noise += sample(noise_tile(0.7, 2), 28.0) * (12 / (12 + depth))
    painting.colour *= (1 + strength[painting.label] * noise)[..., None]


def paint_sky(projection: Projection, scene: Scene, look: Look, mirrored: bool) -> np.ndarray:
    """(H, W, 3) uint8: a gradient from the horizon up, and clouds on a level ceiling."""
    x, y = projection.rays()
    axes = projection.axes.astype(np.float32)
    right, rise, forward = (axes[0, k] * x + axes[1, k] * y + axes[2, k] for k in range(3))
    rise = -rise if mirrored else rise
    height = np.clip(rise / np.sqrt(1 + x * x + y * y), 0, 1)
    blend = np.sqrt(np.clip(height * 1.6, 0, 1))[..., None]
    sky = np.array(look.horizon, np.float32) * (1 - blend)
    sky = sky + np.array(look.zenith, np.float32) * blend
    ceiling = 160 / np.maximum(rise, 0.04)
    column = (right * ceiling).astype(np.int32) + scene.seed * 37
    row = (forward * ceiling).astype(np.int32) + scene.seed * 91
    noise = noise_tile(1.7, 3)[row & 511, column & 511]
    noise = cv2.blur(noise, (5, 3)) + cv2.blur(noise, (31, 9))
    cover = max(scene.clouds, look.cover)
    share = np.clip((noise + 6 * (cover - 0.5)) * 0.6, 0, 1)[..., None]
    cloud = np.array(look.cloud, np.float32) * (1 + 0.07 * np.clip(noise, -2, 2))[..., None]
    return np.clip(sky * (1 - share) + cloud * share, 0, 255).astype(np.uint8)


def paint(scene: Scene, look: Look, size: tuple[int, int]) -> Painting:
    """Paint a scene: ground, shadows, skyline, things from far to near, the car's hood."""
    projection = Projection(scene.camera, size)
    canvas = Canvas(projection, scene, look)
    _paint_ground(canvas, scene)
    _paint_shadows(canvas, scene)
    _paint_things(canvas, scene)
    _paint_hood(canvas, scene)
    return canvas.finish()


def paint_reflection(scene: Scene, look: Look, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) float32: what a mirror in place of the ground would show."""
    canvas = Canvas(Projection(scene.camera, size), scene, look, mirrored=True)
    _paint_things(canvas, scene)
    shown = canvas.colour if canvas.glow is None else cv2.add(canvas.colour, canvas.glow)
    return cv2.resize(shown, size, interpolation=cv2.INTER_AREA).astype(np.float32)


def _paint_ground(canvas: Canvas, scene: Scene) -> None:
    plane = np.array([[-900, 0, 0], [900, 0, 0], [900, 0, 900], [-900, 0, 900]], float)
    up = (0.0, 1.0, 0.0)
    canvas.surface(plane, (108, 112, 84), TERRAIN, up)
    for strip in scene.strips + (scene.tracks if canvas.look.snow else []):
        canvas.surface(_outline(scene, strip), _strip_colour(canvas, scene, strip), strip.label, up,
                       convex=False)


def _strip_colour(canvas: Canvas, scene: Scene, strip: Strip) -> Colour:
    """Fresh paint is hidden by snow as the road is; wheel tracks are slush."""
    if canvas.look.snow and any(strip is track for track in scene.tracks):
        # surface() adds its snow cover; a dark colour leaves the tracks grey.
        return (0.0, 0.0, 0.0)
    return strip.colour


def _outline(scene: Scene, strip: Strip) -> np.ndarray:
    """A strip as a polygon (N, 3); points are dense where a bend would show."""
    count = 2 if scene.bend == 0 else 2 + int((strip.s1 - strip.s0) / 8)
    s = np.linspace(strip.s0, strip.s1, count)
    return np.concatenate([scene.street(s, strip.left), scene.street(s[::-1], strip.right)])


def _paint_shadows(canvas: Canvas, scene: Scene) -> None:
    """Shadows on the ground: cast by the sun, and soft ones where things stand."""
    cast, contact = [], []
    for thing in scene.things:
        if thing.kind in SHADOWLESS or thing.z > 90:
            continue
        foot = _footprint(thing)
        contact.append(foot)
        if canvas.sun is not None:
            away = -canvas.sun * ((thing.height / canvas.sun[1]))
            lifted = foot + np.array([away[0], 0, away[2]])
            if thing.kind in ("tree", "bare_tree"):  # the crown's shadow; the trunk is too thin
                cast.append((foot - foot.mean(axis=0)) * 0.8 + (foot * 0.4 + lifted * 0.6).mean(axis=0))
            else:
                cast.append(np.concatenate([foot, lifted]))
    near = [foot for foot, thing in zip(contact, _shadowed(scene), strict=True)
            if thing.kind not in ("tree", "bare_tree", "house", "shop")]
    canvas.darken_ground(near, 0.55)
    canvas.darken_ground(cast, 0.45)


def _shadowed(scene: Scene) -> list[Thing]:
    return [t for t in scene.things if t.kind not in SHADOWLESS and t.z <= 90]


def _footprint(thing: Thing) -> np.ndarray:
    """(4, 3) corners on the ground. Things with a front begin at their origin, others centre."""
    from_front = thing.kind in ("house", "shop", "wall", "hedge")
    along = (0, thing.length) if from_front else (-thing.length / 2, thing.length / 2)
    half = thing.width / 2
    across = (0, thing.side * thing.width) if from_front else (-half, half)
    return thing.place(np.array([[along[i], across[j], 0] for i, j in
                                 ((0, 0), (1, 0), (1, 1), (0, 1))]))


def _paint_things(canvas: Canvas, scene: Scene) -> None:
    _paint_skyline(canvas, scene)
    for thing in scene.things:
        MODELS[thing.kind](canvas, thing, np.random.default_rng(thing.seed))


def _paint_skyline(canvas: Canvas, scene: Scene) -> None:
    """Roofs and tree tops far away, so that no street runs into the open sky."""
    rng = np.random.default_rng([scene.seed, 1])
    x, built = -330.0, rng.uniform(0.2, 0.8)
    while x < 330:
        width, z = rng.uniform(8, 34), VISIBLE + rng.uniform(30, 60)
        if rng.random() < built:
            top, label = rng.uniform(7, 22), BUILDING
            colour = tuple(rng.uniform(95, 165) + rng.normal(0, 6, 3))
            outline = [[0, 0], [0, top], [0.5, top + rng.uniform(0, 4)], [1, top], [1, 0]]
        else:
            top, label = rng.uniform(5, 15), VEGETATION
            colour = tuple(np.array([82, 96, 66]) * rng.uniform(0.7, 1.2))
            edge = rng.uniform(0.65, 1.0, 9) * np.sin(np.linspace(0.35, math.pi - 0.35, 9)) * top
            outline = [[0, 0], *np.stack([np.linspace(0, 1, 9), edge], 1).tolist(), [1, 0]]
        flat = np.array(outline)
        points = np.stack([x + flat[:, 0] * width * 1.2, flat[:, 1], np.full(len(flat), z)], 1)
        canvas.surface(points, colour, label, convex=False)
        x += width


def _paint_hood(canvas: Canvas, scene: Scene) -> None:
    """The own car's hood at the lower edge: unlabelled, as in Cityscapes."""
    if scene.camera.hood == 0:
        return
    rows, columns = canvas.ids.shape
    share = int(2 * scene.camera.hood * rows)
    rng = np.random.default_rng([scene.seed, 2])
    body = np.minimum(rng.choice([40.0, 90.0, 150.0, 200.0]) * canvas.shade((0, 1, 0)), 230)
    centre, axes = (columns // 2, rows), (int(columns * 0.62), share // 2)
    for picture, value in ((canvas.colour, body.tolist()), (canvas.ids, len(canvas.classes))):
        cv2.ellipse(picture, centre, axes, 0, 0, 360, value, -1)
    if canvas.glow is not None:
        cv2.ellipse(canvas.glow, centre, axes, 0, 0, 360, (0, 0, 0), -1)
    canvas.classes.append(VOID)
    canvas.planes.append((0.0, 0.0, 1.0))
    canvas.faces_up.append(False)
