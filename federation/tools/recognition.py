"""What in a training script of others is the model, the data, the loops, the loss: by the shapes that these have."""

import ast
import re

from federation.tools.roles import role, which
from federation.tools.script import Function, Piece, Script

LOSSES = re.compile(r"\w*Loss|cross_entropy|nll_loss|mse_loss|(smooth_)?l1_loss|huber_loss|binary_cross_entropy\w*")
OPTIMIZERS = re.compile(r"SGD|Adam\w*|NAdam|RAdam|RMSprop|Adagrad|Adadelta|Rprop|ASGD")
RATES = {"Adadelta": "1.0", "Adagrad": "0.01", "RMSprop": "0.01"}  # PyTorch's defaults, where they are not 0.001
MOVES = {"to", "cuda", "cpu", "float", "double", "half", "train", "eval"}  # model.to(device) is the model


def runs_at_import(script: Script) -> bool:
    """Tell whether to import a script would do more than to define something."""
    return any(_acts(script, statement) for statement in script.tree.body)


def _acts(script: Script, statement: ast.stmt) -> bool:
    is_main = isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)
    if is_main or isinstance(statement, Function | ast.ClassDef):
        return False
    calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
    works = any(is_dataset(script, call) or ast.unparse(call.func).endswith("parse_args") for call in calls)
    is_call = isinstance(statement, ast.Expr) and calls != []
    return works or is_call or isinstance(statement, ast.For | ast.While | ast.With)


# --------------------------------------------------------------------------------------------------- model and data


def model(script: Script) -> Piece | None:
    """Return the call that makes the model."""
    for node in ast.walk(script.tree):
        if isinstance(node, ast.Assign) and role(ast.unparse(node.targets[0])) == "net":
            value = node.value
            while _is_call_of_method(value, MOVES):
                value = value.func.value  # type: ignore[attr-defined]
            if isinstance(value, ast.Call):
                return script.piece(value)
    for one in script.classes("Module")[-1:]:
        script.used_names.add(one.name)
        return Piece(f"script.{one.name}()", one.lineno)
    return None


def _is_call_of_method(value: ast.expr, names: set[str]) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in names


def is_dataset(script: Script, call: ast.Call) -> bool:
    *path, last = ast.unparse(call.func).split(".")
    origin = script.imports.get(last)
    is_imported = isinstance(origin, ast.ImportFrom) and "datasets" in str(origin.module)
    return "datasets" in path or is_imported or last in [one.name for one in script.classes("Dataset")]


def datasets(script: Script) -> dict[str, Piece]:
    """Return the calls that make the "train" and the "test" data set."""
    found: dict[str, ast.Call] = {}
    for call in script.calls(bool):
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        target = ast.unparse(getattr(script.parents[call], "targets", [ast.Name("")])[0])
        kind = {"True": "train", "False": "test"}.get(given.get("train", "")) or which(given.get("split", target))
        if kind and is_dataset(script, call) and (kind not in found or "test" in target):
            found[kind] = call
    return {kind: script.piece(_from_root(call), ours=["root"]) for kind, call in found.items()}


def _from_root(call: ast.Call) -> ast.Call:
    """Let a call that reads a folder read `root`, if that is given."""

    def either(value: ast.expr) -> ast.expr:
        return ast.BoolOp(ast.Or(), [ast.Name("root"), value])

    for word in call.keywords:
        if role(word.arg or "") == "root":
            word.value = either(word.value)
    if call.args and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str):
        call.args[0] = either(call.args[0])
    return call


def data_function(script: Script) -> tuple[Function, list[str]] | None:
    """Return a function that returns training and test data, with "train", "test" or "" for each of its results."""
    for function in script.functions():
        kinds = [which(name) if role(name) == "loader" else "" for name in returned(function)]
        if {"train", "test"} <= set(kinds):
            return function, kinds
    return None


# -------------------------------------------------------------------------------------------------- training, testing


def loop(script: Script, trains: bool) -> Function | None:
    """Return the function that trains a model on data, or else the one that tests it."""
    for function in script.functions():
        if {"net", "loader"} <= roles(function) and (".backward(" in ast.unparse(function)) == trains:
            return function
    return None


def trainer(script: Script) -> tuple[Function, Function] | None:
    """Return the __init__ of a class that trains a model, and its method that does so."""
    for one in script.classes():
        methods = {node.name: node for node in one.body if isinstance(node, Function)}
        run = next((methods[name] for name in ("train", "fit", "run") if name in methods), None)
        made = methods.get("__init__")
        if run and made and "net" in roles(made) and ".backward(" in ast.unparse(one):
            return made, run
    return None


def roles(function: Function) -> set[str]:
    """Return what the parameters of a function are for."""
    return {role(parameter.arg) for parameter in (*function.args.args, *function.args.kwonlyargs)}


def returned(function: Function) -> list[str]:
    """Return the expressions that a function returns."""
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value:
            return [ast.unparse(one) for one in getattr(node.value, "elts", [node.value])]
    return []


def criterion(script: Script) -> Piece | None:
    """Return the loss: a call that makes it, or the name of its function."""
    for call in script.calls(lambda name: LOSSES.fullmatch(name.split(".")[-1])):
        return script.piece(call if ast.unparse(call.func).endswith("Loss") else call.func)
    return None


def optimizer(script: Script) -> tuple[Piece | None, str]:
    """Return the call that makes the optimizer of `net` with `lr`, and the learning rate that the script has."""
    for call in script.calls(lambda name: OPTIMIZERS.fullmatch(name.split(".")[-1])):
        if not call.args or not ast.unparse(call.args[0]).endswith(".parameters()"):
            continue
        rates = [word.value for word in call.keywords if word.arg == "lr"] + call.args[1:2]
        others = [word for word in call.keywords if word.arg != "lr"]
        made = ast.Call(call.func, [ast.Name("net.parameters()")], [ast.keyword("lr", ast.Name("lr")), *others])
        default = Piece(RATES.get(ast.unparse(call.func).split(".")[-1], "0.001"))
        rate = script.piece(rates[0]) if rates else default
        piece = script.piece(ast.copy_location(made, call), script.scope(call), ours=["net", "lr"])
        return piece, (default if rate.unknown or rate.lines else rate).text
    return None, "0.001"


def schedule(script: Script) -> int:
    """Return the line in which the learning rate is given a schedule, 0 if there is none."""
    return min((call.lineno for call in script.calls(lambda name: re.search(r"LR$|LROn\w+$", name))), default=0)


def number(script: Script, wanted: str, default: str) -> str:
    """Return the number that an option, variable, argument or loop of a script has for "epochs" or "batch_size"."""
    found = [text for name, text in script.options.items() if role(name) == wanted]
    for node in ast.walk(script.tree):
        if isinstance(node, ast.Assign | ast.keyword):
            name = node.arg if isinstance(node, ast.keyword) else ast.unparse(node.targets[0])
            found += [ast.unparse(node.value)] * (role(name or "") == wanted)
        elif isinstance(node, ast.For) and f"{role(ast.unparse(node.target))}s" == wanted:
            found.append(ast.unparse(node.iter).removeprefix("range(").removesuffix(")"))
    return next(filter(str.isdecimal, found), default)
