"""Entries of a zip that are stored as they are, as `torch.save` writes them. What is compressed is refused.

All of the zip's numbers are checked against the file's size before memory is taken, and no byte belongs to two entries.
"""

import struct
from typing import BinaryIO, NamedTuple

MOST_ENTRIES = 2**16
LARGEST_DIRECTORY = 2**23  # bytes
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_MANY, _LARGE = 0xFFFF, 0xFFFFFFFF  # the number is in a field of 64 bits


class Entry(NamedTuple):
    """Where an entry's bytes lie in the file, and their CRC-32."""

    start: int
    size: int
    crc: int


def entries(opened: BinaryIO, size: int) -> dict[str, Entry]:
    """The entries of a zip of `size` bytes, by name.

    Raises:
      ValueError: for no zip, a damaged one, one in parts, entries that are compressed or encrypted, or more of them
        than a file of tensors has.
    """
    start, length, count = _directory(opened, size)
    if count > MOST_ENTRIES or length > LARGEST_DIRECTORY:
        raise ValueError(f"a zip of {count} entries, listed in {length} bytes, has more than a file of tensors")
    listed = _read(opened, start, length)
    found: dict[str, Entry] = {}
    spans = []
    place = 0
    while place < length:
        if place + _ENTRY.size > length or listed[place : place + 4] != b"PK\1\2":
            raise ValueError("the zip's list of entries is damaged")
        _, _, _, flags, method, _, _, crc, packed, plain, *lengths, _, _, _, offset = _ENTRY.unpack_from(listed, place)
        place += _ENTRY.size
        raw, extra = listed[place : place + lengths[0]], listed[place + lengths[0] : place + lengths[0] + lengths[1]]
        place += sum(lengths)
        plain, packed, offset = _wide(extra, plain, packed, offset)
        name = raw.decode("utf-8")
        if method or flags & 1 or packed != plain:
            raise ValueError(f"the entry {name[:80]!r} is compressed or encrypted, which torch.save does not do")
        if name in found:
            raise ValueError(f"the zip has the entry {name[:80]!r} twice")
        found[name] = Entry(_behind(opened, raw, offset, start), plain, crc)
        spans.append((offset, found[name].start + plain))
    if len(found) != count:
        raise ValueError(f"the zip lists {len(found)} entries, and says that it has {count}")
    ends = [stop for _, stop in sorted(spans)]
    if any(following < stop for stop, (following, _) in zip(ends, sorted(spans)[1:] + [(start, 0)], strict=True)):
        raise ValueError("entries of the zip overlap, or are cut short")
    return found


def _directory(opened: BinaryIO, size: int) -> tuple[int, int, int]:
    """Start and length of the list of entries, and their number, as the end of the file says."""
    tail_start = max(size - _END.size - 0xFFFF, 0)
    tail = _read(opened, tail_start, size - tail_start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise ValueError("it is no zip, or cut short")
    _, *disks, count, length, start, comment = _END.unpack_from(tail, at)
    end = tail_start + at
    if end + _END.size + comment != size or any(disks[:2]) or disks[2] != count:
        raise ValueError("its zip is in several parts, or damaged at its end")
    if end >= _LOCATOR64.size:
        mark, disk, wide, parts = _LOCATOR64.unpack(_read(opened, end - _LOCATOR64.size, _LOCATOR64.size))
        if mark == b"PK\6\7":
            if disk or parts > 1 or wide != end - _LOCATOR64.size - _END64.size:
                raise ValueError("its zip is in several parts, or damaged at its end")
            fields = _END64.unpack(_read(opened, wide, _END64.size))
            if fields[0] != b"PK\6\6" or fields[4] or fields[5] or fields[6] != fields[7]:
                raise ValueError("its zip is in several parts, or damaged at its end")
            count, length, start = fields[7:]
            end = wide
    if start + length != end:
        raise ValueError("its zip is damaged: the list of entries does not end where the zip's end begins")
    return start, length, count


def _wide(extra: bytes, *numbers: int) -> list[int]:
    """Numbers of an entry, those of 64 bits from its extra fields."""
    wide = b""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            wide = extra[place + 4 : place + 4 + length]
        place += 4 + length
    found = []
    for number in numbers:
        if number == _LARGE:
            if len(wide) < 8:
                raise ValueError("an entry of the zip has no size")
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        found.append(number)
    return found


def _behind(opened: BinaryIO, raw: bytes, offset: int, stop: int) -> int:
    """Where an entry's bytes begin, behind its header in the file. All lies before `stop`."""
    if offset + _LOCAL.size > stop:
        raise ValueError(f"the entry {raw[:80]!r} lies outside of the file")
    mark, *_, length, extra = _LOCAL.unpack(_read(opened, offset, _LOCAL.size))
    if mark != b"PK\3\4" or length != len(raw) or _read(opened, offset + _LOCAL.size, length) != raw:
        raise ValueError(f"the entry {raw[:80]!r} is not where the zip says")
    return offset + _LOCAL.size + length + extra


def _read(opened: BinaryIO, start: int, count: int) -> bytes:
    opened.seek(start)
    content = opened.read(count)
    if len(content) < count:
        raise ValueError("it was cut short")
    return content
