"""What the tests of a real server share: a model, adapters, the truth about both, and the server."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# Fewer slots than adapters, and less room in the cache behind them: adapters lose their places and are read again.
OPTIONS = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--enable-lora", "--max-lora-rank", "8"]
OPTIONS += ["--max-loras", "6", "--max-cpu-loras", "12", "--block-size", "32", "--max-num-seqs", "16"]

# Of a small model, which has no chat template of its own; with all of vLLM's endpoints for generation.
SMALL = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--enable-lora", "--max-lora-rank", "8"]
SMALL += ["--max-loras", "4", "--max-cpu-loras", "16", "--enable-scale-out"]
SMALL += ["--chat-template", "{% for message in messages %}{{ message['content'] }}{% endfor %}"]

# They import vLLM's own classes, and run in an environment of their own, alone (.ci/serving).
OF_VLLM = """
    access activations bodies composed_mixes every_door failing finite identity keeping kinds layers loading memory
    model_manager numbers offline origins pipeline_parallel placing poison requests server soak stages store_server
    symbols tensor_parallel unfit
"""
of_vllm = {f"test_{name}.py" for name in OF_VLLM.split()}

if importlib.util.find_spec("vllm") is None:
    collect_ignore = sorted(of_vllm)
else:
    collect_ignore = [file.name for file in Path(__file__).parent.glob("test_*.py") if file.name not in of_vllm]

    from safetensors.torch import load_file, save_file
    from server import Server
    from small_model import save_small_model
    from truth import ADAPTERS, Truth, make_lora, save_smollm2
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.utils.network_utils import get_open_port

    from ia3rt.serving.vllm import keeping, register

    @pytest.fixture(scope="session")
    def one_process() -> Iterator[None]:
        """vLLM's state, as its layers need it to be made."""
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
            initialize_model_parallel(1)
            yield

    @pytest.fixture
    def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The plugin in this process, with a store of the test's own, where clients may load."""
        register()
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
        monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        keeping.keeping.cache_clear()

    @pytest.fixture(scope="session")
    def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("smollm2")
        save_smollm2(folder)
        return folder

    @pytest.fixture(scope="session")
    def truth(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Truth:
        truth = Truth(model, tmp_path_factory.mktemp("adapters"))
        for seed, name in enumerate([*ADAPTERS, "other"]):
            truth.make_adapter(name, seed)
        make_lora(model, truth.folder / "lora")
        return truth

    @pytest.fixture(scope="session")
    def starting(model: Path, truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        """The server, which may not be up yet."""
        modules = [f"{name}={truth.folder / name}" for name in (*ADAPTERS, "lora")]
        server = Server(model, [*OPTIONS, "--lora-modules", *modules], tmp_path_factory.mktemp("server"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(truth.folder))
            server.start()
            yield server
        server.kill()

    @pytest.fixture
    def server(starting: Server) -> Server:
        starting.wait()
        return starting

    @pytest.fixture(scope="session")
    def small_truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
        """Adapters a and b, a LoRA, and `large`, an adapter that is too large."""
        model = tmp_path_factory.mktemp("small")
        save_small_model(model)
        made = Truth(model, tmp_path_factory.mktemp("adapters"))
        for seed, name in enumerate(("a", "b")):
            made.make_adapter(name, seed)
        make_lora(model, made.folder / "lora")
        large = made.folder / "large"
        large.mkdir()
        (large / "adapter_config.json").write_text((made.folder / "a" / "adapter_config.json").read_text())
        vectors = load_file(made.folder / "a" / "adapter_model.safetensors")
        key = next(key for key in vectors if "layers.1.self_attn.v_proj" in key)
        save_file({**vectors, key: vectors[key] * 0 + 3e38}, large / "adapter_model.safetensors")
        return made

    @pytest.fixture(scope="session")
    def small_server(small_truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        modules = [f"{name}={small_truth.folder / name}" for name in ("a", "b")]
        made = Server(small_truth.model, [*SMALL, "--lora-modules", *modules], tmp_path_factory.mktemp("small-server"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(small_truth.folder))
            patch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
            made.start()
        made.wait()
        yield made
        made.kill()
