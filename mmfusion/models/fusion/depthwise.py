"""Fusion along the depth: a central network beside unimodal branches, and Deep Sets."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration, Fused, pool
from mmfusion.models.layers import masked_mean, zero_masked


class Central(nn.Module):
    """CentralNet: each central layer reads the previous one and every modality's layer (Vielzeuf et al. 2018).

    arXiv:1808.07275. h_{m,l+1} = ReLU(W_{m,l} h_{m,l}), c_{l+1} = ReLU(V_l (α_l c_l + Σ_m α_{m,l} h_{m,l})), with
    learned scalars α, h_{m,0} = x_m, c_0 = 0. An absent modality has h = 0. Each branch h_{m,L} has a head and a
    loss, which are added. The branches are dense layers on the encoders' outputs, where the paper joins the networks'
    hidden layers.

    Attributes:
      width: width D of every layer.
      layers: number of layers of the branches.
      branch_losses: whether the branches have losses.
    """

    width: int
    layers: int = 2
    branch_losses: bool = True
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="depth-wise", paper="arXiv:1808.07275", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        Raises:
          UserError: `layers` is below 1.
        """
        del train
        if self.layers < 1:
            raise UserError("must be at least 1", path="central.layers", value=self.layers)
        names = sorted(tokens)
        pooled, present = pool(tokens, mask)
        branches = dict(zip(names, pooled, strict=True))
        central: Any = None  # an array from the first layer on

        def scaled(x: jax.Array, name: str) -> jax.Array:
            return self.param(name, nn.initializers.ones, ()).astype(self.dtype) * x

        for layer in range(self.layers + 1):  # the last layer reads the last layer of the branches
            joined = sum(scaled(branches[m], f"layer{layer}_alpha_{m}") for m in names)
            if central is not None:
                joined = joined + scaled(central, f"layer{layer}_alpha")
            central = nn.relu(nn.Dense(self.width, dtype=self.dtype, name=f"layer{layer}")(joined))
            if layer < self.layers:
                branches = {
                    m: zero_masked(
                        nn.relu(nn.Dense(self.width, dtype=self.dtype, name=f"branch{layer}_{m}")(branches[m])),
                        present[:, i],
                    )
                    for i, m in enumerate(names)
                }
        return Fused(features=central, attention={}, branches=branches if self.branch_losses else {})


class DeepSets(nn.Module):
    """ρ(Σ_m mean_n φ(t_{m,n} + e_m)) with φ and ρ shared by all modalities (Zaheer et al. 2017, arXiv:1703.06114).

    e_m is a learned modality embedding. An absent modality adds nothing to the sum.

    Attributes:
      width: width D of tokens and features.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(
        family="depth-wise", paper="arXiv:1703.06114", symmetric=True, needs_tokens=True
    )

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train

        def dense(name: str) -> nn.Dense:
            return nn.Dense(self.width, dtype=self.dtype, name=name)

        phi, total = [dense("phi_0"), dense("phi_1")], 0.0
        for m in sorted(tokens):
            embedding = self.param(f"type_{m}", nn.initializers.normal(1.0), (tokens[m].shape[-1],)).astype(self.dtype)
            encoded = phi[1](nn.gelu(phi[0](zero_masked(tokens[m], mask[m]) + embedding)))  # [B, N, D]
            total = total + masked_mean(encoded, mask[m])
        features = nn.gelu(dense("rho_1")(nn.gelu(dense("rho_0")(total))))
        return Fused(features=features, attention={})
