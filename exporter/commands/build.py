"""``linert build``: build TensorRT plans of a bundle."""

from __future__ import annotations

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from linert.exporter.tensorrt.build import BuildRequest, build, parse_capabilities
from linert.exporter.tensorrt.build_stage import Event
from linert.runtime.backends.trt_flavour import FLAVOURS
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.engines import Engines, engines_folder
from linert.runtime.commands.bundle_argument import BundlePlace, bundle_argument
from linert.runtime.text import size_text

RTX_CAPABILITIES = "80,86,89,120"


@click.command()
@bundle_argument()
@click.option(
    "--target",
    type=click.Choice(list(FLAVOURS)),
    required=True,
    help="rtx: TensorRT for RTX, builds without a GPU. tensorrt: for the GPU at hand.",
)
@click.option(
    "--sm",
    "capabilities",
    metavar="80,86,...",
    help=f"Compute capabilities of the GPUs to build for, or current. Default: {RTX_CAPABILITIES} for rtx, else current.",
)
@click.option("--no-plugin", is_flag=True, help="Build linert's operations from standard operators.")
@click.option("--force", is_flag=True, help="Build again even if nothing changed.")
def command(place: BundlePlace, target: str, capabilities: str | None, no_plugin: bool, force: bool) -> None:
    """Build a TensorRT plan for every stage of BUNDLE, into its folder.

    Nothing is done where the plans that are there are those that would be built.
    """
    opened = place.open()
    for variant in opened.capacities:
        _build(opened.other(variant), target, capabilities, plugin=not no_plugin, force=force)


def _build(opened: Bundle, target: str, capabilities: str | None, *, plugin: bool, force: bool) -> None:
    usual = RTX_CAPABILITIES if target == "rtx" else "current"
    wanted = usual if capabilities is None else capabilities
    request = BuildRequest(opened, FLAVOURS[target], parse_capabilities(wanted), plugin)
    folder = engines_folder(opened, target)
    if not force and (built := request.built()):
        click.echo(f"nothing changed: {folder} ({summary(built)})")
        return
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("building", total=None)

        def progress(stage: str, event: Event) -> None:
            if event.phase:
                bar.update(
                    task,
                    description=f"{stage}: {event.phase}",
                    completed=event.step,
                    total=event.steps or None,
                )

        engines = build(request, progress)
    click.echo(f"plans: {folder} ({summary(engines)})")


def summary(engines: Engines) -> str:
    """The plans in a line."""
    size = sum(plan.bytes for plan in engines.plans.values())
    seconds = sum(plan.seconds for plan in engines.plans.values())
    how = "with plugins" if engines.plugin_version else "from standard operators"
    return f"{len(engines.plans)} stages, {size_text(size)}, {seconds:.0f} s; {how}; for {engines.made_for}"
