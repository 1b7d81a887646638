r"""What reaches the screen, the pipe and the log: whatever they can hold, and whatever the data hold.

The commands here are synthetic where they can be: a stream and a printer are enough to see a lost character.
"""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
from conftest import synthetic_block, write_cache
from mmcli.heads.evaluation.metrics import ClassScores, Scores
from mmcli.report import terminal
from mmcli.report.tables import pairs_table, score_tables
from mmcli.report.terminal import note, print_csv, print_json, print_parts, printable
from rich.table import Table

ENCODINGS = ["utf-8", "cp1252", "ascii", "gbk", "latin-1", "utf-16"]
CLASSES = ["très bon", "很好", "mauvais – “quoted”", "half \ud83d emoji", "caf\udce9"]


@pytest.fixture
def streams(monkeypatch):
    """Return a function that makes stdout and stderr byte streams of an encoding, as ``main`` prepares them."""
    from mmcli.report.streams import prepare_streams

    def make(encoding, terminal=False):
        made = []
        for name in ("stdout", "stderr"):
            stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
            stream.isatty = lambda: terminal
            monkeypatch.setattr(sys, name, stream)
            made.append(stream)
        prepare_streams()
        return made

    return make


def text_of(stream):
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


def escaped(text, encoding):
    return text.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_the_same_whatever_the_stream_can_hold(streams, encoding):
    out, _ = streams(encoding)
    print_json({"classes": CLASSES, "escape": "\x1b[31m\x9b"})
    written = text_of(out)
    assert json.loads(written) == {"classes": CLASSES, "escape": "\x1b[31m\x9b"}
    assert "\x9b" not in written


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables_lose_no_name(streams, encoding):
    out, _ = streams(encoding)
    per_class = dict.fromkeys(CLASSES, ClassScores(0.5, 0.5, 0.5, (0.4, 0.6), 9, 9))
    scores = Scores(9, 9, 0.5, (0.4, 0.6), 0.5, (0.4, 0.6), per_class, [[9]])
    print_parts(*score_tables({"test": scores}, CLASSES))
    written = text_of(out)
    assert all(escaped(name, encoding) in written for name in CLASSES)
    assert written.count("0.500 [0.400, 0.600]") == 2 + len(CLASSES)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_csv_loses_no_name_and_says_where_it_needs_escapes(streams, encoding):
    out, err = streams(encoding)
    print_csv("guid,tag\n1,très bon\n2,很好\n")
    assert [row[1] for row in csv.reader(io.StringIO(text_of(out)))][1:] == [
        escaped("très bon", encoding),
        escaped("很好", encoding),
    ]
    told = encoding in ("cp1252", "ascii", "latin-1")
    assert (f"standard output is {encoding}" in text_of(err)) == told


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_notes_and_progress_lose_nothing(streams, encoding):
    from mmcli.report.progress import ProgressLine

    _, err = streams(encoding)
    note("note: très bon, 很好, caf\udce9")
    with ProgressLine("encode") as progress:
        progress(1, 2)
    assert escaped("note: très bon, 很好, ", encoding) + "caf\\udce9" in text_of(err)
    assert "encode: 1/2 pairs" in text_of(err)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_progress_bar_on_a_terminal_of_that_encoding(streams, monkeypatch, encoding):
    from mmcli.report.progress import ProgressLine

    _, err = streams(encoding, terminal=True)
    with ProgressLine("encode") as progress:
        progress(1, 2)
        progress(2, 2)
    assert "2/2" in text_of(err)


HOSTILE = "red\x1b[2J\x1b]0;title\x07 \x9b31m \x08\x08\r over\u202egnp"


@pytest.mark.parametrize("on_terminal", [False, True])
def test_no_name_commands_the_terminal(streams, on_terminal):
    out, err = streams("utf-8", on_terminal)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    print_parts(table, pairs_table({"a": HOSTILE}), HOSTILE)
    note(f"error: {HOSTILE}")
    for written in (text_of(out), text_of(err)):
        for control in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\x08", "\r", "\u202e"):
            assert control not in written
        assert "\\x1b[2J" in written
    print_csv(f"1,{HOSTILE}\n")
    assert ("\x1b[2J" in text_of(out)) != on_terminal  # a pipe gets the data to the letter


def test_printable_keeps_all_that_can_be_read():
    kept = "plain\ttext\nwith 很好, é, 👍🏽, ‘quotes’ and a \\x1b that was typed"
    assert printable(kept) == kept


