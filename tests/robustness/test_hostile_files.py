"""Files that somebody made to hang a reader, to take its memory, or to be read as what they are not."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_ema import ShardedEMA, merge, read_checkpoint, verify_checkpoint
from dist_ema.cli import main
from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats.manifest import NAME, Manifest, _seal, checksum
from dist_ema.importers.convert import import_checkpoint

#: Seconds, and bytes besides the file's own, that a refusal may take on a machine that is busy.
SECONDS, MEMORY = 5.0, 64 << 20
FLOAT = {"dtype": "F32", "digest": "0" * 16, "aliases": []}


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The manifest of a small checkpoint with an average and a frozen layer."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    ema = ShardedEMA(model, half_life="100tok")
    for _ in range(3):
        ema.update(samples=2, tokens=8, epochs=0.25)
    path = tmp_path_factory.mktemp("hostile") / "saved"
    ema.save(path)
    found = json.loads((path / NAME).read_bytes())
    del found["checksum"]
    return found


@contextmanager
def quick() -> Iterator[None]:
    begin = time.perf_counter()
    yield
    assert time.perf_counter() - begin < SECONDS


@contextmanager
def frugal(more: int = 0, seconds: float = SECONDS) -> Iterator[None]:
    """Measures what this process has in memory at most, over what it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = _memory("VmRSS"), time.process_time()
    yield
    took, grown = time.process_time() - begin, _memory("VmHWM") - before
    assert took < seconds and grown < MEMORY + more, f"{took:.1f} s, {grown >> 20} MiB"


