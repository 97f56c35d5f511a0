"""Every form that a file of weights comes in is read alike; what cannot be read safely is refused."""

from __future__ import annotations

import argparse
import json
import logging
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imgtok import weights
from imgtok.weights import check_tensors, fill, find_weights, open_weights, read_weights, skeleton, under_prefix

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a.bias": torch.tensor([0.5, -1.25]),
    "scale": torch.tensor(2.0),
    "none": torch.zeros(0, 3),
    "steps": torch.tensor([3, 4]),
    "mask": torch.tensor([True, False, True]),
}


def same(found: Any, wanted: dict[str, Tensor] = TENSORS) -> bool:
    return set(found) == set(wanted) and all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in wanted.items()
    )


def in_shards(folder: Path, name: str = "model") -> Path:
    """As huggingface_hub writes a model that is too large for one file."""
    names = list(TENSORS)
    files = {f"{name}-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, inside in files.items():
        save_file({one: TENSORS[one] for one in inside}, folder / file)
    index = folder / f"{name}.safetensors.index.json"
    where = {one: file for file, inside in files.items() for one in inside}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


# ---------------------------------------------------------------- containers, entries, prefixes


def test_a_safetensors_file(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"about": "them"})
    found = open_weights(tmp_path / "x.safetensors")
    assert same(found)
    assert found.metadata == {"about": "them"}
    assert {name: (v.shape, v.dtype) for name, v in found.blank.items()} == {
        name: (v.shape, v.dtype) for name, v in TENSORS.items()
    }
    assert all(value.is_meta for value in found.blank.values())
    assert found["a.weight"].data_ptr() != found["a.weight"].data_ptr(), "each has memory of its own"


@pytest.mark.parametrize("ending", ["pth", "pt", "ckpt", "bin"])
@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_a_file_of_torch_save(tmp_path, ending, modern):
    torch.save(TENSORS, tmp_path / f"x.{ending}", _use_new_zipfile_serialization=modern)
    found = read_weights(tmp_path / f"x.{ending}")
    assert same(found)
    found["a.weight"].zero_()  # a copy: the file stays
    assert same(read_weights(tmp_path / f"x.{ending}"))


def test_shards_with_an_index(tmp_path):
    index = in_shards(tmp_path)
    assert same(open_weights(index))
    assert find_weights(tmp_path, "model.safetensors") == index
    assert len(weights.files_of(index)) == 3
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert find_weights(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"has a config\.json but no other\.safetensors"):
        find_weights(tmp_path, "other.safetensors")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "_forward_module.model."]
)
def test_prefixes_that_all_names_have_are_left_out(tmp_path, prefix):
    save_file({prefix + name: value for name, value in TENSORS.items()}, tmp_path / "x.safetensors")
    assert same(open_weights(tmp_path / "x.safetensors"))
    some = {"module.a": torch.zeros(2), "module_b": torch.ones(2)}
    save_file(some, tmp_path / "x.safetensors")
    assert same(open_weights(tmp_path / "x.safetensors"), some)


OTHER = {"a.weight": torch.full((2, 3), 9.0)}


@pytest.mark.parametrize(
    ("stored", "averaged", "raw"),
    [
        ({"model": TENSORS}, "model", "model"),
        ({"module": TENSORS, "optimizer": {"state": {}}}, "module", "module"),
        ({"state_dict": TENSORS, "epoch": 3}, "state_dict", "state_dict"),
        ({"model": OTHER, "model_ema": TENSORS}, "model_ema", "model"),
        ({"model": OTHER, "ema": TENSORS, "args": argparse.Namespace(lr=1)}, "ema", "model"),
        ({"state_dict": OTHER, "ema": {}}, "state_dict", "state_dict"),
        ({"model": OTHER, "ema_weights": TENSORS, "ema_decay": 0.9}, "ema_weights", "model"),
        ({"model": OTHER, "ema_0.9999": TENSORS}, "ema_0.9999", "model"),
        ({"G": OTHER, "D": OTHER, "G_ema": TENSORS}, "G_ema", "G"),
        ({"net": OTHER, "averaged_model": TENSORS, "schema": OTHER}, "averaged_model", "net"),
        ({"generator": TENSORS, "discriminator": OTHER}, "generator", "generator"),
    ],
    ids=["model", "module", "state_dict", "model_ema", "ema", "an empty ema", "ema_weights", "ema_0.9999", "G_ema",
         "averaged_model", "generator"],
)  # fmt: skip
def test_entries_of_a_training_checkpoint(tmp_path, caplog, stored, averaged, raw):
    caplog.set_level(logging.INFO, "imgtok.weights")
    torch.save(stored, tmp_path / "x.pt")
    for asked, entry in ((False, averaged), (True, raw)):
        caplog.clear()
        assert same(open_weights(tmp_path / "x.pt", raw=asked), stored[entry])
        others = ", ".join(name for name in stored if name != entry) or "nothing"
        assert f"x.pt: took its entry {entry}, and left {others}" in caplog.text


