"""What a run says while it trains: log.jsonl, trackers, the progress line, the facts at the start.

The losses stay on the device between two log lines; reading them there would make the processor wait for
the GPU at every step.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import logging
import math
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import imgtok
from imgtok.config import to_dict
from imgtok.files import replacing
from imgtok.metrics.accumulate import Histogram
from imgtok.runs import Progress
from imgtok.runtime import peak_rss_mib
from imgtok.tokenizers.base import CodedLosses, Losses
from imgtok.train.config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
HEALTHY = 2**62
"""`Window.bad_at` while everything was finite; larger than any position."""


MOST_CODES = 1 << 24
"""The largest codebook whose usage is logged: of a larger one no batch uses a share worth knowing."""


class Window:
    """Loss parts and the use of the codebook summed since the last log line, and where the first non-finite loss was.
    All on the device.

    A position counts micro-batches from the start of the run: step x accumulate + micro.
    """

    def __init__(self, device: torch.device) -> None:
        self.names: list[str] = []  # in the order in which they first came; a part need not be there at each step
        self.zero = torch.zeros((), device=device)
        self.sum = self.values = torch.zeros(0, device=device)
        self.norm = self.zero
        self.counts: list[int] = []
        self.codes: Tensor | None = None  # how often each has occurred, int64; None without a codebook
        self.bad_at = torch.full((), HEALTHY, dtype=torch.int64, device=device)

    def add(self, losses: Losses | CodedLosses, position: int) -> None:
        """Take in one micro-batch. `values` stays at the first micro-batch whose total is not finite."""
        found = {"loss": losses.total, **{f"loss/{name}": part for name, part in losses.parts.items()}}
        self._name(found)
        values = torch.stack([found.get(name, self.zero) for name in self.names]).detach().float()
        self.sum = self.sum + values
        self.counts = [count + (name in found) for name, count in zip(self.names, self.counts, strict=True)]
        if isinstance(losses, CodedLosses) and losses.num_codes <= MOST_CODES:
            self._count(losses.codes.detach().flatten(), losses.num_codes)
        self.values = torch.where(self.bad_at == HEALTHY, values, self.values)
        self._note(values[0], position)

    def _name(self, names: Iterable[str]) -> None:
        """Make room for parts that have not been there before."""
        new = [name for name in names if name not in self.names]
        if new:
            self.names += new
            self.counts += [0] * len(new)
            self.sum, self.values = (torch.nn.functional.pad(each, (0, len(new))) for each in (self.sum, self.values))

    def _count(self, ids: Tensor, size: int) -> None:
        """Count the codes (N,) into the one tensor (size,) that there is for them: a new one for each micro-batch would
        cost more than the counting.
        """
        if self.codes is None:
            self.codes = ids.new_zeros(size)
        known = ids.clamp(0, size - 1)  # a NaN has no id, and the run has to come as far as finding it
        self.codes.scatter_add_(0, known, (ids >= 0).to(ids.dtype))

    def add_norm(self, norm: Tensor, position: int, must_be_finite: bool) -> None:
        """Take in the gradient norm of one step; fp16 may overflow and skip the step, the others may not."""
        self.norm = norm.detach()
        if must_be_finite:
            self._note(self.norm, position)

    def _note(self, value: Tensor, position: int) -> None:
        self.bad_at = torch.where(torch.isfinite(value), self.bad_at, self.bad_at.clamp(max=position))

    @property
    def broken(self) -> Tensor:
        """1.0 from the first non-finite value on, 0.0 before: AdamW's `found_inf`, which skips the update."""
        return (self.bad_at != HEALTHY).float()

    def first_bad(self, accelerator: Accelerator) -> int | None:
        """Position of the first non-finite value on any process, or None. Waits for the device."""
        first = int(accelerator.gather(self.bad_at[None]).min().item())
        return None if first == HEALTHY else first

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over window and processes, of each part over the micro-batches that had it; the latest gradient norm;
        with a codebook the share of its codes that was used and the perplexity, 2 to the entropy of the codes. Waits
        for the device.
        """
        from accelerate.utils import gather_object

        if accelerator.num_processes > 1:  # each of which may have met other parts, in another order
            self._name(sorted(set(gather_object(list(self.names)))))
        order = sorted(self.names)
        places = [self.names.index(name) for name in order]
        both = torch.stack([self.sum, self.sum.new_tensor(self.counts)])[:, places]
        sums, counts = accelerator.reduce(both, reduction="sum")
        means = dict(zip(order, (sums / counts).tolist(), strict=True))
        times = dict(zip(order, counts.tolist(), strict=True))
        found = {name: means[name] for name in self.names if times[name]}
        found["grad_norm"] = self.norm.item()
        if self.codes is not None:
            used = Histogram.of(accelerator.reduce(self.codes, reduction="sum"))
            found |= {"codebook_use": round(used.use, 6), "codebook_perplexity": round(used.perplexity, 3)}
        return found

    def latest(self) -> dict[str, float]:
        """The newest values, or the first that were not finite. Waits for the device."""
        return {**dict(zip(self.names, self.values.tolist(), strict=True)), "grad_norm": self.norm.item()}

    def reset(self) -> None:
        """Start the next window."""
        self.sum, self.counts = torch.zeros_like(self.sum), [0] * len(self.counts)
        if self.codes is not None:
            self.codes.zero_()


class Log:
    """Writes log lines on the main process to log.jsonl, the trackers and the progress line."""

    def __init__(
        self, accelerator: Accelerator, config: TrainingConfig, out: Path, resolved: Any, start: Progress
    ) -> None:
        from tqdm import tqdm

        self.accelerator, self.config, self.path = accelerator, config, out / "log.jsonl"
        self.window = Window(accelerator.device)
        self.images_per_step = config.batch_size * config.accumulate * accelerator.num_processes
        self.started = time.perf_counter() - start.seconds
        self.mark, self.mark_step, self.speed = time.perf_counter(), start.step, 0.0
        main = accelerator.is_main_process
        # disable=None: no line where nobody watches (a file, CI); the log lines are then written in full
        self.bar = tqdm(
            total=config.steps, initial=start.step, disable=None if main else True, unit="step", dynamic_ncols=True
        )
        if main:
            drop_lines_after(self.path, start.step)
            start_trackers(accelerator, out, resolved, start.step)
        self.validations = self._validations()

    @property
    def seconds(self) -> float:
        """Training time so far, over all restarts."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in the block does not count against images per second."""
        before = time.perf_counter()
        yield
        self.mark += time.perf_counter() - before

    def write(self, step: int, done: int, rate: float) -> None:
        """One line for the window. `step` names the line, `done` is the number of finished steps."""
        record: dict[str, float] = {"step": step, **self.window.means(self.accelerator), "lr": rate}
        now = time.perf_counter()
        if done > self.mark_step:  # else the first step's second line
            elapsed = max(now - self.mark, 1e-9)
            self.speed = round((done - self.mark_step) * self.images_per_step / elapsed, 2)
        record["images_per_second"] = self.speed
        record["seconds"] = round(self.seconds, 3)
        record.update(peak_memory(self.accelerator.device))
        self.mark, self.mark_step = now, done
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=step)
        shown = {"loss": f"{record['loss']:.4g}", "lr": f"{rate:.3g}", "norm": f"{record['grad_norm']:.3g}"}
        if "codebook_use" in record:
            shown["codes"] = f"{record['codebook_use']:.1%}"
            shown["perplexity"] = f"{record['codebook_perplexity']:.4g}"
        shown["img/s"] = f"{self.speed:.0f}"
        if self.validations:
            shown["held out"] = f"{[*self.validations.values()][-1]['loss']:.4g}"
        self.bar.set_postfix(shown, refresh=False)  # the bar itself has the time that is left
        if self.bar.disable:
            values = "  ".join(f"{name} {value}" for name, value in shown.items())
            logger.info("step %d/%d  %s  %s left", step, self.config.steps, values, self.time_left(done))

    def _validations(self) -> dict[int, dict[str, float]]:
        """Step -> the figures of each validation so far, those before a restart among them; alike on all processes."""
        from accelerate.utils import broadcast_object_list

        if self.config.validate_every is None:
            return {}
        found: list[Any] = [read_validations(self.path) if self.accelerator.is_main_process else {}]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        return dict(found[0])

    def has_validation(self, step: int) -> bool:
        """Whether the log has a validation after so many steps."""
        return step in self.validations

    def validation(self, step: int, found: dict[str, float]) -> None:
        """A line of its own for a validation after so many steps."""
        before = self.validations
        self.validations = before | {step: found}
        if not math.isfinite(found["loss"]):
            logger.warning("the held-out loss after step %d is %s", step, found["loss"])
        if not self.accelerator.is_main_process:
            return
        record = {f"{VALIDATION}{name}": value for name, value in found.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **record, "seconds": round(self.seconds, 3)}) + "\n")
        self.accelerator.log(record, step=step)
        if self.bar.disable:
            last = [values["loss"] for values in before.values()][-1:]
            change = "".join(f", {value:.4g} before" for value in last)
            what = f"{found['images']:.0f} images, {found['seconds']:.3g} s"
            scores = "".join(f"  {name} {value:.4g}" for name, value in scores_in(found).items())
            logger.info(
                "step %d/%d  held out: loss %.4g%s%s (%s)", step, self.config.steps, found["loss"], change, scores, what
            )  # fmt: skip

    def time_left(self, done: int) -> str:
        """How long the steps after the first `done` will take at the speed of the last ones, such as 1:02:03."""
        seconds = (self.config.steps - done) * self.images_per_step / self.speed if self.speed else 0.0
        return str(datetime.timedelta(seconds=round(seconds)))

    def picture(self, path: Path, step: int) -> None:
        """Show a preview in the trackers that can; `path` is not there if the job draws none."""
        if not (path.is_file() and self.accelerator.trackers):
            return
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if tracker.name == "trackio":  # of which Accelerate knows the numbers alone
                import trackio

                tracker.tracker.log({"preview": trackio.Image(pixels[0])}, step=step)
                continue
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"preview": pixels}, step=step, **layout)

    def close(self) -> None:
        """End the progress line and the trackers."""
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


