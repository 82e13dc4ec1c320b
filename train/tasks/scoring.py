"""Cross-entropy and correctness of predicted tokens, where there is something to predict.

Dimensions: B examples, T tokens, S vocabulary.
"""

import jax
import jax.numpy as jnp
import optax

from ..data.pipeline import IGNORE


def score(logits_BTS: jax.Array, labels_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores predictions against labels.

    Args:
      logits_BTS: [B, T, S].
      labels_BT: [B, T] int32, ``IGNORE`` where nothing is to be predicted.

    Returns:
      The cross-entropy in nats [B, T] float, whether the likeliest token is right [B, T] bool,
      and whether there is a label [B, T] bool. The first two are 0 and False without a label.
    """
    real_BT = labels_BT != IGNORE
    labels_BT = jnp.where(real_BT, labels_BT, 0)
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTS, labels_BT)
    right_BT = real_BT & (jnp.argmax(logits_BTS, axis=-1) == labels_BT)
    return jnp.where(real_BT, loss_BT, 0.0), right_BT, real_BT
