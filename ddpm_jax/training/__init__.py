"""Training: the experiment that a config describes, its compiled step, and everything of a run that survives the process."""
