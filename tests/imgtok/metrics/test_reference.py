"""Files of statistics: ours and those of others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imgtok.metrics import reference as references
from imgtok.metrics.reference import FeatureSums, look_into
from imgtok.randomness import spread
from imgtok.vision.inception import INCEPTION_NAME


@pytest.fixture
def measured(extractor, random_images):
    sums = FeatureSums(30, spatial=True, keep=30)
    for start in range(0, 30, 8):
        indices = range(start, min(30, start + 8))
        sums.update(indices, extractor(random_images(30)[list(indices)]))
    sums.reduce(None)
    return sums.reference("thirty", INCEPTION_NAME)


def test_kept_features_are_few_and_from_everywhere(extractor, random_images):
    images = random_images(30)
    sums = FeatureSums(30, spatial=False, keep=10)
    for indices in ([3, 1, 0, 2], range(4, 30)):
        sums.update(indices, extractor(images[list(indices)]))
    sums.reduce(None)
    found = sums.reference("thirty", INCEPTION_NAME)
    assert torch.equal(found.features, extractor(images).pool[spread(10, 30)])
    assert found.pool.count == 30


def test_own_file_round_trips(measured, tmp_path):
    path = tmp_path / "stats" / "thirty.safetensors"
    references.save(measured, path)
    assert look_into(path) == references.Contents(("mu", "mu_s", "sigma", "sigma_s"), INCEPTION_NAME)
    loaded = references.load(path, INCEPTION_NAME)
    assert (loaded.name, loaded.extractor, loaded.pool.count) == ("thirty", INCEPTION_NAME, 30)
    for name in ("pool", "spatial"):
        ours, theirs = getattr(measured, name), getattr(loaded, name)
        assert torch.equal(ours.mean, theirs.mean)
        assert torch.equal(ours.covariance, theirs.covariance)
    assert loaded.pool.distance(measured.pool) < 1e-9


def test_an_npz_of_ours_is_read_by_other_tools_and_says_what_made_it(measured, tmp_path):
    path = tmp_path / "thirty.npz"
    references.save(measured, path)
    with np.load(path, allow_pickle=False) as arrays:  # as pytorch-fid and ADM's evaluator do
        assert np.array_equal(arrays["mu"], measured.pool.mean.numpy())
        assert np.array_equal(arrays["sigma"], measured.pool.covariance.numpy())
        assert {"mu_s", "sigma_s"} < set(arrays)
    loaded = references.load(path, INCEPTION_NAME)  # without assume_extractor
    assert loaded.pool.count == 30
    assert torch.equal(loaded.pool.covariance, measured.pool.covariance)
    with pytest.raises(ValueError, match="inception-v3-compat cannot be compared with features of other"):
        references.load(path, "other", assume="other")


def test_another_network_is_refused_by_both_names(measured, tmp_path):
    references.save(measured, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"inception-v3-compat cannot be compared with features of inception-v3-compat:00ff"
    ):
        references.load(tmp_path / "a.safetensors", f"{INCEPTION_NAME}:00ff")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spatial", [False, True])
def test_published_npz(measured, tmp_path, dtype, spatial):
    path = tmp_path / "adm_stats.npz"
    arrays = {"mu": measured.pool.mean, "sigma": measured.pool.covariance, "arr_0": torch.zeros(1, 4, 4, 3)}
    if spatial:
        arrays |= {"mu_s": measured.spatial.mean, "sigma_s": measured.spatial.covariance}
    np.savez(path, **{key: value.numpy().astype(dtype) for key, value in arrays.items()})
    contents = look_into(path)
    assert contents is not None
    assert contents.arrays == (("mu", "mu_s", "sigma", "sigma_s") if spatial else ("mu", "sigma"))
    assert contents.extractor is None
    loaded = references.load(path, INCEPTION_NAME, assume=INCEPTION_NAME)
    assert loaded.name == "adm_stats"
    assert loaded.pool.mean.dtype == loaded.pool.covariance.dtype == torch.float64
    torch.testing.assert_close(loaded.pool.covariance, measured.pool.covariance, rtol=1e-5, atol=1e-6)
    assert (loaded.spatial is not None) == spatial
    with pytest.raises(ValueError, match=r"does not say which network.*assume_extractor=inception-v3-compat"):
        references.load(path, INCEPTION_NAME)
    with pytest.raises(ValueError, match="dinov2 cannot be compared"):
        references.load(path, INCEPTION_NAME, assume="dinov2")


def test_an_npz_of_images_holds_no_statistics(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((1, 4, 4, 3), np.uint8))
    assert look_into(tmp_path / "images.npz") is None
    assert look_into(tmp_path) is None


def test_damaged_and_foreign_files_are_named(measured, tmp_path):
    path = tmp_path / "a.safetensors"
    references.save(measured, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.safetensors: damaged"):
        references.load(path, INCEPTION_NAME)
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"half\.npz: holds \['mu'\], but not 'sigma'"):
        references.load(tmp_path / "half.npz", INCEPTION_NAME, assume=INCEPTION_NAME)
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"sigma \(2, 2\)"):
        references.load(tmp_path / "odd.npz", INCEPTION_NAME, assume=INCEPTION_NAME)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.npz: not a readable"):
        references.load(tmp_path / "text.npz", INCEPTION_NAME, assume=INCEPTION_NAME)
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    with pytest.raises(ValueError, match=r"objects\.npz: mu cannot be read \(Object arrays"):  # never unpickled
        references.load(tmp_path / "objects.npz", INCEPTION_NAME, assume=INCEPTION_NAME)
    with pytest.raises(FileNotFoundError, match="no such reference"):
        references.load(tmp_path / "none.npz", INCEPTION_NAME)
