"""Catches every ``F.linear`` of a forward pass that multiplies by a candidate.

A call is recognised by its weight, not by its module, so that functional calls count too (timm's
EVA joins its fused projection from a matrix and separate biases).

Shapes: x (B', ..., in), weight (out, in), bias (out,), y (B', ..., out). B' is B images, or B times
the windows of an image, one image after the other, as window attention folds them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass
class LinearCall:
    """One call of ``F.linear`` whose weight or bias is a candidate, or a bias joined from several.

    Attributes:
        x: its input.
        weight: the matrix.
        bias: the bias, or None.
        weight_name: the name of the candidate if the matrix is one, else None.
        bias_names: the names of the candidates in the bias, each with its slice of the outputs.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    weight_name: str | None
    bias_names: list[tuple[str, slice]] = field(default_factory=list)

    def output(self) -> Tensor:
        """The plain result of the call, (B', ..., out)."""
        return F.linear(self.x, self.weight, self.bias)

    @property
    def names(self) -> list[str]:
        """The names of all candidates of the call."""
        own = [] if self.weight_name is None else [self.weight_name]
        return own + [name for name, _ in self.bias_names]


class LinearCalls(TorchFunctionMode):
    """A context in which ``run`` computes every ``F.linear`` on a candidate.

    Args:
        parameters: the candidates' parameters by name.
        run: from the call to its output, (B', ..., out).

    Attributes:
        seen: names of the parameters that the calls have used so far.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], run: Callable[[LinearCall], Tensor]):
        super().__init__()
        self.run = run
        self.seen: set[str] = set()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        # Biases that torch.cat joined from several parameters. Keeping the tensor keeps its id from
        # being given to another one.
        self._joined: dict[int, tuple[Tensor, list[tuple[str, slice]]]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """See torch.overrides."""
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is torch.cat:
            self._join(result, *args, **kwargs)
        return result

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        bias_names: list[tuple[str, slice]] = []
        if bias is not None and id(bias) in self._names:
            bias_names = [(self._names[id(bias)], slice(0, len(bias)))]
        elif id(bias) in self._joined:
            bias_names = self._joined[id(bias)][1]
        call = LinearCall(input, weight, bias, self._names.get(id(weight)), bias_names)
        if not call.names:
            return call.output()
        if not torch.is_grad_enabled():
            raise ValueError(
                f"{call.names[0]} is used where no graph is kept, by torch.no_grad or an "
                "activation checkpoint: switch that off for the estimate"
            )
        for name in call.names:
            if name in self.seen:
                raise ValueError(
                    f"{name} is used twice in one forward pass over a batch, so that the gradient "
                    "of an image is no single product: use the estimator 'diagonal_loop', or a "
                    "loss_fn that passes the whole batch through the model at once"
                )
            self.seen.add(name)
        return self.run(call)

    def _join(self, result: Tensor, tensors=(), dim: int = 0, **kwargs) -> None:
        start, parts = 0, []
        if result.dim() != 1:
            return
        for tensor in tensors:
            if id(tensor) in self._names:
                parts.append((self._names[id(tensor)], slice(start, start + len(tensor))))
            start += len(tensor)
        if parts:
            self._joined[id(result)] = (result, parts)
