"""Reading text that nobody vouches for: plain or gzip, in bounded blocks of whole lines."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from specs.errors import InputError

_BLOCK_BYTES = 1 << 20
_MAX_TOTAL_BYTES = 1 << 34  # 16 GiB of text: a gzip file of 16 MB can claim to hold that
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Lines:
    """Some lines of a file that are not blank, without their ends, and their numbers from 1."""

    numbers: Sequence[int]
    texts: list[str]


def line_blocks(path: Path, max_line_bytes: int) -> Iterator[Lines]:
    """Yield the lines of a UTF-8 file, plain or gzip, about a MiB at a time.

    Raises:
        InputError: the file is missing or unreadable, corrupt gzip, not UTF-8, or has an overlong line.
    """
    rest, line = b"", 1
    for raw in _byte_blocks(path):
        whole, newline, tail = raw.rpartition(b"\n")
        if newline:
            lines = _split(path, rest + whole, line)
            line = lines.numbers[-1] + 1 if lines.numbers else line
            rest = tail
            yield _without_blanks(path, lines, max_line_bytes)
        else:
            rest += raw
        if len(rest) > max_line_bytes:
            raise InputError(f"{path}: line {line} is longer than {max_line_bytes} bytes")
    if rest:
        yield _without_blanks(path, _split(path, rest, line), max_line_bytes)


def read_text(path: Path, max_bytes: int) -> str:
    """Return the whole of a UTF-8 file, plain or gzip.

    Raises:
        InputError: as `line_blocks`, or the text is larger than `max_bytes`.
    """
    blocks, size = [], 0
    for raw in _byte_blocks(path):
        size += len(raw)
        if size > max_bytes:
            raise InputError(f"{path}: holds more than {max_bytes} bytes of text")
        blocks.append(raw)
    data = b"".join(blocks)
    blocks.clear()
    return _decode(path, data, 1)


def first_character(path: Path) -> str:
    """The first character of a file that is not space, or "" in an empty one, however long its first line.

    Raises:
        InputError: the file is missing or unreadable, or corrupt gzip.
    """
    for raw in _byte_blocks(path):
        text = raw.removeprefix(b"\xef\xbb\xbf").lstrip()
        if text:
            return chr(text[0])
    return ""


def _byte_blocks(path: Path) -> Iterator[bytes]:
    """Yield the (unpacked) bytes of a file."""
    total = 0
    try:
        with _open(path) as file:
            while block := file.read(_BLOCK_BYTES):
                total += len(block)
                if total > _MAX_TOTAL_BYTES:
                    raise InputError(f"{path}: holds more than {_MAX_TOTAL_BYTES} bytes of text")
                yield block
    except EOFError:
        raise InputError(
            f"{path}: gzip ends early, after {total} bytes of text; the file was cut off"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: corrupt gzip after {total} bytes of text ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open(path: Path) -> BinaryIO:
    """Open a file for reading, unpacking it if it begins as gzip does, whatever its name is."""
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == _GZIP_MAGIC:
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".gz" and magic:
        raise InputError(f"{path}: is named .gz but is not gzip")
    return path.open("rb")


def _split(path: Path, data: bytes, first_line: int) -> Lines:
    texts = _decode(path, data, first_line).split("\n")
    return Lines(range(first_line, first_line + len(texts)), texts)


def _decode(path: Path, data: bytes, first_line: int) -> str:
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}: line {line} is not text (byte {data[error.start]:#04x} is not UTF-8)"
        ) from None


def _without_blanks(path: Path, lines: Lines, max_line_bytes: int) -> Lines:
    texts = [text.rstrip("\r") for text in lines.texts]
    if max(map(len, texts)) > max_line_bytes:
        number = next(n for n, text in zip(lines.numbers, texts, strict=True) if len(text) > max_line_bytes)
        raise InputError(f"{path}: line {number} is longer than {max_line_bytes} bytes")
    if all(texts):
        return Lines(lines.numbers, texts)
    kept = [(number, text) for number, text in zip(lines.numbers, texts, strict=True) if text.strip()]
    return Lines([number for number, _ in kept], [text for _, text in kept])
