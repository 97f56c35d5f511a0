"""The command line: `imgtok JOB [CONFIG.yaml] [key=value ...] [--key value ...]`.

Jobs are modules with a `Config` and a `main(config)`; they are named here as strings and imported when
asked for, so that `imgtok --help` needs no torch. The same modules run as `python -m imgtok.train.tokenizer ...`
and under `torchrun` or `accelerate launch -m`, through `run_job`.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import logging
import os
import re
import shutil
import socket
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard, get_origin

import imgtok
from imgtok import places, shipped, signals
from imgtok.config import (
    ConfigError,
    FieldHelp,
    default_of,
    describe,
    field_types,
    kind_name,
    load,
    read_yaml,
    sections_in,
    to_yaml,
)
from imgtok.files import check_there
from imgtok.sections import completed
from imgtok.usage import HELP, ModelSettings, Page, group_help, overview, settings_in_full, suggest

logger = logging.getLogger(__name__)

JOBS: Mapping[str, tuple[str, str]] = {
    "train tokenizer": ("imgtok.train.tokenizer", "train a tokenizer on images"),
    "train autoencoder": (
        "imgtok.train.autoencoder",
        "train the continuous autoencoder below tokenizers and generators of latents",
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
    "cache samples": (
        "imgtok.train.cache_samples",
        "write what a generator draws to files, its tokens or latents, to train a copy of it on them",
    ),
    "cache text": ("imgtok.train.cache_text", "write the text features of a data set's captions to files"),
    "sample": ("imgtok.sample.images", "make new images with a trained generator"),
    "reconstruct": ("imgtok.sample.reconstruct", "show images beside their reconstructions at several token counts"),
    "evaluate": ("imgtok.sample.evaluate.job", "score images or a model"),
    "evaluate shapes": (
        "imgtok.sample.benchmark.job",
        "measure on the built-in shapes whether the objects of captions appear with their own attributes",
    ),
    "complexity": ("imgtok.sample.complexity.job", "count how many tokens each image needs, and show them sorted"),
    "calibrate": (
        "imgtok.sample.calibrate.job",
        "measure how the latents of an autoencoder can be rounded to few levels",
    ),
    "check": (
        "imgtok.sample.check",
        "compare every part of a model on another device or in another precision with the CPU",
    ),
    "demo": ("imgtok.sample.demo", "show a model at work on a page in the browser"),
    "export": (
        "imgtok.sample.export",
        "write a model as the code that it was published with reads it, or a published one as imgtok's",
    ),
    "merge": (
        "imgtok.sample.merge",
        "write a model moved away from a copy that was trained on the model's own samples (Neon)",
    ),
    "plot": ("imgtok.sample.plot", "draw the training and validation curves of one or several runs"),
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
    "cache samples": ("model", "tokenizer"),
    "sample": ("model", "tokenizer"),
    "reconstruct": ("model",),
    "evaluate": ("model", "tokenizer"),
    "evaluate shapes": ("model", "tokenizer"),
    "complexity": ("model",),
    "calibrate": ("vae",),
    "check": ("model", "tokenizer"),
    "demo": ("model", "tokenizer"),
    "export": ("model", "vae"),
    "merge": ("base", "tuned"),
    "info": ("model",),
}
"""Command -> its fields that name models, which `refuse_absent_models` looks for."""
IMAGES = ("data.path", "data.val_path")
TO_TRAIN = (*IMAGES, "validation.path", "validation.val_path")
FILES: Mapping[str, tuple[str, ...]] = {
    "train tokenizer": TO_TRAIN,
    "train autoencoder": TO_TRAIN,
    "train generator": ("tokens", "latents", "text", "validation", "validation_text"),
    "cache": IMAGES,
    "cache latents": IMAGES,
    "cache text": IMAGES,
    "reconstruct": IMAGES,
    "complexity": IMAGES,
    "calibrate": IMAGES,
    "evaluate": ("images", "originals", "reference", *IMAGES, "probe_data.path", "probe_data.val_path"),
    "evaluate shapes": ("images", "baseline"),
}
"""Command -> its fields that name files or folders, likewise."""
LONE_MODEL = (
    "cache",
    "cache latents",
    "cache samples",
    "sample",
    "reconstruct",
    "evaluate shapes",
    "complexity",
    "calibrate",
    "check",
    "demo",
    "export",
    "merge",
    "info",
)
"""Commands that take the first of these as a lone word."""

TOOLS = {
    "config": "--list, NAME, or CONFIG [JOB] [key=value ...]: list, print or check configurations",
    "info": "MODEL: print the kind, the parameter counts, the configuration and the settings of a model",
    "help": "JOB [FIELD]: what a job takes, or one of its fields",
}

CONFIG_USAGE = """usage: imgtok config --list                         the configurations that ship with imgtok
       imgtok config NAME                           prints one, with comments that say how it is run;
                                                    > my.yaml keeps it to be edited
       imgtok config CONFIG [JOB] [key=value ...]   checks one, or a .yaml file, and prints it with all defaults"""

USAGE = "[CONFIG] [key=value ...] [--key value ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """The `imgtok` command; returns the exit status: 0; 2 for a user's mistake; 130 for Ctrl-C, 143 for SIGTERM and
    138 for SIGUSR1 (docs/training.md).
    """
    if argv is None:
        _keep_doc_strings()
    return _report_errors(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def run_job(module: ModuleType) -> None:
    """Run a job module as a program (`python -m imgtok.train.tokenizer ...`) with the arguments of this process."""
    _keep_doc_strings()
    program = module.__spec__.name if module.__spec__ else str(module.__name__)
    sys.exit(_report_errors(lambda: _run(module, sys.argv[1:], f"python -m {program}")))


def parse(config_class: type, argv: Sequence[str], positional: str | None = None) -> Any:
    """The `config_class` that the arguments describe: a configuration, `key=value`, `--key value`, `--flag`.

    A configuration is a YAML file or the name of one that ships with imgtok, alone or as `--config NAME`; of several a
    later one is laid over those before it. The first other word fills the field `positional`, all of them if that is a
    list. Dashes in names stand for underscores. Raises ConfigError for an unknown name (with the known ones) or a value
    that does not fit, FileNotFoundError for a file that is not there.
    """
    _refuse_spaces(argv)
    # which options are flags; a description imports all that a union holds, so only where it is needed
    known = {line.name: line for line in describe(config_class)} if any(w.startswith("--") for w in argv) else {}
    _check_help(argv, known)
    paths: list[Path] = []
    overrides: list[str] = []
    lone: list[str] = []
    several = positional is not None and get_origin(field_types(config_class)[positional]) is tuple
    words = list(argv)
    while words:
        word = words.pop(0)
        if (found := _configuration(word, words, _job_of(config_class))) is not None:
            paths.append(_check_there(found))
        elif word.startswith("--"):
            overrides.append(_option(word, words, known))
        elif match := re.match(r"([A-Za-z_][\w.-]*)=", word):
            overrides.append(match[1].replace("-", "_") + word[match.end() - 1 :])
        elif positional is not None:
            if several:
                lone.append(word)
            else:
                overrides.append(f"{positional}={word}")
                positional = None
        else:
            raise _stray(word, config_class)
    if lone:
        overrides.append(f"{positional}={','.join(lone)}")
    for override in overrides:
        _refuse_path_for_images(override, config_class)
    return load(config_class, paths, overrides)


SETTINGS = ("sampling", "decoding")
"""Sections of a job, and of a model's configuration, that have the fields of the model's own dataclass."""


def job_help(module: ModuleType, argv: Sequence[str], program: str, notes: Sequence[str] = ()) -> str:
    """The help of a job that the arguments, of which one is --help, ask for: the short page, a field, or everything;
    with the settings of the models that they or their configuration name.
    """
    positional = getattr(module, "POSITIONAL", None)
    rest, asked = _asked(argv, module.Config, positional)
    given = _given(rest, _job_of(module.Config), positional)
    known = field_types(module.Config)
    names = [given[name] for name in ("model", "tokenizer") if name in known and _is_name(given.get(name))]
    settings: list[ModelSettings] = []
    try:
        settings = settings_of(names, [section for section in SETTINGS if section in known])
    except FileNotFoundError as error:
        if "" not in given:  # named on the command line
            raise
        notes = [*notes, f"{given['']} names a model that is not there yet, so its settings are not listed: {error}"]
    return Page(module.Config, program, positional, given, settings, notes).text(asked)


def settings_of(models: Sequence[Any], sections: Sequence[str] = SETTINGS) -> list[ModelSettings]:
    """The settings of models (names, or what `hub.resolve` found), with range, value and doc string."""
    if not models or not sections:
        return []
    from imgtok import hub

    found, unlisted = [hub.resolve(model) for model in models], None
    if len(found) == 1 and found[0].kind in hub.GENERATORS:  # with its decoder, where that is known
        try:
            found.append(found[0].part())
        except (OSError, ValueError) as error:
            unlisted = ModelSettings(f"The settings of its decoder are not listed: {error}", [])
    listed = []
    for model in found:
        configuration = hub.configuration(model)
        for section in sections:
            if (own := getattr(configuration, section, None)) is not None:
                title = f"Settings of {model.path} ({model.kind}): what each must be [its value]"
                listed.append(ModelSettings(title, describe(type(own), own, f"{section}.")))
    return [*(settings for settings in listed if settings.lines), *([unlisted] if unlisted else [])]


def settings_help(models: Sequence[Any]) -> str:
    """The settings of models in full."""
    return "\n".join([*settings_in_full(settings_of(models)), ""])


def refuse_absent_models(command: str, argv: Sequence[str]) -> None:
    """Raise FileNotFoundError for a model, a file or a folder that the arguments of a command or its YAML file name and
    that is not there: before the command is imported, which takes seconds. What else is wrong is left for later.
    """
    named, files = MODELS.get(command, ()), FILES.get(command, ())
    if not (named or files) or {*HELP} & {*argv}:
        return
    _refuse_spaces(argv)
    given = _given(argv, command.replace(" ", "-"), named[0] if command in LONE_MODEL else None)
    for field in (*named, *files):
        if _is_name(value := given.get(field)):
            (places.check(value) if field in named else check_there(value, field))


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


def _keep_doc_strings() -> None:
    """Start this program again without doc strings' being thrown away, if Python was told to (`-OO`): transformers and
    diffusers check theirs when they are imported, and end the program without any.
    """
    if sys.flags.optimize < 2:
        return
    words = list(sys.orig_argv)
    for place, word in enumerate(words[1:], 1):
        if not word.startswith("-") or word in ("-", "-c", "-m"):
            break
        if words[place - 1] not in ("-W", "-X") and not word.startswith("--"):
            words[place] = word.replace("O", "") if re.fullmatch(r"-[A-Za-z]+", word) else word
    words = [word for place, word in enumerate(words) if word != "-" or sys.orig_argv[place] == "-"]
    print("imgtok: python -OO drops doc strings, which libraries need: started again with -O", file=sys.stderr)
    sys.stderr.flush()
    os.execve(sys.executable, [words[0], *words[1:]], {**os.environ, "PYTHONOPTIMIZE": "1"})


def _dispatch(argv: list[str]) -> None:
    if argv and argv[0] in ("help", *HELP):
        argv = _as_option(argv[1:])
    for place in (1, 2):  # `train help`, `sample help`: nobody means a model of that name
        named = " ".join(argv[:place]) in (*JOBS, *TOOLS) or (place == 1 and _deeper(argv[0] if argv else ""))
        if named and argv[place : place + 1] == ["help"] and not Path("help").exists():
            argv[place] = HELP[0]
    if not argv or argv[0] in HELP:
        print(overview(USAGE, JOBS, TOOLS))
    elif argv[0] == "--version":
        print(f"imgtok {imgtok.__version__}")
    elif argv[0] == "config":
        _print_config(argv[1:])
    elif argv[0] == "info":
        refuse_absent_models("info", argv[1:])
        _print_info(argv[1:])
    elif argv[0] not in JOBS and _deeper(argv[0]) and argv[1:2] and argv[1] in HELP:
        print(group_help(argv[0], JOBS))
    else:
        command, rest = _find_job(argv)
        refuse_absent_models(command, rest)
        _run(importlib.import_module(JOBS[command][0]), rest, f"imgtok {command}")


def _as_option(words: list[str]) -> list[str]:
    """`help JOB FIELD` as `JOB --help FIELD`."""
    for length in (2, 1):
        if words and (" ".join(words[:length]) in JOBS or words[0] in TOOLS):
            return [*words[:length], "--help", *words[length:]]
    return [*words, "--help"]


def _deeper(first: str) -> list[str]:
    """The second words of the commands that begin with `first`."""
    return [command.split()[1] for command in JOBS if command.startswith(first + " ")]


def _find_job(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The longest command that `argv` begins with, and the arguments after it."""
    argv = _without_benchmark(argv)
    given, deeper = " ".join(argv[:2]), _deeper(argv[0])
    if given in JOBS:
        return given, list(argv[2:])
    meant = difflib.get_close_matches(argv[1], deeper, n=1, cutoff=0.7) if argv[1:] else []
    hint = f"; did you mean '{argv[0]} {meant[0]}'?" if meant else ";"
    if argv[0] in JOBS and not (meant and not Path(argv[1]).exists()):
        return argv[0], list(argv[1:])
    if deeper:
        what = f"unknown command {given!r}{hint}" if argv[1:] else f"{argv[0]!r} needs a second word;"
        raise ValueError(f"{what} imgtok {argv[0]} can be followed by: {', '.join(deeper)}")
    commands = list(dict.fromkeys([*(command.split()[0] for command in JOBS), *TOOLS]))
    path = _configuration(argv[0], [], None)
    job = read_yaml(path).get("job") if path is not None and path.is_file() else None
    hint = f"; did you mean 'imgtok {str(job).replace('-', ' ')} {argv[0]}'?" if job else ""
    hint = hint or suggest(argv[0], [*commands, *JOBS, "--help"])
    raise ValueError(f"unknown command {argv[0]!r}{hint} Commands: {', '.join(commands)}")


