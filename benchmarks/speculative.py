"""What guessing tokens saves a trained GPT: calls of the network, accepted drafts, and time; and what it costs.

    python benchmarks/speculative.py MODEL                      # windows 8, 16 and 32, groups of 3, 10, 25 and 50
    python benchmarks/speculative.py MODEL --windows 16 --groups 10 --images 8 --threads 2
    python benchmarks/speculative.py MODEL --images 512 --batch 16 --oracle --out vq.json --figure vq.png
    python benchmarks/speculative.py MODEL --tails              # guesses of positions that no window had yet
    python benchmarks/speculative.py --passes                   # a call of GPT-B over 1, 4, 8, 16 and 32 tokens
    python benchmarks/speculative.py MODEL --passes             # both, and what GPT-B would gain with these guesses
    python benchmarks/speculative.py --predict vq.json          # the same, by guesses that were counted before

Methods take turns, batch by batch, in the other order at every second. NFE are calls of the network for an image, one
for both streams of guidance, the first call among them; `tokens a call` is the number of tokens by that of calls;
`accepted length` is tokens a call after the first (the mean accepted length), `accepted` the share of judged guesses
that stood, and `one token` that of calls that gave a single token. Seconds are of an image, the median, tokens alone
and not their decoding, and a share of those of the batch; `times` is the median of exact / method for the same images,
of wall time and of CPU seconds, which other programs disturb less.

With --oracle, images are decoded and judged: how many show the one object that was asked for, with the standard error
of that share, and the Fréchet distance to fresh renders, beside that of other renders. Both need a tokenizer that was
trained on the built-in shapes. `jacobi` and `coupled` without groups draw from the law of `exact`; the others do not.

A prediction is no measurement: accepted length, times the cost of a call over one token, by that of a call over the
window. `speculative_figure.py` draws what --out of several models wrote.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import speculative_figure
import torch
from shapes_judges import Judges, check_classes, scores
from torch import Tensor
from tqdm import tqdm

from imgtok import hub
from imgtok.generators import speculative_gpt
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.sampling import TokenSampling
from imgtok.generators.speculative import Jacobi
from imgtok.generators.speculative_recycled import Recycling
from imgtok.layers.linear import packed_linears
from imgtok.metrics.scorers import Scorer
from imgtok.tokenizers.calls import Totals, summary, together
from imgtok.tokenizers.tokens import Tokens

SLOTS = (1, 4, 8, 16, 32)


@dataclass
class Method:
    """A way of decoding, and what it has taken so far."""

    name: str
    changes: dict[str, Any]
    tail: str = "last"
    took: list[Totals] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    judges: list[Scorer] = field(default_factory=list)
    """Of its images."""

    @property
    def window(self) -> int:
        return int(self.changes.get("window", 1))

    def drafter(self, **given: Any) -> Jacobi:
        return Recycling(**given) if self.tail == "recycled" else Jacobi(self.tail, **given)

    def draw(self, model: GPT, sampling: TokenSampling, labels: Tensor, indices: range, seed: int) -> Tokens:
        how = replace(sampling, **self.changes)
        with patch.object(speculative_gpt, "Jacobi", self.drafter):
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = model.generate(labels, seed=seed, indices=indices, sampling=how)
            if model.device.type != "cpu":
                torch.accelerator.synchronize()
        self.wall.append((time.perf_counter() - wall) / len(indices))
        self.cpu.append((time.process_time() - cpu) / len(indices))
        assert tokens.calls is not None
        self.took.append(tokens.calls.totals())
        return tokens


def methods(windows: list[int], groups: list[int], *, tails: bool, gumbel: bool) -> list[Method]:
    """`exact` first."""
    found = [Method("exact", {"decoding": "exact"})]
    for window in windows:
        one: list[tuple[str, dict[str, Any]]] = [("jacobi", {"decoding": "jacobi"})]
        one.append(("coupled", {"decoding": "coupled"}))
        if gumbel:
            one.append(("coupled, gumbel", {"decoding": "coupled", "coupling": "gumbel"}))
        for way in ("grouped", "coupled"):
            one += [(f"{way} G={size}", {"decoding": way, "group_size": size}) for size in groups]
        for name, changes in one:
            for tail in ("last", "uniform", "recycled") if tails else ("last",):
                label = f"{name}, tail {tail}" if tails else name
                found.append(Method(label, {**changes, "window": window}, tail))
    return found


def measure(
    model: GPT, sampling: TokenSampling, ways: list[Method], judges: Judges | None, options: argparse.Namespace
) -> None:
    for way in ways if judges is not None else ():
        way.judges = judges.fresh()
    starts = range(-options.batch, options.images, options.batch)  # the first batch is for warming up
    with tqdm(total=len(starts) * len(ways), unit="batch", mininterval=1) as progress:
        for start in starts:
            indices = range(max(start, 0), min(max(start, 0) + options.batch, options.images))
            labels = torch.tensor(indices, device=model.device) % model.config.num_classes
            for way in ways if (start // options.batch) % 2 else reversed(ways):
                progress.set_postfix_str(f"{way.name}, window {way.window}", refresh=False)
                tokens = way.draw(model, sampling, labels, indices, options.seed)
                if start < 0:
                    del way.wall[:], way.cpu[:], way.took[:]
                elif judges is not None:
                    judges.see(way.judges, tokens, labels, indices, options.seed)
                progress.update()


def passes(threads: int, rounds: int, *, tiny: bool = False) -> dict[int, float]:
    """Median seconds of a call of GPT-B, two rows, over some tokens after 128 that are in the cache."""
    config = GPTConfig() if not tiny else GPTConfig(vocab_size=64, width=32, depth=1, num_heads=2)
    model = GPT(config).eval()
    cache = model.new_cache(2, config.num_tokens)
    found: dict[int, list[float]] = {slots: [] for slots in SLOTS}
    with torch.no_grad(), packed_linears(model):  # as `generate` does
        model.prefill(torch.tensor([1, -1]), cache)
        model.step(torch.zeros(2, 127, dtype=torch.long), cache)
        for number in range(rounds + 1):
            for slots in SLOTS if number % 2 else reversed(SLOTS):
                cache.truncate(128)
                ids = torch.zeros(2, slots, dtype=torch.long)
                start = time.perf_counter()
                model.step(ids, cache)
                if number:
                    found[slots].append(time.perf_counter() - start)
    medians = {slots: statistics.median(times) for slots, times in found.items()}
    name = "a tiny model" if tiny else "GPT-B"
    print(f"\n{name}, {threads} threads, 2 rows, 128 tokens in the cache, median of {rounds} calls")
    print("| slots | ms | times one slot |\n| --- | --- | --- |")
    for slots, seconds in medians.items():
        print(f"| {slots} | {1000 * seconds:.1f} | {seconds / medians[1]:.2f} |")
    return medians


def cost(window: int, medians: dict[int, float]) -> float:
    """A call over a window by one over a single token, between the measured ones on a straight line, or beyond the
    longest in proportion.
    """
    lower = max(slots for slots in medians if slots <= window)
    upper = min((slots for slots in medians if slots >= window), default=lower)
    if window > upper:
        return medians[upper] / medians[1] * window / upper
    share = 0.0 if upper == lower else (window - lower) / (upper - lower)
    return (medians[lower] * (1 - share) + medians[upper] * share) / medians[1]


def row(way: Method, exact: Method, num_tokens: int, medians: dict[int, float] | None) -> dict[str, Any]:
    said = summary(together(way.took))
    ratios = {
        name: statistics.median(a / b for a, b in zip(getattr(exact, name), getattr(way, name), strict=True))
        for name in ("wall", "cpu")
    }
    found = {
        "method": way.name,
        "window": way.window,
        "NFE": said["calls"],
        "tokens a call": round(num_tokens / said["calls"], 2),
        "accepted length": said["tokens_per_call"],
        "accepted": said.get("accepted_share"),
        "one token": said.get("single_share"),
        "seconds": round(statistics.median(way.wall), 3),
        "times": round(ratios["wall"], 2),
        "times, CPU": round(ratios["cpu"], 2),
    }
    found |= scores(way.judges, said["images"])
    if medians is not None:
        found["GPT-B, predicted"] = predicted(found, medians)
    return found | {"by token": said.get("accepted_by_token")}


def predicted(row: dict[str, Any], medians: dict[int, float]) -> float:
    """By how much a network of these seconds a call would be faster, if as many of its guesses stood."""
    return round(row["accepted length"] / cost(row["window"], medians), 2)


def predict(path: Path, medians: dict[int, float]) -> list[dict[str, Any]]:
    """The predictions for what --out wrote of a model."""
    written = json.loads(path.read_text(encoding="utf-8"))
    if not written.get("rows"):
        raise SystemExit(f"--predict: {path} holds no methods; it is a file that --out wrote with a MODEL")
    name = "GPT-B, predicted"
    return [
        {key: row[key] for key in ("method", "window", "accepted length")}
        | {"cost of a call": round(cost(row["window"], medians), 2), name: predicted(row, medians)}
        for row in written["rows"]
    ]


def show(rows: list[dict[str, Any]], write: Callable[[str], Any] = print) -> None:
    names = [name for name in rows[0] if name != "by token"]
    write("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for one in rows:
        write("| " + " | ".join("" if one[name] is None else str(one[name]) for name in names) + " |")


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub name of a GPT that draws classes")
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--groups", type=int, nargs="*", default=[3, 10, 25, 50])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--guidance", type=float, help="without, that of the model")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int, dest="top_k")
    parser.add_argument("--top-p", type=float, dest="top_p")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where the model draws; --passes is of the CPU")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each length, of --passes")
    parser.add_argument(
        "--gumbel",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Gumbel coupling, too: 4 bytes for each token and id of an image",
    )
    parser.add_argument("--oracle", action="store_true", help="judge the images, which takes a tokenizer of shapes")
    parser.add_argument("--tails", action="store_true", help="compare where new guesses come from")
    parser.add_argument("--passes", action="store_true", help="time calls of GPT-B")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of GPT-B, to see that it runs")
    parser.add_argument("--predict", type=Path, metavar="FILE.json", help="what GPT-B would gain by a file of --out")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file, too")
    parser.add_argument("--figure", type=Path, help="draw them to this PNG file")
    options = parser.parse_args(arguments)
    options.passes |= options.predict is not None
    if options.model is None and not options.passes:
        parser.error("name a model, or say --passes")
    if options.model is None and (options.oracle or options.figure):
        parser.error("--oracle and --figure need a model")
    if options.images < 1 or options.batch < 1 or min(options.windows) < 1 or min(options.groups, default=1) < 1:
        parser.error("--images, --batch, --windows and --groups are numbers of at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    medians = passes(options.threads, options.rounds, tiny=options.tiny) if options.passes else None
    rows, of = list[dict[str, Any]](), dict[str, Any]()
    if options.predict is not None:
        assert medians is not None, "see `options_of`"
        print(f"\nPredicted for GPT-B by the guesses of {options.predict}, not measured\n")
        show(predict(options.predict, medians))
    if options.model is not None:
        try:
            rows, of = run(options, medians)
        except (ValueError, OSError) as error:
            raise SystemExit(str(error)) from None
        show(rows)
    if options.out is not None:
        written = {"model": of, "passes": medians, "rows": rows}
        options.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if options.figure is not None:
        speculative_figure.draw({str(options.model): rows}, options.figure)


def run(options: argparse.Namespace, medians: dict[int, float] | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row a method, and what was drawn from."""
    found = hub.resolve(options.model, expect=GPT)
    model = hub.load(found).to(options.device)
    given = {name: getattr(options, name) for name in ("guidance", "temperature", "top_k", "top_p")}
    chosen = {name: value for name, value in given.items() if value is not None}
    sampling = replace(model.config.sampling, decoding="exact", group_size=None, draft_model=None, **chosen)
    groups = [size for size in options.groups if size <= model.config.vocab_size]
    ways = methods(options.windows, groups, tails=options.tails, gumbel=options.gumbel)
    judges = None
    if options.oracle:
        check_classes(model.config.num_classes)
        judges = Judges(found, options.images, model.device)
    measure(model, sampling, ways, judges, options)
    config = model.config
    of = {
        "model": options.model,
        "tokens": config.num_tokens,
        "ids": config.vocab_size,
        "depth": config.depth,
        "width": config.width,
        **{name: getattr(sampling, name) for name in ("guidance", "temperature", "top_k", "top_p")},
        **{name: getattr(options, name) for name in ("images", "batch", "threads", "seed", "device")},
    }
    print("\n" + ", ".join(f"{name} {value}" for name, value in of.items()) + "\n")
    return [row(way, ways[0], config.num_tokens, medians) for way in ways], of


if __name__ == "__main__":
    sys.exit(main())
