"""Whether adapters can be worn together."""

from __future__ import annotations

from collections.abc import Collection

from ia3rt.adapters.adapter import Adapter


def check_modules(adapters: Collection[Adapter]) -> None:
    """Checks that adapters can be worn together: of each module there is one, and it wears their vectors.

    Raises:
        ValueError: two of them have their own of one module, or one has a vector within another's own.
    """
    for owner in adapters:
        for path in sorted(owner.modules):
            for adapter in adapters:
                theirs = next((p for p in sorted(adapter.modules) if _is_within(p, path)), None)
                if theirs is not None and adapter is not owner:
                    raise ValueError(
                        f"adapters {owner.name!r} and {adapter.name!r} each have their own module {theirs!r}: a row "
                        "can go through one of them only, so they cannot be combined"
                    )
                site = next((site for site in adapter.sites if _is_within(site.path, path)), None)
                if site is not None:
                    raise ValueError(
                        f"adapter {adapter.name!r} acts at {site}, within {path!r}, where adapter {owner.name!r} has "
                        "its own module, which wears no vector: they cannot be combined"
                    )


def _is_within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")
