"""The drop-in modules beside what else acts on a module: hooks, accelerate, moves, torch.compile, both backends."""

import accelerate
import pytest
import torch
from tiny import FAMILIES, logits, peft_model, save_each, tiny_model, token_ids
from torch import nn
from where import DEVICE, home

import ia3rt
from ia3rt.modules.layer import IA3Layer

IDS = token_ids()


@pytest.fixture(params=FAMILIES)
def folders(request, tmp_path):
    return request.param, save_each(peft_model(tiny_model(request.param), request.param), tmp_path)


def patched(folders, **options):
    family, paths = folders
    runtime = ia3rt.patch(tiny_model(family).to(home(options.get("backend"))), **options)
    for path in paths:
        runtime.load_adapter(path)
    return runtime


@pytest.mark.parametrize("spec", [None, "b", ["b", "c", "d"], {"b": 0.5, "c": -0.2}], ids=str)
def test_the_kernels_give_what_the_torch_backend_gives(folders, spec):
    expected, fused = patched(folders), patched(folders, backend="triton")
    assert (expected.backend, fused.backend) == ("torch", "triton")
    for runtime in (expected, fused):
        runtime.set_adapter(spec)
    torch.testing.assert_close(logits(fused.model, IDS), logits(expected.model, IDS), rtol=1e-4, atol=1e-5)


def test_the_kernels_route_rows_and_tokens(folders):
    expected, fused = patched(folders), patched(folders, backend="triton")
    for index in (torch.tensor([2, 0, 1]), torch.randint(3, IDS.shape)):
        outputs = []
        for runtime in (expected, fused):
            with runtime.route(["b", None, ["c", "d"]], index):
                outputs.append(logits(runtime.model, IDS))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def test_a_layer_that_no_kernel_fits_is_scaled_beside_them():
    class Quantised(nn.Linear):
        """Stands for a layer whose weight no kernel reads."""

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(8, 12), Quantised(12, 8)

        def forward(self, x):
            return self.down_proj(x)

    model = MLP().to(DEVICE)
    expected = nn.Linear(12, 8).to(DEVICE)
    expected.load_state_dict(model.down_proj.state_dict())
    runtime = ia3rt.patch(model, backend="triton")
    vector, x = torch.rand(12).to(DEVICE), torch.randn(3, 2, 12).to(DEVICE)
    runtime.add_adapter("b", {"down_proj": vector})
    runtime.route(["b", None, "b"])
    result = model(x)
    torch.testing.assert_close(result[::2], expected(x[::2] * vector))
    torch.testing.assert_close(result[1], expected(x[1]))


def test_hooks_and_references_to_a_module_stay(folders):
    family, _ = folders
    model = tiny_model(family)
    layer = next(m for name, m in model.named_modules() if name.endswith(("v_proj", "c_attn")))
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    runtime = ia3rt.patch(model)
    assert isinstance(layer, IA3Layer)
    logits(model, IDS)
    runtime.unpatch()
    logits(model, IDS)
    assert len(calls) == 2


def test_accelerates_hooks_do_not_hide_the_vectors(folders):
    plain, hooked = patched(folders), tiny_model(folders[0])
    for module in hooked.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    runtime = ia3rt.patch(hooked)
    runtime.load_adapter(folders[1][0])
    for each in (plain, runtime):
        each.set_adapter("b")
    assert torch.equal(logits(hooked, IDS), logits(plain.model, IDS))
    runtime.unpatch()
    assert torch.equal(logits(hooked, IDS), logits(tiny_model(folders[0]), IDS))


def test_a_forward_that_other_code_set_is_refused():
    model = tiny_model()
    layer = model.model.layers[0].mlp.down_proj
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="'model.layers.0.mlp.down_proj' has a forward of its own"):
        ia3rt.patch(model)


