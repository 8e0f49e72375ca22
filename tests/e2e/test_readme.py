"""The README and the pages in docs/ are right: links lead somewhere, and every command that they show is run."""

import argparse
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

import server
from federation.app.config import parse
from tests.conftest import ROOT, Terminals
from tests.e2e.typed import put_in_its_usual_place
from tests.in_memory import InMemoryGrid
from tests.processes import metrics_of

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
COMMANDS = {
    line.split("  #")[0].strip()
    for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for line in block.splitlines()
    if line.strip()
}
RUN_ELSEWHERE = {  # by .ci/run, which calls make with all of these; make demo runs cifar.py, server.py and client.py
    "make demo", "make test", "make test-slow", "make lint",
    "make install EXTRAS=dev,jax,keras,sklearn,lightning,text,dp,docs,notebook,onnx,tensorboard,mlflow,wandb,browser",
    "make dist", "python3 -m venv /tmp/release && cd /tmp && . /tmp/release/bin/activate",  # by hand, for a release
    "pip install PROJECT/dist/*.tar.gz", "federate --version",
    "federate server --simulate 2 --rounds 1 --data embedded",
    "federate check cifar --data embedded", "federate new my_task.py && federate check my_task",
    "python cifar.py", "python server.py", "python client.py",
    "python -m venv .venv && . .venv/bin/activate", "pip install -r requirements.txt",
    'pip install ".[jax]"', 'pip install ".[keras]"', 'pip install ".[dp]"',  # by .ci/run, as extras of make install
    'pip install ".[onnx]"',
    "python -m federation.compare --quick",  # by test_compare
    "python -m federation.compare --quick --strategies scaffold",  # likewise
    "python -m pytest PROJECT/tests/evidence/test_ladder.py --task my_script",  # by test_examples
    "federate show runs/federated", "federate show runs/*",  # by test_page, as python -m federation.show
    "python server.py --address 0.0.0.0:8080 --tls keys --page 0.0.0.0:8081",  # by test_page, all but the run itself
    "federate check my_script", "federate server --task my_script",  # by test_installed, with the task that it installs
    "federate new my_task.py", "federate new my_task.py --from train.py",  # by test_new
    'pip install ".[sklearn]"', 'pip install ".[lightning]"',
    'pip install ".[tensorboard]"', 'pip install ".[mlflow]"', 'pip install ".[wandb]"',  # likewise
    "python server.py --run-config \"tracking='tensorboard'\"",  # by test_trackers
    "python -m federation.track runs/federated --tracking tensorboard",
    'pip install ".[text]"', "python examples/text_lora.py",  # by test_examples_contract
    "python server.py --task examples.text_lora --simulate 2",
    "python server.py --task examples.diabetes_torch --simulate 2 --run-config \"train-arguments='momentum=0.5'\"",
    # by test_examples_simulated
    "docker compose up --build --scale client=4",  # by test_containers, where there is an engine
    "docker build --target server -t flower_server . && docker build --target client -t flower_client .",
    "docker network create federation",
    "docker run --rm -d --name server --network federation -p 8080:8080 flower_server --insecure --data embedded",
    "docker run --rm -d --network federation flower_client --server server:8080",
    "docker run --rm --network federation flower_client --server server:8080",
    "docker build --target server-slim -t flower_server_slim .",  # by test_containers, likewise
    "docker run --rm -p 8080:8080 -v ./initial.npz:/initial.npz:ro -v runs:/app/runs flower_server_slim --insecure "
    "--initial /initial.npz",
    "docker run --rm -v ./images:/data flower_client --server HOST:8080 --own-data --data /data",
    'pip install -r requirements-server.txt',  # by test_bare_server, without PyTorch
    'python server.py --initial initial.npz --run-config "server-evaluation=false"',
    "export SERVER_NAME=HOST", "docker compose build", "docker compose run --rm keys --client berlin",  # by hand
    "docker compose run --rm -T --entrypoint tar keys -C /keys -c berlin > berlin.tar", "CLIENTS=3 docker compose up",
    "tar -xf berlin.tar", 'docker run --rm --user "$(id -u)" -v ./berlin:/key -v ./images:/data flower_client '
    "--server HOST:8080 --tls /key --data /data",
    "python -m federation.compare --data DIR", "python benchmarks/niid_bench.py --data DIR",  # by hand: they take hours
    "python benchmarks/mcmahan.py --data mnist.npz",  # likewise
    "python benchmarks/pfl_cifar.py --pfl-python PFL/bin/python",
    "python -m pytest tests/evidence/test_ladder.py --gpu --task benchmarks.deterministic_cifar --data embedded -rs",
    # by hand: it needs a GPU
    ".venv/bin/pytest -m data",  # by hand: it needs the real CIFAR-10
    "sh benchmarks/namespaces.sh",  # by hand: it needs root, and makes network interfaces
    "sudo ufw allow from 203.0.113.0/24 to any port 8080 proto tcp",  # it opens a firewall
}  # fmt: skip


