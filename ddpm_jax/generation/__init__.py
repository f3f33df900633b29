"""Images from trained parameters: compiled samplers, sets of images on disk, the reverse process as a film."""
