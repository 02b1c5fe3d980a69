"""The matrix products of a layer, with what follows them."""
