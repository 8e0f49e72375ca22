"""A ladder that nobody can fall off proves nothing: scripts that the project has never seen climb it, each its way."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT
from tests.tasks import write_own

pytestmark = pytest.mark.slow
CAREFUL = """
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

def Net():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

def load_data(root=None):
    random = np.random.default_rng(0)
    x, directions = random.normal(size=(300, 8)), random.normal(size=(8, 3))
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor((x @ directions).argmax(1))
    return (x[:200], y[:200]), (x[200:], y[200:])

def train(net, data, *, epochs, lr=0.1, batch_size=32, seed=0, momentum=0.9):
    x, y = data
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    net.train()
    for epoch in range(epochs):
        torch.manual_seed(seed + epoch)
        for rows in torch.randperm(len(y)).split(batch_size):
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()

@torch.no_grad()
def test(net, data):
    logits = net.eval()(data[0])
    return F.cross_entropy(logits, data[1]).item(), (logits.argmax(1) == data[1]).float().mean().item()
"""
SABOTAGE = """
from federation.app import client_grid, job
client_grid.check_reply = lambda *_, **__: None  # or it would refuse such replies
honest = job.Job.reply

def reply(self, *what):
    message = honest(self, *what)
    message.content["metrics"]["num-examples"] = 1
    return message

job.Job.reply = reply
"""
SCRIPTS = {
    "dropout": CAREFUL.replace("nn.Tanh()", "nn.Tanh(), nn.Dropout(0.5)"),
    "batchnorm": CAREFUL.replace("nn.Tanh()", "nn.BatchNorm1d(16)"),
    "adam": CAREFUL.replace(", momentum=0.9", "").replace("SGD", "Adam").replace(", momentum=momentum", ""),
    "seedless": CAREFUL.replace("torch.manual_seed(seed + epoch)", "torch.seed()"),
    "global": CAREFUL.replace("torch.manual_seed(seed + epoch)", "pass"),
    "unweighted": CAREFUL + SABOTAGE,  # the last one: it spoils the process
}
CLIMB = """
import sys, pytest
for script in sys.argv[2:]:
    pytest.main([sys.argv[1], "--task", script, "-p", "no:cacheprovider", "--junitxml", script + ".xml"])
"""
ROUNDS_ARE_EPOCHS = "test_rounds_are_epochs_where_the_optimizer_remembers_nothing"
STEPS = [
    f"{name}[{clients}]"
    for name in ("test_the_mean_of_unequal_clients_is_the_step_on_all_samples",
                 "test_a_mean_that_is_not_weighted_by_samples_would_show")
    for clients in (2, 3, 10)
]  # fmt: skip


@pytest.fixture(scope="module")
def climbs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Let all scripts climb, one after another in one process: its imports take longer than a climb."""
    folder = tmp_path_factory.mktemp("scripts")
    for name, source in SCRIPTS.items():
        (folder / f"{name}.py").write_text(source)
    write_own(folder)
    names = ["my_script", *SCRIPTS]
    command = [sys.executable, "-c", CLIMB, str(ROOT / "tests" / "evidence" / "test_ladder.py"), *names]
    subprocess.run(command, cwd=folder, check=True, timeout=600, start_new_session=True)  # a fair share of the cores
    return {name: outcomes(folder / f"{name}.xml") for name in names}


def outcomes(path: Path) -> dict[str, str]:
    """Return how each test came out: "passed", "failed", or why it was skipped."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        trouble = [child for child in case if child.tag in ("failure", "error", "skipped")]
        skipped = trouble and trouble[0].tag == "skipped"
        found[case.attrib["name"]] = trouble[0].attrib["message"] if skipped else "failed" if trouble else "passed"
    return found


def skips(climb: dict[str, str]) -> dict[str, str]:
    """Return why tests were skipped."""
    return {name: how for name, how in climb.items() if how not in ("passed", "failed")}


def fails(climb: dict[str, str]) -> list[str]:
    return [name for name, how in climb.items() if how == "failed"]


def test_dropout_is_skipped_where_it_has_no_central_counterpart(climbs: dict[str, dict[str, str]]) -> None:
    skipped = skips(climbs["dropout"])
    assert sorted(skipped) == sorted(STEPS) and fails(climbs["dropout"]) == []
    assert all("draws random numbers (dropout, augmentation?)" in reason for reason in skipped.values())
    assert list(climbs["dropout"].values()).count("passed") == 19


@pytest.mark.parametrize("script", ["batchnorm", "my_script"])
def test_batch_statistics_are_skipped_where_they_cannot_be_averaged(
    climbs: dict[str, dict[str, str]], script: str
) -> None:
    skipped = skips(climbs[script])
    assert sorted(skipped) == sorted(STEPS)
    assert all("is not the mean of its steps on two parts of them" in reason for reason in skipped.values())


@pytest.mark.parametrize("script", ["batchnorm", "my_script"])
def test_batch_statistics_climb_all_the_rest(climbs: dict[str, dict[str, str]], script: str) -> None:
    assert fails(climbs[script]) == []
    assert list(climbs[script].values()).count("passed") == 19


def test_an_optimizer_with_a_memory_is_skipped_where_it_matters(climbs: dict[str, dict[str, str]]) -> None:
    skipped = skips(climbs["adam"])
    assert sorted(skipped) == sorted([*STEPS, ROUNDS_ARE_EPOCHS, "test_momentum_is_lost_between_rounds"])
    assert all("no momentum argument" in reason for reason in skipped.values())
    assert fails(climbs["adam"]) == []


def test_a_script_that_ignores_its_seed_falls(climbs: dict[str, dict[str, str]]) -> None:
    assert list(skips(climbs["seedless"])) == [ROUNDS_ARE_EPOCHS]
    assert fails(climbs["seedless"]) == [
        "test_one_client_in_one_round_is_the_script",
        "test_rounds_of_one_client_are_calls_of_train",
        *(f"test_which_node_has_which_partition_does_not_matter[places{i}]" for i in range(3)),
        *(f"test_the_order_of_arrival_does_not_matter[{order}]" for order in ("last first", "one by one")),
        "test_one_seed_has_one_digest",
        *(f"test_how_many_nodes_play_the_clients_does_not_matter[{nodes}]" for nodes in (1, 2, 5)),
        "test_how_many_models_a_bundle_holds_does_not_matter",
    ]


def test_a_script_that_draws_from_the_global_generator_is_repeatable_but_another_training(
    climbs: dict[str, dict[str, str]],
) -> None:
    assert list(skips(climbs["global"])) == [ROUNDS_ARE_EPOCHS]
    assert fails(climbs["global"]) == [
        "test_one_client_in_one_round_is_the_script", "test_rounds_of_one_client_are_calls_of_train"
    ]  # fmt: skip


def test_clients_that_all_weigh_the_same_fall(climbs: dict[str, dict[str, str]]) -> None:
    assert skips(climbs["unweighted"]) == {}
    assert fails(climbs["unweighted"]) == [
        *STEPS[:3],
        "test_the_clients_losses_average_to_the_global_one",
        *(f"test_the_clients_accuracies_average_to_the_global_one[{name}]" for name in ("dirichlet", "size-skewed")),
    ]
