"""Experts that are kept as one tensor a matrix, against a float64 model whose weights were scaled by hand."""

import copy
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from mixtures import FAMILIES, random_vectors, scaled_mixture, tiny_mixture
from safetensors.torch import load_file, save_file
from tiny import generated, logits, token_ids
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from where import home

import ia3rt
from ia3rt.modules import experts_paths

ONE_WAY = ("llama4_text", "dbrx")  # not by transformers' functions for experts
WAYS = ("eager", "batched_mm", "grouped_mm")
CASES = [(family, way) for family in FAMILIES for way in (("",) if family in ONE_WAY else WAYS)]
DOWN, UP = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"


def patched(model, adapters="bc", **targets):
    """A Runtime with adapters of random vectors at all sites, and their vectors."""
    runtime = ia3rt.patch(model, **targets)
    vectors = {name: random_vectors(runtime, seed) for seed, name in enumerate(adapters)}
    for name, own in vectors.items():
        runtime.add_adapter(name, own)
    return runtime, vectors


def near(ours, truth, close=3e-6):
    """Whether float32 logits are the truth's, as far as their rounding goes."""
    return float((ours.double() - truth.double()).abs().max() / truth.abs().max()) < close


@pytest.mark.parametrize(("family", "way"), CASES)
def test_vectors_and_rows_are_those_of_scaled_weights(family, way):
    model, ids = tiny_mixture(family), token_ids()
    plain = copy.deepcopy(model)
    names = ["k_proj", "v_proj", "kv_b_proj", "Wqkv", "gate_up_proj", "down_proj", "experts.mlp.w2"]
    known = {path.rpartition(".")[2] for path, _ in (*model.named_modules(), *model.named_parameters())}
    targets = [name for name in names if name.rpartition(".")[2] in known]
    runtime, vectors = patched(model, target_modules=targets)
    assert {site.side for site in runtime.sites if site.experts} == ({"in"} if family == "dbrx" else {"in", "out"})
    if way:
        model.set_experts_implementation(way)
        plain.set_experts_implementation(way)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    truths = {None: logits(scaled_mixture(plain, {}), ids)}
    for name, own in vectors.items():
        truths[name] = logits(scaled_mixture(plain, own), ids)
        assert not near(truths[name], truths[None], 0.01)
        runtime.set_adapter(name)
        assert near(logits(model, ids), truths[name])
    for _ in range(2):  # the first forward of its kind is followed
        with runtime.route(["b", None, "c"]):
            mixed = logits(model, ids)
        for row, name in enumerate(["b", None, "c"]):
            assert near(mixed[row], truths[name][row])
    runtime.set_adapter(None)
    runtime.unpatch()
    assert torch.equal(logits(model, ids), logits(plain, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_found_by_structure_and_merge(family):
    model, ids = tiny_mixture(family), token_ids()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runtime, vectors = patched(model, "b")
    found = [site for site in runtime.sites if site.experts]
    assert len(found) == (1 if family == "deepseek_v3" else 2)
    assert {(site.side, site.experts, site.width_of_one) for site in found} == {("in", 4, 24)}
    truth = logits(scaled_mixture(model, vectors["b"]), ids)
    runtime.set_adapter("b")
    assert near(logits(model, ids), truth)
    runtime.merge_adapter()
    assert near(logits(model, ids), truth)
    runtime.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_biases_of_the_first_matrices_are_scaled_and_merged():
    model, ids = tiny_mixture("gpt_oss"), token_ids()
    runtime, vectors = patched(model, "b", target_modules=["gate_up_proj"])
    truth = logits(scaled_mixture(model, vectors["b"]), ids)
    runtime.set_adapter("b")
    runtime.merge_adapter()
    assert near(logits(model, ids), truth)


@pytest.mark.parametrize("way", WAYS)
def test_mixes_are_composed(way):
    model, ids = tiny_mixture(experts_implementation=way), token_ids()
    plain = copy.deepcopy(model)
    runtime, vectors = patched(model, target_modules="all-linear")
    b, c = vectors["b"], vectors["c"]
    mixes = {
        "product": (["b", "c"], {key: b[key].double() * c[key] for key in b}),
        "linear": ({"b": 0.25, "c": -0.7}, {key: 0.25 * b[key].double() - 0.7 * c[key] for key in b}),
        "delta": (
            ia3rt.Mix(("b", "c"), (0.5, 0.3), "delta"),
            {key: 0.2 + 0.5 * b[key].double() + 0.3 * c[key] for key in b},
        ),
    }
    truths = []
    for mix, scales in mixes.values():
        runtime.set_adapter(mix)
        truths.append(logits(scaled_mixture(plain, scales), ids))
        assert near(logits(model, ids), truths[-1])
    with runtime.route([mix for mix, _ in mixes.values()]):
        mixed = logits(model, ids)
    for row, truth in enumerate(truths):
        assert near(mixed[row], truth[row])


@pytest.mark.parametrize("way", WAYS)
def test_each_token_wears_its_own(way):
    model, ids = tiny_mixture(experts_implementation=way, num_hidden_layers=1), token_ids(2, 6)
    runtime, vectors = patched(model)
    truths = [logits(scaled_mixture(model, vectors.get(name, {})), ids) for name in ("b", "c")]
    index = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with runtime.route(["b", "c"], index):
        mixed = logits(model, ids)
    assert near(mixed[0, :3], truths[0][0, :3])
    assert near(mixed[1], truths[1][1])
    assert not near(mixed[0, 3:], truths[0][0, 3:], 0.01)


@pytest.mark.parametrize("way", WAYS)
def test_generation_follows_its_rows(way):
    model, ids = tiny_mixture(experts_implementation=way), token_ids()
    runtime, _ = patched(model)
    settings = dict(max_new_tokens=6, do_sample=False)
    rows, expected = ["b", None, "c"], []
    for row, name in enumerate(rows):
        runtime.set_adapter(name)
        expected.append(generated(model, ids, torch.ones_like(ids), **settings)[row])
    with runtime.route(rows):
        mixed = generated(model, ids, torch.ones_like(ids), **settings)
    assert torch.equal(mixed, torch.stack(expected))


def test_rows_of_one_token_may_come_before_longer_ones():
    model = tiny_mixture(num_hidden_layers=1)
    plain = copy.deepcopy(model)
    runtime, vectors = patched(model)
    truth = {name: scaled_mixture(plain, vectors[name]) for name in "bc"}
    with runtime.route(["b", "c"]):
        for length in (1, 5, 1, 3):
            mixed = logits(model, token_ids(2, length))
            for row, name in enumerate("bc"):
                assert near(mixed[row], logits(truth[name], token_ids(2, length))[row])


@pytest.mark.parametrize(("way", "backend"), [*((way, "torch") for way in WAYS), ("grouped_mm", "triton")])
def test_rows_are_known_past_experts_that_all_of_them_go_to(way, backend):
    model, ids = tiny_mixture(experts_implementation=way).to(home(backend)), token_ids(3, 1)
    for layer in model.model.layers:  # as many tokens in an expert as there are rows, which look like an order of them
        layer.mlp.gate.weight.data.zero_()
    plain = copy.deepcopy(model)  # on the same device: among experts alike, another may take others
    runtime, vectors = patched(model, backend=backend)
    with runtime.route(["b", None, "c"]):
        mixed = logits(model, ids)
    for row, name in enumerate(["b", None, "c"]):
        assert near(mixed[row], logits(scaled_mixture(plain, vectors.get(name, {})), ids)[row])


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_rounds_as_scaled_weights_do(way):
    model, ids = tiny_mixture(dtype=torch.bfloat16, experts_implementation=way, num_hidden_layers=1), token_ids()
    runtime, vectors = patched(model, "b", target_modules=["down_proj"])
    truth = logits(scaled_mixture(model, vectors["b"]), ids)
    runtime.set_adapter("b")
    worn = logits(model, ids)
    runtime.merge_adapter()
    assert (worn - truth).norm() <= 1.5 * (logits(model, ids) - truth).norm()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_the_vectors(way, shared):
    model, ids = tiny_mixture(experts_implementation=way, num_hidden_layers=1), token_ids()
    runtime = ia3rt.patch(model, target_modules="all-linear")
    shapes = {(DOWN, "in"): (4, 24), (UP, "out"): (4, 48)}
    torch.manual_seed(1)
    vectors = {key: torch.rand(shape[1:] if shared else shape) + 0.5 for key, shape in shapes.items()}
    runtime.add_adapter("b", vectors)
    wide = copy.deepcopy(scaled_mixture(model, {}))
    parameters = runtime.train_adapter("b")
    assert [len(each) for each in parameters] == ([48, 24] if shared else [192, 96])
    model(ids, labels=ids).loss.backward()

    leaves = {key: vector.double().requires_grad_() for key, vector in vectors.items()}
    held = wide.get_submodule("model.layers.0.mlp.experts")
    weights = {
        DOWN: held.down_proj.detach() * leaves[DOWN, "in"].expand(4, 24).unsqueeze(1),
        UP: held.gate_up_proj.detach() * leaves[UP, "out"].expand(4, 48).unsqueeze(2),
    }
    torch.func.functional_call(wide, weights, (ids,), {"labels": ids}).loss.backward()
    for parameter, leaf in zip(parameters, (leaves[UP, "out"], leaves[DOWN, "in"]), strict=True):
        assert near(parameter.grad.view(leaf.shape), leaf.grad, 1e-5)
    with torch.no_grad():
        parameters[1].mul_(2.0)
    runtime.end_training()
    learned = runtime.get_adapter("b").vectors[DOWN, "in"]
    torch.testing.assert_close(learned, 2.0 * vectors[DOWN, "in"])


@pytest.mark.parametrize("route", [None, ["b", None, "b"]], ids=["all rows", "by row"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_vector_that_all_experts_share_is_worn_as_it_is_after_a_step(backend, route):
    model, ids = tiny_mixture(num_hidden_layers=1).to(home(backend)), token_ids().to(home(backend))
    wide = scaled_mixture(model, {})
    runtime = ia3rt.patch(model, backend=backend, target_modules=["down_proj"])
    runtime.add_adapter("b", {(DOWN, "in"): torch.rand(24) + 0.5})
    (parameter,) = runtime.train_adapter("b")
    if route is not None:
        runtime.route(route)
    for _ in range(2):  # what is worn was laid before the first
        leaf = parameter.detach().double().requires_grad_()
        weights = {DOWN: wide.get_parameter(DOWN).detach() * leaf}
        expected = torch.func.functional_call(wide, weights, (ids,)).logits[0]
        worn = model(ids).logits[0]
        assert near(worn.detach(), expected.detach())
        (truth,) = torch.autograd.grad(expected.square().sum(), leaf)
        (gradient,) = torch.autograd.grad(worn.square().sum(), parameter)
        assert near(gradient, truth, 1e-5)
        with torch.no_grad():
            parameter.mul_(3.0)


def test_files_hold_a_vector_for_each_expert_or_one_for_all(tmp_path):
    model = tiny_mixture(num_hidden_layers=1)
    plain = copy.deepcopy(model)
    runtime = ia3rt.patch(model, target_modules="all-linear")
    each = {(DOWN, "in"): torch.rand(4, 24), (UP, "out"): torch.rand(4, 48)}
    shared = {key: vector[0] for key, vector in each.items()}
    for name, vectors in (("each", each), ("shared", shared)):
        runtime.add_adapter(name, vectors)
        runtime.save_adapter(name, tmp_path / name)
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        shapes = {key.removeprefix("base_model.model."): tuple(vector.shape) for key, vector in saved.items()}
        above = (4,) if name == "each" else ()
        assert shapes == {f"{DOWN}.ia3_l": (*above, 1, 24), f"{UP}.ia3_l": (*above, 48, 1)}
        runtime.load_adapter(tmp_path / name, f"{name} again")
        again = runtime.get_adapter(f"{name} again").vectors
        assert all(torch.equal(again[key], vector) for key, vector in vectors.items())
        runtime.set_adapter(f"{name} again")
        wide = {key: vector.expand(4, -1).flatten() for key, vector in vectors.items()}
        assert near(logits(model, token_ids()), logits(scaled_mixture(plain, wide), token_ids()))


def test_names_of_single_experts_are_todays_ones(tmp_path):
    model, ids = tiny_mixture(num_hidden_layers=1), token_ids()
    names = [(expert, matrix) for expert in range(4) for matrix in ("w1", "w2", "w3") if (expert, matrix) != (2, "w3")]
    torch.manual_seed(1)
    vectors = {key: torch.rand(24) + 0.5 for key in names}
    old = "base_model.model.model.layers.0.block_sparse_moe.experts"
    tensors = {
        f"{old}.{expert}.{matrix}.ia3_l": vector.view((1, -1) if matrix == "w2" else (-1, 1))
        for (expert, matrix), vector in vectors.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = dict(peft_type="IA3", target_modules=["w1", "w2", "w3"], feedforward_modules=["w2"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    truth = copy.deepcopy(model).double()
    truth.set_experts_implementation("eager")
    experts = truth.get_submodule("model.layers.0.mlp.experts")
    for (expert, matrix), vector in vectors.items():
        if matrix == "w2":
            experts.down_proj.data[expert] *= vector
        else:  # the gate's rows are the upper half
            rows = slice(0, 24) if matrix == "w1" else slice(24, 48)
            experts.gate_up_proj.data[expert, rows] *= vector.unsqueeze(1)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path, "old")
    runtime.set_adapter("old")
    assert near(logits(model, ids), logits(truth, ids))


def test_what_does_not_fit_is_refused(tmp_path):
    model = tiny_mixture(num_hidden_layers=1)
    runtime = ia3rt.patch(model)
    with pytest.raises(ValueError, match=r"shape \(3, 24\).*expected \[4, 24\], or \[24\] for all experts alike"):
        runtime.add_adapter("b", {(DOWN, "in"): torch.rand(3, 24)})
    with pytest.raises(ValueError, match="wears vectors at its input only, not at its output"):
        runtime.add_adapter("b", {(DOWN, "out"): torch.rand(4, 32)})
    with pytest.raises(ValueError, match="wears vectors at its output only, not at its input"):
        runtime.add_adapter("b", {(UP, "in"): torch.rand(4, 32)})
    assert runtime.adapters == []
    runtime.unpatch()
    with pytest.raises(ValueError, match=r"target_modules names \['w2'\].*experts.down_proj"):
        ia3rt.patch(model, target_modules=["k_proj", "v_proj", "w2"])
    assert [site.path for site in ia3rt.patch(model, exclude_modules=["experts.down_proj"]).sites] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
    ]


def test_a_way_of_computing_without_a_place_for_a_vector_is_refused():
    model = tiny_mixture(num_hidden_layers=1)
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(ValueError, match="computes by 'sonicmoe', which has no place for a vector"):
        ia3rt.patch(model, target_modules=["experts.down_proj"])
    model.set_experts_implementation("grouped_mm")
    assert any(site.experts for site in ia3rt.patch(model).sites)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_experts_that_are_left_out_are_named(targets):
    model = tiny_mixture(num_hidden_layers=1)
    model.config._experts_implementation = "sonicmoe"
    named = r"no sites in the experts \['model.layers.0.mlp.experts'\]: a MixtralExperts computes by 'sonicmoe', which"
    with pytest.warns(UserWarning, match=named) as seen:
        runtime = ia3rt.patch(model, target_modules=targets)
    assert [each.filename for each in seen] == [__file__]
    assert runtime.sites and not any(site.experts for site in runtime.sites)
    runtime.unpatch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ia3rt.patch(model, target_modules=targets, exclude_modules=["experts.down_proj", "experts.gate_up_proj"])


def test_slices_of_experts_are_refused():
    model = tiny_mixture(num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=rf"'{UP}', of all experts, wears vectors of its whole width, .* \('up',\): give"
    ):
        ia3rt.patch(model, target_modules={"experts.gate_up_proj": ("up",), "k_proj": None})
    sites = ia3rt.patch(model, target_modules={"experts.gate_up_proj": None, "k_proj": None}).sites
    assert UP in {site.path for site in sites}


def test_another_function_in_the_place_of_a_known_one_is_refused(monkeypatch):
    model = tiny_mixture(num_hidden_layers=1)
    runtime, _ = patched(model, "b")
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda self, x, *rest: x)
    runtime.set_adapter("b")
    with pytest.raises(ValueError, match="computes by 'grouped_mm', which has no place for a vector"):
        logits(model, token_ids())


def test_experts_that_compute_one_after_another_in_another_way_are_refused(monkeypatch):
    model = tiny_mixture(num_hidden_layers=1, experts_implementation="eager")
    cls = type(model.model.layers[0].mlp.experts)

    def clipped(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate.clamp(max=7.0)) * up

    class Other(cls):
        def _apply_gate(self, gate_up):
            return clipped(gate_up)

    model.model.layers[0].mlp.experts.__class__ = Other
    with pytest.raises(ValueError, match="computes one expert after another in a way that is not known"):
        ia3rt.patch(model, target_modules=["experts.down_proj"])
    model.set_experts_implementation("grouped_mm")
    runtime, _ = patched(model, "b", target_modules=["experts.down_proj"])
    assert [site.path for site in runtime.sites] == [DOWN]
    runtime.set_adapter("b")
    logits(model, token_ids())
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="Other computes one expert after another in a way that is not known"):
        logits(model, token_ids())


@pytest.mark.parametrize("held", ["attribute", "config"])
def test_experts_are_known_by_how_they_are_set_not_by_their_class(held):
    class Clamped(nn.Module):
        def __init__(self, limit):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.rand(4, 32, 48))
            self.down_proj = nn.Parameter(torch.rand(4, 24, 32))
            self.limit = limit if held == "attribute" else None
            self.config = SimpleNamespace(limit=limit if held == "config" else None)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            gate, up = torch.bmm(x.view(4, -1, x.shape[-1]), self.gate_up_proj).chunk(2, -1)
            limit = self.limit or self.config.limit
            up = up if limit is None else up.clamp(-limit, limit)
            return torch.bmm(up * self.act_fn(gate), self.down_proj).view(-1, x.shape[-1])

    ia3rt.patch(nn.ModuleDict({"experts": Clamped(None)}), target_modules=["down_proj"])
    with pytest.raises(ValueError, match="in a way that is not known"):
        ia3rt.patch(nn.ModuleDict({"experts": Clamped(0.1)}), target_modules=["down_proj"])


def test_experts_that_stand_in_two_places_are_refused():
    model = tiny_mixture()
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    runtime = ia3rt.patch(model, target_modules=["k_proj", "down_proj"])
    with pytest.raises(ValueError, match=r"which is one module at .*Give each a module of its own"):
        runtime.add_adapter("b", {(DOWN, "in"): torch.rand(4, 24)})


def test_experts_of_a_class_that_is_not_known_are_refused():
    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.rand(4, 48, 32))
            self.down_proj = nn.Parameter(torch.rand(4, 32, 24))

        def forward(self, x, index):
            return x

    runtime = ia3rt.patch(nn.ModuleDict({"experts": Rotated()}))
    with pytest.raises(ValueError, match=r"'experts.down_proj' is a tensor of a Rotated, .* computes is not known"):
        runtime.add_adapter("b", {("experts.down_proj", "in"): torch.rand(4, 24)})


@pytest.mark.parametrize("way", WAYS)
def test_many_pairs_are_scaled_piece_by_piece(way, monkeypatch):
    monkeypatch.setattr(experts_paths, "_PIECE", 100)  # four pairs of 24 numbers
    for dtype, close in ((torch.float32, 3e-6), (torch.bfloat16, 3e-2)):
        model = tiny_mixture(dtype=dtype, experts_implementation=way, num_hidden_layers=1)
        runtime, vectors = patched(model, "bc", target_modules=["experts.down_proj", "experts.gate_up_proj"])
        truths = [logits(scaled_mixture(model, vectors.get(name, {})), token_ids()) for name in ("b", "", "c")]
        with runtime.route(["b", None, "c"]):
            mixed = logits(model, token_ids())
        assert all(near(mixed[row], truth[row], close) for row, truth in enumerate(truths))


def test_a_copy_wears_vectors_of_its_own():
    model, ids = tiny_mixture(num_hidden_layers=1), token_ids()
    runtime, vectors = patched(model)
    runtime.set_adapter("b")
    copied = copy.deepcopy(model)
    other = ia3rt.patch(copied)
    other.set_adapter("c")
    for each, name in ((model, "b"), (copied, "c")):
        runtime_of = runtime if each is model else other
        assert runtime_of.active_adapters == [name]
    plain = tiny_mixture(num_hidden_layers=1)
    assert near(logits(model, ids), logits(scaled_mixture(plain, vectors["b"]), ids))
    assert near(logits(copied, ids), logits(scaled_mixture(plain, vectors["c"]), ids))
