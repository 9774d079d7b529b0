"""``linert inspect``: tell what a bundle is, costs and needs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.table import Table

from linert.runtime.backends.trt_flavour import FLAVOURS, Flavour
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.cache_settings import NOTHING_EVICTED, CacheSettings, cache_text
from linert.runtime.bundles.engines import built_flavours, read_engines
from linert.runtime.bundles.manifest import SLOT, Manifest
from linert.runtime.bundles.setting import settings_of
from linert.runtime.commands.bundle_argument import BundlePlace, bundle_argument
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.text import lines_text, size_text

if TYPE_CHECKING:
    from linert.runtime.backends.trt_graphs import StageGraph


@click.command()
@bundle_argument()
@click.option(
    "--layers", "stage", metavar="STAGE", help="List the layers of a stage's TensorRT plans as well."
)
@click.option(
    "--graphs",
    "graphs_of",
    type=click.Choice(sorted(FLAVOURS)),
    help="Load these plans on the GPU at hand, capture every stage as a CUDA graph and list what the graphs hold.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(place: BundlePlace, stage: str | None, graphs_of: str | None, as_json: bool) -> None:
    """Tell what BUNDLE is, costs and needs, and what plans it has. Reads records and file sizes; loads no weights unless asked for
    graphs."""
    opened = place.open(digests=False)
    if stage is not None:
        opened.stage_path(stage)
    graphs = [] if graphs_of is None else _graphs(opened, FLAVOURS[graphs_of])
    if as_json:
        told = describe(opened)
        if graphs_of is not None:
            told["graphs"] = [asdict(graph) for graph in graphs]
        click.echo(json.dumps(told, indent=1))
        return
    console = Console(highlight=False)
    _print(opened, console)
    _print_plans(opened, stage, console)
    if graphs:
        _print_graphs(graphs, console)


def _graphs(bundle: Bundle, flavour: Flavour) -> list[StageGraph]:
    # Needs a driver and TensorRT, which everything else here does not.
    from linert.runtime.backends.trt import TrtBackend
    from linert.runtime.backends.trt_graphs import captured_graphs

    with TrtBackend(bundle, bundle.manifest.stages, flavour) as backend:
        return captured_graphs(backend)


def _print_graphs(graphs: Sequence[StageGraph], console: Console) -> None:
    table = Table(
        *("graph", "operations", "copied back", "copies by TensorRT itself"),
        box=None,
        padding=(0, 2, 0, 0),
        title="CUDA graphs",
        title_justify="left",
    )
    for graph in graphs:
        kinds = [
            f"{count} {name.removeprefix('CU_GRAPH_NODE_TYPE_').lower()}"
            for name, count in graph.nodes.items()
        ]
        table.add_row(
            graph.stage, "\n".join(kinds), size_text(graph.copied_back), "\n".join(graph.unasked) or "none"
        )
    console.print(table)
    for graph in graphs:
        if graph.unasked:
            console.print(
                f"warning: {graph.stage} copies {len(graph.unasked)} tensors that nobody asked TensorRT to copy; each costs its "
                "bytes twice a run",
                style="yellow",
            )


def describe(bundle: Bundle) -> dict[str, object]:
    """Everything that ``inspect`` says, as JSON values."""
    manifest = bundle.manifest
    return {
        "manifest": msgspec.to_builtins(manifest),
        "policies": list(manifest.policies),
        "capacities": [
            {
                "variant": name,
                "capacity_lines": list(each.capacity_lines),
                "policies": list(each.policies),
                "state_bytes": each.state_bytes,
            }
            for name, each in bundle.capacities.items()
        ],
        "state_bytes": manifest.state_bytes,
        **(_cache_costs(manifest) if manifest.cache else {}),
        "state_bytes_by_kind": state_by_kind(manifest),
        "file_bytes": sum(record.bytes for record in manifest.files.values()),
        "decode_steps": manifest.raster.image_tokens - 1
        if manifest.groups is None
        else manifest.parts(manifest.sampling),
        "engines": {
            flavour: msgspec.to_builtins(read_engines(bundle, flavour, digests=False))
            for flavour in built_flavours(bundle)
        },
    }


def _cache_costs(manifest: Manifest) -> dict[str, object]:
    saving = CacheSaving.of(manifest)
    return {
        "state_bytes_full_cache": full_cache_bytes(manifest),
        "cache_saving": {**asdict(saving), "saved": saving.saved},
    }


def state_by_kind(manifest: Manifest) -> dict[str, int]:
    """Bytes of state by its kind."""
    kinds: defaultdict[str, int] = defaultdict(int)
    for spec in manifest.state:
        kinds[spec.kind] += spec.nbytes
    return dict(kinds)


@dataclass(frozen=True)
class CacheSaving:
    """What keys and values take in a bundle, against a cache that holds the whole image.

    ``token_bytes``: of a token in one sequence, all layers. ``sequences``: of a batch, unconditional ones included. ``kept``,
    ``whole``: image tokens that a layer has room for (the mean), and those of an image.
    """

    token_bytes: int
    sequences: int
    kept: float
    whole: int

    @staticmethod
    def of(manifest: Manifest) -> CacheSaving:
        raster, sequences = manifest.raster, manifest.images * manifest.branches
        caches = [*manifest.states_of("k_cache"), *manifest.states_of("v_cache")]
        one = sum(spec.nbytes // (sequences * spec.shape[spec.axes.index(SLOT)]) for spec in caches)
        lines = sum(manifest.capacity_lines) / len(manifest.capacity_lines)
        return CacheSaving(one, sequences, lines * raster.line_width, raster.image_tokens)

    @property
    def saved(self) -> int:
        """Bytes that are not needed."""
        return round(self.token_bytes * self.sequences * (self.whole - self.kept))

    @property
    def text(self) -> str:
        """The arithmetic, for people."""
        return (
            f"{self.token_bytes:,} bytes a token and sequence x {self.sequences} sequences x ({self.whole} - {self.kept:g} "
            f"image tokens) = {size_text(self.saved)}"
        )


def full_cache_bytes(manifest: Manifest) -> int:
    """State memory if every token of the image stayed."""
    return manifest.state_bytes_at([manifest.raster.lines] * manifest.model.layers)


def _print(bundle: Bundle, console: Console) -> None:
    manifest = bundle.manifest
    raster, cache, model, decoder = (
        manifest.raster,
        manifest.cache,
        manifest.model,
        manifest.image_decoder,
    )
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "bundle": f"{bundle.path} (schema {manifest.schema}, sha256 {manifest.sha256[:16]})",
        "model": f"{model.family}, {model.parameters:,} parameters, {model.layers} layers, "
        f"draws {manifest.condition.text}",
        "precision": manifest.precision.text,
        "checkpoint": f"{model.source.path} (sha256 {model.source.sha256[:16]})",
        **({"sizes": ", ".join(bundle.sizes)} if len(bundle.sizes) > 1 else {}),
        **_capacity_row(bundle),
        "image": f"{raster.lines} x {raster.line_width} tokens, {raster.columns * decoder.patch} x "
        f"{raster.lines * decoder.patch} pixels",
        "batch": f"{manifest.images} images, "
        + ("guided (two rows an image)" if manifest.guided else "unguided (one row an image)"),
        **(_cache_rows(manifest, cache) if cache else {"cache": _no_cache(manifest)}),
        **_group_row(manifest),
        "sampling": ", ".join(
            f"{name} {value}" for name, value in msgspec.to_builtins(manifest.sampling).items()
        ),
        "made by": ", ".join(f"{name} {version}" for name, version in manifest.producer.items()),
        "needs": "ONNX Runtime with opset 24 (1.25 or newer)",
    }
    for name, text in rows.items():
        facts.add_row(name, text)
    console.print(facts)

    memory = Table("state", "bytes", "", title="state memory", title_justify="left")
    for kind, count in state_by_kind(manifest).items():
        memory.add_row(kind, f"{count:,}", size_text(count))
    total = manifest.state_bytes
    memory.add_section()
    memory.add_row("total", f"{total:,}", size_text(total))
    if cache:
        full = full_cache_bytes(manifest)
        memory.add_row("full cache", f"{full:,}", f"{size_text(full)}, {full / total:.2f} x")
    console.print(memory)

    files = Table("file", "bytes", "stage", title="files", title_justify="left")
    stage_of = {stage.file: name for name, stage in manifest.stages.items()}
    for name, record in sorted(manifest.files.items()):
        files.add_row(name, f"{record.bytes:,}", stage_of.get(name, "shared weights"))
    console.print(files)


def _no_cache(manifest: Manifest) -> str:
    return cache_text(None) if manifest.groups is None else NOTHING_EVICTED


def _group_row(manifest: Manifest) -> dict[str, str]:
    """In how many steps images are drawn, where they are drawn in groups."""
    groups = manifest.groups
    if groups is None:
        return {}
    widths = ", ".join(f"{width.fed} + {width.drawn}" for width in groups.widths)
    counts = " or ".join(map(str, groups.counts))
    return {
        "steps": f"an image {counts}, by stages that feed and draw up to {widths} tokens; orders with repulsion {groups.repulsion:g}"
    }


def _capacity_row(bundle: Bundle) -> dict[str, str]:
    """What runs with larger budgets take."""
    capacities = bundle.capacities
    if len(capacities) == 1:
        return {}
    texts = [
        f"{lines_text(manifest.capacity_lines)} lines ({size_text(manifest.state_bytes)}; {', '.join(manifest.policies)})"
        for manifest in capacities.values()
    ]
    return {"buffers": "; ".join(texts)}


def _cache_rows(manifest: Manifest, cache: CacheSettings) -> dict[str, str]:
    raster = manifest.raster
    return {
        "buffer": f"{lines_text(manifest.capacity_lines)} of {raster.lines} lines = "
        f"{lines_text([raster.slots(lines) for lines in manifest.capacity_lines])} slots a layer",
        "saved": f"keys and values: {CacheSaving.of(manifest).text}",
        "policies": ", ".join(manifest.policies),
        "by default": cache.text,
        **_usual_row(manifest, cache),
    }


def _usual_row(manifest: Manifest, cache: CacheSettings) -> dict[str, str]:
    """In what runs under other policies that evict differ from the default, where they say no more than that."""
    policies: defaultdict[str, list[str]] = defaultdict(list)
    for policy in manifest.policies:
        usual = manifest.require_cache("what is usual", policy)
        run = CacheRequest(policy=policy).settle(manifest.raster, manifest.capacity_lines, usual)
        differing = [
            setting.label(run)
            for setting in settings_of(CacheSettings)
            if getattr(run, setting.name) != getattr(cache, setting.name)
        ]
        if run.evicts and differing:
            policies[", ".join(differing)].append(policy)
    if not policies:
        return {}
    return {"under others": "; ".join(f"{', '.join(names)}: {text}" for text, names in policies.items())}


def _print_plans(bundle: Bundle, stage: str | None, console: Console) -> None:
    """The plans of every flavour; all layers of one ``stage``."""
    for flavour in built_flavours(bundle):
        engines = read_engines(bundle, flavour, digests=False)
        table = Table(
            *("plan", "file", "on GPU", "layers", "plugins", "aliases"),
            box=None,
            padding=(0, 2, 0, 0),
            title=f"{flavour} {engines.version}, for {engines.made_for}"
            + (
                f", plugins version {engines.plugin_version}"
                if engines.plugin_version
                else ", without plugins"
            ),
            title_justify="left",
        )
        for name, plan in engines.plans.items():
            plugins = plan.plugins
            how = [
                f"{plugins.get(operation, 0)}/{count} {operation}"
                for operation, count in plan.operations.items()
            ]
            memory = "not told"
            if plan.weights_bytes is not None and plan.activation_bytes is not None:
                memory = size_text(plan.weights_bytes + plan.activation_bytes)
            table.add_row(
                *(name, size_text(plan.bytes), memory, str(len(plan.layers))),
                *("\n".join(how), str(len(plan.aliases))),
            )
        console.print(table)
        if stage is not None:
            layers = Table("layer", "kind", "outputs", title=f"layers of {stage}", title_justify="left")
            for layer in engines.plans[stage].layers:
                layers.add_row(layer.name, layer.plugin or layer.kind, "\n".join(layer.outputs))
            console.print(layers)
