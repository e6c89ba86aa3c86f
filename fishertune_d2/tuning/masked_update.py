"""Lets an optimizer move some entries of its parameters and no others, to the bit.

A gradient of zero does not freeze a weight: AdamW's decay shrinks it (18 % in 40 k steps at a
learning rate of 1e-4 and a decay of 0.05), and momentum gathered before goes on moving it. So the
gradient is masked before each step, which also keeps it out of gradient clipping and of the
moments, and what is not selected is put back after it.

This pays for dense gradients and moments, and fits an optimizer that is there already; it is also
what :class:`fishertune_d2.tuning.SelectedWeights`, which pays for the selected alone, is tested
against.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fishertune_d2.fisher import FisherEstimate, Selection


class MaskedUpdate:
    """Restricts a stock optimizer to a growing selection of entries.

    Both hooks give the same result when they run twice in a step, as they do where a clipping
    optimizer calls its parent's ``step`` (Detectron2's do). The cost is that of the dense tensors:
    gradients, moments, and one copy of the parameters.

    Args:
        optimizer: holds the parameters; any ``torch.optim.Optimizer``.
        parameters: those to restrict, by the name they have in ``selection``. Others of the
            optimizer are left alone.
        selection: the ranked choice.

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
        self._selected = dict.fromkeys(self.parameters, 0)
        # What is not selected has never moved, so the values of now are those to put back.
        self._fixed = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._hooks = [
            optimizer.register_step_pre_hook(self._mask_gradients),
            optimizer.register_step_post_hook(self._restore),
        ]

    def grow(self, share: float) -> int:
        """Selects up to ``share`` of the selection's base; what was selected stays.

        Returns:
            How many entries are selected now.
        """
        for name, mask in self.masks.items():
            joining = self.selection.prefix(name, share)[self._selected[name] :]
            if len(joining):
                mask.view(-1)[joining.to(mask.device)] = True
                self._selected[name] += len(joining)
        return sum(self._selected.values())

    def release(self) -> None:
        """Leaves the optimizer as it was; from now on it moves every entry."""
        for hook in self._hooks:
            hook.remove()

    def _mask_gradients(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                # Not by a product, which makes NaN of an infinite gradient.
                parameter.grad.masked_fill_(~self.masks[name], 0)

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for name, parameter in self.parameters.items():
            _put_back(parameter, self._fixed[name], self.masks[name])


def _put_back(parameter: Tensor, fixed: Tensor, moved: Tensor) -> None:
    parameter.copy_(torch.where(moved, parameter, fixed))


def require_same_shapes(
    parameters: Mapping[str, nn.Parameter], found: Selection | FisherEstimate
) -> None:
    """Refuses parameters that a selection or an estimate was not made for.

    Raises:
        ValueError: if a name or shape differs; names the first, and the file.
    """
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
