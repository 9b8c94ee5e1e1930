"""Reads and writes ``ema.json``, the manifest: it lists everything in a checkpoint, and makes a directory a checkpoint.

A checkpoint may come from anyone, so every value is checked before it is used, and a reader opens only the files that
the manifest lists. The text is canonical JSON that ends with a checksum of the rest, so a flipped bit in it is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TypeAlias

from dist_ema import __version__
from dist_ema.errors import CheckpointCorruptError, CheckpointError, EMAConfigError, EMAError
from dist_ema.formats.state_json import state_from_json, state_to_json
from dist_ema.formats.stored import StoredFile, StoredTensor, is_tensor_name, tensors_from_json, tensors_to_json
from dist_ema.formats.strict_json import is_count, parse, shown
from dist_ema.schedules import Schedule, from_file
from dist_ema.schedules.checks import AVERAGE_NAME
from dist_ema.schedules.clock import Progress
from dist_ema.schedules.state import EMAState

#: Folder of a tensor in the data folder, and its name.
Key: TypeAlias = "tuple[str, str]"
NAME = "ema.json"
FORMAT = "dist_ema"
VERSION = 1
#: How every manifest begins, whatever its version.
BEGIN = b'{"format":"dist_ema",'
#: Bytes of a manifest at most. It has some hundred bytes a tensor: 30 MB for two averages of the largest models.
MAX_BYTES = 1 << 26
#: The folder of the tensors that are not averaged, beside the folders of the averages.
LIVE = "live"
#: Names of data folders.
DATA = re.compile(r"data-[0-9a-f]{32}")
#: Characters at most of the part of an error that quotes the file.
_SHOWN = 500
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(rf"(averages/{AVERAGE_NAME.pattern}|{LIVE})/model(-\d{{5}}-of-\d{{5}})?\.safetensors")
#: Levels of JSON: the manifest, its averages, one of them, its tensors, one of them, its shape.
_DEPTH = 6
_FIELDS = {"format", "version", "library", "data", "started", "clock", "start", "seen", "skipped", "averages", "live"}
_FIELDS |= {"files", "seed", "lacking", "frozen"}


@dataclass(frozen=True, repr=False)
class Manifest:
    """Describes a whole checkpoint: what ``dist_ema.verify_checkpoint()`` returns. Its ``repr()`` is one line.

    Attributes:
        data: name of the data folder, which holds the files.
        state: the clocks, and whether there was an average yet; if not, its tensors are those of the live model.
        schedules: the schedule of each average; ``schedules.UnknownSchedule`` for a kind that is not registered here.
        averages: the tensors of each average.
        live: tensors that are not averaged.
        files: every file, by its path in the data folder.
        library: version of the library that wrote it.
        lacking: names of the tensors that the model has and the checkpoint does not: it was saved without frozen
            parameters and others that are not averaged. Empty, and not written, for a whole model.
        frozen: names of the parameters among ``live`` that were frozen. Their stored value is what an average of them
            would be, so ``load`` begins with it if they are trained now. The others were excluded. Not written if it is
            empty, as in files of versions that did not have it; these versions refuse a file that has it.
    """

    data: str
    state: EMAState
    schedules: Mapping[str, Schedule]
    averages: Mapping[str, Mapping[str, StoredTensor]]
    live: Mapping[str, StoredTensor]
    files: Mapping[str, StoredFile]
    library: str = __version__
    lacking: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __repr__(self) -> str:
        averages = ", ".join(f"{name!r}: {schedule!r}" for name, schedule in self.schedules.items())
        tensors = sum(len(tensors) for tensors in self.folders().values())
        size = sum(file.size for file in self.files.values())
        return (
            f"<Manifest: {{{averages}}}; updates={self.seen.updates}, clock {self.clock}; {tensors:,} tensors in "
            f"{len(self.files):,} file{'' if len(self.files) == 1 else 's'}, {size:,} bytes>"
        )

    def to_bytes(self) -> bytes:
        """Returns the text of ``ema.json``. Raises CheckpointError if it is longer than ``from_bytes`` takes."""
        state = state_to_json(self.state)
        seed = state.pop("seed")
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "library": self.library,
            "data": self.data,
            **state,
            "averages": {
                name: {"schedule": self.schedules[name].to_dict(), "tensors": tensors_to_json(tensors)}
                for name, tensors in self.averages.items()
            },
            "live": tensors_to_json(self.live),
            "files": {name: asdict(file) for name, file in self.files.items()},
        }
        body |= {} if seed is None else {"seed": seed}
        body |= {"frozen": list(self.frozen)} if self.frozen else {}
        text = _seal(body | ({"lacking": list(self.lacking)} if self.lacking else {}))
        if len(text) > MAX_BYTES:
            raise CheckpointError(
                f"{NAME} of {sum(map(len, self.averages.values())) + len(self.live)} tensors would have {len(text)} "
                f"bytes; the limit is {MAX_BYTES}. Save fewer averages in one checkpoint"
            )
        return text

    @classmethod
    def from_bytes(cls, text: bytes) -> Manifest:
        """Reads ``ema.json``. Raises CheckpointCorruptError for anything that ``to_bytes`` does not write."""
        body = _unseal(text)
        try:
            return cls._from_body(body)
        except CheckpointCorruptError:
            raise
        except (ValueError, EMAError) as error:
            _refuse(str(error))
        except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
            _refuse(f"not a manifest of this library: {type(error).__name__}: {error}")

    @classmethod
    def _from_body(cls, body: dict[str, Any]) -> Manifest:
        if unknown := body.keys() - _FIELDS:
            _refuse(f"unknown entries {sorted(unknown)[:3]}")
        if body.get("seed", 0) is None:  # to_bytes() leaves it out
            _refuse("invalid seed=None; expected a whole number, or no such entry")
        library = body["library"]
        if not isinstance(library, str) or len(library) > 100 or not library.isprintable():
            _refuse(f"invalid library version {shown(library)}")
        files = {}
        for name, file in body["files"].items():
            known = file.keys() == {"size", "header"} and _FILE.fullmatch(name)
            if not known or not is_count(file["size"]) or not _CHECKSUM.fullmatch(file["header"]):
                _refuse(f"invalid file {shown(name)}; expected a path like {LIVE}/model.safetensors, size and checksum")
            files[name] = StoredFile(file["size"], file["header"])
        if not DATA.fullmatch(body["data"]):
            _refuse(f"invalid data folder name {shown(body['data'])}; expected data-<32 hex digits>")
        averages = body["averages"]
        for name, average in averages.items():
            if not AVERAGE_NAME.fullmatch(name) or average.keys() != {"schedule", "tensors"}:
                _refuse(f"invalid average {shown(name)}; expected a name of A-Z a-z 0-9 _ . -, schedule and tensors")
        manifest = cls(
            data=body["data"],
            state=state_from_json(body),
            schedules={name: from_file(average["schedule"]) for name, average in averages.items()},
            averages={
                name: tensors_from_json(average["tensors"], f"averages/{name}", files)
                for name, average in averages.items()
            },
            live=tensors_from_json(body["live"], LIVE, files),
            files=files,
            library=library,
            lacking=_read_lacking(body.get("lacking", []), averages),
            frozen=_read_frozen(body.get("frozen", []), body["live"]),
        )
        _check_room(manifest)
        return manifest

    @property
    def started(self) -> bool:
        """Returns whether there was an average yet; if not, its tensors are those of the live model."""
        return self.state.started

    @property
    def clock(self) -> Progress:
        """Returns the training clock."""
        return self.state.training

    @property
    def start(self) -> Progress:
        """Returns the training clock at the first copy."""
        return self.state.first_copy

    @property
    def seen(self) -> Progress:
        """Returns the training progress from the first copy to the last update."""
        return self.state.averaged

    @property
    def skipped(self) -> int:
        """Returns the number of NaN and Inf elements left out so far, over all ranks."""
        return self.state.skipped

    @property
    def seed(self) -> int | None:
        """Returns the seed of stochastic rounding; None if averages are rounded to nearest."""
        return self.state.seed

    def tensors(self, average: str | None = None) -> dict[Key, StoredTensor]:
        """Returns every tensor by folder and name; with an ``average``, its tensors and those that are not averaged."""
        return {
            (folder, name): tensor
            for folder, tensors in self.folders().items()
            for name, tensor in tensors.items()
            if average is None or folder in (LIVE, f"averages/{average}")
        }

    def choose(self, name: str | None) -> str:
        """Returns the name of the average that is selected; None selects the only one. Raises EMAConfigError if there
        is none.
        """
        names = tuple(self.averages)
        if name is None and len(names) == 1:
            return names[0]
        if name is None or name not in names:
            raise EMAConfigError(f"name={name!r}: the checkpoint has {', '.join(map(repr, names))}")
        return name

    def folders(self) -> dict[str, Mapping[str, StoredTensor]]:
        """Returns the tensors of every folder, by its path in the data folder."""
        folders = {f"averages/{name}": tensors for name, tensors in self.averages.items()}
        return folders | ({LIVE: self.live} if self.live else {})


def checksum(data: bytes) -> str:
    """Returns the checksum of a header or a manifest, as 64 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def _seal(body: dict[str, Any]) -> bytes:
    """Returns canonical JSON with the checksum of the rest as its last entry."""
    # One way to write a body, so that a reader can write it again and compare: see _unseal().
    plain = json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode()
    return plain[:-1] + f',"checksum":"{checksum(plain)}"}}\n'.encode()


