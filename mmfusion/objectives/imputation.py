"""Objectives that learn to predict one modality's features from the others', and impute them where it is absent.

B batch · D width · Z latent width
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.layers import row_keys
from mmfusion.models.model import Encoded
from mmfusion.objectives.auxiliary import Auxiliary, masked_row_mean
from mmfusion.objectives.base import Requirements

if TYPE_CHECKING:
    from mmfusion.config import RunConfig

Vectors = dict[str, jax.Array]


class Imputer(Auxiliary):
    """An objective that also predicts features: `impute(encoded) -> {modality: [B, D]}`.

    Attributes:
      modalities: of the model.
      fill: use the prediction as the token of an absent modality.
    """

    modalities: tuple[str, ...] = ()
    fill: bool = True

    @classmethod
    def validate(cls, path: str, options: Mapping[str, Any], config: "RunConfig") -> None:
        filling = [name for name, section in config.objectives.items() if section.get("fill")]
        if options["fill"] and len(filling) > 1:
            raise UserError(
                f"{' and '.join(filling)} cannot both fill in absent modalities: set fill=False for one",
                path=f"{path}.fill",
            )

    def impute(self, encoded: Encoded) -> Vectors:
        """Returns for each modality the features `[B, D]` that the others predict."""
        raise NotImplementedError


class Decoder(nn.Module):
    """One hidden layer, then a feature `[..., D]`."""

    hidden: int
    width: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        return nn.Dense(self.width, name="out")(nn.gelu(nn.Dense(self.hidden, name="hidden")(z)))


class MVAE(Imputer):
    """A variational autoencoder whose posterior is a product of modalities' experts and the prior (Wu & Goodman 2018).

    arXiv:1802.05335. It models the pooled features, with unit variance; they are targets without a gradient, since the
    encoders would otherwise make them easy to predict. Beside the evidence bound of all modalities of a row, the
    bounds of each modality alone are trained, as in the paper, and with three or more modalities that of a random
    subset per row and step. Each bound reconstructs all modalities of the row; in the paper a single modality
    reconstructs itself.

    Attributes:
      latent: width Z.
      hidden: units of each decoder's hidden layer.
      beta: factor of the divergence from the prior.
    """

    latent: int = 16
    hidden: int = 64
    beta: float = 1.0
    dtype: Any = jnp.float32

    def setup(self):
        self.infer = {m: nn.Dense(2 * self.latent, name=f"infer_{m}") for m in self.modalities}
        self.decode = {m: Decoder(self.hidden, self.width, name=f"decode_{m}") for m in self.modalities}

    def experts(self, encoded: Encoded) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Returns each modality's mean and log variance `[B, Z]`, float32."""
        parts = {m: infer(encoded.pooled[m]).astype(jnp.float32) for m, infer in self.infer.items()}
        return {m: (x[:, : self.latent], jnp.clip(x[:, self.latent :], -8.0, 8.0)) for m, x in parts.items()}

    def product(self, experts: dict[str, tuple[jax.Array, jax.Array]], mask: Vectors) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log variance `[B, Z]` of the product of the prior and the experts in `mask` `[B]`."""
        precision, weighted = jnp.ones(()), jnp.zeros(())
        for m, (mean, log_variance) in experts.items():
            own = jnp.where(mask[m][:, None], jnp.exp(-log_variance), 0.0)
            precision, weighted = precision + own, weighted + own * mean
        return weighted / precision, -jnp.log(precision)

    def impute(self, encoded: Encoded) -> Vectors:
        mean, _ = self.product(self.experts(encoded), encoded.present)
        return {m: decode(mean) for m, decode in self.decode.items()}

    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        experts, keys = self.experts(encoded), row_keys(self, train=train)
        loss = self.bound(*self.product(experts, encoded.present), encoded, keys, 0)
        for number, m in enumerate(sorted(self.modalities), 1):
            alone = {n: present & (n == m) for n, present in encoded.present.items()}
            own = self.bound(*self.product(experts, alone), encoded, keys, number)
            loss += jnp.where(encoded.present[m], own, 0.0)
        if keys is not None and len(experts) > 2:
            number, names = len(experts) + 1, sorted(experts)
            drawn = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, number + 1), 0.5, (len(names),)))(
                keys
            )
            subset = {m: encoded.present[m] & drawn[:, i] for i, m in enumerate(names)}
            own = self.bound(*self.product(experts, subset), encoded, keys, number)
            loss += jnp.where(jnp.stack(list(subset.values())).any(axis=0), own, 0.0)
        return loss / self.width

    def bound(
        self, mean: jax.Array, log_variance: jax.Array, encoded: Encoded, keys: jax.Array | None, number: int
    ) -> jax.Array:
        """Returns each row's negative evidence lower bound `[B]` over the modalities that it has."""
        z = mean
        if keys is not None:
            draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), (self.latent,)))
            z = mean + jnp.exp(log_variance / 2) * draw(keys)
        errors = {
            m: 0.5 * jnp.square(decode(z) - jax.lax.stop_gradient(encoded.pooled[m])).sum(axis=-1)
            for m, decode in self.decode.items()
        }
        count = sum(encoded.present[m].astype(jnp.float32) for m in errors)
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1.0).sum(axis=-1)
        return count * masked_row_mean(errors, encoded.present) + self.beta * jnp.where(count > 0, divergence, 0.0)


