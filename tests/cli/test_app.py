"""The command line as such: its help, its errors, its streams and its exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from xbt.cli import CommandResult, app
from xbt.cli.app import COMMANDS, Command
from xbt.errors import DataError
from xbt.version import __version__

THERE = {each.name for each in COMMANDS}


@dataclass
class Settings:
    """Settings of a command that is made for a test."""

    source: str = "a"
    """Where from."""


def answer(settings):
    print("a job that prints")
    os.write(1, b"a library in C that prints\n")
    subprocess.run([sys.executable, "-c", "print('a child that prints')"], check=True)
    return CommandResult({"source": settings.source, "figure": float("nan")}, f"found {settings.source}", 1)


@pytest.fixture
def command(monkeypatch):
    """Install a function as the command ``try``."""

    def install(function, **options):
        monkeypatch.setattr(sys.modules[__name__], "job", function, raising=False)
        monkeypatch.setattr(
            app,
            "COMMANDS",
            (Command("try", "", f"{__name__}:Settings", f"{__name__}:job", "xbt try", **options),),
        )

    return install


def raising(error):
    def job(settings):
        raise error

    return job


def test_the_overview_lists_every_command_in_a_line(run):
    result = run("--help")
    assert result.status == 0
    for each in COMMANDS:
        assert any(line.split(maxsplit=len(each.name.split()))[:-1] == each.name.split()
                   and line.endswith(each.help) for line in result.out.splitlines())  # fmt: skip
    assert max(map(len, result.out.splitlines())) <= 100
    assert result.err == ""


def test_version(run):
    assert run("--version") == (0, f"xbt {__version__}\n", "")
    for words in (["--version", "--json"], ["--json", "--version"]):
        result = run(*words)
        assert (result.status, result.document, result.err) == (0, {"version": __version__}, "")


def test_without_a_word_the_overview_is_an_error(run):
    result = run()
    assert (result.status, result.out) == (2, "")
    assert "commands:" in result.err


@pytest.mark.parametrize(("words", "status"), [(["gallery"], 2), (["gallery", "--help"], 0)])
def test_the_group_of_gallery_commands(run, words, status):
    result = run(*words)
    assert result.status == status
    assert "gallery verify" in result.out
    assert "  embed" not in result.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embd"], "there is no command 'embd'; did you mean embed?"),
        (["gallery", "creat", "x"], "there is no command 'gallery creat'; did you mean gallery create?"),
        (["--josn"], "there is no command '--josn'"),
    ],
)
def test_an_unknown_command(run, words, message):
    result = run(*words)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(f"xbt: error: {message}")
    assert result.err.count("\n") == 1
    assert run(*words, "--json").document["error"]["kind"] == "ConfigError"


def test_help_and_version_import_no_torch():
    for words in (["--help"], ["--version"], ["gallery", "--help"], ["embd"]):
        code = (
            f"import sys; from xbt.cli import main; main({words!r}); "
            "heavy = {'torch', 'numpy', 'jsonargparse', 'transformers'} & set(sys.modules); "
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", sorted(THERE))
def test_every_command_explains_its_keys_with_an_example(run, capsys, name):
    with pytest.raises(SystemExit) as ended:
        run(*name.split(), "--help")
    result = capsys.readouterr()
    assert (ended.value.code, result.err) == (0, "")
    assert result.out.startswith(f"usage: xbt {name} ")
    assert f"example:\n  xbt {name}" in result.out
    assert "settings:" in result.out
    assert "default: " in result.out
    assert "--json" in result.out


@pytest.mark.parametrize("each", COMMANDS, ids=lambda each: each.name)
def test_the_example_is_a_command_line_that_is_understood(each):
    from xbt.cli.app import parse

    for example in each.example.replace("\\\n", " ").splitlines():
        words = [word.strip('"') for word in example.removeprefix(each.prog).split()]
        if "--config" not in words:
            parse(each, words)


def test_what_is_found_and_what_is_printed_beside_it(command, capfd):
    command(answer)
    status = app.main(["try", "--source", "b"])
    result = capfd.readouterr()
    assert (status, result.out) == (1, "found b\n")
    for words in ("a job that prints", "a library in C that prints", "a child that prints"):
        assert words in result.err
    app.main(["try", "--json"])
    assert json.loads(capfd.readouterr().out) == {"source": "a", "figure": None}


def test_an_error_is_one_sentence_and_under_json_a_document(command, run):
    command(raising(DataError("captions.txt is empty")))
    assert run("try") == (2, "", "xbt try: error: captions.txt is empty\n")
    result = run("try", "--json")
    assert (result.status, result.err) == (2, "xbt try: error: captions.txt is empty\n")
    assert result.document == {
        "error": {
            "command": "xbt try", "kind": "DataError", "message": "captions.txt is empty", "status": 2
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sorce", "a"], ["--sorce"]),
        (["word"], ["word"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_wrong_flags_and_files(command, run, flags, words):
    command(answer)
    result = run("try", *flags, "--json")
    assert result.status == 2
    assert result.err.startswith("xbt try: error: ")
    assert result.err.count("\n") == 1
    assert all(word in result.document["error"]["message"] for word in words)


def test_an_unknown_key_in_a_file(command, run, tmp_path):
    command(answer)
    (tmp_path / "try.yaml").write_text("sorce: b\n")
    result = run("try", "--config", tmp_path / "try.yaml")
    assert (result.status, result.out) == (2, "")
    assert "sorce" in result.err
    (tmp_path / "try.yaml").write_text("source: b\n")
    assert run("try", "--config", tmp_path / "try.yaml").out == "found b\n"


def test_a_bug_has_a_traceback_and_a_status_of_its_own(command, run):
    command(raising(ZeroDivisionError("a bug")))
    result = run("try", "--json")
    assert result.status == 70
    assert "Traceback" in result.err
    assert result.document["error"]["kind"] == "ZeroDivisionError"


@pytest.mark.parametrize("resumable", [True, False])
def test_an_interrupt(command, run, resumable):
    command(raising(KeyboardInterrupt()), resumable=resumable)
    result = run("try")
    assert (result.status, result.out) == (130, "")
    assert ("continues" in result.err) == resumable
    error = run("try", "--json").document["error"]
    assert error["status"] == 130
    assert result.err == f"xbt try: {error['message']}\n"
    assert error["message"].startswith("interrupted")


def test_a_bug_without_a_message_is_called_by_its_kind(command, run):
    command(raising(AssertionError()))
    assert run("try", "--json").document["error"]["message"] == "AssertionError"


def test_one_of_several_processes_speaks(command, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    command(answer)
    result = run("try")
    assert result.status == 2
    assert "--num_processes 1" in result.err
    command(answer, processes=True)
    assert run("try").out == "found a\n"
    monkeypatch.setenv("RANK", "1")
    assert run("try").out == ""
    command(raising(DataError("empty")), processes=True)
    assert run("try", "--json") == (2, "", "")


def test_a_reader_that_has_gone_away_is_no_error(tmp_path):
    """As in ``xbt --help | head -1``: the pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        [sys.executable, "-m", "xbt", "--help"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (0, b"")


def unicode_answer(settings):
    return CommandResult({}, "ein Hündchen")


def lost(settings):
    raise DataError("captions.txt is empty")


MADE = """import sys
sys.path.insert(0, {folder!r})
from xbt.cli import app
from xbt.cli.app import Command
app.COMMANDS = (Command("try", "", "test_app:Settings", "test_app:{job}", "xbt try"),)
sys.exit(app.main({words!r}))
"""


def ran(job, *words, **options):
    code = MADE.format(folder=str(Path(__file__).parent), job=job, words=["try", *words])
    return subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, check=False, text=True, **options
    )