def test_averages_of_a_callback_and_of_several_kinds(tmp_path):
    torch.save({"state_dict": OTHER, "callbacks": {"EMA": {"ema_state_dict": TENSORS}}}, tmp_path / "x.ckpt")
    assert same(open_weights(tmp_path / "x.ckpt"))
    assert same(open_weights(tmp_path / "x.ckpt", raw=True), OTHER)
    torch.save({"state_dict": TENSORS, "callbacks": {"Checkpoint": {"best": {}}}}, tmp_path / "x.ckpt")
    assert same(open_weights(tmp_path / "x.ckpt"))
    torch.save({"model": OTHER, "ema_0.99": TENSORS, "ema_0.999": TENSORS}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"several of its entries may hold averaged weights \(ema_0.99, ema_0.999\)"):
        open_weights(tmp_path / "x.pt")
    assert same(open_weights(tmp_path / "x.pt", raw=True), OTHER)


@pytest.mark.parametrize(
    "stored",
    [
        {"n_averaged": torch.tensor(3)} | {f"module.{name}": value for name, value in TENSORS.items()},
        {"initted": torch.tensor([True]), "step": torch.tensor([7])}
        | {f"ema_model.{name}": value for name, value in TENSORS.items()}
        | {f"online_model.{name}": value for name, value in OTHER.items()},
    ],
    ids=["torch's AveragedModel", "ema_pytorch"],
)
def test_what_counts_averages_is_no_weight(tmp_path, stored):
    torch.save({"model": OTHER, "ema": stored}, tmp_path / "x.pt")
    assert same(open_weights(tmp_path / "x.pt"))
    torch.save(stored, tmp_path / "x.pt")
    assert same(open_weights(tmp_path / "x.pt"))


def test_a_model_under_a_prefix_of_its_own(tmp_path, caplog):
    caplog.set_level(logging.INFO, "imgtok.weights")
    inside = {f"vae.{name}": value for name, value in TENSORS.items()}

    def found(stored):
        save_file({name: value.clone() for name, value in stored.items()}, tmp_path / "x.safetensors")
        return under_prefix(open_weights(tmp_path / "x.safetensors"), TENSORS.keys())

    assert same(found(inside | {"loss.a.weight": torch.zeros(2)}))
    assert "took its tensors vae.*, and left loss" in caplog.text
    for more in ("vae.more", "vae_ema.aweight"):  # another model; what may be the averages
        stored = inside | {more: torch.zeros(2)}
        assert same(found(stored), stored)
    with pytest.raises(ValueError, match=r"holds such a model several times, as teacher\., vae\.\*; keep one"):
        found(inside | {f"teacher.{name}": value for name, value in TENSORS.items()})


def test_wrappers_inside_names_are_left_out(tmp_path):
    wrapped = {
        "_fsdp_wrapped_module.a._fsdp_wrapped_module.weight": TENSORS["a.weight"],
        "_fsdp_wrapped_module.a._checkpoint_wrapped_module._orig_mod.bias": TENSORS["a.bias"],
    }
    save_file(wrapped, tmp_path / "x.safetensors")
    assert same(open_weights(tmp_path / "x.safetensors"), {name: TENSORS[name] for name in ("a.weight", "a.bias")})
    assert same(open_weights(tmp_path / "x.safetensors", as_stored=True), wrapped)
    both = {"a._orig_mod.b": torch.zeros(2), "a.b": torch.ones(2)}  # of which neither may be lost
    save_file(both, tmp_path / "x.safetensors")
    assert same(open_weights(tmp_path / "x.safetensors"), both)


