"""Evaluations during training and at its end, and the checkpoint with the highest mIoU."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from detectron2.engine import hooks
from detectron2.utils import comm

from fishertune_d2.files import whole_file

from .checkpoint import WholeCheckpointer

BEST = "model_best"
_SCORE = "/sem_seg/mIoU"


class Evaluation(hooks.EvalHook):
    """Detectron2's EvalHook, which a stop does not rob of a score, and the best checkpoint.

    ``model_best.pth`` is written when an evaluation has the highest mIoU so far on a data set.
    Detectron2's BestCheckpointer forgets the best score when a run resumes; here the score is in
    each checkpoint. Register this hook after the checkpointer's, in all processes.

    Args:
        period: the iterations between two evaluations; 0 evaluates at the end alone.
        evaluate: scores the model, and leaves its weights as they were.
        checkpointer: writes the checkpoints.
        best_on: the name of the data set; "" keeps no best checkpoint.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict],
        checkpointer: WholeCheckpointer,
        best_on: str = "",
    ):
        super().__init__(period, evaluate)
        self.checkpointer = checkpointer
        self.best_on = best_on
        self.best = -1.0  # mIoU in percent

    def before_train(self) -> None:
        """Makes up for the evaluation that a stop cut off, after the checkpoint's iteration."""
        trainer, last = self.trainer, self.trainer.start_iter - 1
        # A run that starts from another's warm-up has no checkpoint of its own.
        resumed = last >= 0 and self.checkpointer.has_checkpoint()
        if comm.all_gather(resumed and not self._is_scored(last))[0]:
            trainer.iter = trainer.storage.iter = last
            self.after_step()
            trainer.iter = trainer.storage.iter = trainer.start_iter

    def after_step(self) -> None:
        """Evaluates every ``period`` iterations, and writes a checkpoint if it is the best."""
        try:
            super().after_step()
        except SystemExit:  # of a signal; the last checkpoint may lie many iterations back
            self.checkpointer.save("model_preempted", iteration=self.trainer.iter)
            raise
        if self._improves():
            self.checkpointer.save(BEST, iteration=self.trainer.iter)

    def after_train(self) -> None:
        """Evaluates at the end, and copies ``model_final.pth`` if it is the best."""
        super().after_train()
        if self.trainer.iter >= self.trainer.max_iter and self._improves():
            folder = Path(self.checkpointer.save_dir)
            with whole_file(folder / f"{BEST}.pth") as temporary:
                shutil.copyfile(folder / "model_final.pth", temporary)

    def state_dict(self) -> dict:
        """The best score, so that a resumed run knows it."""
        return {"best": self.best, "data_set": self.best_on} if self.best_on else {}

    def load_state_dict(self, state: dict) -> None:
        """Restores the best score, if it is of this run and data set."""
        # A run that takes over another's warm-up also gets the state of that run's hooks.
        own = Path(self.checkpointer.save_dir, f"{BEST}.pth").is_file()
        if own and state.get("data_set", self.best_on) == self.best_on:
            self.best = state["best"]

    def _improves(self) -> bool:
        """Whether the last score is above the best one, which it replaces."""
        # Only the first process has scores.
        scores = self.trainer.storage.latest() if self.best_on else {}
        score, _ = scores.get(f"{self.best_on}{_SCORE}", (-1.0, 0))
        improves = score > self.best
        self.best = max(score, self.best)
        return improves

    def _is_scored(self, iteration: int) -> bool:
        """Whether metrics.json has a score of this iteration."""
        file = Path(self.checkpointer.save_dir, "metrics.json")
        for line in file.read_text().splitlines() if file.is_file() else ():
            with suppress(ValueError):  # a kill cut the line off
                if _SCORE in line and json.loads(line).get("iteration") == iteration:
                    return True
        return False
