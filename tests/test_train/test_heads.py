import pytest
import torch
from torch import Tensor

from dflash_train.drafter.heads import CandidateSelector, MarkovHead
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.testing import VARIANTS, assert_close, tiny_drafter

NUM_SLOTS = 5
ANCHOR = torch.tensor(17)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(NUM_SLOTS, 32, generator=torch.Generator().manual_seed(2))


def drafter_of(target: Target, variant: str) -> Drafter:
    drafter = tiny_drafter(target, block_size=NUM_SLOTS, **VARIANTS[variant])
    return drafter.double()


def walk_dflash2(drafter: Drafter, hidden: Tensor, logits: Tensor) -> list[int]:
    """DFlash 2's choice from left to right, one slot and one candidate at a time."""
    selector = drafter.candidate_selector
    assert isinstance(selector, CandidateSelector)
    previous, path = int(ANCHOR), []
    for h, row in zip(hidden, logits, strict=True):
        wanted = selector.predecessor_codebook[previous] * (selector.hidden_projection.weight @ h)
        candidates = row.argsort(descending=True)[: selector.top_k].tolist()
        scores = [row[v] + wanted @ selector.successor_codebook[v] for v in candidates]
        previous = candidates[int(torch.stack(scores).argmax())]
        path.append(previous)
    return path


def walk_dspark(drafter: Drafter, hidden: Tensor, logits: Tensor, ids: Tensor) -> list[int]:
    """DSpark's choice from left to right; `ids` are the target's ids of the logits."""
    markov = drafter.markov_head
    assert isinstance(markov, MarkovHead)
    previous, path = int(ANCHOR), []
    for h, row in zip(hidden, logits, strict=True):
        latent = markov.markov_w1.weight[previous]
        if markov.gate_proj is not None:
            gate = markov.gate_proj.weight @ torch.cat([h, latent]) + markov.gate_proj.bias
            latent = latent / (1 + torch.exp(-gate))
        previous = int(ids[(row + markov.markov_w2.weight @ latent).argmax()])
        path.append(previous)
    return path


@torch.no_grad()
def test_dflash2_walks_through_the_best_candidates(target64: Target, hidden: Tensor):
    drafter, hidden = drafter_of(target64, "dflash2"), hidden.double()
    for part in drafter.parameters():
        part.mul_(8.0)  # so that the selector overrules the logits
    logits = hidden[1:] @ target64.head.lm_head_weight.T
    want = walk_dflash2(drafter, hidden[1:], logits)
    assert drafter.draft(hidden, ANCHOR, target64.head).tolist() == want
    assert want != logits.argmax(-1).tolist()
    assert drafter.draft(hidden[:1], ANCHOR, target64.head).tolist() == []


@pytest.mark.parametrize("variant", ["dspark", "dspark_gated", "reduced_dspark"])
@torch.no_grad()
def test_dspark_walks_from_slot_zero_with_the_markov_bias(
    variant: str, target64: Target, hidden: Tensor
):
    drafter, hidden = drafter_of(target64, variant), hidden.double()
    for part in drafter.parameters():
        part.mul_(8.0)
    head = drafter.output_head(target64.head)
    ids = torch.arange(260) if drafter.draft_token_ids is None else drafter.draft_token_ids
    logits = hidden @ target64.head.lm_head_weight.T[:, ids]
    want = walk_dspark(drafter, hidden, logits, ids)
    drafts = drafter.draft(hidden, ANCHOR[None], head)
    assert drafts.tolist() == want
    assert want != ids[logits.argmax(-1)].tolist()
    assert len(drafts) == drafter.config.num_drafts == NUM_SLOTS


@pytest.mark.parametrize("variant", ["dflash2", "dspark", "dspark_gated"])
def test_untrained_heads_draft_the_best_logits(variant: str, target64: Target, hidden: Tensor):
    drafter = Drafter(drafter_of(target64, variant).config).double()
    hidden = hidden.double()
    first = drafter.config.first_slot
    want = (hidden[first:] @ target64.head.lm_head_weight.T).argmax(-1)
    assert torch.equal(drafter.draft(hidden, ANCHOR, target64.head), want)


def test_confidence_reads_hidden_states_first_and_then_the_markov_row(
    target64: Target, hidden: Tensor
):
    hidden, previous = hidden.double(), torch.tensor([4, 5, 6, 7, 8])
    for variant in ("dspark", "dspark_gated"):
        drafter = drafter_of(target64, variant)
        assert drafter.confidence_head is not None
        assert drafter.markov_head is not None
        seen = [hidden]
        if drafter.config.confidence_sees_markov:
            seen.append(drafter.markov_head.markov_w1.weight[previous])
        weight, bias = drafter.confidence_head.proj.weight, drafter.confidence_head.proj.bias
        want = torch.sigmoid(torch.cat(seen, dim=1) @ weight[0] + bias)
        assert_close(variant, drafter.confidence(hidden, previous), want, 1e-10)


@pytest.mark.parametrize("variant", ["dflash2", "dspark", "dspark_gated"])
def test_heads_that_start_as_no_change_still_learn(variant: str, target64: Target, hidden: Tensor):
    drafter = Drafter(drafter_of(target64, variant).config).double()
    hidden, previous = hidden.double(), torch.tensor([4, 5, 6, 7, 8])
    logits = hidden @ target64.head.lm_head_weight.T
    if drafter.candidate_selector is not None:
        table = drafter.candidate_selector.successor_codebook
        top, ids = logits.topk(4)
        scores = drafter.candidate_selector(hidden, previous, logits_SC=top, ids_SC=ids)
    else:
        assert drafter.markov_head is not None
        table = drafter.markov_head.markov_w2.weight
        scores = logits + drafter.markov_head(hidden, previous)
    scores.log_softmax(-1)[:, 0].sum().backward()
    assert not table.any()
    assert table.grad is not None
    assert table.grad.abs().sum() > 0
