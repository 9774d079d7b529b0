"""What an export asks of the order in which tokens are drawn, and the defaults where it asks nothing."""

from __future__ import annotations

from dataclasses import dataclass

from linert.exporter.group_tables import (
    MOST_WIDTHS,
    USUAL_REPULSION,
    USUAL_STEPS,
    group_sizes,
    stage_widths,
)
from linert.exporter.models import LoadedTransformer
from linert.runtime.bundles.schedule import Groups, Lines, Schedule
from linert.runtime.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class ScheduleWishes:
    """What an export asks of the schedule; what is empty or None is left open.

    ``windows``: positions that a decode step of a raster may take. ``steps``: numbers of steps of a published table. ``group_sizes``: lists of
    sizes of groups. ``group_stages``: most widths of decode stages. ``repulsion``: of the orders that are made.
    """

    windows: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    group_sizes: tuple[tuple[int, ...], ...] = ()
    group_stages: int | None = None
    repulsion: float | None = None

    def settle(self, transformer: LoadedTransformer) -> Schedule:
        """The schedule.

        Raises:
            RequestError: it is not one of such a model's, or there is no table of so many steps.
        """
        title = transformer.family.a_title
        if not transformer.family.grouped:
            told = (self.group_stages, self.repulsion)
            if self.steps or self.group_sizes or told != (None, None):
                raise RequestError(
                    f"{transformer.path} is {title}, which draws line by line: leave --steps, --group-sizes, --group-stages and "
                    "--repulsion out"
                )
            return Lines(self.windows or (1,))
        if self.windows not in ((), (1,)):
            raise RequestError(f"{transformer.path} is {title}, which draws in groups: leave --window out")
        config = transformer.config
        grid, tokens = config.line_width, config.image_tokens
        tables = group_sizes(grid)
        wanted = self.steps or (() if self.group_sizes or grid not in USUAL_STEPS else (USUAL_STEPS[grid],))
        known = f"there are tables of {', '.join(map(str, tables))} steps" if tables else "there is no table"
        if missing := [steps for steps in wanted if steps not in tables]:
            raise RequestError(
                f"no images of {grid} x {grid} tokens in {missing[0]} steps: {known}; others are told by --group-sizes"
            )
        lists = list(dict.fromkeys([*(tables[steps] for steps in wanted), *self.group_sizes]))
        if not lists:
            raise RequestError(
                f"{known} for images of {grid} x {grid} tokens: tell the sizes of the groups with --group-sizes"
            )
        for sizes in lists:
            if min(sizes) < 1 or sum(sizes) != tokens:
                raise RequestError(
                    f"groups of {sum(sizes)} tokens in all, the smallest of {min(sizes)}; must be at least 1 each and {tokens} in all"
                )
        counts = [len(sizes) for sizes in lists]
        if twice := next((count for count in counts if counts.count(count) > 1), None):
            raise RequestError(f"two lists of {twice} groups: an image is asked for by its number of steps")
        repulsion = USUAL_REPULSION.get(grid, grid / 8) if self.repulsion is None else self.repulsion
        if not 0 <= repulsion <= grid:
            raise RequestError(f"a repulsion of {repulsion:g} cells; must be 0 to {grid}")
        widths = stage_widths(lists, MOST_WIDTHS if self.group_stages is None else self.group_stages)
        return Groups(tuple(lists), widths, float(repulsion))