@pytest.mark.parametrize(
    ("stored", "averaged", "raw"),
    [
        ({"state_dict": {"model": OTHER, "ema": TENSORS}}, TENSORS, OTHER),
        ({"model": {"state_dict": TENSORS}, "epoch": 3}, TENSORS, TENSORS),
        ({"ema": {"module": TENSORS, "decay": 0.9}, "model": OTHER}, TENSORS, OTHER),
        ({"state_dict_ema": TENSORS, "state_dict": OTHER}, TENSORS, OTHER),
        ({"model_state_dict": OTHER, "ema_state_dict": TENSORS}, TENSORS, OTHER),
    ],
    ids=["both inside", "a state_dict", "a module of an average", "timm", "state_dicts"],
)
def test_entries_inside_entries(tmp_path, stored, averaged, raw):
    torch.save(stored, tmp_path / "x.pt")
    assert same(open_weights(tmp_path / "x.pt"), averaged)
    assert same(open_weights(tmp_path / "x.pt", raw=True), raw)


def test_two_sets_in_one_flat_file(tmp_path, caplog):
    caplog.set_level(logging.INFO, "imgtok.weights")
    flat = {f"ema.{name}": value for name, value in TENSORS.items()} | {f"model.{n}": v for n, v in OTHER.items()}
    save_file(flat, tmp_path / "x.safetensors")
    assert same(open_weights(tmp_path / "x.safetensors"))
    assert "took its tensors ema.*, and left model.*" in caplog.text
    assert same(open_weights(tmp_path / "x.safetensors", raw=True), OTHER)


def test_the_file_of_a_variant(tmp_path, caplog):
    caplog.set_level(logging.INFO, "imgtok.weights")
    for name in ("model.fp16.safetensors", "model.safetensors.index.fp16.json", "model.bin", "model.bf16.bin"):
        (tmp_path / name).touch()
        assert find_weights(tmp_path, "model.safetensors") == tmp_path / name
        assert f"has no model.safetensors: took {'the variant ' if '16' in name else ''}{name}" in caplog.text
        (tmp_path / name).unlink()
    for name in ("model.fp16.safetensors", "model.bf16.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=r"but the variants model\.bf16\.safetensors, model\.fp16\.safetensors: keep the"
    ):
        find_weights(tmp_path, "model.safetensors")


def test_shards_of_pickles_and_of_a_variant(tmp_path):
    index = in_shards(tmp_path)
    where = json.loads(index.read_text())["weight_map"]
    variant = tmp_path / "model.safetensors.index.fp16.json"
    index.rename(variant)
    assert find_weights(tmp_path, "model.safetensors") == variant
    assert same(open_weights(variant))
    variant.unlink()
    for file in set(where.values()):
        torch.save({name: TENSORS[name] for name in where if where[name] == file}, tmp_path / f"{file[:-12]}.bin")
    pickles = tmp_path / "model.bin.index.json"
    pickles.write_text(json.dumps({"weight_map": {name: f"{file[:-12]}.bin" for name, file in where.items()}}))
    assert find_weights(tmp_path, "model.safetensors") == pickles
    assert same(open_weights(pickles))
    assert len(weights.files_of(pickles)) == 3


def test_an_average_that_stands_in_a_shadow(tmp_path):
    shadow = {f"module.{name}": value for name, value in TENSORS.items()}
    trained = {name: value + 1 for name, value in TENSORS.items()}
    torch.save({"ema": {"decay": 0.99, "shadow": shadow}, "model": trained}, tmp_path / "x.pt")
    assert same(open_weights(tmp_path / "x.pt"))
    assert same(open_weights(tmp_path / "x.pt", raw=True), trained)


