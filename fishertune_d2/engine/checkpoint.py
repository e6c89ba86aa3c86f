"""Checkpoints that survive a kill while they are written, and know which run they belong to."""

import hashlib
import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.fisher.files import whole_file
from fishertune_d2.tuning import TuningMethod

from .optimizer import is_backbone
from .stages import attach

logger = logging.getLogger(__name__)

# What a run is: with another value of a key below these, its result is another.
_DEFINING = ("DATASETS.TRAIN", "FISHER", "INPUT", "MODEL", "SEED", "SOLVER", "TUNING")
# But for where files are, what computes, what is written when, and what only test images meet.
_FREE = (
    "FISHER.ESTIMATE",
    "INPUT.MAX_SIZE_TEST",
    "INPUT.MIN_SIZE_TEST",
    "MODEL.DEVICE",
    "MODEL.VFM.CHECKPOINT_BLOCKS",
    "MODEL.VFM.WEIGHTS",
    "MODEL.WEIGHTS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TUNING.WARMUP_CHECKPOINT",
)


class WholeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, whose files are written whole or not at all, under the same names.

    If the last one is damaged all the same, by a disk or a copy, resuming takes the one before.

    Args:
        model: the segmentor.
        save_dir: where checkpoints go.
        method: its tuning method. A checkpoint of the tuning stage holds what the method adds, so
            that is attached before the weights are loaded; one of the warm-up does not.
        checkpointables: as Detectron2's.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        method: TuningMethod | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.method = method

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``<name>.pth``, then makes it the last checkpoint.

        Raises:
            OSError: if it cannot be written; names the file and the free space. The checkpoint
                before it stays the last.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **states, **kwargs}
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        # Through a file of Python's, for it names the system's error where torch's does not.
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            torch.save(data, file)
        self.tag_last_checkpoint(path.name)

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            return super()._load_file(filename)
        except Exception as error:  # torch's own name no file
            raise ValueError(f"{filename} cannot be read as a checkpoint: {error}") from error

    def _load_model(self, checkpoint: dict[str, Any]):
        """Loads the weights, of the warm-up or of the tuning stage.

        Raises:
            ValueError: if what a method has added to the backbone does not fit this one's method.
        """
        added = self.method and _lacking(self.model, checkpoint["model"])
        if not added:
            return super()._load_model(checkpoint)
        attach(self.model, self.method)
        misfits = _lacking(self.model, checkpoint["model"])
        if not misfits:
            incompatible = super()._load_model(checkpoint)
            misfits = [name for name, *_ in incompatible.incorrect_shapes if name in added]
        if misfits:
            raise ValueError(
                f"the checkpoint holds {len(misfits)} tensors that the backbone has no place for, "
                f"the first is {misfits[0]}: set TUNING.METHOD and its options as they were when "
                "it was written"
            )
        return incompatible

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Writes which checkpoint is the last."""
        with whole_file(Path(self.save_dir, "last_checkpoint")) as temporary:
            temporary.write_text(last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """The last checkpoint, or, if that is damaged, the newest that is whole.

        Raises:
            RuntimeError: if every checkpoint is damaged.
        """
        last = Path(super().get_checkpoint_file())
        if is_whole(last):
            return str(last)
        # Not every .pth: the folder may hold weights that are no state of a run.
        others = [path for path in Path(self.save_dir).glob("model_*.pth") if path != last]
        others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in others:
            if is_whole(path):
                logger.warning(
                    "The last checkpoint, %s, is damaged or gone: resuming from the one before, %s",
                    last,
                    path,
                )
                return str(path)
        raise RuntimeError(
            f"cannot resume: the last checkpoint, {last}, is damaged or gone, and so are all "
            f"others in {self.save_dir} ({len(others)}); start again without --resume"
        )


def _lacking(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names in a state dict, below the backbone, that the model does not have."""
    own = model.state_dict()
    return [name for name in state if is_backbone(name) and name not in own]


def is_whole(path: Path) -> bool:
    """Whether a file of torch.save is there to its end, and its checksums hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive raises errors of seven kinds
        return False


class RunRecord:
    """What a checkpoint remembers of its run, so that no other run goes on from it unnoticed.

    Keys that a checkpoint or the config does not have, as after an update, are not compared.

    Args:
        cfg: the run's config. All of ``_DEFINING`` counts but ``_FREE``.
        names: the training images, in the order of the data set. Their folders do not count.
    """

    def __init__(self, cfg: CfgNode, names: Sequence[str]):
        self.output_dir = cfg.OUTPUT_DIR
        self.config = dict(_defining(cfg))
        self.images = len(names)
        text = "\n".join(Path(name).name for name in names)
        self.names = hashlib.sha256(text.encode()).hexdigest()

    def state_dict(self) -> dict:
        """Numbers, strings, lists and dicts, which torch.load reads with weights_only."""
        return {"config": self.config, "images": self.images, "names": self.names}

    def load_state_dict(self, state: Mapping) -> None:
        """Compares a checkpoint's record with this run.

        Raises:
            ValueError: if they differ; names the keys and their values, then and now.
        """
        troubles = [
            f"{key} was {then!r} and is {self.config[key]!r}"
            for key, then in state["config"].items()
            if key in self.config and self.config[key] != then
        ]
        if state["images"] != self.images:
            troubles.append(f"there were {state['images']} training images and are {self.images}")
        elif state["names"] != self.names:
            troubles.append(f"the {self.images} training images have other names, or another order")
        if troubles:
            raise ValueError(
                f"the checkpoint in {self.output_dir} is of another run: {'; '.join(troubles)}. "
                "Put that back as it was to go on, or start a new run in another OUTPUT_DIR"
            )


def _defining(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys that define a run, with their dots, and their values."""
    for name, value in node.items():
        key = prefix + name
        if isinstance(value, CfgNode):
            yield from _defining(value, f"{key}.")
        elif key not in _FREE and f"{key}.".startswith(tuple(f"{root}." for root in _DEFINING)):
            yield key, value
