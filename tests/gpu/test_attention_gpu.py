"""The attention op at the sizes of real models, and what only a GPU shows. Small sizes: kernels/test_attention.py."""

import pytest
import torch
from attended import SLOTS, Layer
from workloads import POPULARITY, popularity

from ia3rt import ops


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("Hq", "Hkv", "D"), [(32, 8, 128), (9, 3, 64), (8, 4, 256), (12, 12, 80)])
@pytest.mark.parametrize(("Sq", "Skv"), [(1, 2000), (500, 500), (100, 700)])
def test_sizes_of_models(Sq, Skv, Hq, Hkv, D, dtype) -> None:
    Layer("cuda", dtype, Hq=Hq, Hkv=Hkv, D=D, Sq=Sq, Skv=Skv).check(causal=True, gradients=Sq == Skv)


@pytest.mark.parametrize("Sq", [1, 64])
def test_a_cuda_graph_replays_with_other_mixes(Sq) -> None:
    layer = Layer("cuda", torch.bfloat16, B=8, D=64, Sq=Sq, Skv=1024)
    inputs = layer.q, layer.k, layer.v, None, None, None, layer.l_k, layer.l_v, layer.mixes, layer.route
    options = layer.options(True, None, None)
    ops.attention(*inputs, *options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = ops.attention(*inputs, *options)
    for name in POPULARITY:
        layer.route.copy_(popularity(name, 8, SLOTS, layer.generator))
        graph.replay()
        assert torch.equal(y, ops.attention(*inputs, *options)[0])
