"""The PyTorch twin: operator models of single-cell perturbations, plain enough to be the reference.

Its files, names, argument orders and defaults are those of pf_jax, and its text is docs/math.md. Everything random is
an argument. Imports neither JAX nor Flax.
"""

from pf_torch import bridge, conditions, distances, layers, likelihood, operators, probe, spectral, steps, vae
from pf_torch.bridge import Backend, gradient_health, synchronize, to_backend, to_numpy, value_and_grad
from pf_torch.conditions import ConditionEncoder
from pf_torch.distances import energy_distance, energy_distance_grouped, sliced_energy_distance
from pf_torch.likelihood import elbo_loss, gaussian_kl, nb_log_prob
from pf_torch.operators import OperatorFamily, commutator_norm, compose, response_profile
from pf_torch.spectral import operator_norm, spectral_norm, spectral_penalty, spectral_radius
from pf_torch.steps import evaluate, init_state, joint_step, operator_step, run_steps, vae_step
from pf_torch.vae import NBVAE

__all__ = [
    "NBVAE",
    "Backend",
    "ConditionEncoder",
    "OperatorFamily",
    "bridge",
    "commutator_norm",
    "compose",
    "conditions",
    "distances",
    "elbo_loss",
    "energy_distance",
    "energy_distance_grouped",
    "evaluate",
    "gaussian_kl",
    "gradient_health",
    "init_state",
    "joint_step",
    "layers",
    "likelihood",
    "nb_log_prob",
    "operator_norm",
    "operator_step",
    "operators",
    "probe",
    "response_profile",
    "run_steps",
    "sliced_energy_distance",
    "spectral",
    "spectral_norm",
    "spectral_penalty",
    "spectral_radius",
    "steps",
    "synchronize",
    "to_backend",
    "to_numpy",
    "vae",
    "vae_step",
    "value_and_grad",
]
