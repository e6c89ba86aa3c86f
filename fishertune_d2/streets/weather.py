"""The domains: one scene by day, at dusk, at night, in fog, in rain and in snow.

A domain changes the light, the air, the ground and the sensor, given the depth, world position and
class of every pixel. It never changes the geometry: a seed has the same label in all domains.
"""

from collections.abc import Callable

import cv2
import numpy as np

from .models import WARM, lamp_heads
from .render import Look, Painting, noise_tile, paint, paint_reflection
from .world import ROAD, SIDEWALK, SKY, TERRAIN, Scene

LOOKS = {
    "day": Look(True, (96, 150, 222), (206, 220, 236), (240, 241, 244), 0.0),
    "dusk": Look(False, (46, 62, 108), (236, 164, 112), (116, 96, 112), 0.35, lamps=True),
    "night": Look(False, (9, 11, 20), (34, 28, 26), (24, 21, 22), 0.4, lamps=True),
    "fog": Look(False, (196, 200, 204), (204, 206, 208), (200, 203, 206), 1.0),
    "rain": Look(False, (112, 120, 130), (158, 164, 170), (128, 134, 142), 0.95, lamps=True),
    "snow": Look(False, (186, 192, 202), (208, 212, 218), (198, 203, 210), 1.0, snow=True),
}


