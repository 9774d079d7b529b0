#!/usr/bin/env python3
"""Picture the page of `linert serve` after it has drawn, for the documentation; needs the extra dev and Debian's chromium and chromium-driver.

    python scripts/page_screenshot.py out/words --model words --prompt "a red apple" --out docs/page.png

The server is started and ended here.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

SECONDS = 120


@contextmanager
def served(bundles: tuple[Path, ...]) -> Iterator[str]:
    """The address of a server of the bundles."""
    command = [sys.executable, "-m", "linert", "serve", *map(str, bundles), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stderr or ():
                if found := re.search(r"http://\S+", line):
                    yield found[0]
                    return
            raise click.ClickException("the server did not start")
        finally:
            server.send_signal(signal.SIGTERM)


@contextmanager
def browser(width: int, height: int) -> Iterator[Any]:
    """A headless Chromium with a window of this size."""
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        yield driver


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--model", help="The bundle that draws. Default: the first.")
@click.option("--prompt", "prompts", multiple=True, help="What is drawn; repeatable.")
@click.option("--images", default=4, show_default=True, help="Of each.")
@click.option("--seed", default=1, show_default=True)
@click.option("--size", default="1040x760", show_default=True, help="Of the picture.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(
    bundles: tuple[Path, ...],
    model: str | None,
    prompts: tuple[str, ...],
    images: int,
    seed: int,
    size: str,
    out: Path,
) -> None:
    width, height = map(int, size.split("x"))
    with served(bundles) as address, browser(width, height) as page:
        page.get(address)
        wait = WebDriverWait(page, SECONDS, 0.1)

        def until(condition: str) -> None:
            wait.until(lambda driver: driver.execute_script(f"return {condition}"))

        until(f"document.querySelectorAll('#model option').length === {len(bundles)}")
        page.execute_script(
            "const m = document.getElementById('model'); m.value = arguments[0]; m.dispatchEvent(new Event('change'));",
            model or bundles[0].name,
        )
        until("document.getElementById('model').value !== ''")
        for name, value in (("count", images), ("seed", seed)):
            page.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)
        for number, prompt in enumerate(prompts or ("",), 1):
            if prompt:
                page.execute_script("document.getElementById('prompt').value = arguments[0]", prompt)
            page.find_element("css selector", "form#ask button").click()
            until(f"document.querySelectorAll('img[data-state=done]').length === {number * images}")
        out.write_bytes(page.get_screenshot_as_png())
    click.echo(f"{out}: {out.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