VALIDATION = "validation/"
"""How the names of a validation's figures begin, in the log and in the trackers."""


def scores_in(found: dict[str, float]) -> dict[str, float]:
    """The figures of a validation that are no losses, each once: that of the last rate (`psnr@16`) is left out where it
    is that of the whole (`psnr`).
    """
    scores = {name: v for name, v in found.items() if not name.startswith("loss") and name not in ("images", "seconds")}
    for name in list(scores):
        rates = [other for other in scores if other.startswith(f"{name}@")]
        if rates and scores[rates[-1]] == scores[name]:
            del scores[rates[-1]]
    return scores


def read_validations(path: Path) -> dict[int, dict[str, float]]:
    """Step -> the figures of the validation after it, without the beginning of their names, from a log.jsonl."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        line["step"]: {
            name.removeprefix(VALIDATION): value for name, value in line.items() if name.startswith(VALIDATION)
        }
        for line in lines
        if f"{VALIDATION}loss" in line
    }


def drop_lines_after(path: Path, step: int) -> None:
    """Forget what a killed run logged after its last checkpoint, and a line that it left half written."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step and step > 0:
                kept.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def check_trackers(config: TrainingConfig) -> None:
    """Raise ValueError if a tracker that was asked for is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            others = [other for other in config.trackers if other != name]
            raise ValueError(
                f"training.trackers asks for {name}, which is not installed: `pip install {name}`, "
                f"or leave it out (training.trackers={','.join(others)})"
            )


def start_trackers(accelerator: Accelerator, out: Path, resolved: Any, done: int) -> None:
    """Open the trackers; a resumed run's tensorboard forgets what came after its checkpoint."""
    common = {"name": out.name, "config": to_dict(resolved)}
    settings = {
        "tensorboard": {"purge_step": done + 1 if done else None},
        "trackio": common | {"resume": "allow" if done else "never"},
        "wandb": common | {"dir": str(out)},
    }
    accelerator.init_trackers("imgtok", init_kwargs=settings)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Largest memory of this process so far in MiB, and of its GPU."""
    memory = {"peak_rss_mib": peak_rss_mib()}
    if device.type == "cuda":
        memory["peak_cuda_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return memory


def describe_run(accelerator: Accelerator, config: TrainingConfig, model: nn.Module) -> None:
    """Log what a reader of the log asks first: versions, devices, parameters, batch."""
    import accelerate

    if not accelerator.is_main_process:
        return
    logger.info(
        "imgtok %s, torch %s, accelerate %s, Python %s",
        imgtok.__version__, torch.__version__, accelerate.__version__, platform.python_version(),
    )  # fmt: skip
    logger.info(
        "%d process(es) on %s, %s, %d CPU threads each",
        accelerator.num_processes, accelerator.device, config.precision, torch.get_num_threads(),
    )  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    for name, part in [("model", model), *model.named_children()]:
        count = sum(p.numel() for p in part.parameters())
        if part is not model and count in (0, total):
            continue  # a part that has none, or a module around the model alone
        trainable = sum(p.numel() for p in part.parameters() if p.requires_grad)
        logger.info("parameters of %s: %s trainable, %s frozen", name, f"{trainable:,}", f"{count - trainable:,}")
    processes = accelerator.num_processes
    logger.info(
        "effective batch %d = %d per process x %d accumulated x %d process(es); %d steps",
        config.batch_size * config.accumulate * processes,
        config.batch_size, config.accumulate, processes, config.steps,
    )  # fmt: skip
    if config.steps and config.warmup_steps != config.warmup:
        logger.warning(
            "training.warmup: %d steps do not end within the %d of this run: it warms up for %d",
            config.warmup, config.steps, config.warmup_steps,
        )  # fmt: skip
