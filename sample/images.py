"""`imgtok sample`: new images from a trained generator, as numbered PNGs in a folder and a grid beside it, or as one
.npz.

The work is divided by index over the processes of the launch. Each finished image is a file, written in
one step: a job that was interrupted goes on where it stopped, and with any number of processes.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imgtok import announce, pictures, signals
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveInt, check, to_dict
from imgtok.data.files import OVERVIEW, numbered_images, overview_of
from imgtok.files import check_there, file_sha256, replacing
from imgtok.generators.known import PARTS, WAYS, Known, shown
from imgtok.generators.pipeline import Drawn, Made, Pipeline, Precision, Subject, batches_of, pipeline
from imgtok.hub import controls_of
from imgtok.metrics.arrays import open_npz
from imgtok.metrics.saved_images import RECORD
from imgtok.pictures import preprocess
from imgtok.runtime import process_state
from imgtok.sample import calls_figure
from imgtok.sample.labels import in_words, labels_by_class, labels_in_turn, num_labels, shown_by_label
from imgtok.sections import Settings
from imgtok.text.parsing import Parse, Parser
from imgtok.tokenizers.calls import Totals, summary, together
from imgtok.tokenizers.tokens import Tokens

logger = logging.getLogger(__name__)

POSITIONAL = "model"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draws images from a generator: PNGs named by their index, `samples.json` with their labels (classes, or numbers
    of prompts) and, where images have numbers of tokens of their own, these; where tokens were guessed, `calls.svg`
    says how well; and beside their folder a picture of many of them.
    """

    job: Literal["sample"] = "sample"
    """Which program this file is for."""
    model: str
    """Model folder or Hub name of the generator."""
    tokenizer: str | None = None
    """Model folder or Hub name of the tokenizer; null takes the one inside the generator's folder."""
    out: Path = Path("outputs/samples")
    """Folder of the images, and of nothing that other programs could take for one."""
    num: PositiveInt = 64
    """Images to draw; image i is of class classes[i % number of classes], or of prompt i % number of prompts, unless
    `order` says otherwise."""
    classes: tuple[int | str, ...] = ()
    """Classes to draw, by number or by name, -1 for no class; empty draws all in turn."""
    prompts: str | None = None
    """For a generator that reads text: a text file (.txt) with a prompt a line, or one prompt."""
    text_encoder: str | None = None
    """Folder or Hub name of the text encoder, or minilm; null takes the one that the generator names."""
    known: tuple[Path, ...] = ()
    """Image files of which a part is kept, and the rest drawn in or around it, by a generator that can: image i goes
    with known[i % number of files]."""
    keep: str | None = None
    """The part of `known` that is kept: left, right, top or bottom (that half), center (the middle half of rows and
    columns) or border (all around that); or an image file that is white there."""
    per_class: PositiveInt | None = None
    """Images of each class or prompt; takes the place of `num`."""
    order: Literal["in_turn", "by_class"] = "in_turn"
    """Classes or prompts in turn, or `per_class` images of one and then of the next, as papers number them."""
    seed: NonNegativeInt = 0
    """Image i of a seed has the same noise and draws whatever the batch size or number of processes."""
    batch_size: PositiveInt = 64
    """Images drawn at once by one process."""
    format: Literal["png", "npz"] = "png"
    """Numbered PNGs, or one `samples.npz` as the ADM evaluator reads it."""
    controls: tuple[str, ...] = ()
    """What is done to prompts while images are drawn, so that each object gets its own attributes: one or more of the
    controls that docs/controls.md lists."""
    control_settings: Settings = Settings()
    """Their settings, by control: control_settings.NAME.strength=0.5, say."""
    entities: tuple[str, ...] = ()
    """What the prompt names, for controls: 'red circle,blue star', in words of the prompt, the last of them a noun, or
    with the noun marked by a star. Of several prompts a text file (.txt) with a line for each, of which an empty one
    leaves its prompt to the parser. Empty leaves all to it."""
    parser: Parser = "grammar"
    """Who finds what prompts name: the grammar that is built in, or textblob or spacy where they are installed."""
    sampling: Settings = Settings()
    """How tokens or latents are drawn: settings of the generator; those not given are as in its configuration."""
    decoding: Settings = Settings()
    """How images are made of them: settings of the decoder, likewise."""
    num_tokens: PositiveInt | None = None
    """Tokens drawn for each image; null draws all that the generator knows."""
    grid: NonNegativeInt = 64
    """Most images in the overview, a row a class or prompt, of as many as fit. It is called as the folder is,
    `samples-grid.png`, and lies beside it. 0 writes none."""
    precision: Precision = "fp32"
    """Arithmetic of generator and decoder; bf16 is faster where the hardware has it, and changes images a little."""
    exact: bool = False
    """On a CPU, files that are equal to the byte whatever the batch size or the number of processes: images are
    computed in blocks of one size, the last one padded, with a fixed number of threads. Several times slower."""
    threads: PositiveInt | None = None
    """CPU threads per process; null takes torch's own number (OMP_NUM_THREADS, or all cores), or 1 with exact=true,
    where another number can show in an image's last bits."""

    def __post_init__(self) -> None:
        check(self)
        if not self.controls and (self.entities or self.parser != "grammar"):
            name = "entities" if self.entities else "parser"
            raise ValueError(f"{name}: this is for controls, and there are none; say controls=..., or leave {name} out")
        if self.order == "by_class" and self.per_class is None:
            raise ValueError("order: by_class needs per_class, the number of images of each class")
        if self.known and self.keep is None:
            raise ValueError(f"keep: is required with known; it must be {WAYS}")
        if self.keep is not None and not self.known:
            raise ValueError("known: is required with keep; it names the image files of which a part is kept")


