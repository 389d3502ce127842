"""Models whose layers lie on several devices, as accelerate's device_map puts them.

Collected by no run of pytest by itself: test_several_devices.py runs it, on the GPUs of a machine, and on devices that
are made of its memory.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import accelerate
import devices_of_memory
import peft
import pytest
import torch
from heads import model_of
from mixtures import tiny_mixture
from tiny import FAMILIES, generated, peft_model, peft_vectors, save_each, scaled, tiny_model, token_ids
from torch import nn

import ia3rt

if "IA3RT_TEST_LIBRARY" in os.environ:
    devices_of_memory.use(Path(os.environ["IA3RT_TEST_LIBRARY"]))

IDS = token_ids()
CPU = torch.device("cpu")
FIRST, *SECONDS = os.environ["IA3RT_TEST_DEVICES"].split()  # the first one has the embeddings
ROWS = ["b", None, ["c", "d"]]


@pytest.fixture(params=[FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])])
def family(request):
    return request.param


@pytest.fixture(params=SECONDS)
def second(request):
    return request.param


def device_map(model, second):
    """The second half of the layers on the second device, and what comes after them."""
    base = model.base_model_prefix
    names = [f"{base}.{name}" for name, _ in model.base_model.named_children() if name not in ("h", "layers")]
    layers = next((each for each in ("h", "layers") if hasattr(model.base_model, each)), None)
    after = ("norm", "ln_f")
    places = {name: second if name.endswith(after) else FIRST for name in names}
    if layers is not None:
        places |= {f"{base}.{layers}.0": FIRST, f"{base}.{layers}.1": second}
    heads = [name for name, _ in model.named_children() if name != base]
    return places | dict.fromkeys(heads, FIRST if model.config.tie_word_embeddings else second)


def over_devices(model, second):
    """The model over both devices; what goes in and comes out is on the first."""
    places = device_map(model, second)
    return accelerate.dispatch_model(model, places, main_device=main_device(second), force_hooks=True)


def by_hand(model, second):
    """The second of a Llama's layers on the second device, with nothing set on any layer's forward."""
    model.to(FIRST).model.layers[1].to(second)
    model.model.layers[1].register_forward_pre_hook(_bring(second), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(_bring(FIRST), with_kwargs=True)
    return model


def _bring(device):
    def hook(module, args, kwargs):
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), (args, kwargs))

    return hook


def through_layers(model, second):
    """The key projections and the second matrices of a Llama's MLPs on the second device, all else on the first."""
    model.to(FIRST)
    for path, module in model.named_modules():
        if path.endswith(("k_proj", "down_proj")):
            module.to(second).register_forward_pre_hook(_bring(second), with_kwargs=True)
            module.register_forward_hook(lambda module, args, y: y.to(FIRST))
    return model


def main_device(second):
    """The CPU where that is one of them: else it would be taken for a place to keep weights."""
    return "cpu" if "cpu" in (FIRST, second) else FIRST


def run(model, ids=IDS):
    with torch.no_grad():
        return model(ids.to(model.device)).logits.cpu()


def devices(runtime):
    return {str(table.device) for table in runtime._bank.tables}


def assert_each_site_where_its_module_is(runtime):
    for site, device in runtime._bank.devices.items():
        assert next(runtime.model.get_submodule(site.module).parameters()).device == device


@pytest.fixture
def truth(family, tmp_path):
    """A PEFT model on the CPU, in float64, and the folders of its adapters."""
    wrapped = peft_model(tiny_model(family, torch.float64), family)
    return wrapped, save_each(wrapped, tmp_path / "adapters")


@pytest.fixture
def loaded(family, second, truth):
    """The same adapters on a model over both devices."""
    model = over_devices(tiny_model(family, torch.float64), second)
    runtime = ia3rt.patch(model, backend="torch")
    for folder in truth[1]:
        runtime.load_adapter(folder)
    return runtime


