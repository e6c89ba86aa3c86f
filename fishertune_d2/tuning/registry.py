"""What of the backbone is trained after warm-up: the contract and the registry of methods.

A method is one file: a class, and a function ``name(cfg) -> TuningMethod``, whose name is what
``TUNING.METHOD`` takes.
"""

from collections.abc import Mapping

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor, nn

from fishertune_d2.config_slips import nearest
from fishertune_d2.fisher import Candidate, FisherEstimate, find_candidates

TUNING_REGISTRY = Registry("TUNING")


class TuningMethod:
    """Base class. A subclass says which parameters train.

    One that selects among the backbone's own weights scores them; one that adds weights attaches
    them, and leaves the backbone's own as they are.

    Attributes:
        selects: whether only the best-scored weights of the parameters move. If so, the trainer
            calls :meth:`scores` after warm-up.
        estimates: whether :meth:`scores` needs the Fisher information; only read if ``selects``.
        compares_domains: whether :meth:`scores` needs F(x') beside F(x), so a shift between them.
        schedule: how the share grows, if that is part of the method; else TUNING.SCHEDULE says.
        adds: whether the method adds parameters of its own. If so, :meth:`attach` is called once
            for each model.
        options: the groups of keys below TUNING that the method reads, such as "LORA"; None if that
            is not known. Other methods' groups are no part of a run's record.
    """

    selects = False
    estimates = True
    compares_domains = False
    schedule = ""
    adds = False
    options: tuple[str, ...] | None = None

    def attach(self, backbone: nn.Module, head: nn.Module | None = None) -> None:
        """Adds what the method adds; only called if ``adds``.

        That is when the tuning stage begins, so that methods share one warm-up; before a checkpoint
        of that stage is loaded; and on the meta device, where numbers are counted. New tensors may
        be made on the CPU, for they are moved to the backbone's device afterwards.

        Args:
            backbone: what is added becomes a part of it, with names of its own in the state dict.
            head: what is added to it trains with the decoder; None where only the backbone counts.

        Raises:
            ValueError: if the method does not work on this family of backbones; says why.
        """
        raise NotImplementedError

    def merge(self, backbone: nn.Module) -> None:
        """Writes what was added into the backbone's own weights, and takes it out again.

        Afterwards the backbone is a plain one that computes what it did before; only called if
        ``adds``.

        Args:
            backbone: as :meth:`attach` left it.

        Raises:
            ValueError: if no plain backbone computes the same; says why.
        """
        raise NotImplementedError

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """The backbone's parameters that the optimizer holds in the tuning stage, by name.

        Args:
            backbone: its ``unused_parameters()`` are not reached by its forward pass and must not
                be among them (DDP would wait for their gradients). What the method adds is
                attached.
        """
        raise NotImplementedError

    def scores(self, backbone: nn.Module, estimate: FisherEstimate | None) -> Mapping[str, Tensor]:
        """One score for each weight of the parameters; only called if ``selects``.

        Args:
            backbone: as in :meth:`parameters`.
            estimate: F(x) and F(x'); None if not ``estimates``.
        """
        raise NotImplementedError


class SelectiveMethod(TuningMethod):
    """Base class of the methods that choose among the candidates of Eq. 3."""

    selects = True
    options = ()

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that hold a candidate: whole tensors, of which a selection moves."""
        return {c.name: c.parameter for c in find_candidates(backbone)}

    def candidates(self, backbone: nn.Module) -> list[Candidate]:
        """The weights that a selection may choose from; all candidates of Eq. 3 by default."""
        return find_candidates(backbone)


def build_tuning_method(cfg: CfgNode) -> TuningMethod:
    """The method that ``cfg.TUNING.METHOD`` names.

    Raises:
        ValueError: if there is no such method; names those there are.
    """
    method, methods = cfg.TUNING.METHOD, [name for name, _ in TUNING_REGISTRY]
    if method not in methods:
        near = nearest(method, methods)
        meant = f"did you mean {' or '.join(near)}? There are" if near else "choose from"
        raise ValueError(f"TUNING.METHOD is {method!r}: {meant} {', '.join(sorted(methods))}")
    return TUNING_REGISTRY.get(method)(cfg)