def _without_benchmark(argv: Sequence[str]) -> list[str]:
    """`evaluate benchmark=shapes ...`, or with --benchmark, as `evaluate shapes ...`."""
    words = list(argv)
    for place, word in enumerate(words[1:], 1):
        name, equals, value = word.removeprefix("--").partition("=")
        if name == "benchmark" and (equals or word.startswith("--")):
            value = value if equals else " ".join(words[place + 1 : place + 2])
            if words[0] != "evaluate" or value not in _deeper("evaluate"):
                known = ", ".join(f"evaluate benchmark={name}" for name in _deeper("evaluate"))
                raise ValueError(f"benchmark: given {value!r}; there is: {known}")
            del words[place : place + (1 if equals else 2)]
            return [words[0], value, *words[1:]]
    return words


def _run(module: ModuleType, argv: Sequence[str], program: str) -> None:
    """Parse the arguments and run the job; both ways to start a job meet here."""
    if any(word.partition("=")[0] in HELP for word in argv):
        others = [f"{program} {word}" for word in _deeper(program.removeprefix("imgtok "))]
        print(job_help(module, argv, program, [f"See also: {', '.join(others)}"] if others else []))
        return
    check_launch_environment()
    _show_log()
    config = parse(module.Config, argv, getattr(module, "POSITIONAL", None))
    try:
        with signals.raised():
            module.main(config)
    except BrokenPipeError as error:  # fine while help is printed; a job has lost something
        raise OSError("broken pipe: a process that this job was writing to has ended") from error