def main(config: Config) -> None:
    """Draws what is missing of the job, then writes the grid and the record."""
    check_known(config)
    state = process_state()
    pipe = pipeline(
        config.model,
        tokenizer=config.tokenizer,
        device=state.device,
        dtype=config.precision,
        text_encoder=config.text_encoder,
        exact=config.exact,
        threads=config.threads,
        controls=controls_of(config.controls, config.control_settings),
    )
    plan = Plan.make(config, pipe)
    labels = plan.labels
    say_what_is_drawn(config, plan, pipe)
    folder = config.out / ".parts" if config.format == "npz" else config.out
    if state.is_main_process:
        claim_folder(config, labels, describe_request(config, plan, pipe))
    if finished_npz(config, len(labels)):
        shutil.rmtree(folder, ignore_errors=True)  # if the process that packed it was killed before it did
        logger.info("%s is complete (%d images): nothing to do", npz_path(config), len(labels))
        return
    if state.is_main_process and config.format == "npz":
        unpack_npz(npz_path(config), folder)
    state.wait_for_everyone()
    mine = range(state.process_index, len(labels), state.num_processes)
    there = numbered_images(folder)
    missing = [i for i in mine if there.get(i) != image_path(folder, i)]
    announce.share(len(missing), "image", "draw", state.num_processes)
    try:
        draw_images(config, pipe, plan, missing, folder, show_progress=state.is_main_process)
    except KeyboardInterrupt as stop:  # of SIGINT itself, or `Stopped` of the other signals
        number = getattr(stop, "number", signal.SIGINT)
        where = f"what is finished is in {folder}; start the same command again to go on"
        raise signals.Stopped(number, f"{signals.name_of(number)}: stopped; {where}") from None
    state.wait_for_everyone()
    if state.is_main_process:
        finish(config, plan, folder, pipe)


def check_known(config: Config) -> None:
    """Raises FileNotFoundError or ValueError for known pictures that are no files, and for a mask that does not lie
    over them: of each the square in the centre is taken.
    """
    for path in config.known:
        check_there(path, "known")
        if path.expanduser().is_dir():
            raise ValueError(f"known: {path} is a folder; name image files in it, known={path}/a.png,{path}/b.png")
    if config.keep in (None, *PARTS) or not Path(str(config.keep)).expanduser().is_file():
        return
    (width, height), *sizes = (decoded(path).size for path in (Path(str(config.keep)), *config.known))
    for path, size in zip(config.known, sizes, strict=True):
        if width * size[1] != height * size[0]:
            raise ValueError(
                f"keep: {config.keep} is {width} x {height} pixels, and {path} {size[0]} x {size[1]}: a mask must have "
                "the shape of the picture"
            )


def decoded(path: Path) -> Image.Image:
    """The picture in a file. Raises UnreadableImage."""
    return pictures.decode_image(path.expanduser().read_bytes(), str(path))


