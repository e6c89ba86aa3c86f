"""FisherTune for Detectron2.

Importing this package registers its models and data sets with Detectron2; it needs no data, no
network and no compiler. Where Detectron2 is not installed, what is pure PyTorch can still be
imported: ``fishertune_d2.fisher``, ``MaskedUpdate`` and ``SelectedWeights`` of
``fishertune_d2.tuning``, and ``fishertune_d2.export.apply_delta``.

Not imported with it: ``fishertune_d2.export``, and the commands ``fishertune_d2.train``,
``fishertune_d2.plan``, ``fishertune_d2.bench``, ``fishertune_d2.analysis``,
``fishertune_d2.doctor``. The keys of a config: ``fishertune_d2.config``.
"""

import sys

__all__ = [
    "add_fishertune_config",
    "apply_fishertune",
    "get_config_file",
    "data",
    "engine",
    "evaluation",
    "modeling",
    "tuning",
]

# `python -m fishertune_d2.doctor` imports this first, also where what follows is missing or broken.
# While Python looks for a module to run, argv[0] is "-m".
_FOR_THE_DOCTOR = sys.argv[:1] == ["-m"] and f"{__name__}.doctor" in sys.orig_argv

if not _FOR_THE_DOCTOR:
    from . import compat

    compat.require_versions("torch")
    from . import tuning

    if compat.has_detectron2():
        compat.require_versions("timm", "transformers")
        from . import data, engine, evaluation, modeling
        from .config import add_fishertune_config, get_config_file
        from .engine import apply_fishertune
    else:

        def __getattr__(name: str):
            """Says what is missing when something that needs Detectron2 is asked for."""
            if name in __all__:
                compat.require_detectron2()
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
