"""Configs of version 0.1.0 that have another name now: the old name still works, with a warning."""

import warnings
from pathlib import Path

_VAL = "cityscapes_val"
# Old folder: the test sets of its configs. All trained what the configs in cityscapes/ train.
_OLD_FOLDERS = {
    "cityscapes_to_bdd100k": (_VAL, "bdd100k_val"),
    "cityscapes_to_acdc": (_VAL, "acdc_val"),
    "cityscapes_to_adverse": (
        *(_VAL, "foggy_zurich", "foggy_driving", "dark_zurich_val", "nighttime_driving"),
        *("acdc_rain_val", "acdc_snow_val"),
    ),
}


def current_config(file: str) -> tuple[str, list[str]]:
    """Translates the name of a config.

    Args:
        file: A path, or a name below configs/. It may be an old name.

    Returns:
        The name below configs/ that the config has now, and the options that give its old test sets
        and OUTPUT_DIR; ``file`` and no options if the config was not renamed.
    """
    folder, name = Path(file).parts[-2:] if len(Path(file).parts) > 1 else ("", file)
    if folder not in _OLD_FOLDERS or Path(file).is_file():
        return file, []
    new = "Base-cityscapes.yaml" if name.startswith("Base-") else name
    options = ["DATASETS.TEST", str(_OLD_FOLDERS[folder])]
    if new == name:
        options += ["OUTPUT_DIR", f"outputs/{folder}/{Path(name).stem}"]
    keys = " ".join(f'"{word}"' if word.startswith("(") else word for word in options)
    warnings.warn(
        f"configs/{folder}/{name} is now configs/cityscapes/{new} with the options {keys}",
        FutureWarning,
        stacklevel=3,
    )
    return f"cityscapes/{new}", options
