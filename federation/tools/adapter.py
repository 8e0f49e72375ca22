"""The text of a task that adapts a script of others: it calls what that has, and does the usual for what it lacks."""

import ast
import re
from pathlib import Path
from textwrap import indent

from federation.tools import recognition
from federation.tools.roles import role
from federation.tools.script import Function, Piece, Script

TEXT = '''
"""Adapts {file}, which stays as it is, to what a federation calls: Net, load_data, train and test.

    python {task}.py              # trains it here, with nothing federated
    federate check {task}         # what is left to do?

Made by reading {file}, which was not run. Compare each function with the lines of it that are named here.
"""

{imports}

device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
{script}

def Net():
{net}


def load_data(root=None):
    """Return all training and test samples, with their labels."""
{load_data}


def as_arrays(data):
    """Return the samples and labels of a data set. Its transforms are applied once: random ones vary no more."""
    dataset = getattr(data, "dataset", data)  # of a DataLoader
    return tuple(default_collate([dataset[row] for row in range(len(dataset))]))


def make_loader(data, batch_size, order=None):
    return DataLoader(TensorDataset(*data), batch_size, shuffle=order is not None, generator=order)


def train(net, data, *, epochs={epochs}, lr={lr}, batch_size={batch_size}, seed=0):
    """Train `net` on `data = (x, y)`, and return the mean loss per sample."""
{train}


def test(net, data):
    """Return the mean loss per sample, and the accuracy in 0..1."""
{test}


if __name__ == "__main__":
    train_data, test_data = load_data()
    net = Net()
    print(f"mean training loss {{train(net, train_data):.4f}}")
    print("mean test loss {{:.4f}}, accuracy {{:.4f}}".format(*test(net, test_data)))
'''
DEFINITIONS = '''

def definitions(file, names, **given):
    """Return the module that a script is with its imports and these names alone: the rest of it trains at import."""
    module, tree = ModuleType("script"), ast.parse(Path(__file__).with_name(file).read_bytes())
    kept = [one for one in tree.body if isinstance(one, ast.Import | ast.ImportFrom) or names & bound(one)]
    vars(module).update(given)
    exec(compile(ast.Module(kept, []), file, "exec"), vars(module))
    return module


def bound(statement):
    """Return the names that a statement defines."""
    targets = getattr(statement, "targets", [getattr(statement, "target", statement)])
    return {{getattr(one, "id", getattr(one, "name", "")) for target in targets for one in ast.walk(target)}}


if TYPE_CHECKING:
    import {name}  # so that clients are sent it
script = definitions("{name}.py", {{{names}}}{given})
'''
USUAL_LOOP = """
# The usual loop: {file} has no function that trains a model on data. Compare it with the script's own
net.train()
total = 0.0
for x, y in loader:
    x, y = x.to(device), y.to(device)
    loss = criterion(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    total += loss.item() * len(y)
"""
USUAL_TEST = """
# The usual test: {file} has no function that tests a model and returns loss and accuracy
net.to(device).eval()
total, correct = 0.0, 0
with torch.no_grad():
    for x, y in make_loader(data, 1000):
        x, y = x.to(device), y.to(device)
        outputs = net(x)
        total += criterion(outputs, y).item() * len(y)
        correct += (outputs.argmax(1) == y).sum().item()
return total / len(data[1]), correct / len(data[1])
"""
NAMES = "net", "loader", "optimizer", "criterion", "device", "epochs", "epoch", "lr", "batch_size", "seed", "args"
OURS = dict(zip(NAMES, NAMES, strict=True))  # the variables of train(), by what they are for
TORCH = "import torch", "from torch.utils.data import DataLoader, TensorDataset, default_collate"
TYPES = "import ast", "from pathlib import Path", "from types import ModuleType", "from typing import TYPE_CHECKING"


def gap(what: str) -> str:
    return f'raise NotImplementedError("TODO: {what}")'


def body(*lines: str) -> str:
    """Return lines, and texts of several, indented."""
    return indent("\n".join(line.strip("\n") for line in lines), "    ")


def made(name: str, piece: Piece | None, what: str) -> list[str]:
    """Return the lines that give a name its value, or return it, with a gap for what the script does not say."""
    if not piece:
        return [gap(f"{what} here")]
    unknown = [gap(f"say what {', '.join(piece.unknown)} should be: replace this line")] if piece.unknown else []
    return [*unknown, *piece.lines, f"{name} {piece.text}  # line {piece.line}"]


