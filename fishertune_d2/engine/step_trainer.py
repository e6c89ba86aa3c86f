"""One training step with autocast, gradient accumulation and a log of losses."""

import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from fishertune_d2.modeling.heads import kind_of_loss, require_divisors

# Steps between downloads of the losses, for which the host waits for a GPU: as often as Detectron2
# writes metrics.
LOG_PERIOD = 20


class StepTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer and AMPTrainer in one, on any device, with gradient accumulation.

    AMPTrainer refuses CPUs and always scales losses, which only float16 needs. Both download the
    losses in each step; this class downloads those of ``LOG_PERIOD`` steps together, after the
    optimizer's step. The log and metrics.json still get the losses of every step.

    Args:
        model: returns losses by name, each a sum divided by a number. With more than one part, it
            must state those numbers: see ``VFMSegmentor.loss_divisors`` and
            ``require_splittable``, which refuses a model that does not.
        data_loader: yields batches, lists of images.
        dtype: the dtype of autocast; None for no autocast. float16 gets a GradScaler.
        parts: how many parts of a batch pass through the model one after the other. The gradients
            add up to those of the whole batch, and activations are kept for one part at a time.

    Raises:
        ValueError: if ``parts`` is not positive.
    """

    def __init__(
        self,
        model: Any,  # a segmentor, or its DDP wrapper
        data_loader: DataLoader,
        *,
        dtype: torch.dtype | None = None,
        parts: int = 1,
    ):
        if parts < 1:
            raise ValueError(f"SOLVER.ACCUMULATE is {parts}: choose at least 1 part")
        if parts > 1:
            model.require_splittable()
        super().__init__(model, data_loader, optimizer=None)
        self.dtype = dtype
        self.parts = parts
        self.device_type = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)
        # Of each step since the last download: iteration, losses by name, seconds for the data.
        self._unwritten: list[tuple[int, dict[str, torch.Tensor], float]] = []
        # The batch of the next step and its seconds, once it is drawn.
        self._drawn: tuple[list[dict], float] | None = None

    def draw(self) -> list[dict]:
        """Draws the batch of the next step, for a hook that completes it before the step."""
        if self._drawn is None:
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            self._drawn = batch, time.perf_counter() - start
        return self._drawn[0]

    def run_step(self) -> None:
        """Draws a batch, adds up the gradients of its parts, and moves the weights."""
        self.draw()
        assert self._drawn is not None
        (batch, data_time), self._drawn = self._drawn, None
        parts = _split(batch, self.parts)
        segmentor = getattr(self.model, "module", self.model)
        whole = segmentor.loss_divisors(batch) if len(parts) > 1 else {}
        sums: Counter = Counter()
        for k, part in enumerate(parts):
            with self._exchanging_gradients(k == len(parts) - 1):
                with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
                    losses = self.model(part)
                if whole:
                    losses = _as_shares(losses, segmentor.loss_divisors(part), whole)
                if k == 0:  # where SimpleTrainer does it
                    self.optimizer.zero_grad()
                self.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
            sums.update({name: loss.detach() for name, loss in losses.items()})
        self.after_backward()
        # A fused optimizer would do this within its step, after the gradients are clipped.
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._unwritten.append((self.iter, dict(sums), data_time))
        if (self.iter + 1) % LOG_PERIOD == 0:
            self.write_losses()

    def write_losses(self) -> None:
        """Writes the losses of the steps since the last call; every process must call it.

        Detectron2 raises a FloatingPointError if a loss is not finite.
        """
        if not self._unwritten:
            return
        losses = [loss for _, step, _ in self._unwritten for loss in step.values()]
        downloaded = iter(torch.stack(losses).cpu())  # the one wait
        for iteration, step, data_time in self._unwritten:
            step = {name: next(downloaded) for name in step}
            self.write_metrics(step, data_time, iteration)
        self._unwritten = []

    def _exchanging_gradients(self, now: bool) -> AbstractContextManager:
        """Lets processes add up their gradients once for all parts."""
        several = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if several and not now else nullcontext()

    def state_dict(self) -> dict:
        """Iteration, optimizer and, for float16, the scaler."""
        return {**super().state_dict(), "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what ``state_dict`` gave."""
        super().load_state_dict(state_dict)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state_dict["grad_scaler"])


def largest_part(images: int, parts: int) -> int:
    """The number of images in the largest part of a batch."""
    return -(-images // parts)


def _split(batch: list, parts: int) -> list[list]:
    """Cuts a batch into parts whose sizes differ by at most one, the largest first, none empty."""
    images, parts = len(batch), min(parts, len(batch))
    ends = [largest_part(images * k, parts) for k in range(parts + 1)]
    return [batch[start:end] for start, end in pairwise(ends)]


def _as_shares(losses: dict, own: dict, whole: dict) -> dict:
    """Turns the losses of a part, divided by its own numbers, into shares of the whole batch's."""
    require_divisors(losses, whole)
    kinds = {name: kind_of_loss(name) for name in losses}
    return {name: loss * (own[kinds[name]] / whole[kinds[name]]) for name, loss in losses.items()}
