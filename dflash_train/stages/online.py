"""Where training and evaluation find their rows: in the feature store, or read by the target.

`data.features=online` keeps the target at work while the drafter learns: the loaded one, or a vLLM
of its own. What asks for rows sees a `RowSource` either way.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn

from dflash_train.config import CollectEngine, FeaturesFrom, require
from dflash_train.features.online_rows import AnswerReader, OnlineRows, Reading, SharedReader
from dflash_train.features.row_source import RowSource
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.stages.earlier_runs import with_replayed_rows
from dflash_train.stages.workshop import Workshop

OpenRows = Callable[[str], RowSource]
"""Opens the split of a name."""
STREAM_FOLDER = "stream"
"""vLLM's log, and features on their way from it, in the folder of the run."""
_TRAIN, _VALIDATION = "train", "validation"


@contextmanager
def training_rows(workshop: Workshop) -> Iterator[OpenRows]:
    """Give what opens a split for this process of a launch; checksums are the first one's work.

    With `data.features=online` the target is moved to `data.online.device`, and nothing else may
    run it before the end.
    """
    accelerator = workshop.accelerator
    verify = accelerator.is_main_process
    if workshop.config.data.features is FeaturesFrom.stored:
        yield lambda split: _stored_rows(workshop, split, verify=verify)
        return
    with ExitStack() as stack:
        if workshop.config.data.collect_engine is CollectEngine.vllm:
            answers: AnswerReader = stack.enter_context(_vllm_stream(workshop))
            device = None
        else:
            answers = _place_target(workshop, rank=accelerator.local_process_index)
            device = accelerator.device if answers.device == accelerator.device else None
        reader = stack.enter_context(SharedReader(answers))

        def open_split(split: str) -> RowSource:
            # Training rows are used once and at once; validation rows again and again.
            is_fresh = split == _TRAIN
            return OnlineRows(
                _store(workshop, split, verify=verify),
                reader,
                reading=_reading(workshop),
                device=device if is_fresh else None,
                kept_bytes=0 if is_fresh else workshop.config.data.online.kept_bytes,
            )

        yield open_split


def open_rows(workshop: Workshop, split: str) -> RowSource:
    """Open a held-out split for `evaluate`, which has the loaded target for itself."""
    store = _store(workshop, split, verify=True)
    if workshop.config.data.features is FeaturesFrom.stored:
        return store
    return OnlineRows(
        store,
        workshop.target,
        reading=_reading(workshop),
        kept_bytes=workshop.config.data.online.kept_bytes,
    )


def _stored_rows(workshop: Workshop, split: str, *, verify: bool) -> RowSource:
    """Open a split for training, which may replay rows of earlier runs."""
    own = _store(workshop, split, verify=verify)
    return with_replayed_rows(workshop, own, verify=verify) if split == _TRAIN else own


def _store(workshop: Workshop, split: str, *, verify: bool) -> FeatureStore:
    return FeatureStore.open(
        workshop.config.run_dir / "features" / split,
        verify=verify,
        needs_features=workshop.config.data.features is FeaturesFrom.stored,
    )


def _reading(workshop: Workshop) -> Reading:
    return Reading.of(workshop.config.data, num_taps=len(workshop.target.target_layer_ids))


def _vllm_stream(workshop: Workshop) -> AbstractContextManager[AnswerReader]:
    """Give a vLLM that reads rows while it is open.

    Raises:
        ValueError: `data.vllm_python` is not an interpreter, or several processes were launched.
        UnavailableError: It has no vLLM, or a release that was never tried.
    """
    from dflash_data.collect.vllm_reader import engine_versions, require_one_feeder, vllm_engine
    from dflash_data.collect.vllm_stream import VllmStream

    config = workshop.config
    require_one_feeder(config.data, num_processes=workshop.accelerator.num_processes)
    stores = [_store(workshop, split, verify=False) for split in (_TRAIN, _VALIDATION)]
    engine = vllm_engine(
        config,
        target_layer_ids=workshop.target.target_layer_ids,
        max_row_tokens=max(line.num_tokens for store in stores for line in store.lines),
    )
    engine_versions(config.data)
    return VllmStream(engine, config.run_dir / STREAM_FOLDER)


def _place_target(workshop: Workshop, *, rank: int) -> Target:
    """Move the target to where the recipe wants it, beside its head, which later stages use too.

    Args:
        workshop: Holds the target.
        rank: Number of this process on its machine.

    Raises:
        ValueError: This machine has no such device.
    """
    first = workshop.config.data.online.device
    if first is None:
        return workshop.target
    device = torch.device(first)
    if device.index is not None:
        device = torch.device(device.type, device.index + rank)
        num_gpus = torch.cuda.device_count()
        require(
            device.index < num_gpus,
            f"data.online.device (={first}) puts the target of process {rank} on {device}, and "
            f"this machine has {num_gpus} GPUs. Lower it, launch fewer processes, or set it to "
            "null.",
        )
    target = workshop.target
    nn.Module.to(target.model, device)  # in place; no type checker sees through its own `to`
    workshop.target = Target(
        target.model,
        target.tokenizer,
        target.target_layer_ids,
        name=target.name,
        revision=target.revision,
    )
    return workshop.target
