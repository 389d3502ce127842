"""Training adapters of a patched model, beside PEFT's training of the same adapters."""

import copy

import peft
import pytest
import torch
from tiny import FAMILIES, TARGETS, VOCABULARY, logits, patched, peft_vectors, scaled, tiny_model, token_ids
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from where import home

import ia3rt

BACKENDS = ["torch", "triton"]


def assert_same_gradient(given, expected):
    """To a share of the gradient's own size, as that can be small."""
    assert expected.norm() > 0
    assert (given - expected).norm() <= 1e-5 * expected.norm()


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCABULARY, (3, 9), generator=generator) for _ in range(count)]


def train(model: nn.Module, parameters: list[nn.Parameter], steps: int = 6, accumulate: int = 2) -> list[float]:
    """Trains on batches that are the same at each call, and returns each batch's loss."""
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    losses = []
    for step, drawn in enumerate(batches(steps * accumulate)):
        ids = drawn.to(model.device)
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        if step % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def peft_trained(family: str, model: nn.Module, names: str) -> tuple[peft.PeftModel, list[float]]:
    config = peft.IA3Config(**TARGETS[family], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    wrapped.base_model.set_adapter(list(names))
    return wrapped, train(wrapped, [p for p in wrapped.parameters() if p.requires_grad])


@pytest.mark.parametrize("names", ["a", "ab"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_follows_pefts_step_for_step(family, backend, names):
    model = tiny_model(family).to(home(backend))
    wrapped, expected = peft_trained(family, model, names)
    runtime = ia3rt.patch(model, backend=backend)
    for name in names:
        runtime.add_adapter(name)
    losses = train(model, runtime.train_adapter(list(names)))
    assert expected[0] - expected[-1] > 0.05  # they learn: two curves that stay where they are agree too
    assert losses == pytest.approx(expected, rel=2e-5)
    runtime.end_training()
    for name in names:
        ours = runtime._bank.vectors(runtime._bank.adapters[name])
        for key, vector in peft_vectors(wrapped, name).items():
            site = next(site for site in ours if site.key == key)
            assert torch.allclose(ours[site].double(), vector, atol=1e-3), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient_is_the_formulas(backend):
    """Rows of every kind of mix, one of them with an adapter that stays as it is, against autograd in float64."""
    model, ids = tiny_model().to(home(backend)), token_ids(4).to(home(backend))
    runtime = patched(model, "abc", 4, backend=backend)
    vectors = {
        name: {s.key: v.double().clone() for s, v in runtime._bank.vectors(adapter).items()}
        for name, adapter in runtime._bank.adapters.items()
    }
    parameters = runtime.train_adapter(["a", "b"])
    assert len(parameters) == 2 * len(runtime.sites)
    runtime.route(["a", ["a", "b", "c"], {"b": 0.3, "c": -0.2}, None])
    logits_ = model(ids).logits
    weights = torch.randn(logits_.shape, generator=torch.Generator().manual_seed(4)).to(ids.device)
    (logits_ * weights).sum().backward()

    truth = {name: {key: v.clone().requires_grad_() for key, v in vectors[name].items()} for name in "ab"}
    a, b, c = truth["a"], truth["b"], vectors["c"]
    rows = [
        a,
        {key: a[key] * b[key] * c[key] for key in a},
        {key: 0.3 * b[key] - 0.2 * c[key] for key in a},
        {key: torch.ones_like(v) for key, v in c.items()},
    ]
    runtime.end_training()
    plain = runtime.unpatch()
    total = sum((functional_logits(plain, row, ids[i : i + 1]) * weights[i]).sum() for i, row in enumerate(rows))
    total.backward()
    expected = [v.grad for name in "ab" for v in truth[name].values()]
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad.double(), gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max())


def functional_logits(model: nn.Module, scales: dict[tuple[str, str], Tensor], ids: Tensor) -> Tensor:
    """The float64 model with its weights scaled, as a function of the scales."""
    exact = copy.deepcopy(model).double()
    weights = {}
    for (path, side), scale in scales.items():
        layer = exact.get_submodule(path)
        weights[f"{path}.weight"] = layer.weight.detach() * (scale if side == "in" else scale.unsqueeze(1))
        if side == "out" and layer.bias is not None:
            weights[f"{path}.bias"] = layer.bias.detach() * scale
    return torch.func.functional_call(exact, weights, (ids,)).logits[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_learned_is_what_is_worn(backend):
    """Between two steps, after them, and in a checkpoint."""
    model = tiny_model().to(home(backend))
    plain = copy.deepcopy(model)
    runtime = ia3rt.patch(model, backend=backend)
    runtime.add_adapter("a")
    train(model, runtime.train_adapter("a"), steps=2)
    during = logits(model, token_ids())
    saved = {key: value for key, value in model.state_dict().items() if "ia3_" in key}
    assert len(saved) == len(runtime.sites)
    runtime.end_training()
    assert torch.equal(logits(model, token_ids()), during)
    vectors = {site.key: vector.double() for site, vector in runtime._bank.vectors(runtime._bank.adapters["a"]).items()}
    truth = logits(scaled(plain, vectors), token_ids())
    assert torch.allclose(during.double(), truth, atol=1e-4)
    assert not torch.allclose(during, logits(plain, token_ids()), atol=1e-2)
    assert set(model.state_dict()) == set(plain.state_dict())


def test_all_else_is_frozen_and_thawed():
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a")
    runtime.add_adapter("b")
    parameters = runtime.train_adapter("a")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    train(model, parameters, steps=1)
    runtime.end_training()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {k: v[0] for k, v in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    b = runtime._bank.vectors(runtime._bank.adapters["b"])
    assert all(torch.equal(vector, torch.ones_like(vector)) for vector in b.values())


def test_a_site_that_an_adapter_lacks_stays_one():
    """Also under weight decay, which would pull it to zero."""
    model = tiny_model()
    runtime = ia3rt.patch(model)
    site = runtime.sites[0]
    runtime.add_adapter("a", {site.key: torch.ones(site.width)})
    (parameter,) = runtime.train_adapter("a")
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5)
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    runtime.end_training()
    row = runtime._bank.table[runtime._bank.adapters["a"].row]
    assert (row[site.width :] == 1).all() and (row[: site.width] != 1).any()


def test_loading_casting_and_growing_meanwhile_leave_the_training_intact():
    model = tiny_model()
    runtime = ia3rt.patch(model, capacity=1)
    runtime.add_adapter("a")
    parameters = runtime.train_adapter("a")
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    ids = token_ids()

    def step() -> None:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    learned = [parameter.detach().clone() for parameter in parameters]
    runtime.add_adapter("b", {("model.layers.0.mlp.up_proj", "out"): torch.ones(96)})  # a row more, and a site more
    model.bfloat16().float()
    assert all(torch.equal(*pair) for pair in zip(learned, parameters, strict=True))
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    step()
    runtime.end_training()
    row = runtime._bank.vectors(runtime._bank.adapters["a"])
    assert all(torch.equal(*pair) for pair in zip(row.values(), parameters, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(learned, parameters, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_forwards_before_a_backward(backend):
    """As contrastive losses have them, under two routes: the second does not spoil what the first saved."""
    model, ids = tiny_model().to(home(backend)), token_ids(2).to(home(backend))
    runtime = ia3rt.patch(model, backend=backend)
    for name in "ab":
        runtime.add_adapter(name)
    parameters = runtime.train_adapter(["a", "b"])

    def loss(route: list[str]) -> Tensor:
        runtime.route(route)
        return model(ids, labels=ids).loss

    separate = []
    for route in (["a", "b"], ["b", "b"]):
        loss(route).backward()
        separate.append([p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters])
        model.zero_grad(set_to_none=True)
    first = loss(["a", "b"])
    with torch.no_grad():
        model(ids)
    (first + loss(["b", "b"])).backward()
    for parameter, one, other in zip(parameters, *separate, strict=True):
        assert_same_gradient(parameter.grad, one + other)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, ids = tiny_model().train(), token_ids()
        runtime = ia3rt.patch(model)
        runtime.add_adapter("a")
        parameters = runtime.train_adapter("a")
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in parameters])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_training_step_compiles_to_one_graph():
    model, ids = tiny_model(), token_ids()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a")
    parameters = runtime.train_adapter("a")
    model(ids, labels=ids).loss.backward()
    expected = [parameter.grad for parameter in parameters]
    model.zero_grad(set_to_none=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(ids, labels=ids).loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert_same_gradient(parameter.grad, gradient)


def test_the_trainer_trains_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_model()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a")
    runtime.train_adapter("a")
    data = [{"input_ids": row, "labels": row} for ids in batches(4) for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=0.05, num_train_epochs=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=data).train()
    runtime.end_training()
    vectors = runtime._bank.vectors(runtime._bank.adapters["a"]).values()
    assert all((vector != 1).any() for vector in vectors)
    runtime.save_adapter("a", tmp_path / "a")
    assert peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_of_half_models_are_trained_in_float32(dtype):
    """Steps that a half vector would lose, against PEFT's, whose vectors are float32 too."""
    wrapped = peft.get_peft_model(tiny_model(dtype=dtype), peft.IA3Config(**TARGETS["llama"], task_type="CAUSAL_LM"))
    theirs = [parameter for name, parameter in wrapped.named_parameters() if "ia3_l" in name]
    assert {parameter.dtype for parameter in theirs} == {torch.float32}
    learned = {}
    for bank in (torch.float32, dtype):
        runtime = ia3rt.patch(tiny_model(dtype=dtype), dtype=bank)
        runtime.add_adapter("a")
        parameters = runtime.train_adapter("a")
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        optimizer = torch.optim.SGD(parameters, lr=1e-4)
        for ids in batches(4):
            optimizer.zero_grad()
            runtime.model(ids, labels=ids).loss.backward()
            optimizer.step()
        learned[bank] = torch.cat([parameter.detach().flatten() for parameter in parameters])
        runtime.end_training()
        vectors = runtime.get_adapter("a").vectors.values()
        assert torch.equal(torch.cat(list(vectors)), learned[bank].to(bank))
    optimizer = torch.optim.SGD(theirs, lr=1e-4)
    for ids in batches(4):
        optimizer.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert torch.equal(learned[torch.float32], learned[dtype])
    assert not torch.equal(learned[dtype], learned[dtype].to(dtype).float())
    right = torch.cat([parameter.detach().flatten() for parameter in theirs])
    torch.testing.assert_close(learned[dtype] - 1, right - 1, rtol=0.1, atol=float((right - 1).abs().max()) / 20)


def test_what_a_checkpoint_puts_in_place_of_the_parameters_is_worn_and_trained():
    model, ids = tiny_model(), token_ids()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a")
    runtime.train_adapter("a")
    state = {
        name: torch.rand_like(tensor) + 0.5 if "ia3_" in name else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    read = runtime.get_adapter("a").vectors
    assert all(torch.equal(read[s.key], state[f"{s.path}.ia3_{s.side}_a"]) for s in runtime.sites)
    expected = ia3rt.patch(tiny_model())
    expected.add_adapter("a", {s.key: state[f"{s.path}.ia3_{s.side}_a"] for s in runtime.sites})
    expected.set_adapter("a")
    assert torch.equal(logits(model, ids), logits(expected.model, ids))
    model(ids, labels=ids).loss.backward()
    trained = [parameter for name, parameter in model.named_parameters() if "ia3_" in name]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    torch.optim.SGD(trained, lr=1.0).step()
    assert not torch.equal(logits(model, ids), logits(expected.model, ids))
    after = logits(model, ids)
    runtime.end_training()
    assert torch.equal(logits(model, ids), after)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradients_by_torch_func_are_those_of_backward():
    model, ids = tiny_model(), token_ids()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a")
    runtime.train_adapter("a")
    trained = {name: parameter for name, parameter in model.named_parameters() if "ia3_" in name}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, (ids,), {"labels": ids, "use_cache": False}).loss

    values = {name: torch.rand_like(parameter) + 0.5 for name, parameter in trained.items()}
    gradients = torch.func.grad(loss)(values)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(values[name])
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in trained.items():
        assert_same_gradient(gradients[name], parameter.grad)


def test_errors_leave_everything_as_it_was():
    model = tiny_model()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a.b")
    with pytest.raises(ValueError, match="unknown adapter 'x'"):
        runtime.train_adapter("x")
    with pytest.raises(ValueError, match="at least one"):
        runtime.train_adapter([])
    with pytest.raises(RuntimeError, match="nothing to end"):
        runtime.end_training()
    assert all(p.requires_grad for p in model.parameters()) and not any("ia3" in n for n in model.state_dict())

    runtime.train_adapter("a.b")
    for call, error, message in (
        (lambda: runtime.train_adapter("a.b"), RuntimeError, "end_training"),
        (lambda: runtime.delete_adapter("a.b"), ValueError, "end_training"),
        (lambda: runtime.merge_adapter(), RuntimeError, "end_training"),
    ):
        with pytest.raises(error, match=message):
            call()
    runtime.unpatch()
    assert all(p.requires_grad for p in model.parameters()) and not any("ia3" in n for n in model.state_dict())

    taken = ia3rt.patch(tiny_model())
    taken.add_adapter("a.b")
    taken.add_adapter("a_b")
    with pytest.raises(ValueError, match="another name"):
        taken.train_adapter(["a.b", "a_b"])
    assert not any("ia3" in n for n in taken.model.state_dict())


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x)


def parametrized(layer: nn.Module, name: str) -> Tensor:
    return getattr(parametrize.register_parametrization(layer, name, Positive()), name)


def pruned(layer: nn.Module, name: str) -> Tensor:
    return getattr(prune.l1_unstructured(layer, name, 0.5), name)


def taken_away(layer: nn.Module, name: str) -> Tensor:
    return layer._parameters.pop(name)


@pytest.mark.parametrize("end", ["end_training", "unpatch"])
@pytest.mark.parametrize("compute", [parametrized, pruned, taken_away], ids=lambda compute: compute.__name__)
@pytest.mark.parametrize("where", ["vector", "own module"])
def test_what_other_code_computes_in_the_place_of_a_parameter_is_refused(where, compute, end):
    model, ids = tiny_model(), token_ids()
    layer, config = model.model.layers[0].self_attn.k_proj, {}
    name, site = "ia3_out_a", "model.layers.0.self_attn.k_proj"
    if where == "own module":
        layer, name, site, config = model.lm_head, "ia3_own_a_weight", "lm_head", {"modules_to_save": ["lm_head"]}
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", None, config)
    runtime.train_adapter("a")
    with torch.no_grad():
        layer.get_parameter(name).uniform_(0.5, 1.5)
    given = compute(layer, name).detach().clone()
    for use in (lambda: model(ids), lambda: runtime.get_adapter("a")):
        with pytest.raises(RuntimeError, match=rf"adapter 'a' is trained, and its '{name}' at .*{site}.*end_training"):
            use()
    if end == "end_training":
        runtime.end_training()
        contents = runtime.get_adapter("a")
        kept = contents.modules[site]["weight"] if where == "own module" else contents.vectors[site, "out"]
        assert torch.equal(kept, given)
        model(ids)
    plain = runtime.unpatch()
    assert torch.equal(logits(plain, ids), logits(tiny_model(), ids))
    assert plain.state_dict().keys() == tiny_model().state_dict().keys()
    assert [type(each) for each in plain.modules()] == [type(each) for each in tiny_model().modules()]
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_training_goes_on_where_what_computed_a_parameter_was_taken_off():
    model, ids = tiny_model(), token_ids()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a")
    runtime.train_adapter("a")
    layer = model.model.layers[0].self_attn.k_proj
    parametrized(layer, "ia3_out_a")
    parametrize.remove_parametrizations(layer, "ia3_out_a")
    model(ids, labels=ids).loss.backward()
    assert layer.ia3_out_a.grad is not None
    worn = logits(model, ids)
    ones = {site.key: torch.ones(site.width) for site in runtime.sites}
    ones["model.layers.0.self_attn.k_proj", "out"] = nn.functional.softplus(torch.ones(64))[:32]
    ones = {key: vector.double() for key, vector in ones.items()}
    assert torch.allclose(worn.double(), logits(scaled(tiny_model(), ones), ids), atol=1e-5)
