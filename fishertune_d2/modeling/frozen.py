"""Parts of a model that no stage of training changes."""

from torch import nn


class Frozen(nn.Module):
    """A module that stays in evaluation mode and whose weights never train.

    A stage lets all parameters of a head train, except those in such a module.
    """

    def train(self, mode: bool = True) -> "Frozen":
        """Leaves the module in evaluation mode."""
        return super().train(False)


def fixed_parts(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that no stage trains and files fill: ``Frozen`` ones and public copies.

    A module may have ``public_copy``, a module that is no part of its state dict.
    """
    copies = [getattr(module, "public_copy", None) for module in model.modules()]
    frozen = [module for module in model.modules() if isinstance(module, Frozen)]
    return frozen + [copy for copy in copies if copy is not None]


def frozen_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Returns the parameters in the ``Frozen`` modules of a model."""
    frozen = (module for module in model.modules() if isinstance(module, Frozen))
    return {parameter for module in frozen for parameter in module.parameters()}