def close(actual, expected):
    """As close as two devices are in the base model, whose rotary embeddings and norms are float32."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=3e-6)


def by_weights(family, wrapped, mix):
    """What a mix gives, by the paper's formula: multiplied into a copy's weights."""
    vectors = {name: peft_vectors(wrapped, name) for name in "bcd"}
    combined = {}
    for key in vectors["b"]:
        held = [vectors[name][key] for name in mix]
        combined[key] = torch.ones_like(vectors["b"][key])
        if isinstance(mix, dict):
            combined[key] = sum(weight * vector for weight, vector in zip(mix.values(), held, strict=True))
        else:
            for vector in held:
                combined[key] = combined[key] * vector
    return run(scaled(tiny_model(family, torch.float64), combined))


def test_each_table_is_where_its_layers_are(loaded, second):
    assert devices(loaded) == {FIRST, second}
    assert_each_site_where_its_module_is(loaded)
    whole = ia3rt.patch(tiny_model(), backend="torch")
    if len(whole.sites) == len(loaded.sites) and whole.sites == loaded.sites:
        assert loaded.stats().device_bytes == whole.stats().device_bytes


def test_mixes_are_those_of_one_device(loaded, truth, family):
    wrapped, _ = truth
    for name in "bcd":
        wrapped.set_adapter(name)
        loaded.set_adapter(name)
        close(run(loaded.model), run(wrapped))
    for mix in (["b", "c"], {"b": 0.5, "c": 0.25, "d": 0.25}):
        loaded.set_adapter(mix)
        close(run(loaded.model), by_weights(family, wrapped, mix))
    loaded.set_adapter(None)
    close(run(loaded.model), by_weights(family, wrapped, []))


def test_rows_and_tokens_wear_their_own(loaded, truth, family):
    wrapped, _ = truth
    rows = [by_weights(family, wrapped, mix or []) for mix in (["b"], None, ["c", "d"])]
    with loaded.route(ROWS):
        for _ in range(2):  # the first forward is looked at
            close(run(loaded.model), torch.stack([rows[at][at] for at in range(3)]))
    index = torch.zeros(IDS.shape, dtype=torch.int64)
    index[:, 4:] = 1
    with loaded.route(["b", "c"], index=index):
        tokens = run(loaded.model)
    close(tokens[:, :4], run_with(loaded, "b")[:, :4])
    other = index.clone()
    other[1:] = 0
    with loaded.route(["b", "c"], index=other):
        part = run(loaded.model)
    close(part[0], tokens[0])
    close(part[1:], run_with(loaded, "b")[1:])
    close(run_with(loaded, "b"), rows[0])


def run_with(runtime, mix):
    with runtime.route([mix] * len(IDS)):
        return run(runtime.model)


def test_rows_are_generated_with_their_own(loaded, truth, family):
    settings = dict(max_new_tokens=6, do_sample=False)
    mask = torch.ones_like(IDS)
    with loaded.route(ROWS):
        mixed = generated(loaded.model, IDS, mask, **settings)
    for at, mix in enumerate((["b"], [], ["c", "d"])):
        vectors = {name: peft_vectors(truth[0], name) for name in mix}
        keys = peft_vectors(truth[0], "b")
        product = {key: torch.stack([vectors[name][key] for name in mix]).prod(0) for key in keys} if mix else {}
        alone = scaled(tiny_model(family, torch.float64), product)
        assert torch.equal(mixed[at : at + 1], generated(alone, IDS[at : at + 1], mask[at : at + 1], **settings))


def test_adapters_are_combined_read_and_written(loaded, truth, family, tmp_path):
    wrapped, folders = truth
    alone = ia3rt.patch(tiny_model(family, torch.float64), backend="torch")
    for folder in folders:
        alone.load_adapter(folder)
    for runtime in (loaded, alone):
        runtime.add_weighted_adapter(["b", "c"], [0.4, 0.6], "sum", "linear")
        runtime.add_weighted_adapter(["b", "c", "d"], [1.0, 0.5, 0.5], "ties", "ties", density=0.5)
    for name in ("b", "sum", "ties"):
        ours, theirs = loaded.get_adapter(name).vectors, alone.get_adapter(name).vectors
        assert all(torch.equal(ours[key].cpu(), theirs[key]) for key in theirs) and len(ours) == len(theirs)
        loaded.save_adapter(name, tmp_path / name)
        again = peft.PeftModel.from_pretrained(tiny_model(family, torch.float64), tmp_path / name).eval()
        close(run_with(loaded, name), run(again))
    loaded.set_adapter("ties")
    with pytest.warns(UserWarning, match="'ties' was active and is deleted"):
        loaded.delete_adapter("ties")
    close(run(loaded.model), by_weights(family, wrapped, []))


def test_weights_are_merged_where_they_are_and_put_back(loaded, truth, family, second):
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    loaded.merge_adapter(["b", "c"])
    close(run(loaded.model), by_weights(family, truth[0], ["b", "c"]))
    loaded.unmerge_adapter()
    assert all(torch.equal(parameter, before[name]) for name, parameter in loaded.model.named_parameters())
    base = run(over_devices(tiny_model(family, torch.float64), second))
    assert torch.equal(run(loaded.unpatch()), base)


def test_registered_adapters_come_and_go(second, truth, family, tmp_path):
    wrapped, folders = truth
    runtime = ia3rt.patch(over_devices(tiny_model(family, torch.float64), second), capacity=2, grow=False)
    runtime.register({folder.name: folder for folder in folders})
    tables = runtime._bank.tables
    for name in "bcdbdc":
        wrapped.set_adapter(name)
        runtime.set_adapter(name)
        close(run(runtime.model), run(wrapped))
    assert runtime.stats().evictions > 0 and runtime._bank.tables is tables
    runtime.prefetch("b").result()
    with pytest.raises(ValueError, match="3 adapters are worn at once, and the bank has 2 rows"):
        runtime.set_adapter(["b", "c", "d"])


def test_adapters_bring_sites_on_each_device(second, family):
    """Rows and columns are added, and what was there before is there still."""
    base = tiny_model(family, torch.float64)
    names = [name for name, _ in base.named_modules() if name.endswith(("o_proj", "attn.c_proj"))]
    runtime = ia3rt.patch(over_devices(copy.deepcopy(base), second), capacity=1)
    adapters = {"default": {site.key: torch.rand(site.width) for site in runtime.sites}}
    adapters |= {name: {(path, "out"): torch.rand(64) for path in names} for name in ("new", "other")}
    for name, vectors in adapters.items():
        runtime.add_adapter(name, vectors)
    assert_each_site_where_its_module_is(runtime)
    expected = {name: run(scaled(base, vectors)) for name, vectors in adapters.items()}
    expected["both"] = run(scaled(base, adapters["default"] | adapters["other"]))
    for name in adapters:
        close(run_with(runtime, name), expected[name])
    close(run_with(runtime, ["default", "other"]), expected["both"])
    with runtime.route(["default", "new", ["other", "default"]]):
        close(run(runtime.model), torch.stack([expected[n][at] for at, n in enumerate(("default", "new", "both"))]))
    with pytest.raises(ValueError, match="NaN or inf"):
        runtime.add_adapter("nan", {("lm_head", "in"): torch.full((64,), torch.nan)})
    close(run_with(runtime, "default"), expected["default"])


@pytest.mark.parametrize("mix", ["a", ["a", "b"]])
def test_training_is_that_of_one_device(second, family, mix):
    losses, kept = [], []
    for model in (over_devices(tiny_model(family, torch.float64), second), tiny_model(family, torch.float64)):
        runtime = ia3rt.patch(model, backend="torch")
        for at, name in enumerate("ab"):
            generator = torch.Generator().manual_seed(at)
            vectors = {site.key: torch.rand(site.width, generator=generator) + 0.5 for site in runtime.sites}
            runtime.add_adapter(name, vectors)
        parameters = runtime.train_adapter(mix)
        runtime.route(["a", "b", None]) if mix != "a" else None
        optimizer = torch.optim.AdamW(parameters, lr=0.05)
        losses.append([])
        for _ in range(4):
            ids = IDS.to(model.device)
            loss = model(ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        assert_each_site_where_its_module_is(runtime)
        runtime.end_training()
        kept.append({key: vector.cpu() for key, vector in runtime.get_adapter("a").vectors.items()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    for key, vector in kept[1].items():
        torch.testing.assert_close(kept[0][key], vector, rtol=1e-5, atol=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_gradient_checkpointing_wears_what_the_forward_wore(second):
    gradients = []
    for model in (over_devices(tiny_model(dtype=torch.float64), second), tiny_model(dtype=torch.float64)):
        runtime = ia3rt.patch(model, backend="torch")
        for name in "ab":
            runtime.add_adapter(name, {site.key: torch.full((site.width,), 0.5) for site in runtime.sites})
        parameters = runtime.train_adapter(["a", "b"])
        model.gradient_checkpointing_enable()
        model.train()
        with runtime.route(["a", "b", None]):
            ids = IDS.to(model.device)
            loss = model(ids, labels=ids, use_cache=False).loss
        runtime.set_adapter("b")
        loss.backward()
        gradients.append([each.grad.cpu() for each in parameters])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_vectors_follow_the_layers(second):
    """Patched where all is on one device, then taken apart, and put together again."""
    model, alone = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    runtime, other = ia3rt.patch(model, backend="torch"), ia3rt.patch(alone, backend="torch")
    vectors = {site.key: torch.rand(site.width) for site in runtime.sites}
    for each in (runtime, other):
        each.add_adapter("a", vectors)
        each.set_adapter("a")
    expected = run(alone)
    close(run(model), expected)
    over_devices(model, second)
    close(run(model), expected)
    assert devices(runtime) == {FIRST, second}
    with runtime.route(["a", None, "a"]), other.route(["a", None, "a"]):
        close(run(model), run(alone))
    accelerate.hooks.remove_hook_from_submodules(model)
    for where in (CPU, torch.device(second), CPU):
        model.to(where)
        assert devices(runtime) == {str(where)}
        close(run(model), expected)
    model.model.layers[1].to(second)
    model.model.layers[1].register_forward_pre_hook(_bring(second), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(_bring("cpu"), with_kwargs=True)
    for _ in range(2):
        close(run(model), expected)
    assert devices(runtime) == {"cpu", second}
    assert_each_site_where_its_module_is(runtime)


@pytest.mark.parametrize("split", [by_hand, through_layers])
def test_layers_are_put_on_devices_in_other_ways(second, split):
    model, alone = split(tiny_model(dtype=torch.float64), second), tiny_model(dtype=torch.float64)
    runtime, other = ia3rt.patch(model, backend="torch"), ia3rt.patch(alone, backend="torch")
    for name in "bcd":
        vectors = {site.key: torch.rand(site.width) for site in runtime.sites}
        for each in (runtime, other):
            each.add_adapter(name, vectors)
            each.set_adapter(name)
        close(run(model), run(alone))
    with runtime.route(ROWS), other.route(ROWS):
        close(run(model), run(alone))
        close(run(model), run(alone))
    copied = copy.deepcopy(model)
    with ia3rt.patch(copied).route(ROWS), other.route(ROWS):
        close(run(copied), run(alone))


def test_heads_of_adapters_are_on_their_modules_device(second):
    model, alone = over_devices(model_of("a linear head"), second), model_of("a linear head")
    runtime, other = ia3rt.patch(model, backend="torch"), ia3rt.patch(alone, backend="torch")
    for name in "bcd":
        vectors = {site.key: torch.rand(site.width) for site in runtime.sites}
        own = {"score": {key: torch.rand_like(x) for key, x in alone.score.state_dict().items()}}
        for each in (runtime, other):
            each.add_adapter(name, vectors, modules=own)
    rows = ["b", None, "d"]
    with runtime.route(rows), other.route(rows):
        torch.testing.assert_close(run(model, IDS % 99), run(alone, IDS % 99), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["a linear head", "a head of two layers", "embeddings"])
@pytest.mark.parametrize("is_dispatched", [False, True])
def test_own_modules_follow_where_the_model_is_put_later(second, kind, is_dispatched):
    model, alone = model_of(kind), model_of(kind)
    if is_dispatched:
        over_devices(model, second)
    runtime, other = ia3rt.patch(model, backend="torch"), ia3rt.patch(alone, backend="torch")
    paths = {"embeddings": ["model.embed_tokens", "lm_head"], "a linear head": ["score"]}.get(kind, ["classifier"])
    for name in "bcd":
        vectors = {site.key: torch.rand(site.width) for site in runtime.sites}
        own = {
            path: {key: torch.rand_like(x) for key, x in alone.get_submodule(path).state_dict().items()}
            for path in paths
        }
        for each in (runtime, other):
            each.add_adapter(name, vectors, modules=own)
    places = device_map(model, second)
    swapped = {name: second if device == FIRST else FIRST for name, device in places.items()}

    def put(map_):
        accelerate.hooks.remove_hook_from_submodules(model)
        accelerate.dispatch_model(model, map_, main_device=main_device(second), force_hooks=True)

    def on_the_cpu():
        accelerate.hooks.remove_hook_from_submodules(model)
        model.to("cpu")

    for move in (lambda: None, lambda: put(swapped), lambda: put(places), on_the_cpu, lambda: put(swapped)):
        move()
        for row in ("b", "c", None):
            for each in (runtime, other):
                each.set_adapter(row)
            torch.testing.assert_close(run(model, IDS % 99), run(alone, IDS % 99), rtol=1e-5, atol=1e-5)
        if kind != "embeddings":
            rows = ["b", None, "d"]
            with runtime.route(rows), other.route(rows):
                torch.testing.assert_close(run(model, IDS % 99), run(alone, IDS % 99), rtol=1e-5, atol=1e-5)


def test_transformers_puts_a_model_on_several_devices(second, tmp_path):
    alone = tiny_model()
    alone.save_pretrained(tmp_path)
    if "cpu" in (FIRST, second):
        pytest.skip("transformers takes the CPU beside another device for a place to keep weights")
    model = type(alone).from_pretrained(tmp_path, device_map=device_map(alone, second))
    runtime, other = ia3rt.patch(model, backend="torch"), ia3rt.patch(alone, backend="torch")
    for name in "bcd":
        vectors = {site.key: torch.rand(site.width) for site in runtime.sites}
        for each in (runtime, other):
            each.add_adapter(name, vectors)
    assert devices(runtime) == {FIRST, second}
    with runtime.route(ROWS), other.route(ROWS):
        torch.testing.assert_close(run(model), run(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["eager", "batched_mm"])
def test_experts(second, way):
    model, alone = tiny_mixture("mixtral"), tiny_mixture("mixtral")
    over_devices(model, second)
    runtimes = []
    for each in (model, alone):
        each.set_experts_implementation(way)
        runtimes.append(ia3rt.patch(each, backend="torch"))
    for name in "bcd":
        vectors = {site.key: torch.rand(site.width) for site in runtimes[0].sites}
        for runtime in runtimes:
            runtime.add_adapter(name, vectors)
    with runtimes[0].route(ROWS), runtimes[1].route(ROWS):
        for _ in range(2):
            torch.testing.assert_close(run(model), run(alone), rtol=1e-4, atol=1e-4)


def test_slices_of_fused_projections(second):
    slices = {"c_attn": ("k", "v"), "mlp.c_proj": None}
    model, alone = over_devices(tiny_model("gpt2", torch.float64), second), tiny_model("gpt2", torch.float64)
    runtimes = [ia3rt.patch(each, target_modules=slices, backend="torch") for each in (model, alone)]
    for name, weight in (("b", 0.5), ("c", 2.0)):
        for runtime in runtimes:
            vectors = {}
            for site in runtime.sites:
                vectors[site.key] = torch.ones(site.width)
                inside = ... if site.slices is None else site.slices.inside()
                vectors[site.key][inside] = weight
            runtime.add_adapter(name, vectors)
            runtime.set_adapter({"b": 0.3, name: 0.3} if name == "c" else name)
        close(run(model), run(alone))


def test_a_compiled_model_is_that_of_one_device(loaded, family):
    torch._dynamo.reset()
    compiled = torch.compile(loaded.model, backend="eager")
    for mix in ("b", ["c", "d"], None):
        loaded.set_adapter(mix)
        close(run(compiled), run(loaded.model))
    loaded.route(ROWS)
    close(run(compiled), run(loaded.model))


@pytest.mark.slow
@pytest.mark.parametrize("split", [over_devices, by_hand, through_layers])
def test_kernels_read_what_is_on_their_device(second, split):
    """In Triton's interpreter where there is no GPU."""
    if "cuda" in FIRST and "cuda" not in second:
        pytest.skip("the kernels run on CUDA devices")
    model, alone = split(tiny_model(), second), tiny_model()
    runtimes = ia3rt.patch(model, backend="triton"), ia3rt.patch(alone, backend="torch")
    for name in "bcd":
        vectors = {site.key: torch.rand(site.width) for site in runtimes[0].sites}
        for runtime in runtimes:
            runtime.add_adapter(name, vectors)

    pairs = [layer.self_attn.k_proj.ia3_pair for layer in model.model.layers]
    assert (None in pairs) == (split is through_layers)  # one launch is on one device

    def are_close():
        torch.testing.assert_close(run(model), run(alone), rtol=1e-3, atol=1e-3)

    for mix in ("b", ["b", "c"], {"c": 0.5, "d": 0.25}, None):
        for runtime in runtimes:
            runtime.set_adapter(mix)
        are_close()
    index = torch.arange(IDS.numel()).view(IDS.shape) % 3
    for rows, of_tokens in ((ROWS, None), (["b", "c", None], index)):
        with runtimes[0].route(rows, index=of_tokens), runtimes[1].route(rows, index=of_tokens):
            for _ in range(3):  # the first is looked at, the third repeats a launch
                are_close()
    gradients = []
    for runtime in runtimes:
        parameters = runtime.train_adapter(["b", "c"])
        with runtime.route(ROWS):
            ids = IDS.to(runtime.model.device)
            runtime.model(ids, labels=ids).loss.backward()
        gradients.append([each.grad.cpu() for each in parameters])
        runtime.end_training()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_what_peft_brought_goes_back(family, second):
    wrapped = peft_model(tiny_model(family, torch.float64), family)
    expected = {}
    for name in "bcd":
        wrapped.set_adapter(name)
        expected[name] = run(wrapped)
    placed = {f"base_model.model.{path}": at for path, at in device_map(wrapped.get_base_model(), second).items()}
    accelerate.dispatch_model(wrapped, placed, main_device=main_device(second), force_hooks=True)
    runtime = ia3rt.patch(wrapped, backend="torch")
    assert devices(runtime) == {FIRST, second}
    for name in "bcd":
        runtime.set_adapter(name)
        close(run(wrapped), expected[name])
    runtime.unpatch()
    close(run(wrapped), expected["d"])


