"""Windows through which ranks bring rank 0 what they hold, at sizes where each sends for itself."""

from __future__ import annotations

import itertools
import random
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_ema import ShardedEMA
from dist_ema.comm.windows import WINDOW_BYTES, Window, all_gather_flat, packed


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


DTYPES = [torch.uint8, torch.float32, torch.complex128, torch.bfloat16, torch.float64]


@pytest.mark.world_size(4)
@pytest.mark.parametrize("window", [256, WINDOW_BYTES], ids=["many windows", "one window"])
def test_parts_of_every_rank_arrive_on_every_rank(rank: int, window: int) -> None:
    """Parts of other sizes, one of them empty; a wide element behind narrow ones, which may not begin anywhere."""
    torch.manual_seed(0)
    full = [torch.randint(0, 99, (size,)).to(dtype) for size, dtype in zip((5, 33, 7, 21, 40), DTYPES, strict=True)]
    parts = [[(0, 0, 5), (1, 0, 9)], [(1, 9, 33), (2, 0, 7), (3, 0, 2)], [], [(3, 2, 21), (4, 0, 40)]]
    mine = [torch.zeros_like(values) for values in full]
    for index, start, stop in parts[rank]:
        mine[index][start:stop] = full[index][start:stop]

    def read(index: int, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(mine[index][start:stop])

    def write(index: int, start: int, stop: int, values: torch.Tensor) -> None:
        mine[index][start:stop] = values

    with mock.patch("dist_ema.comm.windows.WINDOW_BYTES", window):
        all_gather_flat(parts, DTYPES, dist.group.WORLD, read, write)
    assert all(torch.equal(found, values) for found, values in zip(mine, full, strict=True))


def test_an_element_that_does_not_fit_begins_the_next_window() -> None:
    """There was none: the loop over windows did not end."""
    assert packed([1, 1], [torch.float64, torch.complex128], 24) == [([(0, 0, 1, 0)], 8), ([(1, 0, 1, 0)], 16)]


@pytest.mark.world_size(4)
def test_replicas_wait_for_each_other_once_on_the_way_in_and_once_on_the_way_out(rank: int) -> None:
    """Each sent its part by itself: two waits more for every replica."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(7, 5))
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    with (
        mock.patch("dist_ema.comm.windows.dist.all_gather", wraps=dist.all_gather) as gathered,
        mock.patch.object(dist, "broadcast", wraps=dist.broadcast) as broadcast,
    ):
        with ema.average_parameters():
            inside = _large(gathered)
        outside = _large(gathered)
    assert (inside, outside) == (1, 2)
    assert not broadcast.called


def _large(gathered: mock.Mock) -> int:
    """Calls that sent more than a short message."""
    return sum(call.args[1].numel() != 256 for call in gathered.call_args_list)
