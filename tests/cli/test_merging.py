"""`ia3rt merge`: no weight is invented, no tokenizer either, no code is run; what is wrong is one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from commands import done, fails, run
from safetensors.torch import load_file, save_file
from tiny import TARGETS, logits, token_ids
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from words import save_tiny

from ia3rt.cli.input_files import _PATTERNS

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return save_tiny(tmp_path)


def refused(folders: dict[str, Path], *parts: str) -> None:
    """That merging says so in one line, and writes nothing."""
    output = folders["model"].parent / "out"
    result = run("merge", folders["model"], folders["b"], "-o", output, "--json")
    fails(result, 2, "MODEL", *parts)
    assert "Traceback" not in result.output and not result.stdout and not output.exists()
    assert not list(output.parent.glob(".*"))


def edit(folder: Path, **said: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))


def weights_of(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def test_weights_that_are_missing_are_not_invented(folders: dict[str, Path]) -> None:
    weights_of(folders["model"], lambda tensors: tensors.pop(UP))
    refused(folders, "lacks weights of LlamaForCausalLM", UP, "random")


def test_a_head_that_is_missing_is_not_invented(folders: dict[str, Path]) -> None:
    edit(folders["model"], architectures=[LlamaForSequenceClassification.__name__])
    refused(folders, "lacks weights of LlamaForSequenceClassification", "score.weight", "architectures")


def with_head(model: Path, folder: Path, labels: int) -> torch.Tensor:
    """Saves an adapter with a head as PEFT's users train one, beside a model of another class; what it gives."""
    loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels, pad_token_id=0)
    config = peft.IA3Config(**TARGETS["llama"], task_type="SEQ_CLS", init_ia3_weights=False)
    wrapped = peft.get_peft_model(loaded, config)
    wrapped.save_pretrained(folder)
    return logits(wrapped.eval(), token_ids())


def test_an_adapter_with_a_head_of_its_own_says_the_class(folders: dict[str, Path], tmp_path: Path) -> None:
    right = with_head(folders["model"], tmp_path / "topics", 5)
    said = done("merge", folders["model"], tmp_path / "topics", "-o", tmp_path / "out")
    assert said["architecture"] == "LlamaForSequenceClassification"
    edit(tmp_path / "out", pad_token_id=0)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged, token_ids()), right, rtol=1e-4, atol=1e-5)
    weights_of(folders["model"], lambda tensors: tensors.pop(UP))
    fails(run("merge", folders["model"], tmp_path / "topics", "-o", tmp_path / "no"), 2, f"loaded as: {UP}.")


@pytest.mark.parametrize(("task", "labels"), [("SEQ_CLS", 3), ("TOKEN_CLS", 32), ("QUESTION_ANS", 2)])
def test_labels_are_counted_where_the_class_has_them(task: str, labels: int, tmp_path: Path) -> None:
    """DistilBERT's class for sequences has a square layer before its last, its one for questions two labels always."""
    sizes = dict(vocab_size=64, dim=32, hidden_dim=48, n_layers=1, n_heads=4, max_position_embeddings=64)
    transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes)).save_pretrained(tmp_path / "model")
    auto = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    }[task]
    config = peft.IA3Config(
        task_type=task,
        target_modules=["k_lin", "v_lin", "lin2"],
        feedforward_modules=["lin2"],
        init_ia3_weights=False,
    )
    wrapped = peft.get_peft_model(auto.from_pretrained(tmp_path / "model", num_labels=labels), config).eval()
    wrapped.save_pretrained(tmp_path / "a")
    done("merge", tmp_path / "model", tmp_path / "a", "-o", tmp_path / "out")
    merged, ids = auto.from_pretrained(tmp_path / "out").eval(), token_ids() % 64
    with torch.no_grad():
        made, right = merged(ids), wrapped(ids)
    torch.testing.assert_close(made[0], right[0], rtol=1e-4, atol=1e-5)
    assert merged.config.num_labels == labels


def test_weights_of_another_size_are_named(folders: dict[str, Path]) -> None:
    weights_of(folders["model"], lambda tensors: tensors.update({UP: torch.ones(3, 5)}))
    refused(folders, "does not fit its own config", f"{UP} has (3, 5) and not")


def test_weights_that_the_class_has_no_place_for_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    weights_of(folders["model"], lambda tensors: tensors.update(extra=torch.ones(2)))
    said = done("merge", folders["model"], folders["b"], "-o", tmp_path / "out")
    assert said["left_out"] == ["extra"]
    result = run("merge", folders["model"], folders["b"], "-o", tmp_path / "again")
    assert "extra have no place in LlamaForCausalLM" in result.stderr


def test_weights_that_are_cast_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    assert done("merge", folders["model"], folders["b"], "-o", tmp_path / "same")["cast_from"] == []
    weights_of(folders["model"], lambda tensors: tensors.update({UP: tensors[UP].half()}))
    result = run("merge", folders["model"], folders["b"], "-o", tmp_path / "out")
    assert "in float32 (its files have float16, float32)" in result.stdout
    file = folders["model"] / "model.safetensors"
    torch.save({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file.with_name("pytorch_model.bin"))
    file.unlink()
    assert done("merge", folders["model"], folders["b"], "-o", tmp_path / "pickled")["cast_from"] == ["bfloat16"]


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None])
def test_a_damaged_file_of_weights(content: bytes | None, folders: dict[str, Path]) -> None:
    file = folders["model"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8] if content is None else content)
    refused(folders, str(folders["model"]))


def test_a_pickle_that_is_none(folders: dict[str, Path]) -> None:
    (folders["model"] / "model.safetensors").unlink()
    (folders["model"] / "pytorch_model.bin").write_bytes(b"nothing of torch's")
    refused(folders, str(folders["model"]))


