"""A frozen base with trainable factors: `Adapted`, how it is made, merged, converted and explained."""
