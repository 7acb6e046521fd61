"""vLLM's side of the capture: a KV connector that writes one file of hidden states per request.

vLLM loads it by name (`kv_connector_module_path`) into its own environment, so it imports nothing
of ours; `start_engine` in driver.py shows all settings that belong to it.

The `extract_hidden_states` method keeps the states of every prompt token in a paged cache of its
own, whatever chunks or cached prefixes a prompt was computed in. vLLM's example connector reads
them there when a request is finished; it copies through pinned memory, which only a machine with
CUDA has, writes files that a reader can find half-written, and logs a failed write without stopping
for it. This connector differs in those three points and inherits the rest.

Layer ids are vLLM's own: id n is the state after n layers, `hidden_states[n]` in Transformers.
"""

import os
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1 import (  # pyright: ignore[reportMissingImports]
    example_hidden_states_connector as example,
)


class HiddenStateFiles(example.ExampleHiddenStatesConnector):
    """Writes `hidden_states [N, L, E]` and `token_ids [N]` of each prompt to a safetensors file.

    A file appears under its name only when it is whole. `L` follows ascending layer ids, not the
    order in which they were asked for. With tensor parallelism the first rank writes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writes: dict[str, Future[None]] = {}

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Start the writes of finished requests and report those whose file is there.

        vLLM keeps a request's pages until it is reported, so unwritten states are bounded by its
        cache, and keeps stepping, so a write that failed raises here and stops the engine.
        """
        if self.has_connector_metadata():
            for pending in self._get_connector_metadata().pending_saves:
                self._start_write(pending)
        written = {name for name, write in self._writes.items() if write.done()}
        for name in written:
            self._writes.pop(name).result()
        return written or None, None

    def _start_write(self, pending: example.PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.int64)
        slots = blocks[:, None] * self._block_size + torch.arange(self._block_size)
        states = example.extract_from_kv_cache(
            self._kv_cache, slots.flatten().to(self._kv_cache.device), len(pending.token_ids)
        )
        tensors = {"hidden_states": states.cpu().contiguous(), "token_ids": pending.token_ids}
        self._writes[pending.req_id] = self._executor.submit(
            _write_whole, tensors, pending.filename
        )


def _write_whole(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Write a file that is either whole or not there."""
    partial = f"{path}.partial"
    save_file(dict(tensors), partial)
    os.replace(partial, path)
