from __future__ import annotations

import gzip
import json
import warnings

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import damaged, damaged_json, dump, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st

from xbt.data import CaptionSource, make_scenes, read_captions
from xbt.data.captions import read_caption_rows
from xbt.errors import ConfigError, DataError

CAPTIONS = ["A dog runs .", "Ein Hund läuft.", "two cats, \u2028one line"]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(path, text):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(text.encode())
    return str(path)


def karpathy(*splits_and_sentences):
    images = [
        {
            "sentids": list(range(len(sentences))),
            "imgid": i,
            "sentences": [
                {"tokens": raw.lower().split(), "raw": raw, "imgid": i, "sentid": k}
                for k, raw in enumerate(sentences)
            ],
            "split": split,
            "filename": f"{i}.jpg",
        }
        for i, (split, sentences) in enumerate(splits_and_sentences)
    ]
    return json.dumps({"images": images, "dataset": "flickr8k"})


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_file(tmp_path, suffix):
    text = "\ufeff" + "\r\n".join([f"  {CAPTIONS[0]} ", "", CAPTIONS[1], "   ", CAPTIONS[2]]) + "\r\n"
    assert read_captions(write(tmp_path / f"c.txt{suffix}", text)) == CAPTIONS


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_jsonl_with_strings_and_lists(tmp_path, suffix):
    rows = [{"text": CAPTIONS[0], "n": 1}, {"text": [CAPTIONS[1], " ", CAPTIONS[2]]}, {"text": None}]
    path = write(tmp_path / f"c.jsonl{suffix}", "\n\n".join(map(json.dumps, rows)) + "\n")
    assert read_captions(CaptionSource(path, column="text")) == CAPTIONS


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_karpathy_uses_raw_sentences_of_the_split(tmp_path, suffix):
    content = karpathy(
        ("train", ["A b.", "C d."]), ("restval", ["E f."]), ("val", ["G h."]), ("test", ["I j."])
    )
    path = write(tmp_path / f"dataset_coco.json{suffix}", content)
    assert read_captions(CaptionSource(path, split="train")) == ["A b.", "C d."]
    assert read_captions(CaptionSource(path, split="train+restval")) == ["A b.", "C d.", "E f."]
    assert len(read_captions(path)) == 5
    with pytest.raises(DataError, match=r"no split 'dev'; it has restval, test, train, val"):
        read_captions(CaptionSource(path, split="dev"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_official_coco_captions(tmp_path, suffix):
    content = {
        "info": {"year": 2017},
        "licenses": [],
        "images": [{"id": 7, "file_name": "000000000007.jpg"}],
        "annotations": [{"image_id": 7, "id": i, "caption": caption} for i, caption in enumerate(CAPTIONS)],
    }
    path = write(tmp_path / f"captions_val2017.json{suffix}", json.dumps(content))
    assert read_captions(path) == CAPTIONS
    with pytest.raises(ConfigError, match="no splits"):
        read_captions(CaptionSource(path, split="val"))


def test_parquet_with_strings_and_lists(tmp_path):
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"caption": CAPTIONS, "lists": [CAPTIONS[:1], None, CAPTIONS[1:]]}), path)
    assert read_captions(str(path)) == CAPTIONS
    assert read_captions(CaptionSource(str(path), column="lists")) == CAPTIONS
    with pytest.raises(DataError, match=r"no column 'text'; it has caption, lists"):
        read_captions(CaptionSource(str(path), column="text"))


