"""One thread: on models this small the threads of torch wait for one another longer than they work."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _one_thread(_quiet_libraries: None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
