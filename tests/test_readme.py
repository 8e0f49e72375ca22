"""The README keeps its word: its counts are right, its files exist, and each of its commands is run."""

import ast
import io
import json
import re
import shutil
import tokenize
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Terminals
from tests.test_terminals import free_port

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
RUN_ELSEWHERE = {  # by .ci/run, which calls make test and make demo; the latter consists of the others
    "make demo", "make test", "python cifar.py", "python server.py", "python client.py",
    "python -m venv .venv && . .venv/bin/activate", "pip install -r requirements.txt",
    'pip install ".[jax]"', 'pip install ".[keras]"',  # by .ci/run, as extras of make install
    "python compare.py --quick",  # by test_compare
    "docker compose up --build --scale client=4",  # by test_containers, where there is an engine
    "docker build --target server -t flower_server . && docker build --target client -t flower_client .",
    "docker network create federation",
    "docker run --rm -d --name server --network federation flower_server --insecure --data embedded",
    "docker run --rm -d --network federation flower_client --server server:8080",
    "docker run --rm --network federation flower_client --server server:8080",
    "python compare.py --data DIR", "python benchmarks/niid_bench.py --data DIR",  # by hand: they take hours
}  # fmt: skip


def code_lines(path: Path) -> int:
    """Count the lines of a file that hold code: no blank lines, comments or docstrings."""
    source = path.read_text()
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    idle = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in idle for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstrings)


def test_the_cost_of_federating_is_as_stated() -> None:
    stated = re.search(r"costs (\d+) lines of code in `client.py` and (\d+) in `server.py`", README)
    assert stated is not None
    assert (int(stated[1]), int(stated[2])) == (code_lines(ROOT / "client.py"), code_lines(ROOT / "server.py"))


def test_the_file_tree_is_complete() -> None:
    stated = re.findall(r"^    (\w+\.py)  ", README, re.MULTILINE)
    assert sorted(stated) == sorted(path.name for path in (ROOT / "federation").glob("[!_]*.py"))
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), (page, link)


def test_make_demo_runs_the_three_commands_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ("cifar.py", "server.py", "client.py"):
        assert re.search(rf"\$\(BIN\)/python {re.escape(command)}", makefile)


def test_every_command_is_run_by_a_test() -> None:
    source = Path(__file__).read_text().replace('\\"', '"')  # as the shell is to see it
    for command in set(COMMANDS) - RUN_ELSEWHERE:
        assert f"'{command}'" in source or f'"{command}"' in source, f"no test runs: {command}"


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def checkout(terminals: Terminals) -> Path:
    """A copy of the project, with a folder of images DIR in it."""
    folder = terminals.folder / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
    random = np.random.default_rng(0)
    for split, samples in (("train", 20), ("test", 10)):
        for label in range(10):
            (folder / "DIR" / split / str(label)).mkdir(parents=True)
            for i in range(samples):
                pixels = random.integers(0, 25, (32, 32, 3), np.uint8) + np.uint8(23 * label)
                Image.fromarray(pixels).save(folder / "DIR" / split / str(label) / f"{i}.png")
    return folder


def put_in_its_usual_place(data: Path, terminals: Terminals) -> None:
    """Let a folder of images be found without --data: fewer than the embedded ones, where these take longer."""
    shutil.copytree(data, Path(terminals.environment["XDG_CACHE_HOME"]) / "cifar10")


@pytest.mark.slow
def test_more_clients_and_rounds(terminals: Terminals, checkout: Path) -> None:
    put_in_its_usual_place(checkout / "DIR", terminals)
    server = terminals.shell("python server.py --clients 3 --rounds 2", checkout)
    clients = [terminals.shell("python client.py", checkout) for _ in range(3)]
    assert server.wait(400) == 0, server.text
    assert [client.wait(30) for client in clients] == [0, 0, 0]
    assert [row["clients"] for row in metrics(checkout / "runs" / "federated")["rounds"]] == [None, 3, 3]


@pytest.mark.slow
def test_own_images_on_several_machines(terminals: Terminals, checkout: Path) -> None:
    make = "python -m federation.certificates keys --server HOST --client berlin paris"
    assert terminals.shell(make.replace("HOST", "localhost"), checkout).wait() == 0
    server = terminals.shell("python server.py --address 0.0.0.0:8080 --tls keys --data DIR", checkout)
    command = "python client.py --server HOST:8080 --tls keys/berlin --data DIR".replace("HOST", "localhost")
    clients = [terminals.shell(command.replace("berlin", name), checkout) for name in ("berlin", "paris")]
    assert server.wait(400) == 0, server.text
    assert [client.wait(30) for client in clients] == [0, 0]
    assert metrics(checkout / "runs" / "federated")["dataset"] == {
        "name": str(checkout / "DIR"), "train": 200, "test": 100,
    }  # fmt: skip
    assert "100 samples of 200" in server.text


