"""Import and export of weights: diffusers, the authors' TensorFlow code, plain files."""
