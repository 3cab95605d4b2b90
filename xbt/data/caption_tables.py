"""Text files with an image's name and a caption on each line, with or without a header.

Formats of public data sets::

    1000268201_693b08cb0e.jpg#0<TAB>A child in a dress .     Flickr8k.token.txt, results_20130124.token
    image_name| comment_number| comment                      results.csv of Flickr30k on Kaggle
    1000092795.jpg| 0| Two young guys .
    image,caption                                            CLIP_benchmark, captions.txt on Kaggle
    1007129816.jpg,The man with pierced ears , and a hat .
    filepath<TAB>title                                       open_clip

Most of these look like CSV but are not quoted: captions contain bare commas and quotes. Files from a real CSV
writer have the same header. A file is read as quoted CSV only if a CSV writer could have produced all of it:
every record has as many fields as the first, every field with a delimiter or a quote is quoted, and captions
are quoted either only where needed or always. Otherwise captions are read literally, quotes included.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from xbt.data.files import kind_of
from xbt.errors import DataError

TABLE_KINDS = (".csv", ".tsv", ".token")
"""Suffixes of tables; a .txt file may also be one."""
IMAGE_COLUMNS = (
    "image", "images", "img", "image_name", "image_file", "image_path", "img_path", "filename", "file_name",
    "filepath", "file_path", "file", "path", "image_id", "img_id", "image_url", "url",
)  # fmt: skip
CAPTION_COLUMNS = (
    "caption", "captions", "caption_text", "text", "comment", "sentence", "raw", "title", "description",
    "alt_text",
)  # fmt: skip
"""Known column names, in the order in which they are tried."""
_NAME = r"(?P<image>.+?\.(?:jpe?g|png|webp|gif|bmp|tiff?)(?:\.\d+)?)"
_LINES = {
    # Flickr's token files; some editors replace the tab by spaces.
    "#": re.compile(_NAME + r"#\d+[\t ]+(?P<caption>.*)", re.IGNORECASE),
    # One line of results.csv lacks the second bar.
    "|": re.compile(_NAME + r"\s*\|\s*(?:\d+\s*\|?)?(?P<caption>.*)", re.IGNORECASE),
    "\t": re.compile(rf'"?{_NAME}"?\t(?:\d+\t)?(?P<caption>.*)', re.IGNORECASE),
    ",": re.compile(rf'"?{_NAME}"?\s*,(?P<caption>.*)', re.IGNORECASE),
    ";": re.compile(rf'"?{_NAME}"?;(?P<caption>.*)', re.IGNORECASE),
}
_ID = re.compile(r"\d{6}|#\d")
_MAX_NAMED = 0.2
"""Maximum share of lines with an image name or id in a plain list of captions."""


class TableRow(NamedTuple):
    """Row of a caption table: line number from 1, image name if the table has any, unchanged caption."""

    number: int
    image: str | None
    caption: str


class _Header(NamedTuple):
    delimiter: str
    names: list[str]
    image: int | None
    caption: int


Line = tuple[int, str]


def read_table(
    text: str,
    path: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    pairs: bool = False,
) -> list[TableRow] | None:
    """Read one row per non-blank line, without the header, of a .txt, .token, .csv or .tsv file.

    Columns need to be named only if they have unusual names. With ``pairs`` every line must name an image;
    otherwise the result is ``None`` if a .txt file is not a table.

    Warns:
        UserWarning: If captions look quoted, but the file as a whole is not quoted CSV.
    """
    lines = [(n, line.strip(" \r")) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        return None
    kind = kind_of(path)
    header = None
    if kind != ".token":
        header = _find_header(lines[0][1], path, image_column, caption_column)
    if header is not None:
        return _rows_below(header, text, lines[1:], path)
    delimiter = _delimiter(lines, path, pairs or kind != ".txt")
    if delimiter is None:
        return None
    if _LINES[delimiter].fullmatch(lines[0][1]) is None:  # an unknown header
        lines = lines[1:]
    return _rows_without_header(delimiter, text, lines, path)


def _find_header(
    first: str, path: Path, image_column: str | None, caption_column: str | None
) -> _Header | None:
    table = kind_of(path) != ".txt"
    delimiters = {".tsv": "\t", ".csv": ",|\t;"}.get(kind_of(path), ",|\t;")
    for delimiter in delimiters:
        names = [name.strip().strip('"').strip() for name in first.split(delimiter)]
        caption = _column(names, caption_column, CAPTION_COLUMNS, path)
        image = _column(names, image_column, IMAGE_COLUMNS, path)
        if caption is not None and (table or (image is not None and len(names) > 1)):
            return _Header(delimiter, names, image, caption)
    for column in (image_column, caption_column):
        if column is not None:
            raise DataError(f"{path} has no column {column!r}; its first line is {first[:60]!r}")
    return None


def _column(names: list[str], wanted: str | None, usual_names: Sequence[str], path: Path) -> int | None:
    if wanted is None:
        plain = [re.sub(r"[ -]", "_", name.lower()) for name in names]
        wanted, names = next((name for name in usual_names if name in plain), None), plain
    if wanted is None or wanted not in names:
        return None
    if names.count(wanted) > 1:
        raise DataError(f"{path} has two columns {wanted!r}; rename one in its first line")
    return names.index(wanted)


def _delimiter(lines: list[Line], path: Path, required: bool) -> str | None:
    """Detect the delimiter after the image name at the start of each line; ``None`` without names."""
    counts = {
        delimiter: sum(form.fullmatch(line) is not None for _, line in lines)
        for delimiter, form in _LINES.items()
    }
    delimiter = max(counts, key=lambda key: counts[key])
    form, count = _LINES[delimiter], counts[delimiter]
    others = [line for line in lines if form.fullmatch(line[1]) is None] if count else lines
    if count and (not others or (others == lines[:1] and delimiter in lines[0][1])):
        return delimiter
    if not required and count <= _MAX_NAMED * len(lines):
        if sum(_has_id(line) for _, line in lines) > (1 - _MAX_NAMED) * len(lines):
            raise DataError(
                f"{path} seems to begin every line with an id, such as the first, {lines[0][1][:60]!r}; "
                "write only captions, or a .csv file with the header image,caption"
            )
        return None
    if not count and kind_of(path) == ".txt":
        return None  # the caller raises a more specific error
    if not count:
        raise DataError(
            f"{path} has no header with a caption column, and its first line {lines[0][1][:60]!r} does not "
            "begin with an image's name; write image,caption on the first line"
        )
    number, line = others[0]
    raise DataError(
        f"{path}, line {number}: {line[:60]!r} does not begin with an image's name and a delimiter, as "
        f"{count} of {len(lines)} lines do; write name.jpg,caption on every line, or only captions"
    )


def _has_id(line: str) -> bool:
    """Return True if text follows a first word that looks like an id, such as 1000268201_693b08cb0e#0."""
    first, *others = re.split(r"[\s,|;]", line, maxsplit=1)
    return bool(others) and _ID.search(first) is not None