def test_what_cannot_be_is_refused(second, monkeypatch):
    model = over_devices(tiny_model(), second)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if "cpu" in (FIRST, second) or not second.startswith("cuda"):
        with pytest.raises(ValueError, match="the triton backend does not run torch.float32 on"):
            ia3rt.patch(model, backend="triton")
    runtime = ia3rt.patch(model, backend="torch")
    with pytest.raises(RuntimeError, match="lie on several devices, .*, and a CUDA graph is of one"):
        runtime._routing.capture(runtime._routing.now())
    runtime.unpatch()


@pytest.mark.parametrize("split", [over_devices, by_hand])
@torch._dynamo.config.patch(recompile_limit=64)  # accelerate's hooks are frames of their own for each layer
def test_what_the_kernels_do_not_do_is_done_where_the_model_is_compiled(second, split):
    if "cuda" in FIRST and "cuda" not in second:
        pytest.skip("the kernels run on CUDA devices")
    torch._dynamo.reset()
    model, alone = split(tiny_model(), second), tiny_model()
    runtime, other = ia3rt.patch(model, backend="triton"), ia3rt.patch(alone, backend="torch")
    for name in "bcd":
        vectors = {site.key: torch.rand(site.width) for site in runtime.sites}
        for each in (runtime, other):
            each.add_adapter(name, vectors)
    part = model.model.layers[1].mlp.down_proj
    with pytest.raises(RuntimeError, match="lie on several devices, and a part of it is compiled by itself"):
        torch.compile(part, backend="eager")(torch.zeros(1, 1, part.in_features, device=part.weight.device))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for mix in ("b", ["c", "d"], None):
        for each in (runtime, other):
            each.set_adapter(mix)
        torch.testing.assert_close(run(compiled), run(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", ["b", ROWS], ids=["all", "rows"])
def test_a_model_that_accelerate_moves_when_it_is_called(second, rows):
    """As diffusers' enable_model_cpu_offload: after what its rows wear was laid out for the forward."""
    model, expected = tiny_model(dtype=torch.float64), []
    plain, vectors = copy.deepcopy(model), {}
    runtime = ia3rt.patch(model, backend="torch")
    for name in "bcd":
        vectors[name] = {site.key: torch.rand(site.width) * 2 for site in runtime.sites}
        runtime.add_adapter(name, vectors[name])
    for names in ["b"] * 3 if rows == "b" else ["b", "", "cd"]:
        model_of_row = plain
        for name in names:
            model_of_row = scaled(model_of_row, vectors[name])
        expected.append(run(model_of_row)[len(expected)])
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device=second)
    with runtime.route(ROWS if rows == ROWS else ["b"] * 3):
        for _ in range(2):
            for found, each in zip(run(model).cpu(), expected, strict=True):
                close(found, each.cpu())
            hook.offload()
