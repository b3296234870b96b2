"""Checkpoints of other projects, read without running anything in them.

Pickles, alone or in a file of torch.save, have one reader, our own `Unpickler`: what was checked is what is loaded.
"""

from __future__ import annotations

import mmap
import os
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from tailseg.errors import UserError
from tailseg.zoo.pickle_limits import Allowance, UnsafePickleError, require, require_safe
from tailseg.zoo.pickle_values import Storage
from tailseg.zoo.pickles import Plain, Unpickler, check_opcodes

ZIP_START = b"PK\x03\x04"
LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # the first pickle of such a file, after its protocol
LEGACY_PICKLES = 5  # magic number, protocol version, about the system, the content, keys of the storages


def read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint: of torch.save (either format), a pickle of numpy arrays, or safetensors.

    What a file is, its content decides, not its suffix.

    Returns:
        Plain dicts, lists, tuples, sets, strings, numbers, bytes, None and tensors on the CPU (numpy arrays too become
        tensors); everything else is `Foreign`. Tensors may lie in the file itself, mapped: writing to them never
        changes it, but the file must not be shortened while they are in use.

    Raises:
        UserError: the file is missing, no checkpoint, damaged, or tries to run code.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the checkpoint file in it")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give the path of a checkpoint")
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except UserError:
        raise
    except UnsafePickleError as error:
        raise UserError(f"{path}: was not loaded ({error}); get the checkpoint from a source that you trust") from error
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error}); check file and disk") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: is damaged or was cut off (no complete zip archive); download it again") from error
    except Exception as error:  # a malformed pickle can raise nearly anything, RecursionError and MemoryError included
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path}: is damaged or was cut off ({what}); download it again") from error


def _read(path: Path, file: BinaryIO) -> Any:
    head, size = file.read(512), os.fstat(file.fileno()).st_size
    file.seek(0)
    if head.startswith(ZIP_START):
        return _read_zip(path, file, size)
    if LEGACY_MAGIC in head[2:32]:
        return _read_legacy(path, file, size)
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        allowance = Allowance(size)
        check_opcodes(file, allowance)
        file.seek(0)
        return Plain(None, allowance)(Unpickler(path, file, allowance).load())
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return load_file(path)
    start = head.lstrip().lower()
    if not head:
        reason = "is empty; download it again"
    elif start.startswith(b"version https://git-lfs"):
        reason = "is only a git-lfs pointer to the checkpoint; run `git lfs pull` to fetch the file itself"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        reason = "is a web page and no checkpoint: the download failed; download it again"
    elif head[257:262] == b"ustar":
        reason = "is a tar archive; unpack it and give the checkpoint in it"
    else:
        reason = "is no checkpoint; give a file of torch.save, a pickle of numpy arrays or a safetensors file"
    raise UserError(f"{path}: {reason}")


def _read_zip(path: Path, file: BinaryIO, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        listed = archive.infolist()
    entries = {info.filename: info for info in listed}
    twice = next((info.filename for info in listed if entries[info.filename] is not info), None)
    require_safe(twice is None, f"it is a zip archive with two entries {twice!r:.80}")
    root = next(iter(entries), "").split("/")[0]
    if f"{root}/constants.pkl" in entries:
        raise UserError(f"{path}: is a TorchScript program and no checkpoint; give the weights it was made from")
    if f"{root}/data.pkl" not in entries:
        raise UserError(f"{path}: is a zip archive but no checkpoint; unpack it and give the checkpoint in it")
    places = {name: _zip_place(path, file, size, info) for name, info in entries.items()}
    require(sum(nbytes for _, nbytes in places.values()) <= size, "entries overlap")

    def content(name: str) -> bytes:
        start, nbytes = places[f"{root}/{name}"]
        file.seek(start)
        return file.read(nbytes)

    program, allowance = content("data.pkl"), Allowance(size)
    check_opcodes(BytesIO(program), allowance)
    if f"{root}/byteorder" in places and content("byteorder") != b"little":
        _refuse_big_endian(path)
    unpickler = Unpickler(path, BytesIO(program), allowance, has_storages=True)
    found = unpickler.load()
    prefix = f"{root}/data/"
    storages = {name.removeprefix(prefix): place for name, place in places.items() if name.startswith(prefix)}
    return Plain(Storages(file, storages).of, allowance)(found)


def _zip_place(path: Path, file: BinaryIO, size: int, info: zipfile.ZipInfo) -> tuple[int, int]:
    """First byte and number of bytes of an entry."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise UserError(f"{path}: is a compressed or encrypted zip archive; unpack it and give the checkpoint in it")
    require(info.header_offset >= 0, "an entry is missing")
    file.seek(info.header_offset)
    header = file.read(30)
    require(header.startswith(ZIP_START) and len(header) == 30, "an entry has no header")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    require(info.file_size == info.compress_size and start + info.file_size <= size, "an entry is cut off")
    return start, info.file_size


def _read_legacy(path: Path, file: BinaryIO, size: int) -> Any:
    starts, allowance = [], Allowance(size)
    for _ in range(LEGACY_PICKLES):
        starts.append(file.tell())
        check_opcodes(file, allowance)

    def load(index: int) -> Any:
        file.seek(starts[index])
        return Unpickler(path, file, allowance).load()

    system = load(2)
    if type(system) is dict and system.get("little_endian") is False:
        _refuse_big_endian(path)
    file.seek(starts[3])
    unpickler = Unpickler(path, file, allowance, has_storages=True)
    found = unpickler.load()
    keys = load(4)
    # Each storage follows as its number of elements (8 bytes), then the elements.
    places, position = {}, file.tell()
    for key in keys:
        storage = unpickler.storages[key]
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        nbytes = count * storage.dtype.itemsize
        require(count == storage.total and position + 8 + nbytes <= size, f"storage {key} is cut off")
        places[key] = (position + 8, nbytes)
        position += 8 + nbytes
    return Plain(Storages(file, places).of, allowance)(found)


def _refuse_big_endian(path: Path) -> NoReturn:
    raise UserError(f"{path}: was written on a big-endian machine; save it there as safetensors and give that")


class Storages:
    """The bytes of the storages of an open file: mapped, not copied, where their place is one that numbers may have."""

    def __init__(self, file: BinaryIO, places: Mapping[str, tuple[int, int]]) -> None:
        self.file = file
        self.places = places  # key -> first byte, number of bytes; within the file
        self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.read: dict[str, Tensor] = {}

    def of(self, storage: Storage) -> Tensor:
        """All bytes of a storage, uint8, one tensor for all that share it."""
        start, nbytes = self.places[storage.key]
        require(storage.total * storage.dtype.itemsize <= nbytes, f"storage {storage.key} is cut off")
        if storage.key not in self.read:
            if start % 8 == 0:  # as torch.save places it in a zip file
                found = torch.frombuffer(self.map, dtype=torch.uint8, count=nbytes, offset=start)
            else:
                found = torch.empty(nbytes, dtype=torch.uint8)
                self.file.seek(start)
                got = self.file.readinto(found.numpy())  # type: ignore[attr-defined]
                require(got == nbytes, f"storage {storage.key} is cut off")
            self.read[storage.key] = found
        return self.read[storage.key]
