"""The one table of metric names and what they mean."""

from __future__ import annotations

# "<domain>", "<a>" and "<b>" stand for domain names.
METRICS: dict[str, str] = {
    "guard/<domain>/predicted": "Predicted interference now, in parts of the domain's reward range "
    "(nats per token where no rewards are at hand).",
    "guard/<domain>/measured": "Interference found by the last probe, in the same unit.",
    "guard/<domain>/nats": "1 where predicted and measured are in nats per token, 0 where in parts of the range.",
    "guard/<domain>/kl": "KL divergence from the anchor's policy at the last probe, nats per token.",
    "guard/<domain>/effective": "Effective sample size of the last probe, as a part of its rows.",
    "guard/<domain>/token_ratio": "1 where the last probe had to use per-token ratios, 0 for sequence ratios.",
    "guard/<domain>/radius": "Radius of the trust region, in the raw prediction's unit.",
    "guard/<domain>/excess": "Subspace term over radius after the last step, minus 1; above 0 is outside.",
    "guard/<domain>/renewals": "How often its region was moved to where the weights were.",
    "guard/<domain>/residual": "Part of the raw prediction that lies outside the kept directions, 0 to 1.",
    "guard/<domain>/reward": "Mean reward of the domain's own training rows since the last report.",
    "guard/<domain>/length": "Mean completion length of those rows, in tokens.",
    "guard/<domain>/forgetting": "Reward lost since the anchor: by the host's own evaluation where there is "
    "one, else by the last probe times the reward range.",
    "guard/<domain>/protected_share": "Part of all units that the domain's protection covers.",
    "guard/recovery/active": "1 while a recovery phase runs, else 0; with recovery=True, like the next four.",
    "guard/recovery/steps": "Recovery steps so far.",
    "guard/recovery/failures": "Recovery phases so far that did not bring their domain back.",
    "guard/recovery/taken": "Steps of the present recovery phase, or of the last one.",
    "guard/recovery/expected": "Steps that phase was expected to need, from the contraction of its first step.",
    "guard/overlap/<a>/<b>": "Jaccard index of the units that carry half of each domain's curvature energy.",
    "guard/update_kept": "What the projection left of the displacement along protected directions, 1 is all.",
    "guard/seconds": "Seconds the guard took per step since the last report, waits for the device included.",
}
