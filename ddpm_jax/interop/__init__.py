"""Weights from and to other programs: diffusers, the authors' TensorFlow code, plain files."""