@pytest.mark.parametrize(
    "average",
    [{"decay": 0.99, "shadow": OTHER}, {"decay": 0.99, "shadow_params": [torch.zeros(2)]}, {"decay": 0.9}, 0.9],
    ids=["other names", "a list", "numbers alone", "a number"],
)
def test_an_average_in_an_unknown_form_is_no_reason_to_take_the_trained_weights(tmp_path, average):
    torch.save({"ema": average, "model": TENSORS}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: its entry ema should hold averaged weights.*raw=true"):
        open_weights(tmp_path / "x.pt")
    assert same(open_weights(tmp_path / "x.pt", raw=True))


@pytest.mark.parametrize("entry", [None, "model"])
def test_numbers_among_tensors_are_left_out(tmp_path, caplog, entry):
    caplog.set_level(logging.INFO, "imgtok.weights")
    stored = {**TENSORS, "epoch": 3, "decay": 0.9}
    torch.save({entry: stored} if entry else stored, tmp_path / "x.pt")
    assert same(open_weights(tmp_path / "x.pt"))
    assert "left out epoch, decay: not tensors but numbers" in caplog.text


def test_a_prefix_inside_an_entry(tmp_path):
    torch.save({"model": {f"module.{name}": value for name, value in TENSORS.items()}}, tmp_path / "x.pt")
    assert same(open_weights(tmp_path / "x.pt"))


# ---------------------------------------------------------------- what is refused


class Code:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"model": Code()}, r"x\.pt: not a file of weights alone: it needs (builtins\.)?print, and imgtok"),
        ({**TENSORS, "x": Code()}, "runs no code from a file"),
        ({"model": TENSORS, "args": argparse.Namespace(hook=Code())}, "runs no code from a file"),
        ({"model": TENSORS, "rate": Fraction(1, 3)}, r"it needs fractions\.Fraction.*torch\.save"),
        (torch.zeros(2), "must hold tensors by name.*found: Tensor"),
        ({}, "must hold tensors by name.*found: nothing"),
        ({"layers": TENSORS}, "one of the entries model_ema, ema, .*, model, module, state_dict.*found: layers"),
        ({"model": {"a": torch.zeros(2), "epoch": "3"}}, "must hold tensors by name.*found: a, epoch"),
        ({"model": {"epoch": 3}}, "must hold tensors by name.*found: epoch"),
        ({1: torch.zeros(2)}, "must hold tensors by name.*found: 1"),
    ],
    ids=["code", "code among tensors", "code in arguments", "an object", "a tensor", "nothing", "another entry",
         "a word", "numbers alone", "numbers for names"],
)  # fmt: skip
def test_pickles_of_anything_else(tmp_path, capsys, stored, message):
    torch.save(stored, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        open_weights(tmp_path / "x.pt")
    assert "executed" not in capsys.readouterr().out


class Whole(nn.Linear):
    """A model that is pickled as such, not by its weights."""


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (Whole(2, 2), None),
        ({"model": Whole(2, 2), "epoch": 3}, "model"),
        ({"state_dict": TENSORS, "rate": Fraction(1, 3)}, "state_dict"),
        ({**TENSORS, "rate": Fraction(1, 3)}, None),
    ],
    ids=["a model", "a model in an entry", "an object beside", "an object among tensors"],
)
def test_what_is_advised_for_a_pickle_of_more_works(tmp_path, stored, kept):
    torch.save(stored, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="runs no code from a file") as caught:
        open_weights(tmp_path / "x.pt")
    advice = str(caught.value).partition("on the machine that wrote it: ")[2]
    exec(advice, {"torch": torch, "OLD": tmp_path / "x.pt", "NEW": tmp_path / "y.pt"})
    wanted = stored if kept is None else stored[kept]
    wanted = wanted.state_dict() if isinstance(wanted, nn.Module) else wanted
    assert same(open_weights(tmp_path / "y.pt"), {n: v for n, v in wanted.items() if isinstance(v, Tensor)})


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_what_servers_give_in_place_of_weights_is_named(tmp_path, name):
    for text, message in (
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("<HTML>", "page of the web"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            open_weights(tmp_path / name)


def test_raw_weights_that_are_not_there(tmp_path):
    torch.save({"ema": TENSORS}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="one of the entries model, module, state_dict, .* that does .found: ema"):
        open_weights(tmp_path / "x.pt", raw=True)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_files_cut_short(tmp_path, keep):
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save(TENSORS, tmp_path / "x.pt")
    for name, words in (("x.safetensors", "not a whole safetensors file"), ("x.pt", "not a whole file of torch.save")):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=rf"{name}: {words}.*copy or download it"):
            open_weights(path)


@pytest.mark.parametrize("change", ["shorter", "another", "in its place"])
def test_a_file_that_changes_after_it_was_opened(tmp_path, change):
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    save_file({"a": torch.zeros(1000)}, other)
    found = open_weights(path)
    assert found["a"].sum() == 1000
    if change == "in its place":
        other.replace(path)
    else:
        path.write_bytes(path.read_bytes()[:-8] if change == "shorter" else other.read_bytes())
    with pytest.raises(ValueError, match=r"x\.safetensors: was written again while it was read"):
        found["a"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not an index of shards"),
        ("[]", "not an index of shards"),
        ('{"weight_map": ["a"]}', "not an index of shards"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "is not the name of a .safetensors file beside it"),
        ('{"weight_map": {"a": ".."}}', "index.json: weight_map: '..' is not the name of a .safetensors file"),
        ('{"weight_map": {"a": "model.bin"}}', "'model.bin' is not the name of a .safetensors file"),
        ('{"weight_map": {"a": "x.safetensors"}}', "index.json: weight_map: the shard x.safetensors is missing"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "a: not in the shards where the index has them"),
    ],
)
def test_an_index_of_something_else(tmp_path, index, message):
    path = in_shards(tmp_path)
    path.write_text(index)
    with pytest.raises(ValueError, match=message):
        open_weights(path)


