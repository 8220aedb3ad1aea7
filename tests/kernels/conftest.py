"""What the tests of kernels share."""

import pytest


@pytest.fixture(autouse=True)
def _not_forced(monkeypatch):
    monkeypatch.delenv("GRANQ_KERNEL", raising=False)
