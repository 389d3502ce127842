"""Rows that wear different adapters, in models that do not have them in the first dimension of every layer's input."""

import sys
from collections.abc import Callable
from types import ModuleType

import numpy
import pytest
import torch
from pictures import SEEN, SIZE, clip, ids, llava
from tiny import patched
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerModel,
    SwinConfig,
    SwinModel,
    XLNetConfig,
    XLNetLMHeadModel,
)
from where import home

import ia3rt

BART = dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
NAMES = ["a", "b", None]


def assert_each_row_wears_its_own(runtime: ia3rt.Runtime, names: list, run: Callable[[], Tensor]) -> None:
    """Beside the same forward where all rows wear one of them, which no layout matters for."""
    with torch.no_grad():
        with runtime.route(names):
            routed, again = run(), run()
        assert torch.equal(routed, again), "what was seen in the first forward holds for the second"
        uniform = []
        for row, name in enumerate(names):
            runtime.set_adapter(name)
            uniform.append(run())
            torch.testing.assert_close(routed[row], uniform[-1][row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(uniform[0], uniform[1], atol=1e-3), "the adapters have to show"


def fsmt() -> tuple[nn.Module, dict]:
    config = FSMTConfig(
        langs=["en", "de"], src_vocab_size=99, tgt_vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, **BART
    )
    return FSMTForConditionalGeneration(config), {}


def xlnet() -> tuple[nn.Module, dict]:
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48))
    return model, dict(target_modules=["layer_1", "layer_2"], feedforward_modules=["layer_2"])


def longformer() -> tuple[nn.Module, dict]:
    model = LongformerModel(LongformerConfig(**SIZE, vocab_size=99, attention_window=4, max_position_embeddings=64))
    return model, dict(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])


