"""An exponential moving average of the trained weights (EMA), as a hook.

w_avg(0) = w(0), and after each later step w_avg(t) = d w_avg(t-1) + (1 - d) w(t), as in
``torch.optim.swa_utils.get_ema_multi_avg_fn``. SoMA (CVPR 2025) trains with such an average.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from fishertune_d2.tuning import SelectedWeights


class WeightAverage(HookBase):
    """Averages the weights of the tuning stage, and gives the model its averages at the end.

    A checkpoint has the averages in its model, so that everything that loads it scores or exports
    them. The trained weights themselves are in this hook's state, with which a run resumes.

    Args:
        decay: d, the weight of the earlier steps; 0 averages nothing.
        start: the first iteration that counts, T1 or later.
        selected: returns the selected weights; None if the method selects none.

    Attributes:
        averages: the averages by the names in the model's state dict; empty before
            ``start``. Entries of them that do not train stay as they are, to the bit.
    """

    def __init__(
        self,
        decay: float,
        start: int,
        selected: Callable[[], SelectedWeights | None] = lambda: None,
    ):
        self.decay = decay
        self.start = start
        self.selected = selected
        self.averages: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_step(self) -> None:
        """Adds the weights of this step."""
        if not self.decay or self.trainer.iter < self.start:
            return
        trained = trained_tensors(self.trainer.segmentor, self.selected())
        if not self.averages:
            self.averages = {name: weight.clone() for name, weight in trained.items()}
        average_into(self.averages, trained, self.decay)

    def after_train(self) -> None:
        """Gives the model its averages, unless training stopped early."""
        if self.averages and self.trainer.iter >= self.trainer.max_iter:
            self._load(self.averages)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model its averages in a ``with`` block, and the trained weights back."""
        weights = self._weights()
        self._load(self.averages)
        try:
            yield
        finally:
            self._load(weights)

    def state_dict(self) -> dict:
        """The trained weights themselves, by their names; a checkpoint's model has the averages."""
        return self._weights()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the averages from the model, which was loaded before, and restores its weights."""
        averages = self.trainer.segmentor.state_dict()
        self.averages = {name: averages[name].clone() for name in state}
        self._load(state)

    def _weights(self) -> dict[str, Tensor]:
        weights = self.trainer.segmentor.state_dict() if self.averages else {}
        return {name: weights[name].clone() for name in self.averages}

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        if weights:
            # A load sets the vectors of selected entries, too. It is a load of all tensors, since
            # the segmentor takes tensors that a load leaves out for untrained.
            segmentor = self.trainer.segmentor
            segmentor.load_state_dict({**segmentor.state_dict(), **weights})


def average_into(
    averages: Mapping[str, Tensor], trained: Mapping[str, Tensor], decay: float
) -> None:
    """Computes w_avg = d w_avg + (1 - d) w in place, for d from 0.5 to 1, without gradients."""
    for name, average in averages.items():
        # torch's own function computes w_avg + (1 - d) (w - w_avg), which loses the sign of -0.0.
        # In this order lerp computes w_avg - (1 - d) (w_avg - w), for d >= 0.5.
        torch.lerp(trained[name], average, decay, out=average)


def trained_tensors(model: nn.Module, selected: SelectedWeights | None) -> dict[str, Tensor]:
    """The tensors in which this stage trains entries, by their names in the state dict."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    # The vectors of selected weights are in no state dict, and the tensors that they belong to
    # require no gradient.
    names |= {f"backbone.{name}" for name in selected.names} if selected else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}
