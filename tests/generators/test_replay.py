"""Steps of one shape, as a GPU runs them: the same tokens as on the CPU, one graph, and nothing read in between.

There is no GPU here: `has_one_shape` is told that the CPU is like one, and the fake one counts.
"""

import contextlib

import fake_cuda
import pytest
import torch
from fake_cuda import CUDA
from torch import Tensor, nn

from imgtok.generators import replay, speculative, speculative_gpt
from imgtok.generators.conditioning import ClassSlot
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.sampling import TokenSampling
from imgtok.tokenizers.tokens import Tokens

TINY = GPTConfig(
    vocab_size=24, num_tokens=16, width=32, depth=1, num_heads=2, mlp_multiple=32, condition=ClassSlot(num_classes=5)
)
WAYS = {
    "exact": {},
    "exact, scheduled": {"schedule": "linear", "interval": (2, 9), "top_k": 9, "forbidden": (3, 5)},
    "jacobi": {"decoding": "jacobi"},
    "maximal": {"decoding": "coupled", "schedule": "cosine"},
    "gumbel": {"decoding": "coupled", "coupling": "gumbel"},
    "both": {"decoding": "coupled", "group_size": 3, "top_p": 0.9},
    "draft": {"decoding": "draft", "draft_model": "small"},
}
ALL = pytest.mark.parametrize("way", WAYS)


def build(std: float = 0.3) -> GPT:
    torch.manual_seed(0)
    model = GPT(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=std)
    return model


def draw(model: GPT, way: str, device: torch.device | str = "cpu", count: int = 16) -> Tokens:
    sampling = TokenSampling(**{"guidance": 2.0, "window": 5} | WAYS[way])
    labels = torch.arange(6, device=device) % 5
    return model.generate(labels, seed=3, indices=range(6), sampling=sampling, num_tokens=count)


@pytest.fixture
def model() -> GPT:
    made = build()
    made.drafts["small"] = build(0.25)
    return made


@pytest.fixture
def like_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(speculative, "has_one_shape", lambda device: True)
    monkeypatch.setattr(speculative_gpt, "draws_exactly", lambda model, condition: True)
    monkeypatch.setattr(speculative, "FEWEST_REPLAYS", 1)


@ALL
def test_steps_of_one_shape_draw_the_same(model, way, request):
    expected, told = draw(model, way), []
    request.getfixturevalue("like_a_gpu")
    found = draw(model, way)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.calls.calls, expected.calls.calls)
    if way.startswith("exact"):
        model.generate(torch.arange(2), seed=0, indices=range(2), on_step=told.append)
        assert told == list(range(1, 17))


class Compiled:
    """In the place of `Replayed`: without a break, or it raises."""

    backend = "eager"

    def __init__(self, body, device):
        self.run = torch.compile(body, fullgraph=True, backend=self.backend)

    def __call__(self):
        self.run()


def check_graph(model: GPT, way: str, monkeypatch, backend: str) -> None:
    expected = draw(model, way)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(Compiled, "backend", backend)
    monkeypatch.setattr(speculative, "Replayed", Compiled)
    assert torch.equal(draw(model, way).ids, expected.ids)
    assert not torch._dynamo.utils.counters["graph_break"]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2, "the first round finds a cache of equal rows"


@pytest.mark.slow
@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("way", ["exact", "maximal"])
def test_a_step_is_one_graph(model, way, monkeypatch):
    """The network's own step is compiled for every kind of model by `tests/contract`; a number that the host reads,
    which breaks a graph most often, is found by `test_the_host_looks_seldom_and_copies_nothing`.
    """
    check_graph(model, way, monkeypatch, "eager")


@pytest.mark.slow
@pytest.mark.usefixtures("like_a_gpu")
@ALL
def test_a_step_is_one_graph_through_autograd_too(model, way, monkeypatch):
    check_graph(model, way, monkeypatch, "aot_eager")


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way == "maximal" else pytest.mark.slow) for way in WAYS if way != "draft"]
)
def test_the_host_looks_seldom_and_copies_nothing(way, monkeypatch):
    """On the fake GPU all 8 rounds run; a window of 5 could be done after 2, and then every fourth is looked at."""
    monkeypatch.setattr(speculative, "LOOK_EVERY", 4)
    found = fake_cuda.run(build, lambda model: draw(model, way, CUDA, count=9))
    looks = {place: count for place, count in found.reads.items() if count and "in _checked" not in place}  # of labels
    assert list(looks.values()) == ([] if way.startswith("exact") else [2]), looks
    assert all("known = max(known, int(held.min()))" in place for place in looks)
    assert all(count <= 2 for count in found.copies.values()), found.copies


