"""A tokenizer of a few words, and a tiny model on disk that has it."""

from pathlib import Path

from tiny import peft_model, save_each, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<unk>", "good", "bad", "positive", "negative", *(f"w{i}" for i in range(40))]


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    made.padding_side = "left"
    return made


def save_tiny(folder: Path) -> dict[str, Path]:
    """The folders of a tiny Llama with its tokenizer, and of two adapters of it."""
    model = tiny_model()
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    b, c = save_each(peft_model(model, "llama", "bc"), folder / "adapters")
    return {"model": folder / "model", "b": b, "c": c}
