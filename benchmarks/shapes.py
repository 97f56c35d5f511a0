"""The world of shapes: how fast scenes are drawn and read back, and how exactly after damage.

    python benchmarks/shapes.py speed
    python benchmarks/shapes.py table --size 64 --scenes 300
    python benchmarks/shapes.py scores --size 64 --scenes 300
    python benchmarks/shapes.py holding --first 3000000 --scenes 300 --only "clean,noise 0.1"

One thread; figures are of CPU time of the process, which other jobs on the machine disturb least. `speed` compares the
renderer with one that draws each scene alone, and the fast reading with the plain one. `table` reads scenes of `val`
from number 2,000,000 on (`--first`), which nothing else looks at, after noise, blur, JPEG and other damage (the table
of shared/design/shapes_benchmark.md, section 6): the share of objects that are found, of their attributes that are
right, and of scenes of which everything is. `holding` does the same for scenes of two objects that hold one each.
`scores` shows images in which one thing was spoiled, and that it shows in its own score and in no other.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from imgtok.shapes import oracle, oracle_fast, oracle_inside
from imgtok.shapes.captions import caption, true_facts
from imgtok.shapes.oracle import report, score
from imgtok.shapes.render import render
from imgtok.shapes.world import Scene, SceneTable, ShapesConfig, sample_scenes

FIRST = 2_000_000
"""The first scene of the tables: none of those that the oracle was made with, or that a test looks at. (Of those from
1,000,000 on the first hundred were read on 30 November 2026, before the reading of what objects hold was written.)"""


def scenes(count: int, first: int = FIRST, split: Literal["val", "holding"] = "val") -> SceneTable:
    return sample_scenes(ShapesConfig(mode="text", split=split), range(first, first + count))


# ---------------------------------------------------------------- damage


def noise(deviation: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def blur(sigma: float) -> Callable[[Tensor], Tensor]:
    def damage(x: Tensor) -> Tensor:
        reach = math.ceil(4 * sigma)
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1.0) / sigma) ** 2)
        kernel = kernel / kernel.sum()
        flat = F.pad(x.flatten(0, 1).unsqueeze(1), (reach,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(flat, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view_as(x)

    return damage


def jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    def once(image: Tensor) -> Tensor:
        buffer = io.BytesIO()
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
        return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255

    return lambda x: torch.stack([once(image) for image in x])


def half(x: Tensor) -> Tensor:
    return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=False)


def mixture(x: Tensor) -> Tensor:
    return jpeg(75)(noise(0.05)(blur(1.0)(x)))


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": lambda x: x,
    **{f"noise {d:g}": noise(d) for d in (0.05, 0.1, 0.2, 0.3)},
    **{f"blur {s:g} px": blur(s) for s in (0.5, 1.0, 1.5, 2.0, 3.0)},
    **{f"JPEG {q}": jpeg(q) for q in (95, 75, 50, 30, 10)},
    "half resolution and back": half,
    "blur 1 + noise .05 + JPEG 75": mixture,
}


# ---------------------------------------------------------------- the two parts


def speed() -> None:
    table = scenes(1024)
    for size in (32, 64):
        render(table, size)
        fast = seconds(lambda s=size: render(table, s)) / len(table)
        plain = seconds(lambda s=size: each_alone(table.take(np.arange(128)), s)) / 128
        print(f"render {size} px: {1 / fast:,.0f} a CPU-second, {plain / fast:.1f} x one by one", flush=True)
    for size, count, few in ((64, 256, 64), (32, 64, 32)):
        images = render(table.take(np.arange(count)), size)
        oracle_fast.read(images[:8])
        oracle.read(images[:8])
        fast = seconds(lambda x=images: oracle_fast.read(x)) / count
        plain = seconds(lambda x=images[:few]: oracle.read(x)) / few
        print(f"read {size} px: {1 / fast:,.0f} a CPU-second, {plain / fast:.1f} x the plain reading", flush=True)


def each_alone(table: SceneTable, size: int) -> None:
    for scene in table:
        render([scene], size)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds, the least of three."""
    found = []
    for _ in range(3):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def accuracy(size: int, count: int, only: Sequence[str], first: int) -> None:
    table = scenes(count, first)
    truth = list(table)
    images = render(table, size)
    print(f"{count} scenes from {first} on at {size} px\n{'':32}found  shape  colour  texture  size   exact scene")
    for name in only or DAMAGE:
        start = time.process_time()
        found = rates(truth, oracle_fast.read(DAMAGE[name](images).clamp(0, 1)))
        took = (time.process_time() - start) / count
        print(
            f"{name:32}" + "  ".join(f"{value:.3f}" for value in found) + f"   ({1 / took:.0f} a CPU-second)",
            flush=True,
        )


