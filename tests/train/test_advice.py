"""What the messages about runs, caches and samples advise, done: each way out of each of them ends well.

Others have such a test where they are tested: a NaN and fields of other models (test_policy), a full disk
(test_resume), other data under the same name (test_policy).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from imgtok.cli import main

TINY = Path(__file__).parents[2] / "configs/tiny"
QUIET = ["training.preview_every=0", "training.trackers=[]", "num_preview=0"]
RUN = ["train", "tokenizer", f"{TINY}/flextok.yaml", "out=run", "training.steps=1", *QUIET]
CACHE = ["cache", "run/final", "out=tokens", "data.kind=shapes", "data.num_images=8", "held_out=0", "shard_size=4"]
GPT = ["train", "generator", f"{TINY}/gpt.yaml", "tokens=tokens", "tokenizer=run", "out=gpt", "training.steps=1"]
GPT += QUIET
SAMPLE = ["sample", "gpt", "out=drawn", "num=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a run, its tokens, a generator of them, and samples of it."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for command in (RUN, CACHE, GPT, SAMPLE):
            assert main(command) == 0
    return root


def cut(*paths: str) -> None:
    for path in map(Path, paths):
        path.write_bytes(path.read_bytes()[:-9])


def remove(*paths: str) -> None:
    for path in map(Path, paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def nothing() -> None:
    pass


def damage() -> None:
    cut("run/checkpoints/step_0000001/model.safetensors")
    remove("run/final")


def make_others() -> None:
    remove("tokens")
    assert main([*CACHE, "data.num_images=6"]) == 0


SHARDS = ("tokens/tokens-00000-of-00002.safetensors", "tokens/tokens-00001-of-00002.safetensors")
Way = tuple[Callable[[], None], list[str]]


class Case(NamedTuple):
    """A mistake, what is said of it, and the ways out that are advised, each something to do and a command."""

    before: Callable[[], None]
    command: list[str]
    message: str
    ways: list[Way]


def also(command: list[str], *given: str) -> Way:
    return nothing, [*command, *given]


CASES = {
    "resume=false": Case(
        nothing,
        [*RUN, "training.resume=false"],
        r"choose another `out`, continue it with training.resume=true, or delete that folder",
        [
            also(RUN, "training.resume=false", "out=other"),
            also(RUN, "training.resume=true"),
            (lambda: remove("run"), [*RUN, "training.resume=false"]),
        ],
    ),
    "fp16": Case(
        nothing,
        [*RUN, "training.precision=fp16", "out=other"],
        "choose fp32 or bf16",
        [also(RUN, "out=other", "training.precision=fp32"), also(RUN, "out=another", "training.precision=bf16")],
    ),
    "fewer steps": Case(
        nothing,
        [*RUN, "training.steps=0"],
        "ask for at least as many or choose another `out`",
        [also(RUN, "training.steps=1"), also(RUN, "training.steps=0", "out=other")],
    ),
    "too late": Case(
        nothing,
        [*RUN, "training.clip=0.5"],
        "choose another `out` for a new run, or a larger training.steps to go on",
        [also(RUN, "training.clip=0.5", "out=other"), also(RUN, "training.clip=0.5", "training.steps=2")],
    ),
    "another job": Case(
        nothing, [*GPT, "out=run"], r"choose another `out` .* or go on by `imgtok train tokenizer`", [also(RUN)]
    ),
    "no checkpoint": Case(
        lambda: remove("run/checkpoints"),
        [*RUN, "training.steps=2"],
        r"choose another `out`; init=run/final starts from its weights",
        [also(RUN, "training.steps=2", "out=other"), also(RUN, "init=run/final", "out=another")],
    ),
    "damaged checkpoints": Case(
        damage,
        RUN,
        "choose another `out` to start afresh",
        [also(RUN, "out=other")],
    ),
    "another cache": Case(
        nothing,
        [*CACHE, "shard_size=3"],
        r"shard_size 4 instead of 3\); choose another folder, or delete the old shards",
        [also(CACHE, "shard_size=3", "out=other"), (lambda: remove(*SHARDS), [*CACHE, "shard_size=3"])],
    ),
    "missing shards": Case(
        lambda: remove(SHARDS[1]),
        [*GPT, "out=other"],
        "1 of 2 shards missing .*; run the same `imgtok cache` command again",
        [also(CACHE), also(GPT, "out=other")],
    ),
    "a damaged shard": Case(
        lambda: cut(SHARDS[0]),
        [*GPT, "out=other"],
        r"delete it and run `imgtok cache` again",
        [(lambda: remove(SHARDS[0]), CACHE), also(GPT, "out=other")],
    ),
    "other tokens": Case(
        make_others,
        ["train", "generator", "gpt/config.yaml"],
        r"made_from: .*; choose another `out` and leave made_from out",
        [also(GPT, "out=other")],
    ),
    "other samples": Case(
        nothing,
        [*SAMPLE, "seed=1"],
        r"\(different: seed\); choose another folder with out=FOLDER, or delete it",
        [also(SAMPLE, "seed=1", "out=other"), (lambda: remove("drawn"), [*SAMPLE, "seed=1"])],
    ),
    "samples of whom": Case(
        lambda: remove("drawn/samples.json"),
        SAMPLE,
        "choose another folder with out=FOLDER, or delete it",
        [also(SAMPLE, "out=other"), (lambda: remove("drawn"), SAMPLE)],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_advised_helps(made, tmp_path, monkeypatch, capsys, case):
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    case.before()
    capsys.readouterr()
    assert main(case.command) == 2
    said = capsys.readouterr().err
    assert re.search(case.message, said), said
    for act, command in case.ways:
        act()
        assert main(command) == 0, capsys.readouterr().err