def _rows_below(header: _Header, text: str, lines: list[Line], path: Path) -> list[TableRow]:
    parsed, invalid_line = _parse_csv(text, header.delimiter, header.caption)
    if parsed is not None:
        return [
            TableRow(number, _image(fields, header), fields[header.caption]) for number, fields in parsed[1:]
        ]
    rows = [_split(header, number, line, path) for number, line in lines]
    _warn_quoted(rows, header.delimiter, invalid_line, path)
    return rows


def _split(header: _Header, number: int, line: str, path: Path) -> TableRow:
    """Split an unquoted line; surplus delimiters belong to the caption if it is the last column."""
    last = len(header.names) - 1
    form = _LINES[header.delimiter]
    if header.image == 0 and header.caption == last and (last == 1 or header.delimiter == "|"):
        match = form.fullmatch(line)  # names may contain the delimiter
        if match is not None:
            return TableRow(number, match["image"].strip(), match["caption"].strip())
    fields = line.split(header.delimiter, last if header.caption == last else -1)
    if len(fields) != len(header.names):
        raise DataError(
            f"{path}, line {number}: {line[:60]!r} has {len(fields)} fields where the first line names "
            f"{len(header.names)}; begin every line with its name, and quote fields as CSV does"
        )
    return TableRow(number, _image(fields, header), fields[header.caption].strip())


