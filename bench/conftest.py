"""The options of the pytest-benchmark cases."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --model."""
    parser.addoption("--model", default="tiny", help="a built-in shape, a folder, or a Hugging Face id")