def say_what_is_drawn(config: Config, plan: Plan, pipe: Pipeline) -> None:
    """The line that the job begins with."""
    assert pipe.found is not None, "it was loaded by its name"
    model, decoder = pipe.found
    what = "prompt" if plan.prompts else "class"
    count = len({*plan.labels})
    subjects = f"{count} {what}{'' if count == 1 else 's' if plan.prompts else 'es'}"
    drawn = f"{len(plan.labels)} of {subjects}, seed {config.seed}"
    if plan.known is not None:
        drawn += f", around {len(plan.known)} picture{'s'[: len(plan.known) != 1]} (keep={config.keep})"
    announce.begins(
        "sample", model=model.in_words, decoder=decoder.in_words, images=drawn, on=pipe.device, out=config.out
    )
    for parse in plan.parses[:MOST_SAID]:
        logger.info("%r: %s", parse.prompt, "; ".join(parse.lines()))
    if len(plan.parses) > MOST_SAID:
        logger.info(
            "... and %d more prompts: what was understood of each is in %s", len(plan.parses) - MOST_SAID, RECORD
        )


MOST_SAID = 8
"""Prompts of which it is said what controls understood."""


@dataclass(frozen=True)
class Plan:
    """What each image of a job is drawn for, by index, and how."""

    labels: list[int]
    """Classes, or numbers of prompts."""
    prompts: list[str]
    """Empty for a generator that draws classes."""
    sampling: Any
    decoding: Any
    classes: tuple[int, ...] = ()
    """Those that were asked for, by number."""
    known: Known | None = None
    """What the images are drawn around, image i around row i % number of rows."""
    parses: tuple[Parse, ...] = ()
    """What controls understand of each prompt."""

    @classmethod
    def make(cls, config: Config, pipe: Pipeline) -> Plan:
        """Raises ValueError for what the models cannot do, before anything is drawn."""
        sampling = config.sampling.over(pipe.sampling, "sampling")
        decoding = config.decoding.over(pipe.decoding, "decoding")
        pipe.check_counts((config.num_tokens,))
        prompts = [] if config.prompts is None else read_prompts(config.prompts)
        if prompts:
            pipe.encoder()  # which says so if this generator does not read text
        numbers = tuple(pipe.class_numbers(config.classes))
        labels = plan_labels(config, len(prompts) or num_labels(pipe), numbers)
        known = pipe.known(config.known, config.keep) if config.known else None
        if pipe.controls and not prompts:
            raise ValueError(
                "prompts: controls act on prompts, and there are none; say prompts=..., or leave controls out"
            )
        given = read_entities(config.entities, len(prompts))
        parses = tuple(pipe.read_prompts(prompts, given, parser=config.parser)) if pipe.controls else ()
        return cls(labels, prompts, sampling, decoding, numbers, known, parses)

    def subjects(self, indices: Sequence[int]) -> list[Subject]:
        """Classes or prompts of some of the images."""
        return [self.prompts[self.labels[index]] if self.prompts else self.labels[index] for index in indices]

    def parses_of(self, indices: Sequence[int]) -> list[Parse] | None:
        """What controls understand of the prompts of some of the images."""
        return [self.parses[self.labels[index]] for index in indices] if self.parses else None

    def known_of(self, indices: Sequence[int]) -> Known | None:
        """What some of the images are drawn around."""
        return None if self.known is None else self.known[[index % len(self.known) for index in indices]]


def plan_labels(config: Config, num_classes: int, classes: Sequence[int]) -> list[int]:
    """The label of every index, in the order that is asked for. Raises ValueError for a class outside the model's."""
    if config.order == "by_class":
        assert config.per_class is not None, "see Config"
        return labels_by_class(classes, config.per_class, num_classes, unlabelled=True)
    count = config.per_class * (len(classes) or num_classes) if config.per_class else config.num
    return labels_in_turn(classes, count, num_classes, unlabelled=True)


def read_prompts(prompts: str) -> list[str]:
    """The lines of a .txt file that are not blank, or the one prompt. ValueError for a file without any."""
    if not prompts.endswith(".txt"):
        return [prompts]
    lines = [line.strip() for line in Path(prompts).expanduser().read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"prompts: {prompts} holds no prompt; write one a line")
    return [line for line in lines if line]


