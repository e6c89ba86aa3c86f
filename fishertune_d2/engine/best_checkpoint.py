"""The checkpoint with the highest mIoU on one data set, as a hook."""

import shutil
from pathlib import Path

from detectron2.engine import HookBase

from fishertune_d2.files import whole_file

from .checkpoint import WholeCheckpointer

BEST = "model_best"


class BestCheckpoint(HookBase):
    """Writes ``model_best.pth`` when an evaluation has the highest mIoU so far on a data set.

    Register it after the evaluation, in all processes. Detectron2's BestCheckpointer forgets the
    best score when a run resumes; here the score is in each checkpoint.

    Args:
        checkpointer: writes the checkpoints.
        data_set: the name of the data set; "" keeps no best checkpoint.
    """

    def __init__(self, checkpointer: WholeCheckpointer, data_set: str):
        self.checkpointer = checkpointer
        self.data_set = data_set
        self.best = -1.0  # mIoU in percent

    def after_step(self) -> None:
        """Writes the checkpoint of this iteration if its score is the best."""
        if self._improves():
            self.checkpointer.save(BEST, iteration=self.trainer.iter)

    def after_train(self) -> None:
        """Copies ``model_final.pth`` if the score at the end is the best."""
        if self.trainer.iter >= self.trainer.max_iter and self._improves():
            folder = Path(self.checkpointer.save_dir)
            with whole_file(folder / f"{BEST}.pth") as temporary:
                shutil.copyfile(folder / "model_final.pth", temporary)

    def state_dict(self) -> dict:
        """The best score, so that a resumed run knows it."""
        return {"best": self.best, "data_set": self.data_set} if self.data_set else {}

    def load_state_dict(self, state: dict) -> None:
        """Restores the best score, if it is of this run and data set."""
        # A run that takes over another's warm-up also gets the state of that run's hooks.
        own = Path(self.checkpointer.save_dir, f"{BEST}.pth").is_file()
        if own and state.get("data_set", self.data_set) == self.data_set:
            self.best = state["best"]

    def _improves(self) -> bool:
        """Whether the last score is above the best one, which it replaces."""
        # Only the first process has scores.
        scores = self.trainer.storage.latest() if self.data_set else {}
        score, _ = scores.get(f"{self.data_set}/sem_seg/mIoU", (-1.0, 0))
        improves = score > self.best
        self.best = max(score, self.best)
        return improves
