"""One thread: on models this small the threads of torch wait for one another longer than they work."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor


@pytest.fixture(autouse=True)
def _one_thread(_quiet_libraries: None) -> None:
    pass


@pytest.fixture
def padded_batches() -> "list[tuple[Tensor, Tensor]]":
    """Two batches of rows of different lengths, with rubbish where the padding is."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(3, 300, (3, 20), generator=generator),
            torch.arange(20) < torch.tensor([20, shortest, 13])[:, None],
        )
        for shortest in (7, 16)
    ]