def read_entities(entities: Sequence[str], count: int) -> list[Sequence[str] | None] | None:
    """Those of each of `count` prompts, None for the parser's; None where none are given. Raises ValueError for a file
    of another number of lines, or for several prompts without a file.
    """
    if not entities:
        return None
    if len(entities) > 1 or not entities[0].endswith(".txt"):
        if count != 1:
            raise ValueError(
                f"entities: given for {count} prompts; write a text file with a line for each prompt, entities=FILE.txt"
            )
        return [entities]
    lines = Path(entities[0]).expanduser().read_text(encoding="utf-8").splitlines()
    if len(lines) != count:
        raise ValueError(f"entities: {entities[0]} has {len(lines)} lines for {count} prompts; write one for each")
    return [[part.strip() for part in line.split(",") if part.strip()] or None for line in lines]


def claim_folder(config: Config, labels: Sequence[int], request: dict[str, Any]) -> None:
    """Records the request in the folder; refuses one that holds images of another request or of unknown origin.

    A request of which no image was finished, because a setting or a file was wrong, does not count. A larger or
    smaller number of images is the same request: what is there already is kept. With order=by_class it is
    another one, since the classes of the images then depend on it. The record of the same images stays as it is.
    """
    path = config.out / RECORD
    drawn = (path for folder in (config.out, config.out / ".parts") for path in numbered_images(folder).values())
    images, kept = [*config.out.glob("samples.npz"), *drawn], dict[str, Any]()
    if images and path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        previous = record.get("request")
        if previous != request:
            known = previous if isinstance(previous, dict) else {}
            changed = [key for key in request | known if known.get(key) != request.get(key)]
            raise ValueError(
                f"{config.out} holds images of another request (different: {', '.join(changed)}); "
                "choose another folder with out=FOLDER, or delete it"
            )
        if record.get("labels") == list(labels):
            return
        kept = {name: record[name] for name in ("drawing",) if name in record}
    elif images:
        raise ValueError(
            f"{config.out} holds {images[0].name} but no {RECORD}, so it is not known what was drawn there; "
            "choose another folder with out=FOLDER, or delete it"
        )
    if not images:  # and so nothing that lines of an earlier job would count
        for path_of_lines in config.out.glob(CALLS):
            path_of_lines.unlink()
        for path_of_lines in config.out.glob(NOTES.format("*")):
            path_of_lines.unlink()
    write_record(path, {"request": request, "labels": list(labels)} | kept)


def write_record(path: Path, record: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")


def describe_request(config: Config, plan: Plan, pipe: Pipeline) -> dict[str, Any]:
    """All that the images depend on; the models by their fingerprints, since a folder may be trained again."""
    assert pipe.found is not None, "it was loaded by its name"
    model, tokenizer = pipe.found
    request = to_dict(config)
    for name in ("out", "num", "per_class", "batch_size", "grid", "threads", "known", "keep", "entities", "parser"):
        del request[name]
    if config.keep is not None:  # files may be other ones by now
        request["known"] = [file_sha256(path.expanduser()) for path in config.known]
        request["keep"] = config.keep if config.keep in PARTS else file_sha256(Path(config.keep).expanduser())
    if config.order == "by_class":
        request["per_class"] = config.per_class
    if plan.parses:
        request["entities"] = [parse.as_json() for parse in plan.parses]
    else:
        del request["controls"], request["control_settings"]  # records of before have none
    return request | {
        "classes": list(plan.classes),
        "prompts": plan.prompts,
        "sampling": to_dict(plan.sampling),
        "decoding": to_dict(plan.decoding),
        "model": model.fingerprint(),
        "tokenizer": tokenizer.fingerprint(),
    }


def draw_images(
    config: Config,
    pipe: Pipeline,
    plan: Plan,
    missing: Sequence[int],
    folder: Path,
    *,
    show_progress: bool,
) -> None:
    """Draws the images of the missing indices and writes each to its own file."""
    with tqdm(total=len(missing), unit="image", desc="sample", disable=not show_progress) as progress:
        for indices, made, notes in generate(config, pipe, plan, missing):
            counts = made.drawn.lengths.tolist() if isinstance(made.drawn, Tokens) and pipe.own_lengths else None
            with signals.deferred() as requests:  # what is drawn is kept
                for place, index in enumerate(indices):
                    comment = "" if counts is None else in_comment(counts[place])
                    pictures.save_png(made.images[place], image_path(folder, index), comment)
                note_drawing(config.out, made.drawn)
                note_controls(config.out, notes)
            progress.update(len(indices))
            if requests.number:
                raise signals.Stopped(requests.number)


CALLS = ".drawing-*.jsonl"
"""Lines of what batches took to draw, a file a process, until the record has them."""
FIGURE = "calls.svg"
"""These as a figure, which no program takes for one of the images."""


def note_drawing(out: Path, drawn: Drawn) -> None:
    """Notes what a batch took, where its tokens were guessed and judged."""
    if isinstance(drawn, Tokens) and drawn.calls is not None and drawn.calls.judged.any():
        with (out / CALLS.replace("*", str(process_state().process_index))).open("a", encoding="utf-8") as file:
            file.write(json.dumps(drawn.calls.totals()) + "\n")


NOTES = "controls-{}.jsonl"
"""What controls did, a file a process."""


def note_controls(folder: Path, notes: Sequence[Mapping[str, Any]]) -> None:
    """Adds what controls did in a batch: a JSON line a control and step, with the numbers of the images."""
    if notes:
        with (folder / NOTES.format(process_state().process_index)).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(note) + "\n" for note in notes))


