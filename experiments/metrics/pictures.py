"""Scores of pictures: of embeddings, by CLIP or any other model, and of pixels.

Source: Ruiz et al., "DreamBooth", arXiv 2208.12242, section 4.2 (CLIP-I, CLIP-T, and diversity by distances of pairs,
there by LPIPS).
"""

import numpy as np


def likeness(made: np.ndarray, real: np.ndarray) -> float:
    """CLIP-I with CLIP's embeddings, DINO with DINO's: the mean cosine of all pairs of a made and a real picture.

    Args:
      made: embeddings, (pictures, features).
      real: of the subject's pictures, (others, features).
    """
    return float((_unit(made) @ _unit(real).T).mean())


def agreement(made: np.ndarray, texts: np.ndarray) -> float:
    """CLIP-T: the mean cosine of each picture and its prompt; both (pictures, features)."""
    return float((_unit(made) * _unit(texts)).sum(-1).mean())


def diversity(made: np.ndarray) -> float:
    """The mean of 1 - cosine over the pairs of pictures of one prompt; (prompts, of each, features)."""
    unit = _unit(made)
    return float(np.mean([1 - pair for pair in _pairs(np.einsum("pif,pjf->pij", unit, unit))]))


def spread(images: np.ndarray) -> float:
    """The mean root of the mean squared difference of the pixels of pairs of one prompt; 0 where all are alike.

    Args:
      images: (prompts, of each, height, width, channels), in [0, 1].
    """
    flat = images.reshape(*images.shape[:2], -1).astype(np.float64)
    squares = ((flat[:, :, None] - flat[:, None]) ** 2).mean(-1)  # (prompts, of each, of each)
    return float(np.mean(_pairs(np.sqrt(squares))))


def _pairs(table: np.ndarray) -> np.ndarray:
    i, j = np.triu_indices(table.shape[1], 1)
    return table[:, i, j].reshape(-1)


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
