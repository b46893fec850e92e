"""Objectives that learn to predict one modality's features from the others', and so can stand in for it.

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
      modalities: that there are.
      fill: let the prediction stand in for the tokens of an absent modality.
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
        """Returns for each modality what the others say of its features `[B, D]`."""
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

    arXiv:1802.05335. What is modelled are the pooled features, with unit variance; they are targets without a gradient,
    or the encoders would make them easy. Beside the evidence bound of all modalities that a row has, those of each one
    alone are learned, as in the paper, and of three or more one subset drawn for each row in a step, so that any may be
    missing. Each must reconstruct all that the row has; in the paper one alone reconstructs itself.

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

    def product(self, experts: dict[str, tuple[jax.Array, jax.Array]], there: Vectors) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log variance `[B, Z]` of the prior times the experts that are there `[B]`."""
        precision, weighted = jnp.ones(()), jnp.zeros(())
        for m, (mean, log_variance) in experts.items():
            own = jnp.where(there[m][:, None], jnp.exp(-log_variance), 0.0)
            precision, weighted = precision + own, weighted + own * mean
        return weighted / precision, -jnp.log(precision)

    def impute(self, encoded: Encoded) -> Vectors:
        mean, _ = self.product(self.experts(encoded), encoded.present)
        return {m: decode(mean) for m, decode in self.decode.items()}

    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        experts, keys = self.experts(encoded), row_keys(self, train=train)
        loss = self.bound(*self.product(experts, encoded.present), encoded, keys, 0)
        for number, m in enumerate(sorted(self.modalities), 1):
            alone = {n: there & (n == m) for n, there in encoded.present.items()}
            own = self.bound(*self.product(experts, alone), encoded, keys, number)
            loss += jnp.where(encoded.present[m], own, 0.0)
        if keys is not None and len(experts) > 2:
            number, names = len(experts) + 1, sorted(experts)
            drawn = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, number + 1), 0.5, (len(names),)))(
                keys
            )
            some = {m: encoded.present[m] & drawn[:, i] for i, m in enumerate(names)}
            own = self.bound(*self.product(experts, some), encoded, keys, number)
            loss += jnp.where(sum(some.values()) > 0, own, 0.0)
        return loss / self.width

    def bound(
        self, mean: jax.Array, log_variance: jax.Array, encoded: Encoded, keys: jax.Array | None, number: int
    ) -> jax.Array:
        """Returns each row's negative evidence bound `[B]`, of the modalities that it has."""
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
    """The same with a mixture of experts: each modality's posterior must explain all (Shi et al. 2019).

    arXiv:1911.03393. The bound is that of stratified sampling, the mean over the modalities that a row has, with the
    divergence of each expert by itself, which is no less than the paper's of their mixture; the prior is normal, the
    paper's a Laplace distribution. What is absent is predicted by the mean of the others' predictions. Attributes as of
    MVAE.
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
    """Tells features that are real from made ones, given the others' features; `frozen` lets no gradient to itself."""

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
    """A generator makes a modality's features of the others' and noise; a critic must not tell them from real ones.

    Goodfellow et al. 2014, arXiv:1406.2661; Mirza & Osindero 2014, arXiv:1411.1784. Both learn in one step: the
    generator by the non-saturating loss through a critic that holds still, plus the squared error; the critic on
    features that hold still. No gradient of theirs reaches the encoders, which would make features that are easy to
    predict; where a training row lacks a modality, the tasks train generator and encoders through what fills in.

    Attributes:
      noise: width of the noise; it is 0 in evaluation.
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
        """Returns a row's other modalities `[B, (M - 1)(D + 1)]`: their features, and whether they are there."""
        parts = []
        for m in sorted(self.modalities):
            if m != modality:
                there = encoded.present[m][:, None]
                parts += [jnp.where(there, encoded.pooled[m], 0.0), there.astype(jnp.float32)]
        return jnp.concatenate(parts, axis=-1)

    def made(self, encoded: Encoded, modality: str, keys: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns the features that are made `[B, D]`, and what they are made of."""
        given = self.others(encoded, modality)
        noise = jnp.zeros((given.shape[0], self.noise))
        if keys is not None:
            number = sorted(self.modalities).index(modality)
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), (self.noise,)))(keys)
        return self.make[modality](jnp.concatenate([given, noise], axis=-1)), given

    def impute(self, encoded: Encoded) -> Vectors:
        return {m: self.made(encoded, m, None)[0] for m in self.modalities}

    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        keys, losses, there = row_keys(self, train=train), {}, {}
        encoded = jax.lax.stop_gradient(encoded)
        for m in sorted(self.modalities):
            made, given = self.made(encoded, m, keys)
            real = encoded.pooled[m]
            deceive = nn.softplus(-self.critic[m](made, given, frozen=True))
            tell = nn.softplus(-self.critic[m](real, given, frozen=False))
            tell += nn.softplus(self.critic[m](jax.lax.stop_gradient(made), given, frozen=False))
            losses[m] = deceive + tell + self.error * jnp.square(made - real).mean(axis=-1)
            others = [encoded.present[n] for n in self.modalities if n != m]
            there[m] = encoded.present[m] & (jnp.stack(others).any(axis=0) if others else False)
        return masked_row_mean(losses, there)
