from __future__ import annotations

import sys
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import yaml
from fuzzing import damaged, damaged_json, dump, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st

from xbt.config import (
    config_to_yaml,
    flatten,
    make_parser,
    parse_config,
    parse_flags,
    run_guarded,
    run_recipe,
)
from xbt.data import CaptionSource, PairSource
from xbt.data.image_collection import ImageCollection
from xbt.errors import ConfigError, DataError


@dataclass
class Inner:
    """Inner settings."""

    rank: int = 8
    """Rank of the update."""

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"inner.rank must be at least 1, got {self.rank}")


@dataclass
class Settings:
    """Settings of a test.

    Attributes that nobody needs.
    """

    source: str
    """Where from."""
    inner: Inner = field(default_factory=Inner)
    """The inner ones."""
    labels: dict[str, str] = field(default_factory=dict)
    targets: str | list[str] | None = None


@dataclass
class Sources:
    """Sources of all kinds."""

    captions: CaptionSource | None = None
    images: ImageCollection | None = None
    pairs: PairSource | None = None
    options: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    output_dir: str = "run"


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module in the working directory that leaves a file when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trapdoor.py").write_text("open('imported', 'w').close()\nclass txt: pass\n")
    yield tmp_path
    assert not (tmp_path / "imported").exists()
    assert "trapdoor" not in sys.modules


def test_a_plain_string_is_a_source(trap):
    for name, kind in (("captions", CaptionSource), ("images", ImageCollection), ("pairs", PairSource)):
        (trap / "a.yaml").write_text(f"{name}: trapdoor.txt\n")
        wanted = Sources(**{name: kind("trapdoor.txt")})
        for flags in ([f"--{name}", "trapdoor.txt"], [f"--{name}=trapdoor.txt"], ["--config", "a.yaml"]):
            assert parse_config(Sources, flags) == wanted
        limited = parse_config(Sources, ["--config", "a.yaml", f"--{name}.limit", "3"])
        assert getattr(limited, name) == kind("trapdoor.txt", limit=3)


@pytest.mark.parametrize(
    "text",
    [
        "captions: {class_path: trapdoor.txt}",
        "captions: {source: a, class_path: trapdoor.txt}",
        "captions.class_path: trapdoor.txt",
        "class_path: trapdoor.txt",
        "inner: {class_path: trapdoor.txt, init_args: {}}",
        "options: {a: {class_path: trapdoor.txt}}",
        "options: {a: [{b: {class_path: trapdoor.txt}}]}",
        'options: {a: {"class\\x5fpath": trapdoor.txt}}',
    ],
)
def test_no_class_path_is_imported_from_yaml(trap, text):
    (trap / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml: .*class_path names Python code"):
        parse_config(Sources, ["--config", "a.yaml"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--captions.class_path", "trapdoor.txt"],
        ["--captions", "{class_path: trapdoor.txt}"],
        ["--captions={class_path: trapdoor.txt}"],
        ["--options.a", "{class_path: trapdoor.txt, init_args: {}}"],
        ["--options", '{a: [{"class\\x5fpath": trapdoor.txt}]}'],
        ["--inner.class_path=trapdoor.txt"],
    ],
)
def test_no_class_path_is_imported_from_flags(trap, flags):
    with pytest.raises(ConfigError, match="class_path names Python code, which xbt never imports"):
        parse_config(Sources, flags)


@pytest.mark.parametrize("flags", [["--inner", "trapdoor.txt"], ["--captions.help", "trapdoor.txt"]])
def test_nothing_is_imported_for_other_strings(trap, flags, capsys):
    with pytest.raises((ConfigError, SystemExit)):
        parse_config(Sources, flags)


@pytest.mark.parametrize("text", ["a: &a [*a]", "- a", "b", "[" * 5_000, "a: " + "b" * 2**20])
def test_odd_yaml_is_one_sentence(tmp_path, text):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.yaml .*; (write|give|fix)"):
        parse_config(Sources, ["--config", str(tmp_path / "odd.yaml")])


def test_strings_in_yaml_stay_strings(tmp_path):
    (tmp_path / "a.yaml").write_text("captions: {source: '1e-3', column: 'no'}\noptions: {a: 1e-3}")
    read = parse_config(Sources, ["--config", str(tmp_path / "a.yaml")])
    assert read.captions == CaptionSource("1e-3", column="no")
    assert read.options == {"a": 0.001}


@pytest.mark.parametrize("url", ["s3://bucket/run", "memory://run", "simplecache::s3://b", "s3:/b"])
def test_a_url_as_output_is_refused(url):
    with pytest.raises(ConfigError, match=r"--output_dir .* is a URL, but xbt writes only to local folders"):
        parse_config(Sources, ["--output_dir", url])


@dataclass
class Few:
    """One setting of each kind."""

    captions: CaptionSource | None = None
    options: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    targets: str | list[str] | None = None


_EXAMPLE = {
    "captions": {"source": "a.txt", "limit": 3},
    "targets": ["a", "b"],
    "options": {"noise": 0.3, "names": ["a", "b"]},
    "inner": {"rank": 4},
}
_FEW = make_parser(Few)  # which takes longer than parsing


@fuzzed
@given(data=st.one_of(damaged(yaml.safe_dump(_EXAMPLE).encode()), damaged_json(_EXAMPLE).map(dump)))
def test_fuzz_yaml_configs(data, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(data)
    loads_or_refuses(lambda: parse_flags(_FEW, Few, ["--config", str(file)]), len(data))


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("source: a\ninner:\n  rank: 4\n")
    assert parse_config(Settings, ["--config", str(file)]) == Settings("a", Inner(4))
    assert parse_config(Settings, ["--config", str(file), "--inner.rank", "2"]) == Settings("a", Inner(2))
    assert parse_config(Settings, ["--inner.rank", "2", "--config", str(file)]) == Settings("a", Inner(2))
    assert parse_config(Settings, ["--inner.rank=2", f"--config={file}"]) == Settings("a", Inner(2))
    later = tmp_path / "later.yaml"
    later.write_text("source: b\n")
    given = ["--inner.rank", "2", "--config", str(file), "--config", str(later)]
    assert parse_config(Settings, given) == Settings("b", Inner(2))


def test_dicts_and_unions(tmp_path):
    parsed = parse_config(Settings, ["--source", "a", "--labels.one", "x", "--targets", "[p, q]"])
    assert parsed == Settings("a", labels={"one": "x"}, targets=["p", "q"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["source", "required"]),
        (["--source", "a", "--inner.rnk", "3"], ["--inner.rnk"]),
        (["--source", "a", "--sorce", "b"], ["--sorce"]),
        (["--sourc", "a"], ["--sourc"]),
        (["--source", "a", "--inner.ran", "3"], ["--inner.ran"]),
        (["--source", "a", "--inner.rank", "many"], ["inner.rank", "int", "many"]),
        (["--source", "a", "--inner.rank", "0"], ["inner.rank must be at least 1, got 0"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "not exist"]),
    ],
)
def test_errors_name_key_and_value(flags, words):
    with pytest.raises(ConfigError) as caught:
        parse_config(Settings, flags)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["source: a\ninner:\n  rnk: 3\n", "source: a\nsorce: b\n"])
