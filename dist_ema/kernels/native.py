"""Calls the compiled kernels on the CPU through ctypes. Chooses and logs the route once.

``fused.cpp`` averages, ``digest.cpp`` computes fingerprints. Without a compiler the callers' own routes give the same
bits more slowly. ``DIST_EMA_KERNEL`` forces the choice: ``eager`` or ``compiled``.

OpenMP is torch's own runtime if that is GNU's, so both share one set of threads. Its threads do not survive a fork: a
child that is forked later (a worker of a data loader) computes with one thread.
"""

from __future__ import annotations

import ctypes
import logging
import os
from array import array
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from dist_ema.geometry.runs import Runs, flattened
from dist_ema.kernels import compiler
from dist_ema.kernels.arguments import CODES
from dist_ema.kernels.choice import choose
from dist_ema.kernels.compiler import BuildError
from dist_ema.kernels.rounding import ElementPositions, Rounding, average_key

logger = logging.getLogger(__name__)

#: Every loop of the kernel: one to four averages together, and one of a large weight behind them.
_CHECKED_WEIGHTS = ((1e-4,), (1e-4, 0.3), (1e-4, 0.3, 0.01), (1e-4, 0.3, 0.01, 0.2, 0.7))
_SOURCES = [Path(__file__).with_name(name) for name in ("fused.cpp", "digest.cpp")]


class Library:
    """Wraps the loaded kernels.

    Attributes:
        path: the path of the shared library.

    Raises:
        OSError: it is another library.
    """

    def __init__(self, path: Path, library: ctypes.CDLL) -> None:
        self.path = path
        try:
            self._lerp = library.dist_ema_lerp
            self._digest = library.dist_ema_digest
        except AttributeError as error:
            raise OSError(str(error)) from error
        self._lerp.argtypes = [c_int64] * 2 + [c_void_p] * 5 + [c_int64] * 2 + [c_void_p] * 3
        self._lerp.restype = c_int64
        self._digest.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_void_p]
        self._digest.restype = ctypes.c_uint64
        self._process = os.getpid()

    def __str__(self) -> str:
        return str(self.path)

    def lerp(
        self,
        arrays: Sequence[array[int]],
        weights: Sequence[float],
        guarded: bool,
        rounding: Rounding | None = None,
        copies: array[int] | None = None,
    ) -> int:
        """Averages. Other Python threads run meanwhile.

        Args:
            arrays: for each tensor its start if all tensors are laid end to end, and the end; the address of its
                source; the code of the source's dtype; average by average, the address of its shadow; and its index in
                ``rounding`` and ``copies``, if one of them is given.
            weights: the weight of each average.
            guarded: skip NaN and Inf.
            rounding: the stochastic rounding of this update, for bf16 shadows; None for fp32 ones.
            copies: for each index the address of a bf16 tensor that also receives the first average, or 0; for fp32
                shadows.

        Returns:
            The number of source elements that were skipped.
        """
        given: list[array[int] | array[float]] = [*arrays[:4], array("d", weights)]
        tables = None
        if rounding is not None:
            positions = rounding.positions
            keys = array("Q", rounding.keys)
            pointers = _addresses([arrays[4], keys, positions.names, positions.first, positions.local, positions.full])
            tables = array("Q", pointers)  # the struct Rounding of fused.cpp
        at = None if tables is None else tables.buffer_info()[0]
        others = [None, None] if copies is None else _addresses([copies, arrays[4]])
        skipped: int = self._lerp(
            len(arrays[1]), len(weights), *_addresses(given), guarded, self._threads(), at, *others
        )
        return skipped

    def _threads(self) -> int:
        return torch.get_num_threads() if os.getpid() == self._process else 1

    def digest(self, address: int, width: int, runs: Runs, keys: Tensor) -> int:
        """Returns the sum of the digest over ``runs``, computed by one thread. Other Python threads run meanwhile.

        Args:
            address: the address of the elements of all runs, one after the other.
            width: bytes of an element: 1, 2, 4 or 8.
            runs: first position and number of elements of each run, in the full tensor.
            keys: the keys of the places in a block, int64.
        """
        pairs = flattened(runs)
        total: int = self._digest(address, width, pairs.buffer_info()[0], len(runs), keys.data_ptr())
        return total


def _addresses(arrays: Sequence[array[int] | array[float]]) -> list[int]:
    """Returns addresses of tensors that the caller keeps alive."""
    return [values.buffer_info()[0] for values in arrays]


# The choice.

_decided: list[Library | None] = []


def choice() -> Library | None:
    """Returns the kernels, or None for the eager route. Decides and logs at the first call. Raises EMAConfigError."""
    return choose(_decided, "the CPU", _build_and_check, logger)


def _build_and_check() -> Library:
    library = build()
    _check(library)
    return library


def build() -> Library:
    """Returns the kernels, from the cache or newly compiled. Raises BuildError or OSError."""
    return Library(*compiler.build(_SOURCES))


def _check(library: Library) -> None:
    """Compares a few elements with torch: another processor or compiler may round differently, and is then not used."""
    source = torch.linspace(-3, 5, 99, dtype=torch.float32, device="cpu").tan_()  # whatever the defaults are
    source[7], source[60] = float("nan"), float("inf")
    for dtype, code in CODES.items():
        values = source.to(dtype)
        for weights in _CHECKED_WEIGHTS:
            shadows = []
            lerped = []
            for number, weight in enumerate(weights):
                shadow = torch.linspace(1, -2 - number, 99, dtype=torch.float32, device="cpu")
                shadows.append(shadow)
                lerped.append(torch.lerp(shadow, values.float(), weight))
            # Elements whose source is NaN or Inf keep their value.
            expected = torch.where(values.isfinite(), torch.stack(lerped), torch.stack(shadows))
            entries = [[0, 99], [values.data_ptr()], [code], [shadow.data_ptr() for shadow in shadows]]
            copy = torch.zeros(99, dtype=torch.bfloat16, device="cpu")
            arrays = [array("q", entry) for entry in (*entries, [0])]
            skipped = library.lerp(arrays, weights, True, copies=array("q", [copy.data_ptr()]))
            is_copy_right = torch.equal(copy, expected[0].bfloat16())
            if skipped != 2 or not is_copy_right or not torch.equal(torch.stack(shadows), expected):
                raise BuildError(f"{library.path} does not compute what torch does from {dtype}")
        for weight in (1e-4, 0.7):
            _check_rounding(library, values, code, weight)


def _check_rounding(library: Library, values: Tensor, code: int, weight: float) -> None:
    rounding = Rounding(ElementPositions(["check"], [((2**32 - 50, 99),)]), [average_key(0, 1, "check")])
    shadow = torch.linspace(1, -2, 99, dtype=torch.float32, device="cpu").bfloat16()
    blended = rounding.apply(0, 0, 0, torch.lerp(shadow.float(), values.float(), weight))
    expected = torch.where(values.isfinite(), blended, shadow)
    entries = ([0, 99], [values.data_ptr()], [code], [shadow.data_ptr()], [0])
    skipped = library.lerp([array("q", entry) for entry in entries], [weight], True, rounding)
    if skipped != 2 or not torch.equal(shadow, expected):
        raise BuildError(f"{library.path} does not round as torch's operations do")
