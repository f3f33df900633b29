"""Images from trained parameters: compiled samplers, image sets on disk, animations of the reverse process."""
