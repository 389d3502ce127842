"""Loading, switching and deleting; and that each error leaves the outputs as they were."""

import copy
import gc
import warnings
import weakref

import accelerate
import pytest
import torch
from tiny import FAMILIES, logits, peft_model, save_each, tiny_model, token_ids
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import ia3rt
from ia3rt import Mix
from ia3rt.adapters.checkpoint import read_checkpoint

IDS = token_ids()
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def runtime(model, tmp_path):
    """A tiny Llama with the adapters b, c and d; b is active."""
    runtime = ia3rt.patch(model)
    for folder in save_each(peft_model(tiny_model(), "llama"), tmp_path):
        runtime.load_adapter(folder)
    runtime.set_adapter("b")
    return runtime


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_computes_the_same_until_an_adapter_is_set_and_after_unpatch(family):
    model = tiny_model(family)
    before = logits(model, IDS)
    keys, types = list(model.state_dict()), [type(module) for module in model.modules()]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    runtime = ia3rt.patch(model)
    assert torch.equal(logits(model, IDS), before)
    assert list(model.state_dict()) == keys, "save_pretrained writes the base model"
    site = runtime.sites[0]
    runtime.add_adapter("b", {site.key: torch.rand(site.width)})
    runtime.set_adapter("b")
    assert not torch.equal(logits(model, IDS), before)
    assert runtime.unpatch() is model
    assert torch.equal(logits(model, IDS), before)
    assert [type(module) for module in model.modules()] == types
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    ia3rt.patch(model)


def test_what_is_loaded_and_what_is_active(runtime):
    assert runtime.adapters == ["b", "c", "d"]
    assert runtime.active_adapters == ["b"]
    runtime.set_adapter({"c": 0.2, "b": 0.1})
    assert runtime.active_adapters == ["c", "b"]
    runtime.set_adapter(None)
    assert runtime.active_adapters == []
    with runtime.route(["d", None, ["b", "d"]]):
        assert runtime.active_adapters == ["d", "b"]
    assert runtime.active_adapters == []
    assert "3 sites" not in repr(runtime) and "adapters=['b', 'c', 'd'], worn: base" in repr(runtime)


def test_loading_does_not_change_what_is_worn(runtime, model, tmp_path):
    before = logits(model, IDS)
    assert runtime.load_adapter(tmp_path / "c", "again") == "again"
    assert runtime.active_adapters == ["b"]
    assert torch.equal(logits(model, IDS), before)


def test_the_default_name_is_the_folders(runtime, tmp_path):
    runtime.delete_adapter("c")
    assert runtime.load_adapter(tmp_path / "c") == "c"


def test_weights_change_between_two_forwards(runtime, model):
    runtime.set_adapter({"b": 0.5, "c": 0.5})
    first = logits(model, IDS)
    runtime.set_adapter({"b": 0.9, "c": -0.1})
    assert not torch.equal(logits(model, IDS), first)
    runtime.set_adapter({"b": 0.5, "c": 0.5})
    assert torch.equal(logits(model, IDS), first)


@pytest.mark.parametrize(
    ("spec", "mix"),
    [
        ("b*c", Mix(("b", "c"))),
        ("mix:b*0.75+c*0.25", Mix(("b", "c"), (0.75, 0.25), "linear")),
        ({"adapters": ["b"], "weights": [0.5], "combination_type": "delta"}, Mix(("b",), (0.5,), "delta")),
    ],
)
def test_a_request_s_mix_is_worn_as_that_mix(runtime, model, spec, mix):
    runtime.set_adapter(mix)
    expected = logits(model, IDS)
    runtime.set_adapter(spec)
    assert torch.equal(logits(model, IDS), expected)
    with runtime.route([None, spec, mix]):
        assert len(runtime._routing.chosen.mixes) == 2, "equal mixes share a row of the table"
        assert torch.equal(logits(model, IDS)[1:], expected[1:])


