"""What an estimator needs beside the model, so that it can be planned without running it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The cost of measuring F on one domain, x or x'.

    Numbers are counted for each weight of the parameters that hold candidates, and are float32.
    What an estimator adds to the graph of a pass (``variational`` draws noise) is left out.

    Attributes:
        kept: numbers that the estimator keeps from batch to batch.
        extra: further numbers that are there at the end of a forward pass.
        passes: forward and backward passes over each batch.
        images: how many images a pass holds; None for the whole batch.
    """

    kept: int = 1
    extra: int = 0
    passes: int = 1
    images: int | None = None
