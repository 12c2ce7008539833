"""Passes from the portable decoder to the variant for one provider: one file each, in place, tested separately."""