def noted_drawing(out: Path) -> Totals | None:
    """What all batches together took, of this run and of those before that drew other images of the request."""
    lines = [line for path in sorted(out.glob(CALLS)) for line in path.read_text(encoding="utf-8").splitlines()]
    before = json.loads((out / RECORD).read_text(encoding="utf-8")).get("drawing")
    parts = [json.loads(line) for line in lines] + ([before["totals"]] if before else [])
    return together(parts) if parts else None


def generate(
    config: Config, pipe: Pipeline, plan: Plan, indices: Sequence[int]
) -> Iterator[tuple[Sequence[int], Made, list[dict[str, Any]]]]:
    """Batches of indices, what is made for them, and what controls did."""
    for chunk in batches_of(indices, config.batch_size):
        notes: list[dict[str, Any]] = []
        made = pipe.images_at(
            (config.num_tokens,),
            plan.subjects(chunk),
            chunk,
            seed=config.seed,
            sampling=plan.sampling,
            decoding=plan.decoding,
            known=plan.known_of(chunk),
            parses=plan.parses_of(chunk),
            notes=notes,
        )
        yield chunk, made[config.num_tokens], notes


TOKENS = "tokens: "
"""Before the number, in the comment of an image's file."""


def in_comment(count: int) -> str:
    """What the file of an image says of the number of its tokens: so an interrupted job need not draw it again."""
    return f"{TOKENS}{count}"


def count_of(path: Path) -> int:
    """The number of tokens that the file of an image tells of. Raises ValueError for a file that does not."""
    with Image.open(path) as image:
        before, _, count = image.info.get("Comment", "").partition(TOKENS)
    if before or not count.isdecimal():
        raise ValueError(f"{path}: the file does not tell how many tokens its image took; delete it and start again")
    return int(count)


