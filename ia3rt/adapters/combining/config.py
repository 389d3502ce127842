"""What the adapter_config.json of an adapter says that was made of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_OF_ITS_PLACES = {"target_modules", "feedforward_modules", "exclude_modules", "modules_to_save"}


def combined_config(adapters: Iterable[tuple[Mapping[str, Any], bool]]) -> dict[str, Any]:
    """What all of their configs say, but where each acts; the task is that of those that bring modules, if any do.

    Args:
        adapters: of each its config, and whether it has modules of its own, such as a head.
    """
    configs = list(adapters)
    first, *others = (config for config, _ in configs)
    said = {key: value for key, value in first.items() if all(key in each and each[key] == value for each in others)}
    tasks = {config.get("task_type") for config, has_modules in configs if has_modules}
    if len(tasks) == 1:
        said["task_type"] = tasks.pop()
    return {key: value for key, value in said.items() if key not in _OF_ITS_PLACES}