def test_a_tensor_that_the_index_omits(tmp_path):
    path = in_shards(tmp_path)
    data = json.loads(path.read_text())
    del data["weight_map"]["a.weight"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"index\.json: a\.weight \(model-00001-.*the index does not have them there"):
        open_weights(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.pth: no such file of weights"):
        open_weights(tmp_path / "x.pth")
    path = in_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json: weight_map: the shard model-00002-of-00002.* is missing"):
        open_weights(path)


# ---------------------------------------------------------------- into a model


class Net(nn.Module):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.layer.weight
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.register_buffer("count", torch.tensor(1))
        self.later = nn.Parameter(torch.rand(1))


def test_a_skeleton_has_tables_and_no_memory_and_draws_nothing():
    before = torch.get_rng_state()
    net = skeleton(Net)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in net.parameters())
    assert torch.equal(net.table, torch.arange(3.0))
    assert net.tied.weight is net.layer.weight
    assert [name for name, parameter in net.named_parameters() if not parameter.requires_grad] == ["frozen"]
    assert not nn.Linear(2, 2).weight.is_meta, "the hook is gone"


def test_models_of_other_threads_are_whole():
    made: list[bool] = []

    def make_another() -> nn.Module:
        other = threading.Thread(target=lambda: made.append(nn.Linear(2, 2).weight.is_meta))
        other.start()
        other.join()
        return nn.Linear(2, 2)

    assert skeleton(make_another).weight.is_meta
    assert made == [False]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.bfloat16])
def test_filled_it_is_the_model(stored, asked):
    torch.manual_seed(0)
    whole = Net()
    state = {
        name: value.to(stored) if value.is_floating_point() else value for name, value in whole.state_dict().items()
    }
    net = fill(skeleton(Net), state.items(), dtype=asked)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype))
        wanted = asked or torch.float32
        assert value.dtype == (wanted if value.is_floating_point() else torch.int64)
    assert net.tied.weight is net.layer.weight
    assert not net.frozen.requires_grad
    assert net.layer.weight.requires_grad
    assert net.table.dtype == (asked or torch.float32)
    assert not net.training
    net.layer(torch.ones(1, 3, dtype=asked or torch.float32)).sum().backward()


def test_every_difference_is_named():
    wanted = {"a": torch.zeros(2), "b": torch.zeros(2, 3), "c": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"x: the weights do not fit the model that it describes:") as caught:
        check_tensors(
            {"b": torch.zeros(3, 2), "c": torch.zeros(1), "d": torch.zeros(4)}, wanted, Path("x"), "model that it"
        )
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "missing: a (2,)",
        "unexpected: d (4,)",
        "another shape: b is (3, 2) in the file, (2, 3) in the model",
    ]
    with pytest.raises(ValueError, match="x: c: not floating-point numbers"):
        check_tensors({**wanted, "c": torch.zeros(1, dtype=torch.int64)}, wanted, Path("x"), "model")
    check_tensors({**wanted, "c": torch.zeros(1).half()}, wanted, Path("x"), "model")
