"""Draw images from a bundle, and keep what made them.

python examples/draw.py bundle --condition 3 --condition 7 --images 4 --out pictures
"""

from __future__ import annotations

from pathlib import Path

import click

import linert


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--condition", "conditions", multiple=True, required=True, help="A class, or a prompt.")
@click.option("--images", type=int, help="Images in all; conditions take turns. Default: one each.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("pictures"), show_default=True)
def main(bundle: Path, conditions: tuple[str, ...], images: int | None, seed: int, out: Path) -> None:
    asked = [int(text) if text.isdecimal() else text for text in conditions]
    out.mkdir(parents=True, exist_ok=True)
    # The generator holds memory, and on a GPU a device: `with` gives both back.
    with linert.Generator(bundle) as generator:
        print(f"{generator.manifest.model.family}, {generator.manifest.size} pixels")
        for image in generator.generate(asked, images, seed):
            path = out / image.sample.file_name
            image.picture().save(path)
            print(path)


if __name__ == "__main__":
    main()
