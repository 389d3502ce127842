"""What needs a real GPU: skipped where there is none."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.path.parent.parts[-1:]:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
