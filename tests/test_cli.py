"""What the commands share."""

import errno
import os
from argparse import ArgumentTypeError

import pytest
from datasets.exceptions import DatasetGenerationError
from safetensors import SafetensorError

from ltm_hf import LTMConfig, cli


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("It must be 1, got 2."), "It must be 1, got 2."),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), "'a.txt': No such file or directory."),
        (OSError("It cannot be reached.\nCheck your connection."), "It cannot be reached."),
        (ValueError("found\n- one\n- two"), "found - one - two"),
        (caused(DatasetGenerationError("while generating"), ValueError("line 3 is cut")), "line 3 is cut"),
        (ImportError("It needs TRL."), "It needs TRL."),
        (SafetensorError("cut off"), "cut off"),
        (ValueError(), "ValueError"),
    ],
    ids=repr,
)
def test_a_mistake_is_one_sentence(error, said, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/name.py"])
    with pytest.raises(SystemExit) as stopped, cli.one_sentence():
        raise error
    assert stopped.value.code == 2 and capsys.readouterr().err == f"name.py: error: {said}\n"


@pytest.mark.parametrize(
    "error", [TypeError("a bug"), KeyError("a bug"), AttributeError("a bug"), RuntimeError("a bug")]
)
def test_a_bug_is_none(error):
    @cli.one_sentence()
    def main():
        raise error

    with pytest.raises(type(error), match="a bug"):
        main()


def test_a_wrong_type_in_a_configuration(capsys):
    with pytest.raises(SystemExit), cli.one_sentence():
        LTMConfig(hidden_size="32")
    assert capsys.readouterr().err.count("\n") == 1


def test_options_that_were_given():
    parser = cli.Parser()
    parser.add_argument("name", nargs="?")
    for option in ("--rate", "--count"):
        parser.add_argument(option, type=int, default=1)
    assert cli.given(parser, ["--rate", "1"]) - {"name"} == {"rate"}  # its default
    with pytest.raises(ValueError, match=r"no option '--raet=e3'; did you mean --rate\?"):
        cli.given(parser, ["--raet=e3", "--x"])


def test_what_does_nothing_is_refused():
    rules = ((True, "without a", ["b"]), (False, "without c", ["d"]))
    cli.refuse_idle({"d"}, *rules)
    with pytest.raises(ValueError, match="--b does nothing without a"):
        cli.refuse_idle({"b", "d"}, *rules)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("positive_int", "1", ["0", "-1", "1.5", "x", "nan"]),
        ("count", "0", ["-1", "inf"]),
        ("block", "2", ["1"]),
        ("vocabulary", "258", ["257"]),
        ("seed", "4294967295", ["-1", "4294967296"]),
        ("port", "65535", ["65536"]),
        ("temperature", "0.001", ["0", "1e-4", "nan", "inf", "-1", "1e4"]),
        ("share", "1", ["0", "1.1", "nan"]),
        ("fraction", "0.5", ["0", "1", "nan"]),
        ("device", "cpu", ["abacus", "meta", "cuda:99", ""]),
    ],
)
def test_values(kind, good, bad):
    convert = getattr(cli, kind)
    assert str(convert(good)) in (good, str(float(good)) if kind != "device" else good)
    for text in bad:
        with pytest.raises(ArgumentTypeError):
            convert(text)


def test_places(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert cli.folder(tmp_path / "a/b") == tmp_path / "a/b" and not (tmp_path / "a").exists()
    assert cli.file(tmp_path / "a/b.json") == tmp_path / "a/b.json"
    assert cli.new_folder(tmp_path / "a") == tmp_path / "a"
    for convert, place in ((cli.folder, "file"), (cli.folder, "file/a"), (cli.file, ""), (cli.new_folder, "")):
        with pytest.raises(ArgumentTypeError):
            convert(str(tmp_path / place))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_is_not_ours(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ArgumentTypeError, match="nothing can be written"):
        cli.folder(str(tmp_path / "a"))
