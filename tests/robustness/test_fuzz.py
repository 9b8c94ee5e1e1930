"""Manifests and headers of any bytes at all: refused with an error of this library, in time and in memory."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dist_ema import ShardedEMA, schedules, verify_checkpoint
from dist_ema.checkpoints.reader import RunReader
from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats.manifest import NAME, Manifest, StoredFile, StoredTensor, _seal, checksum

#: Bytes that reading a few hundred bytes may take.
MEMORY = 4 << 20
KEY = ("live", "a")

_repeatable = settings(
    derandomize=True,
    deadline=30_000,  # milliseconds: what grows with the square of a length exceeds it, a busy machine does not
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "live/model.safetensors", "", "..", "a\nb", "\ud800", "9" * 5000])
    | st.sampled_from([1 << 62, -1, 10**400, float("nan"), float("inf")])
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    ema = ShardedEMA(
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), averages={"a": 0.5, "b": schedules.HalfLife("100tok")}
    )
    ema.update()
    path = tmp_path_factory.mktemp("fuzz") / "c"
    ema.save(path)
    return path


def _bounded(action: Callable[[], object]) -> object:
    tracemalloc.start()
    try:
        return action()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value there is something."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in inside for place in _places(inner, (*path, key)))]


def _changed(body: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    """The JSON value with something else at one place: another value, none, or another name."""
    if not path:
        return value
    copy = dict(body) if isinstance(body, dict) else list(body)
    key = path[0]
    if len(path) > 1 or how == "replace":
        copy[key] = _changed(copy[key], path[1:], how, value)
    elif how == "rename" and isinstance(copy, dict):
        copy[str(value)] = copy.pop(key)
    else:
        del copy[key]
    return copy


@_repeatable
@given(st.binary(max_size=400))
def test_a_manifest_of_random_bytes_is_refused(text: bytes) -> None:
    """A parser that raises what nobody expects takes the training down with it."""
    with pytest.raises(CheckpointError):
        _bounded(lambda: Manifest.from_bytes(text))


@_repeatable
@given(_values)
def test_a_manifest_of_random_json_is_refused(value: Any) -> None:
    """JSON of any form, with the right format, version and checksum where it can have them."""
    body = {"format": "dist_ema", "version": 1, **(value if isinstance(value, dict) else {"data": value})}
    for text in (json.dumps(value).encode(), _seal(body)):
        with pytest.raises(CheckpointError):
            _bounded(lambda text=text: Manifest.from_bytes(text))


@_repeatable
@given(st.data())
def test_a_manifest_with_changed_bytes_is_refused(saved: Path, data: st.DataObject) -> None:
    """Damage of several bytes, cuts and insertions."""
    text = (saved / NAME).read_bytes()
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(start + 20, len(text))))
    changed = text[:start] + data.draw(st.binary(max_size=20)) + text[stop:]
    if changed != text:
        with pytest.raises(CheckpointError):
            _bounded(lambda: Manifest.from_bytes(changed))


@_repeatable
@given(st.data())
def test_a_forged_manifest_is_refused_or_read_as_what_it_says(saved: Path, data: st.DataObject) -> None:
    """With a checksum that fits, every entry is an attacker's: wrong kinds, absurd sizes, missing keys, odd names."""
    body = json.loads((saved / NAME).read_bytes())
    body.pop("checksum")
    place = data.draw(st.sampled_from(_places(body)[1:]))
    changed = _changed(body, place, data.draw(st.sampled_from(["replace", "remove", "rename"])), data.draw(_values))
    text = _seal(changed)
    try:
        manifest = _bounded(lambda: Manifest.from_bytes(text))
    except CheckpointError:
        return
    assert isinstance(manifest, Manifest)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    with contextlib.suppress(CheckpointError):  # the readers meet what the parser let through
        RunReader(saved, manifest.data, manifest.files, manifest.tensors()).close()


def _read(path: Path, header: bytes, content: bytes, tensor: StoredTensor) -> None:
    """Opens a file whose header is what the manifest says, and reads all of its tensor."""
    (path / "live").mkdir(exist_ok=True)
    data = header + content
    (path / tensor.file).write_bytes(data)
    files = {tensor.file: StoredFile(len(data), checksum(header))}
    with RunReader(path.parent, path.name, files, {KEY: tensor}) as reader:
        out = torch.empty(tensor.shape, dtype=reader.dtype(KEY)).view(-1)
        reader.read(KEY, ((0, out.numel()),), out)


def _tensor(*shape: int) -> StoredTensor:
    return StoredTensor("live/model.safetensors", "F32", shape, 0)


@_repeatable
@given(st.binary(max_size=200), st.booleans())
def test_a_header_of_random_bytes_is_refused(tmp_path: Path, text: bytes, fits: bool) -> None:
    """Lengths that lie, texts that are none."""
    header = len(text).to_bytes(8, "little") + text if fits else text
    with pytest.raises(CheckpointCorruptError):
        _bounded(lambda: _read(tmp_path, header, b"", _tensor(2)))


@_repeatable
@given(st.data())
def test_a_header_with_anything_else_in_it_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Offsets outside of the file, negative, overlapping; shapes, kinds and names that are not the manifest's."""
    entries: dict[str, Any] = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    place = data.draw(st.sampled_from(_places(entries)))
    how = data.draw(st.sampled_from(["replace", "remove", "rename"]))
    changed = _changed(entries, place, how, data.draw(_values))
    text = json.dumps(changed).encode()
    header = len(text).to_bytes(8, "little") + text
    content = bytes(range(24))
    if changed == entries:
        _read(tmp_path, header, content, _tensor(2, 3))
        return
    with pytest.raises(CheckpointCorruptError):
        _bounded(lambda: _read(tmp_path, header, content, _tensor(2, 3)))


@pytest.mark.parametrize("text", [b"[" * 200_000, b'{"a":' * 200_000, b'{"a":' + b"9" * 200_000 + b"}"])
def test_json_that_is_deep_or_long_is_refused(text: bytes, tmp_path: Path) -> None:
    """Deep nesting overflows the stack of a parser, long numbers take it quadratic time."""
    with pytest.raises(CheckpointCorruptError):
        Manifest.from_bytes(text)
    with pytest.raises(CheckpointCorruptError):
        _read(tmp_path, len(text).to_bytes(8, "little") + text, b"", _tensor(2))


def test_the_checkpoint_itself_is_fine(saved: Path) -> None:
    """Else all the tests above would pass for the wrong reason."""
    verify_checkpoint(saved)