def run(arguments, cwd, **more):
    command = [sys.executable, "-m", "mmcli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, check=False, **{"capture_output": True} | more)


@pytest.fixture
def odd_classes(learnable, tmp_path):
    """A cache whose labels are called so that no code page holds them all."""
    path, labels = learnable
    text = labels.read_text()
    for plain, odd in zip(("negative", "neutral", "positive"), ("très bon", "很好", "a\x1b[31mred"), strict=True):
        text = text.replace(plain, odd)
    labels.write_text(text, encoding="utf-8")
    (tmp_path / "ids.csv").write_text("guid\n7\n3\n")
    return path, labels


def test_a_command_that_succeeded_says_so(odd_classes, tmp_path):
    path, labels = odd_classes
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    train = ["train-head", "--cache", path, "--labels", labels, "--epochs", "1"]
    predict = ["predict", "--ids", "ids.csv"]
    for words, environment in (
        (train, {"PYTHONIOENCODING": "cp1252"}),
        (["evaluate", "--json"], c_locale),
        ([*predict, "--out", "p.csv"], c_locale),
        (predict, c_locale),
    ):
        done = run(words, tmp_path, env=os.environ | environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout
        if words is train:
            assert b"tr\xe8s bon" in done.stdout
            assert b"\x1b" not in done.stdout
        if "--json" in words:
            assert json.loads(done.stdout.decode("ascii"))["classes"] == ["a\x1b[31mred", "très bon", "很好"]
    tags = {row["tag"] for row in csv.DictReader((tmp_path / "p.csv").open(encoding="utf-8", newline=""))}
    assert tags <= {"a\x1b[31mred", "très bon", "很好"}


def test_a_reader_that_has_enough_is_no_error(odd_classes, tmp_path):
    path, labels = odd_classes
    for target in ("stdout", "stderr"):  # gone before the first word
        reading, writing = os.pipe()
        os.close(reading)
        train = ["train-head", "--cache", path, "--labels", labels, "--epochs", "2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {target: writing}
        done = run(train, tmp_path, capture_output=False, **pipes)
        os.close(writing)
        assert done.returncode == 0
        assert not done.stderr or b"rror" not in done.stderr
    assert len(list((tmp_path / "artifacts" / "runs").glob("2*"))) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_an_answer_that_could_not_be_written_is_an_error(tmp_path):
    with open("/dev/full", "wb") as full:
        done = run(["fusions"], tmp_path, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == ["error: No space left on device"]


def test_closed_streams_stop_no_command(tmp_path):
    for redirection in (">&-", "2>&-", ">&- 2>&-"):
        command = f"{sys.executable} -m mmcli fusions {redirection}"
        assert subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_files_are_utf8_whatever_a_name_holds(tmp_path):
    from mmcli.cache.atomic import write_json, write_text
    from mmcli.cache.labels import table_text

    write_json(tmp_path / "a.json", {"classes": CLASSES})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"classes": CLASSES}
    write_text(tmp_path / "a.csv", table_text(["guid", "reason"], [["caf\udce9", "image missing"]]))
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()[1] == "caf\\udce9,image missing"


def test_an_error_that_names_an_odd_file_is_one_line(cli, tmp_path):
    name = os.fsdecode(b"caf\xe9\x1b[31m.h5")
    code, out, err = cli("train-head", "--cache", name)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert "caf\\udce9\\x1b[31m.h5" in line


def test_the_cache_of_a_hostile_name_is_shown_without_its_commands(tmp_path, cli):
    from dataclasses import replace

    from conftest import header

    made = replace(header(), backbone={"name": "\x1b[2Jclip", "revision": None})
    path = write_cache(tmp_path / "f.h5", synthetic_block(["a"]), made)
    code, out, _ = cli("cache", "info", path)
    assert (code, "\x1b" in out, "\\x1b[2Jclip" in out) == (0, False, True)
    assert terminal.printable("\x1b[2J") == "\\x1b[2J"


def test_class_names_with_controls_reach_files_but_no_terminal(learnable, tmp_path, cli):
    path, labels = learnable
    odd = {"negative": "sad \x9b1m", "neutral": "\x1b[31mred", "positive": "好"}
    text = labels.read_text()
    for plain, name in odd.items():
        text = text.replace(plain, name)
    labels.write_text(text, encoding="utf-8")
    for words in (["train-head", "--cache", path, "--labels", labels, "--epochs", "1"], ["evaluate"]):
        code, out, err = cli(*words)
        assert code == 0, err
        assert "\\x1b[31mred" in out
        assert not {"\x1b", "\x9b"} & set(out + err)
    _, out, _ = cli("evaluate", "--json")
    assert json.loads(out)["classes"] == sorted(odd.values())
    (metrics,) = (tmp_path / "artifacts" / "runs").glob("2*/metrics.json")
    assert json.loads(metrics.read_text(encoding="utf-8"))["classes"] == sorted(odd.values())


def test_figures_of_names_that_no_font_has(tmp_path):
    from mmcli.report import figures

    confusion, odd, escaped = (
        [[1, 2, 3]] * 3,
        ["sad \ud83d", "\x1b[31mred", "a\nb"],
        ["sad \\ud83d", "\\x1b[31mred", "a\\nb"],
    )
    figures.confusion(confusion, odd, "test", tmp_path / "odd.png")
    figures.confusion(confusion, escaped, "test", tmp_path / "escaped.png")
    assert (tmp_path / "odd.png").read_bytes() == (tmp_path / "escaped.png").read_bytes()
