"""One bundle, every policy and budget: chosen at run time, recorded, replayed and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import PIL.Image
import pytest

from linert import Generator
from linert.exporter.cache_wishes import usual_cache
from linert.graphs.policies import POLICIES as REGISTERED
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.cache_settings import FULL, CacheSettings, pyramid
from linert.runtime.bundles.raster import Raster
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.bundles.setting import settings_of
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.eviction_map import MapKind, Residency, draw_map
from linert.runtime.drawing.loop import begin, run_step
from linert.runtime.drawing.output import read_recipe
from linert.runtime.drawing.samples import ClassLabel, Sample
from linert.runtime.drawing.trace import read_trace
from linert.runtime.errors import GeometryError, RequestError
from tests.conftest import TINY, Result

Linert = Callable[..., Result]
SAMPLES = [Sample(ClassLabel(1), 7), Sample(ClassLabel(3), 8)]
POLICIES = tuple(REGISTERED)
EVICTING = tuple(name for name in POLICIES if name != FULL)


@pytest.fixture(scope="module")
def generator(many_bundle: Path) -> Generator:
    return Generator(many_bundle)


def settled(generator: Generator, **request: object) -> CacheSettings:
    manifest = generator.manifest
    asked = CacheRequest(**request)  # type: ignore[arg-type]
    return asked.settle(manifest.raster, manifest.capacity_lines, manifest.cache)


def draw(generator: Generator, **request: object) -> np.ndarray:
    return generator.draw(SAMPLES, cache=settled(generator, **request))


def test_a_bundle_says_what_it_holds(many_bundle: Path, linert: Linert) -> None:
    result = linert("inspect", many_bundle, "--json")
    told = json.loads(result.out)
    assert sorted(told["policies"]) == sorted(POLICIES)
    assert told["state_bytes"] == told["state_bytes_full_cache"]
    assert "leverage (lazy), 3 lines" in linert("inspect", many_bundle).out


def test_the_decode_graph_does_not_know_the_policy(
    export: Callable[..., Path], tiny_files: tuple[Path, Path], many_bundle: Path
) -> None:
    options = ("--grid", 6, "--heads", 4, "--batch", 2)
    other = export(*tiny_files, *options, "--policy", "h2o", "--capacity-lines", 6)
    for stage in ("decode.onnx", "decode.unfiltered.onnx", "prefill.onnx"):
        # What differs is the bundle that they are bound to.
        ours, theirs = (
            onnx.load(bundle / stage, load_external_data=False) for bundle in (other, many_bundle)
        )
        assert ours.metadata_props != theirs.metadata_props
        for model in (ours, theirs):
            del model.metadata_props[:]
        assert ours.SerializeToString() == theirs.SerializeToString()


def test_policies_draw_different_images(generator: Generator) -> None:
    tokens = {policy: draw(generator, policy=policy).tobytes() for policy in POLICIES}
    assert len(set(tokens.values())) == len(POLICIES)


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("mode", ["strict", "lazy"])
def test_with_all_lines_every_policy_is_the_full_cache_bit_for_bit(
    policy: str, mode: str, generator: Generator
) -> None:
    def run(name: str, **request: object) -> tuple[np.ndarray, list[np.ndarray]]:
        logits: list[np.ndarray] = []
        cache = settled(generator, policy=name, **request)
        tokens = generator.draw(
            SAMPLES, cache=cache, watcher=lambda backend, line: logits.append(backend.read("logits"))
        )
        return tokens, [*logits, generator.backend.read("logits")]

    tokens, logits = run(policy, mode=mode, budget_lines=6)
    full_tokens, full_logits = run("full")
    assert (tokens == full_tokens).all()
    for step_logits, wanted in zip(logits, full_logits, strict=True):
        assert (step_logits == wanted).all()


@pytest.mark.parametrize("policy", EVICTING)
def test_a_run_time_budget_equals_a_bundle_of_that_size(
    policy: str, generator: Generator, export: Callable[..., Path], tiny_files: tuple[Path, Path]
) -> None:
    small = export(
        *tiny_files, "--grid", 6, "--heads", 4, "--batch", 2, "--policy", policy, "--budget-lines", 2
    )
    wanted = Generator(small).draw(SAMPLES)
    assert (draw(generator, policy=policy, budget_lines=2) == wanted).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_and_option_validates(policy: str, linert: Linert, many_bundle: Path) -> None:
    options: tuple[object, ...] = ("--policy", policy)
    if policy != "full":
        options += ("--mode", "lazy", "--aggregation", "max", "--head-scores", "averaged")
        options += ("--share-guidance", "--layer-budgets", "4,2")
    result = linert("validate", many_bundle, "--json", *options)
    assert result.code == 0, result.out + result.err
    assert json.loads(result.out)["passed"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_validates_strictly(policy: str, linert: Linert, many_bundle: Path) -> None:
    result = linert("validate", many_bundle, "--json", "--policy", policy, "--mode", "strict")
    assert result.code == 0, result.out + result.err


def test_layers_may_have_buffers_of_different_size(
    export: Callable[..., Path], tiny_files: tuple[Path, Path], linert: Linert
) -> None:
    bundle = export(
        *tiny_files, "--grid", 6, "--heads", 4, "--batch", 2, "--layer-budgets", "4,2", "--mode", "lazy"
    )
    manifest = open_bundle(bundle).manifest
    assert manifest.capacity_lines == (4, 2)
    assert manifest.state_spec("k_cache.0").shape[2] == 25
    assert manifest.state_spec("k_cache.1").shape[2] == 13
    uniform = manifest.state_bytes_at((3, 3))
    assert manifest.state_bytes == uniform
    assert linert("validate", bundle).code == 0
    result = linert("run", bundle, "--classes", 0, "--budget-lines", 3, "--out", bundle.parent / "o")
    assert result.code == 2
    assert "above the 2 that the bundle's buffer has in layer 1" in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "nonsense"), "holds no policy nonsense"),
        (("--budget-lines", 7), "above the image's 6 lines"),
        (("--policy", "full", "--budget-lines", 3), "evicts nothing"),
        (("--budget-lines", 2, "--recent-lines", 2), "cannot hold"),
        (("--layer-budgets", "1,2,3"), "budgets for 3 layers"),
        (("--layer-budgets", "2,x"), "--layer-budgets 2,x"),
        (("--layer-budgets", "2,3", "--budget-lines", 3), "leave --budget-lines out"),
        (("--record-trace", "t.npz", "--resume"), "leave --resume out"),
        (("--replay-trace", "t.npz"), "leave classes"),
    ],
)
def test_requests_that_do_not_fit_are_refused(
    options: tuple[object, ...], message: str, linert: Linert, many_bundle: Path, tmp_path: Path
) -> None:
    result = linert("run", many_bundle, "--classes", 0, "--out", tmp_path / "out", *options)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()


def test_the_picture_says_which_cache_drew_it(linert: Linert, many_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = linert("run", many_bundle, "--classes", 1, "--policy", "h2o", "--budget-lines", 2, "--out", out)
    assert result.code == 0, result.err
    assert "h2o (lazy), 2 lines" in result.err
    recipe = read_recipe(out / "class_0001_seed_000000.png")
    assert (recipe.cache.policy, recipe.cache.budget_lines) == ("h2o", (2, 2))
    # Another policy is another run.
    assert linert("run", many_bundle, "--classes", 1, "--out", out, "--resume").code == 2


def test_a_trace_is_imposed_on_another_run(linert: Linert, many_bundle: Path, tmp_path: Path) -> None:
    trace, out, again = tmp_path / "trace.npz", tmp_path / "out", tmp_path / "again"
    request = ("--classes", "0,2,4", "--num-images", 5, "--policy", "rkv", "--mode", "lazy")
    assert linert("run", many_bundle, *request, "--record-trace", trace, "--out", out).code == 0
    result = linert("run", many_bundle, "--replay-trace", trace, "--out", again)
    assert result.code == 0, result.err
    assert "tokens equal to the trace's: 100.00%" in result.err
    for picture in out.glob("*.png"):
        assert picture.read_bytes() == (again / picture.name).read_bytes()
    validated = linert("validate", many_bundle, "--trace", trace, "--json")
    assert validated.code == 0, validated.out + validated.err
    report = json.loads(validated.out)
    assert report["recorded_agreement"] == 1.0
    # The trace decides and not the scores, which the two sides then do not keep alike.
    assert [line["scores_max_abs"] for line in report["lines"]] == [None] * 5
    told = linert("validate", many_bundle, "--trace", trace).out
    assert "scores" not in told
    assert "the trace's evictions were imposed on both sides at all 5" in " ".join(told.split())


@pytest.mark.parametrize("tokens", [-1, TINY.vocab_size])
def test_a_trace_of_tokens_that_the_model_has_not_is_refused(
    tokens: int, linert: Linert, many_bundle: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.npz"
    manifest = open_bundle(many_bundle).manifest
    linert("run", many_bundle, "--classes", 1, "--record-trace", trace, "--out", tmp_path / "out")
    recorded = read_trace(trace, manifest)
    replace(recorded, tokens=recorded.tokens.astype(">i8")).write(trace)
    assert read_trace(trace, manifest).tokens.dtype == np.int64
    replace(recorded, tokens=np.full_like(recorded.tokens, tokens)).write(trace)
    with pytest.raises(RequestError, match=f"holds tokens {tokens} to {tokens}; the model has 0 to 63"):
        read_trace(trace, manifest)


def test_a_replay_follows_the_trace_and_not_the_scores(
    linert: Linert, many_bundle: Path, tmp_path: Path, generator: Generator
) -> None:
    """Evictions of one policy under another's name: only the recorded slots decide."""
    trace = tmp_path / "trace.npz"
    request = ("--classes", "1,3", "--seed", 7, "--policy", "streaming")
    linert("run", many_bundle, *request, "--record-trace", trace, "--out", tmp_path / "out")
    recorded = read_trace(trace, generator.manifest)
    slots = recorded.write_slots.copy()
    slots[0] = slots[0][:, :, :, ::-1]
    seen: list[np.ndarray] = []
    from dataclasses import replace

    from linert.runtime.drawing.generator import Replay

    generator.draw(
        recorded.header.samples,
        recorded.header.sampling,
        recorded.header.cache,
        replay=Replay(replace(recorded, write_slots=slots), [0, 1]),
        watcher=lambda backend, line: seen.append(backend.read("write_slots")),
    )
    by_image = np.stack(seen).reshape(5, TINY.layers, 2, 2, TINY.heads, 6)
    assert (by_image[:, :, :, 0] == slots[0]).all()
    assert (by_image[:, :, :, 1] == recorded.write_slots[1]).all()


