"""`dpo-dist import-trl`: a YAML for TRL becomes a run.yaml; neither TRL nor torch is needed."""
