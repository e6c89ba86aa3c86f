"""Sums over batches of squared gradients on x and x', for the standard error of their change."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from both_estimators import keeping_both
from fisher import SHIFT_WEIGHT
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fishertune_d2.files import whole_file
from fishertune_d2.fisher import UNITS, Diagonal, FisherEstimate, Units

QUANTITIES = ("plain", "shifted", "squares", "unpaired")
Scores = Mapping[str, Tensor]


@dataclass
class PairedSums:
    """Sums over batches of the squared gradients on x and on x', with those of their differences.

    With s_k and s'_k the sums of squares of batch k on x and on x', which see the same images and
    random numbers, the sums are those of s_k, of s'_k, of (s'_k - s_k)^2 and of s_k^2 + s'_k^2.
    The last one only serves to compare with batches that are no pairs.

    Attributes:
        images: the number of images in the sums; all batches have as many.
        batches: the number of batches.
        sums: by quantity and name, in the shapes that were added.
    """

    images: int = 0
    batches: int = 0
    sums: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {q: {} for q in QUANTITIES})

    def add(self, plain: Scores, shifted: Scores, images: int) -> None:
        """Adds one batch: s_k and s'_k by name."""
        for name, s in plain.items():
            total, total_shifted, squares, unpaired = self._totals(name, s)
            other = shifted[name]
            change = other - s
            total.add_(s)
            total_shifted.add_(other)
            squares.addcmul_(change, change)
            unpaired.addcmul_(s, s).addcmul_(other, other)
        self.images += images
        self.batches += 1

    def join(self, other: "PairedSums") -> None:
        """Adds the batches of other sums."""
        for name, like in other.sums["plain"].items():
            totals = self._totals(name, like)
            for quantity, total in zip(QUANTITIES, totals, strict=True):
                total.add_(other.sums[quantity][name])
        self.images += other.images
        self.batches += other.batches

    def _totals(self, name: str, like: Tensor) -> list[Tensor]:
        """The sums of one name, in the order of ``QUANTITIES``; new ones are 0."""
        for values in self.sums.values():
            if name not in values:
                values[name] = torch.zeros_like(like)
        return [self.sums[quantity][name] for quantity in QUANTITIES]

    def estimate(self, shift_weight: float = SHIFT_WEIGHT) -> FisherEstimate:
        """F(x) and F(x'), means over images."""
        f, shifted = (
            {name: value / self.images for name, value in self.sums[quantity].items()}
            for quantity in ("plain", "shifted")
        )
        return FisherEstimate(f, shifted, shift_weight, self.images)

    def standard_errors(self, *, paired: bool = True) -> dict[str, Tensor]:
        """The standard error of F(x') - F(x) by name, from the variance between batches.

        Args:
            paired: use the differences of batches; False to take F(x) and F(x') as independent.

        Returns:
            By name, in the unit of F: for a mean over images.

        Raises:
            ValueError: if there are fewer than two batches.
        """
        if self.batches < 2:
            raise ValueError(f"a standard error needs two batches: got {self.batches}")
        errors, count = {}, self.batches
        for name, plain in self.sums["plain"].items():
            s, shifted = (total.double() / count for total in (plain, self.sums["shifted"][name]))
            quantity = "squares" if paired else "unpaired"
            means = (shifted - s).square() if paired else s.square() + shifted.square()
            variance = self.sums[quantity][name].double() / count - means
            error = (variance.clamp_min_(0) / (count - 1)).sqrt_()
            errors[name] = (error * (count / self.images)).to(plain.dtype)
        return errors


def gather(
    batches: Iterable[list[dict]],
    estimate: Callable[[Iterator[list[dict]], Callable], FisherEstimate],
) -> tuple[dict[str, PairedSums], FisherEstimate]:
    """Gathers the sums of weights and of neurons' means in the pass of an estimate.

    Args:
        batches: of as many images each.
        estimate: estimates F(x) and F(x') from batches, with a given estimator.

    Returns:
        The sums by unit, and the estimate, of which only the shift's weight is right.
    """
    gathered = {unit: PairedSums() for unit in UNITS}
    made, making = keeping_both(Diagonal)

    def watching() -> Iterator[list[dict]]:
        for batch in batches:
            yield batch
            shapes = {name: tuple(value.shape) for name, value in made[0].sums.items()}
            for unit, sums in gathered.items():
                means = [Units(unit, shapes).mean(each.sums) for each in made]
                sums.add(*means, len(batch))
            for each in made:  # so that the next batch's sums are those of that batch alone
                for value in each.sums.values():
                    value.zero_()

    found = estimate(watching(), making)
    return gathered, found


def save(path: Path, gathered: Mapping[str, PairedSums], **notes: object) -> None:
    """Writes the sums of :func:`gather`, with notes."""
    tensors = {
        f"{unit}/{quantity}/{name}": value
        for unit, sums in gathered.items()
        for quantity, values in sums.sums.items()
        for name, value in values.items()
    }
    some = next(iter(gathered.values()))
    notes |= {"images": some.images, "batches": some.batches, "names": list(tensors)}
    with whole_file(path) as temporary:
        save_file(tensors, str(temporary), metadata={"notes": json.dumps(notes)})


def load(path: Path, unit: str) -> tuple[PairedSums, dict]:
    """Reads the sums of one unit, and the notes, with the shapes of the parameters."""
    with safe_open(str(path), framework="pt") as file:
        notes = json.loads(file.metadata()["notes"])
        keys = [key for key in notes["names"] if key.startswith("weight/plain/")]
        shapes = {key.split("/")[2]: tuple(file.get_slice(key).get_shape()) for key in keys}
        notes["shapes"] = shapes
        sums = PairedSums(notes["images"], notes["batches"])
        for key in notes["names"]:  # the file sorts them
            own, quantity, name = key.split("/")
            if own == unit:
                sums.sums[quantity][name] = file.get_tensor(key)
    return sums, notes
