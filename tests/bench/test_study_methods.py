"""The study's ways of combining and importances beside their formulas; its training beside PEFT's and beside itself."""

from __future__ import annotations

import peft
import pytest
import tiny_study
import torch
import torch.nn.functional as F
from tiny import TARGETS, tiny_model
from torch import Tensor

from ia3rt.bench.study import importance, methods, training
from ia3rt.bench.study.curve import curves
from ia3rt.bench.study.methods import METHODS, Combining
from ia3rt.bench.study.models import Prompt, head_name, score
from ia3rt.bench.study.settings import Budget
from ia3rt.bench.study.tasks import TASKS
from ia3rt.bench.study.training import Learner

BUDGET = tiny_study.SCALE.budget


def prompts(count: int, seed: int = 0, longest: int = 6) -> list[Prompt]:
    drawn = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=drawn).tolist()
    ids = [tuple(torch.randint(1, 128, (n,), generator=drawn).tolist()) for n in lengths]
    return [Prompt(each, number % 2) for number, each in enumerate(ids)]


def vectors(model: tiny_study.TinyDecoder, seed: int) -> dict[tuple[str, str], Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {site.key: 1 + 0.1 * torch.randn(site.width, generator=drawn) for site in model.rt.sites}


@pytest.fixture
def decoder() -> tiny_study.TinyDecoder:
    model = tiny_study.TinyDecoder.load(torch.float32)
    for seed, name in enumerate("ab"):
        model.rt.add_adapter(name, vectors(model, seed))
    return model


def test_every_method_makes_an_adapter(decoder: tiny_study.TinyDecoder) -> None:
    importances = {name: vectors(decoder, 5) for name in "ab"}
    for method in METHODS:
        for values in method.grid:
            method.combine(Combining(decoder.rt, ["a", "b"], importances, importances), "made", values)
            made = decoder.rt.get_adapter("made").vectors
            assert all((each - 1).abs().mean() < 0.3 for each in made.values()), (method.name, values)
            decoder.rt.delete_adapter("made")
    assert METHODS[0].name == "product"
    assert len({method.name for method in METHODS}) == len(METHODS)
    methods.SUM_OF_ONES.combine(Combining(decoder.rt, ["a", "b"]), "made", {})
    assert all(each.mean() > 1.5 for each in decoder.rt.get_adapter("made").vectors.values())


def test_the_two_that_are_no_combination_type(decoder: tiny_study.TinyDecoder) -> None:
    squares = {name: {key: x.abs() for key, x in vectors(decoder, 7 + n).items()} for n, name in enumerate("ab")}
    given = Combining(decoder.rt, ["a", "b"], {}, squares)
    methods.lerp_product(given, "lerp", {"weight": 0.3})
    methods.activation_weighted(given, "weighted", {})
    for key, one in vectors(decoder, 0).items():
        other = vectors(decoder, 1)[key]
        lerp = (1 + 0.3 * (one - 1)) * (1 + 0.3 * (other - 1))
        torch.testing.assert_close(decoder.rt.get_adapter("lerp").vectors[key], lerp)
        a, b = squares["a"][key], squares["b"][key]
        torch.testing.assert_close(decoder.rt.get_adapter("weighted").vectors[key], (a * one + b * other) / (a + b))


def test_mean_squares_are_those_of_the_plain_model(decoder: tiny_study.TinyDecoder) -> None:
    asked = prompts(3)
    found = importance.mean_squares(decoder, asked, lambda tokens: None)
    plain = tiny_model()
    layer = plain.model.layers[1]
    seen: list[tuple[Tensor, Tensor]] = []
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append((x[0], layer.self_attn.v_proj.kept)))
    layer.self_attn.v_proj.register_forward_hook(lambda m, x, y: setattr(m, "kept", y))
    with torch.no_grad():
        for each in asked:
            plain(torch.tensor([each.ids]))
    inputs, outputs = (torch.cat([pair[n][0] for pair in seen]) for n in (0, 1))
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj", "in"], inputs.square().mean(0))
    torch.testing.assert_close(found["model.layers.1.self_attn.v_proj", "out"], outputs.square().mean(0))


def test_fisher_information_is_that_of_pefts_gradients(decoder: tiny_study.TinyDecoder) -> None:
    asked = prompts(4)
    found = importance.fisher_information(decoder, "a", "a", "movie", asked, lambda tokens: None)
    wrapped = peft.get_peft_model(tiny_model(), peft.IA3Config(**TARGETS["llama"], task_type="CAUSAL_LM")).eval()
    parameter = dict(wrapped.named_parameters())
    own = {key: parameter[f"base_model.model.{key[0]}.ia3_l.default"] for key in found}
    for key, x in vectors(decoder, 0).items():
        own[key].data = x.view_as(own[key])
    labels = [tiny_study.Words().encode(label)[0] for label in TASKS["movie"].labels]
    drawing = torch.Generator().manual_seed(0)
    squares = {key: torch.zeros(each.numel()) for key, each in own.items()}
    for each in asked:
        chances = F.log_softmax(wrapped(torch.tensor([each.ids])).logits[0, -1, labels], dim=0)
        drawn = torch.multinomial(chances.detach().exp(), 1, generator=drawing)
        wrapped.zero_grad()
        chances[drawn].sum().backward()
        for key in own:
            squares[key] += own[key].grad.view(-1) ** 2 / len(asked)
    assert max(float(each.max()) for each in squares.values()) > 1e-4
    for key, each in squares.items():
        torch.testing.assert_close(found[key], each, rtol=1e-3, atol=1e-9)


