"""How the drafter learns: blocks, batches, loss, replay, states and the loop around them."""
