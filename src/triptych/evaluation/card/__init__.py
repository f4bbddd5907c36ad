"""The capability card: what a model can do, measured on scenes of graded difficulty."""