@pytest.mark.parametrize(
    "specs",
    [
        ["b*c*d", "d*b*c", ["c", "d", "b"]],
        ["mix:b*0.7+c*0.2+d*0.1", {"d": 0.1, "b": 0.7, "c": 0.2}, "mix:c*0.2+d*0.1+b*0.7"],
        ["mix:b*0.5+c*0.3", "mix:c*0.3+b*0.5", "mix:b*0.25+c*0.3+b*0.25"],
        ["delta:b*0.5+c*-0.3", "delta:c*-0.3+b*0.5"],
    ],
)
def test_equal_mixes_share_a_row_however_they_are_written(model, tmp_path, specs):
    runtime = ia3rt.patch(model)
    for folder in save_each(peft_model(tiny_model(), "llama"), tmp_path):
        runtime.load_adapter(folder)
    with runtime.route([None, *specs]):
        assert len(runtime._routing.chosen.mixes) == 2
    answers = []
    for spec in specs:
        runtime.set_adapter(spec)
        answers.append(logits(model, IDS))
        torch.testing.assert_close(answers[0], answers[-1])


@pytest.mark.parametrize("patched_first", [False, True])
def test_a_model_whose_hooks_accelerate_removed_is_patched_and_given_back(patched_first):
    """They leave the class's forward on each module."""
    model, before = tiny_model(), logits(tiny_model(), IDS)

    def hooked() -> None:
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        accelerate.hooks.remove_hook_from_submodules(model)

    if not patched_first:
        hooked()
    runtime = ia3rt.patch(model)
    vectors = {site.key: torch.rand(site.width) for site in runtime.sites}
    runtime.add_adapter("a", vectors, modules={"lm_head": {"weight": torch.rand(128, 64)}})
    runtime.set_adapter("a")
    worn = logits(model, IDS)
    if patched_first:
        hooked()
    assert torch.equal(logits(model, IDS), worn) and not torch.equal(worn, before)
    runtime.unpatch()
    assert torch.equal(logits(model, IDS), before)


