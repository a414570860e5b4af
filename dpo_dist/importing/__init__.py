"""`dpo-dist import`: another trainer's config becomes a run.yaml, without it and torch."""