@pytest.mark.parametrize("make", [fsmt, xlnet, longformer], ids=lambda make: make.__name__)
@pytest.mark.parametrize("length", [7, 3, 2])  # as many as rows, too
def test_time_first(make, length) -> None:
    torch.manual_seed(0)
    model, sites = make()
    runtime, x = patched(model, **sites), ids(3, length)
    given = dict(input_ids=x, decoder_input_ids=x[:, :2].clone()) if make is fsmt else dict(input_ids=x)
    assert_each_row_wears_its_own(runtime, NAMES, lambda: model(**given)[0])
    assert_each_row_wears_its_own(runtime, ["b", "a", "a"], lambda: model(**given)[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_time_first_in_a_module_of_ones_own(backend) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = x.transpose(0, 1)
            h = h + self.v_proj(torch.softmax(self.k_proj(h), 0) * self.q_proj(h))
            h = self.down_proj(torch.relu(self.up_proj(h.reshape(-1, 8)))).view(h.shape) + h
            return h.transpose(0, 1)

    torch.manual_seed(0)
    model = Net().to(home(backend))
    runtime = ia3rt.patch(model, backend=backend)
    for name in "ab":
        runtime.add_adapter(name, {s.key: torch.rand(s.width) + 0.5 for s in runtime.sites if "down" not in s.path})
    x = torch.randn(3, 4, 8).to(home(backend))
    assert_each_row_wears_its_own(runtime, NAMES, lambda: model(x).cpu())
    runtime.add_adapter("c", {"down_proj": torch.rand(12)})  # [tokens * rows, 12]: rows are not neighbours
    with runtime.route(["a", "c", None]), pytest.raises(ValueError, match=r"down_proj .* are not one after another"):
        model(x)
    runtime.set_adapter("c")
    model(x)


def test_a_model_that_returns_nothing_is_followed_once_and_one_that_fails_again() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k_proj, self.fails = nn.Linear(8, 8, bias=False), True

        def forward(self, x: Tensor) -> None:
            if self.fails:
                raise KeyError("before the layer")
            self.result = self.k_proj(x)

    model, x = Net(), torch.randn(3, 8)
    runtime = patched(model, target_modules=["k_proj"])
    with runtime.route(NAMES):
        try:
            model(x)
        except KeyError:
            model.fails = False
            model(x)  # while another forward's error is handled
        right = model.result
        for _ in range(2):
            model(x)
            assert torch.equal(model.result, right)
    assert torch.equal(right[2], model.k_proj(x)[2])
    assert runtime._routing.probing.seen == 2


@pytest.mark.parametrize("sizes", [[(16, 16), (32, 16)], [(32, 16), (16, 16)], [(32, 32), (16, 16)]], ids=str)
def test_windows_of_images(sizes) -> None:
    """Of which an image has one or many, as its size and the layer make them; and images of both sizes in turn."""
    torch.manual_seed(0)
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    model = SwinModel(config)
    runtime = patched(model, target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"])
    for rows, size in ((3, sizes[0]), (3, sizes[1]), (2, sizes[0]), (3, sizes[0])):
        pixels = torch.randn(rows, 3, *size)
        assert_each_row_wears_its_own(runtime, NAMES[:rows], lambda: model(pixels).last_hidden_state)  # noqa: B023


def test_what_all_rows_share_is_refused_by_name() -> None:
    config = DebertaV2Config(
        **SIZE, vocab_size=99, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True
    )
    model = DebertaV2Model(config)
    runtime = patched(model, target_modules=["key_proj", "value_proj"], feedforward_modules=[])
    x = ids(2, 5)
    with runtime.route(["a", "b"]), pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.key_proj"):
        model(x)
    for name in "cd":  # at a site that only the rows' own input reaches it is right
        only = {site.key: torch.rand(32) + 0.5 for site in runtime.sites if "value" in site.path}
        runtime.add_adapter(name, only)
    assert_each_row_wears_its_own(runtime, ["c", "d"], lambda: model(x).last_hidden_state)
    with runtime.route(["a", "a"]):
        same = model(x).last_hidden_state
    runtime.set_adapter("a")
    assert torch.equal(same, model(x).last_hidden_state), "rows that wear the same need no order"


@pytest.mark.parametrize("places", [(8, 0), (0, 8), (4, 4), (4, 0), (0, 4)], ids=str)
def test_images_wear_what_their_row_does(places) -> None:
    runtime = patched(llava(), **SEEN)
    x = ids(2, 12)
    for row, count in enumerate(places):
        x[row, :count] = 98
    pixels = torch.randn(sum(places) // 4, 3, 16, 16)
    run = lambda: runtime.model(input_ids=x, attention_mask=torch.ones_like(x), pixel_values=pixels).logits  # noqa: E731
    assert_each_row_wears_its_own(runtime, ["a", "b"], run)
    assert_each_row_wears_its_own(runtime, [None, "a"], run)


def test_images_of_which_nobody_can_know_are_refused_or_said() -> None:
    model = clip()
    runtime = patched(model, **SEEN)
    x, pixels = ids(2, 6), torch.randn(3, 3, 16, 16)
    with runtime.route(["a", "b"]), pytest.raises(ValueError, match=r"vision_model.*images=\[…\]"):
        model(input_ids=x, pixel_values=pixels)
    with torch.no_grad(), runtime.route(["a", "b"], images=numpy.array([0, 1, 0])):
        seen = model(input_ids=x, pixel_values=pixels)
    for row, (name, images) in enumerate([("a", [0, 2]), ("b", [1])]):
        runtime.set_adapter(name)
        with torch.no_grad():
            alone = model(input_ids=x, pixel_values=pixels)
        torch.testing.assert_close(seen.image_embeds[images], alone.image_embeds[images])
        torch.testing.assert_close(seen.text_embeds[row], alone.text_embeds[row])
    for wrong in ([0, 2], ["a"], 0, "01"):
        with pytest.raises(ValueError, match="images must hold the row of each image"):
            runtime.route(["a", "b"], images=wrong)


def test_a_layer_that_is_called_outside_of_a_forward_has_no_rows() -> None:
    torch.manual_seed(0)
    runtime = patched(LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=99)))
    layer = runtime.model.model.layers[0].self_attn.k_proj
    with runtime.route(["a", "b"]), pytest.raises(ValueError, match="not known whose each element"):
        layer(torch.randn(2, 3, 32))


def test_seeing_changes_nothing() -> None:
    """The forward that is looked at draws, counts and fills its cache as any other."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=99, attention_dropout=0.3))
    runtime, x, results = patched(model), ids(3, 6), []
    model.train()
    calls: list[object] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with runtime.route(NAMES):
        for _ in range(2):
            torch.manual_seed(1)
            output = model(x, use_cache=True)
            results.append((output.logits, output.past_key_values.layers[0].keys, torch.rand(3)))
    assert len(calls) == 2
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


class Embedded(nn.Module):
    """Tokens through one projection, as the subclass arranges them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.v_proj = nn.Embedding(99, 16), nn.Linear(16, 16)


class Flat(Embedded):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.v_proj(self.embed(input_ids).flatten(0, 1)).unflatten(0, input_ids.shape)


class Unpadded(Embedded):
    def forward(self, input_ids: Tensor) -> Tensor:
        mask = input_ids != 0
        return torch.zeros(*mask.shape, 16).masked_scatter(mask.unsqueeze(-1), self.v_proj(self.embed(input_ids)[mask]))


class Sorted(Embedded):
    def forward(self, input_ids: Tensor) -> Tensor:
        order = (input_ids != 0).sum(1).argsort(descending=True, stable=True)
        return self.v_proj(self.embed(input_ids[order]))[order.argsort()]


def test_tokens_behind_one_another() -> None:
    model = Flat()
    runtime = patched(model, target_modules=["v_proj"], feedforward_modules=[])
    for length in (5, 1, 7, 3):  # a prompt, a token that is generated, other prompts
        x = ids(3, length)
        assert_each_row_wears_its_own(runtime, NAMES, lambda: model(x))  # noqa: B023


class Between(Embedded):
    """With a dimension of one between rows and tokens, as of heads that share what they read."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.v_proj(self.embed(input_ids)[:, None])[:, 0]


class TimeFirstBetween(Embedded):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.v_proj(self.embed(input_ids).transpose(0, 1)[None])[0].transpose(0, 1)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("make", [Between, TimeFirstBetween], ids=lambda make: make.__name__)
def test_tokens_behind_another_dimension(make, side) -> None:
    """Right, or refused by name: as many rows as tokens, so that anything broadcasts."""
    model, x = make(), ids(4, 4)
    runtime = patched(model, target_modules=["v_proj"], feedforward_modules=["v_proj"] if side == "in" else [])
    index = torch.arange(16).view(4, 4) % 3
    with torch.no_grad():
        worn = []
        for name in NAMES[:3]:
            runtime.set_adapter(name)
            worn.append(model(x))
        expected = torch.stack(worn).gather(0, index[None, :, :, None].expand(1, 4, 4, 16))[0]
        with runtime.route(NAMES[:3], index=index):
            if make is Between:
                torch.testing.assert_close(model(x), expected)
            else:
                with pytest.raises(ValueError, match="v_proj|a layer got"):
                    model(x)


class Reversed(Embedded):
    """As what reads both ways does, but over the rows."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.v_proj(self.embed(input_ids).flip(0)).flip(0)


class Rolled(Embedded):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.v_proj(self.embed(input_ids).roll(1, 0)).roll(-1, 0)


@pytest.mark.parametrize("rows", [2, 3, 4, 5])
@pytest.mark.parametrize("make", [Reversed, Rolled], ids=lambda make: make.__name__)
def test_another_order_of_the_rows_is_refused(make, rows) -> None:
    model = make()
    runtime = patched(model, target_modules=["v_proj"], feedforward_modules=[])
    with runtime.route(["a", "b", None, "a", "b"][:rows]), pytest.raises(ValueError, match="v_proj"):
        model(ids(rows, 6))


def by_gather(x: Tensor, order: list[int]) -> Tensor:
    return x.gather(0, torch.tensor(order)[:, None, None].expand(x.shape))


def by_cat(x: Tensor, order: list[int]) -> Tensor:
    return torch.cat([x[row : row + 1] for row in order])


def by_stack(x: Tensor, order: list[int]) -> Tensor:
    return torch.stack([x[row] for row in order])


class Ordered(Embedded):
    def __init__(self, ordered: Callable[[Tensor, list[int]], Tensor]) -> None:
        super().__init__()
        self.ordered = ordered

    def forward(self, input_ids: Tensor, order: tuple[int, ...]) -> Tensor:
        back = sorted(range(len(order)), key=order.__getitem__)
        return self.ordered(self.v_proj(self.ordered(self.embed(input_ids), list(order))), back)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("ordered", [by_gather, by_cat, by_stack])
def test_an_order_that_leaves_the_last_row_in_its_place_is_refused(ordered, grad) -> None:
    model, x = Ordered(ordered), ids(3, 6)
    runtime = patched(model, target_modules=["v_proj"], feedforward_modules=[])
    with torch.set_grad_enabled(grad), runtime.route(["a", "b", None]), pytest.raises(ValueError, match="v_proj"):
        model(x, (1, 0, 2))
    if ordered is not by_gather:  # of whose order only an index says that it is none
        runtime = patched(Ordered(ordered), target_modules=["v_proj"], feedforward_modules=[])
        assert_each_row_wears_its_own(runtime, ["a", "b", None], lambda: runtime.model(x, (0, 1, 2)))


@pytest.mark.parametrize("make", [Unpadded, Sorted], ids=lambda make: make.__name__)
def test_an_order_that_depends_on_the_batch_is_refused(make) -> None:
    model = make()
    runtime = patched(model, target_modules=["v_proj"], feedforward_modules=[])
    batches = [ids(2, 6), ids(2, 6), ids(2, 6)]
    batches[1][0, 2:], batches[2][1, 4:] = 0, 0
    refused = 0
    for x in batches:
        try:
            assert_each_row_wears_its_own(runtime, ["a", "b"], lambda: model(x))  # noqa: B023
        except ValueError as error:
            assert "v_proj" in str(error)
            refused += 1
    assert refused >= 2


class Turning(Embedded):
    """With the rows in one place for some batches and in another one for others; and for some nobody knows."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x, length = self.embed(input_ids), input_ids.shape[1]
        if length == 5:
            return self.v_proj(x.transpose(0, 1)).transpose(0, 1)
        return self.v_proj(x + x.mean(0)) if length == 9 else self.v_proj(x)


@pytest.mark.parametrize("lengths", [(6, 5, 6, 5), (5, 6, 4, 5), (9, 6, 9, 5, 6)], ids=str)
def test_a_batch_that_is_laid_out_in_another_way_is_none_for_those_after_it(lengths) -> None:
    model = Turning()
    runtime = patched(model, target_modules=["v_proj"], feedforward_modules=[])
    for length in lengths:
        x = ids(3, length)
        if length == 9:
            with runtime.route(NAMES), pytest.raises(ValueError, match="v_proj.*depends on several rows"):
                model(x)
            continue
        try:
            with runtime.route(NAMES):
                model(x)
        except ValueError as error:
            assert "v_proj" in str(error) and "Call the model again" in str(error)
        assert_each_row_wears_its_own(runtime, NAMES, lambda: model(x))  # noqa: B023


class Picked(Embedded):
    """As what has layers for the tokens of each modality: a layer has those of all rows that are of its kind."""

    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.pick = pick

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        result = x.clone()
        result[mask] = self.v_proj(self.pick(x, mask))
        return result


def of_each_row(*counts: int) -> Tensor:
    return torch.arange(12) < torch.tensor(counts)[:, None]


@pytest.mark.parametrize(
    "pick",
    [
        lambda x, mask: x[mask],
        lambda x, mask: x.flatten(0, 1)[mask.flatten().nonzero().squeeze(1)],
        lambda x, mask: x.masked_select(mask[..., None]).view(-1, x.shape[-1]),
        lambda x, mask: x[torch.where(mask)],
        lambda x, mask: torch.relu(x[mask].half()).float() * 2,
    ],
    ids=["mask", "nonzero", "masked_select", "where", "computed"],
)
@pytest.mark.parametrize("first", [(4, 4, 4), (1, 1, 1)])
def test_tokens_that_a_mask_picks_are_of_other_rows_in_the_next_batch(pick, first) -> None:
    """Of as many tokens in all, each row may have another number in the next batch."""
    model, x = Picked(pick), ids(3, 12)
    runtime = patched(model, target_modules=["v_proj"], feedforward_modules=[])
    for counts in (first, (first[0] - 1, first[1] + 1, first[2])):
        with runtime.route(["a", "b", None]), pytest.raises(ValueError, match="v_proj.*mask of this batch"):
            model(x, of_each_row(*counts))


def test_a_mask_that_leaves_all_tokens_picks_none() -> None:
    model, x = Picked(lambda x, mask: x[mask]), ids(3, 12)
    runtime = patched(model, target_modules=["v_proj"], feedforward_modules=[])
    assert_each_row_wears_its_own(runtime, NAMES, lambda: model(x, of_each_row(12, 12, 12)))
    with runtime.route(NAMES), pytest.raises(ValueError, match="v_proj"):
        model(x, of_each_row(12, 12, 11))


def test_what_is_picked_and_laid_out_by_row_again_is_known() -> None:
    """As BART's heads pick the end of each text, of which there are as many in each."""

    class Pooled(Embedded):
        def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
            x = self.embed(input_ids)
            return self.v_proj(x[mask, :].view(len(x), -1, x.shape[-1])[:, -1])

    model, x = Pooled(), ids(3, 12)
    runtime = patched(model, target_modules=["v_proj"], feedforward_modules=[])
    for count in (1, 2):
        assert_each_row_wears_its_own(runtime, NAMES, lambda: model(x, of_each_row(*[count] * 3)))  # noqa: B023


def test_rows_that_are_one_in_memory() -> None:
    """A prompt for each adapter, as `expand` makes it; and the batches after it are as right as if it were none."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=99))
    runtime, x = patched(model), ids(3, 6)
    for expanded in (x[:1].expand(3, -1), x, x[:1, :4].expand(3, -1)):
        assert_each_row_wears_its_own(runtime, NAMES, lambda: model(expanded).logits)  # noqa: B023
        embedded = model.get_input_embeddings()(expanded[:1]).detach().expand(3, -1, -1)
        assert_each_row_wears_its_own(runtime, NAMES, lambda: model(inputs_embeds=embedded).logits)  # noqa: B023


def test_a_forward_that_cannot_be_followed_is_none_that_says_where_rows_are() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=99))
    runtime, x = patched(model), ids(3, 6)
    broken = model.get_input_embeddings()(x).detach().clone()
    broken[2, 1, 4] = torch.nan
    with runtime.route(NAMES), pytest.raises(ValueError, match="no forward of rows with different adapters"):
        model(inputs_embeds=broken)
    assert_each_row_wears_its_own(runtime, NAMES, lambda: model(x).logits)
    assert_each_row_wears_its_own(runtime, NAMES, lambda: model(inputs_embeds=broken.nan_to_num(0.5)).logits)


def test_seeing_leaves_what_a_model_counts() -> None:
    class Counting(Embedded):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros((), dtype=torch.long))

        def forward(self, input_ids: Tensor) -> Tensor:
            self.total += input_ids.ne(0).sum()
            return self.v_proj(self.embed(input_ids))

    model = Counting()
    runtime = patched(model, target_modules=["v_proj"], feedforward_modules=[])
    with torch.no_grad(), runtime.route(["a", "b"]):
        for step in range(1, 4):
            model(ids(2, 6))
            assert model.total == 12 * step


@pytest.mark.parametrize("sites", [["v_proj"], ["v_proj", "head"]], ids=["known", "refused"])
def test_seeing_leaves_running_statistics(sites) -> None:
    """As BatchNorm keeps them in training; what comes after it depends on all rows."""

    class Normalised(Embedded):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.norm(self.v_proj(self.embed(input_ids)[:, 0])))

    truth, model = Normalised(), Normalised()
    runtime = patched(model, target_modules=sites, feedforward_modules=[])
    truth.train()(ids(3, 6)), model.train()
    with runtime.route([None, None, None]):
        model(ids(3, 6))
    torch.testing.assert_close(model.norm.state_dict(), truth.norm.state_dict())
    with runtime.route(NAMES):
        if "head" in sites:
            with pytest.raises(ValueError, match="head"):
                model(ids(3, 6))
        else:
            model(ids(3, 6))
    assert all(tensor.isfinite().all() for tensor in model.norm.state_dict().values())


class OfFeatures(nn.Module):
    """As sentence-transformers' models are: all inputs in one dictionary, and the results in it too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.auto_model = LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=99))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        features["token_embeddings"] = self.auto_model(**features).logits
        return features


def test_inputs_in_a_dictionary() -> None:
    model, x = OfFeatures(), ids(3, 6)
    given = lambda: {"input_ids": x, "attention_mask": torch.ones_like(x)}  # noqa: E731
    runtime = patched(model)
    assert_each_row_wears_its_own(runtime, NAMES, lambda: model(given())["token_embeddings"])
    with runtime.route(["a", "b"]), pytest.raises(ValueError, match="the route has 2 rows, but the batch has 3"):
        model(features=given())


def test_a_caller_that_sorts_the_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sentence-transformers' encode() does, by length."""
    package = ModuleType("sentence_transformers")
    exec("def predict(model, batch): return model(batch.flip(0)).logits.flip(0)", vars(package))
    torch.manual_seed(0)
    model, x = LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=99)), ids(3, 6)
    runtime = patched(model)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    with runtime.route(NAMES):
        model(x)
        with pytest.raises(ValueError, match=r"predict\(\) sorts what it is given by length"):
            package.predict(model, x)
    for names in (["a"] * 3, [None] * 3):
        with runtime.route(names):
            package.predict(model, x)


