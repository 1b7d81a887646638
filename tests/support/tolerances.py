"""How far two computations of the same may be apart: by their arithmetic, not by one processor.

A processor may add up the terms of a product in any order, and in another order for another number of rows. So an
equality that is a law is tested in float64 (``EXACT``), and results in fewer bits by a bound of these bits.
"""

import numpy as np

EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64, whose unit roundoff is 2**-53
HALF = 2.0**-11  # unit roundoff of float16
_BFLOAT16 = 2.0**-8


def close_rows(found, expected, at_most=1e-4):
    """Hold rows close to expected ones: the largest difference, divided by the length of the row, is ``at_most``.

    The default is for float32, with a unit roundoff of 2**-24: some hundred terms a product and some ten products one
    after the other are off by a thousand units at worst.
    """
    found, expected = (np.asarray(rows, dtype=np.float64) for rows in (found, expected))
    assert found.shape == expected.shape
    difference, length = np.abs(found - expected).max(axis=-1), np.linalg.norm(expected, axis=-1)
    assert (difference <= at_most * length).all(), f"off by {(difference / length).max()}, at most {at_most}"


def least_cosine_in_bfloat16(layers):
    """Return what the cosine between embeddings of a transformer in bfloat16 and in float32 is at least.

    A layer has 6 products, patches and projection are 2 more. Each rounds both factors and its result, by up to 2**-8.
    Independent errors add up in squares, and an error of e turns a vector by a cosine of 1 - e**2 / 2.
    """
    return 1 - 3 * (6 * layers + 2) * _BFLOAT16**2 / 2
