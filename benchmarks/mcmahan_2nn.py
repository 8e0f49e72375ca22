"""The network of McMahan et al. 2017 with two hidden layers ("2NN") for MNIST, as a task of mcmahan.py.

All but the network is as in mcmahan_cnn.py: `python server.py --task benchmarks.mcmahan_2nn --data mnist.npz`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mcmahan_cnn import find_data, load_data, test, train

__all__ = ["Net", "find_data", "load_data", "test", "train"]


class Net(nn.Module):
    """Two hidden layers of 200, 199,210 parameters: (n, 1, 28, 28) floats to (n, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 200)
        self.fc2 = nn.Linear(200, 200)
        self.fc3 = nn.Linear(200, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        logits: Tensor = self.fc3(x)
        return logits
