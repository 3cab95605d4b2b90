"""Any evaluate_pair_*.yaml goes with any evaluate_on_*.yaml, and what they expect can be true."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import open_clip
import pytest

from xbt.config import parse_config
from xbt.evaluation import PROTOCOLS
from xbt.evaluation.job import EvaluationConfig

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
PAIRS = sorted(CONFIGS.glob("evaluate_pair_*.yaml"))
DATA = sorted(CONFIGS.glob("evaluate_on_*.yaml"))
COMBINED = list(product(PAIRS, DATA))


def load(pair: Path, data: Path, *flags: str) -> EvaluationConfig:
    given = ["--config", str(pair), "--config", str(data), "--output_dir", "out", *flags]
    return parse_config(EvaluationConfig, given)


def applying(config: EvaluationConfig) -> list[str]:
    return [each.cell for each in config.expected if each.applies(config.old, config.new)]


def test_there_is_a_file_for_every_protocol():
    assert {path.stem.removeprefix("evaluate_on_") for path in DATA} == set(PROTOCOLS)
    assert len(PAIRS) == 4


@pytest.mark.parametrize(
    ("pair", "data"), COMBINED, ids=[f"{a.stem[14:]}-{b.stem[12:]}" for a, b in COMBINED]
)
def test_pair_and_data(pair, data):
    config = load(pair, data)
    assert config.protocol == data.stem.removeprefix("evaluate_on_")
    for spec in (config.old, config.new):
        arch, tag = spec.removeprefix("open_clip:").split("/")
        assert (arch, tag) in open_clip.list_pretrained()
        assert bool(open_clip.get_model_config(arch).get("quick_gelu")) is (tag == "openai")
    cells = applying(config)
    assert len(set(cells)) == len(cells)
    if config.protocol != "coco_1k":
        assert "old/old" in cells
    for each in config.expected:
        assert each.source
        for values in (each.T2I, each.I2T):
            assert list(values.values()) == sorted(values.values())


@pytest.mark.parametrize("pair", ["b32_l14", "b32_h14", "b32_siglip2"])
def test_what_was_published(pair):
    path = CONFIGS / f"evaluate_pair_{pair}.yaml"
    for name in ("flickr30k_all", "coco_2014_val", "nocaps_val"):
        config = load(path, CONFIGS / f"evaluate_on_{name}.yaml")
        assert applying(config) == ["old/old", "new/new", "new/old (Procrustes)"]
    for name in ("flickr30k_1k", "coco_5k"):
        config = load(path, CONFIGS / f"evaluate_on_{name}.yaml")
        assert applying(config) == (["old/old"] if pair == "b32_siglip2" else ["old/old", "new/new"])


def test_the_same_model_under_another_name_and_flags_that_come_later():
    new = "transformers:openai/clip-vit-large-patch14"
    flags = ["--new", new, "--upgraded", '{"Procrustes": "saved"}', "--pairs.image_root", "elsewhere"]
    config = load(CONFIGS / "evaluate_pair_b32_h14.yaml", CONFIGS / "evaluate_on_coco_5k.yaml", *flags)
    assert applying(config) == ["old/old", "new/new"]
    assert (config.upgraded, config.pairs.image_root) == ({"Procrustes": "saved"}, "elsewhere")
    assert config.pairs.split == "test"
    hub = ["--pairs.source", "hf://datasets/clip-benchmark/wds_mscoco_captions", "--pairs.image_root", "null"]
    config = load(CONFIGS / "evaluate_pair_b32_h14.yaml", CONFIGS / "evaluate_on_coco_5k.yaml", *hub)
    assert (config.pairs.kind, config.pairs.image_root) == ("tars", None)
    config.pairs.check_options()
