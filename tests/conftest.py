"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from flpriv import memory


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real public images named by the variable FLPRIV_TEST_DATA."""
    folder = os.environ.get("FLPRIV_TEST_DATA")
    if not folder:
        pytest.skip("FLPRIV_TEST_DATA is not set: tests on real images are left out")
    return Path(folder).resolve()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors are slower on many threads, and two tests share two cores."""
    torch.set_num_threads(1)
    memory.keep()
