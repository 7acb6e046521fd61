import pytest
import torch
from torch import Tensor, nn

from benchmarks.bench_case import Case, Shapes, build_case
from benchmarks.bench_losses import compare_losses
from benchmarks.bench_measure import Stepper, kept_mib
from benchmarks.bench_ours import OurStep
from benchmarks.bench_twin import PlainTwin, prefix_mask
from dflash_train.testing import LIMITS, assert_close

OUTPUT_LIMIT, GRADIENT_LIMIT = LIMITS[torch.float32]


@pytest.fixture(scope="module")
def case() -> Case:
    shapes = Shapes(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=301,
        num_taps=3,
        num_target_layers=12,
        block_size=13,
        num_documents=3,
        document_tokens=63,
        anchors_per_document=19,
    )
    return build_case(shapes)


def test_the_plain_twin_equals_our_step_in_loss_and_all_gradients(case: Case) -> None:
    ours, twin = OurStep(case), PlainTwin(case)
    our_loss, twin_loss = ours.loss(), twin.loss()
    assert_close("loss", our_loss, twin_loss, OUTPUT_LIMIT)
    our_loss.backward()
    twin_loss.backward()
    parameters = dict(ours.drafter.named_parameters())
    assert parameters.keys() == twin.weights.keys()
    for name, parameter in parameters.items():
        want = twin.weights[name].grad
        assert parameter.grad is not None
        assert want is not None
        assert_close(name, parameter.grad, want, GRADIENT_LIMIT)


def test_the_slots_that_our_batch_labels_are_the_twins(case: Case) -> None:
    ours = OurStep(case)
    assert torch.equal(ours.batch.label_mask, prefix_mask(case))
    assert_close("slots", ours.slot_losses(), PlainTwin(case).slot_losses(), OUTPUT_LIMIT)


def test_rivals_also_count_slots_behind_a_short_follow_up(case: Case) -> None:
    slots = PlainTwin(case).slot_losses()
    names = ("twin", "specforge", "speculators")
    found = compare_losses(
        case, losses=dict.fromkeys(names, 0.0), slots=dict.fromkeys(names, slots)
    )
    assert found["specforge"].counted_slots > found["twin"].counted_slots
    assert found["specforge"].paper_loss == found["twin"].paper_loss
    assert found["specforge"].explained != found["twin"].explained
    assert found["speculators"].explained < found["specforge"].explained


class BigScratch:
    """A step that needs 64 MiB beside its one parameter, 32 of them until the backward pass."""

    def __init__(self) -> None:
        self.parameters = [nn.Parameter(torch.ones(1))]

    def loss(self) -> Tensor:
        rows = torch.ones(8 * 2**20)
        return (self.parameters[0] * rows).mean()

    def slot_losses(self) -> Tensor:
        raise NotImplementedError


def test_growth_is_the_peak_of_one_step_and_not_what_stays() -> None:
    stepper = Stepper(BigScratch())
    stepper.take()
    assert all(64 <= stepper.growth_mib() < 100 for _ in range(2))


def test_kept_memory_counts_what_autograd_holds_for_the_backward_pass() -> None:
    step = BigScratch()
    assert 32 <= kept_mib(step.loss, step.parameters) < 33
