"""Checkpoints that are written whole, and checks that they fit the model that loads them."""

import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from fishertune_d2.files import whole_file
from fishertune_d2.modeling.weight_files import read_with_notes
from fishertune_d2.tuning import TuningMethod

from .optimizer import is_backbone
from .run_record import RunRecord, other_texts, texts_of
from .stages import attach
from .weight_average import WeightAverage

logger = logging.getLogger(__name__)

PERIODIC = "model_[0-9]*.pth"  # the checkpoints that SOLVER.CHECKPOINT_PERIOD asks for


class WholeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, whose files are written whole or not at all, under the same names.

    If a disk or a copy damages the last checkpoint all the same, resuming takes the one before.

    Args:
        model: the segmentor.
        save_dir: the folder of the checkpoints.
        method: its tuning method. A checkpoint of the tuning stage holds the weights that the
            method adds, so they are attached before it is loaded; one of the warm-up does not.
        accept: called with a checkpoint's record, if it has one, before its weights are loaded;
            raises if the record does not fit.
        complete: refuse a checkpoint that leaves a part of the model as it was initialised.
        average: its averages stand in a checkpoint's model for the weights that they average.
        keep: how many of the periodic checkpoints stay, see :meth:`save`; 0 for all.
        checkpointables: as Detectron2's.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        method: TuningMethod | None = None,
        accept: Callable[[RunRecord], None] | None = None,
        complete: bool = False,
        average: WeightAverage | None = None,
        keep: int = 0,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.method = method
        self.accept = accept
        self.complete = complete
        self.average = average
        self.keep = keep

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``<name>.pth``, makes it the last checkpoint, and deletes the oldest of too many.

        Only :data:`PERIODIC` checkpoints are deleted, those of earlier processes of the run
        included. Those that end a stage or leave for a scheduler stay.
        If writing fails, the checkpoint before it stays the last, and the OSError names the file
        and the free space.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        model = self.model.state_dict()
        model.update(self.average.averages if self.average else {})
        data = {"model": model, **states, **kwargs}
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        # Opened by Python, which names the system's error; torch.save does not.
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            torch.save(data, file)
        self.tag_last_checkpoint(path.name)
        if self.keep:
            # By age, not by name: after a damaged one, a run may go on below its iteration.
            for old in self._others(PERIODIC)[self.keep :]:
                old.unlink(missing_ok=True)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from, even if none is noted as the last."""
        return super().has_checkpoint() or any(map(is_whole, self._others()))

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):  # of Detectron2's model zoo
            return super()._load_file(filename)
        state, notes = read_with_notes(Path(filename))
        return {**(notes if state is not notes else {}), "model": state}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        """Loads the weights, and refuses those of another run, method or model."""
        record = RunRecord.of_checkpoint(checkpoint)
        if self.accept is not None and record is not None:
            self.accept(record)
        if record is not None:
            _require_same_texts(self.model, record, checkpoint["model"])
        incompatible = self._load_weights(checkpoint)
        if self.complete:
            _require_complete(incompatible)
        else:
            _require_some(self.model, incompatible)
        return incompatible

    def _load_weights(self, checkpoint: dict[str, Any]) -> Any:
        added = _lacking(self.model, checkpoint["model"])
        if self.method is None or not added:
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
        """The last checkpoint, or if it is damaged, the newest whole one; refuses if none is."""
        last = Path(super().get_checkpoint_file())
        if is_whole(last):
            return str(last)
        others = [path for path in self._others() if path != last]
        for path in filter(is_whole, others):
            logger.warning(
                "The last checkpoint, %s, is damaged or gone: resuming from the one before, %s",
                last if last.name else "the one that last_checkpoint names",
                path,
            )
            return str(path)
        raise ValueError(
            f"cannot resume: the last checkpoint, {last}, is damaged or gone, and so are all "
            f"others in {self.save_dir} ({len(others)}); start anew with --overwrite in place of "
            "--resume"
        )

    def _others(self, pattern: str = "model_*.pth") -> list[Path]:
        """The checkpoints of a run in the folder, the newest first."""
        # Other .pth files in the folder may be weights without a run's state.
        found = Path(self.save_dir).glob(pattern) if self.save_dir else ()
        return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def is_whole(path: Path) -> bool:
    """Whether a file of torch.save is complete, and its checksums hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive raises errors of seven kinds
        return False


def _lacking(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names in a state dict, below the backbone, that the model does not have."""
    own = model.state_dict()
    return [name for name in state if is_backbone(name) and name not in own]


def _require_same_texts(model: nn.Module, record: RunRecord, state: Mapping[str, Any]) -> None:
    """Refuses weights that would replace the embeddings of the model's class names by others."""
    stored = next((name for name in state if name.endswith(".texts.embeddings")), None)
    for trouble in other_texts(record.texts, texts_of(model)) if stored else ():
        raise ValueError(
            f"the weights hold the embeddings of other names of classes: {trouble}. Set "
            f"MODEL.TEXT.CLASSES to {list(record.texts or ())}, or delete the tensor {stored} from "
            "the weights to train with the names that the config has now"
        )


def _left(incompatible: Any) -> set[str]:
    """Names of the model's tensors that a load has not filled."""
    return {*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)}


def _require_complete(incompatible: Any) -> None:
    """Refuses weights that leave a tensor of the model as it was initialised."""
    left, wrong = _left(incompatible), incompatible.incorrect_shapes
    if not left:
        return
    for name, theirs, ours in wrong:
        if name.endswith("predictor.weight"):
            extra = name.endswith("class_predictor.weight")  # Mask2Former's "no object"
            then, now = theirs[0] - extra, ours[0] - extra
            raise ValueError(
                f"the weights predict {then} classes and the config asks for {now}: set "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES {then} and name data sets of these classes, or "
                "take the weights' own config"
            )
    if wrong:
        name, theirs, ours = wrong[0]
        trouble = f"{name} has the shape {tuple(theirs)}, in the model {tuple(ours)}"
    else:
        trouble = f"{incompatible.missing_keys[0]} is not among them"
    raise ValueError(
        f"the weights do not fill the model ({len(left)} of its tensors are left): {trouble}. "
        "Take the config.yaml that lies beside the weights, or weights of the whole segmentation "
        "model"
    )


def _require_some(model: nn.Module, incompatible: Any) -> None:
    """Refuses weights of which none fits; warns if only some fit."""
    names = model.state_dict().keys()
    filled = len(names) - len(_left(incompatible) & names)
    if not filled:
        raise ValueError(
            f"none of the weights fits the model, whose first tensor is {next(iter(names))}: name "
            "a checkpoint of this segmentation model; public weights of a VFM belong in "
            "MODEL.VFM.WEIGHTS"
        )
    if filled < len(names):
        logger.warning(
            "The weights fill %d of the model's %d tensors; the others start as initialised",
            filled,
            len(names),
        )