def _memory(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{entry}:"))


def forge(path: Path, body: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    (path / NAME).write_bytes(_seal(body))
    return path


def one_line(text: str) -> bool:
    return text.startswith("dist-ema: ") and text.count("\n") == 1 and len(text) < 1500


def _at(*place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(body: dict[str, Any]) -> None:
        inner = body
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value

    return edit


def _shape(value: Any) -> Callable[[dict[str, Any]], None]:
    return _at("averages", "ema", "tensors", "0.weight", "shape", value=value)


def _schedule(**value: Any) -> Callable[[dict[str, Any]], None]:
    return _at("averages", "ema", "schedule", value=value)


EDITS = {
    "200,000 sizes": _shape([1] * 200_000),
    "65 sizes": _shape([1] * 65),
    "a product beyond 2**62": _shape([1 << 40, 1 << 40]),
    "strides beyond 2**63": _shape([0, 1 << 40, 1 << 40]),
    "a size of 300 digits": _shape([10**300]),
    "a size that is a bool": _shape([True, 4]),
    "a size that is a float": _shape([3.0, 4]),
    "a shape that is an object": _shape({"3": 4}),
    "skipped infinite": _at("skipped", value=float("inf")),
    "skipped not a number": _at("skipped", value=float("nan")),
    "skipped of 4001 digits": _at("skipped", value=10**4000),
    "skipped a bool": _at("skipped", value=True),
    "a clock of 401 digits": _at("clock", "batches", value=10**400),
    "epochs of 401 digits": _at("clock", "epochs", value=10**400),
    "epochs infinite": _at("clock", "epochs", value=float("inf")),
    "epochs a bool": _at("clock", "epochs", value=True),
    "batches a bool": _at("clock", "batches", value=True),
    "seen after the clock": _at("seen", "batches", value=4),
    "start after the clock": _at("start", "tokens", value=25),
    "seen and start after the clock": _at("seen", "samples", value=5),
    "a version that is true": _at("version", value=True),
    "a version of 1.0": _at("version", value=1.0),
    "started that is 5": _at("started", value=5),
    "a seed that is a bool": _at("seed", value=True),
    "a library of lines": _at("library", value="1\n2"),
    "a decay of 400 digits": _schedule(kind="ConstantDecay", decay=10**400),
    "a decay of 1": _schedule(kind="ConstantDecay", decay=1.0),
    "a half life of 9,000 digits": _schedule(kind="HalfLife", half_life="9" * 9000 + "ba"),
    "a half life with a silly exponent": _schedule(kind="HalfLife", half_life="1e-999999ep"),
    "a warm-up that never ends": _schedule(kind="Warmup", decay=0.9, inv_gamma=float("inf")),
    "a schedule of lists": _schedule(kind="ConstantDecay", decay=[[[[1]]]]),
    "an average with a path in its name": lambda body: body["averages"].update(
        {"../x": {"schedule": {"kind": "Uniform"}, "tensors": {}}}
    ),
    "a file of 2**70 bytes": _at("files", "live/model.safetensors", "size", value=1 << 70),
    "more tensors than a file has room for": lambda body: body["live"].update(
        {f"x{i}": FLOAT | {"file": "live/model.safetensors", "shape": [80]} for i in range(2)}
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_manifest_that_cannot_be_is_refused_by_every_reader(
    body: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[dict[str, Any]], None]
) -> None:
    """Its checksum fits, so all in it is somebody's choice; a bound that is missing is a hang or a traceback."""
    changed = json.loads(json.dumps(body))
    edit(changed)
    path = forge(tmp_path / "forged", changed)
    with quick():
        for read in (verify_checkpoint, read_checkpoint, ShardedEMA(nn.Linear(4, 3)).load):
            with pytest.raises(CheckpointCorruptError) as caught:
                read(path)
            assert len(str(caught.value)) < 1500
        for command in (["inspect", path], ["verify", path], ["export", path, tmp_path / "out"], ["diff", path, path]):
            assert main([str(part) for part in command]) == 1
            out, err = capsys.readouterr()
            assert (out != "" and err == "") if command[0] == "verify" else (out == "" and one_line(err)), err


@pytest.mark.parametrize("key", ['"skipped":0', '"samples":6'])
def test_a_key_that_comes_twice_is_refused(body: dict[str, Any], key: str) -> None:
    """One reader takes the first and the next takes the last."""
    text = _seal(body).decode()
    assert key in text
    plain = text.replace(key, f"{key},{key}", 1)[: -len('"checksum":""}\n') - 65] + "}"
    with pytest.raises(CheckpointCorruptError, match="twice"):
        Manifest.from_bytes(_seal(json.loads(plain))[:-2] + b"," + key.encode() + b"," + key.encode() + b"}\n")


def test_the_bounds_take_what_is_large_but_right(body: dict[str, Any]) -> None:
    """Sixty-four sizes, an empty tensor, a clock of 2**61 tokens, ten thousand tensors."""
    changed = json.loads(json.dumps(body))
    del changed["frozen"]  # names of tensors that this test replaces
    for clock in ("clock", "seen"):
        changed[clock]["tokens"] = 1 << 61
    changed["start"]["tokens"] = 0
    changed["files"]["live/model.safetensors"]["size"] = 1 << 40
    entry = FLOAT | {"file": "live/model.safetensors"}
    changed["live"] = {"a": entry | {"shape": [1] * 64}, "b": entry | {"shape": [0, 1 << 40]}}
    changed["live"] |= {f"layers.{i}.mlp.experts.weight": entry | {"shape": [7, 2048]} for i in range(10_000)}
    assert len(Manifest.from_bytes(_seal(changed)).live) == 10_002


@pytest.mark.parametrize("frozen", ["1.bias", [3], ["0.bias"], ["none"], {"1.bias": 1}, ["1.bias", "1.bias"]])
def test_a_wrong_list_of_what_was_frozen_is_refused(body: dict[str, Any], frozen: object) -> None:
    """An average would begin with another tensor's value, or the reader would fail on a name that is not there."""
    assert body["frozen"] == ["1.weight", "1.bias"]
    with pytest.raises(CheckpointCorruptError, match="invalid 'frozen'"):
        Manifest.from_bytes(_seal({**body, "frozen": frozen}))


BOMBS = {
    "lists": b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
    "one list": b'{"a":[' + b"1," * 5_000_000 + b"1]}",
    "depth": b'{"a":' + b"[" * 15_000_000,
    "quotes": b'"' * 15_000_000,
    "escapes": b'"' + b'\\"' * 7_000_000,
    "digits": b'{"a":' + b"1" * 15_000_000 + b"}",
    "too long": b" " * (1 << 27),
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("place", ["manifest", "header", "config"])
def test_json_of_many_small_things_takes_neither_time_nor_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, place: str
) -> None:
    """The text itself and some copies of it, and not an object for every two of its bytes."""
    path = tmp_path / "file"
    path.mkdir()
    if place == "manifest":
        (path / NAME).write_bytes(BOMBS[kind])
        arguments = ["verify", str(path)]
    elif place == "header":
        data = BOMBS[kind][: 99 << 20]
        (path / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
        arguments = ["import", str(path), str(tmp_path / "out")]
    else:
        (path / "config.json").write_bytes(BOMBS[kind])
        arguments = ["plan", str(path)]
    with frugal(5 * len(BOMBS[kind])):
        status = main(arguments)
    _, err = capsys.readouterr()
    assert status in (1, 2) and (err == "" or one_line(err)), err


# What is no plain file.


@pytest.fixture(params=["pipe", "socket", "device", "loop"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], None]:
    """Puts something at a path that is no file, and that a plain ``open()`` may wait for."""

    def make(path: Path) -> None:
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "socket":
            here = Path.cwd()
            os.chdir(path.parent)  # its path may have 107 bytes
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(path.name)
            os.chdir(here)
        else:
            path.symlink_to("/dev/zero" if request.param == "device" else path.name)

    return make


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("c", ["verify", "c"]),
        ("ema.json", ["verify", "."]),
        ("ema.json", ["inspect", "."]),
        ("a.pt", ["import", "a.pt", "out"]),
        ("config.json", ["import", ".", "out"]),
        ("m.safetensors", ["import", ".", "out"]),
        (".metadata", ["import", ".", "out"]),
        ("m.pt", ["import", "good.pt", "out", "--model", "m.pt"]),
        ("m.safetensors", ["import", "good.pt", "out", "--model", "m.safetensors"]),
        ("m.safetensors", ["import", "good.pt", "out", "--model", "."]),
        ("config.json", ["plan", "."]),
        ("c.json", ["plan", "c.json"]),
    ],
    ids=str,
)
def test_no_reader_waits_for_a_pipe(
    odd: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    command: list[str],
) -> None:
    """``open()`` of one waits until somebody writes into it, and of /dev/zero there is no end."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict_ema": {"a": torch.ones(2)}}, "good.pt")
    odd(tmp_path / name)
    with quick():
        status = main(command)
    out, err = capsys.readouterr()
    assert status in (1, 2) and one_line(err or f"dist-ema: {out}"), (status, out, err)
    assert not (tmp_path / "out").exists()


# Archives.


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(50, 40), "b": torch.randn(7), "c": torch.arange(9), "empty": torch.empty(0, 3)}


def repack(path: Path, target: Path, method: int, edit: Callable[[bytes], bytes] = bytes) -> Path:
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", method) as packed:
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
    target.write_bytes(edit(target.read_bytes()))
    return target


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    torch.save({"state_dict_ema": tensors()}, tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_file_is_refused_and_not_read_as_garbage(
    plain: Path, tmp_path: Path, method: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mapped, the bytes of a deflated member are its weights: nothing else in the file says that they are not."""
    path = repack(plain, tmp_path / "packed.pt", method)
    assert main(["import", str(path), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "compressed" in err and "zip -0" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_packed_again_without_compression_is_read_bit_for_bit(plain: Path, tmp_path: Path, legacy: bool) -> None:
    """Its tensors lie where no element is aligned. So do those of the format before zip files."""
    if legacy:
        torch.save({"state_dict_ema": tensors()}, plain, _use_new_zipfile_serialization=False)
        path = plain
    else:
        path = repack(plain, tmp_path / "stored.pt", zipfile.ZIP_STORED)
    import_checkpoint(path, tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        assert torch.equal(found[name], value)


def _field(signature: bytes, offset: int, value: bytes, which: str = "data/0") -> Callable[[bytes], bytes]:
    """Changes a field of the header of one member: in the directory, or before its data."""

    def edit(data: bytes) -> bytes:
        place = -1
        while (place := data.find(signature, place + 1)) >= 0:
            name = data[place + (46 if signature == b"PK\1\2" else 30) :][:60]
            if which.encode() in name.split(b"PK")[0]:
                return data[: place + offset] + value + data[place + offset + len(value) :]
        raise LookupError

    return edit


CENTRAL, LOCAL = b"PK\1\2", b"PK\3\4"
ARCHIVES = {
    "encrypted in the directory": _field(CENTRAL, 8, b"\1\0"),
    "encrypted in the header": _field(LOCAL, 6, b"\1\0"),
    "deflated in the directory": _field(CENTRAL, 10, b"\x08\0"),
    "deflated in the header": _field(LOCAL, 8, b"\x08\0"),
    "larger in the directory": _field(CENTRAL, 20, struct.pack("<II", 9000, 9000)),
    "larger in the header": _field(LOCAL, 18, struct.pack("<II", 9000, 9000)),
    "elsewhere": _field(CENTRAL, 42, struct.pack("<I", 7)),
    "another name in the header": _field(LOCAL, 30, b"xx"),
    "beyond the file": _field(CENTRAL, 42, struct.pack("<I", 0x7FFFFFFF)),
    "no end": lambda data: data[:-30],
    "a million members": lambda data: data[:-14] + b"\xff\xff\xff\xff" + data[-10:],
}


@pytest.mark.parametrize("edit", ARCHIVES.values(), ids=ARCHIVES.keys())
def test_an_archive_that_contradicts_itself_is_refused(
    plain: Path, tmp_path: Path, edit: Callable[[bytes], bytes]
) -> None:
    """torch takes sizes from the directory, and places from the headers."""
    path = repack(plain, tmp_path / "edited.pt", zipfile.ZIP_STORED, edit)
    with quick(), pytest.raises(CheckpointError):
        import_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bomb_is_refused_by_what_its_directory_says(tmp_path: Path) -> None:
    """A member of some hundred kilobytes that inflates to 128 megabytes."""
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("bomb/data.pkl", bytes(1 << 27))
    with frugal(), pytest.raises(CheckpointError, match="compressed"):
        import_checkpoint(tmp_path / "bomb.pt", tmp_path / "out")


# Pickles.


class Claim:
    """Pickled as a tensor of a storage with other numbers than the file has."""

    def __init__(self, key: str, numel: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
        self.storage = ("storage", torch.FloatStorage, key, "cpu", numel)
        self.shape, self.stride, self.offset = shape, stride, offset

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (Stored(self.storage), self.offset, self.shape, self.stride, False, {})
        return torch._utils._rebuild_tensor_v2, arguments


class Stored:
    def __init__(self, pid: tuple[Any, ...]) -> None:
        self.pid = pid


class Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> Any:
        return value.pid if isinstance(value, Stored) else None


def archive(path: Path, content: object, storages: dict[str, bytes], protocol: int = 2) -> Path:
    text = io.BytesIO()
    if isinstance(content, bytes):
        text.write(content)
    else:
        Pickler(text, protocol=protocol).dump(content)
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("a/data.pkl", text.getvalue())
        packed.writestr("a/version", "3\n")
        for key, data in storages.items():
            packed.writestr(f"a/data/{key}", data)
    return path


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        (Claim("0", 4, (4,), (1,)), None),
        (Claim("0", 400, (400,), (1,)), "claims"),
        (Claim("0", 1 << 40, (4,), (1,)), "claims"),
        (Claim("0", 4, (400,), (1,)), "more elements"),
        (Claim("0", 4, (4,), (2,)), "more elements"),
        (Claim("0", 4, (4,), (1,), 1), "more elements"),
        (Claim("0", 4, (4,), (1,), -4), "invalid shape, strides or offset"),
        (Claim("0", 4, (4,), (-1,)), "invalid shape, strides or offset"),
        (Claim("0", 4, (1 << 40, 1 << 40), (0, 0)), "invalid shape, strides or offset"),
        (Claim("0", 4, (1,) * 65, (1,) * 65), "invalid shape, strides or offset"),
        (Claim("0", 4, (1 << 40,), (0,)), "more than the file holds"),
        (Claim("1", 4, (4,), (1,)), "claims"),
        (Claim("0", -4, (4,), (1,)), "invalid size"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4], ids=["torch.load", "mapped"])
def test_a_tensor_gets_no_bytes_but_those_of_its_own_member(
    tmp_path: Path, protocol: int, claim: Claim, why: str | None
) -> None:
    """torch.load maps what lies behind the member, or makes room for what is claimed."""
    data = torch.arange(4.0)
    path = archive(tmp_path / "a.pt", {"state_dict_ema": {"x": claim}}, {"0": data.numpy().tobytes()}, protocol)
    if why is None:
        import_checkpoint(path, tmp_path / "out")
        assert torch.equal(read_checkpoint(tmp_path / "out")["x"], data)
        return
    with pytest.raises(CheckpointCorruptError, match=why):
        import_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _nested(levels: int) -> bytes:
    """A tuple of twice a tuple of twice ... as the key of a dict: its hash visits 2**levels of them."""
    return b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * levels + b"Ns."


@pytest.mark.parametrize(
    "content",
    [
        _nested(60),
        b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 31) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 31) + b".",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 31) + b"N.",
        b"\x80\x04\x8f(" + b")" + b"q\x00h\x00\x86" * 60 + b"\x90.",
        b"\x80\x04(" + b")" + b"q\x00h\x00\x86" * 60 + b"\x91.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.",
        b"\x80\x02" + b"(" * 1000 + b".",
        b"N" * (1 << 21),
    ],
    ids=lambda content: repr(content[:24]),
)
@pytest.mark.parametrize("place", ["zip", "legacy", "metadata"])
def test_a_pickle_of_a_few_bytes_takes_neither_memory_nor_time(tmp_path: Path, content: bytes, place: str) -> None:
    if place == "zip":
        path = archive(tmp_path / "a.pt", content, {})
    elif place == "legacy":
        path = tmp_path / "a.pt"
        path.write_bytes(b"".join(pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {})) + content)
    else:
        (tmp_path / "dcp").mkdir()
        path = tmp_path / "dcp"
        (path / ".metadata").write_bytes(content)
    with frugal(4 * len(content), 4 * SECONDS), pytest.raises(CheckpointError):
        import_checkpoint(path, tmp_path / "out")


def test_a_header_of_safetensors_that_cannot_be_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "good.safetensors")
    for shape, offsets in (([1] * 200_000, [0, 4]), ([1 << 40, 1 << 40], [0, 4]), ([1], [0, 1 << 40]), ([1], [4, 0])):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with quick(), pytest.raises(CheckpointCorruptError):
            import_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", True),
        ("started", 5),
        ("skipped", 10**100),
        ("seed", True),
        ("clock", {"batches": 10**400, "samples": 0, "tokens": 0, "epochs": 0.0, "updates": 0}),
        ("clock", {"batches": 3, "samples": 0, "tokens": 0, "epochs": 10**400, "updates": 0}),
        ("seen", {"batches": 9, "samples": 0, "tokens": 0, "epochs": 0.0, "updates": 1}),
    ],
)
def test_the_text_in_a_state_dict_is_read_as_strictly(key: str, value: object) -> None:
    """It comes out of a checkpoint of torch.distributed.checkpoint, which anybody may have written."""
    ema = ShardedEMA(nn.Linear(2, 2), decay=0.5)
    ema.update()
    state = ema.state_dict()
    body = json.loads(bytes(state["progress"].tolist())) | {key: value}
    state["progress"] = torch.frombuffer(bytearray(json.dumps(body).encode().ljust(2048)), dtype=torch.uint8)
    with pytest.raises(CheckpointCorruptError):
        ema.load_state_dict(state)
    assert ema.num_updates == 1


