"""Model cards: read back by huggingface_hub, their snippets run, and no path of this machine in them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hub.helpers import adapted
from huggingface_hub import ModelCard
from PIL import Image

from xbt.backbones import CompatibleBackbone, ImagePreprocessing, load_backbone
from xbt.compatible import CompatibleEncoder
from xbt.encoders import load_encoder
from xbt.encoders.configs import hub_repository
from xbt.errors import ConfigError
from xbt.evaluation.cells import Cell, RetrievalReport
from xbt.heads import OCAHead, make_head
from xbt.hub import CardData, SavedPartError, public_name
from xbt.projections import LinearProjection, QueryEnsemble, fit_projection
from xbt.projections.base import described_method
from xbt.projections.ensemble import Nlerp
from xbt.projections.fitting import METHODS
from xbt.space import EmbeddingSpace
from xbt.version import __version__


def cell(name, base):
    t2i, i2t = ({k: (base + k + shift) / 100 for k in (1, 5, 10)} for shift in (0, 7))
    return Cell(name, t2i, i2t, n_images=1000, n_texts=5000)


@pytest.fixture
def report():
    return RetrievalReport([cell("old/old", 40), cell("new/old", 50), cell("new/new", 60)])


def snippet(card):
    return re.search(r"```python\n(.*?)```", card, re.S)[1]


def run_snippet(card):
    names = {}
    exec(compile(snippet(card), "README.md", "exec"), names)
    return names


def test_the_card_reads_back_with_its_results(hub, projection, report, tmp_path):
    data = CardData(
        report=report,
        evaluated_on="nlphuji/flickr30k",
        license="mit",
        datasets=["org/captions"],
        tags=["retail"],
    )
    projection.push_to_hub("org/p", card=data)
    card = ModelCard.load("org/p")
    found = card.data
    assert (found.library_name, found.license, found.datasets) == ("xbt", "mit", ["org/captions"])
    assert found.base_model == "org/new-clip"
    assert found.base_model_relation == "adapter"
    assert {"xbt", "backward-compatible", "projection", "retail"} <= set(found.tags)
    assert found.model_name == "p"
    assert len(found.eval_results) == 3 * 2 * 3
    one = {each.metric_name: each for each in found.eval_results}["new/old I2T R@5"]
    assert one.metric_value == report.cell("new/old").i2t[5]
    assert (one.task_type, one.metric_type) == ("image-to-text-retrieval", "recall_at_5")
    assert (one.dataset_type, one.dataset_name) == ("nlphuji/flickr30k", "nlphuji/flickr30k")
    assert "| new/old | 51.0 | 55.0 | 60.0 | 58.0 | 62.0 | 67.0 |" in card.text
    assert "1,000 images and 5,000 texts of nlphuji/flickr30k" in card.text
    assert f"xbt {__version__}" in card.text
    assert "`transformers:org/old-clip`" in card.text


def test_a_report_as_object_dictionary_and_file_gives_one_card(projection, report, tmp_path):
    file = tmp_path / "retrieval.json"
    file.write_text(json.dumps(report.to_dict()))
    cards = {
        str(projection.generate_model_card(CardData(report=each)))
        for each in (report, report.to_dict(), file, str(file))
    }
    assert len(cards) == 1


def test_without_results_and_licence_nothing_is_claimed(projection, tmp_path):
    projection.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "model-index" not in card.content
    assert "Nothing was measured" in card.text
    assert "%" not in card.text


@pytest.mark.parametrize(
    "bad",
    [{}, {"cells": []}, {"cells": [{"name": "old/old"}]}, {"cells": "x"},
     {"cells": [{"name": "a", "n_images": 1, "n_texts": 1, "T2I": {"R@1": 40}, "I2T": {"R@1": 0.1}}]}],
)  # fmt: skip
def test_invalid_reports(projection, bad, tmp_path):
    with pytest.raises(ConfigError, match="is not a retrieval report"):
        projection.save_pretrained(tmp_path / "p", card=CardData(report=bad))
    assert not (tmp_path / "p").exists()  # nothing half-saved
    file = tmp_path / "retrieval.json"
    with pytest.raises(SavedPartError, match=r"retrieval\.json is missing"):
        projection.save_pretrained(tmp_path / "p", card=CardData(report=file))


def test_data_sets_have_hub_names(tmp_path):
    for name in ("/data/captions", "../x", "a b", str(tmp_path)):
        with pytest.raises(ConfigError, match="is not a data set of the Hub"):
            CardData(datasets=[name])


def test_snippets_run(hub, hosted, projection, tmp_path, monkeypatch):
    encoder = adapted(*hosted, tmp_path / "encoder")
    head = make_head("oca", {"old_dim": 6, "extra_dims": 2})
    model = CompatibleBackbone(load_backbone("small_resnet"), head, ImagePreprocessing(32))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("photo.jpg")
    for name, part in (
        ("projection", projection),
        ("encoder", encoder),
        ("backbone", model.eval()),
        ("ensemble", QueryEnsemble(8, {"I2T": Nlerp(0.3)})),
        ("head", OCAHead(6, 2)),
    ):
        part.push_to_hub(f"org/{name}")
        names = run_snippet(hub.files(f"org/{name}")["README.md"].decode())
        shapes = {key: tuple(value.shape) for key, value in names.items() if isinstance(value, torch.Tensor)}
        expected = {
            "projection": {"queries": (2, 8), "new_vectors": (2, 12)},
            "encoder": {"queries": (1, 12)},
            "backbone": {"vectors": (1, 8), "queries": (1, 6)},
            "ensemble": {"queries": (2, 8), "old": (2, 8), "new": (2, 8)},
            "head": {"vectors": (2, 8)},
        }[name]
        assert shapes == expected
        for key in ("queries", "vectors"):
            if key in names:
                assert torch.allclose(names[key].norm(dim=1), torch.ones(len(names[key])), atol=1e-5)


def test_the_card_of_an_encoder(hub, hosted, report, tmp_path):
    adapted(*hosted, tmp_path / "encoder").push_to_hub("org/e", card=CardData(report=report))
    card = ModelCard.load("org/e")
    assert card.data.base_model == "org/new-clip"
    assert card.data.base_model_relation == "adapter"
    assert "with a LoRA adapter" in card.text
    assert "orthogonal Procrustes problem" in card.text
    assert "arXiv 2106.09685" in card.text
    commits = {name: hub.repos[f"org/{name}"].refs["main"] for name in ("new-clip", "old-clip")}
    for name, commit in commits.items():
        assert f"`open_clip:hf-hub:org/{name}` | `{commit}`" in card.text


def everything(hub, repo):
    return {name: content.decode("utf-8", "replace") for name, content in hub.files(repo).items()}


def test_no_path_of_this_machine_is_pushed(hub, models, tmp_path):
    new, old = (f"open_clip:local-dir:{models / name}" for name in ("new-clip", "old-clip"))
    ensemble = QueryEnsemble(12, {"T2I": Nlerp(0.5), "I2T": Nlerp(0.5)})
    encoder = adapted(new, old, tmp_path / "encoder", ensemble)
    assert str(models) in (tmp_path / "encoder/config.json").read_text()  # here it is needed to load it
    assert str(models) not in (tmp_path / "encoder/README.md").read_text()  # a card is for others
    with pytest.warns(UserWarning, match="is a directory here and is not shared") as caught:
        encoder.push_to_hub("org/e")
    messages = [str(each.message) for each in caught if each.category is UserWarning]
    assert len(messages) == 2
    assert "'new-clip' is a directory here and is not shared" in messages[0]
    assert "must pass base=" in messages[0]
    assert "must pass old=" in messages[1]
    for name, content in everything(hub, "org/e").items():
        assert str(models) not in content, name
        assert str(tmp_path) not in content, name
    assert json.loads(hub.files("org/e")["config.json"])["base"] == "local:new-clip"
    with pytest.raises(SavedPartError, match="'new-clip', a directory of the machine"):
        CompatibleEncoder.from_pretrained("org/e")
    loaded = CompatibleEncoder.from_pretrained("org/e", base=new, old=old)
    texts = ["a large red circle"]
    expected = CompatibleEncoder.from_pretrained(tmp_path / "encoder").encode_texts(texts)
    assert torch.equal(loaded.encode_texts(texts), expected)
    assert loaded.space.same_as(load_encoder(old).space)
    # The snippet names the options that must be given.
    assert (
        'base="backend:its specification", old="backend:its specification"'
        in everything(hub, "org/e")["README.md"]
    )


def test_a_base_can_be_named_for_others(hub, hosted, models, tmp_path):
    new, old = (f"open_clip:local-dir:{models / name}" for name in ("new-clip", "old-clip"))
    encoder = adapted(new, old, tmp_path / "encoder")
    encoder.push_to_hub("org/e", card=CardData(base=hosted[0]))
    assert ModelCard.load("org/e").data.base_model == "org/new-clip"
    pulled = CompatibleEncoder.from_pretrained("org/e")
    assert pulled.new.name == hosted[0]
    assert torch.equal(pulled.encode_texts(["a red star"]), encoder.encode_texts(["a red star"]))


def test_paths_in_a_projections_spaces_and_a_backbones_name(hub, models, tmp_path):
    spec = f"open_clip:local-dir:{models / 'new-clip'}"
    projection = LinearProjection(12, 8)
    projection.set_spaces(EmbeddingSpace(f"clip:{spec}+oca", 12), EmbeddingSpace("transformers:/data/old", 8))
    projection.push_to_hub("org/p")
    backbone = load_backbone(f"clip:{spec}")
    CompatibleBackbone(backbone, make_head("oca", {"old_dim": 8, "extra_dims": 2}), backbone.preprocessing,
                       old_space=EmbeddingSpace("/data/old", 8)).eval().push_to_hub("org/b")  # fmt: skip
    for repo in ("org/p", "org/b"):
        for name, content in everything(hub, repo).items():
            assert str(models) not in content, name
            assert "/data/old" not in content, name
    config = json.loads(hub.files("org/p")["config.json"])
    assert config["new_space"]["model"] == "clip:local:new-clip+oca"
    assert config["old_space"]["model"] == "local:old"
    assert CompatibleBackbone.from_pretrained("org/b").backbone.spec == "clip:local:new-clip"


@pytest.mark.parametrize(
    ("spec", "public"),
    [
        ("open_clip:ViT-B-32-quickgelu/openai", None),
        ("open_clip:hf-hub:org/model@v1", None),
        ("transformers:openai/clip-vit-large-patch14", None),
        ("transformers:openai/clip@3d74acf", None),
        ("timm:resnet18+oca", None),
        ("small_resnet", None),
        ("open_clip:local-dir:/data/me/clip", "local:clip"),
        ("open_clip:local-dir:runs/new/model/", "local:model"),
        ("open_clip:ViT-B-32//srv/weights.pt", "local:weights.pt"),
        ("open_clip:ViT-B-32/weights.safetensors", "local:weights.safetensors"),
        ("transformers:/data/me/clip", "local:clip"),
        ("transformers:~/clip", "local:clip"),
        ("transformers:../clip", "local:clip"),
        ("transformers:runs/a/b", "local:b"),
        (r"transformers:C:\models\clip", "local:clip"),
        ("clip:transformers:/data/me/clip", "clip:local:clip"),
        ("/data/me/clip", "local:clip"),
    ],
)
def test_public_names(spec, public):
    assert public_name(spec) == (public or spec)
    assert public_name(public_name(spec)) == public_name(spec)


@pytest.mark.parametrize(
    ("spec", "repository"),
    [
        ("transformers:openai/clip-vit-large-patch14@main", "openai/clip-vit-large-patch14"),
        ("open_clip:hf-hub:laion/model", "laion/model"),
        ("open_clip:ViT-B-32-quickgelu/openai", "timm/vit_base_patch32_clip_224.openai"),
        ("open_clip:ViT-B-32/no-such-tag", None),
        ("open_clip:local-dir:/data/x", None),
        ("local:x", None),
        ("some model", None),
    ],
)
def test_repositories_of_specifications(spec, repository):
    assert hub_repository(spec) == repository


def test_a_card_of_the_user_is_kept(projection, report, tmp_path):
    projection.save_pretrained(tmp_path)
    page = tmp_path / "README.md"
    projection.save_pretrained(tmp_path, card=CardData(report=report))
    assert "new/old" in page.read_text()  # a card by xbt is replaced
    page.write_text("# mine\n")
    with pytest.warns(UserWarning, match=r"README\.md was not written by xbt and is kept as it is"):
        projection.save_pretrained(tmp_path, card=CardData(report=report))
    projection.save_pretrained(tmp_path)
    assert page.read_text() == "# mine\n"


def test_every_method_names_its_paper():
    vectors = torch.nn.functional.normalize(torch.randn(40, 6), dim=1)
    for method in METHODS:
        assert "not recorded" not in described_method(method, "linear")
    fitted = fit_projection(vectors, vectors[:, :4], method="ridge")
    assert fitted.method == "ridge"
    assert "Hoerl & Kennard" in str(fitted.generate_model_card())
    assert "was not recorded" in described_method(None, "linear")


def test_names_cannot_break_out_of_the_page(tmp_path):
    projection = LinearProjection(4, 3)
    projection.set_spaces(EmbeddingSpace("a`b\n```python\nboom()", 4), EmbeddingSpace("---\nlicense: x", 3))
    projection.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None
    assert card.text.count("```") == 2
    assert "boom()" not in snippet(card.text)


def test_labels_of_several_lines_and_with_bars_stay_in_their_place(projection):
    strange = "May |\n# Free\n\n| a | b |\n```\n<!-- end"
    cells = [cell("old/old", 30), cell(strange, 40), cell("a\\|b", 50)]
    card = projection.generate_model_card(CardData(report=RetrievalReport(cells), evaluated_on=strange))
    assert len(re.findall("^# ", card.text, re.M)) == 1  # the title
    assert card.text.count("\n```") == 2  # the snippet's
    results = card.text.partition("## Results")[2].partition("## Method")[0].strip().splitlines()
    assert len(results) == 2 + 5  # a paragraph, and a table of three cells
    for row in results[2:]:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 8
    assert not re.search(r"[^\\]<!-- end", "\n".join(results))
    assert card.data.eval_results[0].dataset_name == "May | # Free | a | b | ``` <!-- end"


def test_a_space_with_a_bar_in_its_name_stays_in_its_row():
    made = LinearProjection(12, 8)
    made.set_spaces(EmbeddingSpace("a|b\n| c", 12, probe=torch.randn(20, 12)), None)
    spaces = made.generate_model_card().text.partition("## Spaces")[2].partition("## Limits")[0]
    assert r"| new | `a\|b \| c` | not known | 12 |" in spaces
