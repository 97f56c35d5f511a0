from __future__ import annotations

import dataclasses
import errno
import importlib
import logging
import os
import re
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import nn

import imgtok
from imgtok import cli
from imgtok.config import ConfigError, PositiveInt, about

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True, kw_only=True)
class Section:
    width: PositiveInt = 4
    """Width in pixels."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretend to do
    something."""

    job: Literal["train-toy"] = "train-toy"
    model: Path = Path("none")
    """The model folder."""
    per_class: int = 1
    flip: bool = False
    classes: tuple[int, ...] = ()
    net: Section = Section()


@dataclass(frozen=True, kw_only=True)
class Pictures:
    kind: Literal["folder"] = "folder"
    path: Path


@dataclass(frozen=True, kw_only=True)
class Tables:
    kind: Literal["parquet"] = "parquet"
    path: Path


@dataclass(frozen=True, kw_only=True)
class WithData:
    """Pretend to look at images."""

    model: Path = Path("none")
    data: Pictures | Tables | None = None


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A job `train toy` whose module records the configurations that it ran with; logging is put back."""
    module: Any = types.ModuleType("toy_job")
    module.Config, module.POSITIONAL, module.ran = Config, "model", []
    module.main = module.ran.append
    monkeypatch.setitem(sys.modules, "toy_job", module)
    monkeypatch.setattr(cli, "JOBS", {"train toy": ("toy_job", "a toy"), "sing": ("toy_job", "a song")})
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "IMGTOK_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    levels = {name: logging.getLogger(name).level for name in ("imgtok", "generators", "train", "sample")}
    yield module
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


# ----------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Config()),
        (["per_class=3", "net.width=9"], Config(per_class=3, net=Section(width=9))),
        (["per-class=3"], Config(per_class=3)),
        (["--per-class", "3", "--net.width=9"], Config(per_class=3, net=Section(width=9))),
        (["--per-class", "-3"], Config(per_class=-3)),
        (["--flip"], Config(flip=True)),
        (["--flip", "--per-class", "3"], Config(flip=True, per_class=3)),
        (["--flip", "false"], Config(flip=False)),
        (["--flip", "runs/a"], Config(flip=True, model=Path("runs/a"))),
        (["runs/a=b"], Config(model=Path("runs/a=b"))),
        (["runs/a", "--classes", "1,2"], Config(model=Path("runs/a"), classes=(1, 2))),
        (["model=x=y"], Config(model=Path("x=y"))),
        (["--net", "{width: 3}"], Config(net=Section(width=3))),
    ],
)
def test_arguments_become_a_configuration(words: list[str], expected: Config) -> None:
    assert cli.parse(Config, words, "model") == expected


def test_a_file_is_overridden_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "job.yml"
    path.write_text("per_class: 5\nnet: {width: 7}\n")
    for words in ([str(path), "per_class=6"], ["per_class=6", str(path)]):
        assert cli.parse(Config, words, "model") == Config(per_class=6, net=Section(width=7))


def test_a_second_file_is_laid_over_the_first(tmp_path: Path) -> None:
    first, second = tmp_path / "job.yaml", tmp_path / "more.yaml"
    first.write_text("per_class: 5\nnet: {width: 7}\n")
    second.write_text("net: {width: 8}\n")
    for words in ([str(first), str(second)], [f"--config={first}", "--config", str(second)]):
        assert cli.parse(Config, words, "model") == Config(per_class=5, net=Section(width=8))
    given = cli._given([str(first), str(second)], None, "model")
    assert (given["per_class"], given["net.width"]) == (5, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--per-clas", "4"],
            "has no field 'per_clas'; did you mean 'per_class'? It has: job, model, per_class",
        ),
        (["--fli"], "has no field 'fli'; did you mean 'flip'?"),
        (["widht=3"], "has no field 'widht'"),
        (["--per-class"], "--per-class needs a value, an integer"),
        (["--per-class", "--flip"], "--per-class needs a value, an integer"),
        (["--per-class", "x"], "per_class: given 'x', must be an integer"),
        (["--flip", "model=a", "job=other"], "job: given 'other', must be 'train-toy'"),
        (["net.width", "=", "3"], "'net.width =': there are no spaces around =; write net.width=3"),
        (["--per-class", "=", "3"], "'--per-class =': there are no spaces around =; write --per-class=3"),
        (["runs/a", "flip", "=true"], "'flip =true': there are no spaces around =; write flip=true"),
        (["flip", "="], "'flip =': there are no spaces around =; write flip=VALUE"),
        (["runs/a", "runs/b"], "'runs/b' is neither a .yaml file nor key=value nor --key value"),
    ],
)
def test_mistakes_in_arguments(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse(Config, words, "model")
    assert str(caught.value).startswith("command line: ")
    assert message in str(caught.value)


def test_spaces_around_the_equals_sign_are_seen_before_a_model_is_looked_for() -> None:
    with pytest.raises(ConfigError, match=r"^command line: 'out =': there are no spaces around =; write out=x$"):
        cli.refuse_absent_models("sample", ["out", "=", "x"])


@pytest.mark.parametrize(("name", "kind"), [("photos", "folder"), ("a.parquet", "parquet"), ("a.tar", "webdataset")])
def test_a_second_word_that_names_images(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"") if path.suffix else path.mkdir()
    with pytest.raises(ConfigError, match=f"neither a .yaml file .*write data.kind={kind} data.path={path}"):
        cli.parse(WithData, ["runs/a", str(path)], "model")
    with pytest.raises(ConfigError, match="neither a .yaml file nor key=value nor --key value$"):
        cli.parse(Config, ["runs/a", str(path)], "model")


@pytest.mark.parametrize("form", ["data={}", "--data={}"])
def test_a_path_in_the_place_of_a_section_of_images(form: str, tmp_path: Path) -> None:
    table = tmp_path / "a.parquet"
    table.touch()
    for path, kind in ((tmp_path, "folder"), (table, "parquet")):
        remedy = f"must be a section; for the images in it write data.kind={kind} data.path={path}"
        with pytest.raises(ConfigError, match=f"^command line: data: given '{path}', {remedy}$"):
            cli.parse(WithData, [form.format(path)])
        chosen = cli.parse(WithData, [f"data.kind={kind}", f"data.path={path}"]).data
        assert (chosen.kind, chosen.path) == (kind, path)
    for path in (tmp_path / "gone", tmp_path / "a.tar"):  # of a kind that these images do not have
        (tmp_path / "a.tar").touch()
        with pytest.raises(ConfigError, match="must be a section with kind one of 'folder', 'parquet' or null"):
            cli.parse(WithData, [form.format(path)])
    assert cli.parse(WithData, [f"model={tmp_path}"]).model == tmp_path


# ------------------------------------------------------------------------------------------ commands


def test_help_and_version_need_no_torch_and_no_second() -> None:
    code = (
        "import resource, sys; from imgtok.cli import main\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0\n"
        "assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules), 'heavy import'\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "assert usage.ru_utime + usage.ru_stime < 1, usage"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train tokenizer" in done.stdout
    assert f"imgtok {imgtok.__version__}" in done.stdout


def test_python_m_imgtok_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "imgtok", "trian"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("imgtok: unknown command 'trian'; did you mean 'train'? Commands: train, cache, ")


def test_every_job_of_the_table_is_a_module_of_ours() -> None:
    for module, told in cli.JOBS.values():
        assert module.split(".")[:2] in (["imgtok", "train"], ["imgtok", "sample"])
        assert told


def test_a_job_runs_with_its_configuration(toy: Any) -> None:
    assert cli.main(["train", "toy", "runs/a", "--per-class", "4"]) == 0
    assert cli.main(["sing"]) == 0
    assert toy.ran == [Config(model=Path("runs/a"), per_class=4), Config()]
    assert logging.getLogger("imgtok").level == logging.INFO


def test_help_of_a_job_lists_its_fields(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "toy", "per_class=x", "--help", "all"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: imgtok train toy [MODEL] [CONFIG] [key=value ...]")
    assert "Pretend to do something." in text
    assert "  net.width: an integer of at least 1 [4]\n      Width in pixels." in text
    assert "flip: true or false [false]" in text
    assert "job" not in text.partition("Fields")[2]
    assert toy.ran == []


SHORT = """usage: imgtok train toy [MODEL] [CONFIG] [key=value ...] [--key value ...]

