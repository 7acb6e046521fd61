"""How settings are checked: one message with field, value, rule and remedy."""


class UnavailableError(RuntimeError):
    """Something outside the recipe is missing: a package, the network, disk space."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` (field, value, rule, remedy) unless the condition holds."""
    if not condition:
        raise ValueError(message)
