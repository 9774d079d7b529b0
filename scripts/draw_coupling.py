"""How often two distributions that differ a little draw the same id with the same noise: three ways to draw.

    python scripts/draw_coupling.py

Logits of ``--ids`` ids are normally distributed with a spread that gives a perplexity of about 2,200 at 16,384 ids; the other
distribution's are the same with some noise added. Drafts of parallel decoding are kept as often as two such draws agree.
"""

from __future__ import annotations

import click
import torch
from torch import Tensor

from linert.graphs.sampling import draw, noise_size
from linert.runtime.drawing.noise import noise_rows

SPREAD = 2.0


def inverse_cdf(mass: Tensor, uniform: Tensor) -> Tensor:
    """The first id whose cumulative mass exceeds ``uniform [n]`` times the total, of ``mass [n, V]``."""
    cumulative = mass.double().cumsum(-1)
    return torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:]).squeeze(1)


@click.command()
@click.option("--ids", default=16384, show_default=True)
@click.option("--draws", default=4000, show_default=True)
def main(ids: int, draws: int) -> None:
    """Print a table: distance in total variation, and the share of equal draws of each way."""
    print("| distance | inverse CDF | arg-max over all ids | run, then id |")
    print("|---|---|---|---|")
    for change in (0.1, 0.31, 0.62, 1.15):
        generator = torch.Generator().manual_seed(0)
        same, distance = torch.zeros(3), 0.0
        for start in range(0, draws, 100):
            logits = SPREAD * torch.randn(1, ids, generator=generator).expand(100, ids)
            other = logits + change * torch.randn(100, ids, generator=generator)
            masses = logits.softmax(-1), other.softmax(-1)
            distance += (masses[0] - masses[1]).abs().sum(-1).mean().item() / 2 * 100 / draws
            uniform = torch.rand(100, generator=generator)
            whole = torch.from_numpy(noise_rows(start, 100, ids))
            parts = torch.from_numpy(noise_rows(10**6 + start, 100, noise_size(ids)))
            for way, drawn in enumerate(
                (
                    [inverse_cdf(mass, uniform) for mass in masses],
                    [(mass * whole).argmax(-1) for mass in masses],
                    [draw(mass, parts) for mass in masses],
                )
            ):
                same[way] += (drawn[0] == drawn[1]).float().mean() * 100 / draws
        print(f"| {distance:.2f} | " + " | ".join(f"{share:.0%}" for share in same.tolist()) + " |")


if __name__ == "__main__":
    main()
