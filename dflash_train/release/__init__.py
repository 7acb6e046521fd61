"""How a drafter leaves the house: the doctor's checks of a checkpoint against its target."""
