"""The table that a command asks for, with its setting, models, seeds and options."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from fishertune_d2.analysis.study import SEARCH

from .tables import PROFILES, RATE, Entry, Profile, Table


@dataclass(frozen=True)
class Request:
    """A table to fill, for each of its entries, foundation models and seeds.

    Attributes:
        name: The name of the table, and of the files that show it.
        output: The folder of all cells, or a study's table, which can only be reported.
        options: Keys and values in turn for every cell.
        imports: The user's own files that each cell's process imports.
    """

    name: str
    table: Table
    profile_name: str
    entries: Sequence[Entry]
    vfms: Sequence[str]
    seeds: Sequence[int]
    output: Path
    options: Sequence[str] = ()
    imports: Sequence[str] = ()

    @property
    def profile(self) -> Profile:
        """The setting."""
        return PROFILES[self.profile_name]

    @property
    def source(self) -> str:
        """The folder of configs that fixes the training data, in the profile ``paper``."""
        return self.table.source if "{source}" in self.profile.base else ""

    @property
    def searches(self) -> bool:
        """Whether learning rates are searched; otherwise they are the config's or given."""
        return bool(self.profile.rates) and self.table.search and RATE not in self.options

    @property
    def dev(self) -> tuple[str, ...]:
        """The data sets on which a search chooses."""
        return self.profile.dev or self._held_out[1]

    @property
    def test_sets(self) -> list[str]:
        """All data sets on which cells of this table may be scored."""
        tests = chain(*self.profile.test.values(), self.table.test)
        return list(dict.fromkeys([*self.dev, *tests]))

    def of_search(self) -> "Request":
        """Returns the request of the search's cells: one seed, and no held-out images.

        Cells that train in another way than those of the table have a folder of their own.
        """
        train, _ = self._held_out
        own = [*self.profile.search, *(["DATASETS.TRAIN", f"('{train}',)"] if train else [])]
        output = self.output / SEARCH if own else self.output
        options = (*self.options, *own)
        return replace(self, seeds=self.seeds[:1], options=options, output=output)

    @property
    def _held_out(self) -> tuple[str, tuple[str, ...]]:
        return self.profile.held_out.get(self.source, ("", ()))

    def place(self, vfm: str) -> Path:
        """Returns the folder of a foundation model's cells."""
        return self.output / self.source / vfm
