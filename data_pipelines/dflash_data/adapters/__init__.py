"""One module per log format, each with a pure function from a log line to conversations.

An adapter takes one line and the place it came from (used as source id only when the log
carries none) and gives, for each call in the line, a `Conversation` or the `Drop` that says
why there is none. It raises nothing and touches nothing. `session`, `tenant` and
`source_ref` still hold the provider's own values; the scrub step replaces them by keyed
hashes before anything is written.

`fields` and `messages` hold what formats share: tolerant look-up, times, OpenAI messages.
"""

from collections.abc import Callable

from dflash_data.adapters import openai
from dflash_data.drops import Drop
from dflash_train.records.conversation import Conversation

Adapter = Callable[[bytes, str], list[Conversation | Drop]]

ADAPTERS: dict[str, Adapter] = {"openai": openai.adapt}
"""Adapter by the name that `Conversation.source` carries."""
