"""The command line: `imgtok JOB [CONFIG.yaml] [key=value ...] [--key value ...]`.

Jobs are modules with a `Config` and a `main(config)`; they are named here as strings and imported when
asked for, so that `imgtok --help` needs no torch. The same modules run as `python -m imgtok.train.tokenizer ...`
and under `torchrun` or `accelerate launch -m`, through `run_job`.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
import shutil
import socket
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import imgtok
from imgtok import places, signals
from imgtok.config import ConfigError, FieldHelp, describe, load, read_yaml, to_yaml
from imgtok.sections import completed

JOBS: Mapping[str, tuple[str, str]] = {
    "train tokenizer": ("imgtok.train.tokenizer", "train a tokenizer on images"),
    "train autoencoder": (
        "imgtok.train.autoencoder",
        "train the continuous autoencoder that tokenizers and latents stand on",
    ),
    "train generator": (
        "imgtok.train.generator",
        "train a generator on the tokens of a tokenizer or on latents",
    ),
    "cache": ("imgtok.train.cache_tokens", "write the tokens of a data set to files, for faster training"),
    "cache latents": (
        "imgtok.train.cache_latents",
        "write the latents of a data set to files, for generators of latents",
    ),
    "cache text": ("imgtok.train.cache_text", "write the text features of a data set's captions to files"),
    "sample": ("imgtok.sample.images", "make new images with a trained generator"),
    "reconstruct": ("imgtok.sample.reconstruct", "show images beside their reconstructions at several token counts"),
    "evaluate": ("imgtok.sample.evaluate.job", "score images or a model"),
    "export": (
        "imgtok.sample.export",
        "write a model as the code that it was published with reads it, or a published one as imgtok's",
    ),
    "quickstart": (
        "imgtok.sample.quickstart",
        "train, sample and score on the built-in shapes, in minutes on a CPU",
    ),
}
"""Command -> (module, what it does). With a dash for the space, also the values of `job:` in YAML."""

MODELS: Mapping[str, tuple[str, ...]] = {
    "train tokenizer": ("vae", "init"),
    "train autoencoder": ("init",),
    "train generator": ("tokenizer", "init"),
    "cache": ("tokenizer",),
    "cache latents": ("vae",),
    "sample": ("model", "tokenizer"),
    "reconstruct": ("model",),
    "evaluate": ("model", "tokenizer"),
    "export": ("model", "vae"),
    "info": ("model",),
}
"""Command -> its fields that name models, which `refuse_absent_models` looks for."""
LONE_MODEL = ("cache", "cache latents", "sample", "reconstruct", "export", "info")
"""Commands that take the first of these as a lone word."""

TOOLS = {
    "config": "CONFIG.yaml [JOB] [key=value ...]: check a configuration and print it with all its defaults",
    "info": "MODEL: print the kind, the parameter counts, the configuration and the settings of a model",
}

USAGE = "[CONFIG.yaml] [key=value ...] [--key value ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """The `imgtok` command; returns the exit status: 0; 2 for a user's mistake; 130 for Ctrl-C, 143 for SIGTERM and
    138 for SIGUSR1 (docs/training.md).
    """
    return _report_errors(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def run_job(module: ModuleType) -> None:
    """Run a job module as a program (`python -m imgtok.train.tokenizer ...`) with the arguments of this process."""
    program = module.__spec__.name if module.__spec__ else str(module.__name__)
    sys.exit(_report_errors(lambda: _run(module, sys.argv[1:], f"python -m {program}")))


def parse(config_class: type, argv: Sequence[str], positional: str | None = None) -> Any:
    """The `config_class` that the arguments describe: a YAML file, `key=value`, `--key value`, `--flag`.

    The first other word fills the field `positional`. Dashes in names stand for underscores. Raises
    ConfigError for an unknown name (with the known ones) or a value that does not fit.
    """
    # which options are flags; a description imports all that a union holds, so only where it is needed
    known = {line.name: line for line in describe(config_class)} if any(w.startswith("--") for w in argv) else {}
    path: Path | None = None
    overrides: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            overrides.append(_option(word, words, known))
        elif match := re.match(r"([A-Za-z_][\w.-]*)=", word):
            overrides.append(match[1].replace("-", "_") + word[match.end() - 1 :])
        elif path is None and word.endswith((".yaml", ".yml")):
            path = Path(word)
        elif positional is not None:
            overrides.append(f"{positional}={word}")
            positional = None
        else:
            raise ConfigError(f"command line: {word!r} is neither a .yaml file nor key=value nor --key value")
    return load(config_class, path, overrides)


def job_help(config_class: type, program: str) -> str:
    """The help of a job: usage, the doc string of its Config, and every field with range, default and doc."""
    width = min(110, shutil.get_terminal_size().columns)
    about = textwrap.fill(" ".join((config_class.__doc__ or "").split()), width)
    lines = [f"usage: {program} {USAGE}", "", about, "", "Fields: what each must be [default]"]
    section = ""
    for line in describe(config_class):
        if line.when != section:
            section = line.when
            lines += ["", f"  with {section}:"] if section else [""]
        if line.name != "job":  # the same for every run of this job
            lines.append(_field_help(line, width))
    return "\n".join(lines)


SETTINGS = ("sampling", "decoding")
"""Sections of a job, and of a model's configuration, that have the fields of the model's own dataclass."""


def model_help(module: ModuleType, argv: Sequence[str]) -> str:
    """The settings of the models that the arguments of a job or its YAML file name, in the sections that it has."""
    known = {line.name for line in describe(module.Config)}
    words = [word for word in argv if not word.startswith("-") and not word.endswith((".yaml", ".yml"))]
    lone = [word for word in words if "=" not in word][:1] if hasattr(module, "POSITIONAL") else []
    path = next((Path(word) for word in argv if word.endswith((".yaml", ".yml"))), None)
    given = {} if path is None else read_yaml(path)
    given |= dict(word.split("=", 1) for word in words if "=" in word)
    asked = [name for name in ("model", "tokenizer") if name in known and isinstance(given.get(name), str)]
    names = [*lone, *(given[name] for name in asked if not (lone and name == module.POSITIONAL))]
    try:
        return settings_help(names, [section for section in SETTINGS if section in known])
    except FileNotFoundError as error:
        if path is None:
            raise
        return f"\n{path} names a model that is not there yet, so its settings are not listed: {error}\n"


def settings_help(models: Sequence[Any], sections: Sequence[str] = SETTINGS) -> str:
    """The settings of models (names, or what `hub.resolve` found), with range, value and doc string; "" for none."""
    if not models or not sections:
        return ""
    from imgtok import hub

    found = [hub.resolve(model) for model in models]
    lines = []
    if len(found) == 1 and found[0].kind in hub.GENERATORS:  # with its decoder, where that is known
        try:
            found.append(found[0].part())
        except (OSError, ValueError) as error:
            lines = ["", f"The settings of its decoder are not listed: {error}"]
    width = min(110, shutil.get_terminal_size().columns)
    for model in found:
        configuration = hub.configuration(model)
        for section in sections:
            if (own := getattr(configuration, section, None)) is not None:
                fields = [_field_help(line, width) for line in describe(type(own), own, f"{section}.")]
                lines += ["", f"Settings of {model.path} ({model.kind}): what each must be [its value]", ""]
                lines += fields or [f"  {section} has none"]
    return "\n".join([*lines, ""])


def refuse_absent_models(command: str, argv: Sequence[str]) -> None:
    """Raise FileNotFoundError for a model that the arguments of a command or its YAML file name and that is not there:
    before the command is imported, which takes seconds. What else is wrong with the arguments is left for later.
    """
    fields = MODELS.get(command, ())
    if not fields or {"--help", "-h"} & {*argv}:
        return
    given: dict[str, Any] = {}
    words, lone = list(argv), command in LONE_MODEL
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and not equals and words and not words[0].startswith("--"):
            given[name] = words.pop(0)
        elif equals and re.fullmatch(r"[\w.-]+", name):
            given[name] = value
        elif word.endswith((".yaml", ".yml")) and Path(word).is_file():
            given = {**read_yaml(Path(word)), **given}
        elif lone and not word.startswith("-"):
            given[fields[0]], lone = word, False
    for model in (given.get(name) for name in fields):
        if isinstance(model, str) and model not in ("", "null") and model[0] not in "{[":
            places.check(model)


def check_launch_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse an inconsistent RANK, WORLD_SIZE, MASTER_ADDR, ... before torch.distributed waits on it.

    Raises ValueError that names the variable. Does nothing outside a distributed launch.
    """
    if not any(name in environment for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return
    world = _integer(environment, "WORLD_SIZE", 1, None)
    if world == 1:
        return
    rank = _integer(environment, "RANK", 0, world - 1)
    local_world = _integer(environment, "LOCAL_WORLD_SIZE", 1, world) if "LOCAL_WORLD_SIZE" in environment else world
    _integer(environment, "LOCAL_RANK", 0, local_world - 1)
    port = _integer(environment, "MASTER_PORT", 1, 65535)
    host = environment.get("MASTER_ADDR")
    if not host:
        raise ValueError("launch: MASTER_ADDR is not set; it must be the host of rank 0, such as 127.0.0.1")
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then torchrun itself listens
    _check_address(host, port, listen=rank == 0 and not hosted)


# ------------------------------------------------------------------------------------------- internals


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return
    if argv[0] == "--version":
        print(f"imgtok {imgtok.__version__}")
        return
    if argv[0] == "config":
        _print_config(argv[1:])
    elif argv[0] == "info":
        refuse_absent_models("info", argv[1:])
        _print_info(argv[1:])
    else:
        command, rest = _find_job(argv)
        refuse_absent_models(command, rest)
        _run(importlib.import_module(JOBS[command][0]), rest, f"imgtok {command}")


def _find_job(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The longest command that `argv` begins with, and the arguments after it."""
    for length in (2, 1):
        if " ".join(argv[:length]) in JOBS:
            return " ".join(argv[:length]), list(argv[length:])
    deeper = [command.split()[1] for command in JOBS if command.startswith(argv[0] + " ")]
    if deeper:
        given = f"unknown command {' '.join(argv[:2])!r}" if argv[1:] else f"{argv[0]!r} needs a second word"
        raise ValueError(f"{given}; imgtok {argv[0]} can be followed by: {', '.join(deeper)}")
    commands = list(dict.fromkeys([*(command.split()[0] for command in JOBS), *TOOLS]))
    raise ValueError(f"unknown command {argv[0]!r}{_suggest(argv[0], commands)} Commands: {', '.join(commands)}")


def _run(module: ModuleType, argv: Sequence[str], program: str) -> None:
    """Parse the arguments and run the job; both ways to start a job meet here."""
    if "--help" in argv or "-h" in argv:
        print(job_help(module.Config, program))
        print(model_help(module, argv), end="")
        return
    check_launch_environment()
    _show_log()
    config = parse(module.Config, argv, getattr(module, "POSITIONAL", None))
    try:
        with signals.raised():
            module.main(config)
    except BrokenPipeError as error:  # fine while help is printed; a job has lost something
        raise OSError("broken pipe: a process that this job was writing to has ended") from error


def _print_config(argv: list[str]) -> None:
    names = [command.replace(" ", "-") for command in JOBS]
    job = next((word for word in argv if word in names), None)
    path = next((word for word in argv if word.endswith((".yaml", ".yml"))), None)
    if "--help" in argv or "-h" in argv or not argv:
        print(f"usage: imgtok config {TOOLS['config']}\n\nJobs: {', '.join(names)}")
        return
    if job is None and path is not None:
        job = read_yaml(Path(path)).get("job")
    if job not in names:
        missing = f"unknown job {job!r}" if job else "give a job, or a YAML file with a top-level `job:`"
        raise ConfigError(f"{path or 'command line'}: {missing}; jobs: {', '.join(names)}")
    module = importlib.import_module(JOBS[str(job).replace("-", " ")][0])
    rest = [word for word in argv if word != job]
    print(to_yaml(completed(parse(module.Config, rest, getattr(module, "POSITIONAL", None)))), end="")


def _print_info(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print(f"usage: imgtok info {TOOLS['info']}")
        return
    from imgtok import hub

    found = hub.resolve(argv[0])
    model = hub.load(found)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    counts["(direct)"] = sum(p.numel() for p in model.parameters(recurse=False))
    steps = "" if found.step is None else f", after {found.step} steps of training"
    print(f"kind: {model.config.kind} ({type(model).__name__})\nplace: {found.path}{steps}")
    print(f"parameters: {_total(model):,}")
    print("\n".join(f"  {name}: {count:,}" for name, count in counts.items() if count))
    print("config:\n" + textwrap.indent(to_yaml(model.config), "  "), end="")
    print(settings_help([found]), end="")


def _total(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _overview() -> str:
    width = max(len(command) for command in JOBS)
    jobs = [f"  {command:{width}}  {about}" for command, (_, about) in JOBS.items()]
    tools = [f"  {tool:{width}}  {about}" for tool, about in TOOLS.items()]
    return "\n".join(
        [
            "imgtok: image tokenizers, and generators on their tokens",
            "",
            f"usage: imgtok JOB {USAGE}",
            "       imgtok JOB --help          lists every field of a job",
            "       imgtok sample MODEL --help lists those of the model's sampling and decoding, too",
            "       imgtok --version",
            "",
            "jobs:",
            *jobs,
            "",
            "tools:",
            *tools,
        ]
    )


def _field_help(line: FieldHelp, width: int) -> str:
    head = f"  {line.name}: {line.type} [{line.default}]"
    return "\n".join([head, *textwrap.wrap(line.doc, width, initial_indent="      ", subsequent_indent="      ")])


def _option(word: str, rest: list[str], known: Mapping[str, FieldHelp]) -> str:
    """`--key=value`, `--key value` or a bare `--flag` as `key=value`; takes the value off `rest`."""
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    if not equals and name in known:
        is_flag = known[name].type == "true or false"
        if is_flag:
            value = rest.pop(0) if rest and rest[0] in ("true", "false") else "true"
        elif not rest or rest[0].startswith("--"):
            raise ConfigError(f"command line: {word} needs a value, {known[name].type}")
        else:
            value = rest.pop(0)
    elif not equals and rest and not rest[0].startswith("--"):
        value = rest.pop(0)  # a section, or a mistake that the loader names
    return f"{name}={value}"


def _integer(environment: Mapping[str, str], name: str, low: int, high: int | None) -> int:
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    text = environment.get(name)
    if text is None:
        raise ValueError(f"launch: {name} is not set, must be {allowed}; torchrun and accelerate launch set it")
    if not re.fullmatch(r"-?\d+", text) or int(text) < low or (high is not None and int(text) > high):
        raise ValueError(f"launch: {name} is {text!r}, must be {allowed}")
    return int(text)


def _check_address(host: str, port: int, listen: bool) -> None:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"launch: MASTER_ADDR is {host!r}, which is no known host ({error})") from error
    if not listen:
        return
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ValueError(
                f"launch: rank 0 cannot listen on MASTER_ADDR={host} MASTER_PORT={port} ({error.strerror}); "
                "choose a free port, and the address of the machine that runs rank 0"
            ) from error


def _show_log() -> None:
    """Our log lines on stderr (from the first process only; warnings from all), other libraries' warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for name in ("__main__", "imgtok"):
        logging.getLogger(name).setLevel(level)


def _report_errors(action: Callable[[], None]) -> int:
    """Run `action`; turn a user's mistake into a message and an exit status (IMGTOK_DEBUG=1: raise)."""
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:  # `imgtok ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except signals.Stopped as stop:
        if os.environ.get("RANK", "0") == "0":  # the processes of a launch stop together
            print(f"imgtok: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("imgtok: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("IMGTOK_DEBUG", "0") not in ("", "0"):
            raise
        print(f"imgtok: {_message(error)}", file=sys.stderr)
        return 2
    return 0


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
