"""The client for nvflare_server.py: cifar.train with NVFlare's Client API."""

import sys

import nvflare.client as flare
import torch
from common import BATCH_SIZE, client_seed, split
from nvflare.apis.fl_constant import FLMetaKey

import cifar


def main(data: str, clients: int) -> None:
    torch.set_num_threads(1)
    flare.init()
    client = int(flare.get_site_name().removeprefix("site-")) - 1
    images, labels = cifar.load_data(data)[0]
    rows = split(len(labels), clients)[client]
    samples = images[rows], labels[rows]
    net = cifar.Net()
    while flare.is_running():
        model = flare.receive()
        net.load_state_dict(model.params)
        seed = client_seed(client, model.current_round + 1)
        cifar.train(net, samples, epochs=1, batch_size=BATCH_SIZE, seed=seed)
        flare.send(flare.FLModel(params=net.state_dict(), meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: len(rows)}))


main(sys.argv[1], int(sys.argv[2]))
