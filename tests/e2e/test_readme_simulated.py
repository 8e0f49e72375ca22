"""Commands of the README and the pages that simulate, or train with another framework, or with `flwr run`."""

from pathlib import Path

import pytest
from PIL import Image

from federation.launch.network import free_port
from tests.conftest import Terminals, eventually
from tests.e2e.typed import put_in_its_usual_place
from tests.processes import metrics_of

BEFORE_FLWR_RUN = " && ".join(
    ("export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1", "export PYTHONPATH=$PWD/federation/app/hide_tensorflow")
)


@pytest.mark.slow
def test_simulations(terminals: Terminals, checkout: Path) -> None:
    server = terminals.shell("python server.py --simulate 10", checkout)
    assert server.wait(400) == 0, server.text
    assert "simulating 10 clients on " in server.text
    simulated = metrics_of(checkout / "runs" / "federated")
    assert [row["clients"] for row in simulated["rounds"]] == [None, 10, 10, 10]
    server = terminals.shell("python server.py --clients 10 --out terminals", checkout)
    clients = [terminals.shell("python client.py --clients 5", checkout) for _ in range(2)]
    assert server.wait(400) == 0, server.text
    assert [client.wait(30) for client in clients] == [0, 0]
    assert server.text.count("5 clients joined from ") == 2
    played = metrics_of(checkout / "terminals")
    assert played["final_weights_sha256"] == simulated["final_weights_sha256"]
    assert [row["bytes_up"] for row in played["rounds"]] == [row["bytes_up"] for row in simulated["rounds"]]
    command = "python server.py --simulate 10 --run-config \"partitioner='dirichlet' alpha=0.1\""
    server = terminals.shell(f"{command} --rounds 1 --out skewed", checkout)
    assert server.wait(400) == 0, server.text
    held = metrics_of(checkout / "skewed")["partitions"]
    assert [sum(map(sum, held[split])) for split in ("train", "test")] == [10_000, 2_000]
    assert min(map(sum, held["train"])) < 700 and max(map(sum, held["train"])) > 1_000
    assert Image.open(checkout / "skewed" / "partitions.png").size > (500, 300)
    assert "worst: client " in server.text


@pytest.mark.slow
def test_topologies_and_uploads(terminals: Terminals, checkout: Path) -> None:
    put_in_its_usual_place(checkout / "DIR", terminals)
    server = terminals.shell("python server.py --simulate 4 --run-config \"topology='ring'\"", checkout)
    assert server.wait(400) == 0, server.text
    ring = metrics_of(checkout / "runs" / "federated")["rounds"]
    assert "consensus" in server.text and all(row["consensus"] > 0 for row in ring[1:])
    command = "python server.py --simulate 4 --run-config \"upload='delta' compression='int8'\""
    server = terminals.shell(command, checkout)
    assert server.wait(400) == 0, server.text
    small = metrics_of(checkout / "runs" / "federated")["rounds"]
    assert 0.2 < small[1]["bytes_up"] / ring[1]["bytes_up"] < 0.3 and "consensus" not in small[1]


@pytest.mark.slow
def test_privacy(terminals: Terminals, checkout: Path) -> None:
    pytest.importorskip("dp_accounting")
    put_in_its_usual_place(checkout / "DIR", terminals)
    command = "python server.py --simulate 10 --run-config \"dp='server-fixed' dp-noise-multiplier=2.0 dp-target-epsilon=3.5\""  # noqa: E501
    server = terminals.shell(command, checkout)
    assert server.wait(400) == 0, server.text
    run = metrics_of(checkout / "runs" / "federated")
    assert run["status"] == "finished" and [row["clients"] for row in run["rounds"]] == [None, 10, 10]
    assert run["rounds"][2]["epsilon"] < 3.5 < run["rounds"][2]["epsilon_next"]
    assert "ended after round 2: another one could spend epsilon" in server.text


@pytest.mark.slow
def test_the_ladder_takes_any_task(terminals: Terminals, checkout: Path) -> None:
    command = "python -m pytest tests/evidence/test_ladder.py --task benchmarks.niid_task --data embedded -rs"
    ladder = terminals.shell(command, checkout)
    assert ladder.wait(400) == 0, ladder.text
    assert "it draws random numbers" in ladder.text, "the reason of what is skipped"