def test_a_bundle_replays_a_policy_that_it_does_not_hold(
    linert: Linert, many_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The other bundle has a smaller buffer and the linear policy alone; the trace needs neither."""
    trace = tmp_path / "trace.npz"
    request = ("--classes", "2,4", "--policy", "streaming", "--budget-lines", 3)
    linert("run", many_bundle, *request, "--record-trace", trace, "--out", tmp_path / "out")
    result = linert("run", tiny_bundle, "--replay-trace", trace, "--out", tmp_path / "again")
    assert result.code == 0, result.err
    assert "tokens equal to the trace's: 100.00%" in result.err
    assert linert("validate", tiny_bundle, "--trace", trace).code == 0


def test_a_trace_of_another_model_is_refused(
    linert: Linert, many_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.npz"
    linert(
        "run",
        many_bundle,
        "--classes",
        0,
        "--budget-lines",
        5,
        "--record-trace",
        trace,
        "--out",
        tmp_path / "o",
    )
    result = linert("run", tiny_bundle, "--replay-trace", trace, "--out", tmp_path / "again")
    assert result.code == 2
    assert "the bundle's buffer has" in " ".join(result.err.split())
    (tmp_path / "no.npz").write_bytes(b"no")
    for path in (tmp_path / "no.npz", tmp_path / "missing.npz"):
        assert linert("run", tiny_bundle, "--replay-trace", path, "--out", tmp_path / "again").code == 2


def test_residency_is_what_the_slots_hold(generator: Generator) -> None:
    """Streaming keeps anchors and the newest lines: the map is known in advance."""
    residency = Residency(generator.manifest)
    cache = settled(
        generator, policy="streaming", mode="strict", budget_lines=3, anchor_tokens=2, recent_lines=1
    )
    generator.draw(SAMPLES, cache=cache, watcher=residency)
    for number in range(2):
        for line, shares in enumerate(residency.image(number)):
            drawn = (line + 1) * 6
            # Two lines stay when the third is given to the next one: two anchors and the ten newest.
            kept = {0, 1, *range(drawn - 10, drawn)} if drawn > 12 else set(range(drawn))
            wanted = np.isin(np.arange(36), list(kept))
            assert (shares == wanted).all()


@pytest.mark.parametrize("kind", ["averaged", "layers"])
def test_an_eviction_map_is_drawn_beside_each_image(
    kind: str, linert: Linert, many_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = linert("run", many_bundle, "--classes", "0,1", "--eviction-map", kind, "--out", out)
    assert result.code == 0, result.err
    for name in ("class_0000_seed_000000", "class_0001_seed_000000"):
        with PIL.Image.open(out / f"{name}.evictions.png") as shown:
            assert shown.width > 5 * 96
            assert len(shown.getcolors(1 << 20) or ()) > 4


def test_a_map_shows_resident_positions_bright(generator: Generator) -> None:
    manifest = generator.manifest
    shares = np.zeros((5, TINY.layers, 36), np.float32)
    shares[2, :, 4] = 1
    blank = PIL.Image.new("RGB", (12, 12))
    none, one = (
        np.asarray(draw_map(blank, values, manifest, MapKind.AVERAGED), np.int64)
        for values in (0 * shares, shares)
    )
    changed = np.argwhere((none != one).any(2))
    height, width = changed.max(0) - changed.min(0) + 1
    assert height == width == 16
    assert (one.sum(2) - none.sum(2))[tuple(changed[0])] > 200


def test_a_pyramid_keeps_the_sum_and_falls() -> None:
    assert pyramid(4, 6, 1, 16) == (8, 6, 5, 3, 1, 1)
    for mean, layers, least, most in [(4, 12, 3, 24), (20, 12, 2, 24), (2, 6, 2, 16), (5, 1, 1, 9)]:
        lines = pyramid(mean, layers, least, most)
        assert sum(lines) == mean * layers
        assert list(lines) == sorted(lines, reverse=True)
        assert least <= min(lines) <= max(lines) <= most
    with pytest.raises(GeometryError):
        pyramid(2, 6, 3, 16)


@pytest.mark.parametrize(
    ("budget", "recent", "anchors"), [(1, 0, 0), (2, 0.75, 4), (3, 1, 16), (4, 1, 16), (8, 1, 16)]
)
def test_small_budgets_share_what_is_protected(budget: int, recent: float, anchors: int) -> None:
    """The best measured shares on the demo model: a few anchors before the last recent tokens."""
    raster = Raster(1, 16, 16)
    cache = usual_cache(raster, 6, ["linear"], CacheRequest(budget_lines=budget), guided=True)
    assert (cache.recent_lines, cache.anchor_tokens) == (recent, anchors)


def test_defaults_give_way_to_what_is_asked(generator: Generator) -> None:
    cache = settled(generator, policy="full")
    assert cache.budget_lines == (6, 6)
    cache = settled(generator, layer_budgets="pyramid")
    assert sum(cache.budget_lines) == 6
    cache = settled(generator, budget_lines=1)
    assert (cache.recent_lines, cache.anchor_tokens) == (0, 0)
    unguided = CacheRequest(share_guidance=True).settle(Raster(1, 6, 6), (6, 6), cache)
    import msgspec

    manifest = msgspec.structs.replace(generator.manifest, guided=False)
    with pytest.raises(RequestError, match="needs unconditional rows"):
        manifest.check_cache(unguided)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_exported_line_end_chooses_as_pytorch_does(policy: str, generator: Generator) -> None:
    """Stage against stage on the same live state, at every line."""
    import torch

    from linert.graphs.line_buffer import LineEnd
    from linert.graphs.memory import memory_of
    from linert.runtime.drawing.generator import make_batch

    manifest = generator.manifest
    cache = settled(generator, policy=policy)
    capacities = [manifest.raster.slots(lines) for lines in manifest.capacity_lines]
    memory = memory_of(TINY, images=2, guided=True, capacities=capacities)
    stage = LineEnd(REGISTERED[policy](), memory)
    backend = generator.backend
    batch = make_batch(manifest, generator.conditioner, SAMPLES, manifest.sampling, cache)
    begin(backend, batch)
    for step in manifest.raster.schedule():
        if step.stage == "line_end":
            inputs = [torch.from_numpy(np.asarray(backend.read(spec.name))) for spec in stage.inputs]
            wanted = stage(*inputs)
        run_step(backend, batch, step)
        if step.stage == "line_end":
            for spec, value in zip(stage.outputs, wanted, strict=True):
                result = backend.read(spec.name.removesuffix(".next"))
                assert (result == value.numpy()).all(), spec.name


def test_every_declared_setting_can_be_asked_for_and_reaches_a_stage(
    tiny_bundle: Path, grouped_bundle: Path
) -> None:
    manifests = [open_bundle(bundle).manifest for bundle in (tiny_bundle, grouped_bundle)]
    asked = {field.name for field in fields(CacheRequest)}
    for record in (CacheSettings, SamplingSettings):
        for setting in settings_of(record):
            assert record is SamplingSettings or setting.name in asked
            spec = setting.declared.stage_input
            if spec is None:
                # It decides which stages run.
                assert setting.name == "steps"
                continue
            taking = [
                tensor.dtype
                for manifest in manifests
                for stage in manifest.stages.values()
                for tensor in stage.inputs
                if tensor.name == spec.name
            ]
            assert set(taking) == {spec.dtype}