def _asked(argv: Sequence[str], config_class: Any, positional: str | None) -> tuple[list[str], str | None]:
    """The arguments without --help, and the field or section that stands after it; None for the short page."""
    at = next(place for place, word in enumerate(argv) if word.partition("=")[0] in HELP)
    rest, asked = [*argv[:at], *argv[at + 1 :]], argv[at].partition("=")[2] or None
    word = argv[at + 1] if argv[at + 1 :] else ""
    if asked is None and re.fullmatch(r"[A-Za-z][\w.-]*", word) and _configuration(word, [], None) is None:
        names = {"all", *(line.name for line in describe(config_class)), *field_types(config_class)}
        model = positional is not None and (Path(word).exists() or word in places.packaged_models())
        if word.replace("-", "_") in names or not model:
            return [*argv[:at], *argv[at + 2 :]], word
    return rest, asked


def _configuration(word: str, rest: list[str], job: str | None) -> Path | None:
    """The file that an argument names, where it names a configuration (of `job`, if that is given): a YAML file, which
    need not be there, or one that ships with imgtok. Takes the value of `--config` off `rest`.
    """
    named, equals, name = word.partition("=")
    if named == "--config":
        if not equals and not rest:
            raise ConfigError("command line: --config needs a value, a .yaml file or a name of `imgtok config --list`")
        word, job = name if equals else rest.pop(0), None
    elif equals and re.fullmatch(r"[\w.-]+", named):
        return None
    if not word.endswith(shipped.SUFFIXES) and named != "--config" and ("/" not in word or Path(word).exists()):
        return None
    path = Path(word).expanduser()
    found = None if path.exists() else shipped.find(word)
    if found is not None and job in (None, read_yaml(found).get("job")):
        return found
    return path if named == "--config" or word.endswith(shipped.SUFFIXES) else None


