from __future__ import annotations

import datasets
import pytest

from xbt.data.huggingface import open_dataset

CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
---
"""


@pytest.fixture
def of_the_same_name(tmp_path):
    """Two directories with the same name and card, and different data."""
    made = []
    for number in (1, 2):
        directory = tmp_path / str(number) / "same"
        (directory / "data").mkdir(parents=True)
        (directory / "README.md").write_text(CARD)
        write(directory, number)
        made.append(directory)
    return made


def write(directory, number):
    rows = datasets.Dataset.from_dict({"a": [number] * 3})
    rows.to_parquet(directory / "data" / "train-00000-of-00001.parquet")


def test_a_directory_is_never_answered_from_anothers_cache(of_the_same_name):
    assert [open_dataset(f"hf:{path}")["a"][0] for path in of_the_same_name] == [1, 2]
    assert open_dataset(f"hf:{of_the_same_name[0]}")["a"][0] == 1


def test_changed_files_are_read_again(of_the_same_name):
    first = of_the_same_name[0]
    assert open_dataset(f"hf:{first}")["a"][0] == 1
    write(first, 7)
    assert open_dataset(f"hf:{first}")["a"][0] == 7