def _image(fields: list[str], header: _Header) -> str | None:
    return None if header.image is None else fields[header.image].strip()


def _rows_without_header(delimiter: str, text: str, lines: list[Line], path: Path) -> list[TableRow]:
    parsed, invalid_line = (None, None) if delimiter == "#" else _parse_csv(text, delimiter, -1)
    if parsed is not None and len(parsed[-1][1]) <= 3:
        numbered = all(fields[1].strip().isdecimal() for _, fields in parsed if len(fields) == 3)
        if len(parsed[-1][1]) == 2 or numbered:
            first = lines[0][0]
            return [TableRow(n, fields[0].strip(), fields[-1]) for n, fields in parsed if n >= first]
    rows = []
    for number, line in lines:
        match = _LINES[delimiter].fullmatch(line)
        assert match is not None  # _delimiter has checked every line
        rows.append(TableRow(number, match["image"].strip(), match["caption"].strip()))
    _warn_quoted(rows, delimiter, invalid_line, path)
    return rows


def _parse_csv(
    text: str, delimiter: str, caption: int
) -> tuple[list[tuple[int, list[str]]] | None, int | None]:
    """Parse quoted CSV: line number and fields of each record, or ``None`` if the text is not CSV.

    The second result is the first line that shows that it is not, if any.
    """
    lines = [f"{line}\n" for line in text.split("\n")]
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    records: list[tuple[int, list[str]]] = []
    quoted = unneeded = bare = 0
    before = 0
    try:
        for fields in reader:
            raw, number, before = "".join(lines[before : reader.line_num]), before + 1, reader.line_num
            if not any(field.strip() for field in fields):
                continue
            quotes = _quotes(raw.strip("\r\n"), fields, delimiter)
            if quotes is None or (records and len(fields) != len(records[0][1])):
                return None, number
            if records:  # the first may be a header
                value, is_quoted = fields[caption], quotes[caption]
                quoted += is_quoted
                unneeded += is_quoted and not any(char in value for char in (delimiter, '"', "\n", "\r"))
                bare += not is_quoted and bool(value.strip())
            records.append((number, fields))
    except csv.Error:
        return None, reader.line_num
    if not records or (unneeded and bare):
        return None, None
    return records, None


def _quotes(raw: str, fields: list[str], delimiter: str) -> list[bool] | None:
    """Quoted flag of each field of a record; ``None`` if no CSV writer writes the record like this."""
    quotes = []
    rest = raw
    for field in fields:
        rest = rest.lstrip(" ")
        quoted = f'"{field.replace(chr(34), chr(34) * 2)}"'
        is_quoted = rest.startswith(quoted)
        if not is_quoted and ('"' in field or not rest.startswith(field)):
            return None
        rest = rest.removeprefix(quoted if is_quoted else field)
        if rest and not rest.startswith(delimiter):
            return None
        rest = rest.removeprefix(delimiter)
        quotes.append(is_quoted)
    return quotes


def _warn_quoted(rows: list[TableRow], delimiter: str, invalid_line: int | None, path: Path) -> None:
    quoted = [
        row.number
        for row in rows
        if len(row.caption) > 1
        and row.caption[0] == row.caption[-1] == '"'
        and (delimiter in row.caption or '""' in row.caption[1:-1])
    ]
    if quoted:
        because = f"line {invalid_line} is not" if invalid_line is not None else "others have unneeded quotes"
        warnings.warn(
            f"{len(quoted)} captions of {path}, first in line {quoted[0]}, look like quoted CSV, but "
            f"{because}; all captions are read literally, with their quotes",
            stacklevel=2,
        )