@pytest.mark.parametrize("names", [["torch"], ["logging"], [3], [], "LlamaForCausalLM", None, [""]])
def test_architectures_that_name_no_model(names: Any, folders: dict[str, Path]) -> None:
    edit(folders["model"], architectures=names)
    refused(folders, str(folders["model"]))


def test_a_quantised_model_whose_package_is_missing(folders: dict[str, Path]) -> None:
    edit(folders["model"], quantization_config={"quant_method": "awq", "bits": 4})
    refused(folders, str(folders["model"]))


def own_code(folder: Path, ran: Path) -> None:
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")


def test_code_of_a_models_own_is_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    own_code(folders["model"], tmp_path / "ran")
    edit(folders["model"], model_type="own", auto_map={"AutoConfig": "own.Config"})
    refused(folders, "needs code of its own, which is not run here")
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizers_own_is_neither_run_nor_copied(folders: dict[str, Path], tmp_path: Path) -> None:
    own_code(folders["model"], tmp_path / "ran")
    config = folders["model"] / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    said = done("merge", folders["model"], folders["b"], "-o", tmp_path / "out")
    assert said["not_copied"] == ["own.py"] and not (tmp_path / "out" / "own.py").exists()
    assert (tmp_path / "out" / config.name).read_bytes() == config.read_bytes()
    assert not (tmp_path / "ran").exists()


def test_no_tokenizer_is_invented(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in TOKENIZER:
        (folders["model"] / name).unlink()
    assert done("merge", folders["model"], folders["b"], "-o", tmp_path / "out")["copied"] == []
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("text", ["{}", "{nope"])
def test_input_files_are_copied_as_they_are(text: str, folders: dict[str, Path], tmp_path: Path) -> None:
    (folders["model"] / "tokenizer.json").write_text(text)
    (folders["model"] / "additional_chat_templates").mkdir()
    more = {"chat_template.jinja", "additional_chat_templates/tools.jinja", "preprocessor_config.json", "vocab.txt"}
    for name in more:
        (folders["model"] / name).write_text(name)
    (folders["model"] / "training_args.bin").write_text("not this")
    copied = done("merge", folders["model"], folders["b"], "-o", tmp_path / "out")["copied"]
    assert set(copied) == {*TOKENIZER, *more}
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (folders["model"] / name).read_bytes()


def test_what_processors_save_besides_is_copied(folders: dict[str, Path], tmp_path: Path) -> None:
    more = {
        "word_shape.json",
        "speaker_embeddings_path.json",
        "speaker_embeddings/v2/en_semantic.npy",
        "alphabet.json",
        "language_model/unigrams.txt",
        "qformer_tokenizer/tokenizer_config.json",
        "qformer_tokenizer/tokenizer.json",
    }
    others = {"qformer_tokenizer/notes.md", "checkpoint-5/config.json", "mine/adapter_config.json"}
    others |= {"checkpoint-5/tokenizer_config.json", "mine/tokenizer_config.json"}
    for name in more | others:
        (folders["model"] / name).parent.mkdir(parents=True, exist_ok=True)
        (folders["model"] / name).write_text(name)
    copied = done("merge", folders["model"], folders["b"], "-o", tmp_path / "out")["copied"]
    assert set(copied) == {*TOKENIZER, *more}
    assert all((tmp_path / "out" / name).read_text() == name for name in more)


def test_files_of_all_tokenizers_of_transformers_are_known() -> None:
    written = " ".join(
        file.read_text() for file in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")
    )
    names = set(re.findall(r'"\w+_file": "([^"]+\.\w+)"', written))
    assert {"vocab.txt", "word_pronunciation.json", "spiece.model"} <= names
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in _PATTERNS)] == []


@pytest.mark.parametrize("command", ["merge", "combine"])
def test_the_same_folder_by_another_path(
    command: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders["b"].parent)
    Path("link").symlink_to("b")
    model = [folders["model"]] if command == "merge" else []
    for other in ("b/", "./b", "link", folders["b"]):
        fails(run(command, *model, "b", other, "-o", tmp_path / "out"), 2, "is given twice", "first as 'b'")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    before = (tmp_path / "out").stat().st_ino
    done("merge", folders["model"], folders["b"], "-o", tmp_path / "out")
    assert (tmp_path / "out").stat().st_ino == before and not list((tmp_path / "out").glob(".*"))


def test_sigterm_cleans_up(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ia3rt.cli import files

    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def unheeded(*_: Any) -> None:  # so that it ends the test only
        raise AssertionError("the command did not heed the signal")

    monkeypatch.setattr(files, "write_checkpoint", killed)
    before = sorted(tmp_path.rglob("*"))
    earlier = signal.signal(signal.SIGTERM, unheeded)
    try:
        assert run("convert", folders["b"], "-o", tmp_path / "out").exit_code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is unheeded, "it is given back"
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_inside_is_told_as_a_command_takes_it(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["b"], tmp_path / "outer" / "mine")
    result = run("merge", folders["model"], tmp_path / "outer", "-o", tmp_path / "out")
    fails(result, 1, f"Give {str(tmp_path / 'outer' / 'mine')!r}")
    assert "load_adapter" not in result.output


def test_a_pickle_with_code_is_refused_without_advice_to_run_it(folders: dict[str, Path], tmp_path: Path) -> None:
    (folders["b"] / "adapter_model.safetensors").unlink()
    torch.save({"x": os.getcwd}, folders["b"] / "adapter_model.bin")
    result = run("convert", folders["b"], "-o", tmp_path / "out")
    fails(result, 1, "what would run code is not loaded")
    assert "weights_only" not in result.output