@pytest.mark.parametrize(
    ("job", "words", "message"),
    [
        ("unicode_answer", [], "xbt try: error: standard output cannot be written (No space left on device)"),
        ("unicode_answer", ["--json"], "xbt try: error: standard output cannot be written"),
        ("lost", ["--json"], "xbt try: error: captions.txt is empty"),
    ],
)
def test_a_full_disk_behind_standard_output_is_a_sentence(job, words, message):
    with Path("/dev/full").open("w") as full:
        result = ran(job, *words, stdout=full)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["gallery", "--help"]])
def test_a_full_disk_behind_a_help_text(words):
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([sys.executable, "-m", "xbt", *words], stdout=full, stderr=subprocess.PIPE,
                              check=False, text=True)  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("xbt: error: standard output cannot be written (No space left on device)")
    assert result.stderr.count("\n") == 1


def test_a_terminal_of_ascii_is_given_what_it_can_show():
    result = ran("unicode_answer", stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stdout, result.stderr) == (0, "ein H\\xfcndchen\n", "")


def test_the_entry_point_and_the_module():
    (entry,) = [each for each in metadata.distribution("xbt").entry_points if each.group == "console_scripts"]
    assert (entry.name, entry.load()) == ("xbt", app.main)
    script = Path(sys.executable).with_name("xbt")
    for command_line in ([str(script)], [sys.executable, "-m", "xbt"]):
        result = subprocess.run([*command_line, "--version"], capture_output=True, text=True, check=True)
        assert result.stdout == f"xbt {__version__}\n"
    failed = subprocess.run([sys.executable, "-m", "xbt", "embd"], capture_output=True, check=False)
    assert failed.returncode == 2
