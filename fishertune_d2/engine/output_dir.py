"""Keeps one run in an OUTPUT_DIR: a second one is refused, or the first one's files are deleted."""

import os
import shutil
import uuid
from pathlib import Path

from detectron2.config import CfgNode

from fishertune_d2.config import read_config
from fishertune_d2.files import first_names

from .run_keys import as_words, defining_keys, differing_keys

# The files that training and evaluation write. Only a run that has begun writes the first group; a
# run that was refused at its start leaves files of the second, which do not stop the next attempt.
_OF_A_RUN = (
    "fisher.safetensors",
    "last_checkpoint",
    "metrics.json",
    "model_*.pth",
    "pictures",
    "results.json",
    "selection.png",
    "selection.safetensors",
)
_BESIDE = (
    *("config.yaml", "events.out.tfevents.*", "inference", "log.txt*", "report.html"),
    *("wandb", "wandb_id.txt"),
)


def files_of_run(folder: str | Path) -> list[Path]:
    """The files and folders of a run that has begun in a folder, sorted by name."""
    # Empty files do not count: a writer opens metrics.json before anything is trained.
    return [path for path in _find(folder, _OF_A_RUN) if path.stat().st_size]


def require_unused(folder: str | Path) -> None:
    """Refuses an OUTPUT_DIR in which another run has begun."""
    found = files_of_run(folder)
    if found:
        raise FileExistsError(
            f"OUTPUT_DIR {folder} holds another run ({first_names([p.name for p in found], 4)}): "
            "add --resume to go on with that run, choose another OUTPUT_DIR, or add --overwrite to "
            "delete that run's files first. (In Python: trainer.resume_or_load(resume=True), or "
            "remove_run of fishertune_d2.engine.output_dir)"
        )


def require_resumable(cfg: CfgNode) -> None:
    """Refuses ``--resume`` if another run was killed before its first checkpoint."""
    # Without a checkpoint, resuming starts anew, and the metrics of the two runs would mix.
    folder = Path(cfg.OUTPUT_DIR)
    record = folder / "config.yaml"
    if not record.is_file() or not files_of_run(folder) or (folder / "last_checkpoint").is_file():
        return
    then = defining_keys(read_config(str(record)))
    differing = as_words(differing_keys(then, defining_keys(cfg)))
    if differing:
        raise ValueError(
            f"OUTPUT_DIR {folder} holds another run, which has no checkpoint to go on from: "
            f"{'; '.join(differing)}. Choose another OUTPUT_DIR, or start anew with --overwrite "
            "in place of --resume"
        )


def remove_run(folder: str | Path) -> None:
    """Deletes the files that training and evaluation wrote into a folder, and no others."""
    for path in _find(folder, (*_OF_A_RUN, *_BESIDE)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def require_own_weights(folder: str | Path, weights: str) -> None:
    """Refuses to put the scores of other weights into the folder of a training run."""
    folder = Path(folder)
    trained_here = (folder / "metrics.json").is_file()
    if trained_here and Path(weights).resolve().parent != folder.resolve():
        raise FileExistsError(
            f"OUTPUT_DIR {folder} holds a training run, and MODEL.WEIGHTS {weights} is not one of "
            "its checkpoints: choose another OUTPUT_DIR for the scores"
        )


def require_writable(folder: str | Path) -> None:
    """Creates OUTPUT_DIR, and refuses it unless a small file can be written there."""
    folder = Path(folder)
    trial = folder / f".trial-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(trial, "wb") as file:
            file.write(b"trial")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"OUTPUT_DIR {folder} cannot be written in ({error.strerror or error}): choose another"
        ) from error
    trial.unlink()


def _find(folder: str | Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})
