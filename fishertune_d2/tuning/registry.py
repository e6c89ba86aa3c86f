"""The base classes of tuning methods and their registry.

A method is one file: a class, and a registered function ``name(cfg) -> TuningMethod``.
``TUNING.METHOD`` takes the function's name.
"""

from collections.abc import Mapping
from typing import cast

import torch
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor, nn

from fishertune_d2.config_slips import nearest
from fishertune_d2.fisher import Candidate, FisherEstimate, Units, find_candidates
from fishertune_d2.modeling.vfm import VFMBackbone

TUNING_REGISTRY = Registry("TUNING")


class TuningMethod:
    """Base class. A subclass says which parameters train.

    Attributes:
        selects: whether only the best-scored weights of the parameters move. If so, the trainer
            calls :meth:`unit_scores` after warm-up; see :class:`SelectiveMethod`.
        estimates: whether :meth:`scores` needs the Fisher information; only read if ``selects``.
        compares_domains: whether :meth:`scores` needs F(x') beside F(x), and so a shift.
        schedule: the growth of the share, if it is a part of the method; else TUNING.SCHEDULE.
        adds: whether the method adds parameters; see :class:`AddingMethod`.
        undecayed: parts of names of added parameters with SOLVER.WEIGHT_DECAY_EMBED instead of the
            usual weight decay, such as tokens, and factors: decay pulls towards 0, not towards the
            start. The default has the usual names, for methods that set none.
        takes_warmup: whether the method gains from a warm-up; if not, the bench trains without.
        options: the groups of keys below TUNING that the method reads, such as "LORA"; None if they
            are unknown. A run's record leaves the groups of other methods out.
    """

    selects: bool = False
    estimates: bool = True
    compares_domains: bool = False
    schedule: str = ""
    adds: bool = False
    undecayed: tuple[str, ...] = ("learnable_tokens", "prompts", ".scale")
    takes_warmup: bool = True
    options: tuple[str, ...] | None = None

    def attach(self, backbone: nn.Module, head: nn.Module | None = None) -> None:
        """Adds the method's parameters; only called if ``adds``.

        The call comes when the tuning stage begins, so that methods can share one warm-up; before a
        checkpoint of that stage is loaded; and on the meta device, to count parameters. New tensors
        may be on the CPU: the caller moves them to the backbone's device.

        Args:
            backbone: gets the parameters, with their own names in the state dict. A method that
                does not work on its family raises a ValueError with the reason.
            head: parameters added to it train with the decoder; None to count the backbone alone.
        """
        raise NotImplementedError

    def merge(self, backbone: nn.Module) -> None:
        """Writes the added parameters into the backbone's own weights, and removes them.

        Afterwards the backbone is a plain one that computes the same; only called if ``adds``.

        Args:
            backbone: a backbone after :meth:`attach`.
        """
        raise NotImplementedError

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """The backbone's parameters that the optimizer holds in the tuning stage, by name.

        Args:
            backbone: with the method's parameters attached. Its forward pass does not reach its
                ``unused_parameters()``, so these must not be returned: DDP would wait for their
                gradients.
        """
        raise NotImplementedError

    def scores(self, backbone: nn.Module, estimate: FisherEstimate) -> Mapping[str, Tensor]:
        """One score for each weight of the parameters; only called if ``selects``.

        Args:
            backbone: as in :meth:`parameters`.
            estimate: F(x) and F(x'). A method that does not estimate gets None, and says so in its
                signature.
        """
        raise NotImplementedError

    def unit_scores(
        self, backbone: nn.Module, estimate: FisherEstimate, units: Units
    ) -> Mapping[str, Tensor]:
        """One score for each unit of the parameters; only called if ``selects``.

        A method overrides this if its score of a unit is not the mean of the weights' scores, such
        as a ratio of two means.

        Args:
            backbone: as in :meth:`parameters`.
            estimate: as in :meth:`scores`.
            units: the units of :meth:`parameters`: single weights or neurons.

        Returns:
            The mean of the :meth:`scores` of each unit's weights, by group of units.
        """
        return units.mean(self.scores(backbone, estimate))


