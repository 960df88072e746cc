"""The PyTorch twin: operator and flow models of single-cell perturbations, plain enough to be the reference.

Its files, names, argument orders and defaults are those of pf_jax, and its text is docs/math.md. Everything random is
an argument. Imports neither JAX nor Flax.
"""

from pf_torch.bridge import Backend, gradient_health, synchronize, to_backend, to_numpy, value_and_grad
from pf_torch.conditions import ConditionEncoder
from pf_torch.cvae import CVAE, ConditionalDecoder, ConditionalEncoder, batch_norm
from pf_torch.discriminator import Discriminator, adversary_loss, cross_entropy
from pf_torch.distances import energy_distance, energy_distance_grouped, sliced_energy_distance
from pf_torch.flow import GraphAttention, VectorField, flow_matching_loss, gatv2
from pf_torch.flow_steps import cvae_loss, cvae_step, discriminator_loss, flow_loss, flow_step
from pf_torch.integrate import integrate
from pf_torch.layers import Linear, leaky_relu
from pf_torch.likelihood import (
    digamma_difference,
    elbo_loss,
    gaussian_kl,
    inverse_dispersion,
    lgamma_difference,
    nb_log_prob,
    nb_log_prob_elements,
    nb_log_prob_sum,
    reparameterize,
    strict_clip,
)
from pf_torch.operators import (
    OperatorFamily,
    apply_operator,
    commutator_norm,
    compose,
    identity_penalty,
    response_profile,
)
from pf_torch.probe import record, recording
from pf_torch.spectral import (
    generator_penalty,
    operator_norm,
    power_iteration,
    spectral_norm,
    spectral_penalty,
    spectral_radius,
)
from pf_torch.steps import (
    TrainState,
    adam_update,
    clip_by_global_norm,
    evaluate,
    init_state,
    joint_loss,
    joint_step,
    operator_loss,
    operator_step,
    run_steps,
    vae_loss,
    vae_step,
)
from pf_torch.vae import NBVAE, Decoder, Encoder

__all__ = [
    "CVAE",
    "NBVAE",
    "Backend",
    "ConditionEncoder",
    "ConditionalDecoder",
    "ConditionalEncoder",
    "Decoder",
    "Discriminator",
    "Encoder",
    "GraphAttention",
    "Linear",
    "OperatorFamily",
    "TrainState",
    "VectorField",
    "adam_update",
    "adversary_loss",
    "apply_operator",
    "batch_norm",
    "clip_by_global_norm",
    "commutator_norm",
    "compose",
    "cross_entropy",
    "cvae_loss",
    "cvae_step",
    "digamma_difference",
    "discriminator_loss",
    "elbo_loss",
    "energy_distance",
    "energy_distance_grouped",
    "evaluate",
    "flow_loss",
    "flow_matching_loss",
    "flow_step",
    "gatv2",
    "gaussian_kl",
    "generator_penalty",
    "gradient_health",
    "identity_penalty",
    "init_state",
    "integrate",
    "inverse_dispersion",
    "joint_loss",
    "joint_step",
    "leaky_relu",
    "lgamma_difference",
    "nb_log_prob",
    "nb_log_prob_elements",
    "nb_log_prob_sum",
    "operator_loss",
    "operator_norm",
    "operator_step",
    "power_iteration",
    "record",
    "recording",
    "reparameterize",
    "response_profile",
    "run_steps",
    "sliced_energy_distance",
    "spectral_norm",
    "spectral_penalty",
    "spectral_radius",
    "strict_clip",
    "synchronize",
    "to_backend",
    "to_numpy",
    "vae_loss",
    "vae_step",
    "value_and_grad",
]
