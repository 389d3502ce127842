"""`ia3rt combine`, `inspect A B`, `convert` and `merge`: from files to files, beside the Runtime, PEFT and numpy."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from commands import done, fails, run
from safetensors.torch import load_file, save_file
from tiny import TARGETS, logits, peft_model, save_each, tiny_model, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer
from words import save_tiny

import ia3rt
from ia3rt.adapters.checkpoint import read_checkpoint
from ia3rt.cli.main import app

IDS = token_ids()
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A tiny Llama, b and c which act everywhere, and d in one layer, at the queries, by a pattern."""
    folders = save_tiny(tmp_path)
    one = peft_model(
        tiny_model(), "llama", "d", target_modules=r".*layers\.1\.self_attn\.q_proj", feedforward_modules=[]
    )
    return {**folders, "d": save_each(one, tmp_path / "part")[0]}


WAYS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "product": ("bd", [], {}),
    "linear": ("bc", ["--weights", "-0.7,0.3"], {"weights": [-0.7, 0.3]}),
    "delta": ("bd", ["--weights=-0.5,2", "--normalize"], {"weights": [-0.5, 2], "normalize": True}),
    "ties": ("bcd", ["--density", "0.2", "--weights", "1,.5,2"], {"weights": [1, 0.5, 2], "density": 0.2}),
    "dare_ties": (
        "bd",
        ["--density", "0.4", "--seed", "3", "--majority-sign-method", "frequency"],
        {"density": 0.4, "seed": 3, "majority_sign_method": "frequency"},
    ),
    "dare_linear": ("bc", ["--density", "0.4"], {"density": 0.4}),
    "negate": ("d", [], {}),
    "slerp": ("bc", ["--weights", "0.25,0.75"], {"weights": [0.25, 0.75]}),
}


@pytest.mark.parametrize("kind", WAYS)
def test_combine_makes_what_the_runtime_makes_and_peft_loads_it(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    names, options, arguments = WAYS[kind]
    said = done("combine", *(folders[name] for name in names), "-o", tmp_path / "new", "--type", kind, *options)
    model = tiny_model()
    runtime = ia3rt.patch(model)
    for name in names:
        runtime.load_adapter(folders[name], name)
    runtime.add_weighted_adapter(list(names), arguments.pop("weights", None), "new", kind, **arguments)
    right = runtime.get_adapter("new").vectors
    read = read_checkpoint(tmp_path / "new").vectors
    assert {key: vector.flatten().tolist() for key, vector in read.items()} == {k: v.tolist() for k, v in right.items()}
    runtime.set_adapter("new")
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "new")
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    assert said["vectors"] == len(right) and said["combination"]["combination_type"] == kind
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert (config["task_type"], config["fan_in_fan_out"]) == ("CAUSAL_LM", False), "what all of them say"


def test_combine_by_importance(folders: dict[str, Path], tmp_path: Path) -> None:
    weighed = []
    for name, seed in (("b", 3), ("c", 4)):
        shutil.copytree(folders[name], tmp_path / f"of_{name}")
        tensors = load_file(folders[name] / FILE)
        generator = torch.Generator().manual_seed(seed)
        drawn = {key: torch.rand(each.shape, generator=generator) for key, each in tensors.items()}
        save_file(drawn, tmp_path / f"of_{name}" / FILE)
        weighed.append((tensors, drawn))
    both = ("--importances", tmp_path / "of_b", "--importances", tmp_path / "of_c")
    done("combine", folders["b"], folders["c"], "-o", tmp_path / "new", "--type", "fisher", *both)
    (b, of_b), (c, of_c) = weighed
    for key, vector in load_file(tmp_path / "new" / FILE).items():
        x, y, f, g = (each[key].double() for each in (b, c, of_b, of_c))
        torch.testing.assert_close(vector, ((f * x + g * y) / (f + g)).float(), rtol=1e-6, atol=1e-6)
    fails(run("combine", folders["b"], folders["c"], "-o", tmp_path / "x", "--type", "fisher", *both[:2]), 2, "1 given")
    assert not (tmp_path / "x").exists()


def test_importances_that_are_given_twice_are_told_by_their_option(folders: dict[str, Path], tmp_path: Path) -> None:
    twice = ["--type", "fisher", "--importances", folders["b"], "--importances", folders["b"]]
    result = run("combine", folders["b"], folders["c"], "-o", tmp_path / "out", *twice)
    fails(result, 2, "--importances", f"'{folders['b']}' is given twice")


