"""The reference layers: each feature against a plain reference, each layout of two ranks against one rank."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest

from tests.ranks.layer_architectures import FEATURES, PROPERTIES, ROUTING, cases
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def features() -> dict[str, str]:
    """What each feature's case came to, all on one rank."""

    def body() -> dict[str, str]:
        from tests.ranks import layer_features, router_features

        files = ((layer_features, FEATURES), (router_features, ROUTING))
        return outcomes({name: getattr(file, name) for file, names in files for name in names})

    return run_ranks(body, 1)[0]


@pytest.fixture(scope="module")
def layouts() -> dict[str, str]:
    """What each case of two ranks came to."""

    def body() -> dict[str, str]:
        from tests.ranks import layer_layouts

        chosen = {name: getattr(layer_layouts, name) for name in PROPERTIES}
        for architecture, layout in cases():
            chosen[f"{architecture} on {layout}"] = lambda a=architecture, x=layout: (
                layer_layouts.agrees_with_one_rank(a, x)
            )
        return outcomes(chosen)

    first, second = run_ranks(body, 2)
    return {name: first[name] + second[name] for name in first}


def outcomes(chosen: dict[str, Callable[[], None]]) -> dict[str, str]:
    """Empty for each case that passes, else its traceback; one group serves them all."""
    from moe_bench.mcore.cpu.spec import reference_layers

    found = {}
    with reference_layers():
        for name, case in chosen.items():
            try:
                case()
                found[name] = ""
            except Exception:  # noqa: BLE001 - the other cases still run
                found[name] = traceback.format_exc()
    return found


@pytest.mark.ranks(1)
@pytest.mark.parametrize("feature", [*FEATURES, *ROUTING])
def test_feature_equals_its_reference(feature: str, features: dict[str, str]) -> None:
    assert not features[feature], features[feature]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("architecture", "layout"), cases())
def test_two_ranks_equal_one(architecture: str, layout: str, layouts: dict[str, str]) -> None:
    assert not layouts[f"{architecture} on {layout}"], layouts[f"{architecture} on {layout}"]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("property_", PROPERTIES)
def test_property_of_two_ranks(property_: str, layouts: dict[str, str]) -> None:
    assert not layouts[property_], layouts[property_]