@pytest.mark.slow
def test_own_images_centralized_and_simulated(terminals: Terminals, checkout: Path) -> None:
    centralized = terminals.shell("python cifar.py --data DIR", checkout)
    assert centralized.wait() == 0 and "200 training and 100 test images" in centralized.text
    server = terminals.shell("python server.py --data DIR" + " --simulate 2", checkout)
    assert server.wait() == 0, server.text
    begun = metrics(checkout / "runs" / "federated")["rounds"]
    server = terminals.shell("python server.py --resume --rounds 4", checkout)
    clients = [terminals.shell("python client.py", checkout) for _ in range(2)]
    assert server.wait(400) == 0, server.text
    assert [client.wait(30) for client in clients] == [0, 0]
    rounds = metrics(checkout / "runs" / "federated")["rounds"]
    assert rounds[:4] == begun and [row["clients"] for row in rounds] == [None] + [2] * 4


@pytest.mark.slow
def test_simulations(terminals: Terminals, checkout: Path) -> None:
    server = terminals.shell("python server.py --simulate 10", checkout)
    assert server.wait(400) == 0, server.text
    assert "simulating 10 clients on " in server.text
    simulated = metrics(checkout / "runs" / "federated")
    assert [row["clients"] for row in simulated["rounds"]] == [None, 10, 10, 10]
    server = terminals.shell("python server.py --clients 10 --out terminals", checkout)
    clients = [terminals.shell("python client.py --clients 5", checkout) for _ in range(2)]
    assert server.wait(400) == 0, server.text
    assert [client.wait(30) for client in clients] == [0, 0]
    assert server.text.count("5 clients joined from ") == 2
    played = metrics(checkout / "terminals")
    assert played["final_weights_sha256"] == simulated["final_weights_sha256"]
    assert [row["bytes_up"] for row in played["rounds"]] == [row["bytes_up"] for row in simulated["rounds"]]
    command = "python server.py --simulate 10 --run-config \"partitioner='dirichlet' alpha=0.1\""
    server = terminals.shell(f"{command} --rounds 1 --out skewed", checkout)
    assert server.wait(400) == 0, server.text
    held = metrics(checkout / "skewed")["partitions"]
    assert [sum(map(sum, held[split])) for split in ("train", "test")] == [10_000, 2_000]
    assert min(map(sum, held["train"])) < 700 and max(map(sum, held["train"])) > 1_000
    assert Image.open(checkout / "skewed" / "partitions.png").size > (500, 300)
    command = 'python server.py --simulate 4 --run-config "learning-rate=0.01 local-epochs=2 fraction-train=0.5"'
    server = terminals.shell(command, checkout)
    assert server.wait(400) == 0, server.text
    run = metrics(checkout / "runs" / "federated")
    assert [row["clients"] for row in run["rounds"]] == [None, 2, 2, 2]
    assert run["config"]["learning-rate"] == 0.01 and run["config"]["local-epochs"] == 2


@pytest.mark.slow
def test_the_ladder_takes_any_task(terminals: Terminals, checkout: Path) -> None:
    command = "python -m pytest tests/test_ladder.py --task benchmarks.niid_bench --data embedded -rs"
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
    run = metrics(checkout / "runs" / "federated")
    assert run["task"] == "examples.mnist_jax" and [row["clients"] for row in run["rounds"]] == [None, 2, 2, 2]


@pytest.mark.slow
def test_keras(terminals: Terminals, checkout: Path) -> None:
    pytest.importorskip("keras")
    alone = terminals.shell("python examples/cifar_keras.py", checkout)
    assert alone.wait(400) == 0 and "EMBEDDED" in alone.text, alone.text
    put_in_its_usual_place(checkout / "DIR", terminals)
    elsewhere = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()), "FLWR_TELEMETRY_ENABLED": "0"}
    command = """flwr run . --run-config "task='examples.cifar_keras' num-clients=10 fraction-train=0.5" --federation-config "num-supernodes=10 client-resources-num-cpus=1" --stream"""  # noqa: E501
    flwr = terminals.shell(f"export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 && {command}", checkout, **elsewhere)
    assert flwr.wait(600) == 0, flwr.text
    run = metrics(terminals.folder / "home" / "runs" / "federated")
    assert run["status"] == "finished" and [row["clients"] for row in run["rounds"]] == [None, 5, 5, 5]


@pytest.mark.slow
def test_flwr_run(terminals: Terminals, checkout: Path) -> None:
    """All of them on one SuperLink, which the first starts and leaves behind: Flower's way, and ours to clean up."""
    elsewhere = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()), "FLWR_TELEMETRY_ENABLED": "0"}
    results = terminals.folder / "home" / "runs" / "federated"
    put_in_its_usual_place(checkout / "DIR", terminals)
    larger = 'flwr run . --stream --run-config "num-server-rounds=5 batch-size=16" --federation-config "num-supernodes=10 client-resources-num-cpus=1"'  # noqa: E501
    for command, rounds, batch_size, clients in (("flwr run . --stream", 3, 32, 2), (larger, 5, 16, 10)):
        export = "export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1"
        flwr = terminals.shell(f"{export} && {command}", checkout, **elsewhere)
        assert flwr.wait(400) == 0, flwr.text
        assert f"in {results}" in flwr.text, flwr.text
        run = metrics(results)
        assert run["status"] == "finished" and run["config"]["batch-size"] == batch_size
        assert [row["clients"] for row in run["rounds"]] == [None] + [clients] * rounds
    bad = terminals.shell(f'{export} && flwr run . --stream --run-config "num-server-rounds=0"', checkout, **elsewhere)
    bad.wait()
    assert "num-server-rounds=0 is out of range" in bad.text
