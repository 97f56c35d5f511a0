"""What an image costs on a CPU by default, with exact=true, and before there was a choice (the peer, 55e4d35).

    git worktree add ../imgtok-55e4d35 55e4d35
    python benchmarks/one_image.py --peer ../imgtok-55e4d35 [--num 1 64] [--rounds 9]

The two pipelines are processes of their own and take turns. Models are those of the quickstart and of
configs/generator/xar-shapes.yaml, with random weights, which cost as much as trained ones. Prints medians in
milliseconds an image (the least and the most after them), and the median ratio, pair by pair, to the peer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from interleaved import HERE, Worker

WAYS = ("default", "exact", "peer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of 55e4d35")
    parser.add_argument("--num", type=int, nargs="+", default=[1, 64], help="images a call (1 64)")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    command = [sys.executable, str(HERE / "workers/one_image.py")]
    ours = Worker("ours", command, [HERE.parent])
    peer = Worker("the peer", command, [arguments.peer.resolve()])
    print("| model | images a call | default | exact=true | 55e4d35 | default costs | of CPU seconds |")
    print("|---|---|---|---|---|---|---|")
    for model in ("gpt", "xar"):
        for num in arguments.num:
            rounds = [one_round(ours, peer, model, num, number) for number in range(arguments.rounds + 1)][1:]
            print(line(model, num, rounds))
    ours.close()
    peer.close()


def one_round(ours: Worker, peer: Worker, model: str, num: int, number: int) -> dict[str, dict[str, float]]:
    """A call of each, in the other order every second round."""
    found = {}
    for way in WAYS if number % 2 else WAYS[::-1]:
        worker = peer if way == "peer" else ours
        found[way] = worker.ask("draw", model=model, num=num, exact=way == "exact")
    return found


def line(model: str, num: int, rounds: list[dict[str, dict[str, float]]]) -> str:
    cells = [milliseconds([one[way]["wall"] / num for one in rounds]) for way in WAYS]
    wall, cpu = (
        statistics.median(one["default"][clock] / one["peer"][clock] for one in rounds) for clock in ("wall", "cpu")
    )
    return f"| {model} | {num} | {' | '.join(cells)} | {wall:.2f} | {cpu:.2f} |"


def milliseconds(seconds: list[float]) -> str:
    low, middle, high = (1000 * value for value in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:.1f} ms ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