@pytest.mark.parametrize("rows", [False, True], ids=["one mix", "rows"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_vectors_are_not_lost_on_the_meta_device(tmp_path, backend, rows):
    """Where shapes alone are computed, and weights are until they are loaded: nothing comes back from there."""
    wrapped = peft_model(tiny_model(), "llama")
    paths = save_each(wrapped, tmp_path)
    runtime = patched(("llama", paths), backend=backend)
    model, meta = runtime.model, torch.device("meta")
    weights, rotary = tiny_model().state_dict(), tiny_model().model.rotary_emb
    wear = (lambda: runtime.route(["b", None, "c"])) if rows else (lambda: runtime.set_adapter("b"))
    wear()
    away = {name: weight.to(meta) for name, weight in model.state_dict().items()}
    assert torch.func.functional_call(model, away, (IDS.to(meta),)).logits.is_meta  # before any other forward
    wrapped.set_adapter("b")
    expected = logits(wrapped, IDS)[: 1 if rows else None]
    torch.testing.assert_close(logits(model, IDS)[: len(expected)], expected, rtol=1e-4, atol=1e-4)
    model.to(meta)
    assert model(IDS.to(meta)).logits.is_meta
    runtime.load_adapter(paths[2], "late")
    model.to_empty(device=home(backend)).load_state_dict(weights, strict=False)
    model.model.rotary_emb = rotary.to(home(backend))  # what it computes of its config is in no file
    torch.testing.assert_close(logits(model, IDS)[: len(expected)], expected, rtol=1e-4, atol=1e-4)
    runtime.set_adapter("late")
    wrapped.set_adapter("d")
    torch.testing.assert_close(logits(model, IDS), logits(wrapped, IDS), rtol=1e-4, atol=1e-4)


def test_a_dtype_change_keeps_the_vectors_exact(folders):
    runtime = patched(folders)
    runtime.set_adapter("b")
    runtime.model.to(torch.bfloat16)
    assert runtime._bank.table.dtype == torch.float32
    cast_first = tiny_model(folders[0], torch.bfloat16)
    other = ia3rt.patch(cast_first)
    other.load_adapter(folders[1][0])
    other.set_adapter("b")
    assert torch.equal(logits(runtime.model, IDS), logits(cast_first, IDS))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_under_torch_compile_switching_compiles_nothing(folders, backend):
    """Mixes of every kind through one graph; a batch by row takes a second, whatever its rows wear.

    No kernel is launched in it: a compiler fuses the multiplications.
    """
    runtime = patched(folders, backend=backend)
    reference = patched(folders)
    compilations = 0

    def count(graph, _):
        nonlocal compilations
        compilations += 1
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        assert not [call for call in calls if "ia3rt" in str(call.target)]
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(runtime.model, backend=count, fullgraph=True)
    specs = [None, "b", ["b", "c"], {"b": 0.1, "d": 2.0}, ia3rt.Mix(("c",), (0.5,), "delta")]

    def check():
        torch.testing.assert_close(logits(compiled, IDS), logits(reference.model, IDS), rtol=1e-4, atol=1e-5)

    for step in range(20 if backend == "torch" else 10):  # the interpreter is slow
        for each in (runtime, reference):
            each.set_adapter(specs[step % len(specs)])
        if step % 10 < len(specs):
            check()
        else:
            logits(compiled, IDS)
    assert compilations == 1
    for rows in (specs[:3], specs[2:], ["d", "d", None]):
        for each in (runtime, reference):
            each.route(rows)
        check()
    assert compilations == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("fuse_gate_up", [False, True])
def test_the_kernels_follow_autocast(folders, fuse_gate_up):
    """As Trainer(bf16=True) runs them: matmuls in bfloat16, as torch does them on the other backend."""
    family, *_ = folders
    results = []
    for backend in ("torch", "triton"):
        model, fuse = tiny_model(family).to(home(backend)), fuse_gate_up and backend == "triton"
        runtime = ia3rt.patch(model, backend=backend, fuse_gate_up=fuse)
        runtime.load_adapter(folders[1][0])
        runtime.set_adapter("b")
        with torch.autocast(home(backend).type, dtype=torch.bfloat16):
            results.append(logits(runtime.model, IDS))
        exact = logits(runtime.model, IDS)
    assert results[0].dtype == results[1].dtype == torch.bfloat16
    errors = [(result.float() - exact).abs().max() for result in results]
    assert 1e-3 < errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_under_torch_compile_batches_of_other_sizes_compile_nothing(folders, backend, routed):
    runtime = patched(folders, backend=backend)
    compilations = first = 0

    def count(graph, _):
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(runtime.model, backend=count, fullgraph=True, dynamic=True)
    for rows, length in ((2, 7), (3, 7), (5, 9), (4, 11), (7, 3)):
        if routed:
            runtime.route(["b", {"c": 0.5}, None, ["b", "d"], "c", "b", "d"][:rows])
        else:
            runtime.set_adapter(["b", "c", "d"][: rows % 3 + 1])
        ids = token_ids(rows, length)
        torch.testing.assert_close(logits(compiled, ids), logits(runtime.model, ids), rtol=1e-4, atol=1e-5)
        first = first or compilations
    assert 1 <= compilations == first
    torch._dynamo.reset()