def held(size: int, count: int, only: Sequence[str], first: int) -> None:
    """Scenes of two objects that hold one each: `rates` of the holders, then presence, binding and leakage of what they
    hold, and scenes that are exact.
    """
    table = scenes(count, first, "holding")
    truth = list(table)
    images = render(table, size)
    print(f"{count} scenes from {first} on at {size} px, with what they hold")
    print(f"{'':32}found  shape  colour  texture  size   held: presence  binding  leakage  extra   exact scene")
    for name in only or DAMAGE:
        start = time.process_time()
        readings = oracle_inside.read(DAMAGE[name](images).clamp(0, 1))
        took = (time.process_time() - start) / count
        *found, _ = rates(truth, readings)
        every = [score(true_facts(scene), seen) for scene, seen in zip(truth, readings, strict=True)]
        told = report(every)
        exact = sum(one.objects == one.bound and one.held == one.held_bound and not one.extra for one in every) / count
        found += [told.held_presence, told.held_binding, told.held_leakage, told.extra, exact]
        print(
            f"{name:32}" + "  ".join(f"{value:.3f}" for value in found) + f"   ({1 / took:.0f} a CPU-second)",
            flush=True,
        )


def rates(truth: Sequence[Scene], readings: Sequence[Sequence[oracle.Detection]]) -> list[float]:
    """Objects found (by the nearest centre), of these the attributes that are right, and scenes that are exact."""
    objects = found = exact = 0
    right = dict.fromkeys(("shape", "colour", "texture", "size"), 0)
    for scene, seen in zip(truth, readings, strict=True):
        objects += len(scene.objects)
        for item in scene.objects:
            near = [d for d in seen if math.hypot(d.x - item.x, d.y - item.y) < 0.05]
            if near:
                found += 1
                nearest = min(near, key=lambda d: math.hypot(d.x - item.x, d.y - item.y))
                for name in right:
                    right[name] += getattr(nearest, name) == getattr(item, name)
        one = score(true_facts(scene), seen)
        exact += one.objects == one.bound and one.extra == 0
    return [found / objects, *(value / max(1, found) for value in right.values()), exact / len(truth)]


def scores(size: int, count: int) -> None:
    """The scores of images that answer their captions in one respect alone, or in none."""
    for split in ("val", "same_shape"):
        table = list(sample_scenes(ShapesConfig(mode="text", split=split), range(FIRST, FIRST + count)))
        facts = [caption(scene, split, FIRST + k).facts for k, scene in enumerate(table)]
        own = render(table, size)
        rows = {
            "its own": own,
            "colours passed to the next object": render([pass_on(scene) for scene in table], size),
            "one object left out": render([Scene(scene.objects[1:]) for scene in table], size),
            "mirrored left to right": own.flip(3),
            "another scene's image": own.roll(1, 0),
            "blank": torch.full_like(own, 0.92),
            "blur 1 + noise .05 + JPEG 75": mixture(own).clamp(0, 1),
        }
        print(f"{split}, {count} captions at {size} px\n{'':36}presence  binding  leakage  relation  extra  prompt")
        for name, images in rows.items():
            found = report([score(f, d) for f, d in zip(facts, oracle_fast.read(images), strict=True)])
            told = [found.presence, found.binding, found.leakage, found.relation, found.extra, found.prompt]
            print(f"{name:36}" + "  ".join(f"{value:7.3f}" for value in told), flush=True)


def pass_on(scene: Scene) -> Scene:
    """Each object in the colour of the one before it."""
    colours = [item.colour for item in scene.objects]
    pairs = zip(scene.objects, colours[1:] + colours[:1], strict=True)
    return Scene(tuple(replace(item, colour=colour) for item, colour in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "table", "scores", "holding"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--first", type=int, default=FIRST, help="number of the first scene of the tables")
    parser.add_argument("--only", default="", help=f"damages of the tables, of {','.join(DAMAGE)}")
    given = parser.parse_args()
    only = [name for name in given.only.split(",") if name]
    if unknown := set(only) - DAMAGE.keys():
        parser.error(f"--only: unknown {','.join(sorted(unknown))}; there is {','.join(DAMAGE)}")
    torch.set_num_threads(1)
    if given.part == "speed":
        speed()
    elif given.part == "scores":
        scores(given.size, given.scenes)
    else:
        {"table": accuracy, "holding": held}[given.part](given.size, given.scenes, only, given.first)


if __name__ == "__main__":
    main()