@pytest.mark.slow
def test_other_frameworks(terminals: Terminals, checkout: Path) -> None:
    check = terminals.shell("python -m federation.check cifar", checkout)
    assert check.wait() == 0 and "cifar can be federated" in check.text
    pytest.importorskip("jax")
    alone = terminals.shell("python examples/mnist_jax.py", checkout)
    assert alone.wait(400) == 0 and "EMBEDDED" in alone.text, alone.text
    server = terminals.shell("python server.py --task examples.mnist_jax --simulate 2", checkout)
    assert server.wait(400) == 0, server.text
    run = metrics_of(checkout / "runs" / "federated")
    assert run["task"] == "examples.mnist_jax" and [row["clients"] for row in run["rounds"]] == [None, 2, 2, 2]


@pytest.mark.slow
def test_keras(terminals: Terminals, checkout: Path) -> None:
    pytest.importorskip("keras")
    alone = terminals.shell("python examples/cifar_keras.py", checkout)
    assert alone.wait(400) == 0 and "EMBEDDED" in alone.text, alone.text
    put_in_its_usual_place(checkout / "DIR", terminals)
    elsewhere = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()), "FLWR_TELEMETRY_ENABLED": "0"}
    command = """flwr run . --run-config "task='examples.cifar_keras' num-clients=10 fraction-train=0.5" --federation-config "num-supernodes=10 client-resources-num-cpus=1" --stream"""  # noqa: E501
    flwr = terminals.shell(f"{BEFORE_FLWR_RUN} && {command}", checkout, **elsewhere)
    assert flwr.wait(600) == 0, flwr.text
    run = metrics_of(terminals.folder / "home" / "runs" / "federated")
    assert run["status"] == "finished" and [row["clients"] for row in run["rounds"]] == [None, 5, 5, 5]


@pytest.mark.slow
def test_flwr_run(terminals: Terminals, checkout: Path) -> None:
    """All of them on one SuperLink, which the first starts and leaves behind: Flower's way, and ours to clean up."""
    elsewhere = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()), "FLWR_TELEMETRY_ENABLED": "0"}
    results = terminals.folder / "home" / "runs" / "federated"
    put_in_its_usual_place(checkout / "DIR", terminals)
    larger = 'flwr run . --stream --run-config "num-server-rounds=5 batch-size=16" --federation-config "num-supernodes=10 client-resources-num-cpus=1"'  # noqa: E501
    for command, rounds, batch_size, clients in (("flwr run . --stream", 3, 32, 2), (larger, 5, 16, 10)):
        flwr = terminals.shell(f"{BEFORE_FLWR_RUN} && {command}", checkout, **elsewhere)
        assert flwr.wait(400) == 0, flwr.text
        assert f"in {results}" in flwr.text, flwr.text
        run = metrics_of(results)
        assert run["status"] == "finished" and run["config"]["batch-size"] == batch_size
        assert [row["clients"] for row in run["rounds"]] == [None] + [clients] * rounds
    command = f'{BEFORE_FLWR_RUN} && flwr run . --stream --run-config "num-server-rounds=0"'
    bad = terminals.shell(command, checkout, **elsewhere)
    bad.wait()
    assert "num-server-rounds=0 is out of range" in bad.text
    see_and_stop_the_superlink(terminals, checkout, elsewhere)


def see_and_stop_the_superlink(terminals: Terminals, checkout: Path, elsewhere: dict[str, str]) -> None:
    port = elsewhere["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
    is_up = "curl -fs http://127.0.0.1:39091/health".replace("39091", port)
    assert terminals.shell(is_up, checkout).wait() == 0
    runs = terminals.shell("flwr list local", checkout, **elsewhere, COLUMNS="200")  # or the table breaks words
    assert runs.wait() == 0 and "finished" in runs.text, runs.text
    stop = "kill $(lsof -t -iTCP:39091 -sTCP:LISTEN)".replace("39091", port)
    assert terminals.shell(stop, checkout).wait() == 0
    eventually(lambda: terminals.shell(is_up, checkout).wait() != 0, 30)
