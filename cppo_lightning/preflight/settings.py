"""The trust region with the numbers that it resolved to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from cppo_lightning.preflight.section import Row, Section

if TYPE_CHECKING:
    from cppo_lightning.trust_regions import TrustRegion


def trust_region_section(trust_region: TrustRegion) -> Section:
    """Every field of the trust region and of what it is made of."""
    rows: list[Row] = [
        ("class", type(trust_region).__name__, type(trust_region).__module__),
        *_settings("", trust_region),
        ("top-K read", str(trust_region.top_k), "log-probabilities of mu that rollouts carry for each token, 0 for none"),
    ]
    return Section("Trust region", rows)


def _settings(prefix: str, value: Any) -> Iterator[Row]:
    of = {field.name: getattr(value, field.name) for field in fields(value)} if is_dataclass(value) else vars(value)
    for name, inner in of.items():
        if isinstance(inner, list | tuple):
            for i, element in enumerate(inner):
                yield from _setting(f"{prefix}{name}[{i}]", element)
        else:
            yield from _setting(f"{prefix}{name}", inner)


def _setting(name: str, value: Any) -> Iterator[Row]:
    if hasattr(value, "__dict__"):
        yield name, type(value).__name__, ""
        yield from _settings(f"{name}.", value)
    else:
        yield name, str(value), ""