#: Where two tensors of four bytes each lie, and how many bytes follow the header. The format allows the first alone.
PLACES = {
    "one after the other": ([0, 4], [4, 8], 8),
    "on the same bytes": ([0, 4], [0, 4], 4),
    "partly on the same bytes": ([0, 4], [2, 6], 6),
    "with a hole": ([0, 4], [8, 12], 12),
    "with a hole before": ([4, 8], [8, 12], 12),
    "with bytes behind": ([0, 4], [4, 8], 9),
    "beyond the end": ([0, 4], [4, 8], 7),
    "in fewer bytes than it needs": ([0, 4], [4, 6], 6),
}


@pytest.mark.parametrize("reader", ["import", "model", "merge", "load"])
@pytest.mark.parametrize("places", PLACES)
def test_every_reader_of_safetensors_refuses_overlaps_and_holes(tmp_path: Path, reader: str, places: str) -> None:
    """300 tensors on one MiB of bytes are 300 MiB when they are written out; and no checksum covers what is between."""
    first, second, size = PLACES[places]
    entry = {"dtype": "F32", "shape": [1]}
    header = json.dumps({"a": entry | {"data_offsets": first}, "b": entry | {"data_offsets": second}}).encode()
    text = struct.pack("<Q", len(header)) + header
    target = tmp_path / "model"
    if reader == "load":  # a checkpoint of ours whose checksums are right
        model = nn.ParameterDict({name: torch.ones(1) for name in "ab"})
        ema = ShardedEMA(model, decay=0.5)
        ema.update()
        ema.save(target)
        (file,) = target.rglob("*.safetensors")
        body = json.loads((target / NAME).read_bytes())
        del body["checksum"]
        body["files"][f"{file.parent.relative_to(target / body['data'])}/{file.name}"] = {
            "size": len(text) + size,
            "header": checksum(text),
        }
        file.write_bytes(text + bytes(size))
        forge(target, body)
    else:
        target.mkdir()
        (target / "model.safetensors").write_bytes(text + bytes(size))
    uses: dict[str, Callable[[], object]] = {
        "import": lambda: import_checkpoint(target, tmp_path / "out", format="state-dict"),
        "model": lambda: import_checkpoint(
            tmp_path / "ema.pt", tmp_path / "out", format="state-dict", model=target / "model.safetensors"
        ),
        "merge": lambda: merge([target, target], tmp_path / "out"),
        "load": lambda: ShardedEMA(nn.ParameterDict({name: torch.ones(1) for name in "ab"}), decay=0.5).load(
            target, strict=False
        ),
    }
    torch.save({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "ema.pt")
    if places == "one after the other":
        if reader != "load":  # whose fingerprints are those of other bytes
            uses[reader]()
        return
    with pytest.raises(CheckpointCorruptError):
        uses[reader]()
    assert not (tmp_path / "out").exists()
