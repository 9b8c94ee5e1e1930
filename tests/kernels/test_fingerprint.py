"""The digest: blind to how a tensor is cut, and to nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_ema.geometry.runs import Rows, Runs, whole
from dist_ema.kernels import fingerprint, native
from dist_ema.kernels.fingerprint import BLOCK, COMPLEX, SALT, Part

pytestmark = pytest.mark.core

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("repeatable")

MODULUS = 1 << 64
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.complex64,
    torch.complex128,
]


@pytest.fixture(autouse=True, scope="module", params=["compiled", "eager", "device"])
def route(request: pytest.FixtureRequest) -> Iterator[None]:
    """All routes must give the same digests: a checkpoint may be written by one and read by the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_decided", [native.build() if request.param == "compiled" else None])
        if request.param == "device":  # torch's operations alone; in pieces of odd sizes
            patch.setattr(fingerprint, "DEVICE_CHUNK", 3 * BLOCK // 2 + 1)
            patch.setattr(fingerprint, "_host_digest", lambda part: int(fingerprint.device_digest(part)) % MODULUS)
        yield


def partial_digest(values: Tensor, runs: Runs, dtype: torch.dtype | None = None, start: int = 0) -> int:
    return fingerprint.partial_digest(values, runs, dtype, start)


def _random_bits(dtype: torch.dtype, count: int, seed: int = 0) -> Tensor:
    """Elements of any bits at all, NaN payloads and negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype)


def _digest(values: Tensor) -> int:
    return partial_digest(values, whole(values.numel()))


def _mix(value: int) -> int:
    """SplitMix64's finalizer, from the paper."""
    value = (value + 0x9E3779B97F4A7C15) % MODULUS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % MODULUS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % MODULUS
    return value ^ (value >> 31)


def _slow_digest(values: Tensor, first: int = 0) -> int:
    """The formula of the module's docstring, an element at a time."""
    size = values.element_size()
    data = bytes(values.contiguous().view(-1).view(torch.uint8).tolist())
    total = 0
    for place in range(values.numel()):
        element = data[place * size : (place + 1) * size]
        if size == 16:
            low, high = (int.from_bytes(half, "little", signed=True) for half in (element[:8], element[8:]))
            bits = low + COMPLEX * high
        else:
            bits = int.from_bytes(element, "little", signed=size > 1)
        position = first + place
        total += bits * (_mix(position % BLOCK) | 1) * (_mix(position // BLOCK ^ SALT) | 1)
    return total % MODULUS


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
def test_digest_is_the_documented_formula(dtype: torch.dtype) -> None:
    """Digests are written into checkpoints, so the formula may never change unnoticed."""
    values = _random_bits(dtype, 50) if dtype is not torch.bool else torch.arange(50) % 3 == 0
    assert _digest(values) == _slow_digest(values)
    for first in (BLOCK - 20, 3 * BLOCK - 7):
        assert partial_digest(values, ((first, 50),)) == _slow_digest(values, first)


def test_digest_of_known_values_is_the_same_in_every_version() -> None:
    assert _digest(torch.tensor([1.0, -2.0, 3.5])) == _slow_digest(torch.tensor([1.0, -2.0, 3.5])) != 0
    assert _digest(torch.tensor([1], dtype=torch.int64)) == (_mix(0) | 1) * (_mix(SALT) | 1) % MODULUS
    assert _digest(torch.empty(0)) == 0
    assert _digest(torch.tensor(5, dtype=torch.int64)) == 5 * (_mix(0) | 1) * (_mix(SALT) | 1) % MODULUS


@given(
    st.integers(0, 300),
    st.sampled_from([0, BLOCK - 150, 5 * BLOCK - 3]),
    st.lists(st.integers(0, 300), max_size=10),
    st.randoms(use_true_random=False),
)
def test_digest_does_not_see_how_a_tensor_is_cut_or_who_holds_which_part(
    size: int, first: int, cuts: list[int], shuffle: random.Random
) -> None:
    values = _random_bits(torch.float32, size, seed=size)
    edges = sorted({0, size, *[edge for edge in cuts if edge < size]})
    parts = list(pairwise(edges))
    shuffle.shuffle(parts)
    ranks = [parts[0::2], parts[1::2]]
    total = 0
    for held in ranks:
        local = torch.cat([values[low:high] for low, high in held] or [values[:0]])
        total += partial_digest(local, tuple((first + low, high - low) for low, high in held))
    assert total % MODULUS == partial_digest(values, ((first, size),) if size else ())


def test_digest_reads_only_the_elements_from_start_on() -> None:
    """A share of a replicated parameter begins in the middle of the live tensor."""
    values = _random_bits(torch.float32, 100)
    assert partial_digest(values, ((40, 30),), start=40) == partial_digest(values[40:70], ((40, 30),))


def test_digest_reads_in_row_major_order_whatever_the_memory_format() -> None:
    values = torch.randn(4, 3, 5, 6)
    assert _digest(values.to(memory_format=torch.channels_last)) == _digest(values)
    assert _digest(values.permute(3, 1, 0, 2)) == _digest(values.permute(3, 1, 0, 2).contiguous())
    assert _digest(values.permute(3, 1, 0, 2)) != _digest(values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_flipped_bit_is_seen(dtype: torch.dtype) -> None:
    """One flipped bit is noticed by none of torch.load, safetensors and DCP."""
    values = _random_bits(dtype, 70_000)  # more than a block
    digest = _digest(values)
    data = values.view(torch.uint8)
    choose = random.Random(1)
    flips = [(0, 0), (data.numel() - 1, 7)]
    flips += [(choose.randrange(data.numel()), choose.randrange(8)) for _ in range(60)]
    for byte, bit in flips:
        data[byte] ^= 1 << bit
        assert _digest(values) != digest, (byte, bit)
        data[byte] ^= 1 << bit
    assert _digest(values) == digest


def test_a_changed_bool_is_seen() -> None:
    values = torch.arange(40) % 3 == 0
    digest = _digest(values)
    for place in range(40):
        values[place] = ~values[place]
        assert _digest(values) != digest, place
        values[place] = ~values[place]


def test_two_elements_or_two_blocks_that_changed_places_are_seen() -> None:
    """A plain sum would see neither; keys that repeat with each block would miss the second."""
    values = _random_bits(torch.float32, 3 * BLOCK)
    digest = _digest(values)
    choose = random.Random(2)
    for _ in range(100):
        here, there = choose.sample(range(values.numel()), 2)
        swapped = values.clone()
        swapped[here], swapped[there] = values[there], values[here]
        assert _digest(swapped) != digest, (here, there)
    blocks = values.view(3, BLOCK)
    for order in ([1, 0, 2], [0, 2, 1], [2, 1, 0], [1, 2, 0]):
        assert _digest(blocks[order].reshape(-1)) != digest, order
    assert _digest(values.roll(1)) != digest
    assert _digest(values.flip(0)) != digest


def test_equal_numbers_with_different_bits_are_told_apart() -> None:
    """-0.0 == 0.0 and NaN != NaN: a digest of the numbers would be wrong both ways."""
    zero, negative = torch.zeros(5), torch.zeros(5)
    negative[3] = -0.0
    assert torch.equal(zero, negative) and _digest(zero) != _digest(negative)
    quiet = torch.tensor([0x7FC00000, 1], dtype=torch.int32).view(torch.float32)
    payload = torch.tensor([0x7FC00001, 1], dtype=torch.int32).view(torch.float32)
    assert _digest(quiet) == _digest(quiet.clone())
    assert _digest(quiet) != _digest(payload)


def test_digest_of_another_dtype_is_that_of_the_converted_values() -> None:
    values = torch.randn(1000)
    as_bf16 = partial_digest(values, whole(1000), torch.bfloat16)
    assert as_bf16 == _digest(values.bfloat16()) != _digest(values)


def test_a_list_of_tensors_has_the_digests_of_each_and_waits_for_no_device_in_between() -> None:
    """One wait a block of 65,536 elements, or a run, took 154 ms for 200 MB on an H200."""
    values = [_random_bits(torch.float32, count, count) for count in (0, 7, 70_000)]
    parts = [Part(one, whole(one.numel())) for one in values]
    wanted = [_digest(one) for one in values]
    assert fingerprint.partial_digests(parts) == wanted
    moved = [Part(values[2], Rows(start=5, length=7, step=100, number=10_000))]
    assert fingerprint.partial_digests(moved + parts)[1:] == wanted
    with mock.patch.object(Tensor, "item") as item, mock.patch.object(Tensor, "tolist") as tolist:
        fingerprint.device_digest(moved[0])
    assert not item.called
    assert not tolist.called
