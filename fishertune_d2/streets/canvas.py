"""The canvas of the built-in scenes: a pinhole camera, and polygons painted far to near.

Everything is painted at twice the size of the picture. The colour is then averaged over 2 x 2
pixels and the label is taken from one of them, so that edges are smooth in the picture and crisp in
the label. The canvas also keeps the number of the surface at every pixel, and the class and plane
of every surface. The inverse depth of a plane is affine in the pixel coordinates, so the number
gives the label, depth and world position of every pixel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np

from .world import ROAD, SIDEWALK, SKY, TERRAIN, VEGETATION, VOID, Camera, Colour

NEAR = 0.4  # metres; anything closer to the camera is cut off
SCALE = 2  # supersampling
SUBPIXEL_BITS = 4  # of the coordinates passed to OpenCV
# Share of a surface facing up that snow covers when it lies, per class; others: 0.85.
SNOW_COVER = {ROAD: 0.72, SIDEWALK: 0.9, TERRAIN: 0.97, VEGETATION: 0.8}
SNOW: Colour = (228, 232, 240)

Value = float | Sequence[float]
"""The number of a surface, or a colour."""
Cutout = tuple[np.ndarray, np.ndarray, int]
"""A shape (N, 3) in world coordinates, its colour (3,), and its train id."""


@dataclass
class Painting:
    """A painted scene.

    Attributes:
        colour: (H, W, 3) float32, 0..255, under the look's light, without weather.
        glow: (H, W, 3) float32, 0..255, light that things emit; zeros where lamps are off.
        label: (H, W) uint8 train ids, 255 for the hood.
        depth: (H, W) float32, metres along the optical axis; infinite in the sky.
        world: (H, W, 3) float32, the world point at each pixel (far away in the sky).
        up: (H, W) bool, whether the surface faces up.
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
        camera: Position, direction and opening angle.
        size: Width and height of the picture in pixels.
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
        """The pixel row at which a flat ground vanishes."""
        down, forward = self.axes[1], self.axes[2]
        level = np.array([forward[0], 0, forward[2]])
        return self.centre[1] + self.focal * float(down @ level / (forward @ level))

    def to_camera(self, points: np.ndarray) -> np.ndarray:
        """Converts world points (..., 3) to (right, down, forward) from the camera, in metres."""
        return (points - self.position) @ self.axes.T

    def to_pixels(self, seen: np.ndarray) -> np.ndarray:
        """Converts camera points (..., 3) with positive depth to pixels (..., 2), x then y."""
        return seen[..., :2] * (self.focal / seen[..., 2:]) + self.centre

    def rays(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (1, W) and (H, 1) float32: right and down per unit of depth of each pixel."""
        x = (np.arange(self.size[0], dtype=np.float32) - self.centre[0]) / self.focal
        y = (np.arange(self.size[1], dtype=np.float32) - self.centre[1]) / self.focal
        return x[None, :].astype(np.float32), y[:, None].astype(np.float32)

    def world_rays(self) -> list[np.ndarray]:
        """Returns the x, y and z per unit of depth of each pixel in the world, (H, W) float32."""
        x, y = self.rays()
        axes = self.axes.astype(np.float32)
        return [axes[0, k] * x + axes[1, k] * y + axes[2, k] for k in range(3)]


def clip_near(seen: np.ndarray) -> np.ndarray:
    """Cuts a polygon (N, 3) in camera coordinates at the near plane; returns the far part."""
    if seen[:, 2].min() >= NEAR:
        return seen
    kept = []
    for here, after in zip(seen, np.roll(seen, -1, axis=0), strict=True):
        inside, next_inside = here[2] >= NEAR, after[2] >= NEAR
        if inside:
            kept.append(here)
        if inside != next_inside:
            kept.append(here + (after - here) * ((NEAR - here[2]) / (after[2] - here[2])))
    return np.array(kept).reshape(-1, 3)


class Canvas:
    """Models paint on it: surfaces, which are labelled, and details on them, which are not.

    Args:
        projection: Projection of the picture.
        background: (H, W, 3) uint8, the sky.
        sun: Unit vector towards a sun that shines, or None.
        lamps: Whether a second picture keeps the emitted light.
        snow: Whether snow lies on surfaces that face up.
        mirrored: Whether the scene is painted as the ground would mirror it (each point as far
            below the ground as it is above), for wet roads.
    """

    def __init__(
        self,
        projection: Projection,
        background: np.ndarray,
        sun: np.ndarray | None,
        lamps: bool,
        snow: bool,
        mirrored: bool = False,
    ) -> None:
        width, height = projection.size
        self.projection, self.sun, self.snow, self.mirrored = projection, sun, snow, mirrored
        self.eye = projection.position * ((1, -1, 1) if mirrored else (1, 1, 1))
        self.colour = cv2.resize(background, (width * SCALE, height * SCALE))
        self.ids = np.zeros(self.colour.shape[:2], np.int32)
        self.glow = np.zeros_like(self.colour) if lamps else None
        # Of each surface, by its number; the first is the sky.
        self.classes, self.planes, self.faces_up = [SKY], [(0.0, 0.0, 1e-4)], [False]

    def may_show(self, foot: np.ndarray, reach: float) -> bool:
        """Whether anything within ``reach`` metres beside or behind a ground point can be seen."""
        x, _, z = self.projection.to_camera(foot).tolist()
        half_width = self.projection.size[0] / 2 / self.projection.focal
        return z + reach > NEAR and abs(x) < half_width * (z + reach) + reach

    def shade(self, normal: tuple[float, float, float] | None) -> np.ndarray:
        """Returns the light (3,) on a surface with this world normal (None: a round surface)."""
        soften = 0.5 if normal is None else 0.0
        normal = normal or (0.0, 0.3, -0.4)
        ambient = 0.80 + 0.17 * normal[1] + 0.07 * normal[0] - 0.04 * normal[2]
        if self.sun is None:
            return np.full(3, ambient)
        direct = max(0.0, float(np.dot(normal, self.sun))) * (1 - soften) + 0.4 * soften
        return ambient * np.array([0.56, 0.60, 0.68]) + direct * np.array([0.82, 0.76, 0.66])

    def surface(
        self,
        points: np.ndarray,
        colour: Colour | None,
        label: int,
        normal: tuple[float, float, float] | None = None,
        convex: bool = True,
        glow: Colour | None = None,
    ) -> np.ndarray | None:
        """Paints a flat polygon.

        Args:
            points: (N, 3) world coordinates in order around the polygon.
            colour: Colour under white light; None leaves the picture as it is (a railing).
            label: Train id.
            normal: Unit normal in the world; a polygon that looks away is left out.
            convex: Whether the polygon is convex; False costs a little more.
            glow: Emitted light when lamps are on.

        Returns:
            The light (3,) that fell on it, for its details, or None if it is not in view.
        """
        points = np.asarray(points, dtype=np.float64)
        if normal is not None and float(np.dot(normal, self.eye - points[0])) <= 0:
            return None
        seen = clip_near(self._see(points))
        if len(seen) < 3:
            return None
        pixels = self._pixels(seen)
        if self._outside(pixels):
            return None
        fill = partial(_fill, pixels, convex)
        shade = self.shade(normal)
        up = normal is not None and normal[1] > 0.3
        if colour is not None:
            albedo = np.array(colour)
            if up and self.snow and label != VOID:
                cover = SNOW_COVER.get(label, 0.85)
                albedo = albedo * (1 - cover) + np.array(SNOW) * cover
            fill(self.colour, np.minimum(albedo * shade, 255).tolist())
        self.add(fill, label, _inverse_depth(seen), up, glow or (0, 0, 0))
        return shade

    def add(
        self,
        fill: Callable[[np.ndarray, Value], None],
        label: int,
        plane: tuple[float, float, float],
        up: bool = False,
        glow: Colour = (0, 0, 0),
    ) -> None:
        """Adds a surface, whose colour is painted already.

        Args:
            fill: Paints a value into the pixels of the surface.
            label: Train id.
            plane: See `_inverse_depth`.
            up: Whether it faces up.
            glow: Emitted light when lamps are on.
        """
        if self.glow is not None:
            fill(self.glow, glow)
        fill(self.ids, len(self.classes))
        self.classes.append(label)
        self.planes.append(plane)
        self.faces_up.append(up)

    def details(
        self,
        polygons: np.ndarray,
        colours: np.ndarray,
        shade: np.ndarray,
        glow: np.ndarray | None = None,
    ) -> None:
        """Paints convex polygons on the last surface, whose label and depth they get.

        Args:
            polygons: (M, N, 3) world coordinates; polygons that reach behind the camera are left
                out.
            colours: (M, 3) or (3,) under white light.
            shade: The light (3,) on them.
            glow: (M, 3) or (3,), emitted light when lamps are on; None emits nothing.
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

    def cutouts(self, parts: Sequence[Cutout]) -> None:
        """Paints flat shapes that face the camera, each at one depth, in order: leaves, limbs."""
        if not parts:
            return
        seen = self._see(np.concatenate([points for points, _, _ in parts]))
        starts = np.cumsum([0] + [len(points) for points, _, _ in parts])
        ahead = np.minimum.reduceat(seen[:, 2], starts[:-1]) >= NEAR
        depths = np.add.reduceat(seen[:, 2], starts[:-1]) / np.diff(starts)
        seen[:, 2] = np.maximum(seen[:, 2], NEAR)
        pixels = self._pixels(seen)
        shade = self.shade(None)
        lit = np.clip(np.array([colour for _, colour, _ in parts]) * shade, 0, 255).tolist()
        for index, (_, _, label) in enumerate(parts):
            if not ahead[index]:  # it reaches behind the camera
                continue
            fill = partial(_fill, pixels[starts[index] : starts[index + 1]], False)
            fill(self.colour, lit[index])
            self.add(fill, label, (0.0, 0.0, 1 / float(depths[index])))

    def haze(self, points: np.ndarray, colour: Colour, label: int, share: float) -> None:
        """Paints a surface (N, 3), maybe not convex, that covers only a share of its background."""
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
        """Leaves only a share of the light inside convex ground polygons (N, 3): shadows."""
        mask = np.zeros(self.ids.shape, np.uint8)
        for points in polygons:
            seen = clip_near(self._see(points))
            if len(seen) >= 3:
                hull = cv2.convexHull(self._pixels(seen))
                cv2.fillConvexPoly(mask, hull, 255, shift=SUBPIXEL_BITS)
        top = max(int(self.projection.horizon * SCALE), 0)
        if top < len(mask) and mask[top:].any():
            light = np.uint8(255 - cv2.blur(mask[top:], (5, 5)) * (1 - share))
            ground = self.colour[top:]
            cv2.multiply(ground, cv2.merge([light] * 3), dst=ground, scale=1 / 255)

    def finish(self) -> Painting:
        """Scales the picture down, and looks up label, depth and world position."""
        width, height = self.projection.size
        emitted = np.zeros_like(self.colour) if self.glow is None else self.glow
        colour, glow = (
            cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
            for picture in (self.colour, emitted)
        )
        ids = self.ids[::SCALE, ::SCALE]
        label = np.array(self.classes, np.uint8)[ids]
        planes = np.array(self.planes, np.float32)
        x, y = self.projection.rays()
        inverse = planes[:, 0][ids] * x + planes[:, 1][ids] * y + planes[:, 2][ids]
        depth = 1 / np.clip(inverse, 1e-4, 1 / NEAR)
        eye = self.projection.position.astype(np.float32)
        rays = self.projection.world_rays()
        world = np.stack([depth * ray + place for ray, place in zip(rays, eye, strict=True)], -1)
        up = np.array(self.faces_up)[ids]
        depth[label == SKY] = np.inf
        return Painting(colour, glow, label, depth, world, up)

    def _see(self, points: np.ndarray) -> np.ndarray:
        return self.projection.to_camera(points * (1, -1, 1) if self.mirrored else points)

    def _pixels(self, seen: np.ndarray) -> np.ndarray:
        """Converts camera points to OpenCV's fixed-point coordinates on the enlarged canvas."""
        enlarged = self.projection.to_pixels(seen) * SCALE + (SCALE - 1) / 2
        return np.rint(np.clip(enlarged, -3e4, 3e4) * (1 << SUBPIXEL_BITS)).astype(np.int32)

    def _outside(self, pixels: np.ndarray) -> bool:
        low, high = pixels.min(axis=0) >> SUBPIXEL_BITS, pixels.max(axis=0) >> SUBPIXEL_BITS
        rows, columns = self.ids.shape
        return high[0] < 0 or high[1] < 0 or low[0] >= columns or low[1] >= rows


def _fill(pixels: np.ndarray, convex: bool, picture: np.ndarray, value: Value) -> None:
    if convex:
        cv2.fillConvexPoly(picture, pixels, value, shift=SUBPIXEL_BITS)
    else:
        cv2.fillPoly(picture, [pixels], value, shift=SUBPIXEL_BITS)


def _inverse_depth(seen: np.ndarray) -> tuple[float, float, float]:
    """Returns n / d of a polygon's plane n . P = d, so that 1 / depth = (n / d) . (x, y, 1)."""
    # n is Newell's normal, which is well defined for any order of vertices, even with vertices on a
    # line. A polygon seen edge-on gets its mean depth instead.
    nx = ny = nz = cx = cy = cz = 0.0
    corners = seen.tolist()  # plain floats: faster than arrays for a handful of corners
    ax, ay, az = corners[-1]
    for bx, by, bz in corners:
        nx += (ay - by) * (az + bz)
        ny += (az - bz) * (ax + bx)
        nz += (ax - bx) * (ay + by)
        cx, cy, cz = cx + bx, cy + by, cz + bz
        ax, ay, az = bx, by, bz
    count = len(corners)
    size, offset = math.sqrt(nx * nx + ny * ny + nz * nz), (nx * cx + ny * cy + nz * cz) / count
    if size == 0 or abs(offset) < 1e-3 * size:
        return 0.0, 0.0, count / cz
    return nx / offset, ny / offset, nz / offset
