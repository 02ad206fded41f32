"""Traces in JSON: an object a line (Mooncake, engine workloads), or an array of conversations (ShareGPT)."""

from __future__ import annotations

import json
import math
import reprlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specs.errors import InputError
from traces._columns import MAX_ROWS, Columns, Floats, at_row
from traces._files import Lines, line_blocks, read_text
from traces.workload import MAX_TOKENS, PrefixBlocks, Workload

MAX_LINE_BYTES = 1 << 24  # 10 million tokens in blocks of 16 are 5 MB of ids
_MAX_SHAREGPT_BYTES = 1 << 30  # the published file has 0.7 GB
CHARACTERS_PER_TOKEN = 4  # of English text, the usual rule of thumb


@dataclass(frozen=True, slots=True)
class JsonlFormat:
    """The keys of one format with an object a line."""

    name: str
    arrival: str
    prompt: str
    output: str
    blocks: str  # optional key: ids of the prompt's prefix blocks
    block_tokens: int
    arrival_unit_s: float

    @property
    def required(self) -> list[str]:
        """Keys every line must have."""
        return [self.arrival, self.prompt, self.output]


JSONL_FORMATS = (
    JsonlFormat("mooncake", "timestamp", "input_length", "output_length", "hash_ids", 512, 1e-3),
    JsonlFormat("groundtruth", "arrival_s", "input_tokens", "output_tokens", "block_ids", 16, 1.0),
)