def render_domain(
    scene: Scene, domain: str, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Paints a scene under a domain.

    Args:
        scene: The scene.
        domain: A key of ``LOOKS``.
        size: Width and height in pixels.

    Returns:
        Image (H, W, 3) uint8 RGB, and label (H, W) uint8 train ids.
    """
    look = LOOKS[domain]
    painting = paint(scene, look, size)
    # Each domain draws from a stream of its own, so that a new domain leaves the others unchanged.
    rng = np.random.default_rng([scene.seed, 100 + list(LOOKS).index(domain)])
    image = EFFECTS[domain](painting, scene, look, rng)
    grain = {"night": 9.0, "dusk": 5.0}.get(domain, 0.0)
    return _develop(image, scene, rng, grain), painting.label


def airlight(
    image: np.ndarray, depth: np.ndarray, visibility: float, light: np.ndarray
) -> np.ndarray:
    """Fades distant pixels into the light that the air scatters, by Koschmieder's law.

    Args:
        image: (H, W, 3) float32.
        depth: (H, W) metres, infinite for the sky.
        visibility: Metres at which 5 % of the contrast is left.
        light: (3,) colour of the air.

    Returns:
        (H, W, 3) float32.
    """
    through = np.exp(depth * np.float32(-3.0 / visibility))[..., None]
    return image * through + light.astype(np.float32) * (1 - through)


def _in_air(
    image: np.ndarray, painting: Painting, visibility: float, light: np.ndarray, sky: float = 0.0
) -> np.ndarray:
    """Fades a painting's distant pixels as `airlight`; the sky is at ``sky`` metres."""
    depth = np.where(painting.label == SKY, sky, painting.depth)
    return airlight(image, depth, visibility, light)


def _on_ground(tile: np.ndarray, painting: Painting, scale: float, offset: int) -> np.ndarray:
    """Returns (H, W) numbers of a noise tile that lies on the ground, ``scale`` texels a metre."""
    texel = (painting.world[..., [0, 2]] * scale).astype(np.int32) + offset
    return tile[texel[..., 1] & 511, texel[..., 0] & 511]


def _day(painting: Painting, scene: Scene, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Applies clear air. The exposure follows the street, so the sky over a dark one burns out."""
    clear = _in_air(painting.colour, painting, rng.uniform(500, 4000), np.array(look.horizon))
    wanted, mean = rng.uniform(78, 128), clear[painting.label != SKY].mean()
    return clear * np.clip(wanted / mean, 0.8, 2.2)


def _glare(painting: Painting, strength: float) -> np.ndarray:
    """Returns (H, W, 3) light sources with the halo that lens and air spread around them."""
    width = painting.label.shape[1]
    small = cv2.GaussianBlur(painting.glow, (0, 0), width / 250)
    quarter = cv2.resize(painting.glow, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    wide = cv2.GaussianBlur(quarter, (0, 0), width / 130)
    wide = cv2.resize(wide, painting.glow.shape[1::-1])
    return painting.glow * 0.95 + strength * (0.6 * small + 0.8 * wide)


def _lamplight(painting: Painting, scene: Scene, reach: float) -> np.ndarray:
    """Returns the (H, W, 3) light of street lamps and the own headlights, per unit of albedo."""
    # At half the resolution, because light varies slowly.
    world = painting.world[::2, ::2]
    light = np.zeros((*world.shape[:2], 3), np.float32)
    warm = np.array(WARM, np.float32) / 255
    for head in lamp_heads([t for t in scene.things if t.z < reach]).astype(np.float32):
        offset = world - head
        square = np.einsum("hwc,hwc->hw", offset, offset)
        below = np.clip(-offset[..., 1] / np.sqrt(square + 0.01), 0, 1)  # lamps shine down
        light += (17.0 * below**1.5 / (square + 9.0))[..., None] * warm
    ahead = world - np.array([scene.camera.lateral, 0.65, 0], np.float32)
    distance = np.maximum(ahead[..., 2], 0.5)
    beam = np.exp(
        -((ahead[..., 0] / distance / 0.36) ** 2)
        - (np.maximum(ahead[..., 1] / distance - 0.01, 0) / 0.05) ** 2
    )
    halogen = np.array([1, 0.95, 0.84], np.float32)
    light += (beam * 60 / (distance + 6.0) ** 1.6)[..., None] * halogen
    return cv2.resize(light, painting.label.shape[::-1], interpolation=cv2.INTER_LINEAR)


def _night(painting: Painting, scene: Scene, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Applies lamps instead of a sky: little light, warm, uneven; windows and lights glare."""
    ambient = np.array([0.045, 0.047, 0.06]) * rng.uniform(0.5, 1.6)
    light = _lamplight(painting, scene, 90) * rng.uniform(0.6, 1.2) + ambient.astype(np.float32)
    light[painting.label == SKY] = 1
    lit = painting.colour * light
    lit = _in_air(lit, painting, 500, np.array([16.0, 14, 14]))
    return (lit + _glare(painting, 1.0)) * np.array([1.05, 0.98, 0.86], np.float32)


def _dusk(painting: Painting, scene: Scene, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Applies a glowing sky over dark streets: facades are dim and blue, first lights are on."""
    ambient = np.array([0.17, 0.185, 0.235]) * rng.uniform(0.65, 1.35)
    light = ambient.astype(np.float32) + 0.35 * _lamplight(painting, scene, 60)
    light[painting.label == SKY] = rng.uniform(0.7, 1.05)
    lit = painting.colour * light
    lit = _in_air(lit, painting, 700, np.array([92.0, 80, 84]))
    return lit + 0.5 * _glare(painting, 0.6)


def _fog(painting: Painting, scene: Scene, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Applies dense fog: the light is flat, and everything far dissolves, even the sky."""
    grey = painting.colour.mean(axis=2, keepdims=True)
    flat = 0.72 * painting.colour + 0.28 * grey
    air = np.full(3, rng.uniform(172, 212)) + rng.normal(0, 3, 3)
    return airlight(flat, painting.depth, rng.uniform(28, 75), air)


def _rain(painting: Painting, scene: Scene, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Applies wet ground that mirrors, grey air, streaks, and drops on the lens."""
    height, width = painting.label.shape
    mirror = paint_reflection(scene, look, (width, height))
    spread = max(width // 64, 1) | 1  # ripples smear reflections upright
    mirror = cv2.blur(mirror, (3, 2 * spread + 1))
    ground = painting.up & np.isin(painting.label, (ROAD, SIDEWALK, TERRAIN))
    image = painting.colour * np.float32(0.62)
    # Fresnel: water mirrors more at a flatter angle of view. Puddles are where the noise is high.
    steep = np.abs(painting.world[..., 1] - scene.camera.height) / np.maximum(painting.depth, 1)
    fresnel = 0.06 + 0.94 * np.clip(1 - steep, 0, 1) ** 5
    puddle = _on_ground(noise_tile(1.7, 3), painting, 9, scene.seed % 97)
    wet = np.clip(0.55 + 0.5 * puddle, 0.15, 1.0)
    wet = np.where(painting.label == TERRAIN, 0.15, wet)
    share = np.where(ground, fresnel * wet, 0).astype(np.float32)[..., None]
    image = image * (1 - share * 0.7) + mirror * share * 0.95
    image += 0.8 * _glare(painting, 0.5)
    air = np.array([138.0, 144, 150])
    image = _in_air(image, painting, rng.uniform(160, 320), air, sky=250)
    image += _streaks(rng, width, height)[..., None]
    return _lens_drops(image, rng)


def _streaks(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draws (H, W) float32 falling drops, blurred by motion; near ones are longer and wider."""
    layer = np.zeros((height * 2, width * 2), np.uint8)
    slant = rng.normal(0, 0.15)
    for _ in range(int(rng.uniform(1.0, 2.2) * width)):
        near = rng.random() ** 3
        length = height * (0.04 + 0.22 * near)
        x, y = rng.uniform(0, 2 * width), rng.uniform(-0.2, 2) * height
        end = (int(x + slant * length * 2), int(y + length * 2))
        bright = int(rng.uniform(26, 80))
        cv2.line(layer, (int(x), int(y)), end, bright, 2 if near > 0.6 else 1)
    return cv2.resize(layer, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)


def _lens_drops(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds drops on the lens: discs that show a blurred picture upside down."""
    height, width = image.shape[:2]
    blurred = cv2.blur(image, (width // 32 | 1, width // 32 | 1))
    mask = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(6, 26))):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        radius = int(width * (0.006 + 0.022 * rng.random() ** 2))
        cv2.ellipse(mask, centre, (radius, int(radius * 1.2)), 0, 0, 360, 255, -1)
    share = cv2.blur(mask, (5, 5)).astype(np.float32)[..., None] / 255 * 0.85
    return image * (1 - share) + (blurred * 0.9 + 0.1 * blurred[::-1]) * share


def _snow(painting: Painting, scene: Scene, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Applies snow in the air and falling flakes; painting has covered the ground with snow."""
    grey = painting.colour.mean(axis=2, keepdims=True)
    image = (0.75 * painting.colour + 0.25 * grey) * rng.uniform(0.85, 1.02)
    patch = _on_ground(noise_tile(1.3, 1), painting, 4, scene.seed % 89)
    image[painting.up] *= (1 + 0.05 * np.clip(patch, -2, 1))[painting.up][:, None]
    air = np.full(3, rng.uniform(188, 212)) + [-3, 0, 5]
    image = _in_air(image, painting, rng.uniform(90, 260), air, sky=300)
    height, width = painting.label.shape
    flakes = np.zeros((height * 2, width * 2), np.uint8)
    for _ in range(int(rng.uniform(1.5, 4.0) * width)):
        near = rng.random() ** 5
        centre = (int(rng.integers(2 * width)), int(rng.integers(2 * height)))
        radius = int(round(width / 512 * (1 + 5 * near)))
        cv2.circle(flakes, centre, radius, int(rng.uniform(120, 235) * (1 - 0.4 * near)), -1)
    flakes = cv2.GaussianBlur(flakes, (3, 3), 0)
    share = cv2.resize(flakes, (width, height), interpolation=cv2.INTER_AREA)
    share = share.astype(np.float32)[..., None] / 255
    return image * (1 - share) + 238 * share


EFFECTS: dict[str, Callable[[Painting, Scene, Look, np.random.Generator], np.ndarray]] = {
    "day": _day,
    "dusk": _dusk,
    "night": _night,
    "fog": _fog,
    "rain": _rain,
    "snow": _snow,
}


def _develop(image: np.ndarray, scene: Scene, rng: np.random.Generator, grain: float) -> np.ndarray:
    """Applies the camera: lens blur, white balance, tone curve, grain; returns (H, W, 3) uint8."""
    *gains, gamma, noise = scene.mood
    width = image.shape[1]
    image = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 0.45 * width / 512 + 0.1)
    image = np.clip(image * np.array(gains, np.float32) / 255, 0, 1.6)
    image = np.where(image > 0.8, 0.8 + 0.2 * np.tanh((image - 0.8) / 0.2), image)
    image = 255 * image ** np.float32(gamma)
    height = image.shape[0]
    shot = rng.standard_normal((height, width, 4), dtype=np.float32) * np.float32(noise + grain)
    image += shot[..., :1] + 0.35 * shot[..., 1:]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
