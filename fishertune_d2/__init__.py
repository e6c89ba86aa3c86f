"""FisherTune for Detectron2.

Importing this package registers its models and data sets with Detectron2; it needs no data, no
network and no compiler. Without Detectron2 the parts in pure PyTorch still work:
``fishertune_d2.fisher``, ``MaskedUpdate`` and ``SelectedWeights`` of ``fishertune_d2.tuning``, and
``fishertune_d2.export.apply_delta``.

It does not import ``fishertune_d2.export``, nor the commands ``fishertune_d2.train``,
``fishertune_d2.plan``, ``fishertune_d2.bench``, ``fishertune_d2.analysis`` and
``fishertune_d2.doctor``. ``fishertune_d2.config`` explains the keys of a config.
"""

import sys
from pathlib import Path

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

# The program that runs: a script, or "-m" while Python looks for the module of `python -m`.
_PROGRAM = Path(sys.argv[0]).name if sys.argv else ""
_MODULES = [word for word in sys.orig_argv if word.startswith(f"{__name__}.")]
# Commands end in a sentence, not in a traceback, if a package is missing or too old. The doctor
# says it itself, so it must run even if the imports below would fail.
_IS_COMMAND = _PROGRAM in ("train_net.py", "demo.py") or (_PROGRAM == "-m" and bool(_MODULES))
_IS_DOCTOR = _PROGRAM == "-m" and f"{__name__}.doctor" in _MODULES

if not _IS_DOCTOR:
    from . import compat

    try:
        compat.require_versions("torch")
        if compat.has_detectron2():
            compat.require_versions("timm", "transformers")
        elif _IS_COMMAND:
            compat.require_detectron2()
    except ImportError as error:
        if not _IS_COMMAND:
            raise
        sys.exit(f"error: {error}")

    from . import tuning

    if compat.has_detectron2():
        from . import data, engine, evaluation, modeling
        from .config import add_fishertune_config, get_config_file
        from .engine import apply_fishertune
    else:

        def __getattr__(name: str):
            """Raises the error that says how to install Detectron2 if ``name`` needs it."""
            if name in __all__:
                compat.require_detectron2()
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
