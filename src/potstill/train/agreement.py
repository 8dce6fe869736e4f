"""What all processes of one training have to hold alike, compared before it begins.

Each reads rows, weights and checkpoints by itself: another file on one machine, or a stale listing of a
shared folder, would train a mixture of both in silence.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed

from potstill.core.errors import TrainingError

__all__ = ["check_agreement", "weights_digest"]

_SAMPLED_VALUES = 256
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_agreement(held: Mapping[str, str]) -> None:
    """Raise TrainingError, in every process, where one holds something else than another.

    `held` names in words what is compared; a training of one process has nothing to compare.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, dict(held))
    for what in held:
        found: dict[str, list[str]] = {}
        for rank, one in enumerate(everyone):
            found.setdefault(one[what], []).append(str(rank))
        if len(found) > 1:
            told = "; ".join(f"{value} in {', '.join(ranks)}" for value, ranks in found.items())
            raise TrainingError(
                f"the processes of this training have different {what}, by rank: {told}",
                expected="the same files, by the same paths, and the same libraries on every machine",
                mend="compare on the machines of these ranks what is installed, the files that the recipe "
                "names and the store's folder of this step; a shared folder may take a minute to show "
                "what is new there",
            )


def weights_digest(*models: torch.nn.Module | None) -> str:
    """A digest of models: names, types and shapes of tensors, the sum of their bits, some of their values.

    Bits are summed as whole numbers: no order of adding changes the sum, and any one changed weight does.
    """
    found = hashlib.sha256()
    for number, model in enumerate(models):
        for name, one in () if model is None else model.state_dict(keep_vars=True).items():
            if isinstance(one, torch.Tensor):
                flat = one.detach().flatten().contiguous()
                total = flat.view(_WHOLE_NUMBERS[flat.element_size()]).sum(dtype=torch.int64)
                values = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)].contiguous().cpu()
                found.update(f"{number} {name} {one.dtype} {tuple(one.shape)} {int(total)}".encode())
                found.update(values.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]
