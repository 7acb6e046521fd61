"""Combinations of columns as numbers: the cell of each row, whatever cells are made of."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def number_cells(*columns: NDArray) -> Ints:
    """Number the combinations that occur in columns `[R]`: `[R]`, from 0 on, none left out.

    One column after the other, which takes a tenth of the time of `np.unique(axis=0)`.
    """
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        places = np.unique(column, return_inverse=True)[1].reshape(-1)
        both = numbers * (places.max(initial=0) + 1) + places
        numbers = np.unique(both, return_inverse=True)[1].reshape(-1)
    return numbers


def first_rows(cells: Ints) -> Ints:
    """Give a row of each cell, `[C]`, in the order of their numbers."""
    return np.unique(cells, return_index=True)[1]
