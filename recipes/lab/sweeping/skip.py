"""What a sweep skips."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lab.sweeping.grid import by_name, expand, values_in
from lab.sweeping.recipe import Recipe

Options = Mapping[str, Any]


class Skip:
    """The entries of a sweep's option skip: combinations that have all values of one are not run.

    A value of an entry may be a list of them. None is the value that it stands for, in an entry and
    in a run, and radii are equal if they differ by rounding alone.
    """

    def __init__(self, entries: Sequence[Any], recipe: Recipe) -> None:
        """Check the entries.

        Raises:
            SystemExit: If an option is unknown or wrong, after a message.
            ValueError: If an entry is no mapping, or empty.
        """
        self.recipe = recipe
        self._choices = [self._written_out(entry) for entry in entries]
        self._unused = dict(enumerate(entries))

    @property
    def names(self) -> list[str]:
        """Names of the options in the entries."""
        return list(values_in(itertools.chain(*self._choices)))

    def left_of(
        self,
        combinations: Sequence[dict[str, Any]],
        fixed: Options,
        searched: Collection[str] = (),
    ) -> list[dict[str, Any]]:
        """The combinations that are run.

        Args:
            combinations: All of a grid.
            fixed: Options beside the grid.
            searched: Names of options that a search has yet to choose, which match no entry.
        """
        if not self._choices:
            return list(combinations)
        left = []
        for combination in combinations:
            matching = self._matching({**fixed, **combination}, searched)
            for number in matching:
                self._unused.pop(number, None)
            if not matching:
                left.append(combination)
        return left

    def check_used(self) -> None:
        """Raise ValueError if an entry has not matched any combination."""
        for entry in self._unused.values():
            raise ValueError(
                f"an entry of skip must match a combination of the sweep, {entry} matches none; "
                "correct it, or remove it"
            )

    def _matching(self, options: Options, searched: Collection[str]) -> list[int]:
        """Numbers of the entries that options match."""
        run = self.recipe.resolve(options)
        values = {}
        for name, value in run.given.items():
            if name not in searched:
                values[name] = run.complete[name] if value is None else value
        values = self.recipe.with_plain_radii(values)
        found = []
        for number, choices in enumerate(self._choices):
            wanted = [self._complete(choice, options) for choice in choices]
            if any(values | one == values for one in wanted):
                found.append(number)
        return found

    def _complete(self, choice: Options, options: Options) -> dict[str, Any]:
        """Values of an entry, with what None stands for in a run of these options."""
        defaults = [name for name, value in choice.items() if value is None]
        values = dict(choice)
        if defaults:
            run = self.recipe.resolve({**options, **dict.fromkeys(defaults)})
            values |= {name: run.complete[name] for name in defaults}
        return self.recipe.with_plain_radii(values)

    def _written_out(self, entry: Any) -> list[dict[str, Any]]:
        """An entry without lists: the sets of values that it skips."""
        values = by_name(entry, "an entry of skip", "{neuron: lif, rho: [1, 2]}")
        if not values:
            raise ValueError(
                "an entry of skip needs at least one option, got an empty one, which would skip "
                "everything"
            )
        lists = {}
        for name, value in values.items():
            lists[name] = value if isinstance(value, list) else [value]
        choices = []
        for choice in expand(lists):
            given = self.recipe.resolve(choice, "skip").given
            choices.append({name: given[name] for name in choice})
        return choices
