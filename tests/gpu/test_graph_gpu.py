"""A whole model's forward in a CUDA graph: captured once, replayed while what its rows wear changes."""

import pytest
import torch
from tiny import logits, patched, tiny_model, token_ids

import ia3rt

UNIFORM = ["a", None, ["a", "b"], {"a": 0.3, "c": 0.9}, ["a", "b", "c"], "c"]
ROUTES = [
    ["a", "a", "a", "a"],
    ["a", "b", "c", None],
    [None, ["a", "b"], {"a": 0.5, "b": -0.25}, ["a", "b", "c"]],
    [{"c": 0.1}, {"c": 0.2}, {"c": 0.3}, {"c": 0.4}],
]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("first", ["worn", "base"])
def test_one_capture_serves_every_mix(first, by_row, family, backend) -> None:
    model, ids = tiny_model(family, torch.bfloat16).cuda(), token_ids(4).cuda()
    runtime = patched(model, "abc", backend=backend)
    wear, specs = (runtime.route, ROUTES) if by_row else (runtime.set_adapter, UNIFORM)
    if first == "base":
        specs = [[None] * 4 if by_row else None, *specs]
    wear(specs[0])
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        model(ids, use_cache=False)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = model(ids, use_cache=False).logits
    for spec in [*specs[1:], specs[0]]:
        wear(spec)
        graph.replay()
        assert torch.equal(captured, logits(model, ids)), spec


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_loading_and_deleting_between_replays(backend) -> None:
    """Into rows that there is room for: the bank stays where it is."""
    model, ids = tiny_model("llama", torch.bfloat16).cuda(), token_ids(2).cuda()
    runtime = ia3rt.patch(model, backend=backend, capacity=4)
    runtime.add_adapter("a", {s.key: torch.full((s.width,), 0.5) for s in runtime.sites})
    runtime.set_adapter("a")
    logits(model, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = model(ids, use_cache=False).logits
    for value in (0.8, 1.2, 0.9):
        runtime.set_adapter(None)
        runtime.delete_adapter("a")
        runtime.add_adapter("a", {s.key: torch.full((s.width,), value) for s in runtime.sites})
        runtime.set_adapter("a")
        graph.replay()
        assert torch.equal(captured, logits(model, ids)), value


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_graphs_and_forwards_wear_what_is_worn_again(backend) -> None:
    """Two graphs, captured under different mixes, and what was worn when they were captured put back by a `with`."""
    model, ids = tiny_model("llama", torch.bfloat16).cuda(), token_ids(2).cuda()
    runtime = patched(model, "abc", backend=backend)
    expected, graphs = {}, []
    for name in ("a", "b", None):
        runtime.set_adapter(name)
        expected[name] = logits(model, ids)
    for name in ("a", "b"):
        runtime.set_adapter(name)
        logits(model, ids)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            graphs.append((graph, model(ids, use_cache=False).logits))

    def all_wear(name) -> None:
        assert torch.equal(logits(model, ids), expected[name])
        for graph, captured in graphs:
            graph.replay()
            assert torch.equal(captured, expected[name])

    for name in ("a", "b"):
        runtime.set_adapter(name)
        all_wear(name)
        with runtime.disable_adapter():
            all_wear(None)
        all_wear(name)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_inductor_compiles_once(backend) -> None:
    """torch.compile's own CUDA graphs: 50 switches of every kind of mix."""
    torch._dynamo.reset()
    model, ids = tiny_model("llama", torch.bfloat16).cuda(), token_ids(4).cuda()
    runtime = ia3rt.patch(model, backend=backend, capacity=64)
    for index in range(50):
        runtime.add_adapter(str(index), {s.key: torch.full((s.width,), 0.5 + index / 50) for s in runtime.sites})
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    counter = torch._dynamo.utils.counters["stats"]
    with torch.no_grad():
        compiled(ids, use_cache=False)
        before = counter["unique_graphs"]
        for index in range(50):
            runtime.set_adapter([str(index), str(index // 2)] if index % 2 and index > 1 else {str(index): 0.5})
            torch.compiler.cudagraph_mark_step_begin()
            ours = compiled(ids, use_cache=False).logits.clone()
            torch.testing.assert_close(ours, logits(model, ids), atol=0.1, rtol=0.1)
    assert counter["unique_graphs"] == before
