"""Packaging of ia3rt: kernels/, bench/ and examples/ stand at the top and install as ia3rt.kernels and so on."""

import re
from pathlib import Path

from setuptools import setup

# Triton publishes Linux wheels only; without it everything but the Triton backend works.
TRITON = "triton>=3.6; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'"

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "ia3rt" / "__init__.py").read_text("utf-8"), re.M)[1]

setup(
    name="ia3rt",
    version=VERSION,
    description="A Triton-accelerated runtime for many IA³ adapters on one Hugging Face model",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="ia3rt contributors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["IA3", "adapters", "PEFT", "LoRA", "Triton", "PyTorch", "transformers", "vLLM", "LLM inference"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # kernels/ has no __init__.py (on sys.path it would hide the Hugging Face package `kernels`), so no
    # find_packages: each package is named, and its folder is where the repository keeps it.
    packages=[
        "ia3rt",
        "ia3rt.adapters",
        "ia3rt.adapters.combining",
        "ia3rt.cli",
        "ia3rt.cli.demo",
        "ia3rt.modules",
        "ia3rt.ops",
        "ia3rt.reference",
        "ia3rt.routing",
        "ia3rt.serving",
        "ia3rt.serving.vllm",
        "ia3rt.kernels",
        "ia3rt.bench",
        "ia3rt.bench.compiled",
        "ia3rt.bench.contenders",
        "ia3rt.bench.launches",
        "ia3rt.bench.layers",
        "ia3rt.bench.profile",
        "ia3rt.bench.serving",
        "ia3rt.bench.study",
        "ia3rt.bench.suites",
        "ia3rt.bench.tuning",
        "ia3rt.examples",
    ],
    package_dir={"ia3rt.kernels": "kernels", "ia3rt.bench": "bench", "ia3rt.examples": "examples"},
    package_data={
        "ia3rt": ["py.typed"],
        "ia3rt.kernels": ["tuned/*.json"],
        "ia3rt.bench": ["budget.json"],
        "ia3rt.examples": ["*.md", "adapters/*/*", "serving/*"],  # adapters: what `ia3rt demo` shows
    },
    install_requires=[
        "torch>=2.10",
        TRITON,
        "huggingface_hub>=0.30",
        "numpy",  # safetensors writes through it
        "rich>=13",
        "safetensors>=0.4",
        "typer>=0.16",
    ],
    extras_require={
        "bench": ["matplotlib", "peft>=0.21", "pytest-benchmark", "transformers>=5"],
        "demo": ["transformers>=5", "gguf", "peft>=0.21"],
        "study": ["matplotlib", "transformers>=5", "gguf", "peft>=0.21"],
        "test": [
            "accelerate",
            "build",
            "diffusers",
            "gguf",
            "httpx",
            "hypothesis",
            "matplotlib",
            "mypy",
            "peft>=0.21",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            "torchao>=0.16",
            "transformers>=5",
        ],
        "vllm": ["vllm>=0.32,<0.34"],
    },
    entry_points={
        "console_scripts": ["ia3rt=ia3rt.cli.main:app"],
        "vllm.general_plugins": ["ia3rt = ia3rt.serving.vllm:register"],
    },
)
