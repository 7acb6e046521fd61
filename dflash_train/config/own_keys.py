"""Keys of one verb that are no part of the recipe: `push repo_id=...`, `inspect index=0`."""

from collections.abc import Collection

from dflash_train.config.checks import require


def take_keys(arguments: list[str], keys: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Take what a verb has for itself out of a command line.

    Args:
        arguments: `key=value` each, or words.
        keys: Of the verb.

    Returns:
        The words behind these keys, the last of each, and the other arguments in order.
    """
    found: dict[str, str] = {}
    others: list[str] = []
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if separator and key in keys:
            found[key] = value
        else:
            others.append(argument)
    return found, others


def read_flag(key: str, word: str) -> bool:
    """Read `true` or `false`.

    Args:
        key: As a message shall name it.
        word: Behind the key.

    Raises:
        ValueError: It is neither.
    """
    require(word in ("true", "false"), f"{key} (={word}) must be true or false.")
    return word == "true"
