"""What names in training scripts are for, as tutorials and examples have them."""

import re

ROLES = {
    "net": r"model|net(work)?",
    "loader": r"(.*_)?(data|train|test|val(id)?)?_?(loader|data|dataset|set|dl|iter(ator)?)",
    "optimizer": r"optim(izer)?",
    "criterion": r"criterion|objective|loss(_?f(n|unc(tion)?))?",
    "device": r"device|dev",
    "epochs": r"(num_|n_|max_|total_)?epochs",
    "epoch": r"epoch(_?(i|idx|index|num|number))?",
    "lr": r"lr|learning_rate",
    "batch_size": r"(train_)?batch_size",
    "seed": r"seed",
    "root": r"root|(data_?)?(dir|path|folder|root)",
    "args": r"args|opts?|flags|config|cfg",
}


def role(name: str) -> str:
    """Return what a variable, parameter or option of that name is for, "" if its name does not say so."""
    return next((role for role, pattern in ROLES.items() if re.fullmatch(pattern, name.lower())), "")


def which(name: str) -> str:
    """Return whether a name is that of "train" or of "test" data, "" if it does not say."""
    return "train" if "train" in name.lower() else "test" if re.search("test|val|eval", name.lower()) else ""
