import torch

from dflash_train.testing import assert_close, tiny_drafter
from dflash_train.training.averaging import AveragedDrafter


def test_the_average_follows_its_recursion_and_resumes_in_the_middle(target32):
    drafter = tiny_drafter(target32)
    averaged = AveragedDrafter(drafter, 0.3)
    want = drafter.fc.weight.detach().clone()
    for step in range(6):
        drafter.fc.weight.data += torch.randn_like(drafter.fc.weight)
        averaged.update(drafter)
        decay = 0.0 if step == 0 else min(0.3, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * drafter.fc.weight.detach()
        if step == 3:
            state = averaged.state_dict()
            averaged = AveragedDrafter(tiny_drafter(target32, seed=1), 0.3)
            averaged.load_state_dict(state)
    assert_close("average", averaged.drafter.fc.weight, want, 1e-5)
    assert not any(parameter.requires_grad for parameter in averaged.drafter.parameters())
