"""Windows through which ranks bring rank 0 what they hold, at sizes where each sends for itself."""

from __future__ import annotations

import itertools
import random
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_ema.windows import WINDOW_BYTES, Window


def cuts(seed: int, ranks: int, places: int) -> list[tuple[int, int, int]]:
    """``(rank, offset, length)`` of bytes that fill a window: each rank has some places, the last one none."""
    random.seed(seed)
    bounds = sorted({0, WINDOW_BYTES, *random.sample(range(WINDOW_BYTES), places)})
    return [(random.randrange(ranks - 1), low, high - low) for low, high in itertools.pairwise(bounds)]


@pytest.mark.world_size(4)
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("places", [7, 5000])  # sent for themselves; too many, and so added up
def test_every_byte_arrives_from_the_rank_that_has_it(rank: int, places: int, everywhere: bool) -> None:
    """Bytes that begin anywhere, of negative zeros and NaNs too; a rank with nothing to send; a window used twice."""
    window = Window(dist.group.WORLD)
    for seed in (1, 2):
        torch.manual_seed(seed)
        wanted = torch.randint(0, 256, (WINDOW_BYTES,), dtype=torch.uint8)
        wanted[: 1 << 20] = torch.full((1 << 18,), -0.0).view(torch.uint8)
        wanted[1 << 20 : 1 << 21] = torch.full((1 << 18,), torch.nan).view(torch.uint8)
        window.clear(WINDOW_BYTES)
        out = window.part(0, WINDOW_BYTES, torch.uint8)
        filled = []
        for owner, offset, length in cuts(seed, 4, places):
            if owner == rank:
                out[offset : offset + length] = wanted[offset : offset + length]
                filled.append((offset, length))
        window.collect(filled, everywhere)
        if everywhere or rank == 0:
            assert torch.equal(out, wanted)


@pytest.mark.world_size(4)
def test_no_rank_sends_what_it_does_not_have(rank: int) -> None:
    """Zeros from everyone would be N times the bytes."""
    window = Window(dist.group.WORLD)
    window.clear(WINDOW_BYTES)
    part = WINDOW_BYTES // 4
    window.part(rank * part, part, torch.uint8).fill_(rank + 1)
    with mock.patch.object(dist, "send", wraps=dist.send) as send, mock.patch.object(dist, "reduce") as reduce:
        window.collect([(rank * part, part // 2), (rank * part + part // 2, part - part // 2)])  # which touch
    assert not reduce.called
    assert [call.args[0].numel() for call in send.call_args_list] == ([part + 16] if rank else [])
    if rank == 0:
        assert window.part(0, WINDOW_BYTES, torch.uint8)[::part].tolist() == [1, 2, 3, 4]


@pytest.mark.world_size(2)
def test_a_small_window_is_one_call(rank: int) -> None:
    """Where waiting costs more than bytes."""
    window = Window(dist.group.WORLD)
    window.clear(16)
    window.part(8 * rank, 1, torch.float64).fill_(rank + 1.5)
    with mock.patch.object(dist, "reduce", wraps=dist.reduce) as reduce, mock.patch.object(dist, "all_gather") as told:
        window.collect([(8 * rank, 8)])
    assert reduce.call_count == 1
    assert not told.called
    if rank == 0:
        assert window.part(0, 2, torch.float64).tolist() == [1.5, 2.5]
