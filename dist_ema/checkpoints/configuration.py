"""Writes configuration files beside exported weights: the model's own, or those that the user names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dist_ema.checkpoints.hub import has_config, write_adapter_config, write_config
from dist_ema.engines.names import unwrapped
from dist_ema.errors import EMAConfigError
from dist_ema.formats.strict_json import parse
from dist_ema.storage.local import copy_file, open_plain, write_text

#: Maximum bytes of a configuration, and maximum depth of its JSON.
_CONFIG_BYTES = 1 << 24
_CONFIG_DEPTH = 32
#: Values of ``dtype`` in a configuration that stand for the dtype of the weights.
_FLOATING = {"float64", "float32", "float16", "bfloat16"}
#: Endings of the files that are copied from a directory. Weights are not copied.
CONFIG_SUFFIXES = {".json", ".txt", ".model", ".jinja"}


@dataclass(frozen=True)
class Configuration:
    """Writes the files that an export has beside the weights. One rank.

    Attributes:
        model: the model of the weights, without wrappers; None if it is not known.
        layout: the layout of the export.
        dtype: the dtype of the weights.
        directory: the directory to write to.
        cast: the dtype to which the weights were converted; None if each tensor has its own.
    """

    model: nn.Module | None
    layout: str | None
    dtype: torch.dtype | None
    directory: Path
    cast: torch.dtype | None = None

    def write(self, config_from: object) -> None:
        """Writes all that ``config_from`` names; None means the model's own configuration.

        If the weights were converted, ``config.json`` says so: readers take their dtype from it.

        Raises EMAConfigError, OSError.
        """
        self._write_all(config_from)
        if self.cast is not None:
            _set_dtype(self.directory / "config.json", self.cast)

    def _write_all(self, config_from: object) -> None:
        if self.layout == "peft" and self.model is not None:
            write_adapter_config(self.model, self.directory)
        if config_from is None:
            if self.layout != "peft" and self.model is not None and has_config(self.model):
                write_config(self.model, self.directory, self.dtype)
            return
        for source in config_from if isinstance(config_from, (list, tuple)) else [config_from]:
            self._write_one(source)

    def _write_one(self, source: object) -> None:
        own = getattr(self.model, "config", None)
        if self.model is not None and own is not None and source is own and has_config(self.model):
            write_config(self.model, self.directory, self.dtype)
        elif isinstance(source, nn.Module) and has_config(unwrapped(source)):
            write_config(unwrapped(source), self.directory, self.dtype)
        elif hasattr(source, "save_pretrained") and not isinstance(source, nn.Module):
            source.save_pretrained(str(self.directory))
        elif isinstance(source, (str, os.PathLike)) and os.fspath(source):  # Path("") would be the current directory
            self._copy(Path(source))
        else:
            raise EMAConfigError(
                f"config_from={source!r:.200}: allowed is a file, a directory, or an object with save_pretrained, such "
                "as a transformers config or tokenizer; or a model that has such a config, or a list of these"
            )

    def _copy(self, source: Path) -> None:
        if source.is_file():
            files = [source]
        elif source.is_dir():
            files = [file for file in sorted(source.iterdir()) if file.is_file() and file.suffix in CONFIG_SUFFIXES]
            files = [file for file in files if not file.name.endswith(".index.json")]
        else:
            raise EMAConfigError(f"config_from={str(source)!r}: there is no such file or directory")
        for file in files:
            if (self.directory / file.name).exists():
                raise EMAConfigError(f"config_from={str(file)!r}: the export writes a file of this name itself")
            copy_file(file, self.directory / file.name)


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Changes the dtype that a ``config.json`` states. A file that states none, or is no JSON, is left as it is."""
    try:
        with open_plain(path) as file:
            config = parse(file.read(_CONFIG_BYTES), depth=_CONFIG_DEPTH)
    except (OSError, ValueError):  # there is none, or it is a file of the user that is no JSON
        return
    if _restated(config, str(dtype).removeprefix("torch.")):
        write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _restated(config: object, dtype: str) -> bool:
    """Replaces the dtypes that a configuration, and the configurations in it (``text_config``), state.

    transformers 5 calls the entry ``dtype``, earlier versions ``torch_dtype``. Returns whether anything changed.
    """
    if not isinstance(config, dict):
        return False
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and str(value).removeprefix("torch.") in _FLOATING and value != dtype:
            config[key] = dtype
            changed = True
        elif key != "quantization_config":  # its entries are not about the weights in the files
            changed |= _restated(value, dtype)
    return changed


def is_transformers_config(config_from: object) -> bool:
    """Returns whether ``config_from`` names the configuration of a transformers model. Such a model ties its tensors
    again when it is loaded.
    """
    for source in config_from if isinstance(config_from, (list, tuple)) else [config_from]:
        if type(source).__module__.startswith("transformers.") and hasattr(source, "model_type"):
            return True
        if isinstance(source, (str, os.PathLike)) and os.fspath(source):
            path = Path(source)
            try:
                with open_plain(path / "config.json" if path.is_dir() else path) as file:
                    found = parse(file.read(_CONFIG_BYTES), depth=_CONFIG_DEPTH)
            except (OSError, ValueError):
                continue
            if isinstance(found, dict) and "model_type" in found:
                return True
    return False