def recognise(line: str) -> JsonlFormat | None:
    """The format whose keys the object on `line` has, or None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    return next((each for each in JSONL_FORMATS if set(each.required) <= row.keys()), None)


def read_jsonl(path: Path, kind: JsonlFormat) -> Workload:
    """Read a trace with one JSON object a line.

    Raises:
        InputError: the file or a row is unreadable or impossible, or there are no rows.
    """
    parser = _LineParser(path, kind)
    for lines in line_blocks(path, MAX_LINE_BYTES):
        if lines.texts:
            parser.add(lines)
    return parser.result()


class _LineParser:
    """Turns lines of JSON into the columns of a workload."""

    def __init__(self, path: Path, kind: JsonlFormat) -> None:
        self._path = path
        self._kind = kind
        self._columns = Columns(path, (kind.arrival, kind.prompt, kind.output))
        self._ids = array("i")
        self._counts: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self._has_blocks: bool | None = None

    def add(self, lines: Lines) -> None:
        """Parse and check one block of rows."""
        rows = [self._object(number, text) for number, text in zip(lines.numbers, lines.texts, strict=True)]
        prompt = self._numbers(rows, lines, self._kind.prompt)
        output = self._numbers(rows, lines, self._kind.output)
        arrival = self._numbers(rows, lines, self._kind.arrival) * self._kind.arrival_unit_s
        self._columns.add(lines.numbers, arrival, prompt, output)
        if self._has_blocks is None:
            self._has_blocks = self._kind.blocks in rows[0]
        if self._has_blocks:
            self._add_blocks(rows, lines, prompt)
        elif any(self._kind.blocks in row for row in rows):
            index = next(index for index, row in enumerate(rows) if self._kind.blocks in row)
            problem = f"has {self._kind.blocks}, but the rows above have none"
            raise InputError(f"{at_row(self._path, lines.numbers[index])}: {problem}")

    def result(self) -> Workload:
        """The workload of all rows."""
        if len(self._columns) == 0:
            raise InputError(f"{self._path}: holds no requests")
        prompt, output = self._columns.lengths()
        prefix = None
        if self._has_blocks:
            offsets = np.zeros(len(prompt) + 1, dtype=np.int64)
            np.cumsum(np.concatenate(self._counts), out=offsets[1:])
            prefix = PrefixBlocks(offsets, np.frombuffer(self._ids, dtype=np.int32), self._kind.block_tokens)
        return Workload(prompt, output, self._columns.arrival_s(), prefix=prefix)

    def _object(self, number: int, text: str) -> dict[str, Any]:
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            problem = f"not valid JSON ({error.msg} at character {error.pos + 1})"
            raise InputError(f"{at_row(self._path, number)}: {problem}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{at_row(self._path, number)}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{at_row(self._path, number)}: must be an object, not {reprlib.repr(row)}")
        return row

    def _numbers(self, rows: list[dict[str, Any]], lines: Lines, key: str) -> Floats:
        try:
            values = [row[key] for row in rows]
            if set(map(type, values)) <= {int, float}:
                return np.fromiter(map(float, values), np.float64, len(values))
        except (KeyError, OverflowError):
            pass  # the loop below finds the row
        for number, row in zip(lines.numbers, rows, strict=True):
            if key not in row:
                keys = ", ".join(self._kind.required)
                raise InputError(f"{at_row(self._path, number)}: has no {key}; every row has {keys}")
            value = row[key]
            if not _is_number(value):
                problem = f"{key} must be a number, not {reprlib.repr(value)}"
                raise InputError(f"{at_row(self._path, number)}: {problem}")
        raise AssertionError("a row was bad, but none is")

    def _add_blocks(self, rows: list[dict[str, Any]], lines: Lines, prompt: Floats) -> None:
        """Append the ids of every row; a row may have fewer than its prompt has blocks, not more."""
        key = self._kind.blocks
        counts = np.zeros(len(rows), dtype=np.int64)
        for index, row in enumerate(rows):
            ids = row.get(key)
            start = len(self._ids)
            problem = None
            try:
                self._ids.extend(ids)  # type: ignore[arg-type]  # checked by what it raises
            except TypeError:
                problem = f"{key} must be a list of whole numbers"
            except OverflowError:
                problem = f"{key} must be at most {MAX_TOKENS}"
            counts[index] = len(self._ids) - start
            if problem is None and not isinstance(ids, list):
                problem = f"{key} must be a list of whole numbers"
            if problem is None and ids and min(ids) < 0:
                problem = f"{key} must not be negative"
            blocks = math.ceil(prompt[index] / self._kind.block_tokens)
            if problem is None and counts[index] > blocks:
                problem = (
                    f"{counts[index]} {key} for a prompt of {int(prompt[index])} tokens, which has "
                    f"{blocks} blocks of {self._kind.block_tokens}"
                )
            if problem is not None:
                raise InputError(f"{at_row(self._path, lines.numbers[index])}: {problem}")
        self._counts.append(counts)


def _is_number(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def read_sharegpt(path: Path) -> tuple[Workload, int, bool]:
    """Read a JSON array of conversations: the first question and its answer make one request each.

    Token counts are taken from the keys ``prompt_len`` and ``output_len`` where a conversation has both,
    else estimated from the text at 4 characters a token, rounded up. Conversations without a question
    and an answer that are not empty are left out.

    Returns:
        The workload (lengths only), the number of conversations left out, whether any was estimated.

    Raises:
        InputError: the file is unreadable, not such an array, or holds no conversation.
    """
    prompts, outputs = array("i"), array("i")
    left_out, estimated = 0, False
    for index, item in enumerate(_array_items(path)):
        where = f"{path}: conversation {index + 1}"
        if not isinstance(item, dict):
            raise InputError(f"{where}: must be an object, not {reprlib.repr(item)}")
        if "prompt_len" in item and "output_len" in item:
            lengths = [_token_count(item, key, where) for key in ("prompt_len", "output_len")]
        else:
            lengths = [math.ceil(len(text) / CHARACTERS_PER_TOKEN) for text in _first_exchange(item, where)]
            if 0 in lengths:
                left_out += 1
                continue
            estimated = True
        prompts.append(lengths[0])
        outputs.append(lengths[1])
        if len(prompts) > MAX_ROWS:
            raise InputError(f"{path}: has more than {MAX_ROWS} conversations")
    if not prompts:
        raise InputError(f"{path}: holds no conversation with a question and an answer")
    workload = Workload(np.frombuffer(prompts, dtype=np.int32), np.frombuffer(outputs, dtype=np.int32))
    return workload, left_out, estimated


def _array_items(path: Path) -> Iterator[Any]:
    """Yield the items of the JSON array in a file, one at a time."""
    text = read_text(path, _MAX_SHAREGPT_BYTES)
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise InputError(f"{path}: must be a JSON array of conversations")
    position, count = _skip_space(text, position + 1), 0
    while text[position : position + 1] != "]":
        if count:
            if text[position : position + 1] != ",":
                raise InputError(f"{path}: not valid JSON after conversation {count} (expected ',' or ']')")
            position = _skip_space(text, position + 1)
        try:
            item, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: conversation {count + 1} is not valid JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: conversation {count + 1} is not valid JSON ({error})") from None
        yield item
        count += 1
        position = _skip_space(text, position)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _token_count(item: dict[str, Any], key: str, where: str) -> int:
    value = item[key]
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise InputError(
            f"{where}: {key} must be a whole number from 1 to {MAX_TOKENS}, not {reprlib.repr(value)}"
        )
    return value


def _first_exchange(item: dict[str, Any], where: str) -> tuple[str, str]:
    """The texts of the first two turns; empty where there is none."""
    turns = item.get("conversations", item.get("conversation"))
    if not isinstance(turns, list):
        raise InputError(
            f"{where}: has no list of turns under 'conversations', nor prompt_len and output_len"
        )
    texts = []
    for turn in turns[:2]:
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{where}: every turn must be an object with its text under 'value'")
        texts.append(text)
    question, answer = (*texts, "", "")[:2]
    return question, answer