@torch.no_grad()
def test_an_own_head_is_kept_where_accelerate_offloads_the_model_s():
    """While it does, the model's weight is nowhere, and its bias is asked for."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = BertForSequenceClassification(BertConfig(vocab_size=99, **sizes)).eval()
    ids = IDS % 99
    runtime = ia3rt.patch(model)
    state = {key: torch.rand_like(x) for key, x in model.classifier.state_dict().items()}
    runtime.add_adapter("a", modules={"classifier": state})
    answers = {}
    for name in ("a", None):
        runtime.set_adapter(name)
        answers[name] = model(ids).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    for name, answer in answers.items():
        runtime.set_adapter(name)
        assert torch.equal(model(ids).logits, answer)
    kept = runtime.get_adapter("a").modules["classifier"]
    assert all(torch.equal(kept[key], x) for key, x in state.items())


@pytest.mark.parametrize("spec", [{"b": 1e39}, {"b": 1e308, "c": 1e308}, "delta:b*-1e39"])
def test_weights_that_float32_does_not_hold_are_refused(runtime, model, spec):
    worn = logits(model, IDS)
    for wear in (runtime.set_adapter, lambda spec: runtime.route(["b", spec, None])):
        with pytest.raises(ValueError, match="are too large for float32"):
            wear(spec)
    assert torch.equal(logits(model, IDS), worn)


def test_rows_have_an_order(runtime):
    with pytest.raises(ValueError, match="route takes a list with one mix for each row"):
        runtime.route({"b", "c"})


def test_a_mix_has_its_numbers_whatever_was_loaded_before(tmp_path):
    folders = save_each(peft_model(tiny_model(), "llama"), tmp_path)
    answers = []
    for order in (folders, folders[::-1]):
        model = tiny_model()
        runtime = ia3rt.patch(model)
        for folder in order:
            runtime.load_adapter(folder)
        for spec in (["b", "c", "d"], {"b": 0.7, "c": 0.2, "d": 0.3}):
            runtime.set_adapter(spec)
            answers.append(logits(model, IDS))
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])


def test_disable_adapter_is_the_base_for_a_while(runtime, model):
    worn = logits(model, IDS)
    with runtime.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(tiny_model(), IDS))
    assert torch.equal(logits(model, IDS), worn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bank_grows_without_changing_an_output(model, tmp_path, dtype):
    folders = save_each(peft_model(tiny_model(), "llama"), tmp_path)
    runtime = ia3rt.patch(model, capacity=1, dtype=dtype)
    runtime.load_adapter(folders[0])
    runtime.set_adapter("b")
    before = logits(model, IDS)
    for copy_number in range(9):
        runtime.load_adapter(folders[1], f"c{copy_number}")
        assert torch.equal(logits(model, IDS), before)
    runtime.set_adapter("c8")
    roomy = tiny_model()
    other = ia3rt.patch(roomy, dtype=dtype, capacity=100)
    other.load_adapter(folders[1])
    other.set_adapter("c")
    assert torch.equal(logits(model, IDS), logits(roomy, IDS))


def test_a_half_bank_holds_the_rounded_vectors(model):
    vector = torch.rand(96)
    runtime = ia3rt.patch(model, dtype=torch.bfloat16)
    runtime.add_adapter("b", {DOWN: vector})
    runtime.set_adapter("b")
    exact = tiny_model()
    rounded = ia3rt.patch(exact)
    rounded.add_adapter("b", {DOWN: vector.bfloat16()})
    rounded.set_adapter("b")
    assert torch.equal(logits(model, IDS), logits(exact, IDS))


def test_an_adapter_may_bring_sites_that_the_structure_does_not_have(runtime, model):
    before = logits(model, IDS)
    vectors = {(UP, "out"): torch.rand(96), (DOWN, "in"): torch.rand(96), (DOWN, "out"): torch.rand(64)}
    runtime.add_adapter("wide", vectors)
    assert torch.equal(logits(model, IDS), before)
    runtime.set_adapter("wide")
    truth = tiny_model().double()
    layer = truth.model.layers[0].mlp
    for linear, s_in, s_out in ((layer.up_proj, 1, vectors[UP, "out"]), (layer.down_proj, *list(vectors.values())[1:])):
        linear.weight.data *= s_in * torch.as_tensor(s_out).unsqueeze(1)
        linear.bias.data *= s_out
    torch.testing.assert_close(logits(model, IDS).double(), logits(truth, IDS), rtol=1e-4, atol=1e-5)
    runtime.set_adapter("b")
    assert torch.equal(logits(model, IDS), before)


def test_deleting_an_active_adapter_warns_and_falls_back_to_the_base(runtime, model):
    base = logits(tiny_model(), IDS)
    runtime.set_adapter(["b", "c"])
    with pytest.warns(UserWarning, match="'b' was active and is deleted: the rows that wore it wear the base model"):
        runtime.delete_adapter("b")
    assert torch.equal(logits(model, IDS), base)
    assert runtime.active_adapters == []
    runtime.add_adapter("b", {DOWN: torch.rand(96)})
    assert torch.equal(logits(model, IDS), base), "the new owner of the row is not worn by anyone yet"


def test_deleting_an_adapter_leaves_the_rows_that_wear_others(runtime, model):
    with runtime.route(["b", "c", ["c", "d"]]):
        before = logits(model, IDS)
        with pytest.warns(UserWarning, match="'d' was active"):
            runtime.delete_adapter("d")
        after = logits(model, IDS)
    torch.testing.assert_close(after[:2], before[:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after[2:], logits(tiny_model(), IDS)[2:], rtol=1e-5, atol=1e-6)


def test_what_a_context_brings_back_was_deleted_meanwhile(runtime, model, tmp_path):
    outer = runtime.route(["b", "c", "c"])
    with pytest.warns(UserWarning, match="'b' was deleted meanwhile"), outer:
        with runtime.route(["c", "c", "c"]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runtime.delete_adapter("b")
            runtime.load_adapter(tmp_path / "d", "b")
        assert torch.equal(logits(model, IDS)[0], logits(tiny_model(), IDS)[0]), "never silently to another adapter"
    assert torch.equal(logits(model, IDS), logits(tiny_model(), IDS)), "never silently to another adapter"


def test_a_warning_that_is_an_error_leaves_nothing_half_done(runtime, model):
    runtime.add_adapter("head", modules={"lm_head": {"weight": 2 * model.lm_head.weight.detach()}})
    base = logits(tiny_model(), IDS)
    with warnings.catch_warnings():
        runtime.route(["b"] * 3)
        with pytest.raises(UserWarning, match="'b' was deleted meanwhile"), runtime.route(["c"] * 3):
            warnings.simplefilter("ignore")
            runtime.delete_adapter("b")
            warnings.simplefilter("error")
        assert torch.equal(logits(model, IDS), base)
        runtime.set_adapter("head")
        with pytest.raises(UserWarning, match="'head' was active and is deleted"):
            runtime.delete_adapter("head")
        assert torch.equal(logits(model, IDS), base) and "head" not in runtime.adapters
        assert type(copy.deepcopy(model.lm_head)) is nn.Linear, "with a warning, where an adapter had its own"


def test_deleting_an_idle_adapter_is_silent(runtime, model):
    before = logits(model, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime.delete_adapter("c")
    assert runtime.adapters == ["b", "d"]
    assert torch.equal(logits(model, IDS), before)


def test_a_combination_lives_on_without_its_parts(runtime, model):
    runtime.set_adapter(["b", "c"])
    product = logits(model, IDS)
    runtime.add_weighted_adapter(["b", "c"], None, "both")
    runtime.set_adapter("both")
    runtime.delete_adapter("b")
    runtime.delete_adapter("c")
    assert torch.equal(logits(model, IDS), product)


def _nan(width):
    vector = torch.ones(width)
    vector[3] = float("nan")
    return vector


ERRORS = {
    "unknown adapter": (lambda rt: rt.set_adapter("x"), ValueError, r"unknown adapter 'x'.*loaded: 'b', 'c', 'd'"),
    "unknown in a product": (lambda rt: rt.set_adapter(["b", "x"]), ValueError, "unknown adapter 'x'"),
    "unknown in a route": (lambda rt: rt.route(["b", "x", None]), ValueError, "unknown adapter 'x'"),
    "unknown to delete": (lambda rt: rt.delete_adapter("x"), ValueError, "unknown adapter 'x'"),
    "unknown to save": (lambda rt: rt.save_adapter("x", "nowhere"), ValueError, "unknown adapter 'x'"),
    "unknown to combine": (lambda rt: rt.add_weighted_adapter(["x"], None, "y"), ValueError, "unknown adapter 'x'"),
    "unknown to merge": (lambda rt: rt.merge_adapter("x"), ValueError, "unknown adapter 'x'"),
    "name taken": (lambda rt: rt.add_adapter("c", {DOWN: torch.ones(96)}), ValueError, "'c' is already loaded"),
    "name taken, combined": (
        lambda rt: rt.add_weighted_adapter(["b", "c"], None, "d"),
        ValueError,
        "'d' is already loaded",
    ),
    "no name": (
        lambda rt: rt.add_adapter("", {DOWN: torch.ones(96)}),
        ValueError,
        "must be a string that is not empty",
    ),
    "wrong width": (
        lambda rt: rt.add_adapter("x", {DOWN: torch.ones(95)}),
        ValueError,
        rf"'x' has a vector of shape \(95,\) at {DOWN} \(input, width 96\): expected 96 numbers",
    ),
    "right number, wrong shape": (
        lambda rt: rt.add_adapter("x", {DOWN: torch.ones(48, 2)}),
        ValueError,
        r"shape \(48, 2\)",
    ),
    "a site the model lacks": (
        lambda rt: rt.add_adapter("x", {("model.layers.9.mlp.down_proj", "in"): torch.ones(96)}),
        ValueError,
        "'x' does not fit: the model has no module 'model.layers.9.mlp.down_proj'",
    ),
    "a module that wears none": (
        lambda rt: rt.add_adapter("x", {("model.norm", "in"): torch.ones(64)}),
        ValueError,
        "'model.norm' is a LlamaRMSNorm, which wears no vector",
    ),
    "a side there is not": (
        lambda rt: rt.add_adapter("x", {(DOWN, "middle"): torch.ones(96)}),
        ValueError,
        "sides are 'in' and 'out'",
    ),
    "a path the model lacks": (
        lambda rt: rt.add_adapter("x", {"model.layers.0.mlp.downproj": torch.ones(96)}),
        ValueError,
        "'x' does not fit: the model has no module 'model.layers.0.mlp.downproj'",
    ),
    "a path that wears none": (
        lambda rt: rt.add_adapter("x", {"model.norm.weight": torch.ones(64)}),
        ValueError,
        "is a tensor of a LlamaRMSNorm, which wears no vector",
    ),
    "PEFT's key": (
        lambda rt: rt.add_adapter("x", {f"base_model.model.{DOWN}.ia3_l": torch.ones(1, 96)}),
        ValueError,
        f"key of PEFT's files: name the module, '{DOWN}'",
    ),
    "PEFT's key and a side": (
        lambda rt: rt.add_adapter("x", {(f"base_model.model.{DOWN}", "in"): torch.ones(96)}),
        ValueError,
        f"key of PEFT's files: name the module, '{DOWN}'",
    ),
    "PEFT's key of what is not there": (
        lambda rt: rt.add_adapter("x", {"base_model.model.layers.7.mlp.ia3_l": torch.ones(96)}),
        ValueError,
        "another model, or for a part of this one$",
    ),
    "a weight without mix:": (lambda rt: rt.set_adapter("b*0.5"), ValueError, r"begins with mix: .* 'mix:b\*0.5'"),
    "a sum without mix:": (lambda rt: rt.route(["b+c"]), ValueError, r"unknown adapter 'b\+c': a weighted sum begins"),
    "a product with an unknown one": (lambda rt: rt.set_adapter("b*x"), ValueError, "unknown adapter 'x': load"),
    "trained twice": (lambda rt: rt.train_adapter(["b", "b"]), ValueError, r"are \['b', 'b'\]: name each once"),
    "a name in the place of a model": (lambda rt: ia3rt.patch("org/model"), TypeError, "given is of type str: give"),
    "tensors in the place of a model": (
        lambda rt: ia3rt.patch(rt.model.state_dict()),
        TypeError,
        "of type OrderedDict",
    ),
    "nothing in the place of a model": (lambda rt: ia3rt.patch(None), TypeError, "of type NoneType"),
    "the runtime patched": (lambda rt: ia3rt.patch(rt), TypeError, "of type Runtime: .* is its `model`"),
    "the runtime explained": (lambda rt: ia3rt.explain(rt), TypeError, "explain takes a model"),
    "a side left open": (lambda rt: rt.add_adapter("x", {UP: torch.ones(96)}), ValueError, "say at which side"),
    "a site twice": (
        lambda rt: rt.add_adapter("x", {DOWN: torch.ones(96), (DOWN, "in"): torch.ones(96)}),
        ValueError,
        "two vectors for one site",
    ),
    "nan": (lambda rt: rt.add_adapter("x", {DOWN: _nan(96)}), ValueError, f"'x' has a NaN or inf at {DOWN}"),
    "inf": (lambda rt: rt.add_adapter("x", {DOWN: torch.full((96,), torch.inf)}), ValueError, "has a NaN or inf"),
    "good and bad": (
        lambda rt: rt.add_adapter("x", {DOWN: torch.rand(96), "model.layers.1.mlp.down_proj": _nan(96)}),
        ValueError,
        r"NaN or inf at model.layers.1.mlp.down_proj \(input",
    ),
    "no vectors": (lambda rt: rt.add_adapter("x", {}), ValueError, "'x' has no vectors"),
    "empty list": (lambda rt: rt.set_adapter([]), ValueError, "an empty list of adapters"),
    "empty list, combined": (lambda rt: rt.add_weighted_adapter([], None, "x"), ValueError, "no adapters to combine"),
    "empty route": (lambda rt: rt.route([]), ValueError, "route needs at least one row"),
    "a route that is one mix": (lambda rt: rt.route("b"), ValueError, "route takes a list"),
    "weights of another length": (
        lambda rt: rt.add_weighted_adapter(["b", "c"], [0.5], "x", "linear"),
        ValueError,
        "1 weights for 2 adapters",
    ),
    "weighted product": (
        lambda rt: rt.add_weighted_adapter(["b", "c"], [0.5, 0.5], "x"),
        ValueError,
        "a product takes no weights",
    ),
    "linear without weights": (
        lambda rt: rt.add_weighted_adapter(["b", "c"], None, "x", "linear"),
        ValueError,
        "needs weights",
    ),
    "weight not finite": (lambda rt: rt.set_adapter({"b": float("nan")}), ValueError, "weights must be finite"),
    "index out of range": (lambda rt: rt.route(["b"], torch.tensor([0, 1, 0])), ValueError, r"must lie in 0 … 0"),
    "index of floats": (lambda rt: rt.route(["b"], torch.zeros(3)), ValueError, "must be an integer tensor"),
    "index of many dims": (
        lambda rt: rt.route(["b"], torch.zeros(1, 1, 1, dtype=torch.long)),
        ValueError,
        "must be an integer tensor",
    ),
    "patched twice": (lambda rt: ia3rt.patch(rt.model), ValueError, "patched already"),
    "unmerged unmerged": (lambda rt: rt.unmerge_adapter(), RuntimeError, "not merged"),
    "no folder": (lambda rt: rt.load_adapter("/no/such/folder", "x"), FileNotFoundError, "is not there"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_clear_and_changes_nothing(runtime, model, wrong, error, message):
    before, adapters, sites = logits(model, IDS), runtime.adapters, runtime.sites
    table = runtime._bank.table.clone()
    with pytest.raises(error, match=message):
        wrong(runtime)
    assert torch.equal(logits(model, IDS), before)
    assert (runtime.adapters, runtime.active_adapters, runtime.sites) == (adapters, ["b"], sites)
    assert torch.equal(runtime._bank.table, table)


def test_a_value_that_overflows_a_half_bank_is_an_error(model):
    runtime = ia3rt.patch(model, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"too large for the bank's torch.float16"):
        runtime.add_adapter("x", {DOWN: torch.full((96,), 1e6)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(backend="cuda"), "unknown backend 'cuda'"),
        (dict(dtype=torch.float64), "bank's dtype must be"),
        (dict(dtype="bfloat16"), "bank's dtype must be .* 'bfloat16'"),
        (dict(capacity=0), "capacity must be at least 1"),
        (dict(target_modules=["nothing"]), "no IA³ site found"),
    ],
)
def test_a_bad_patch_leaves_the_model_as_it_was(model, arguments, message):
    types, attributes = [type(module) for module in model.modules()], [set(vars(m)) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        ia3rt.patch(model, **arguments)
    assert [type(module) for module in model.modules()] == types
    assert [set(vars(module)) for module in model.modules()] == attributes
    ia3rt.patch(model)


def test_the_triton_backend_is_refused_where_it_cannot_run(model, torch_backend):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        ia3rt.patch(model, backend="triton")


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        empty = nn.ModuleDict({"up_proj": nn.Linear(4, 8), "down_proj": nn.Linear(8, 4)})
    with pytest.raises(ValueError, match="meta device"):
        ia3rt.patch(empty)


def test_explicit_targets_bound_what_adapters_may_touch(model):
    runtime = ia3rt.patch(model, target_modules=["v_proj"])
    with pytest.raises(ValueError, match=r"leaves module 'model.layers.0.mlp.down_proj' out, and adapter 'x'"):
        runtime.add_adapter("x", {(DOWN, "in"): torch.ones(96)})


def test_excluded_modules_stay_excluded(model):
    runtime = ia3rt.patch(model, exclude_modules=["down_proj"])
    with pytest.raises(ValueError, match="told to exclude"):
        runtime.add_adapter("x", {(DOWN, "in"): torch.ones(96)})


def test_an_unpatched_runtime_says_so(runtime):
    runtime.unpatch()
    for use in (lambda: runtime.set_adapter("b"), lambda: runtime.unpatch(), lambda: runtime.route(["b"])):
        with pytest.raises(RuntimeError, match="not patched any more"):
            use()


@pytest.mark.parametrize("change", ["unpatch", "merge_adapter"])
def test_what_is_read_while_the_model_changes_is_not_loaded(runtime, model, tmp_path, monkeypatch, change):
    runtime.set_adapter("b")

    def read(*given, **options):
        checkpoint = read_checkpoint(*given, **options)
        getattr(runtime, change)()
        return checkpoint

    monkeypatch.setattr(ia3rt.runtime, "read_checkpoint", read)
    with pytest.raises(RuntimeError, match="cannot load an adapter"):
        runtime.load_adapter(tmp_path / "d", "e")
    assert "e" not in runtime.adapters
    if change == "unpatch":
        assert not any(type(module).__name__.startswith("IA3") for module in model.modules())
        ia3rt.patch(model)


def test_a_deep_copy_of_the_model_has_a_runtime_of_its_own(runtime, model):
    before = logits(model, IDS)
    other = copy.deepcopy(runtime)
    other.set_adapter(["c", "d"])
    assert other.model is not model
    assert torch.equal(logits(model, IDS), before)
    assert not torch.equal(logits(other.model, IDS), before)
    with other.route(["b", "c", None]):
        other.model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, num_beams=2)
    assert torch.equal(logits(model, IDS), before)


def test_adapters_switched_under_inference_mode_can_be_switched_outside(model):
    with torch.inference_mode():
        runtime = ia3rt.patch(model, capacity=1)
        for name in "bcd":
            runtime.add_adapter(name, {DOWN: torch.rand(96)})
        runtime.route(["b", None, "c"])
        inside = model(IDS).logits.clone()
    runtime.set_adapter("d")
    runtime.route(["b", None, "c"])
    torch.testing.assert_close(logits(model, IDS), inside)


def test_gradients_flow_through_a_patched_model(runtime, model):
    runtime.set_adapter(["b", "c"])
    product = {
        key: b * c for (key, b), c in zip(_vectors(runtime, "b"), dict(_vectors(runtime, "c")).values(), strict=True)
    }
    truth = tiny_model()
    with torch.no_grad():
        for (path, side), scale in product.items():
            layer = truth.get_submodule(path)
            layer.weight.mul_(scale if side == "in" else scale.unsqueeze(1))
            if side == "out":
                layer.bias.mul_(scale)
    gradients = []
    for any_model in (model, truth):
        embeddings = any_model.get_input_embeddings()(IDS).detach().requires_grad_()
        any_model(inputs_embeds=embeddings, labels=IDS).loss.backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def _vectors(runtime, name):
    return [(site.key, vector.clone()) for site, vector in runtime._bank.vectors(runtime._bank.adapters[name]).items()]


def test_nothing_keeps_an_unpatched_model_alive():
    model = tiny_model()
    gone = weakref.ref(model)
    ia3rt.patch(model).unpatch()
    del model
    gc.collect()
    assert gone() is None


def test_a_delta_mix_is_a_route_element_too(runtime, model):
    with runtime.route([Mix(("b",), (0.5,), "delta")] * 3):
        half = logits(model, IDS)
    runtime.add_weighted_adapter(["b"], [0.5], "half", "delta")
    runtime.set_adapter("half")
    torch.testing.assert_close(logits(model, IDS), half, rtol=1e-5, atol=1e-6)
