"""The writers of a training's numbers: console, metrics.json, TensorBoard and Weights & Biases."""

from collections.abc import Callable
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)


def build_writers(cfg: CfgNode, stage: Callable[[], str]) -> list[EventWriter]:
    """Builds Detectron2's default writers, and the one of Weights & Biases if it is asked for.

    Args:
        cfg: the config of the run. WANDB_PROJECT names the project; "" leaves the writer out.
        stage: returns the name of the stage that trains now.

    Returns:
        The writers, for Detectron2's PeriodicWriter.
    """
    folder = Path(cfg.OUTPUT_DIR)
    writers = [
        StagePrinter(stage, cfg.SOLVER.MAX_ITER),
        JSONWriter(str(folder / "metrics.json")),
        TensorboardXWriter(str(folder)),
    ]
    return [*writers, WandbWriter(cfg)] if cfg.WANDB_PROJECT else writers


class StagePrinter(CommonMetricPrinter):
    """Prints the common metrics, and the stage behind the estimated time that is left.

    The estimate multiplies the time of the iterations so far. An iteration of the warm-up is
    shorter than one of the tuning stage, so the stage tells how far to trust the estimate.

    Args:
        stage: returns the name of the stage that trains now.
        max_iter: SOLVER.MAX_ITER.
    """

    def __init__(self, stage: Callable[[], str], max_iter: int):
        super().__init__(max_iter)
        self._stage = stage

    def _get_eta(self, storage: EventStorage) -> str:
        return f"{super()._get_eta(storage) or 'unknown'}  stage: {self._stage()}"


class WandbWriter(EventWriter):
    """Writes all scalars to Weights & Biases.

    The name of the run is that of OUTPUT_DIR. A resumed run continues the curves of the first one,
    because its id is kept in OUTPUT_DIR/wandb_id.txt.

    Args:
        cfg: the config of the run, which is uploaded too.
        window_size: the number of iterations over which losses are smoothed, as on the console.

    Raises:
        ImportError: if wandb is not installed.
    """

    def __init__(self, cfg: CfgNode, window_size: int = 20):
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                f"WANDB_PROJECT is {cfg.WANDB_PROJECT!r}, and wandb is not installed: run "
                "`pip install 'fishertune-d2[wandb]'`, or leave the key empty"
            ) from error
        folder = Path(cfg.OUTPUT_DIR)
        file = folder / "wandb_id.txt"
        before = file.read_text().strip() if file.is_file() else None
        self._run = wandb.init(
            project=cfg.WANDB_PROJECT,
            name=folder.name,
            dir=str(folder),
            config=yaml.safe_load(cfg.dump()),
            id=before,
            resume="allow",
        )
        file.write_text(f"{self._run.id}\n")
        self._window_size, self._written = window_size, -1

    def write(self) -> None:
        """Uploads the scalars since the last call, an entry for each iteration."""
        storage = get_event_storage()
        by_iteration: dict[int, dict[str, float]] = {}
        for name, (value, at) in storage.latest_with_smoothing_hint(self._window_size).items():
            if at > self._written:
                by_iteration.setdefault(at, {})[name] = value
        for at in sorted(by_iteration):
            self._run.log(by_iteration[at], step=at)
        self._written = max([self._written, *by_iteration])

    def close(self) -> None:
        """Ends the upload."""
        self._run.finish()