def test_unknown_key_in_yaml(tmp_path, text):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"(rnk|sorce).*settings\.yaml"):
        parse_config(Settings, ["--config", str(file)])


def test_malformed_yaml(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("source: [")
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        parse_config(Settings, [f"--config={file}"])


def test_yaml_record_reads_back(tmp_path):
    settings = Settings("ä: #", Inner(3), {"one": "x"}, ["p"])
    file = tmp_path / "settings.yaml"
    file.write_text(config_to_yaml(settings), encoding="utf-8")
    assert parse_config(Settings, ["--config", str(file)]) == settings
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["inner"] == {"rank": 3}


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}


def test_only_dataclass_instances_are_configs():
    with pytest.raises(ConfigError, match="dataclass instance"):
        config_to_yaml(Settings)


def test_arguments_beside_the_config():
    parser = make_parser(Settings)
    parser.add_argument("--json", action="store_true")
    config, others = parse_flags(parser, Settings, ["--json", "--source", "a"])
    assert config == Settings("a")
    assert others["json"] is True
    with pytest.raises(ConfigError, match="--sorce"):
        parse_flags(parser, Settings, ["--sorce", "a"])


def test_help_is_grouped_and_keeps_the_lines_of_its_example():
    parser = make_parser(Settings, "try", "try [WORD]", "example:\n  try a \\\n    --inner.rank 3")
    shown = parser.format_help()
    assert shown.startswith("usage: try [WORD]\n\nSettings of a test.\n")
    assert shown.endswith("example:\n  try a \\\n    --inner.rank 3\n")
    settings, inner = shown.index("\nsettings:\n"), shown.index("\nThe inner ones:\n")
    assert settings < shown.index("--source") < inner < shown.index("--inner.rank", inner)


def test_guarded_work(capsys, monkeypatch):
    """The status is the work's; an error is printed once, by the main process."""
    errors = []
    assert run_guarded(lambda: 1, "try") == 1

    def fails():
        raise DataError("empty")

    assert run_guarded(fails, "try", lambda error, status: errors.append((str(error), status))) == 2
    assert capsys.readouterr().err == "try: error: empty\n"
    monkeypatch.setenv("RANK", "1")
    assert run_guarded(fails, "try", lambda error, status: errors.append((str(error), status))) == 2
    assert capsys.readouterr().err == ""
    assert errors == [("empty", 2)]


def test_help_shows_the_attribute_docstrings(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        run_recipe(lambda settings: None, Settings)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "Rank of the update." in shown
    assert "Where from." in shown


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (DataError("corpus is empty"), 2, "recipe.py: error: corpus is empty"),
        (FileNotFoundError("gone.txt"), 2, "gone.txt"),
        (KeyboardInterrupt(), 130, "the same command continues"),
    ],
)
def test_recipe_errors_are_one_line_and_a_status(capsys, monkeypatch, error, code, shown):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--source", "a"])

    def main(settings):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_recipe(main, Settings)
    assert caught.value.code == code
    stderr = capsys.readouterr().err
    assert shown in stderr
    assert stderr.count("\n") == 1


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--source", "a"])

    def main(settings):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_recipe(main, Settings)


@pytest.mark.parametrize("error", [None, DataError("corpus is empty")])
def test_the_process_group_is_ended(monkeypatch, tmp_path, error):
    """Left to the interpreter, gloo's threads abort the process ("terminate called …") after all is done."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--source", "a"])

    def main(settings):
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        if error is not None:
            raise error

    with pytest.raises(SystemExit) if error else nullcontext():
        run_recipe(main, Settings)
    assert not torch.distributed.is_initialized()


def test_a_process_group_that_waits_for_an_exited_process_is_left(monkeypatch):
    """As older versions of torch do."""
    asked = threading.Event()

    def destroy():
        asked.set()
        threading.Event().wait()

    monkeypatch.setattr(sys, "argv", ["recipe.py", "--source", "a"])
    monkeypatch.setattr("xbt.processes._LEAVE_TIMEOUT", 1.0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", destroy)
    run_recipe(lambda settings: None, Settings)
    assert asked.is_set()
