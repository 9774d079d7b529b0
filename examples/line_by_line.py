"""Save an image as it grows: one picture after every line of tokens.

python examples/line_by_line.py bundle --condition 3 --out growing
"""

from __future__ import annotations

from pathlib import Path

import click

import linert


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--condition", required=True, help="A class, or a prompt.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("growing"), show_default=True)
def main(bundle: Path, condition: str, seed: int, out: Path) -> None:
    asked = linert.ClassLabel(int(condition)) if condition.isdecimal() else linert.Prompt(condition)
    out.mkdir(parents=True, exist_ok=True)
    with linert.Generator(bundle) as generator:
        patch = generator.manifest.image_decoder.patch

        def save(lines: int) -> None:
            """Called with the number of finished lines; tokens that are still to come are shown as grey."""
            pixels = generator.decoder(generator.tokens(1))
            pixels[:, :, lines * patch :] = 0
            linert.picture(pixels[0]).save(out / f"line_{lines:03d}.png")

        generator.draw([linert.Sample(asked, seed)], on_line=save)
    print(f"{len(list(out.glob('line_*.png')))} pictures: {out}")


if __name__ == "__main__":
    main()