def _given(argv: Sequence[str], job: str | None, positional: str | None) -> dict[str, Any]:
    """What the arguments say, by dotted name: text from the command line over values of the configuration, whose file
    stands under "". Nothing is checked.
    """
    laid: dict[str, Any] = {}
    over: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if (path := _configuration(word, words, job)) is not None:
            laid |= {"": path, **_flat(read_yaml(path))} if path.is_file() else {}
        elif word.startswith("--") and not equals and words and not words[0].startswith("--"):
            over[name] = words.pop(0)
        elif equals and re.fullmatch(r"[\w.]+", name):
            over[name] = value
        elif positional is not None and not word.startswith("-"):
            over[positional], positional = word, None
    for name, value in over.items():  # of a section of another kind the file's fields do not count
        if name.endswith(".kind") and laid.get(name, value) != value:
            laid = {known: given for known, given in laid.items() if not known.startswith(name.removesuffix("kind"))}
    return laid | over


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of sections by dotted names, and the sections themselves."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat[f"{prefix}{name}"] = value
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {}
    return flat


def _is_name(model: Any) -> TypeGuard[str]:
    """Whether what is given for a field is the name of a model, and not null or a section."""
    return isinstance(model, str) and model not in ("", "null") and model[0] not in "{["


def _job_of(config_class: Any) -> str | None:
    """The value of `job:` in the configurations of a job."""
    return next((str(default_of(item)) for item in fields(config_class) if item.name == "job"), None)


