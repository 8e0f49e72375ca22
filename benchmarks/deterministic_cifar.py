"""The task of cifar.py with the switches that make a GPU add in the same order, and in full precision, each time.

    pytest tests/evidence/test_ladder.py --gpu --task benchmarks.deterministic_cifar -rs
    python server.py --task benchmarks.deterministic_cifar

The switches are those of PyTorch's notes on reproducibility and on TF32. A CPU needs none of them.
"""

import os

import torch

from cifar import Net, find_data, load_data, test, train

__all__ = ["Net", "find_data", "load_data", "test", "train"]

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
torch.use_deterministic_algorithms(True, warn_only=True)
torch.backends.cudnn.benchmark = False  # the fastest algorithm may be another one each time
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
