"""The numbers that an objective is made of."""

from dataclasses import dataclass

from dpo_dist.objective.pair_logps import Terms


@dataclass(frozen=True)
class Objective:
    """Which losses are summed and their settings, named as in the run config's `objective`."""

    losses: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)  # names with their weights
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    ld_alpha: float = 1.0
    use_weighting: bool = False
    router_aux_loss_coef: float = 0.0
    reference_free: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The losses, without their weights."""
        return tuple(name for name, _ in self.losses)

    def terms(self, num_experts: int = 0) -> Terms:
        """What training's forward has to sum; `num_experts` are those of a layer."""
        weighted = self.ld_alpha != 1.0
        return Terms(
            ld_alpha=self.ld_alpha,
            unweighted=weighted and (self.use_weighting or "sft" in self.names),
            prompt="orpo" in self.names,
            sum_sq=self.use_weighting,
            num_experts=num_experts if self.router_aux_loss_coef else 0,
        )