def test_images_are_spoken_of_where_there_are_some() -> None:
    text, seeing, x = Sorted(), patched(clip(), **SEEN), ids(2, 6)
    x[0, 2:] = 0
    runtime = patched(text, target_modules=["v_proj"], feedforward_modules=[])
    with runtime.route(["a", "b"]), pytest.raises(ValueError) as of_text:
        text(x)
    with seeing.route(["a", "b"]), pytest.raises(ValueError) as of_images:
        seeing.model(input_ids=ids(2, 6), pixel_values=torch.randn(3, 3, 16, 16))
    assert "images=[…]" not in str(of_text.value) and "images=[…]" in str(of_images.value)


@pytest.mark.parametrize("transform", ["grad", "vmap", "functionalize"])
def test_what_torch_func_transforms_is_seen_by_itself_before(transform) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=99)).eval()
    runtime, x = patched(model), ids(3, 5)
    weight, name = model.lm_head.weight.detach(), "lm_head.weight"

    def run(weight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: weight}, (x,), {"use_cache": False}).logits

    def transformed() -> Tensor:
        if transform == "grad":
            return torch.func.grad(lambda weight: run(weight).square().sum())(weight)
        return torch.func.vmap(run)(weight[None])[0] if transform == "vmap" else torch.func.functionalize(run)(weight)

    with runtime.route(NAMES):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"while torch.func transforms it .*: call the model once by itself"):
                transformed()
        assert all(not layer.ia3_layouts for layer in model.modules() if hasattr(layer, "ia3_layouts"))
    assert_each_row_wears_its_own(runtime, NAMES, lambda: model(x, use_cache=False).logits)
    with runtime.route(["b", "a", "a"]):
        given, leaf = transformed(), weight.clone().requires_grad_()
        logits = run(leaf)
        (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
    torch.testing.assert_close(given, gradient if transform == "grad" else logits.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("flat", [False, True])
def test_what_has_no_elements_says_nothing_of_the_rows(backend, flat) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k_proj, self.extra_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, some: int) -> Tensor:
            h = self.k_proj(x)
            part = h[:, :some].flatten(0, 1) if flat else h[:, :some]
            return h + self.extra_proj(part).view(len(x), some, 8).sum(1, keepdim=True)

    torch.manual_seed(0)
    model = Net().to(home(backend))
    runtime = patched(model, target_modules=["k_proj", "extra_proj"], feedforward_modules=[], backend=backend)
    x = torch.randn(3, 5, 8).to(home(backend))
    for some in (0, 2, 0, 2):
        assert_each_row_wears_its_own(runtime, NAMES, lambda: model(x, some))  # noqa: B023