def test_fisher_information_is_of_the_owners_head() -> None:
    model = tiny_study.TinyEncoder.load(torch.float32)
    for name in "xy":
        model.add(name, ("movie",))
    model.rt.delete_adapter(head_name("y", "movie"))
    site, zeros = model.rt.sites[0], {"weight": torch.zeros(8, 32), "bias": torch.zeros(8)}
    model.rt.add_adapter(head_name("y", "movie"), {site.key: torch.ones(site.width)}, modules={"classifier": zeros})
    by_owner = {
        owner: importance.fisher_information(model, "x", owner, "movie", prompts(3), lambda tokens: None)
        for owner in "xy"
    }
    assert float(by_owner["x"][site.key].max()) > 0
    assert all(not each.any() for each in by_owner["y"].values())  # nothing reaches a head of zeros


def test_training_is_pefts_step_for_step() -> None:
    model = tiny_study.TinyDecoder.load(torch.float32)
    found = curves(model, "movie", 0, prompts(40), BUDGET, 3, lambda tokens: None)
    assert float(found["peft"][0] - found["peft"][2]) > 0.1
    torch.testing.assert_close(found["ia3rt"], found["peft"], rtol=1e-5, atol=1e-5)


def trained(model: tiny_study.TinyDecoder | tiny_study.TinyEncoder, learners: list[Learner]) -> None:
    given = {(each.name, task): prompts(40, each.seed) for each in learners for task in each.tasks}
    validation = {task: prompts(6, 9) for each in learners for task in each.tasks}
    for each in learners:
        model.add(each.name, each.tasks)
    training.train(model, learners, given, validation, BUDGET, model.losses, lambda tokens: None)


@pytest.mark.parametrize("kind", [tiny_study.TinyDecoder, tiny_study.TinyEncoder])
def test_adapters_learn_in_one_batch_what_each_learns_alone(kind: type) -> None:
    learners = [Learner("x", ("movie",), 0), Learner("y", ("movie",), 1), Learner("z", ("movie", "author"), 0)]
    together = kind.load(torch.float32)
    trained(together, learners)
    for learner in learners:
        alone = kind.load(torch.float32)
        trained(alone, [learner])
        for part in alone.parts(learner.name, learner.tasks):
            one, other = alone.rt.get_adapter(part), together.rt.get_adapter(part)
            assert one.vectors.keys() == other.vectors.keys()
            for key, vector in one.vectors.items():
                torch.testing.assert_close(other.vectors[key], vector, rtol=0, atol=2e-4)
            for path, state in one.modules.items():
                for each, x in state.items():
                    torch.testing.assert_close(other.modules[path][each], x, rtol=0, atol=2e-4)


def test_a_head_is_trained_and_what_carries_it_is_not() -> None:
    model = tiny_study.TinyEncoder.load(torch.float32)
    trained(model, [Learner("x", ("movie",), 0)])
    head = model.rt.get_adapter(head_name("x", "movie"))
    assert all(torch.equal(vector, torch.ones_like(vector)) for vector in head.vectors.values())
    assert not torch.equal(head.modules["classifier"]["weight"], model.model.classifier.state_dict()["weight"])
    moved = torch.cat(list(model.rt.get_adapter("x").vectors.values()))
    assert float((moved - 1).abs().max()) > 1e-3


def test_the_step_that_was_best_is_kept() -> None:
    model = tiny_study.TinyDecoder.load(torch.float32)
    model.add("x", ("movie",))
    given = [Prompt(each.ids, 0) for each in prompts(40)]
    validation = [Prompt(each.ids, 1) for each in prompts(6, 9)]  # the more is learned the worse these are
    budget = Budget(steps=6, rows=2, rows_of_joint=2, texts=40, check_every=1)
    learners = [Learner("x", ("movie",), 0)]
    points = training.train(
        model, learners, {("x", "movie"): given}, {"movie": validation}, budget, model.losses, lambda tokens: None
    )
    best = min(points, key=lambda point: point.validation_loss)
    assert best.step < 6, "the last one was the best: nothing was asked"
    model.rt.set_adapter("x")
    with torch.no_grad():
        kept = float(model.losses(validation, "movie").mean())
    assert kept == pytest.approx(best.validation_loss, rel=1e-4)


def test_scores_do_not_depend_on_the_order(decoder: tiny_study.TinyDecoder) -> None:
    asked = prompts(70)
    told: list[int] = []
    found = score(decoder, asked, "movie", told.append)
    for place in (0, 33, 69):
        alone = score(decoder, [asked[place]], "movie", told.append)[0]
        torch.testing.assert_close(found[place], alone, rtol=1e-4, atol=1e-4)
    assert sum(told[:3]) == sum(len(each.ids) for each in asked)
