"""The options by which commands choose where stages run."""

from __future__ import annotations

import click

from linert.runtime.backends.options import BackendName, BackendOptions
from linert.runtime.commands.option_group import Decorator, option_group


def backend_options() -> Decorator:
    """Give a command the backend options; it gets them as one ``options`` argument, a :class:`BackendOptions`."""
    listed = [
        click.option(
            "--backend",
            "name",
            type=click.Choice([str(name) for name in BackendName]),
            default=str(BackendName.CPU),
            show_default=True,
            help="Where stages run: ONNX Runtime on the CPU or on a CUDA device, or plans of linert build.",
        ),
        click.option(
            "--cuda-graphs/--no-cuda-graphs",
            default=True,
            show_default=True,
            help="On a GPU: launch a stage as one captured graph, or operation by operation.",
        ),
        click.option("--threads", default=0, help="CPU threads. Default: one a core."),
    ]
    return option_group("options", listed, ("name", "cuda_graphs", "threads"), _options)


def _options(name: str, cuda_graphs: bool, threads: int) -> BackendOptions:
    return BackendOptions(BackendName(name), threads, cuda_graphs)