def test_a_base_model_that_is_no_name(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["c"] / CONFIG).read_text())
    (folders["c"] / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": {"a": 1}}))
    both = (folders["b"], folders["c"], "-o", tmp_path / "out")
    fails(run("combine", *both), 1, f"adapter '{folders['c']}' says base_model_name_or_path={{'a': 1}}", "--base-model")
    done("combine", *both, "--base-model", "llama")


def test_a_report_that_cannot_be_printed_says_that_the_adapter_is_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, options in enumerate(([], ["--json"])):
        output = tmp_path / str(number)
        with open("/dev/full", "w") as full, pytest.raises(SystemExit, match="1"):
            monkeypatch.setattr(sys, "stdout", full)
            app(["convert", str(folders["b"]), "-o", str(output), *options])
        assert "is written, but the report on it cannot be printed" in " ".join(capfd.readouterr().err.split())
        assert read_checkpoint(output).vectors


def test_a_report_in_ascii(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = folders["b"].rename(tmp_path / "é")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="0"):
        patch.setattr(sys, "stdout", stdout := io.TextIOWrapper(io.BytesIO(), "ascii"))
        app(["inspect", str(output)])
    assert b"\\xe9" in stdout.buffer.getvalue()


def with_head(folders: dict[str, Path], head: torch.Tensor, dtype: torch.dtype) -> Path:
    """Makes b an adapter with a head of its own, all its numbers of one dtype."""
    tensors = {**load_file(folders["b"] / FILE), "base_model.model.score.weight": head}
    save_file({key: each.to(dtype) for key, each in tensors.items()}, folders["b"] / FILE)
    config = json.loads((folders["b"] / CONFIG).read_text())
    (folders["b"] / CONFIG).write_text(json.dumps({**config, "modules_to_save": ["score"]}))
    return folders["b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_nan_in_an_own_head_is_refused_as_it_is_when_it_is_loaded(
    dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, output = with_head(folders, torch.full((3, 32), torch.nan), dtype), tmp_path / "out"
    for command in (["convert", folder], ["combine", folder, folders["c"]]):
        fails(run(*command, "-o", output), 1, f"'{folder}' has a NaN or inf in 'weight' of its own module 'score'")
    assert run("inspect", folder).exit_code == 1 and not output.exists()


def test_numbers_of_eight_bits_are_converted_as_they_are(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_head(folders, torch.ones(3, 32), torch.float8_e4m3fn)
    done("convert", folder, "-o", tmp_path / "out")
    given, made = load_file(folder / FILE), load_file(tmp_path / "out" / FILE)
    assert given.keys() == made.keys()
    assert all(each.dtype == made[key].dtype and torch.equal(each, made[key]) for key, each in given.items())
    done("combine", folder, folders["c"], "-o", tmp_path / "both")
    assert run("inspect", folder).exit_code == 0


def test_combine_keeps_an_own_head(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    def classifier() -> Any:
        torch.manual_seed(0)
        config = tiny_model().config
        config.num_labels, config.pad_token_id = 3, 0
        return LlamaForSequenceClassification(config).eval()

    config = peft.IA3Config(**TARGETS["llama"], task_type="SEQ_CLS")
    wrapped = peft.get_peft_model(classifier(), config, adapter_name="s")
    wrapped.save_pretrained(tmp_path)
    said = done("combine", tmp_path / "s", folders["b"], "-o", tmp_path / "new")
    assert [own["path"] for own in said["modules"]] == ["score"]
    loaded = peft.PeftModel.from_pretrained(classifier(), tmp_path / "new").eval()
    runtime = ia3rt.patch(model := classifier())
    runtime.load_adapter(tmp_path / "s")
    runtime.load_adapter(folders["b"])
    runtime.set_adapter(["s", "b"])
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    result = run("combine", tmp_path / "s", tmp_path / "t", "-o", tmp_path / "no")
    fails(result, 1, "each have their own module 'score'")


def test_combine_loads_no_model(folders: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from ia3rt.cli.main import app; app(['combine', *sys.argv[1:3], '-o', sys.argv[3]], "
        "standalone_mode=False); sys.exit(3 * any(name in sys.modules for name in ('transformers', 'peft')))"
    )
    command = [sys.executable, "-c", code, *(str(folders[name]) for name in "bc"), str(tmp_path / "new")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "6 vectors, 320 numbers" in ran.stdout and not ran.stderr.strip()


def says(folder: Path, model: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": model}))


def test_adapters_of_different_models_are_not_combined(folders: dict[str, Path], tmp_path: Path) -> None:
    says(folders["b"], "some/one")
    says(folders["c"], "some/other")
    both = folders["b"], folders["c"], "-o", tmp_path / "new"
    fails(run("combine", *both), 1, "were trained on different models", "some/one", "some/other", "--base-model")
    assert not (tmp_path / "new").exists()
    done("combine", *both, "--base-model", "the/same")
    assert json.loads((tmp_path / "new" / CONFIG).read_text())["base_model_name_or_path"] == "the/same"


def _wider(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    save_file(
        {key: torch.cat([each, each], dim=int(each.shape[0] == 1)) for key, each in tensors.items()}, folder / FILE
    )


def _nan(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, folder / FILE)


@pytest.mark.parametrize(
    ("change", "options", "code", "parts"),
    [
        (_wider, [], 1, ["of different models: at 'model.layers.0.", "(1, 96), the other of (1, 192)"]),
        (_nan, [], 1, ["has a NaN or inf at model.layers.0"]),
        (lambda folder: (folder / FILE).unlink(), [], 1, ["the adapter's numbers are missing"]),
        (None, ["--type", "dare_ties"], 1, ["'dare_ties' needs a density"]),
        (None, ["--type", "ties", "--density", "1.1"], 1, ["density is 1.1"]),
        (None, ["--type", "ties", "--density", "0.001"], 1, ["keeps none of 96 numbers"]),
        (None, ["--type", "TIES", "--density", "0.5"], 1, ["unknown combination_type 'TIES': use one of"]),
        (None, ["--type", "power"], 1, ["have different signs", "model.layers.0."]),
        (None, ["--type", "linear", "--weights", "1"], 1, ["1 weights for 2 adapters"]),
        (None, ["--type", "linear", "--weights", "1;2"], 2, ["--weights", "'1;2' is no list of numbers"]),
        (None, ["--seed", "1"], 1, ["'product' takes no seed"]),
    ],
)
def test_combine_refuses_and_writes_nothing(
    change: Any, options: list[str], code: int, parts: list[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    if change is not None:
        change(folders["c"])
    before = sorted(tmp_path.rglob("*"))
    fails(run("combine", folders["b"], folders["c"], "-o", tmp_path / "new" / "inner", *options), code, *parts)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["combine", "convert", "merge"])
def test_what_is_there_is_not_overwritten(command: str, folders: dict[str, Path]) -> None:
    what = [folders["model"], folders["b"]] if command == "merge" else [folders["b"]]
    before = {file: file.read_bytes() for file in folders["c"].iterdir()}
    fails(run(command, *what, "-o", folders["c"]), 1, f"{folders['c']} is there already, and is not overwritten")
    assert {file: file.read_bytes() for file in folders["c"].iterdir()} == before


def test_an_empty_folder_is_taken(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done("convert", folders["b"], "-o", tmp_path / "empty")
    config = json.loads((folders["b"] / CONFIG).read_text())
    again = json.loads((tmp_path / "empty" / CONFIG).read_text())
    named = ("target_modules", "feedforward_modules")
    assert {**again, **{key: config[key] for key in named}} == config
    modes = [file.stat().st_mode for file in (tmp_path, tmp_path / "empty")]
    (tmp_path / "usual").mkdir()
    assert modes[1] == (tmp_path / "usual").stat().st_mode, "who may read it is as usual"


def test_a_write_that_fails_leaves_nothing(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    from ia3rt.adapters import checkpoint

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.json, "dumps", full)  # the config, after the numbers
    before = sorted(tmp_path.rglob("*"))
    fails(run("convert", folders["b"], "-o", tmp_path / "new"), 1, "No space left on device")
    assert sorted(tmp_path.rglob("*")) == before


def changes(folder: Path) -> dict[str, np.ndarray]:
    return {key: each.double().numpy().ravel() - 1 for key, each in load_file(folder / FILE).items()}


def test_inspect_of_several_compares_them(folders: dict[str, Path]) -> None:
    said = done("inspect", folders["b"], folders["c"], folders["d"])
    assert [Path(name).name for name in said["adapters"]] == ["b", "c", "d"]
    bc, bd, _ = said["pairs"]
    b, c = changes(folders["b"]), changes(folders["c"])
    for part, agreement in (("", bc["overall"]), *((f".{name}.", each) for name, each in bc["groups"].items())):
        keys = [key for key in sorted(b) if part in key]
        x, y = (np.concatenate([each[key] for key in keys]) for each in (b, c))
        assert agreement["cosine"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        both = (x != 0) & (y != 0)
        assert agreement["both_change"] == both.sum() > 0
        assert agreement["same_sign"] == pytest.approx((np.sign(x) == np.sign(y))[both].mean())
    assert set(bc["groups"]) == {"mlp.down_proj", "self_attn.k_proj", "self_attn.v_proj"}
    assert (bc["shared"], bc["only"], bd["shared"], bd["only"]) == (6, [0, 0], 0, [6, 1])
    assert bd["overall"] == {"cosine": 0.0, "both_change": 0, "same_sign": None}
    printed = run("inspect", folders["b"], folders["c"])
    assert printed.exit_code == 0
    assert "b · c" in printed.output and f"{bc['overall']['cosine']:.3f}" in printed.output
    assert f"{bc['groups']['self_attn.k_proj']['same_sign']:.1%}" in printed.output


def test_inspect_sees_what_cannot_be_combined(folders: dict[str, Path]) -> None:
    _wider(folders["c"])
    says(folders["b"], "some/one")
    says(folders["c"], "some/other")
    result = run("inspect", folders["b"], folders["c"])
    assert result.exit_code == 0
    assert "b and c are of two models: their vectors differ in size at model.layers.0." in result.output
    assert "Their configs name different base models." in result.output
    _nan(folders["c"])
    assert run("inspect", folders["b"], folders["c"]).exit_code == 1
    fails(run("inspect", folders["b"], folders["d"], "--revision", "x"), 2, "go with one adapter")


def test_combine_of_one_by_delta_asks_for_its_weight(folders: dict[str, Path], tmp_path: Path) -> None:
    command = ("combine", folders["b"], "-o", tmp_path / "new", "--type", "delta")
    fails(run(*command), 1, "'delta' of one adapter needs its weight", "0.85 each, is for two or more")
    assert not (tmp_path / "new").exists()
    assert done(*command, "--weights", "0.5")["combination"]["weights"] == [0.5]


def test_inspect_of_one_as_json(folders: dict[str, Path]) -> None:
    said = done("inspect", folders["b"])
    assert (said["vectors"], said["numbers"], said["fit"]["layers"]) == (6, 320, 2)


def test_convert_keeps_pefts_numbers_and_dtype(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = {key: each.bfloat16() for key, each in load_file(folders["b"] / FILE).items()}
    (folders["b"] / FILE).unlink()
    torch.save(tensors, folders["b"] / "adapter_model.bin")
    done("convert", folders["b"], "-o", tmp_path / "new")
    written = load_file(tmp_path / "new" / FILE)
    assert written.keys() == tensors.keys()
    assert all(written[key].dtype == torch.bfloat16 and torch.equal(written[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("names", ["b", "bd"])
def test_merge_writes_a_plain_model(names: str, folders: dict[str, Path], tmp_path: Path) -> None:
    said = done("merge", folders["model"], *(folders[name] for name in names), "-o", tmp_path / "merged")
    assert (said["architecture"], said["dtype"], said["left_out"]) == ("LlamaForCausalLM", "float32", [])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    runtime = ia3rt.patch(model := tiny_model())
    for name in names:
        runtime.load_adapter(folders[name], name)
    runtime.set_adapter(list(names))
    torch.testing.assert_close(logits(merged, IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("good").input_ids == [2]
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_merge_refuses_and_writes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    gpt2 = save_each(peft_model(tiny_model("gpt2"), "gpt2", "b"), tmp_path / "other")[0]
    before = sorted(tmp_path.rglob("*"))
    output = ("-o", tmp_path / "merged")
    fails(run("merge", folders["model"], gpt2, *output), 1, "does not fit")
    fails(run("merge", tmp_path / "nowhere", folders["b"], *output), 2, "MODEL", "nowhere' is not there: give")
    fails(run("merge", "./nowhere", folders["b"], *output), 2, "MODEL", "'nowhere' is not there: give the folder")
    fails(run("merge", "no/such/model", folders["b"], *output), 2, "MODEL", "'no/such/model', which is no folder here")
    fails(run("merge", folders["model"] / "config.json", folders["b"], *output), 2, "config.json is a file: give the")
    fails(run("merge", folders["model"], folders["b"], folders["b"], *output), 2, "is given twice")
    fails(run("merge", folders["model"], folders["model"], *output), 1, "but a model")
    config = json.loads((folders["model"] / "config.json").read_text())
    (folders["model"] / "config.json").write_text(json.dumps(config | {"architectures": ["MyOwnModel"]}))
    fails(run("merge", folders["model"], folders["b"], *output), 2, "class MyOwnModel, which transformers lacks")
    assert sorted(tmp_path.rglob("*")) == before
