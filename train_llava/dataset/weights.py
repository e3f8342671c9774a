"""How often a pass takes each data set: `--data_weights`."""

import numpy as np


def weights_of(paths: list[str], data_weights: list[float] | None) -> list[float]:
    """How often a pass takes each data path; a ValueError if there is not one weight, 0 or more, for each."""
    weights = data_weights or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise ValueError(f"--data_weights names {len(weights)} weights for {len(paths)} data paths")
    if not all(0 <= weight < np.inf for weight in weights) or not any(weights):
        raise ValueError(f"--data_weights {' '.join(map(str, weights))}: weights are numbers from 0, one above it")
    return weights


def weighted_rows(sizes: list[int], weights: list[float]) -> np.ndarray:
    """The records of one pass, `(records, 2)`: source and row.

    A source of weight 0.5 always gives the same half. For example, two records each with weights 2 and 0.5 give
    `[[0, 0], [0, 1], [0, 0], [0, 1], [1, 0]]`.
    """
    rng, places = np.random.default_rng(0), []
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        # The whole source as often as its weight has ones, then the same part of it
        part = np.sort(rng.permutation(size)[: round(weight % 1 * size)])
        rows = np.concatenate([np.arange(size)] * int(weight) + [part])
        places.append(np.stack([np.full(len(rows), source), rows], axis=1).astype(np.int32))
    return np.concatenate(places)