class SelectiveMethod(TuningMethod):
    """Base class of methods that select among the candidates of Eq. 3 by a score."""

    selects = True
    options: tuple[str, ...] | None = ()

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that hold a candidate: whole tensors, of which selected weights move."""
        return {c.name: c.parameter for c in find_candidates(backbone)}

    def candidates(self, backbone: nn.Module) -> list[Candidate]:
        """The weights that may be selected; by default all candidates of Eq. 3."""
        return find_candidates(backbone)

    def selectable(self, backbone: nn.Module, units: Units) -> dict[str, Tensor]:
        """Whether each unit may be selected, which it may if it holds :meth:`candidates`.

        Args:
            backbone: as in :meth:`parameters`; it may be on the meta device.
            units: the units of :meth:`parameters`.

        Returns:
            Booleans by group of units, on the CPU: (units,), or, for single weights, in the
            parameters' shapes.
        """
        own = self.parameters(backbone)
        held = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in own.items()}
        for candidate in self.candidates(backbone):
            if candidate.name in held:  # parameters() may leave some out
                held[candidate.name][candidate.rows] = True
        return {group: part > 0 for group, part in units.mean(held).items()}


class AddingMethod(TuningMethod):
    """Base class of methods that train one added module, while the backbone stays frozen.

    Attributes:
        name: the attribute of the backbone that holds the module; also TUNING.METHOD.
        no_merge: the reason why no plain backbone computes the same.
    """

    adds = True
    name: str
    no_merge: str

    def build_module(self, backbone: VFMBackbone, head: nn.Module | None) -> nn.Module:
        """Builds the module with the added parameters, and hooks it into the blocks."""
        raise NotImplementedError

    def attach(self, backbone: nn.Module, head: nn.Module | None = None) -> None:
        """Adds the module to the backbone, which must be a plain ViT."""
        require_vit(backbone.get_submodule("vit"), self.name)
        setattr(backbone, self.name, self.build_module(cast(VFMBackbone, backbone), head))

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters of the added module."""
        added = backbone.get_submodule(self.name).named_parameters()
        return {f"{self.name}.{name}": parameter for name, parameter in added}

    def merge(self, backbone: nn.Module) -> None:
        """Refuses with ``no_merge``; a method that can merge overrides this."""
        raise ValueError(
            f"TUNING.METHOD {self.name} cannot be merged: {self.no_merge}. Export the run's "
            "checkpoint"
        )


def require_vit(model: nn.Module, method: str) -> None:
    """Refuses a backbone that is no plain ViT, for a method that works on tokens of blocks.

    Raises:
        ValueError: names the backbone, the method and the methods that work.
    """
    if not hasattr(model, "blocks"):
        raise ValueError(
            f"TUNING.METHOD {method} is made for the blocks of a plain ViT, and this backbone is a "
            f"{type(model).__name__}: choose a method without additions, such as freeze, full or "
            "fishertune, or TUNING.METHOD peft with the layers fc1 and fc2 as TUNING.PEFT.TARGETS"
        )


def linear(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    """A layer with PyTorch's initialisation, on a tensor's device and of its dtype."""
    return nn.Linear(inputs, outputs, device=like.device, dtype=like.dtype)


def uniform(shape: tuple[int, ...], bound: float, like: Tensor) -> nn.Parameter:
    """A parameter of numbers between -bound and bound, on a tensor's device and of its dtype."""
    return nn.Parameter(like.new_empty(shape).uniform_(-bound, bound))


def build_tuning_method(cfg: CfgNode) -> TuningMethod:
    """Builds the method that ``cfg.TUNING.METHOD`` names; refuses unknown ones and lists all."""
    method, methods = cfg.TUNING.METHOD, [name for name, _ in TUNING_REGISTRY]
    if method not in methods:
        near = nearest(method, methods)
        meant = f"did you mean {' or '.join(near)}? There are" if near else "choose from"
        raise ValueError(f"TUNING.METHOD is {method!r}: {meant} {', '.join(sorted(methods))}")
    return TUNING_REGISTRY.get(method)(cfg)