SETTINGS = ("run_config", "rounds", "strategies", "teaching", "topologies", "compression", "privacy")
# pages of which the settings are played
PLAYED = {
    command
    for page in SETTINGS
    for command in re.findall(
        r"^python server.py --simulate .*$", (ROOT / "docs" / f"{page}.md").read_text("utf-8"), re.M
    )
}


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the file and the anchor ("" for none) of each link to another file of the project, or inside the page."""
    targets = re.findall(r"\]\((?!\w+:)([^)]+)\)", without_code(page))
    pairs = [target.partition("#")[::2] for target in targets]
    return [((page.parent / path).resolve() if path else page, anchor) for path, anchor in pairs]


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{page.name}: {target} does not exist"
        assert not anchor or anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    assert set(PAGES) <= {ROOT / "README.md", *(target for target, _ in links(ROOT / "README.md"))}


def test_the_run_config_is_documented_with_its_defaults() -> None:
    documented = re.findall(r"^\| `([\w-]+)` \| `(.+?)` \|", (ROOT / "docs" / "run_config.md").read_text("utf-8"), re.M)
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert {key: tomllib.loads(f"default = {text}")["default"] for key, text in documented} == (
        pyproject["tool"]["flwr"]["app"]["config"]
    )


def test_make_demo_runs_the_three_commands_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ("cifar.py", "server.py", "client.py"):
        assert re.search(rf"\$\(BIN\)/python {re.escape(command)}", makefile)


def test_every_command_is_run_by_a_test() -> None:
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_readme*.py")).replace(
        '\\"', '"'
    )  # as the shell is to see it
    for command in COMMANDS - RUN_ELSEWHERE - PLAYED:
        assert f"'{command}'" in source or f'"{command}"' in source, f"no test runs: {command}"


def test_no_command_is_excused_that_no_page_shows() -> None:
    assert RUN_ELSEWHERE <= COMMANDS


TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


def test_the_tutorial_is_kept_with_its_outputs() -> None:
    cells = json.loads(TUTORIAL.read_text("utf-8"))["cells"]
    assert len(cells) == 10 and TUTORIAL.stat().st_size < 500_000
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    targets = re.findall(r"\]\((?!\w+:)([^)]+)\)", "".join(texts))
    assert targets and all((ROOT / "docs" / target).exists() for target in targets)
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] and not [one for one in cell["outputs"] if one["output_type"] == "error"]
            printed = "".join("".join(one.get("text", "")) for one in cell["outputs"])
            assert not re.search(r"/(root|home|tmp)/", printed), "a path of the machine on which it was run"


@pytest.mark.slow
def test_the_tutorial_runs(terminals: Terminals, checkout: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    where = {"metadata": {"path": str(checkout / "docs")}}
    nbclient.NotebookClient(notebook, timeout=400, resources=where).execute(env=terminals.environment)
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    alone, federated, written, skewed, used = ("".join(one.get("text", "") for one in cell) for cell in outputs)
    pictures = [sum("image/png" in one.get("data", {}) for one in cell) for cell in outputs]
    assert pictures == [0, 0, 1, 1, 1]
    assert "saved runs/centralized/model.pt" in alone
    assert "exit status of the clients: [0, 0]" in federated, federated
    accuracies = [row["server_accuracy"] for row in metrics_of(checkout / "runs" / "tutorial")["rounds"]]
    assert re.findall(r"accuracy ([\d.]+),", written) == [f"{accuracy:.4f}" for accuracy in accuracies]
    last = metrics_of(checkout / "runs" / "tutorial-skew")["rounds"][-1]["server_accuracy"]
    assert f"{last:.4f}" in skewed and f"accuracy {last:.4f} on 2,000 samples" in used, used


def played() -> argparse.ArgumentParser:
    """Return what reads the commands that are played. The data are those of DIR, whichever the command names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("script", choices=["server.py"])
    parser.add_argument("--simulate", type=int, required=True)
    parser.add_argument("--data", choices=["embedded"])
    parser.add_argument("--task", default="cifar")
    parser.add_argument("--run-config", required=True)
    return parser


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "in_a_run")
@pytest.mark.parametrize("command", sorted(PLAYED))
def test_settings_are_played(command: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run config of each command, in one process: that the options themselves work is known from the others."""
    monkeypatch.chdir(checkout)
    given = played().parse_args(shlex.split(command)[1:])
    config = {"data": str(checkout / "DIR"), "out": str(checkout / "out"), "num-clients": given.simulate}
    config |= {"task": given.task, "min-partition-size": 1} | parse(given.run_config) | {"num-server-rounds": 2}
    grid = InMemoryGrid(config, {1: {"partition-id": 0, "num-partitions": 1}})
    server.main(grid, Context(1, 0, {}, RecordDict(), config))
    run = metrics_of(checkout / "out")
    assert run["status"] == "finished" and len(run["rounds"]) == 3
    assert len(run["partitions"]["train"]) == given.simulate and (checkout / "out" / "partitions.png").exists()


@pytest.mark.slow
def test_more_clients_and_rounds(terminals: Terminals, checkout: Path) -> None:
    put_in_its_usual_place(checkout / "DIR", terminals)
    server = terminals.shell("python server.py --clients 3 --rounds 2", checkout)
    clients = [terminals.shell("python client.py", checkout) for _ in range(2)]
    clients.append(terminals.shell("python client.py --own-data --data DIR", checkout))
    assert server.wait(400) == 0, server.text
    assert [client.wait(30) for client in clients] == [0, 0, 0]
    assert "200 samples of its own: it was started with --own-data" in server.text
    assert [row["clients"] for row in metrics_of(checkout / "runs" / "federated")["rounds"]] == [None, 3, 3]


@pytest.mark.slow
def test_own_images_on_several_machines(terminals: Terminals, checkout: Path) -> None:
    make = "python -m federation.certificates keys --server HOST --client berlin paris"
    assert terminals.shell(make.replace("HOST", "localhost"), checkout).wait() == 0
    server = terminals.shell("python server.py --address 0.0.0.0:8080 --tls keys --data DIR", checkout)
    command = "python client.py --server HOST:8080 --tls keys/berlin --data DIR".replace("HOST", "localhost")
    clients = [terminals.shell(command.replace("berlin", name), checkout) for name in ("berlin", "paris")]
    assert server.wait(400) == 0, server.text
    assert [client.wait(30) for client in clients] == [0, 0]
    assert metrics_of(checkout / "runs" / "federated")["dataset"] == {
        "name": str(checkout / "DIR"), "train": 200, "test": 100,
    }  # fmt: skip
    assert "100 samples of 200" in server.text


@pytest.mark.slow
def test_own_images_centralized_and_simulated(terminals: Terminals, checkout: Path) -> None:
    centralized = terminals.shell("python cifar.py --data DIR", checkout)
    assert centralized.wait() == 0 and "200 training and 100 test images" in centralized.text
    server = terminals.shell("python server.py --data DIR" + " --simulate 2", checkout)
    assert server.wait() == 0, server.text
    begun = metrics_of(checkout / "runs" / "federated")["rounds"]
    server = terminals.shell("python server.py --resume --rounds 4", checkout)
    clients = [terminals.shell("python client.py", checkout) for _ in range(2)]
    assert server.wait(400) == 0, server.text
    assert [client.wait(30) for client in clients] == [0, 0]
    rounds = metrics_of(checkout / "runs" / "federated")["rounds"]
    assert rounds[:4] == begun and [row["clients"] for row in rounds] == [None] + [2] * 4
    use_the_model(terminals, checkout, rounds[-1]["server_accuracy"])


def use_the_model(terminals: Terminals, checkout: Path, accuracy: float) -> None:
    predict = terminals.shell("python -m federation.predict --data DIR", checkout)
    assert predict.wait() == 0 and f"accuracy {accuracy:.4f} on 100 samples" in predict.text, predict.text
    assert len((checkout / "runs" / "predict" / "predictions.csv").read_text().splitlines()) == 101
    pytest.importorskip("onnxscript")
    export = terminals.shell("python -m federation.export --to model.onnx", checkout)
    assert export.wait() == 0 and "onnxruntime on 64 samples: outputs differ by up to" in export.text, export.text
    assert (checkout / "model.onnx").stat().st_size > 4 * 62_006
