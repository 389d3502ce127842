"""modules_to_save: a trained head or any module of an adapter's own, worn, routed, trained, saved and given back.

After peft#876, peft#577 and PEFT's notebook of IA³ for sequence classification. The truth is PEFT.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from heads import KINDS, adapted, model_of, output, randomize, saved, targets_of, token_ids
from torch import nn
from transformers import LlamaForCausalLM, RobertaForSequenceClassification
from where import DEVICE

import ia3rt

IDS = token_ids()
SEEDS = {"a": 1, "b": 2}


def names_of_classes(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def loaded(kind: str, tmp_path: Path) -> tuple[Any, nn.Module, dict[str | None, torch.Tensor]]:
    """A runtime with adapters a and b, its model, and what PEFT and the model give for them and for none."""
    right: dict[str | None, torch.Tensor] = dict(saved(kind, tmp_path, SEEDS, IDS))
    model = model_of(kind)
    right[None] = output(model, IDS)
    runtime = ia3rt.patch(model, **targets_of(kind))
    for name in SEEDS:
        runtime.load_adapter(tmp_path / name)
    return runtime, model, right


def test_all_rows_wear_it_as_in_peft(loaded: Any) -> None:
    runtime, model, right = loaded
    assert not torch.allclose(right["a"], right["b"], atol=1e-2)
    for name in ("a", "b", None, "a"):
        runtime.set_adapter(name)
        assert torch.equal(output(model, IDS), right[name])


def test_rows_wear_different_ones(loaded: Any) -> None:
    runtime, model, right = loaded
    worn, of = ["b", None, "a", "b", None], [0, 1, 2, 2, 0]
    with runtime.route(worn):
        rows = output(model, IDS[of])
    for row, (name, i) in enumerate(zip(worn, of, strict=True)):
        torch.testing.assert_close(rows[row], right[name][i], rtol=1e-5, atol=1e-5)


def test_two_that_have_their_own_cannot_be_combined(loaded: Any) -> None:
    runtime, model, right = loaded
    runtime.set_adapter("a")
    for mix in (["a", "b"], {"a": 0.5, "b": 0.5}, ia3rt.Mix(("a", "b"), (1.0, 1.0), "delta")):
        with pytest.raises(ValueError, match="adapters 'a' and 'b' each have their own module '.*': a row can go"):
            runtime.set_adapter(mix)
        with pytest.raises(ValueError, match="each have their own module"):
            runtime.route([mix, "a", None])
    with pytest.raises(ValueError, match="each have their own module"):
        runtime.add_weighted_adapter(["a", "b"], None, "both")
    assert runtime.adapters == ["a", "b"]
    assert torch.equal(output(model, IDS), right["a"])


def test_one_that_has_its_own_is_combined_with_one_that_has_not(loaded: Any) -> None:
    """What several active adapters mean in PEFT is compared below, by what is taken over."""
    runtime, model, _ = loaded
    vectors = {site.key: torch.full((site.width,), 0.5) for site in runtime.sites}
    runtime.add_adapter("half", vectors)
    runtime.add_weighted_adapter(["a", "half"], None, "product")
    runtime.set_adapter(["a", "half"])
    both = output(model, IDS)
    runtime.set_adapter("product")
    assert torch.equal(output(model, IDS), both)
    runtime.delete_adapter("a")  # what was made of it lives on
    with runtime.route(["product", None, "b"]):
        torch.testing.assert_close(output(model, IDS)[0], both[0], rtol=1e-5, atol=1e-5)


def test_peft_loads_what_was_saved(loaded: Any, kind: str, tmp_path: Path) -> None:
    runtime, _, right = loaded
    runtime.save_adapter("a", tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    theirs = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == list(dict.fromkeys(theirs["modules_to_save"]))
    wrapped = peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "again").eval()
    assert torch.equal(output(wrapped, IDS), right["a"])


def test_deleting_and_unpatching_leave_the_model_as_it_was(loaded: Any, kind: str) -> None:
    runtime, model, right = loaded
    fresh = model_of(kind)
    runtime.set_adapter("a")
    with pytest.warns(UserWarning, match="'a' was active and is deleted"):
        runtime.delete_adapter("a")
    assert torch.equal(output(model, IDS), right[None])
    assert model.state_dict().keys() == fresh.state_dict().keys()
    runtime.set_adapter("b")
    assert torch.equal(output(model, IDS), right["b"])
    assert runtime.unpatch() is model
    assert names_of_classes(model) == names_of_classes(fresh)
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in fresh.modules()]
    assert torch.equal(output(model, IDS), right[None])


def test_a_peft_models_are_taken_over(kind: str) -> None:
    wrapped = adapted(model_of(kind), kind, 1, "a")
    right = output(wrapped, IDS)
    base = output(model_of(kind), IDS)
    originals = {path for path, module in wrapped.named_modules() if hasattr(module, "original_module")}
    runtime = ia3rt.patch(wrapped, **targets_of(kind))
    assert originals
    assert torch.equal(output(runtime.model, IDS), right)
    runtime.set_adapter(None)
    assert torch.equal(output(runtime.model, IDS), base)
    before = names_of_classes(adapted(model_of(kind), kind, 1, "a"))
    runtime.set_adapter("a")
    assert runtime.unpatch() is wrapped
    assert names_of_classes(wrapped) == before
    assert torch.equal(output(wrapped, IDS), right)


def test_what_is_learned_goes_back_to_the_peft_model(kind: str) -> None:
    wrapped = adapted(model_of(kind), kind, 1, "a")
    runtime = ia3rt.patch(wrapped, **targets_of(kind))
    for parameter in runtime.train_adapter("a"):
        parameter.data.mul_(1.5)
    learned = output(runtime.model, IDS)
    assert runtime.unpatch() is wrapped
    torch.testing.assert_close(output(wrapped, IDS), learned, rtol=1e-4, atol=1e-5)


def test_an_added_one_that_peft_has_no_module_for_is_named_before_anything_changes(kind: str) -> None:
    runtime = ia3rt.patch(adapted(model_of(kind), kind, 1, "a"), **targets_of(kind))
    contents = runtime.get_adapter("a")
    runtime.add_adapter("b", contents.vectors, contents.config, contents.modules)
    runtime.set_adapter("b")
    worn = output(runtime.model, IDS)
    with pytest.raises(ValueError, match="adapter 'b' has its own .*save_adapter"):
        runtime.unpatch()
    assert torch.equal(output(runtime.model, IDS), worn)
    runtime.set_adapter("a")
    runtime.delete_adapter("b")
    assert torch.equal(output(runtime.unpatch(), IDS), worn)


def test_several_active_ones_are_taken_over(kind: str) -> None:
    """In PEFT one with its own modules and one without can be active at once."""
    wrapped = adapted(model_of(kind), kind, 1, "a")
    task, names = wrapped.peft_config["a"].task_type, targets_of(kind)
    plain = peft.IA3Config(**(names or dict(target_modules=["k_proj"], feedforward_modules=[])))
    wrapped.peft_config["plain"] = plain
    wrapped.base_model.inject_adapter(wrapped.base_model.model, "plain")
    wrapped.base_model.set_adapter(["a", "plain"])
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if name.endswith(".plain"):
                parameter.uniform_(0.5, 1.5)
    right = output(wrapped.eval(), IDS)
    assert task is not None
    runtime = ia3rt.patch(wrapped, **names)
    assert runtime.active_adapters == ["a", "plain"]
    assert torch.equal(output(runtime.model, IDS), right)


def test_a_merge_writes_it_over_the_models_and_back(loaded: Any, kind: str) -> None:
    runtime, model, right = loaded
    before = copy.deepcopy(model.state_dict())
    runtime.set_adapter("a")
    if kind == "a tied lm_head":
        with pytest.raises(ValueError, match="cannot merge the own 'lm_head': .* shares its weight with 'model.embed"):
            runtime.merge_adapter()
        assert torch.equal(output(model, IDS), right["a"])
        return
    runtime.merge_adapter()
    torch.testing.assert_close(output(model, IDS), right["a"], rtol=1e-4, atol=1e-4)
    exported = model_of(kind)
    exported.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(exported, IDS), right["a"], rtol=1e-4, atol=1e-4)
    runtime.unmerge_adapter()
    assert torch.equal(output(model, IDS), right["a"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_deep_copy_has_its_own(loaded: Any) -> None:
    runtime, model, right = loaded
    runtime.set_adapter("a")
    copied = copy.deepcopy(model)
    runtime.set_adapter("b")
    assert torch.equal(output(copied, IDS), right["a"])
    assert torch.equal(output(model, IDS), right["b"])


def test_it_follows_the_model(loaded: Any) -> None:
    runtime, model, right = loaded
    runtime.set_adapter("a")
    model.double()
    torch.testing.assert_close(output(model, IDS).float(), right["a"], rtol=1e-4, atol=1e-4)
    model.float()
    assert torch.equal(output(model, IDS), right["a"])


LABELS = torch.tensor([0, 2, 1])


def test_training_is_pefts_step_for_step() -> None:
    kind = "a linear head"
    theirs = peft.get_peft_model(model_of(kind), peft.IA3Config(task_type="SEQ_CLS"))
    ours = model_of(kind)
    runtime = ia3rt.patch(ours)
    runtime.add_adapter("a", config={"task_type": "SEQ_CLS"})
    parameters = runtime.train_adapter("a")
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert sorted(map(torch.numel, parameters)) == sorted(map(torch.numel, trained))
    assert {id(p) for p in ours.parameters() if p.requires_grad} == {id(p) for p in parameters}
    optimizers = [torch.optim.SGD(each, lr=0.1) for each in (trained, parameters)]
    for _ in range(4):
        losses = [model(IDS, labels=LABELS).loss for model in (theirs, ours)]
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    runtime.end_training()
    assert not any("ia3" in name for name, _ in ours.named_parameters())
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert torch.equal(output(ours, IDS), output(theirs, IDS))


def test_a_row_trains_its_own() -> None:
    """Each row's gradient is the one that it has in a batch of its own adapter's rows."""
    kind = "a linear head"
    model = model_of(kind)
    runtime = ia3rt.patch(model)
    for name in ("a", "b"):
        runtime.add_adapter(name, config={"task_type": "SEQ_CLS"})

    def gradients(worn: Any, rows: slice) -> list[torch.Tensor]:
        runtime.set_adapter(None)
        with runtime.route(worn):
            parameters = runtime.train_adapter("b")
            torch.nn.functional.cross_entropy(model(IDS[rows]).logits, LABELS[rows], reduction="sum").backward()
            found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
            runtime.end_training()
        return found

    alone = gradients(["b"], slice(1, 2))
    for mine, theirs in zip(gradients(["a", "b", None], slice(0, 3)), alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_several_are_trained_each_on_its_rows() -> None:
    """No row can wear them all, which only rows that wear none of them would be asked to."""
    model = model_of("a linear head")
    runtime = ia3rt.patch(model)
    alone = {}
    for name, row in (("a", slice(0, 1)), ("b", slice(1, 2))):
        runtime.add_adapter(name, config={"task_type": "SEQ_CLS"})
        parameters = runtime.train_adapter(name)
        torch.nn.functional.cross_entropy(model(IDS[row]).logits, LABELS[row]).backward()
        alone[name] = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        runtime.end_training()
    runtime.set_adapter(None)
    message = (
        r"no row wears any of \['a', 'b'\], and all rows would wear their product in training, which cannot be: "
        r"adapters 'a' and 'b' each have their own module 'score': .* Let rows wear one of them first"
    )
    with pytest.raises(ValueError, match=message):
        runtime.train_adapter(["a", "b"])
    assert (runtime.active_adapters, runtime._routing.trained) == ([], None)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with runtime.route(["a", "b"]):
        parameters = runtime.train_adapter(["a", "b"])
        torch.nn.functional.cross_entropy(model(IDS[:2]).logits, LABELS[:2], reduction="sum").backward()
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        half = len(alone["a"]) - 1  # vectors of both come first, then both heads
        expected = [*alone["a"][:half], *alone["b"][:half], alone["a"][half], alone["b"][half]]
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        runtime.end_training()
    runtime.set_adapter("a")  # as the error says
    assert len(runtime.train_adapter(["a", "b"])) == len(parameters)
    assert runtime.active_adapters == ["a"]


def test_what_a_checkpoint_assigns_is_worn_and_kept() -> None:
    model = model_of("a linear head")
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", config={"task_type": "SEQ_CLS"})
    runtime.train_adapter("a")
    state = {name: tensor + 1 if "ia3_own" in name else tensor for name, tensor in model.state_dict().items()}
    assert sum("ia3_own" in name for name in state) == 1
    model.load_state_dict(state, assign=True)
    worn = output(model, IDS)
    runtime.end_training()
    assert torch.equal(output(model, IDS), worn)
    fresh = model_of("a linear head")
    with torch.no_grad():
        fresh.score.weight.add_(1)
    torch.testing.assert_close(worn, output(fresh, IDS))


def test_beams_go_through_their_rows_own(tmp_path: Path) -> None:
    kind = "embeddings"
    saved(kind, tmp_path, SEEDS, IDS)
    model = model_of(kind)
    runtime = ia3rt.patch(model)
    settings = dict(max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    alone = {}
    for name in SEEDS:
        runtime.load_adapter(tmp_path / name)
        runtime.set_adapter(name)
        alone[name] = model.generate(IDS, **settings)
    with runtime.route(["b", "a", "b"]):
        rows = model.generate(IDS, **settings)
    assert [row.tolist() for row in rows] == [alone[name][i].tolist() for i, name in enumerate(["b", "a", "b"])]


def test_nothing_is_compiled_again_for_another_adapter(tmp_path: Path) -> None:
    kind = "a linear head"
    model = model_of(kind)
    runtime = ia3rt.patch(model)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    counted = []
    for seed in range(10):
        torch.manual_seed(seed)
        runtime.add_adapter(f"{seed}", modules={"score": {"weight": torch.randn(3, 32)}})
        runtime.set_adapter(f"{seed}")
        assert torch.equal(output(compiled, IDS), output(model, IDS))
        counted.append(len(graphs))
    assert counted[1:] == counted[:1] * 9
    for worn in (["0", "1", None], ["2", "1", "1"], [None, None, "3"]):
        with runtime.route(worn):
            assert torch.equal(output(compiled, IDS), output(model, IDS))
    assert len(graphs) <= counted[0] + 1  # one for vectors by row


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("path", ["model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_what_other_adapters_wear_at_an_own_layer_stays(backend: Any, path: str) -> None:
    """Where a layer is one of a pair of one launch, or of an MLP whose vector is fused: those go past the module."""
    model = model_of("an lm_head").to(DEVICE)
    runtime = ia3rt.patch(model, backend=backend)
    torch.manual_seed(3)
    shape = model.get_submodule(path).weight.shape
    runtime.add_adapter("vectors", {site.key: torch.rand(site.width) + 0.5 for site in runtime.sites})
    elsewhere = {site.key: torch.rand(site.width) + 0.5 for site in runtime.sites if site.path != path}
    weight = torch.randn(shape)
    alone: dict[str | None, torch.Tensor] = {}
    for name in ("vectors", None):
        runtime.set_adapter(name)
        alone[name] = output(model, IDS.to(DEVICE))
    runtime.add_adapter("own", elsewhere, modules={path: {"weight": weight}})
    runtime.set_adapter("own")
    alone["own"] = output(model, IDS.to(DEVICE))
    changed = model_of("an lm_head")
    changed.load_state_dict({**changed.state_dict(), f"{path}.weight": weight})
    right = ia3rt.patch(changed.to(DEVICE), backend=backend)
    right.add_adapter("own", elsewhere)
    right.set_adapter("own")
    torch.testing.assert_close(alone["own"], output(changed, IDS.to(DEVICE)), rtol=1e-4, atol=1e-4)
    for name in ("vectors", None):
        runtime.set_adapter(name)
        torch.testing.assert_close(output(model, IDS.to(DEVICE)), alone[name], rtol=1e-4, atol=1e-4)
    with runtime.route(["own", "vectors", None]):
        rows = output(model, IDS.to(DEVICE))
    for row, name in enumerate(["own", "vectors", None]):
        torch.testing.assert_close(rows[row], alone[name][row], rtol=1e-4, atol=1e-4)


def test_a_mixture_of_vectors_and_own_of_one_module_goes_by_row() -> None:
    """One adapter has a vector at `score`, another its own `score`: each row has what its adapter says."""
    model = model_of("a linear head")
    runtime = ia3rt.patch(model, target_modules=["score", "k_proj"])
    torch.manual_seed(3)
    vector, weight = torch.rand(3), torch.randn(3, 32)
    runtime.add_adapter("vector", {"score": vector})
    runtime.add_adapter(
        "own", {"model.layers.0.self_attn.k_proj": torch.rand(32)}, modules={"score": {"weight": weight}}
    )
    alone = {}
    for name in ("vector", "own", None):
        runtime.set_adapter(name)
        alone[name] = output(model, IDS)
    torch.testing.assert_close(alone["vector"], alone[None] * vector)
    with runtime.route(["own", "vector", None]):
        rows = output(model, IDS)
    for row, name in enumerate(["own", "vector", None]):
        torch.testing.assert_close(rows[row], alone[name][row], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'vector' acts at score .* within 'score', where adapter 'own' has its own"):
        runtime.set_adapter(["own", "vector"])


# What is refused, with a sentence, and leaves all as it was.


def _unchanged(runtime: Any, model: nn.Module, before: torch.Tensor, adapters: list[str]) -> None:
    assert runtime.adapters == adapters
    assert torch.equal(output(model, IDS), before)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"score": {"weight": torch.ones(2, 32)}},
            r"'weight' of shape \(2, 32\), the model's is \(3, 32\): .*num_labels",
        ),
        ({"score": {"weight": torch.ones(3, 16)}}, r"'weight' of shape \(3, 16\), the model's is \(3, 32\)$"),
        (
            {"score": {"weight": torch.ones(3, 32), "bias": torch.ones(3)}},
            r"holds \['bias'\], which the model's has not",
        ),
        ({"model.rotary_emb": {}, "model.layers.0.mlp.act_fn": {}}, "no tensor in that, so leave it out"),
        ({"score": {}}, r"own module 'score' lacks \['weight'\]"),
        ({"score": {"weight": torch.full((3, 32), float("nan"))}}, "has a NaN or inf in 'weight'"),
        ({"score": {"weight": torch.ones(3, 32, dtype=torch.int8)}}, "'weight' of dtype torch.int8"),
        ({"classifier": {"weight": torch.ones(3, 32)}}, "own module 'classifier' .*Classification lacks"),
        (
            {"model.norm": {"weight": torch.ones(32)}, "model": {"norm.weight": torch.ones(32)}},
            "own module 'model' lacks",
        ),
    ],
)
def test_an_own_module_that_does_not_fit_is_refused(modules: Any, message: str) -> None:
    model = model_of("a linear head")
    runtime = ia3rt.patch(model)
    before = output(model, IDS)
    with pytest.raises(ValueError, match=message):
        runtime.add_adapter("a", modules=modules)
    _unchanged(runtime, model, before, [])


def test_an_offloaded_module_is_refused() -> None:
    """Its weights are on the meta device between forwards: what was put there would be lost."""
    model = model_of("a linear head")
    runtime = ia3rt.patch(model)
    model.score.to("meta")
    with pytest.raises(ValueError, match="whose 'weight' is not in memory: it is offloaded"):
        runtime.add_adapter("a", modules={"score": {"weight": torch.ones(3, 32)}})
    assert runtime.adapters == []


def test_a_head_is_not_loaded_into_a_model_without_it(tmp_path: Path) -> None:
    saved("a linear head", tmp_path, SEEDS, IDS)
    model = model_of("an lm_head")
    runtime = ia3rt.patch(model)
    before = output(model, IDS)
    with pytest.raises(ValueError, match=r"adapter 'a' has its own module 'score' .*, which LlamaForCausalLM lacks"):
        runtime.load_adapter(tmp_path / "a")
    _unchanged(runtime, model, before, [])


def test_a_file_without_the_head_that_its_config_names_is_refused(tmp_path: Path) -> None:
    """PEFT raises a KeyError there."""
    from safetensors.torch import load_file, save_file

    saved("a linear head", tmp_path, SEEDS, IDS)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "score" not in key}, file)
    runtime = ia3rt.patch(model_of("a linear head"))
    with pytest.raises(ValueError, match="which means the model's 'score', but its file holds no weights for it"):
        runtime.load_adapter(tmp_path / "a")


def test_tokens_of_a_row_cannot_go_through_different_ones(tmp_path: Path) -> None:
    saved("an lm_head", tmp_path, SEEDS, IDS)
    model = model_of("an lm_head")
    runtime = ia3rt.patch(model)
    for name in SEEDS:
        runtime.load_adapter(tmp_path / name)
    runtime.set_adapter("a")
    before = output(model, IDS)
    index = torch.zeros(IDS.shape, dtype=torch.long)
    index[:, 3:] = 1
    with pytest.raises(ValueError, match="own module 'lm_head': .* by row and not by token"):
        runtime.route(["a", "b"], index)
    assert torch.equal(output(model, IDS), before)
    with runtime.route(["a", "b"], torch.zeros_like(index)):
        assert torch.equal(output(model, IDS), before)


class Pair(nn.Module):
    """Takes two tensors, or gives none with the rows in front."""

    def __init__(self, summed: bool) -> None:
        super().__init__()
        self.linear, self.summed = nn.Linear(8, 8), summed

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        z = self.linear(x)
        return z.sum(0) if self.summed else z if y is None else z + y


class Small(nn.Module):
    def __init__(self, summed: bool, two: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k_proj, self.head, self.two = nn.Linear(8, 8), Pair(summed), two

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.k_proj(x)
        result: torch.Tensor = self.head(h, h) if self.two else self.head(h)
        return result


@pytest.mark.parametrize(
    ("summed", "two", "message"),
    [
        (False, True, r"different modules 'head', but it takes \(Tensor, Tensor\)"),
        (True, False, r"different modules 'head', but it gives a tensor of shape \(8,\) for"),
    ],
)
def test_a_module_whose_rows_are_not_known_is_worn_by_all_or_refused(summed: bool, two: bool, message: str) -> None:
    model, x = Small(summed, two), torch.randn(3, 8)
    runtime = ia3rt.patch(model, target_modules=["k_proj"])
    weights = {"linear.weight": torch.randn(8, 8), "linear.bias": torch.randn(8)}
    runtime.add_adapter("a", modules={"head": weights})
    runtime.set_adapter("a")
    changed = Small(summed, two)
    changed.head.load_state_dict(weights)
    assert torch.equal(model(x), changed(x))
    with runtime.route(["a", None, "a"]), pytest.raises(ValueError, match=message):
        model(x)


def test_dropout_of_an_own_head_follows_the_models_mode() -> None:
    kind = "a head of two layers"
    model: RobertaForSequenceClassification = model_of(kind)  # type: ignore[assignment]
    runtime = ia3rt.patch(model, **targets_of(kind))
    runtime.add_adapter("a", config={"task_type": "SEQ_CLS"})
    runtime.set_adapter("a")
    model.train()
    model.roberta.eval()
    assert not torch.equal(output(model, IDS), output(model, IDS))
    model.eval()
    assert torch.equal(output(model, IDS), output(model, IDS))


def test_a_hook_of_the_models_module_sees_what_an_own_one_gives(tmp_path: Path) -> None:
    right = saved("an lm_head", tmp_path, SEEDS, IDS)
    model: LlamaForCausalLM = model_of("an lm_head")  # type: ignore[assignment]
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, made: seen.append(made))
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    runtime.set_adapter("a")
    output(model, IDS)
    assert len(seen) == 1
    assert torch.equal(seen[0], right["a"])


def test_the_names_of_a_config_may_mean_nothing_in_the_model(tmp_path: Path) -> None:
    """PEFT names `classifier` and `score` for any model; other names have to be there."""
    runtime = ia3rt.patch(model_of("a linear head"))
    runtime.add_adapter("a", config={"task_type": "SEQ_CLS"})
    with pytest.raises(ValueError, match="the model has no module 'scores'"):
        runtime.add_adapter("b", config={"modules_to_save": ["scores"]})
    with pytest.raises(ValueError, match="modules_to_save is 'score': expected a list"):
        runtime.add_adapter("b", config={"modules_to_save": "score"})


def test_a_name_that_means_nothing_is_taken_as_peft_takes_it(tmp_path: Path) -> None:
    """By file, from a PeftModel, and from a runtime to another: in each the tensors say what there is."""
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["scores"])
    wrapped = peft.get_peft_model(model_of("an lm_head"), config, adapter_name="a").eval()
    randomize(wrapped, 1)
    wrapped.save_pretrained(tmp_path)
    right = output(wrapped, IDS)
    loading = ia3rt.patch(model_of("an lm_head"))
    loading.load_adapter(tmp_path / "a")
    adding = ia3rt.patch(model_of("an lm_head"))
    contents = loading.get_adapter("a")
    adding.add_adapter("a", contents.vectors, contents.config, contents.modules)
    adopting = ia3rt.patch(wrapped)
    for runtime in (loading, adding, adopting):
        runtime.set_adapter("a")
        assert torch.equal(output(runtime.model, IDS), right)
        assert runtime.get_adapter("a").config["modules_to_save"] == ["scores"]
    assert torch.equal(output(adopting.unpatch(), IDS), right)


@pytest.mark.parametrize("kind", ["a linear head", "a head of two layers", "an lm_head"])
def test_a_forward_that_is_not_a_call_says_to_call_the_model(loaded: Any) -> None:
    """No hook runs there, so the rows are not the route's; once the model was called, it is known where they are."""
    runtime, model, right = loaded
    with runtime.route(["b", None, "a"]):
        with pytest.raises(ValueError, match="reached outside of a call of the model, .*: call the model and not its"):
            model.forward(IDS)
        rows = output(model, IDS)
    for row, name in enumerate(["b", None, "a"]):
        torch.testing.assert_close(rows[row], right[name][row], rtol=1e-5, atol=1e-5)


def test_randomize_reaches_the_heads() -> None:
    """Else the tests above would compare heads that nobody trained."""
    wrapped = adapted(model_of("a linear head"), "a linear head", 1)
    head = wrapped.get_base_model().score
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    randomize(wrapped, 2)
