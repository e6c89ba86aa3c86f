"""An OUTPUT_DIR holds one run: a second run is refused, or the first one's files go first."""

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from fishertune_d2.config import read_config
from fishertune_d2.evaluation.pictures import find_pictures

from .run_record import as_words, defining_keys, differing_keys

# What training and evaluation write. The first group is only there if a run has begun; a run that
# was refused at its start leaves files of the second group, which do not stop the next attempt.
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
_BESIDE = ("config.yaml", "events.out.tfevents.*", "inference", "log.txt*", "report.html")


def files_of_run(folder: str | Path) -> list[Path]:
    """The files and folders of a run that has begun in a folder, sorted by name."""
    # A writer opens metrics.json when a trainer is built, before anything is trained.
    return [path for path in _find(folder, _OF_A_RUN) if path.stat().st_size]


def require_unused(folder: str | Path) -> None:
    """Refuses a folder in which another run has begun.

    Raises:
        FileExistsError: names a file of that run and the remedies.
    """
    found = files_of_run(folder)
    if found:
        raise FileExistsError(
            f"OUTPUT_DIR {folder} holds another run ({', '.join(p.name for p in found[:4])}"
            f"{', ...' if len(found) > 4 else ''}): add --resume to go on with that run, choose "
            "another OUTPUT_DIR, or add --overwrite to delete that run's files first. (In Python: "
            "trainer.resume_or_load(resume=True), or remove_run of fishertune_d2.engine.output_dir)"
        )


def require_resumable(cfg: CfgNode) -> None:
    """Refuses ``--resume`` where another run was killed before its first checkpoint.

    Without a checkpoint, resuming begins anew, and the metrics of the two would mix.

    Args:
        cfg: OUTPUT_DIR may hold the ``config.yaml`` of that run.

    Raises:
        ValueError: names the settings that differ and the remedies.
    """
    folder = Path(cfg.OUTPUT_DIR)
    record = folder / "config.yaml"
    if not record.is_file() or not files_of_run(folder) or (folder / "last_checkpoint").is_file():
        return
    then, now = defining_keys(read_config(str(record))), defining_keys(cfg)
    differing = as_words(differing_keys(then, now))
    if differing:
        raise ValueError(
            f"OUTPUT_DIR {folder} holds another run, which has no checkpoint to go on from: "
            f"{'; '.join(differing)}. Choose another OUTPUT_DIR, or start anew with --overwrite "
            "in place of --resume"
        )


def remove_pictures(folder: str | Path, names: Sequence[str]) -> None:
    """Deletes the pictures that an earlier evaluation drew of these data sets."""
    for name in names:
        for path in find_pictures(folder, name):
            path.unlink()


def remove_run(folder: str | Path) -> None:
    """Deletes what training and evaluation wrote into a folder, and leaves everything else."""
    for path in _find(folder, (*_OF_A_RUN, *_BESIDE)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def require_own_weights(folder: str | Path, weights: str) -> None:
    """Refuses to put the scores of other weights into the folder of a training run.

    Args:
        folder: OUTPUT_DIR, where results.json will be written.
        weights: the checkpoint that will be scored.

    Raises:
        FileExistsError: with the remedy.
    """
    folder = Path(folder)
    trained_here = (folder / "metrics.json").is_file()
    if trained_here and Path(weights).resolve().parent != folder.resolve():
        raise FileExistsError(
            f"OUTPUT_DIR {folder} holds a training run, and MODEL.WEIGHTS {weights} is not one of "
            "its checkpoints: choose another OUTPUT_DIR for the scores"
        )


def require_writable(folder: str | Path) -> None:
    """Makes the folder, and writes and deletes a small file in it.

    Raises:
        OSError: names OUTPUT_DIR and the system's reason.
    """
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
