"""What the policy in training makes of held-out pairs: their metrics, and answers to prompts."""

import numpy as np
import torch

from dpo_dist.data.batches import plan_scoring_batches
from dpo_dist.data.tokens.templates import load_tokenizer, resolve_template
from dpo_dist.engine.forward.generation import Sampling, answer_in_training
from dpo_dist.engine.forward.scoring import score_on_all_ranks
from dpo_dist.inputs.scored_pairs import distinct_prompts, shared_for
from dpo_dist.objective.mixture import pair_losses
from dpo_dist.training.job import Job
from dpo_dist.training.sums import StepSums
from dpo_dist.watch.heartbeat import during


@during("evaluation")
def evaluate(job: Job) -> dict[str, float]:
    """Means over all held-out pairs, and behind "/NAME" of each source where there are several."""
    pairs = job.held_out.pairs
    scores, order = [], []
    for wave in plan_scoring_batches(
        pairs.packed_lengths,
        np.arange(len(pairs)),
        job.place.world_size,
        job.config.scoring_tokens,
        shared=shared_for(job.engine, pairs),
    ):
        own = wave[job.place.rank]
        indices, columns = score_on_all_ranks(
            job.engine, own, pairs.token_ids, job.device, job.terms
        )
        order.append(indices)
        scores.append(columns)
    columns, rows = torch.from_numpy(np.concatenate(scores)), np.concatenate(order)
    means: dict[str, float] = {}
    for suffix, of_source in job.held_out.by_source(rows):
        logps = job.held_out.logps(columns[of_source], rows[of_source], job.terms)
        sums = StepSums.zeros(job.objective)
        sums.add_pairs(logps, pair_losses(logps, job.objective))
        means |= {f"{name}{suffix}": mean for name, mean in sums.means().items()}
    return means


@during("generate")
def answer_prompts(job: Job) -> list[tuple[str, str]]:
    """(prompt, answer) texts of eval.num_samples prompts; all ranks call together."""
    config = job.config
    prompts = distinct_prompts(job.held_out.pairs, config.eval.num_samples)
    template = resolve_template(config.data.chat_template)
    tokenizer = load_tokenizer(job.models.base, template, config.model.trust_remote_code)
    answers = answer_in_training(
        job.engine, tokenizer, prompts, Sampling.of(config.generate),
        device=job.device, seed=config.run.seed,
    )  # fmt: skip
    texts = [str(tokenizer.decode(prompt)) for prompt in prompts]
    return list(zip(texts, answers, strict=True))
