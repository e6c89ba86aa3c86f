"""Parts of a model that no stage of training changes."""

from torch import nn


class Frozen(nn.Module):
    """A module that stays in evaluation mode and whose weights never train.

    A stage lets all parameters of a head train, except those in such a module.
    """

    def train(self, mode: bool = True) -> "Frozen":
        """Leaves the module in evaluation mode."""
        return super().train(False)


def frozen_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Returns the parameters in the ``Frozen`` modules of a model."""
    frozen = (module for module in model.modules() if isinstance(module, Frozen))
    return {parameter for module in frozen for parameter in module.parameters()}
