"""The sections of a run config, one file for each part of a run."""