class InPlace:
    """In the place of `Replayed`: a call after those that warm up finds and leaves all tensors where they were, as a
    replay does.
    """

    checked = 0

    def __init__(self, body, device):
        self.body, self.done = body, 0

    def __call__(self):
        before = held(self.body.__closure__)
        self.body()
        if self.done >= replay.WARM_UP:
            after = held(self.body.__closure__)
            moved = [name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)]
            assert not moved, moved
            assert any("cache._lengths" in name for name in after)
            InPlace.checked += 1
        self.done += 1


def held(thing, name="") -> dict[str, Tensor]:
    """All tensors that it has but those of modules, by where they stand in it."""
    if isinstance(thing, Tensor):
        return {name: thing}
    if isinstance(thing, list | tuple):
        parts = {f"[{number}]": part for number, part in enumerate(thing)}
    elif type(thing).__name__ == "cell":
        return held(thing.cell_contents, name)
    elif (
        type(thing).__module__.startswith("imgtok.") and not isinstance(thing, nn.Module) and hasattr(thing, "__dict__")
    ):
        parts = {f".{attribute}": part for attribute, part in vars(thing).items()}
    else:
        return {}
    return {place: found for key, part in parts.items() for place, found in held(part, name + key).items()}


@ALL
@pytest.mark.usefixtures("like_a_gpu")
def test_a_round_leaves_all_tensors_where_they_are(model, way, monkeypatch):
    """A graph reads and writes the memory that tensors had when it was made."""
    monkeypatch.setattr(speculative, "Replayed", InPlace)
    monkeypatch.setattr(InPlace, "checked", 0)
    draw(model, way)
    assert InPlace.checked


@pytest.mark.usefixtures("like_a_gpu")
def test_few_rounds_make_no_graph(model, monkeypatch):
    made = []

    def note(body, device):
        made.append(device)
        return body

    monkeypatch.setattr(speculative, "Replayed", note)
    monkeypatch.setattr(speculative, "FEWEST_REPLAYS", 10)
    for count, graphs in ((10 + replay.WARM_UP, 0), (11 + replay.WARM_UP, 1)):
        draw(model, "exact", count=count)
        assert len(made) == graphs


def test_without_graphs_a_gpu_draws_as_a_cpu_does():
    def work(moved):
        labels, ways = torch.zeros(2, dtype=torch.long, device=CUDA), []
        for moved.replays in (True, False):
            ways.append(speculative_gpt.draws_exactly(moved, labels))
        assert ways == [True, False]

    fake_cuda.run(build, work)


@pytest.fixture
def torch_s_own(monkeypatch) -> list[str]:
    """What is asked of stand-ins for CUDA; what is captured is run here, so that it can be seen."""
    log = []

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def noted(name):
        log.append(name)
        try:
            yield
        finally:
            log.append(f"end of {name}")

    def capture(graph, stream, capture_error_mode):
        assert replay.CAPTURING.locked()
        return noted(f"graph on {stream}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: noted(device))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noted(stream))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return log


def test_a_body_becomes_a_graph_after_two_calls(torch_s_own):
    """On its own device, whichever the current one is; what is replayed runs no Python."""
    log, device = torch_s_own, torch.device("cuda", 1)
    step = replay.Replayed(lambda: log.append("body"), device)
    for _ in range(4):
        step()
    stream, graph = "a stream of cuda:1", "graph on a stream of cuda:1"
    begun, ended = [device, stream, graph], [f"end of {graph}", f"end of {stream}", "end of cuda:1"]
    assert log == ["body", "body", *begun, "body", *ended, "replay", "replay"]
    assert not replay.CAPTURING.locked()
    log.clear()
    for _ in range(3):
        replay.Replayed(lambda: log.append("body"), torch.device("cpu"))()
    assert log == ["body"] * 3


def test_a_body_that_makes_no_graph_runs_as_it_is(torch_s_own, monkeypatch, caplog):
    """On the stream that was current before, wherever it fails."""

    class Refusing(contextlib.nullcontext):
        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing")

    log = torch_s_own
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: Refusing())
    step = replay.Replayed(lambda: log.append("body"), CUDA)
    for _ in range(4):
        step()
    stream = "a stream of cuda:0"
    assert log == ["body", "body", CUDA, stream, f"end of {stream}", "end of cuda:0", "body", "body"]
    assert not replay.CAPTURING.locked()
    assert caplog.text.count("no CUDA graph could be made, so kernels are launched one by one") == 1