def image_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def read_image(path: Path) -> Tensor:
    """uint8 (3, H, W) from one of our own PNGs."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def finish(config: Config, plan: Plan, folder: Path, pipe: Pipeline) -> None:
    """Writes the grid and the numbers of tokens, and packs the .npz."""
    labels, arrays, note = plan.labels, {labels_name(config): plan.labels}, None
    overview = save_grid(draw_grid(config, plan, pipe, folder), config.out) if config.grid else None
    if (took := noted_drawing(config.out)) is not None:
        said = summary(took)
        record = json.loads((config.out / RECORD).read_text(encoding="utf-8"))
        write_record(config.out / RECORD, record | {"drawing": {"totals": took} | said})
        calls_figure.save(said, config.out / FIGURE)
        for path in config.out.glob(CALLS):
            path.unlink()
        note = f"{said['calls']} calls of the network an image{calls_figure.each_gave(said)} ({FIGURE})"
    if pipe.own_lengths:
        arrays["tokens"] = counts = [count_of(image_path(folder, index)) for index in range(len(labels))]
        record = json.loads((config.out / RECORD).read_text(encoding="utf-8"))
        write_record(config.out / RECORD, record | {"tokens": counts})
        note = announce.counts_in_words(counts)
    if config.format == "npz":
        pack_npz(folder, npz_path(config), arrays)
        folder = npz_path(config)
    announce.ends(folder, *([overview] if overview else []), note=note)


def save_grid(grid: Tensor, out: Path) -> Path | None:
    """The overview beside the folder, or None where nothing can be written there or somebody's own picture is: the
    images are what was asked for.
    """
    path = grid_path(out)
    if path.exists() and not is_overview(path):
        logger.warning("no overview: %s is there and none of this program's; move it, or choose another out", path)
        return None
    try:
        pictures.save_png(grid, path, OVERVIEW_MARK)
    except OSError as error:
        logger.warning("no overview: %s cannot be written (%s)", path, error.strerror)
        return None
    (out / OVERVIEW).unlink(missing_ok=True)  # an older version put it among the images
    return path


def grid_path(out: Path) -> Path:
    """Beside the folder of images: whatever reads all images of the folder should find images of one size."""
    out = out if out.name not in ("", "..") else out.resolve()
    return out.parent / overview_of(out.name)


OVERVIEW_MARK = "overview of images of imgtok sample"
"""What the file says of itself, so that no other is replaced."""


def is_overview(path: Path) -> bool:
    """Whether a file is an overview that this program wrote."""
    try:
        with Image.open(path) as image:
            return image.info.get("Comment") == OVERVIEW_MARK
    except (OSError, SyntaxError, ValueError):
        return False


SHOWN = 8
"""The most known pictures in the overview."""


def draw_grid(config: Config, plan: Plan, pipe: Pipeline, folder: Path) -> Tensor:
    """A picture of at most `config.grid` of the images in a folder, uint8 (3, height, width): a row a class or prompt,
    below what is known of them.
    """
    groups, what = [], "prompt" if plan.prompts else "class"
    if plan.known is not None:
        some = preprocess(config.known[:SHOWN], pipe.image_size)
        groups.append(("known", pictures.to_uint8(shown(some, plan.known[range(len(some))].mask))))
    for label, indices in shown_by_label(plan.labels, config.grid).items():
        images = torch.stack([read_image(image_path(folder, index)) for index in indices])
        groups.append((in_words(label, plan.prompts or pipe.class_names, what), images))
    return pictures.labelled_grid(groups)


def npz_path(config: Config) -> Path:
    return config.out / "samples.npz"


def finished_npz(config: Config, count: int) -> bool:
    """Whether the .npz of this request is there; its images are no longer there one by one."""
    if config.format != "npz" or not npz_path(config).is_file():
        return False
    with open_npz(npz_path(config)) as arrays:
        return len(arrays[labels_name(config)]) == count


def labels_name(config: Config) -> str:
    """The name of the labels in the .npz: arr_1 are classes to the ADM evaluator and to ours, which prompts are not."""
    return "arr_1" if config.prompts is None else "prompts"


def unpack_npz(path: Path, folder: Path) -> None:
    """Lays out the images of an .npz that a job of another size packed, so that they need not be drawn again."""
    if not path.is_file():
        return
    with open_npz(path) as arrays:
        counts = arrays["tokens"].tolist() if "tokens" in arrays else None
        for index, image in enumerate(torch.from_numpy(arrays["arr_0"])):
            comment = "" if counts is None else in_comment(counts[index])
            pictures.save_png(image.permute(2, 0, 1), image_path(folder, index), comment)


def pack_npz(folder: Path, path: Path, numbers: dict[str, list[int]]) -> None:
    """arr_0 (n, H, W, 3) uint8 and each list of n numbers, such as the labels arr_1, in index order: in turn over the
    classes, as the ADM evaluator's IS needs it, unless another order was asked for.
    """
    count = len(next(iter(numbers.values())))
    _, height, width = read_image(image_path(folder, 0)).shape
    images = np.empty((count, height, width, 3), np.uint8)
    for i in range(count):
        images[i] = read_image(image_path(folder, i)).permute(1, 2, 0).numpy()
    with replacing(path) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = {"arr_0": images} | {name: np.array(values) for name, values in numbers.items()}
        np.savez(file, **arrays)
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_job(sys.modules[__name__])
