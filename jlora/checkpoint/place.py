"""Where a folder lies: the addresses of users as local paths."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

_SCHEME = re.compile(r"\s*([^/\\:\s]{2,}):(?=[/\\]|$)")  # of one letter it is a drive


def folder_of(path: str | os.PathLike[str]) -> Path:
    """The local folder that an address names: a path as it is, or the path of a `file://` URL.

    Other addresses (`gs://`, `s3://`, `hf://`, ...) are refused. What jlora promises of a folder (an adapter is
    replaced whole or not at all, also by two writers, and is on the disk when `save` returns) rests on renaming, fsync
    and the ages of files, which object stores do not have. What lies there is `Store`'s.

    Args:
      path: "runs/a", a `pathlib.Path`, or "file:///data/a" (percent-encoded, as `Path.as_uri` writes it). A `Path` made
        of an address, which has lost a slash ("gs:/bucket"), is refused like the address.

    Raises:
      TypeError: if it is no text.
      ValueError: for an address of another scheme, a `file://` URL of another machine or a relative one, or a NUL.

    Example:
      >>> folder_of("file:///data/my%20run").as_posix()
      '/data/my run'
      >>> folder_of("gs://bucket/run")
      Traceback (most recent call last):
      ValueError: 'gs://bucket/run' is no local folder: jlora reads and writes local folders and file:// URLs. Copy ...
    """
    try:
        text: object = os.fspath(path)
    except TypeError:
        text = path
    if not isinstance(text, str):
        raise TypeError(f"a folder is named by a string or a path, not by {path!r} ({type(path).__name__})")
    if "\0" in text:
        raise ValueError(f"{text!r} is no folder: a path holds no NUL character")
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() == "file":
        return _of_url(text.strip())
    if scheme or "://" in text:
        raise ValueError(
            f"{text!r} is no local folder: jlora reads and writes local folders and file:// URLs. Copy the folder to "
            "or from there with the store's own tool, or mount the store and name the folder of the mount"
        )
    return Path(text)


def _of_url(text: str) -> Path:
    url = urlsplit(text)
    if url.netloc.lower() not in ("", "localhost"):
        where = f"names the machine {url.netloc!r}"
        raise ValueError(f"{text!r} {where}: a local folder is file:///path, with three slashes")
    if url.query or url.fragment:
        raise ValueError(f"{text!r} has a '?' or '#': in a file:// URL they are written %3F and %23")
    local = unquote(url.path)
    if "\0" in local or not local.startswith("/"):
        raise ValueError(f"{text!r} names no folder: a file:// URL holds an absolute path, as in file:///data/run")
    return Path(local[1:] if os.name == "nt" else local)
