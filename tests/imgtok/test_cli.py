from __future__ import annotations

import errno
import logging
import os
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
from imgtok.config import ConfigError, PositiveInt


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
        (["runs/a", "runs/b"], "'runs/b' is neither a .yaml file nor key=value nor --key value"),
    ],
)
def test_mistakes_in_arguments(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse(Config, words, "model")
    assert str(caught.value).startswith("command line: ")
    assert message in str(caught.value)


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
    for module, about in cli.JOBS.values():
        assert module.split(".")[:2] in (["imgtok", "train"], ["imgtok", "sample"])
        assert about


def test_a_job_runs_with_its_configuration(toy: Any) -> None:
    assert cli.main(["train", "toy", "runs/a", "--per-class", "4"]) == 0
    assert cli.main(["sing"]) == 0
    assert toy.ran == [Config(model=Path("runs/a"), per_class=4), Config()]
    assert logging.getLogger("imgtok").level == logging.INFO


def test_help_of_a_job_lists_its_fields(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "toy", "per_class=x", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: imgtok train toy [CONFIG.yaml] [key=value ...]")
    assert "Pretend to do something." in text
    assert "  net.width: an integer of at least 1 [4]\n      Width in pixels." in text
    assert "flip: true or false [false]" in text
    assert "job" not in text.partition("Fields")[2]
    assert toy.ran == []


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
