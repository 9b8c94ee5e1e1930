"""Yields full tensors under the names of ``save_pretrained``, one after the other on every rank, for inference
servers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.checkpoints.arrangement import Arrangement
from dist_ema.checkpoints.folder import IO_CHUNK
from dist_ema.comm.agreement import agreed
from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.gather import LocalValues, gather_each
from dist_ema.geometry.runs import chunks, count


class HubTensors:
    """Assembles the tensors of the files from windows of the module's tensors.

    A tensor of the files may be made of several tensors of the module, and the reverse. It is returned when its last
    element has arrived. Only tensors that are incomplete are in memory: for fused experts, all experts of one tensor.

    Args:
        arrangement: says where the elements of each tensor of the module go.
        device: the device of the assembled tensors.
    """

    def __init__(self, arrangement: Arrangement, device: torch.device) -> None:
        self._arrangement = arrangement
        self._device = device
        self._plans = {plan.name: plan for plan in arrangement.targets}
        self._targets = {source: arrangement.targets_of(source) for source in arrangement.sources}
        # How many tensors of the module each tensor of the files still waits for.
        self._missing = Counter(target for targets in self._targets.values() for target in targets)
        self._begun: dict[str, Tensor] = {}

    def gather(
        self,
        entries: Sequence[FullTensor],
        held: Callable[[str], LocalValues | None],
        dtypes: Mapping[str, torch.dtype],
        group: dist.ProcessGroup | None,
        operation: str,
    ) -> list[tuple[str, Tensor]]:
        """Gathers these tensors of the module, and returns the tensors of the files that are complete now. Collective.

        The order is the same on every rank. Raises EMAError on every rank, for example if one is out of memory.
        """
        entries = [entry for entry in entries if entry.name in self._targets]
        with agreed(group, operation):
            for entry in entries:
                for target in self._targets[entry.name]:
                    if target not in self._begun:
                        plan = self._plans[target]
                        self._begun[target] = torch.empty(plan.shape, dtype=plan.dtype, device=self._device)
        gather_each(entries, held, dtypes, group, self._take, operation, everywhere=True)
        whole = []
        for entry in entries:
            for target in self._targets[entry.name]:
                self._missing[target] -= 1
                if not self._missing[target]:
                    whole.append((target, self._begun.pop(target)))
        return whole

    def _take(self, entry: FullTensor, start: int, values: Tensor) -> None:
        """Copies a window of one tensor of the module to the places of its elements."""
        low = 0
        # A window is larger than a chunk, and arranging takes an index for each element.
        for part in chunks(((start, values.numel()),), IO_CHUNK):
            high = low + count(part)
            for target, runs, moved in self._arrangement.place(entry.name, part, values[low:high]):
                out = self._begun[target].view(-1)
                position = 0
                for first, length in runs:
                    out[first : first + length].copy_(moved[position : position + length])
                    position += length
            low = high