def _stray(word: str, config_class: Any) -> ConfigError:
    """The error for an argument that means nothing; images are named by the section `data` of jobs that have one."""
    if (other := shipped.find(word)) is not None:
        job = str(read_yaml(other).get("job")).replace("-", " ")
        return ConfigError(f"command line: {word!r} is a configuration of `imgtok {job}`")
    hint = f"; did you mean the configuration {near!r}?" if (near := shipped.like(word)) else ""
    if "data" in field_types(config_class):
        hint = _as_section("data", word) or hint
    return ConfigError(f"command line: {word!r} is neither a .yaml file nor key=value nor --key value{hint}")


def _refuse_path_for_images(override: str, config_class: Any) -> None:
    """Raise ConfigError for `data=photos`, where a section is needed and its value is a path that is there."""
    name, _, value = override.partition("=")
    sections = sections_in(field_types(config_class).get(name))
    if _kind_of_data(Path(value)) in [kind_name(section) for section in sections]:
        what = f"given {value!r}, must be a section{_as_section(name, value)}"
        raise ConfigError(f"command line: {name}: {what}")


def _as_section(name: str, path: str) -> str:
    """How the section `name` says that images are in a path, for a message; "" for a path that holds none."""
    kind = _kind_of_data(Path(path))
    return f"; for the images in it write {name}.kind={kind} {name}.path={path}" if kind is not None else ""


def _refuse_spaces(argv: Sequence[str]) -> None:
    """Raise ConfigError for `key = value`, which a shell hands over as three words, and `key =value`."""
    for place, (name, word) in enumerate(itertools.pairwise(argv), 2):
        alone = word == "="  # after --key, `=value` may be meant
        if (word.startswith("=") and re.fullmatch(r"[A-Za-z_][\w.-]*", name)) or (alone and name.startswith("--")):
            value = "".join(argv[place : place + 1]) if alone else word[1:]
            meant = f"{name}={value or 'VALUE'}"
            raise ConfigError(f"command line: {f'{name} {word}'!r}: there are no spaces around =; write {meant}")


