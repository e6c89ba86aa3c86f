"""The built-in data: street scenes drawn from a seed, in six domains.

Reading order: ``world`` (what a scene is made of), ``scene`` and ``scene_traffic`` (drawing one
from a seed), ``canvas`` (the camera), ``houses``, ``vehicles``, ``people`` and ``models`` (how
things look), ``render`` (a whole picture), ``weather`` (the domains), ``dataset`` (files).
"""

from .dataset import COUNTS, DOMAINS, ensure_streets, render_scene, write_streets

__all__ = ["COUNTS", "DOMAINS", "ensure_streets", "render_scene", "write_streets"]
