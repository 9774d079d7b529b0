"""Settings of the cache that a policy brings itself: what an export or a run asks for goes before them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from linert.exporter.cache_wishes import DEFAULT_POLICY, CacheWishes
from linert.exporter.models import ModelRequest, load_models
from linert.exporter.sources import Checkpoints
from linert.exporter.sweep import cell_request, cells
from linert.graphs.policies import POLICIES, register
from linert.graphs.policies.linear import Linear
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import PolicySpec
from linert.runtime.bundles.manifest_file import check
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.errors import BundleError
from tests.conftest import Result

Linert = Callable[..., Result]

OPTIONS = ("--grid", 6, "--heads", 4, "--batch", 2, "--budget-lines", 3)


def settings(bundle: Path, **asked: Any) -> CacheSettings:
    cache = CacheRequest(**asked).settle_for(open_bundle(bundle))[1]
    assert cache is not None
    return cache


def protection(cache: CacheSettings) -> tuple[str, int, bool]:
    return cache.policy, cache.anchor_tokens, cache.share_guidance


def test_a_run_takes_what_is_usual_under_its_policy(
    export: Callable[..., Path], tiny_files: tuple[Path, Path], linert: Linert
) -> None:
    """Whichever of them is the bundle's default. Three lines of six hold 6 anchors beside a recent line."""
    for policies in ("linear,leverage,streaming", "leverage,linear,streaming"):
        bundle = export(*tiny_files, *OPTIONS, "--policy", policies)
        first = policies.split(",")[0]
        shown = " ".join(linert("inspect", bundle).out.split())
        others = {
            "linear": "leverage: 4 anchor tokens, guidance shared",
            "leverage": "linear, streaming: 6 anchor tokens, guidance apart",
        }
        assert f"under others {others[first]} sampling" in shown
        assert settings(bundle).policy == first
        assert settings(bundle) == settings(bundle, policy=first)
        assert protection(settings(bundle, policy="linear")) == ("linear", 6, False)
        assert protection(settings(bundle, policy="streaming")) == ("streaming", 6, False)
        assert protection(settings(bundle, policy="leverage")) == ("leverage", 4, True)
        asked = settings(bundle, policy="leverage", anchor_tokens=1, share_guidance=False)
        assert protection(asked) == ("leverage", 1, False)
        assert protection(settings(bundle, share_guidance=True, policy="linear")) == ("linear", 6, True)


def test_what_an_export_asks_for_holds_for_all_its_policies(
    export: Callable[..., Path], tiny_files: tuple[Path, Path], linert: Linert
) -> None:
    asked = ("--policy", "linear,leverage,streaming,full", "--anchor-tokens", 2)
    bundle = export(*tiny_files, *OPTIONS, *asked)
    shown = " ".join(linert("inspect", bundle).out.split())
    assert "under others leverage: guidance shared sampling" in shown
    assert protection(settings(bundle, policy="linear")) == ("linear", 2, False)
    assert protection(settings(bundle, policy="leverage")) == ("leverage", 2, True)


def test_a_run_with_more_lines_than_the_default_protects_what_is_usual(
    export: Callable[..., Path], tiny_files: tuple[Path, Path]
) -> None:
    """The default's two lines hold less than a recent line and 16 anchors; in which order policies are named changes nothing."""
    options = ("--grid", 6, "--heads", 4, "--batch", 2, "--budget-lines", 2, "--capacity-lines", 6)
    bundles = [
        export(*tiny_files, *options, "--policy", ",".join(policies))
        for policies in (("linear", "leverage"), ("leverage", "linear"))
    ]
    for bundle, first in zip(bundles, ("linear", "leverage"), strict=True):
        assert settings(bundle) == settings(bundle, policy=first) == settings(bundle, budget_lines=2)
        assert settings(bundle).recent_lines < 1
        more = settings(bundle, budget_lines=5)
        assert protection(more) == (first, *{"linear": (16, False), "leverage": (4, True)}[first])
        assert more.recent_lines == 1
    for policy in ("linear", "leverage"):
        for lines in (2, 5):
            one, other = (settings(bundle, policy=policy, budget_lines=lines) for bundle in bundles)
            assert one == other


def test_buffers_that_do_not_hold_the_default_have_what_is_usual_under_another_policy(
    tiny_files: tuple[Path, Path],
) -> None:
    transformer, _ = load_models(*tiny_files, ModelRequest(grid=6, heads=4))
    for request, anchors in ((CacheRequest(), 4), (CacheRequest(anchor_tokens=2), 2)):
        wishes = CacheWishes(("full", "leverage", "linear"), request, (3, 6))
        whole, few = wishes.settle(transformer, guided=True)
        assert whole.cache is not None
        assert few.cache is not None
        assert whole.cache.policy == "full"
        assert protection(few.cache) == ("leverage", anchors, True)
        assert few.usual["linear"]["share_guidance"] is False


def test_a_sweep_gives_a_policy_that_the_bundle_lacks_its_usual_settings(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    loaded = Checkpoints.find(bundle).load()
    held, lacking = (
        cell_request(bundle, cell, *loaded).cache
        for cell in cells(bundle, {"policy": ("leverage", "linear")})
    )
    assert held is not None
    assert lacking is not None
    assert protection(held) == ("leverage", 4, True)
    # Three lines of six hold 6 anchors beside a recent line.
    assert protection(lacking) == ("linear", 6, False)


def test_without_unconditional_rows_none_is_to_evict_like_others(
    export: Callable[..., Path], tiny_files: tuple[Path, Path], linert: Linert, tmp_path: Path
) -> None:
    bundle = export(*tiny_files, *OPTIONS, "--policy", "linear,leverage", "--guidance", 1)
    for policy in ("linear", "leverage"):
        assert not settings(bundle, policy=policy).share_guidance
        out = tmp_path / policy
        drawn = linert("run", bundle, "--classes", "0,1", "--policy", policy, "--out", out)
        assert drawn.code == 0, drawn.err
    manifest = open_bundle(bundle).manifest
    shared = {policy: PolicySpec(0, {"share_guidance": True}) for policy in manifest.policies}
    with pytest.raises(BundleError, match="usual under 'leverage': share_guidance, and there are no"):
        check(msgspec.structs.replace(manifest, policies=shared))


def test_a_comparison_gives_every_policy_its_usual_settings(many_bundle: Path) -> None:
    from linert.exporter.compare_grid import Grid

    cells, _ = Grid(("linear", "leverage"), ("3",)).cells(open_bundle(many_bundle).manifest)
    evicting = [protection(cell.cache) for cell in cells if cell.cache.evicts]
    # The bundle was exported with 2 anchors.
    assert evicting == [("linear", 2, False), ("leverage", 2, True)]


def test_the_default_comes_first() -> None:
    assert next(iter(POLICIES)) == DEFAULT_POLICY


@pytest.mark.parametrize(
    ("usual", "told"),
    [
        ({"anchor_token": 4}, "'anchor_token' is no setting of the cache"),
        ({"budget_lines": 4}, "'budget_lines' is no setting of the cache"),
        ({"anchor_tokens": 0.5}, "anchor_tokens: Expected `int`, got `float`"),
        ({"recent_lines": -1}, "recent_lines is -1.0, must be at least 0"),
    ],
)
def test_a_policy_is_not_registered_with_what_no_run_could_have(usual: dict[str, Any], told: str) -> None:
    odd = type("Odd", (Linear,), {"name": "odd", "usual": usual})
    with pytest.raises(ValueError, match=f"what is usual under odd: {told}"):
        register(odd)
    assert "odd" not in POLICIES