def test_parquet_errors(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_captions(str(tmp_path / "none.parquet"))
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_captions(write(tmp_path / "fake.parquet", "PAR1 but no more"))
    pq.write_table(pa.table({"caption": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="is empty"):
        read_captions(str(tmp_path / "empty.parquet"))
    pq.write_table(pa.table({"caption": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(DataError, match=r"row 0: a int \('1'\) where a caption should be"):
        read_captions(str(tmp_path / "numbers.parquet"))


def test_hub_directories(tmp_path):
    saved = datasets.Dataset.from_dict({"caption": CAPTIONS, "lists": [[c, c + "!"] for c in CAPTIONS]})
    saved.save_to_disk(tmp_path / "saved")
    assert read_captions(f"hf:{tmp_path / 'saved'}") == CAPTIONS
    assert len(read_captions(CaptionSource(f"hf:{tmp_path / 'saved'}", column="lists"))) == 6
    folder = tmp_path / "lines"
    folder.mkdir()
    for split in ("train", "test"):
        write(
            folder / f"{split}.jsonl", "".join(json.dumps({"caption": f"{split} {i}"}) + "\n" for i in "ab")
        )
    assert read_captions(CaptionSource(f"hf:{folder}", split="test")) == ["test a", "test b"]
    with pytest.raises(DataError, match=r"has the splits train, test; choose one"):
        read_captions(f"hf:{folder}")
    with pytest.raises(DataError, match=r"no split 'val'; it has train, test"):
        read_captions(CaptionSource(f"hf:{folder}", split="val"))


def test_hub_dataset_dict_with_splits(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"caption": [name]}) for name in ("train", "val")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    assert read_captions(CaptionSource(f"hf:{tmp_path}", split="val")) == ["val"]
    with pytest.raises(DataError, match="no column 'text'; it has caption"):
        read_captions(CaptionSource(f"hf:{tmp_path}", column="text", split="val"))


def test_hub_errors(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_captions(f"hf:{tmp_path / 'nowhere'}")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="cannot be opened"):
        read_captions(f"hf:{tmp_path / 'void'}")
    with pytest.raises(DataError, match="is a file; leave out hf:"):
        read_captions("hf:" + write(tmp_path / "a.txt", "a"))
    datasets.Dataset.from_dict({"caption": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="no splits, but 'val'"):
        read_captions(CaptionSource(f"hf:{tmp_path / 'saved'}", split="val"))


def test_scenes():
    captions = read_captions(CaptionSource("scenes", limit=20, seed=3, split="val"))
    pairs = make_scenes(20, seed=3, split="val")
    assert captions == [texts[0] for texts in pairs.captions]


def test_limit_is_a_seeded_subset_in_order(tmp_path):
    path = write(tmp_path / "c.txt", "\n".join(f"{i:03d}" for i in range(100)))
    some = read_captions(CaptionSource(path, limit=10))
    assert len(set(some)) == 10
    assert some == sorted(some)
    assert some == read_captions(CaptionSource(path, limit=10))
    assert some != read_captions(CaptionSource(path, limit=10, seed=1))
    assert len(read_captions(CaptionSource(path, limit=1000))) == 100


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"a\.txt is empty"),
        ("a.txt.gz", "", r"a\.txt\.gz is empty"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.jsonl", "\n\n", r"a\.jsonl is empty"),
        ("a.txt", " \n\t\n", "holds 2 captions, but all are only spaces"),
        ("a.jsonl", '{"caption": " "}', "holds 1 captions, but all are only spaces"),
        ("a.jsonl", '{"caption": "x"}\n{"caption":', r"a\.jsonl, line 2: not valid JSON"),
        (
            "a.jsonl",
            '{"caption": "x"}\n\n{"text": "y", "n": 1}',
            r"line 3 has no column 'caption'; it has text, n",
        ),
        ("a.jsonl", '["x"]', "line 1: not a JSON object"),
        ("a.jsonl", '{"caption": {"x": 1}}', "line 1, column 'caption': a dict"),
        ("a.json", '{"images":\n [}', r"a\.json, line 2: not valid JSON"),
        ("a.json", "[" * 100_000, r"a\.json: not valid JSON"),
        ("a.json", '{"rows": []}', "neither a Karpathy split file"),
        ("a.json", '[{"caption": "x"}]', "neither a Karpathy split file"),
        ("a.json", '{"annotations": []}', "is empty"),
        ("a.json", '{"annotations": [{"caption": "x"}, {"id": 1}]}', "record 1 of 'annotations' lacks"),
        ("a.json", '{"images": []}', "is empty"),
        ("a.xml", "x", "its suffix must be"),
        ("a", "x", "its suffix must be"),
        ("a.parquet.gz", "x", "its suffix must be"),
    ],
)
def test_bad_content(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_captions(write(tmp_path / name, text))


def test_bad_bytes(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\n\xe4rgerlich\n")
    with pytest.raises(DataError, match=r"latin\.txt, line 2: not UTF-8"):
        read_captions(str(path))
    path = tmp_path / "plain.txt.gz"
    path.write_bytes(b"a caption\n")
    with pytest.raises(DataError, match="not a gzip file"):
        read_captions(str(path))
    path.write_bytes(gzip.compress(b"a caption\n" * 100)[:-12])
    with pytest.raises(DataError, match="truncated or damaged gzip"):
        read_captions(str(path))


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        read_captions(str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="is a directory"):
        read_captions(str(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "scenes"])
def test_options_that_do_not_apply(tmp_path, name):
    path = name if name == "scenes" else write(tmp_path / name, '{"caption": "x"}')
    with pytest.raises(ConfigError, match="only hf: sources have subsets"):
        read_captions(CaptionSource(path, subset="en"))
    with pytest.raises(ConfigError, match=r"no splits|no split 'dev'"):
        read_captions(CaptionSource(path, split="dev"))


def test_values_are_checked_at_once():
    with pytest.raises(ConfigError, match="limit is 0"):
        CaptionSource("scenes", limit=0)
    with pytest.raises(ConfigError, match="source is empty"):
        CaptionSource(" ")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
def test_captions_that_are_not_unicode_are_left_out_with_one_warning(tmp_path, suffix):
    broken = ["A dog \ud83d", "\ude00", "a\udc80"]
    captions = [*CAPTIONS[:2], *broken]
    path = tmp_path / f"c.{suffix}"
    if suffix in ("txt", "csv"):  # these can hold them only as JSON
        lists = json.dumps(captions).replace('"', '""')
        path.write_text(f'image,caption\na.jpg,"{lists}"\n')
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in captions))
    else:
        path.write_text(karpathy(("test", captions)))
    with pytest.warns(UserWarning, match="^3 of the 5 captions of .* are not valid Unicode") as caught:
        assert read_captions(str(path)) == CAPTIONS[:2]
    assert len(caught) == 1
    assert len(read_caption_rows(CaptionSource(str(path)))[1]) == 5
    with pytest.warns(UserWarning, match="valid Unicode"):
        assert len(read_captions(CaptionSource(str(path), limit=2))) == 2
    assert read_caption_rows(CaptionSource(str(path), limit=2))[1] == CAPTIONS[:2]


def test_source_without_a_unicode_caption_are_refused(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"caption": "\\ud83d"}\n{"caption": " "}\n')
    with pytest.raises(DataError, match="holds 2 captions, but all are only spaces or not valid Unicode"):
        read_captions(str(tmp_path / "c.jsonl"))


def test_broken_utf8_is_refused_with_its_line(tmp_path):
    for name in ("c.txt", "c.jsonl", "c.csv", "c.json"):
        (tmp_path / name).write_bytes(b'{"caption":"a"}\n{"caption":"b\xff"}\n')
        with pytest.raises(DataError, match=rf"{name}, line 2: not UTF-8"):
            read_captions(str(tmp_path / name))
    table = pa.table({"caption": ["a", "n\u00efve"]})
    pq.write_table(table, tmp_path / "whole.parquet", compression="none", use_dictionary=False)
    damage = (tmp_path / "whole.parquet").read_bytes().replace("\u00ef".encode(), b"\xff\xaf")
    (tmp_path / "c.parquet").write_bytes(damage)
    with pytest.raises(DataError, match=r"c\.parquet, row 1: not UTF-8"):
        read_captions(str(tmp_path / "c.parquet"))


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["caption", "caption"])
    pq.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(DataError, match="has two columns 'caption'; rename one"):
        read_captions(str(tmp_path / "c.parquet"))


def test_a_parquet_file_that_unpacks_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("xbt.data.files.FREE_UNPACKED", 1 << 20)
    blank = pa.array([" " * (1 << 20)] * 3)
    pq.write_table(
        pa.table({"caption": blank}), tmp_path / "c.parquet", compression="zstd", use_dictionary=False
    )
    with pytest.raises(DataError, match=r"unpacks to more than 1,048,576 bytes"):
        read_captions(str(tmp_path / "c.parquet"))


_RECORDS = {
    "Karpathy": json.loads(karpathy(("train", ["A b.", "C d."]), ("test", ["E f."]))),
    "COCO": {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": "8", "file_name": "8.jpg"}],
        "annotations": [
            {"image_id": 7, "id": 1, "caption": "A b."},
            {"image_id": "8", "caption": "C"},
        ],
    },
}
_TEXTS = {
    "txt": "\n".join(CAPTIONS).encode(),
    "jsonl": "\n".join(json.dumps({"caption": caption}) for caption in CAPTIONS).encode(),
    "csv": b'image,caption\na.jpg,"One, ""two"" ."\na.jpg,"[""x"", ""y""]"\nb.jpg,Three .\n',
    "token": b"a.jpg#0\tOne .\na.jpg#1\tTwo .\nb.jpg#0\tThree .\n",
    "tsv": b"filepath\ttitle\na.jpg\tOne .\nb.jpg\tTwo .\n",
}


def fuzz(path, data, read):
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loads_or_refuses(lambda: read(str(path)), len(data))


@pytest.mark.parametrize("kind", list(_TEXTS))
@fuzzed
@given(data=st.data())
def test_fuzz_caption_text(tmp_path_factory, kind, data):
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{kind}"
    fuzz(path, data.draw(damaged(_TEXTS[kind])), read_captions)


@pytest.mark.parametrize("kind", ["Karpathy", "COCO"])
@pytest.mark.parametrize("suffix", ["json", "json.gz"])
@fuzzed
@given(data=st.data())
def test_fuzz_caption_json(tmp_path_factory, kind, suffix, data):
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{suffix}"
    content = data.draw(damaged_json(_RECORDS[kind]).map(dump))
    if suffix == "json.gz":
        content = data.draw(damaged(gzip.compress(content)) | st.just(gzip.compress(content)))
    fuzz(path, content, read_captions)


@fuzzed
@given(rows=st.lists(damaged_json({"caption": ["A b.", {"raw": "C d."}]}).map(dump), min_size=1, max_size=4))
def test_fuzz_caption_lines(tmp_path_factory, rows):
    fuzz(tmp_path_factory.getbasetemp() / "fuzzed.jsonl", b"\n".join(rows), read_captions)


@pytest.mark.parametrize("count", [1, 2])
def test_a_parquet_file_whose_names_are_no_text(tmp_path, count):
    path = tmp_path / "captions.parquet"
    pq.write_table(pa.table({"caption": ["a dog"]}), path)
    pieces = path.read_bytes().split(b"caption")
    path.write_bytes(b"caption".join(pieces[:count]) + b"capt\xe5on" + b"caption".join(pieces[count:]))
    with pytest.raises(DataError, match=r"not a readable parquet|no column"):
        read_captions(CaptionSource(str(path)))


@fuzzed
@given(data=st.data())
def test_fuzz_caption_parquet(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "whole.parquet"
    if not path.exists():
        table = pa.table({"caption": ["A b.", "na\u00efve", None], "lists": [["a"], [], ["b", "c"]]})
        pq.write_table(table, path, compression="none")
    content = data.draw(damaged(path.read_bytes()))
    column = data.draw(st.sampled_from(["caption", "lists"]))
    target = path.with_name("fuzzed.parquet")
    fuzz(target, content, lambda name: read_captions(CaptionSource(name, column=column)))
