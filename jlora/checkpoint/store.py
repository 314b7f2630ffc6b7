"""A folder in an object store, `gs://` or `s3://`, through fsspec, and how an adapter is put there.

There is no rename there and no lock. What there is suffices: an object is put whole or not at all, and is seen by all
from then on. The tensors are put first, under a name that no object has, and the JSON that names them last.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from typing import Any

from jlora.checkpoint.folder import NAME

_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "memory": "fsspec"}
_ADDRESS = re.compile(rf"({'|'.join(_PACKAGES)})://.", re.IGNORECASE)


def is_stored(path: object) -> bool:
    """Whether an address names a folder in an object store that jlora reads and writes."""
    return isinstance(path, str | os.PathLike) and bool(_ADDRESS.match(str(os.fspath(path))))


class Store:
    """A folder in an object store.

    Args:
      address: "gs://bucket/runs/a", "s3://bucket/runs/a"; "memory://a" lies in this process alone, for tests.

    Raises:
      ImportError: if the package for that kind of store is missing.
    """

    def __init__(self, address: str | os.PathLike[str]) -> None:
        self.address = os.fspath(address).rstrip("/")
        package = _PACKAGES[self.address.partition(":")[0].lower()]
        try:
            from fsspec.core import url_to_fs

            self._files, self._root = url_to_fs(self.address)
        except ImportError as error:
            raise ImportError(
                f"'{self.address}' lies in an object store, for which jlora needs the package {package}: "
                "pip install 'jlora[remote]'"
            ) from error

    def file(self, name: str) -> str:
        """The address of an object."""
        return f"{self.address}/{name}"

    def read(self, name: str, limit: int, of: str) -> bytes:
        """The content of an object of at most `limit` bytes; of a larger one no more is read.

        Raises:
          FileNotFoundError: if there is none.
          OSError: if the store does not give it.
          ValueError: if it is larger. `of` says what the limit is that of.
        """
        try:
            content: bytes = self._files.cat_file(f"{self._root}/{name}", start=0, end=limit + 1)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no '{self.file(name)}'") from error
        except Exception as error:  # each kind of store has errors of its own
            raise OSError(f"'{self.file(name)}' cannot be read: {type(error).__name__}: {error}") from error
        if len(content) > limit:
            raise ValueError(f"'{self.file(name)}' has more than {limit} bytes, and {of} at most {limit}")
        return content

    def put(self, name: str, content: bytes) -> None:
        """Puts an object, in the place of one of that name.

        Raises:
          OSError: if the store does not take it.
        """
        try:
            self._files.pipe_file(f"{self._root}/{name}", content)
        except Exception as error:
            raise OSError(f"'{self.file(name)}' cannot be written: {type(error).__name__}: {error}") from error

    def delete(self, name: str) -> None:
        """Deletes an object, if there is one and it may be deleted: who may write may still not be allowed to."""
        with contextlib.suppress(Exception):
            self._files.rm_file(f"{self._root}/{name}")

    def names(self) -> list[str]:
        """The names of the objects in the folder.

        Raises:
          OSError: if the store does not give them.
        """
        try:
            self._files.invalidate_cache()
            return [path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        except Exception as error:
            raise OSError(f"'{self.address}' cannot be listed: {type(error).__name__}: {error}") from error

    def replace(self, content: bytes, text: Callable[[str], bytes], named: Callable[[], Any]) -> None:
        """Puts an adapter in the place of the one that is there, or of none.

        Of several writers the last one's adapter stays, and the tensors of another may be left. So are those of a
        writer that was killed in between: nothing there says that nobody will name them any more.

        Args:
          content: the tensors.
          text: name of the object with the tensors -> the JSON.
          named: reads which object the JSON names that is there now; None if there is no JSON.

        Raises:
          OSError: if the store takes one of the two not. Where it is not known whether it has taken the JSON, the
            tensors stay, too.
        """
        before = None
        with contextlib.suppress(OSError, ValueError):  # what cannot be read is replaced, and nothing of it deleted
            before = named()
        name = f"factors-{secrets.token_hex(8)}.safetensors"
        try:
            self._files.pipe_file(f"{self._root}/{name}", content)
            self._files.pipe_file(f"{self._root}/{NAME}", text(name))
        except Exception as error:
            raise OSError(
                f"saving the adapter to '{self.address}': {type(error).__name__}: {error}; {self._kept(name, named)}"
            ) from error
        if before is not None:
            self.delete(before)

    def _kept(self, name: str, named: Callable[[], Any]) -> str:
        """Content of the folder after a `replace` that failed, as far as it can be told."""
        try:
            there = named()
        except (OSError, ValueError):
            return "what is there now is not known"
        if there == name:
            return "the new adapter is there"
        return "no adapter was written" if there is None else "the adapter that was there is unchanged"
