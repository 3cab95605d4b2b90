from __future__ import annotations

import csv
import gzip
import io
import warnings

import pytest
from PIL import Image

from xbt.data import CaptionSource, PairSource, load_pairs, read_captions
from xbt.data.captions import read_caption_rows
from xbt.errors import ConfigError, DataError

ROWS = [
    ("k1.jpg", "Two men , one in red , wave ."),
    ("k1.jpg", 'A "stop" sign .'),
    ("k2.JPEG", "A cat ."),
    ("k2.JPEG", "Dogs run | jump ."),
]
CAPTIONS = [caption for _, caption in ROWS]
PAIRS = [CAPTIONS[:2], CAPTIONS[2:]]


def written(rows, **settings):
    buffer = io.StringIO(newline="")
    csv.writer(buffer, **settings).writerows(rows)
    return buffer.getvalue()


def numbered(form):
    return "\n".join(form.format(name, row % 2, caption) for row, (name, caption) in enumerate(ROWS))


TABLES = {
    "Flickr8k.token.txt": numbered("{}#{}\t{}"),
    "results_20130124.token": numbered("{}#{}\t{}") + "\n",
    "spaces.token": numbered("{}#{} {}"),
    "results.csv": "image_name| comment_number| comment\n" + numbered("{}| {}| {}"),
    # The published file lacks a bar in one line.
    "lacking.csv": "image_name| comment_number| comment\n" + numbered("{}| {}| {}").replace("1| A", "1 A"),
    "results.txt": numbered("{}| {}| {}"),
    "unquoted.txt": "image,caption\n" + "\n".join(map(",".join, ROWS)),
    "bare.txt": "\n".join(map(",".join, ROWS)) + "\n\n",
    "other.txt": "file of it,what it shows\r\n" + "\r\n".join(map(",".join, ROWS)),
    "numbered.txt": "image_name,comment_number,comment\n" + numbered("{},{},{}"),
    "tabs.tsv": "filepath\ttitle\n" + "\n".join(map("\t".join, ROWS)),
    "tabs.txt": "\n".join(map("\t".join, ROWS)),
    "minimal.csv": written([("image", "caption"), *ROWS]),
    "all.txt": written([("image", "caption"), *ROWS], quoting=csv.QUOTE_ALL),
    "headless.csv": written(ROWS),
    "semicolons.csv": written([("Image", "Caption"), *ROWS], delimiter=";"),
    "quoted.tsv": written([("image", "caption"), *ROWS], delimiter="\t"),
    "index.csv": written([("", "caption", "Image Name"), *((k, t, n) for k, (n, t) in enumerate(ROWS))]),
    "counted.csv": written([(name, k % 2, caption) for k, (name, caption) in enumerate(ROWS)]),
    "lists.csv": 'raw,filename\n"[""Two men , one in red , wave ."", ""A \\""stop\\"" sign .""]",k1.jpg\n'
    '"[""A cat ."", ""Dogs run | jump .""]",k2.JPEG\n',
}


@pytest.fixture
def pictures(tmp_path):
    for name in {name for name, _ in ROWS}:
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    return tmp_path


@pytest.mark.parametrize("name", list(TABLES))
@pytest.mark.filterwarnings("error")
def test_captions_and_pairs_of_every_format(pictures, name):
    path = pictures / f"{name}.gz"
    path.write_bytes(gzip.compress(TABLES[name].encode()))
    assert read_captions(str(path)) == CAPTIONS
    pairs = load_pairs(str(path))
    assert pairs.ids == ["k1.jpg", "k2.JPEG"]
    assert pairs.captions == PAIRS
    ids, _ = read_caption_rows(CaptionSource(str(path)))
    assert ids == ["k1.jpg#0", "k1.jpg#1", "k2.JPEG#0", "k2.JPEG#1"]


