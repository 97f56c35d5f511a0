"""The Inception network that FID is named after, and the search for its weights.

It is torch-fidelity's port of the one from the original FID code. Its weights are not part of any
package: `find_inception_weights` looks for them, downloads them if it may, and checks that they are what they claim.
"""

from __future__ import annotations

import io
import os
import shutil
import urllib.request
from pathlib import Path

import torch
from torch import Tensor, nn

from imgtok.files import file_sha256, replacing
from imgtok.vision.features import Features, full_precision
from imgtok.weights import read_weights

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"
"""How the file's SHA-256 begins, by the naming rule of torch.hub."""
INCEPTION_NAME = "inception-v3-compat"
INCEPTION_WIDTH = 2048

_TIMEOUT = 10  # seconds without a byte after which a download counts as failed
_SPATIAL_CHANNELS = 7  # of the 192 of that layer: 7 x 17 x 17 = 2023 values, as in ADM's evaluator


class Inception:
    """torch-fidelity's Inception v3 with TensorFlow's resizing; float32 whatever the surrounding precision."""

    width = INCEPTION_WIDTH

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Raises ValueError when the file does not hold this network."""
        self.name = inception_name(file_sha256(weights))
        self.device = device
        self._spatial: Tensor = torch.empty(0)
        self.net = _build_inception(weights).to(device)
        self.net.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep_spatial)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        with full_precision(self.device):
            pool, logits = self.net(images.to(self.device))
        # Channels last, so that the values come in TensorFlow's order.
        spatial = self._spatial[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool, spatial, logits)

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial = output


def _build_inception(weights: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # costs seconds to import

    try:
        state = read_weights(weights)
        # The class unpickles without restraint whatever it is given, so it gets what the safe reader has read.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        layers = ["2048", "logits_unbiased"]
        net = FeatureExtractorInceptionV3(INCEPTION_NAME, layers, feature_extractor_weights_path=buffer)
    except Exception as error:  # pickle, zip and key errors: all of them mean another file
        raise ValueError(f"{weights} does not hold the weights of {INCEPTION_NAME}: {str(error)[:200]}") from error
    return net.eval()


# Weights


def inception_name(sha256: str) -> str:
    """The network's name in scores; weights that are not the published file put their hash into it."""
    return INCEPTION_NAME if sha256.startswith(INCEPTION_SHA256) else f"{INCEPTION_NAME}:{sha256[:8]}"


def find_inception_weights(metrics: str, given: Path | None = None, *, trust: bool = False) -> Path:
    """The checked weights file: the one given, else torch.hub's cache, else a download into that cache.

    `metrics` are the scores that need it, for the message. `trust` accepts a file with another hash, which then
    stands in the scores' names. Raises FileNotFoundError or ValueError (another hash).
    """
    cached = cached_inception_weights()
    path = given or cached
    if not path.is_file():
        if given is not None:
            raise FileNotFoundError(_missing(metrics, str(given), "is not a file"))
        _download(cached, metrics)
    if not trust:
        _check_hash(path)
    return path


def cached_inception_weights() -> Path:
    """Where torch.hub's cache keeps the file, whether it is there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def _download(path: Path, metrics: str) -> None:
    offline = next((name for name in ("IMGTOK_OFFLINE", "HF_HUB_OFFLINE") if _is_set(name)), None)
    if offline:
        raise FileNotFoundError(_missing(metrics, str(path), f"not downloaded because {offline} is set"))
    try:
        with (
            replacing(path) as temporary,
            urllib.request.urlopen(INCEPTION_URL, timeout=_TIMEOUT) as source,
            temporary.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
            target.flush()
            _check_hash(temporary)
    except OSError as error:
        raise FileNotFoundError(_missing(metrics, str(path), f"download failed: {error}")) from error


def _missing(metrics: str, path: str, reason: str) -> str:
    return (
        f"{metrics}: the Inception weights ({INCEPTION_FILE}, 91 MB) are missing: looked for {path} ({reason}).\n"
        f"Get {INCEPTION_URL} and put it there, or give inception_weights=PATH; "
        "without it: metrics=oracle,fd_shapes for the built-in shapes, metrics=psnr,ssim,mae for reconstructions."
    )


def _check_hash(path: Path) -> None:
    found = file_sha256(path)
    if not found.startswith(INCEPTION_SHA256):
        raise ValueError(
            f"{path}: not the published Inception weights: SHA-256 begins {found[:8]}, expected {INCEPTION_SHA256}.\n"
            "Delete it and get it again, or set trust_weights=true to use it; the scores' names will carry its hash."
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")
