"""Feature maps as pictures: their first three principal components as red, green and blue."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pca_colours(features: NDArray[np.floating], reference: NDArray[np.floating] | None = None) -> NDArray[np.uint8]:
    """(..., C) features to (..., 3) uint8 colours, with one set of components and one colour scale for all of them.

    The components are computed over every token of `reference` (by default `features` itself), so that a colour means the
    same in every frame of a sequence (S-VAM, qualitative figures); components per frame would flicker. Each is scaled
    from its 1 % to its 99 % quantile over the reference. An eigenvector's sign is free: its largest entry is made positive.
    """
    channels = features.shape[-1]
    values = np.asarray(features, dtype=np.float64).reshape(-1, channels)
    basis = values if reference is None else np.asarray(reference, dtype=np.float64).reshape(-1, channels)
    mean = basis.mean(axis=0)
    centred = basis - mean
    _, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    components = vectors[:, ::-1][:, :3]
    components = components * np.sign(components[np.abs(components).argmax(axis=0), np.arange(components.shape[1])])
    low, high = np.quantile(centred @ components, (0.01, 0.99), axis=0)
    scaled = ((values - mean) @ components - low) / np.maximum(high - low, 1e-12)
    colours = np.full((len(values), 3), 0.5)
    colours[:, : components.shape[1]] = np.clip(scaled, 0.0, 1.0)
    return np.asarray(np.rint(colours * 255.0), dtype=np.uint8).reshape(*features.shape[:-1], 3)
