"""Scripts that make published figures. They run from a clone, and no module of the package imports them."""
