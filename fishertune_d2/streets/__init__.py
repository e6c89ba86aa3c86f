"""The built-in data set: street scenes drawn from a seed, in six domains.

Reading order: ``world`` (the description of a scene), ``scene`` and ``scene_traffic`` (draw a scene
from a seed), ``canvas`` (the camera), ``houses``, ``vehicles``, ``people`` and ``models`` (paint
things), ``render`` (paints a whole picture), ``weather`` (the domains), ``dataset`` (files).
"""

from .dataset import COUNTS, DOMAINS, ensure_streets, render_scene, write_streets

__all__ = ["COUNTS", "DOMAINS", "ensure_streets", "render_scene", "write_streets"]