def test_columns_of_other_names(pictures):
    rows = [("caption", "mine", "photo"), *(("-", caption, name) for name, caption in ROWS)]
    (pictures / "a.csv").write_text(written(rows))
    path = str(pictures / "a.csv")
    assert read_captions(CaptionSource(path, column="mine")) == CAPTIONS
    assert load_pairs(PairSource(path, image_column="photo", caption_column="mine")).captions == PAIRS
    with pytest.raises(DataError, match=r"no column 'absent'; its first line is 'caption,mine,photo'"):
        read_captions(CaptionSource(path, column="absent"))
    with pytest.raises(DataError, match=r"line 2: no image is named"):
        load_pairs(path)
    with pytest.raises(ConfigError, match=r"have image_columns \(and \.csv and \.tsv files\)"):
        load_pairs(PairSource(str(pictures / "a.json"), image_column="photo"))


def test_captions_alone_in_csv(tmp_path):
    (tmp_path / "a.csv").write_text(written([("id", "caption"), (1, "a, b"), (2, ""), (3, 'c "d"\ne')]))
    assert read_captions(str(tmp_path / "a.csv")) == ["a, b", 'c "d"\ne']
    (tmp_path / "b.csv").write_text("caption\na\nb\n")
    assert read_captions(str(tmp_path / "b.csv")) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ('image,caption\na.jpg,"Go !"\na.jpg,A dog .\n', ['"Go !"', "A dog ."]),
        ('image,caption\na.jpg,"Go" says a man .\na.jpg,x\n', ['"Go" says a man .', "x"]),
        ('image,caption\na.jpg,He says "hi, you" .\n', ['He says "hi, you" .']),
        ('image,caption\na.jpg,"Go\n', ['"Go']),
    ],
)
@pytest.mark.filterwarnings("error")
def test_quotes_that_are_part_of_captions_stay(tmp_path, text, captions):
    (tmp_path / "a.txt").write_text(text)
    assert read_captions(str(tmp_path / "a.txt")) == captions


def test_a_partly_quoted_file_is_read_literally_with_a_warning(tmp_path):
    (tmp_path / "a.txt").write_text('image,caption\na.jpg,"One, ""two"" ."\na.jpg,One, two .\n')
    with pytest.warns(UserWarning, match=r"1 captions .*, first in line 2, look like quoted CSV, but line 3"):
        assert read_captions(str(tmp_path / "a.txt")) == ['"One, ""two"" ."', "One, two ."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,one\nb.jpg,two\nthree\n", r"line 3: 'three' does not begin with an image's name"),
        ("one\na.jpg#0\ttwo\nb.jpg#0\tthree\n", r"line 1: 'one' does not begin with an image's name"),
        (
            "100026_69\tstart child end\n100027_70\tstart dog end\n",
            "with an id, such as the first, '100026",
        ),
        ("image,caption,caption\na.jpg,b,c", "two columns 'caption'"),
        ("image,caption\n1001,one\njust words\n", r"line 3: 'just words' has 1 fields where the first line"),
        ("caption,image\none, two,a.jpg\n", r"line 2: 'one, two,a\.jpg' has 3 fields where the first line"),
    ],
)
def test_ambiguous_files_are_refused(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_captions(str(tmp_path / "a.txt"))
    (tmp_path / "a.tsv").write_text("one\ttwo\n")
    with pytest.raises(DataError, match=r"no header with a caption column, and its first line 'one\\ttwo'"):
        read_captions(str(tmp_path / "a.tsv"))


def test_plain_captions_are_unchanged(tmp_path):
    captions = [
        "A dog, a cat | b",
        "2012 BMW M3 coupe",
        "IMG_100200.jpg",
        "caption; image",
        'a\tb "c"',
        "x, y",
    ] * 2
    (tmp_path / "a.txt").write_text("\n".join(captions))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_captions(str(tmp_path / "a.txt")) == captions


def test_names_that_leave_the_image_root_are_refused(pictures):
    (pictures / "a.csv").write_text("image,caption\nk1.jpg,a\n../k1.jpg,b\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3 names the file '\.\./k1\.jpg', which lies outside"):
        load_pairs(str(pictures / "a.csv"))
    assert read_captions(str(pictures / "a.csv")) == ["a", "b"]
