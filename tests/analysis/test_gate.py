"""The gate passes two sound strategies, and catches what is planted."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mmfusion.analysis.gate import Cell, failures, interaction, learn
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.fusion.concat import Concat
from mmfusion.models.fusion.contract import Declaration, Fused, pool
from mmfusion.models.fusion.elementwise import Product

CELLS = (Cell("redundant"), Cell("unique_b"), Cell("synergy"), Cell("none", True), Cell("redundant", absent=0.25))


def found(kind, cells=CELLS, steps=200):
    return failures(kind, 2, *learn(kind, 2, cells, steps=steps))


@pytest.mark.parametrize("name", ["mean", "product", "tmc"])
def test_a_sound_strategy_passes(name):
    assert found(FUSIONS[name]) == []


class Frozen(Product):
    """A product whose scale is a parameter that never trains."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        factor = self.param("factor", nn.initializers.ones, (self.width,))
        fused = Product(self.width, self.dtype)(tokens, mask, train=train)
        return fused.replace(features=fused.features * jax.lax.stop_gradient(factor))


class Deaf(Concat):
    """Takes the first modality in place of the second."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        first = min(tokens)
        return Concat(self.width)(dict.fromkeys(tokens, tokens[first]), dict.fromkeys(tokens, mask[first]), train=train)


class Blocked(Concat):
    """Passes no gradient to the first modality's branch."""

    @nn.compact
    def __call__(self, tokens, mask, *, train):
        pooled, _ = pool(tokens, mask)
        hidden = [nn.Dense(self.width, name=f"branch_{m}")(x) for m, x in zip(sorted(tokens), pooled, strict=True)]
        hidden[0] = 0.0 * hidden[0]
        return Fused(features=nn.gelu(nn.Dense(self.width)(jnp.concatenate(hidden, axis=-1))), attention={})


def test_a_frozen_factor_is_caught():
    assert any("no gradient" in one and "factor" in one for one in found(Frozen, CELLS[:1], 10))


def test_a_deaf_strategy_is_caught():
    assert any("unique_b" in one for one in found(Deaf))


def test_a_zero_gradient_is_caught():
    assert any("no gradient" in one and "branch_a" in one for one in found(Blocked, CELLS[:1], 10))


def declared(kind, **changes):
    return type(kind.__name__, (kind,), {"declares": dataclasses.replace(kind.declares, **changes)})


def test_a_wrong_declaration_is_caught_both_ways():
    assert any("synergy" in one for one in found(declared(FUSIONS["mean"], synergy=True), CELLS[2:3]))
    assert any("declares it cannot learn" in one for one in found(declared(Product, synergy=False), CELLS[2:3]))
    assert any("declared not additive" in one for one in found(declared(FUSIONS["sum"], additive=False), CELLS[:1], 10))
    assert any("declared additive" in one for one in found(declared(Product, additive=True), CELLS[:1], 10))


@pytest.mark.parametrize("name", FUSIONS)
def test_additive_is_declared_truly(name):
    assert (interaction(FUSIONS[name]) < 1e-4) == FUSIONS[name].declares.additive


def test_the_family_is_named():
    assert all(isinstance(kind.declares, Declaration) and kind.declares.family for kind in FUSIONS.values())
