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

if importlib.util.find_spec("vllm") is None:
    # They import vLLM's own classes, and run in an environment of their own (.ci/serving).
    of_vllm = """
        access activations bodies composed_mixes every_door failing finite identity keeping layers loading memory numbers
        offline origins pipeline_parallel placing poison requests server soak stages store_server symbols tensor_parallel
    """
    collect_ignore = [f"test_{name}.py" for name in of_vllm.split()]
else:
    from server import Server
    from truth import ADAPTERS, Truth, make_lora, save_smollm2
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.utils.network_utils import get_open_port

    @pytest.fixture(scope="session")
    def one_process() -> Iterator[None]:
        """vLLM's state, as its layers need it to be made."""
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
            initialize_model_parallel(1)
            yield

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
