"""Stores the files of checkpoints and exports: one backend for local file systems, one for fsspec's URLs.

=====================  =====================================================================
``base``               the protocols of a backend, and in which order which rank calls what
``paths``              what a user's path or URL means
``local``              files of this machine: read by position, written in place by all ranks
``staging``            a directory that is written beside its place and renamed when whole
``local_commit``       a checkpoint directory: made, or replaced in one step
``remote``             objects of a store: read by ranges, written from first byte to last
``remote_commit``      a checkpoint in a store: the manifest, written last, replaces the old one
=====================  =====================================================================
"""

from __future__ import annotations

import os

from dist_ema.storage import paths
from dist_ema.storage.base import StorageReader, StorageWriter
from dist_ema.storage.local import LocalReader
from dist_ema.storage.local_commit import LocalWriter
from dist_ema.storage.paths import StrPath
from dist_ema.storage.remote import RemoteReader
from dist_ema.storage.remote_commit import RemoteWriter


def storage_reader(path: StrPath) -> StorageReader:
    """Returns a reader for files of the directory or URL ``path``; opens none yet.

    Raises EMAConfigError if ``path`` is neither, or fsspec lacks a package for it; CheckpointError if the store cannot
    be reached.
    """
    paths.check_path(path)
    if paths.is_remote(path):
        return RemoteReader(*paths.file_system(os.fspath(path)))
    return LocalReader(paths.local_path(path))


def storage_writer(path: StrPath, token: str) -> StorageWriter:
    """Returns a writer for the checkpoint ``path``. ``token``, 32 hexadecimal digits, belongs to this save alone.

    Raises as :func:`storage_reader` does.
    """
    if paths.is_remote(path):
        return RemoteWriter(*paths.file_system(os.fspath(path)), token)
    return LocalWriter(paths.local_path(path), token)