Pretend to do something.

In any order. MODEL, a lone word, is model=WORD. CONFIG is a .yaml file or a
name from `imgtok config --list`. Lists are written a,b.

required
  out                           Where the toy goes

what to work on
  model [none]                  The model folder
  classes

how much
  per_class [1]

more
  flip [false]

sections
  net.*                         The net (1 fields)
  box.* [kind=flat]             What it comes in (kind flat, deep)

imgtok train toy --help FIELD  one field or section in full
imgtok train toy --help all    everything
"""


@dataclass(frozen=True, kw_only=True)
class Flat:
    kind: Literal["flat"] = "flat"
    width: PositiveInt = 1
    """Its width."""


@dataclass(frozen=True, kw_only=True)
class Deep:
    kind: Literal["deep"] = "deep"
    depth: PositiveInt = 1
    """Its depth."""


@dataclass(frozen=True, kw_only=True)
class Grouped(Config):
    """Pretend to do something."""

    out: Path
    """Where the toy goes; a folder."""
    net: Section = Section()
    """The net."""
    box: Flat | Deep = Flat()
    """What it comes in."""


@pytest.mark.parametrize(
    "words",
    ["train toy --help", "train toy -h", "help train toy", "train toy per_class=3 --help", "train toy help"],
)
def test_short_help_has_a_line_a_field_in_groups(words, toy, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    toy.Config = Grouped
    assert cli.main(words.split()) == 0
    assert capsys.readouterr().out == SHORT


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--help per_class", ["per_class"]),
        ("--help per-class", ["per_class"]),
        ("--help=per_class", ["per_class"]),
        ("-h width", ["net.width", "box.width"]),
        ("--help box", ["box", "box.kind", "box.width", "box.kind", "box.depth"]),
        ("box.kind=deep --help box", ["box", "box.kind", "box.depth"]),
        ("--help box box.kind=deep", ["box", "box.kind", "box.depth"]),
        ("--help box.depth", ["box.depth"]),
    ],
)
def test_help_of_one_field_or_section(words, expected, toy, capsys) -> None:
    toy.Config = Grouped
    assert cli.main(["train", "toy", *words.split()]) == 0
    text = capsys.readouterr().out
    assert [
        line.split(":")[0].strip()
        for line in text.splitlines()
        if line[2:3].isalpha() and not line.startswith("  with ")
    ] == expected
    assert ("with box.kind=deep:" in text) == ("box.depth" in expected)
    assert cli.main(["help", "train", "toy", *words.split()[-1:]]) == 0 or "kind" in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train toy --help widht", "imgtok train toy has no field or section 'widht'; did you mean"),
        ("train toy --help nett", "no field or section 'nett'; did you mean 'net'?"),
        ("train toy --helpp", "'--helpp' is no field; did you mean --help?"),
        ("help trian toy", "unknown command 'trian'; did you mean 'train'?"),
        (
            "help train tooy",
            "unknown command 'train tooy'; did you mean 'train toy'? imgtok train can be followed by: toy",
        ),
        ("train-toy", "unknown command 'train-toy'; did you mean 'train toy'?"),
        ("helpp", "unknown command 'helpp'; did you mean 'help'?"),
    ],
)
def test_what_help_does_not_know_is_named_with_what_is_like_it(words, message, toy, capsys) -> None:
    assert cli.main(words.split()) == 2
    assert message in error_of(capsys)


def test_help_of_a_group_of_commands(toy, capsys) -> None:
    for words in (["train", "--help"], ["help", "train"], ["train", "-h"], ["train", "help"], ["--help", "train"]):
        assert cli.main(words) == 0
        assert capsys.readouterr().out.startswith("usage: imgtok train toy ...\n\n  train toy  a toy\n")
    for words in ([], ["help"], ["-h"], ["--help"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert "usage: imgtok JOB" in text
        assert "a model may come as a lone word" in text


def test_help_is_styled_on_a_terminal_alone(toy, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.main(["train", "toy", "-h"]) == 0
    assert "\x1b[1mflip\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["train", "toy", "-h"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "'train' needs a second word; imgtok train can be followed by: toy"),
        (["train", "boat"], "unknown command 'train boat'; imgtok train can be followed by: toy"),
        (["sign"], "unknown command 'sign'; did you mean 'sing'? Commands: train, sing, config, info"),
        (["--halp"], "unknown command '--halp'"),
        (["sing", "x.yaml"], "x.yaml: no such configuration file"),
        (
            ["config", "--flip"],
            "command line: give a job, or a YAML file with a top-level `job:`; jobs: train-toy",
        ),
        (["info", "no/such/model/here"], "there is no model folder 'no/such/model/here'"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    text = error_of(capsys)
    assert text.startswith(f"imgtok: {message}")
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("bad"), 2, "imgtok: bad\n"),
        (FileNotFoundError("no folder x"), 2, "imgtok: no folder x\n"),
        (OSError(28, "No space left on device", "runs/a"), 2, "imgtok: runs/a: No space left on device\n"),
        (OSError(28, "No space left on device"), 2, "imgtok: No space left on device\n"),
        (ValueError(), 2, "imgtok: ValueError\n"),
        (KeyboardInterrupt(), 130, "imgtok: interrupted\n"),
    ],
)
def test_errors_of_a_job(
    toy: Any, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    def main(config: Config) -> None:
        raise error

    toy.main = main
    assert cli.main(["sing"]) == status
    assert error_of(capsys) == message


def test_debugging_keeps_the_traceback_and_so_do_bugs(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(config: Config) -> None:
        raise error

    toy.main = main
    error: Exception = KeyError("a bug")
    with pytest.raises(KeyError):
        cli.main(["sing"])
    error = ValueError("bad")
    monkeypatch.setenv("IMGTOK_DEBUG", "1")
    with pytest.raises(ValueError, match="bad"):
        cli.main(["sing"])


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from imgtok.cli import main; sys.exit(main(['--help']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_pipe_in_a_job_is_an_error(toy: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(_: Config) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(toy, "main", fail)
    assert cli.main(["train", "toy"]) == 2
    assert error_of(capsys).startswith("imgtok: broken pipe: a process that this job was writing to")


def test_run_job_is_the_same_program(toy: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["toy", "runs/a", "--flip"])
    with pytest.raises(SystemExit) as caught:
        cli.run_job(toy)
    assert caught.value.code == 0
    assert toy.ran == [Config(model=Path("runs/a"), flip=True)]
    monkeypatch.setattr(sys, "argv", ["toy", "--help"])
    with pytest.raises(SystemExit):
        cli.run_job(toy)
    assert capsys.readouterr().out.startswith("usage: python -m toy_job")


@pytest.mark.usefixtures("toy")
def test_config_prints_what_a_run_would_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text("job: train-toy\nper_class: 5\n")
    expected = "job: train-toy\nmodel: none\nper_class: 5\nflip: true\nclasses: []\nnet:\n  width: 4\n"
    assert cli.main(["config", str(path), "--flip"]) == 0
    assert capsys.readouterr().out == expected
    path.write_text("per_class: 5\n")
    assert cli.main(["config", str(path), "train-toy", "flip=true"]) == 0
    assert capsys.readouterr().out == expected
    assert cli.main(["config", str(path)]) == 2
    assert f"{path}: give a job" in error_of(capsys)
    path.write_text("job: dance\n")
    assert cli.main(["config", str(path)]) == 2
    assert f"{path}: unknown job 'dance'; jobs: train-toy, sing" in error_of(capsys)
    assert cli.main(["config", "--help"]) == 0
    assert "Jobs: train-toy, sing" in capsys.readouterr().out


def test_info_counts_the_parameters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config: Any = types.SimpleNamespace(kind="toy")
            self.body = nn.Linear(30, 40)
            self.act = nn.ReLU()
            self.bias = nn.Parameter(nn.Linear(5, 1).weight)

    model = Toy()
    monkeypatch.setattr("imgtok.places.check", lambda name: None)
    monkeypatch.setattr("imgtok.hub.resolve", lambda name: types.SimpleNamespace(path=f"{name}/final", step=7))
    monkeypatch.setattr("imgtok.hub.load", lambda found: {"runs/a/final": model}[found.path])
    monkeypatch.setattr(cli, "settings_help", lambda models: f"settings of {models[0].path}")
    monkeypatch.setattr(cli, "to_yaml", lambda config: f"kind: {config.kind}\n")
    assert cli.main(["info", "runs/a"]) == 0
    assert capsys.readouterr().out == (
        "kind: toy (Toy)\nplace: runs/a/final, after 7 steps of training\nparameters: 1,245\n  body: 1,240\n"
        "  (direct): 5\nconfig:\n  kind: toy\nsettings of runs/a/final"
    )
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.startswith("usage: imgtok info MODEL")


# ------------------------------------------------------------------------------------------- launch


GOOD = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "environment",
    [{}, GOOD, {"WORLD_SIZE": "1"}, {**GOOD, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}],
)
def test_sound_launches_pass(environment: dict[str, str]) -> None:
    cli.check_launch_environment(environment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "2"}, "RANK is '2', must be an integer from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": None}, "RANK is not set, must be an integer from 0 to 1"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set, must be an integer of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2', must be an integer from 0 to 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3', must be an integer from 1 to 2"),
        ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is '1', must be an integer from 0 to 0"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999', must be an integer from 1 to 65535"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        (
            {"MASTER_ADDR": "no.such.host.invalid"},
            "MASTER_ADDR is 'no.such.host.invalid', which is no known host",
        ),
        (
            {"MASTER_ADDR": "192.0.2.1", "RANK": "0"},
            "cannot listen on MASTER_ADDR=192.0.2.1 MASTER_PORT=29500",
        ),
    ],
)
def test_launch_mistakes_name_the_variable(change: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(ValueError, match="launch: ") as caught:
        cli.check_launch_environment(environment)
    assert message in str(caught.value)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        with pytest.raises(ValueError, match=rf"MASTER_PORT={port} \(Address already in use\); choose a free port"):
            cli.check_launch_environment({**GOOD, "RANK": "0", "MASTER_PORT": port})


def test_a_job_checks_the_launch_first(
    toy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["sing"]) == 2
    assert error_of(capsys) == "imgtok: launch: RANK is '5', must be an integer from 0 to 1\n"
    assert toy.ran == []


# ------------------------------------------------------------------------------- configurations that ship


def test_a_configuration_that_ships_is_taken_by_name(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    from imgtok.train.tokenizer import Config as Job

    expected = cli.parse(Job, [str(CONFIGS / "tiny/flextok.yaml")])
    assert expected.training.steps == 4
    for words in (["tiny/flextok"], ["tiny/flextok.yaml"], ["configs/tiny/flextok.yaml"], ["--config", "tiny/flextok"],
                  ["--config=tiny/flextok"]):  # fmt: skip
        assert cli.parse(Job, words) == expected, words
        assert cli.parse(Job, [*words, "training.steps=7"]).training.steps == 7
    mine = tmp_path / "tiny/flextok.yaml"  # what is there comes first
    mine.parent.mkdir()
    mine.write_text((CONFIGS / "tiny/flextok.yaml").read_text().replace("steps: 4", "steps: 5"))
    assert cli.parse(Job, ["tiny/flextok.yaml"]).training.steps == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train tokenizer tiny/flextokk", "did you mean the configuration 'tiny/flextok'?"),
        ("train tokenizer tiny/flextokk.yaml", "no such configuration file; did you mean tiny/flextok.yaml?"),
        ("train tokenizer configs/tiny/flextokk.yaml", "no such configuration file; did you mean tiny/flextok.yaml?"),
        ("train tokenizer mine.yml", "mine.yml: no such configuration file; did you mean mine.yaml?"),
        ("train tokenizer tiny/gpt", "'tiny/gpt' is a configuration of `imgtok train generator`"),
        ("tiny/gpt", "unknown command 'tiny/gpt'; did you mean 'imgtok train generator tiny/gpt'?"),
        ("config tiny/gptt", "'tiny/gptt' is neither a configuration nor a job; did you mean 'tiny/gpt'?"),
        ("config train-generatr", "neither a configuration nor a job; did you mean 'train-generator'?"),
        ("cache latnts", "unknown command 'cache latnts'; did you mean 'cache latents'?"),
    ],
)
def test_a_mistyped_configuration_is_named_with_what_is_like_it(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("job: train-tokenizer\n")
    assert cli.main(words.split()) == 2
    assert message in error_of(capsys)


def test_config_lists_and_prints_what_ships(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", "--list"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    names = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert {line.split()[0] for line in lines} == names
    assert all(len(line.split(maxsplit=1)[1]) > 15 for line in lines)
    assert cli.main(["config", "tiny/gpt"]) == 0
    printed = capsys.readouterr().out
    assert printed == (CONFIGS / "tiny/gpt.yaml").read_text()
    (tmp_path / "my.yaml").write_text(printed)
    assert cli.main(["config", "my.yaml"]) == 0
    checked = capsys.readouterr().out
    assert "weight_decay: 0.05" in checked
    assert cli.main(["config", "tiny/gpt", "training.weight_decay=0.05"]) == 0
    assert capsys.readouterr().out == checked


# ------------------------------------------------------------------------------------- without doc strings


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["python", "-OO", "-m", "imgtok", "-OO"], ["python", "-m", "imgtok", "-OO"]),
        (["python", "-uOO", "-W", "OO", "-Xdev", "imgtok"], ["python", "-u", "-W", "OO", "-Xdev", "imgtok"]),
        (["python", "-O", "-O", "-X", "OO", "-m", "imgtok"], ["python", "-X", "OO", "-m", "imgtok"]),
        (["python", "imgtok", "sample"], ["python", "imgtok", "sample"]),  # PYTHONOPTIMIZE=2
    ],
)
def test_a_program_without_doc_strings_starts_again_with_them(words, again, monkeypatch, capsys) -> None:
    started = []

    def execve(path: str, argv: list[str], environment: dict[str, str]) -> None:
        started.append((path, argv, environment["PYTHONOPTIMIZE"]))

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", ["imgtok", "--version"])
    assert cli.main() == 0
    assert started == []
    monkeypatch.setattr(sys, "flags", types.SimpleNamespace(optimize=2))
    assert cli.main() == 0
    assert started == [(sys.executable, again, "1")]
    assert "started again with -O" in capsys.readouterr().err


def test_python_oo_runs_the_command_and_help_has_its_text() -> None:
    code = "from imgtok import config, usage; print(config.about(usage.Page), config.about(config.FieldHelp))"
    for words in (["-m", "imgtok", "help"], ["-c", code]):
        done = subprocess.run([sys.executable, "-OO", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The help of one job. One line of help: dotted name,")


def test_a_class_without_a_source_has_no_text() -> None:
    made: Any = type("Made", (), {"__annotations__": {"width": int}, "width": 1})
    assert about(dataclass(made)) == ""


@pytest.mark.slow
def test_python_oo_loads_a_model() -> None:
    done = subprocess.run([sys.executable, "-OO", "-m", "imgtok", "info", "shapes32"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kind: vae" in done.stdout
    code = "import imgtok; imgtok.load('shapes32')"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: python -OO (PYTHONOPTIMIZE=2) drops doc strings, and diffusers checks its own" in done.stderr


def test_the_short_help_of_every_job_is_a_page_or_two(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command, (name, _) in cli.JOBS.items():
        module = importlib.import_module(name)
        page = cli.job_help(module, ["--help"], f"imgtok {command}").splitlines()
        assert len(page) <= 60, command
        assert max(map(len, page)) <= 84, command
        titles = [line for line in page if line in ("required", "what to work on", "more", "sections")]
        assert titles == sorted(titles, key=["required", "what to work on", "more", "sections"].index)
        for field in dataclasses.fields(module.Config):
            assert field.name == "job" or any(re.match(rf"  {field.name}(\.\*)?( |$)", line) for line in page), (
                field.name
            )


# ------------------------------------------------------------------------------------- files that are not there


@pytest.mark.parametrize(
    ("command", "field"), [(name, field) for name, fields in cli.FILES.items() for field in fields]
)
def test_a_file_that_is_not_there_is_named_before_the_job_is_imported(
    command, field, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").mkdir()
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail("imported the job first"))
    assert cli.main([*command.split(), f"{field}=catz"]) == 2
    assert capsys.readouterr().err == f"imgtok: {field}: catz: no such file or folder; did you mean cats?\n"


def test_files_that_are_not_looked_for(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").mkdir()
    (tmp_path / "x.yaml").write_text("data: {kind: folder, path: absent}\n")
    for arguments in (["x.yaml", "data.path=cats"], ["x.yaml", "data.kind=shapes"], ["data.path=part-{0..3}.tar"]):
        cli.refuse_absent_models("train tokenizer", arguments)
    with pytest.raises(FileNotFoundError, match=r"data\.path: s3://x/y: .* \(only local files are read: download it\)"):
        cli.refuse_absent_models("train tokenizer", ["data.path=s3://x/y"])
