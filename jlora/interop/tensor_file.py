"""Files of tensors by strangers, and their configs: what they claim is checked, and what they say is not run.

A safetensors file is a header (its length in 8 bytes, JSON) and the tensors' bytes behind it. All that the header says
is checked against the file's size before memory is taken; then a read takes the memory of one tensor. Pickles are read
where the caller asks for it, by `torch_file`, which runs none of what they name.
"""

import contextlib
import difflib
import io
import json
import math
import os
import secrets
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from jlora.interop import headers, torch_file
from jlora.interop.headers import DTYPES, NAMES, Header, Span, check_name, elements, read_bytes, shown
from jlora.models import place, reading

LARGEST_CONFIG = 2**20  # bytes
CHUNK = 2**20  # elements


class TensorFile:
    """An open file of tensors, its header read and checked; made by `open`. A context manager, which closes the file.

    Attributes:
      file: its path.
      headers: of the tensors, by name.
      metadata: what a safetensors file says beside its tensors; empty for a pickle.
    """

    def __init__(
        self,
        file: Path,
        headers: Mapping[str, Header],
        metadata: Mapping[str, str],
        read: Callable[[str], np.ndarray],
        close: Callable[[], None],
    ) -> None:
        self.file, self.headers, self.metadata = file, dict(headers), dict(metadata)
        self._read = read
        self._close = weakref.finalize(self, close)

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own and in its dtype.

        Raises:
          ValueError: if there is none of the name, its bytes are no values of its dtype, or the file is closed or has
            been cut short since it was opened.
        """
        if name not in self.headers:
            near = difflib.get_close_matches(str(name)[:200], list(self.headers)[:1000], 3)
            hint = f"; the closest are {', '.join(map(repr, near))}" if near else ""
            raise ValueError(f"'{self.file}' holds no tensor {name!r}, among {len(self.headers)}{hint}")
        if not self._close.alive:
            raise ValueError(f"'{self.file}' is closed: read its tensors within the with statement")
        return self._read(name)

    def read_all(self) -> dict[str, np.ndarray]:
        """All tensors, by name. Raises what `read` does."""
        return {name: self.read(name) for name in self.headers}

    def close(self) -> None:
        """Closes the file. What was read stays."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open(file: str | os.PathLike[str], *, pickled: bool = False) -> TensorFile:  # noqa: A001
    """Opens a file of tensors: its header is read and checked, the tensors are not read.

    Args:
      file: a safetensors file; with `pickled`, or one of `torch.save` (.bin, .pt, .ckpt).
      pickled: read a pickle, without running what it says: dicts and tensors are admitted, and nothing else.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a pickle where `pickled` is False; for what is no regular file, a link out of its folder, no such
        file or a damaged one; a header that claims more than the file has, or names, dtypes and shapes that no adapter
        has.

    Example:
      with tensor_file.open("adapter_model.safetensors") as opened:
          a = opened.read("base_model.model.h.0.attn.c_attn.lora_A.weight")
    """
    path = place.folder_of(file)
    opened = headers.opened(path)
    with contextlib.ExitStack() as stack:
        stack.callback(opened.close)
        start = opened.read(len(torch_file.LEGACY))
        if torch_file.is_pickle(start):
            if not pickled:
                raise ValueError(
                    f"'{path}' is a pickle, which may name any function to be called: pickled=True reads it, without "
                    "running what it says. A safetensors file of the same adapter is the better choice"
                )
            found = torch_file.tensors(opened, path)
            described = {name: Header(tensor.shape, NAMES[tensor.dtype]) for name, tensor in found.items()}
            made = TensorFile(
                path, described, {}, lambda name: torch_file.read_tensor(opened, path, name, found[name]), opened.close
            )
        else:
            spans, metadata = headers.spans(opened, path, headers.BITS)
            described = {name: span.header for name, span in spans.items()}
            made = TensorFile(
                path, described, metadata, lambda name: _read(opened, path, name, spans[name]), opened.close
            )
        stack.pop_all()
        return made


