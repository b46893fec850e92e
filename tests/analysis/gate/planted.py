"""Strategies with one planted defect each, for the gate to detect."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.fusion.concat import Concat
from mmfusion.models.fusion.contract import Fused, pool
from mmfusion.models.fusion.elementwise import Product


class Frozen(Product):
    """A product with a factor that is a parameter but receives no gradient."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        factor = self.param("factor", nn.initializers.ones, (self.width,))
        fused = Product(self.width, self.dtype)(tokens, mask, train=train)
        return fused.replace(features=fused.features * jax.lax.stop_gradient(factor))


class FrozenRank(Product):
    """A product with two factors that are parameters; the second receives no gradient."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        factors = self.param("factors", nn.initializers.ones, (2, self.width))
        fused = Product(self.width, self.dtype)(tokens, mask, train=train)
        return fused.replace(features=fused.features * (factors[0] + jax.lax.stop_gradient(factors[1])))


class Pair(Concat):
    """Takes exactly two modalities, as declared."""

    declares = dataclasses.replace(Concat.declares, any_modalities=False)

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        if len(tokens) != 2:
            raise UserError(f"pair: {len(tokens)} modalities, and it takes two")
        return Concat(self.width)(tokens, mask, train=train)


class Blocked(Concat):
    """Passes no gradient to the first modality's branch."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        pooled, _ = pool(tokens, mask)
        hidden = [nn.Dense(self.width, name=f"branch_{m}")(x) for m, x in zip(sorted(tokens), pooled, strict=True)]
        hidden[0] = 0.0 * hidden[0]
        return Fused(features=nn.gelu(nn.Dense(self.width)(jnp.concatenate(hidden, axis=-1))), attention={})


class FirstOnly(Concat):
    """Replaces every modality by the first."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        first = min(tokens)
        return Concat(self.width)(dict.fromkeys(tokens, tokens[first]), dict.fromkeys(tokens, mask[first]), train=train)


class Leaking(Concat):
    """Pools padded positions too."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        all_real = {m: jnp.ones_like(mask[m]) for m in mask}
        return Concat(self.width)(tokens, all_real, train=train)


class Swapped(Concat):
    """Uses each modality's mask for another modality."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        names = sorted(tokens)
        swapped = {m: mask[other] for m, other in zip(names, names[1:] + names[:1], strict=True)}
        return Concat(self.width)(tokens, swapped, train=train)


class Biased(Concat):
    """Adds each modality's projection and bias even if the modality is absent."""

    declares = dataclasses.replace(Concat.declares, additive=True, synergy=False, symmetric=True)

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        pooled, _ = pool(tokens, mask)
        names = sorted(tokens)
        projected = [nn.Dense(self.width, name=f"project_{m}")(x) for m, x in zip(names, pooled, strict=True)]
        return Fused(features=sum(projected), attention={})


class Diluted(Concat):
    """Divides the sum of the real tokens by the number of positions, padding included."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        share = {m: real.mean(axis=1)[:, None, None] for m, real in mask.items()}
        tokens = {m: share[m] * jnp.where(mask[m][..., None], tokens[m], 0) for m in tokens}
        return Concat(self.width)(tokens, mask, train=train)


class LeakingInEvaluation(Leaking):
    """Pools padded positions in evaluation only."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        mask = mask if train else {m: jnp.ones_like(mask[m]) for m in mask}
        return Concat(self.width)(tokens, mask, train=train)


@jax.custom_vjp
def straight(x, real):
    return jnp.where(real, x, 0)


straight.defvjp(lambda x, real: (straight(x, real), real), lambda real, g: (g, None))


class StraightThrough(Concat):
    """Zeroes masked tokens but passes their gradient."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        zeroed = {m: straight(x, mask[m][..., None]) for m, x in tokens.items()}
        return Concat(self.width)(zeroed, {m: jnp.ones_like(mask[m]) for m in mask}, train=train)


class AddsMasked(Concat):
    """Adds the values of masked positions, except NaN."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        fused = Concat(self.width)(tokens, mask, train=train)
        masked_sum = sum(jnp.nan_to_num(jnp.where(mask[m][..., None], 0, x)).sum(axis=1) for m, x in tokens.items())
        return fused.replace(features=fused.features + jax.lax.stop_gradient(masked_sum))


class Traced(Concat):
    """Adds `arange(width)` under tracing only."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        fused = Concat(self.width)(tokens, mask, train=train)
        traced = any(isinstance(x, jax.core.Tracer) for x in tokens.values())
        return fused.replace(features=fused.features + traced * jnp.arange(self.width))


class Idle(Concat):
    """Multiplies by a softmax over modalities, which is constant for a single modality."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        scores = self.param("scores", nn.initializers.zeros, (len(tokens),))
        fused = Concat(self.width)(tokens, mask, train=train)
        return fused.replace(features=fused.features * nn.softmax(scores).max())


class SelfAttending(FUSIONS["mult"]):
    """MulT in which each modality attends only to itself."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        alone = {
            m: FUSIONS["mult"](self.width, self.heads, layers=1, memory=1)({m: tokens[m]}, {m: mask[m]}, train=train)
            for m in tokens
        }
        features = jnp.stack([one.features for one in alone.values()]).sum(axis=0)
        return Fused(
            features=features, attention={pair: w for one in alone.values() for pair, w in one.attention.items()}
        )


class BatchDependent(Concat):
    """Subtracts the mean of the batch."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        fused = Concat(self.width)(tokens, mask, train=train)
        return fused.replace(features=fused.features - fused.features.mean(axis=0))


class Unstable(Concat):
    """Divides by a norm that is 0 where every modality is absent."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        fused = Concat(self.width)(tokens, mask, train=train)
        pooled, _ = pool(tokens, mask)
        return fused.replace(features=fused.features / jnp.linalg.norm(sum(pooled), axis=-1, keepdims=True))