def _kind_of_data(path: Path) -> str | None:
    """Which kind of data a path that exists could be, from its name."""
    path = path.expanduser()
    if path.is_dir():
        return "folder"
    return {".parquet": "parquet", ".tar": "webdataset"}.get(path.suffix) if path.is_file() else None


def _check_help(argv: Sequence[str], known: Mapping[str, FieldHelp]) -> None:
    """Raise ConfigError for an option that is no field and looks like --help."""
    for word in argv:
        if word.startswith("--") and word[2:] not in known and difflib.get_close_matches(word, HELP[:1], cutoff=0.8):
            raise ConfigError(f"command line: {word!r} is no field; did you mean --help?")


def _check_there(path: Path) -> Path:
    """`path`, if there is something; else FileNotFoundError with what is like it."""
    if path.exists():
        return path
    beside = [str(path.with_name(near)) for near in _like(path.name, path.parent)]
    near = next(iter(beside), None) or shipped.like(str(path))
    hint = f"; did you mean {near}?" if near else " (`imgtok config --list` lists those that ship with imgtok)"
    raise FileNotFoundError(f"{path}: no such configuration file{hint}")


def _like(name: str, folder: Path) -> list[str]:
    """The file of a folder whose name is most like `name`."""
    there = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return difflib.get_close_matches(name, [entry for entry in there if entry.endswith(shipped.SUFFIXES)], n=1)


def _print_config(argv: list[str]) -> None:
    names = [command.replace(" ", "-") for command in JOBS]
    if {*HELP} & {*argv} or not argv:
        print(f"{CONFIG_USAGE}\n\nJobs: {', '.join(names)}")
        return
    if "--list" in argv:
        print(_list_configurations())
        return
    alone = shipped.find(argv[0]) if len(argv) == 1 and not argv[0].endswith(shipped.SUFFIXES) else None
    if alone is not None and not Path(argv[0]).exists():  # with its comments, as a file to begin with
        print(alone.read_text(encoding="utf-8"), end="")
        return
    job = next((word for word in argv if word in names), None)
    rest = [word for word in argv if word != job]
    path = next((found for word in rest if (found := _configuration(word, [], None)) is not None), None)
    if job is None and path is not None:
        job = read_yaml(_check_there(path)).get("job")
    if job not in names:
        if path is None and argv and re.fullmatch(r"[\w./-]+", argv[0]) and argv[0][0] != "-":
            raise _no_such_configuration(argv[0], names)
        missing = f"unknown job {job!r}" if job else "give a job, or a YAML file with a top-level `job:`"
        raise ConfigError(f"{path or 'command line'}: {missing}; jobs: {', '.join(names)}")
    module = importlib.import_module(JOBS[str(job).replace("-", " ")][0])
    print(to_yaml(completed(parse(module.Config, rest, getattr(module, "POSITIONAL", None)))), end="")


def _no_such_configuration(name: str, jobs: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(name, jobs, n=1)
    near = shipped.like(name) or (close[0] if close else None)
    hint = f"did you mean {near!r}? " if near else ""
    return ConfigError(
        f"command line: {name!r} is neither a configuration nor a job; {hint}imgtok config --list lists the "
        f"configurations that ship with imgtok; jobs: {', '.join(jobs)}"
    )


def _list_configurations() -> str:
    """A line for each configuration that ships with imgtok, and what to do with them."""
    found = shipped.configurations()
    width = max(map(len, found))
    room = max(40, shutil.get_terminal_size().columns - width - 2) if sys.stdout.isatty() else 200
    lines = [
        f"{name:{width}}  {textwrap.shorten(shipped.about(path), room, placeholder=' ...')}"
        for name, path in found.items()
    ]
    return "\n".join([*lines, "", CONFIG_USAGE])


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
    if hasattr(model, "cost"):
        print(f"an image: {'' if model.fixed_length and len(model.rates()) == 1 else 'at most '}{model.cost()}")
    print("config:\n" + textwrap.indent(to_yaml(model.config), "  "), end="")
    print(settings_help([found]), end="")


def _total(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