def read_config(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object of a config.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for what is no regular file, a link out of its folder, no JSON or no object; more than a megabyte, a
        key that an object has twice, lists or objects more than 64 deep, NaN or an infinity, whole numbers of over 20
        digits.
    """
    path = place.folder_of(file)
    content = reading.read_json(path, LARGEST_CONFIG)
    level: list[Any] = [content]
    while level:
        if any(isinstance(value, float) and not math.isfinite(value) for value in level):
            raise ValueError(f"'{path}' has a NaN or an infinity, which JSON has not: give a number in its place")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return content


def check_finite(file: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Raises a ValueError that lists the tensors of a file that have a NaN or an infinity."""
    wrong = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        names = ", ".join(map(shown, wrong[:6]))
        raise ValueError(f"'{os.fspath(file)}' has values that are not finite, in {names}{more}: its training diverged")


def _is_finite(tensor: np.ndarray) -> bool:
    flat = np.asarray(tensor).reshape(-1)
    return all(np.isfinite(flat[start : start + CHUNK]).all() for start in range(0, flat.size, CHUNK))


# -- safetensors -------------------------------------------------------------------------------------------------------


def _read(opened: BinaryIO, file: Path, name: str, span: Span) -> np.ndarray:
    content = read_bytes(opened, file, span.start, span.stop - span.start)
    dtype = DTYPES[span.header.dtype]
    if dtype == np.bool_ and content.size and content.max() > 1:
        raise ValueError(f"'{file}' has bytes in {shown(name)}, a BOOL, that are neither 0 nor 1")
    return content.view(dtype).reshape(span.header.shape)


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    file: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    force: bool = False,
) -> None:
    """A safetensors file, whole or not at all: written beside its place, and renamed into it when it is on the disk.

    Args:
      file: its folder exists.
      tensors: by name; each is written as an array of its own.
      metadata: texts beside them, such as `{"format": "pt"}`.
      force: replace a file that is there.

    Raises:
      FileExistsError: if there is such a file, without `force`.
      ValueError: for names, dtypes, shapes or metadata that `open` would not take.
      OSError: for what the system says, such as a full disk; nothing is left of the file then.
    """
    path = place.folder_of(file)
    arrays = {name: _native(np.asarray(tensor)) for name, tensor in tensors.items()}
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))  # each at a multiple of its itemsize
    with _about(path):
        header = _written_header({name: arrays[name] for name in order}, metadata)
    if os.path.lexists(path) and not force:
        raise FileExistsError(f"'{path}' is there already: force=True replaces it")
    with _replacing(path, force) as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            out.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)


def _native(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _written_header(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError("metadata that is not all text: json.dumps makes a text of the rest")
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, array in arrays.items():
        check_name(name)
        elements(name, array.shape)
        if name == "__metadata__" or array.dtype not in NAMES:
            raise ValueError(f"has {shown(name)} of dtype {array.dtype}, expected one of {', '.join(map(str, NAMES))}")
        entries[name] = {
            "dtype": NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": [place, place + array.nbytes],
        }
        place += array.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > headers.LARGEST_HEADER or len(arrays) > headers.MOST_TENSORS:
        raise ValueError(f"a header of {len(text)} bytes and {len(arrays)} tensors, more than can be read")
    return text


@contextlib.contextmanager
def _about(file: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"'{file}' is not written: it {error}") from error


@contextlib.contextmanager
def _replacing(file: Path, force: bool) -> Iterator[io.BufferedWriter]:
    """A new file that gets its name when the block ends well, and is deleted when it does not."""
    temporary = file.with_name(f".{file.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        if force:
            temporary.replace(file)
        else:
            _linked(temporary, file)
        if os.name == "posix":  # a name is on the disk when its folder is
            descriptor = os.open(file.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _linked(temporary: Path, file: Path) -> None:
    """Gives a file its name, unless another has it: a rename would take the place of one made in the meantime."""
    try:
        os.link(temporary, file)
    except FileExistsError as error:
        raise FileExistsError(f"'{file}' is there already: force=True replaces it") from error
    except OSError:  # no links on this disk
        if os.path.lexists(file):
            raise FileExistsError(f"'{file}' is there already: force=True replaces it") from None
        temporary.replace(file)
    else:
        temporary.unlink()
