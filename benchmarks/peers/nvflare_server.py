"""FedAvg in NVFlare 2.9's simulator, with nvflare_client.py. Requires: pip install "nvflare==2.9.*" torch tqdm."""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import SEED, RoundLog, read_options
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.pt.job_config.base_fed_job import BaseFedJob
from nvflare.job_config.script_runner import ScriptRunner

import cifar

CLIENT = Path(__file__).resolve().with_name("nvflare_client.py")


class TestedFedAvg(FedAvg):
    """NVFlare's FedAvg, with a central test of each round's model."""

    def __init__(self, data: str, out: str, num_clients: int, num_rounds: int, persistor_id: str) -> None:
        super().__init__(num_clients=num_clients, num_rounds=num_rounds, persistor_id=persistor_id)
        self.data, self.out = data, out  # the job is described by the attributes with the arguments' names

    def run(self) -> None:
        self.log, self.net, (_, self.test_data) = RoundLog(Path(self.out)), cifar.Net(), cifar.load_data(self.data)
        self.log.add(0)
        super().run()

    def save_model(self, model: Any) -> None:
        super().save_model(model)
        self.net.load_state_dict({name: torch.as_tensor(array) for name, array in model.params.items()})
        self.log.add(model.meta["nr_aggregated"], cifar.test(self.net, self.test_data)[1])


def main() -> None:
    from nvflare_server import TestedFedAvg  # under the name with which the simulator's process imports it

    options = read_options()
    torch.manual_seed(SEED)
    job = BaseFedJob(initial_model=cifar.Net(), name="rounds", min_clients=options.clients)
    persistor, out = job.comp_ids["persistor_id"], str(options.out.absolute())
    job.to_server(TestedFedAvg(options.data, out, options.clients, options.rounds, persistor))
    job.to_clients(ScriptRunner(str(CLIENT), shlex.join([options.data, str(options.clients)])))
    with tempfile.TemporaryDirectory() as workspace:
        sys.exit(job.simulator_run(workspace, n_clients=options.clients, threads=options.workers))


if __name__ == "__main__":
    main()
