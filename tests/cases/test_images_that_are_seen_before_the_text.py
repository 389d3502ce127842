"""Images of rows that wear different adapters, where the part that sees them is run by itself: `generate` does that."""

import pytest
import torch
from pictures import PICTURE, SEEN, SIZE, clip, ids, llava
from tiny import patched
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import ia3rt

GENERATED = dict(max_new_tokens=2, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True)


def batch(*images: int) -> dict[str, Tensor]:
    """Rows of 12 tokens, with so many images each, of four tokens."""
    x = ids(len(images), 12)
    for row, count in enumerate(images):
        x[row, : 4 * count] = PICTURE
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(sum(images), 3, 16, 16, generator=generator)
    return dict(input_ids=x, attention_mask=torch.ones_like(x), pixel_values=pixels)


def first_logits(model: nn.Module, given: dict[str, Tensor], **more: object) -> Tensor:
    return torch.stack(model.generate(**given, **{**GENERATED, **more}).logits)


def worn_by_all(runtime: ia3rt.Runtime, names: list, given: dict[str, Tensor], **more: object) -> Tensor:
    """What each row's adapter gives where all rows wear it: [steps, rows, vocabulary] of each row's own."""
    rows = []
    for row, name in enumerate(names):
        runtime.set_adapter(name)
        each = first_logits(runtime.model, given, **more)
        times = each.shape[1] // len(names)
        rows.append(each[:, row * times : (row + 1) * times])
    runtime.set_adapter(None)
    assert not torch.allclose(rows[0], first_logits(runtime.model, given, **more)[:, : rows[0].shape[1]], atol=1e-3)
    return torch.cat(rows, 1)


@pytest.mark.parametrize("images", [(1, 1), (2, 0), (0, 2), (1, 0)], ids=str)
@pytest.mark.parametrize("sequences", [1, 2])
def test_generate_has_an_image_wear_what_the_row_does_that_shows_it(images, sequences) -> None:
    runtime, given = patched(llava(), **SEEN), batch(*images)
    more = {} if sequences == 1 else dict(num_beams=2, num_return_sequences=2, output_scores=True, max_new_tokens=1)
    with runtime.route(["a", "b"]):
        routed = first_logits(runtime.model, given, **more)
    torch.testing.assert_close(routed, worn_by_all(runtime, ["a", "b"], given, **more), rtol=1e-4, atol=1e-5)


def test_generate_has_an_image_wear_what_the_route_says() -> None:
    """Which no count of tokens could: the second row's adapter sees the first row's image."""
    runtime, given = patched(llava(), **SEEN), batch(1, 1)
    with runtime.route(["a", "b"], images=[1, 0]):
        crossed = first_logits(runtime.model, given)
    seen = []
    for name in "ba":
        runtime.set_adapter(name)
        seen.append(runtime.model.model.get_image_features(given["pixel_values"]).pooler_output)
    told = [torch.stack([seen[0][0], seen[1][1]]), torch.stack([seen[0][0], seen[1][1]])]
    given = {name: each for name, each in given.items() if name != "pixel_values"}
    rows = []
    for row, name in enumerate("ab"):
        runtime.set_adapter(name)
        embedded = runtime.model.get_input_embeddings()(given["input_ids"]).detach().clone()
        embedded[given["input_ids"] == PICTURE] = told[row].flatten(0, 1).detach()
        rows.append(runtime.model(inputs_embeds=embedded, attention_mask=given["attention_mask"]).logits[row, -1])
    torch.testing.assert_close(crossed[0], torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_adapters_of_the_text_alone_ask_nothing_of_images() -> None:
    """Of as many as there are: Llava's in other numbers than rows, and Qwen2-VL's in pieces."""
    runtime = patched(llava(), target_modules=r".*language_model.*v_proj", feedforward_modules=[])
    for images in ((2, 1), (1, 1)):
        given = batch(*images)
        with runtime.route(["a", "b"]):
            routed = first_logits(runtime.model, given)
        torch.testing.assert_close(routed, worn_by_all(runtime, ["a", "b"], given), rtol=1e-4, atol=1e-5)

    torch.manual_seed(0)
    text = dict(
        SIZE, vocab_size=100, num_key_value_heads=2, rope_parameters={"type": "mrope", "mrope_section": [1, 1, 2]}
    )
    sight = dict(depth=1, embed_dim=16, num_heads=2, hidden_size=32, patch_size=4, spatial_merge_size=2)
    tokens = dict(image_token_id=PICTURE, vision_start_token_id=96, vision_end_token_id=97, video_token_id=95)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=sight, **tokens))
    runtime = patched(model, target_modules=r".*language_model.*v_proj", feedforward_modules=[])
    x = ids(2, 8)
    x[:, 0], x[:, 1:5] = 96, PICTURE
    kinds = (x == PICTURE).int()
    patches = torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    given = dict(input_ids=x, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=kinds)
    with runtime.route(["a", "b"]):
        routed = first_logits(model, given)
    torch.testing.assert_close(routed, worn_by_all(runtime, ["a", "b"], given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [None, [0, 1, 2], [2, 0, 1], [1, 1, 0]], ids=str)
def test_features_of_images_alone_are_of_the_rows_that_the_route_says(images) -> None:
    """One a row in their order where it does not say; and the whole model's forward is as right after it."""
    runtime, names = patched(clip(), **SEEN), ["a", "b", None]
    pixels, x = torch.randn(3, 3, 16, 16), ids(3, 6)
    with torch.no_grad():
        with runtime.route(names, images=images):
            features = runtime.model.get_image_features(pixels).pooler_output
        with runtime.route(names, images=[2, 0, 1]):
            whole = runtime.model(input_ids=x, pixel_values=pixels).image_embeds
        for image in range(3):
            runtime.set_adapter(names[image if images is None else images[image]])
            alone = runtime.model.get_image_features(pixels[image : image + 1]).pooler_output
            torch.testing.assert_close(features[image : image + 1], alone)
            runtime.set_adapter(names[[2, 0, 1][image]])
            torch.testing.assert_close(
                whole[image], runtime.model(input_ids=x, pixel_values=pixels).image_embeds[image]
            )


def test_features_of_images_that_are_no_rows_are_refused_where_a_vector_acts() -> None:
    runtime = patched(clip(), **SEEN)
    with runtime.route(["a", "b"]), pytest.raises(ValueError, match=r"vision_model.*images=\[…\]"):
        runtime.model.get_image_features(torch.randn(3, 3, 16, 16))