class Adapter:
    """How a script is adapted."""

    def __init__(self, path: Path) -> None:
        self.script, self.file = Script(path), path.name
        self.runs_at_import = recognition.runs_at_import(self.script)
        criterion = recognition.criterion(self.script)
        optimizer, self.rate = recognition.optimizer(self.script)
        self.criterion = made("criterion =", criterion, "define criterion(outputs, labels)")
        self.optimizer = made("optimizer =", optimizer, "make the optimizer of net, with lr")

    def text(self, task: str) -> str:
        """Return the text of the module `task`."""
        numbers = {"epochs": recognition.number(self.script, "epochs", "1"), "lr": self.rate}
        numbers["batch_size"] = recognition.number(self.script, "batch_size", "32")
        functions = {name: getattr(self, name)() for name in ("net", "load_data", "train", "test")}
        head = {"script": self.definitions(), "imports": self.imports()}
        return TEXT.format(file=self.file, task=task, **numbers, **functions, **head).lstrip("\n")

    # ------------------------------------------------------------------------------------------------ the four names

    def net(self) -> str:
        return body(*made("return", recognition.model(self.script), f"build the model of {self.file}"))

    def load_data(self) -> str:
        if found := recognition.data_function(self.script):
            function, kinds = found
            last = {kind: place for place, kind in enumerate(kinds) if kind}
            names = [f"{kind}_data" if last.get(kind) == place else "_" for place, kind in enumerate(kinds)]
            lines = self.call(f"{', '.join(names)} =", function, {"root": self.root(function)})
        else:
            sets = recognition.datasets(self.script)
            lines = made("train_data =", sets.get("train"), f"make train_data, the training set of {self.file},")
            lines += made("test_data =", sets.get("test"), f"make test_data, the test set of {self.file},")
        return body(*dict.fromkeys(lines), "return as_arrays(train_data), as_arrays(test_data)")

    def root(self, function: Function) -> str:
        """Return what a function is given as the data folder."""
        for name in self.script.parameters(function):
            if role(name) == "root" and (value := self.script.argument(function, name)):
                return f"root or {self.script.piece(*value).text}"
        return "root"

    def train(self) -> str:
        lines = ["net.to(device)", "order = torch.Generator().manual_seed(seed)",
                 "loader = make_loader(data, batch_size, order)", *self.optimizer]  # fmt: skip
        if line := recognition.schedule(self.script):
            lines.append(f"# left out: the schedule in line {line}, which would start anew in every round")
        if loop := recognition.loop(self.script, trains=True):
            return body(*lines, *self.call_loop(loop))
        if trainer := recognition.trainer(self.script):
            calls = *self.call("trainer =", trainer[0], OURS), *self.call("", trainer[1], OURS)
            return body(*lines, "torch.manual_seed(seed)", *calls, "return test(net, data)[0]")
        usual = self.every_epoch(USUAL_LOOP.format(file=self.file))
        return body(*lines, *self.criterion, usual, "return total / len(data[1])")

    def call_loop(self, loop: Function) -> list[str]:
        """Return the lines that call the script's own loop, once or for every epoch, and return the loss."""
        roles, results = recognition.roles(loop), recognition.returned(loop)
        has_loss = len(results) == 1 and "loss" in results[0]
        call = self.call("loss =" if has_loss else "", loop, OURS)
        lines = ["torch.manual_seed(seed)", *call] if "epochs" in roles else [self.every_epoch(*call)]
        end = "return loss" if has_loss else f"return test(net, data)[0]  # {loop.name}() returns no loss"
        return [*(self.criterion if "criterion" in roles else []), *lines, end]

    def every_epoch(self, *lines: str) -> str:
        seeds = "torch.manual_seed(seed + epoch)", "order.manual_seed(seed + epoch)"
        return "for epoch in range(epochs):\n" + body(*seeds, *lines)

    def test(self) -> str:
        test = recognition.loop(self.script, trains=False)
        names = [_result(text) for text in recognition.returned(test)] if test else []
        if not test or not {"loss", "accuracy"} <= set(names):
            return body(*self.criterion, USUAL_TEST.format(file=self.file))
        needed = self.criterion if "criterion" in recognition.roles(test) else []
        call = self.call(f"{', '.join(names)} =", test, OURS | {"loader": "make_loader(data, 1000)"})
        return body(*needed, "net.to(device)", *call, "return loss, accuracy")

    def call(self, target: str, function: Function, given: dict[str, str]) -> list[str]:
        """Return the lines that call a function of the script with what is `given`, by what its parameters are for."""
        pieces = dict(self.script.arguments(function, given))
        unknown = [name for name, piece in pieces.items() if piece.unknown]
        lines = [gap(f"say below what {', '.join(unknown)} should be, and remove this line")] if unknown else []
        lines += [line for piece in pieces.values() for line in piece.lines]
        arguments = ", ".join(f"{name}={'...' if piece.unknown else piece.text}" for name, piece in pieces.items())
        return [*lines, f"{target} {self.callee(function)}({arguments})  # line {function.lineno}".strip()]

    def callee(self, function: Function) -> str:
        owner = self.script.parents[function]
        if isinstance(owner, ast.ClassDef) and function.name != "__init__":
            return f"trainer.{function.name}"
        name = owner.name if isinstance(owner, ast.ClassDef) else function.name
        self.script.used_names.add(name)
        return f"script.{name}"

    # ------------------------------------------------------------------------------------------------------- its head

    def definitions(self) -> str:
        """Return the defaults of the script's command line, and how the script is imported if it trains at import."""
        names, options = self.script.needed(), self.script.options
        defaults = ", ".join(f"{name}={default or None}" for name, default in options.items())
        text = f"args = SimpleNamespace({defaults})  # by default, on its command line\n"
        text *= self.script.uses_options
        if self.runs_at_import:
            given = ", args=args" if self.script.uses_options else ""
            text += DEFINITIONS.format(name=self.script.name, names=", ".join(map(repr, names)), given=given)
        return text

    def imports(self) -> str:
        standard = [*(TYPES if self.runs_at_import else ())]
        standard += ["from types import SimpleNamespace"] * self.script.uses_options
        others = sorted({*TORCH, *self.script.import_lines()}, key=lambda line: (line.startswith("from"), line))
        own = [] if self.runs_at_import else [f"import {self.script.name} as script"]
        return "\n\n".join("\n".join(group) for group in (standard, others, own) if group)


def _result(text: str) -> str:
    """Return which of its results a test function returns here, "_" for another one."""
    return "loss" if "loss" in text else "accuracy" if re.search("acc|correct", text) else "_"
