"""The bad clients of an exercise are those that it says, and bad in the way that it says."""

import pytest
import torch

import cifar
from benchmarks import bad_clients
from cifar_data import embedded_data
from federation.app.task import client_seed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("partition", [0, 1, 2, 9])
def test_the_first_clients_add_noise_and_the_others_none(partition: int) -> None:
    data, seed = embedded_data(64, seed=1), client_seed(3, partition, 2)
    torch.manual_seed(0)
    honest, net = cifar.Net(), cifar.Net()
    net.load_state_dict(honest.state_dict())
    loss = cifar.train(honest, data, epochs=1, lr=0.02, batch_size=32, seed=seed)
    assert bad_clients.train(net, data, epochs=1, lr=0.02, batch_size=32, seed=seed, bad=2) == loss
    pairs = zip(net.parameters(), honest.parameters(), strict=True)
    apart = torch.cat([(one - other).detach().reshape(-1) for one, other in pairs])
    if partition < 2:
        assert apart.mean().abs() < 0.02 and 0.98 < apart.std() < 1.02
    else:
        assert not apart.any()
