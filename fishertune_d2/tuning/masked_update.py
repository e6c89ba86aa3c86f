"""Restricts an existing optimizer to some weights of its parameters, exact to the bit.

A gradient of zero does not freeze a weight: AdamW's decay shrinks it (18 % in 40 k steps at a
learning rate of 1e-4 and a decay of 0.05), and earlier momentum still moves it. So a hook masks the
gradient before each step, which also keeps it out of gradient clipping and of the moments, and
another hook restores the entries that are not selected afterwards.

A factor on the steps of a unit, in ``Selection.steps``, scales its change in each step.

Gradients and moments stay dense. :class:`fishertune_d2.tuning.SelectedWeights` costs less, because
it holds the selected entries alone; its tests compare it with this class.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fishertune_d2.fisher import FisherEstimate, Selection, Slices, entries_within, slices_of


class MaskedUpdate:
    """Restricts a stock optimizer to a growing selection of weights or neurons.

    Both hooks may run twice in a step without harm, as they do where a clipping optimizer calls its
    parent's ``step`` (Detectron2's do). Memory: dense gradients, dense moments, and one copy of the
    parameters.

    Args:
        optimizer: any ``torch.optim.Optimizer`` that holds the parameters.
        parameters: the parameters to restrict, by their names in ``selection``. The optimizer's
            other parameters are not restricted.
        selection: the selected units.

    Raises:
        ValueError: if a name or shape does not fit the selection.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        selection: Selection,
    ):
        require_same_shapes(parameters, selection)
        self.parameters = dict(parameters)
        self.selection = selection
        self.masks = {
            name: torch.zeros_like(parameter, dtype=torch.bool)
            for name, parameter in self.parameters.items()
        }
        self._slices = {name: selection.slices(name) for name in self.parameters}
        self._share = 0.0
        # The values to restore, which have never moved; with factors on the steps, all values
        # before a step.
        self._fixed = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._factors = _dense_steps(self._slices, self.parameters)
        self._stepping = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def grow(self, share: float) -> int:
        """Selects up to a share of the base, beside earlier units; returns how many weights."""
        share = max(self._share, share)
        before, count = self.selection.count(self._share), self.selection.count(share)
        for name, slices in self._slices.items():
            first, end = (entries_within(slices.ranks, rank) for rank in (before, count))
            if first < end:
                mask = self.masks[name]
                slices_of(mask, slices.dim)[slices.index[first:end].to(mask.device)] = True
        self._share = share
        return self.selection.weights(share)

    def release(self) -> None:
        """Removes the hooks; from now on the optimizer moves every entry."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                # A product with the mask would turn an infinite gradient into NaN.
                parameter.grad.masked_fill_(~self.masks[name], 0)
            if name in self._factors and not self._stepping:
                self._fixed[name].copy_(parameter)
        self._stepping = True

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for name, parameter in self.parameters.items():
            before = self._fixed[name]
            if name in self._factors and self._stepping:
                torch.lerp(before, parameter, self._factors[name], out=parameter)
            parameter.copy_(torch.where(self.masks[name], parameter, before))
        self._stepping = False


def _dense_steps(
    slices: Mapping[str, Slices], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The factors on the steps of all entries, in the shape of each parameter; empty for 1."""
    factors = {}
    for name, each in slices.items():
        if each.steps is not None:
            factors[name] = torch.ones_like(parameters[name].detach())
            own = slices_of(factors[name], each.dim)
            steps = each.steps.to(own).view(-1, *[1] * (own.dim() - 1))
            own[each.index.to(own.device)] = steps.expand(-1, *own.shape[1:])
    return factors


def require_same_shapes(
    parameters: Mapping[str, nn.Parameter], found: Selection | FisherEstimate
) -> None:
    """Refuses a selection or an estimate of another model, by names and shapes."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes == found.shapes:
        return
    differing = sorted(
        name
        for name in shapes.keys() | found.shapes.keys()
        if shapes.get(name) != found.shapes.get(name)
    )
    raise ValueError(
        f"{found.source} was made for another model: {len(differing)} parameters differ, the first "
        f"is {differing[0]}, of shape {shapes.get(differing[0])} here and "
        f"{found.shapes.get(differing[0])} there"
    )
