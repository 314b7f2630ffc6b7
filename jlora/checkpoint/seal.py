"""A list of a checkpoint's files with their checksums, written before the checkpoint counts: damage is seen, in any."""

import asyncio
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

NAME = "seal.json"
_REFUSED = "refused.txt"
_LARGEST = 1 << 26  # bytes of the list itself


class SealedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's folder of a step while it is written. It gets its seal last, and then its final name, in one rename.

    Orbax itself would write into the folder right before it renames it (the time, a note of success): no list that is
    made before knows those bytes, and one that is made after can be missing when the process is killed in between.
    """

    @classmethod
    def from_final(cls, final_path: Any, *, checkpoint_metadata_store: Any = None, **options: Any) -> "SealedPath":
        """The temporary folder for a final one."""
        made = super().from_final(final_path, checkpoint_metadata_store=checkpoint_metadata_store, **options)
        made.store = checkpoint_metadata_store
        return made

    async def finalize(self) -> None:
        """Seals the step, and makes it a checkpoint. What lies within a step is renamed as Orbax does."""
        final = Path(self.get_final())
        if not final.name.isdigit():
            await super().finalize()
            return
        if self.store is not None:
            await asyncio.to_thread(self.store.wait_until_finished)
        refused = Path(self.get()) / _REFUSED
        if refused.exists():
            raise OSError(f"the checkpoint of step {final.name} was not written: {refused.read_text()}")
        await asyncio.to_thread(seal, Path(self.get()))
        os.rename(self.get(), final)


def refuse(folder: Path, step: int, why: str) -> bool:
    """Keeps the one that is being written in a folder of checkpoints from being sealed. False if there is none."""
    being_written = list(folder.glob(f"{step}.*"))
    for temporary in being_written:
        (temporary / _REFUSED).write_text(why)
    return bool(being_written)


def seal(folder: Path) -> None:
    """Writes the list of the files that lie in a folder, and waits until it is on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    text = _text({path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in files})
    with (folder / NAME).open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def damage(folder: Path) -> str | None:
    """The first file of a sealed folder that is not what it was, in words; None if all are.

    Only regular files inside the folder are opened, and none that has another size.
    """
    list_ = folder / NAME
    wrong = _irregular(list_)
    if wrong or list_.stat().st_size > _LARGEST:
        return f"'{NAME}' {wrong or 'is too large'}"
    text = list_.read_bytes()
    try:
        files = json.loads(text)["files"]
        right = _text(files).encode() == text
        expected = [(name, int(size), str(digest)) for name, (size, digest) in files.items()]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        right, expected = False, []
    if not right or not all(_inside(name) for name, _, _ in expected):
        return f"'{NAME}' is not what was written"
    for name, size, digest in expected:
        file = folder / name
        wrong = _irregular(file)
        if wrong:
            return f"'{name}' {wrong}"
        if file.stat().st_size != size:
            return f"'{name}' has {file.stat().st_size} of {size} bytes"
        try:
            same = _digest(file) == digest
        except OSError as error:
            return f"'{name}' cannot be read: {error.strerror}"
        if not same:
            return f"'{name}' has other bytes than were written (sha256)"
    return None


def _text(files: Any) -> str:
    """One line to a file, and the checksum of these lines: every byte counts, none is only layout."""
    lines = json.dumps(files, indent=0, sort_keys=True)
    return json.dumps({"files": files, "sha256": hashlib.sha256(lines.encode()).hexdigest()}, indent=0, sort_keys=True)


def _inside(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in Path(name).parts


def _irregular(file: Path) -> str | None:
    try:
        mode = file.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    return None if stat.S_ISREG(mode) else "is no regular file"


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