def _unseal(text: bytes) -> dict[str, Any]:
    if len(text) > MAX_BYTES:
        _refuse(f"it has {len(text)} bytes; the limit is {MAX_BYTES}")
    try:
        body = parse(text, depth=_DEPTH)
    except ValueError as error:
        raise CheckpointCorruptError(f"{NAME}: invalid JSON: {str(error)[:_SHOWN]}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        _refuse("it was not written by dist_ema, or is damaged")
    # The version comes before the checksum: a later version may have another.
    version = body.get("version")
    if not is_count(version):
        _refuse(f"invalid format version {shown(version)}")
    if version != VERSION:
        raise CheckpointError(f"{NAME}: format version {version}; this library reads version {VERSION}")
    # Stricter than to compare checksums: the text has to be, byte for byte, what this library writes of the body.
    body.pop("checksum", None)
    if _seal(body) != text:
        _refuse("its checksum does not match: it is damaged, or was edited")
    return body


def _read_lacking(names: object, averages: Mapping[str, Any]) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) and is_tensor_name(name) for name in names):
        _refuse("invalid 'lacking'; expected a list of tensor names")
    there = {name for average in averages.values() for name in average["tensors"]}
    if "" in names or len(set(names)) < len(names) or not there.isdisjoint(names):
        _refuse("invalid 'lacking': a name is empty, stands there twice, or is that of a tensor that is there")
    return tuple(names)


def _read_frozen(names: object, live: Mapping[str, Any]) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name in live for name in names):
        _refuse("invalid 'frozen'; expected a list of names of tensors that are not averaged")
    if len(set(names)) < len(names):
        _refuse("invalid 'frozen': a name stands there twice")
    return tuple(names)


def _check_room(manifest: Manifest) -> None:
    """Raises an error for a file that lists no tensors, or that is too small for those that it lists."""
    room = {name: file.size for name, file in manifest.files.items()}
    used = set()
    for tensors in manifest.folders().values():
        for name, tensor in tensors.items():
            used.add(tensor.file)
            room[tensor.file] -= tensor.nbytes
            if room[tensor.file] < 0:
                _refuse(f"tensor {shown(name)} and those before it do not fit into their file {tensor.file}")
    if used != room.keys():
        _refuse(f"files without tensors: {sorted(room.keys() - used)[:3]}")


def _refuse(why: str) -> NoReturn:
    raise CheckpointCorruptError(f"{NAME}: {why[:_SHOWN]}")
