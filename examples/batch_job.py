"""Draw a list of jobs (JSON lines) through one bundle, batch by batch; what is there already is not drawn again.

{"name": "fox", "condition": "a red fox in fresh snow", "seed": 1}
{"name": "three", "condition": 3, "seed": 5}

python examples/batch_job.py bundle jobs.jsonl --out drawn
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import linert


def sample_of(job: dict[str, Any]) -> linert.Sample:
    condition = job["condition"]
    made = linert.ClassLabel(condition) if isinstance(condition, int) else linert.Prompt(condition)
    return linert.Sample(made, job.get("seed", 0))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("jobs", type=click.File(encoding="utf-8"))
@click.option("--out", type=click.Path(path_type=Path), default=Path("drawn"), show_default=True)
def main(bundle: Path, jobs: Any, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    listed = [json.loads(line) for line in jobs if line.strip()]
    left = [job for job in listed if not (out / f"{job['name']}.png").exists()]
    print(f"{len(listed)} jobs, {len(left)} to draw")
    with linert.Generator(bundle) as generator:
        names = iter([job["name"] for job in left])
        # Rows of a batch do not see each other: an image does not depend on its company.
        for group in generator.batches([sample_of(job) for job in left]):
            for pixels in generator.decoder(generator.draw(group)):
                path = out / f"{next(names)}.png"
                linert.picture(pixels).save(path)
                print(path)


if __name__ == "__main__":
    main()