class MMVAE(MVAE):
    """MVAE with a mixture of experts: each modality's posterior explains all modalities (Shi et al. 2019).

    arXiv:1911.03393. The bound is that of stratified sampling, the mean over the modalities of a row, with the
    divergence of each expert by itself, an upper bound of the paper's divergence of the mixture. The prior is
    normal, in the paper a Laplace distribution. An absent modality is predicted by the mean of the others'
    predictions. Attributes as in MVAE.
    """

    def impute(self, encoded: Encoded) -> Vectors:
        means = {m: mean for m, (mean, _) in self.experts(encoded).items()}
        count = jnp.maximum(sum(encoded.present[m].astype(jnp.float32) for m in means), 1.0)[:, None]
        return {
            n: sum(jnp.where(encoded.present[m][:, None], decode(mean), 0.0) for m, mean in means.items()) / count
            for n, decode in self.decode.items()
        }

    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        keys = row_keys(self, train=train)
        bounds = {
            m: self.bound(*one, encoded, keys, number) for number, (m, one) in enumerate(self.experts(encoded).items())
        }
        return masked_row_mean(bounds, encoded.present) / self.width


class Critic(nn.Module):
    """Distinguishes real from generated features, given the others'; `frozen` stops gradients to its own parameters."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, given: jax.Array, *, frozen: bool) -> jax.Array:
        x = jnp.concatenate([x, given], axis=-1)
        for name, units in (("hidden", self.hidden), ("out", 1)):
            kernel = self.param(f"{name}_kernel", nn.initializers.lecun_normal(), (x.shape[-1], units))
            bias = self.param(f"{name}_bias", nn.initializers.zeros, (units,))
            if frozen:
                kernel, bias = jax.lax.stop_gradient((kernel, bias))
            x = x @ kernel + bias
            x = nn.leaky_relu(x, 0.2) if name == "hidden" else x
        return x[..., 0]


class GAN(Imputer):
    """A conditional GAN: a generator predicts a modality's features from the others' and noise, against a critic.

    Goodfellow et al. 2014, arXiv:1406.2661; Mirza & Osindero 2014, arXiv:1411.1784. Both are trained in one step: the
    generator by the non-saturating loss through a frozen critic, plus the squared error; the critic on features without
    a gradient. Neither sends gradients to the encoders, which would otherwise make features easy to predict. Where a
    training row lacks a modality, the tasks train generator and encoders through the imputed features.

    Attributes:
      noise: width of the noise; the noise is 0 in evaluation.
      hidden: units of the hidden layers.
      error: factor of the squared error.
    """

    noise: int = 8
    hidden: int = 64
    error: float = 10.0
    dtype: Any = jnp.float32

    requires: ClassVar[Requirements] = Requirements(modalities=2)
    min_present: ClassVar[int] = 2

    def setup(self):
        self.make = {m: Decoder(self.hidden, self.width, name=f"make_{m}") for m in self.modalities}
        self.critic = {m: Critic(self.hidden, name=f"critic_{m}") for m in self.modalities}

    def others(self, encoded: Encoded, modality: str) -> jax.Array:
        """Returns the other modalities `[B, (M - 1)(D + 1)]`: their features, 0 where absent, and their masks."""
        parts = []
        for m in sorted(self.modalities):
            if m != modality:
                present = encoded.present[m][:, None]
                parts += [jnp.where(present, encoded.pooled[m], 0.0), present.astype(jnp.float32)]
        return jnp.concatenate(parts, axis=-1)

    def generate(self, encoded: Encoded, modality: str, keys: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns the generated features `[B, D]`, and the features that they are generated from."""
        given = self.others(encoded, modality)
        noise = jnp.zeros((given.shape[0], self.noise))
        if keys is not None:
            number = sorted(self.modalities).index(modality)
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), (self.noise,)))(keys)
        return self.make[modality](jnp.concatenate([given, noise], axis=-1)), given

    def impute(self, encoded: Encoded) -> Vectors:
        return {m: self.generate(encoded, m, None)[0] for m in self.modalities}

    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        keys, losses, mask = row_keys(self, train=train), {}, {}
        encoded = jax.lax.stop_gradient(encoded)
        for m in sorted(self.modalities):
            generated, given = self.generate(encoded, m, keys)
            real = encoded.pooled[m]
            fool = nn.softplus(-self.critic[m](generated, given, frozen=True))
            critic = nn.softplus(-self.critic[m](real, given, frozen=False))
            critic += nn.softplus(self.critic[m](jax.lax.stop_gradient(generated), given, frozen=False))
            losses[m] = fool + critic + self.error * jnp.square(generated - real).mean(axis=-1)
            others = [encoded.present[n] for n in self.modalities if n != m]
            mask[m] = encoded.present[m] & (jnp.stack(others).any(axis=0) if others else False)
        return masked_row_mean(losses, mask)
