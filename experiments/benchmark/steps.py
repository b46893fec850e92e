"""Train steps of whole networks, and of an LSTM, a GRU and attention alone, with the memory that they take."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.benchmark import networks
from experiments.benchmark.contender import Contender, Options, timed
from experiments.benchmark.limits import count_flops
from experiments.benchmark.rows import OURS, Comparison, Goal

TORCH = ("torch eager", "torch tuned", "torch compiled")
KERAS = ("Keras, JAX", "Keras, TensorFlow")
# Network, batch size, and the goals.
STEPS = (
    ("article", 32, (Goal(1.3, (*TORCH, *KERAS)),)),
    ("article", 128, (Goal(1.3, (*TORCH, *KERAS)),)),
    ("quickstart", 64, (Goal(1.2, (*TORCH, *KERAS)),)),
    ("easy_vqa", 64, (Goal(1.0, ("torch tuned",)), Goal(1.4, ("Keras, JAX",)))),
    ("resnet18", 32, (Goal(1.0, TORCH),)),
)
LAYERS = (("lstm", (Goal(1.0, TORCH),)), ("gru", (Goal(1.0, TORCH),)), ("attention", (Goal(0.8, TORCH),)))
TITLES = {
    "article": "CNN + LSTM of article 5", "quickstart": "quickstart", "easy_vqa": "easy-VQA",
    "resnet18": "ResNet-18 + transformer + cross-attention", "lstm": "LSTM encoder 64×64×64",
    "gru": "GRU encoder 64×64×64", "attention": "attention 8×256×64, 4 heads",
}  # fmt: skip


def comparisons(options: Options, folder: Path) -> Iterator[Comparison]:
    """Yields the rows of this group."""
    for network, size, goals in STEPS:
        arguments = {
            "network": network, "size": options.size(size, 4), "parameters": str(folder / f"{network}.npz"),
            "seconds": options.seconds,
        }  # fmt: skip
        torch = "experiments.benchmark.peers.torch_peer:step"
        peers = [Contender(name, torch, {**arguments, "variant": name.split()[1]}, peer=True) for name in TORCH]
        if network != "resnet18":
            keras = "experiments.benchmark.peers.keras_peer:step"
            peers += [
                Contender(name, keras, arguments, peer=True, environment={"KERAS_BACKEND": name.split()[1].lower()})
                for name in KERAS
            ]
        ours = Contender(OURS, f"{__name__}:step", arguments)
        yield Comparison(
            f"{TITLES[network]}, batch {size}", "ms a step", (ours, *peers, LIMITS), goals, 1e3,
            memory=(Goal(1 / 1.3, ("torch eager", "torch tuned")),), limit=_limit,
        )  # fmt: skip
    for layer, goals in LAYERS:
        arguments = {"layer": layer, "parameters": str(folder / f"{layer}.npz"), "seconds": options.seconds}
        peers = [
            Contender(name, "experiments.benchmark.peers.torch_peer:layer", {**arguments, "variant": name.split()[1]},
                      peer=True)
            for name in TORCH
        ]  # fmt: skip
        ours = Contender(OURS, f"{__name__}:layer", arguments)
        yield Comparison(f"{TITLES[layer]}, forward and backward", "ms", (ours, *peers, LIMITS), goals, 1e3,
                         limit=_limit)  # fmt: skip


LIMITS = Contender("limits", "experiments.benchmark.limits:limits")


def _limit(results: Mapping[str, Any]) -> float:
    """Returns the milliseconds that the floating-point operations take at the rate of a large matrix product."""
    return 1e3 * results[OURS]["facts"]["flops"] / results["limits"]["facts"]["flops"]


def step(network: str, size: int, parameters: str, seconds: float) -> tuple[dict[str, Any], Any]:
    """A contender: the compiled train step on resident batches. It saves its initial parameters for the peers."""
    from experiments import cli

    cli.prepare_worker()
    import jax
    import numpy as np

    setup = networks.setup(network, size)
    state, call = setup.init_state(0), setup.compile_train_step()
    save(parameters, state.params)
    host = networks.batches(network, size)
    batches = [(setup.partitioner.put_batch(networks.as_batch(arrays)),) for arrays in host]
    rate = setup.partitioner.replicate(np.array([networks.NETWORKS[network]["rate"]], np.float32))
    losses = []
    for batch in batches:
        state, metrics = call(state, batch, rate)
        losses.append(float(metrics["loss"][0]))
    facts = {"losses": losses, "flops": count_flops(call, state, batches[0], rate), "jax": jax.__version__}
    taken = 0

    def run() -> None:
        nonlocal state, taken
        state, metrics = call(state, batches[taken % len(batches)], rate)
        taken += 1
        jax.block_until_ready(metrics)

    return facts, timed(run, seconds)


def layer(layer: str, parameters: str, seconds: float) -> tuple[dict[str, Any], Any]:
    """A contender: gradients of a weighted mean of a layer's output with regard to its parameters."""
    from experiments import cli

    cli.prepare_worker()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mmfusion.models.encoders.text import RNN
    from mmfusion.models.layers import Attention

    tokens, ids, weights = layer_inputs(layer)
    if layer == "attention":
        mask = jnp.ones(tokens.shape[:2], bool)
        module, inputs = Attention(heads=4, width=64), (jnp.asarray(tokens), jnp.asarray(tokens), mask)
    else:
        module, inputs = RNN(64, 100, cell=layer), (jnp.asarray(ids), jnp.ones(ids.shape, bool))
    more = {} if layer == "attention" else {"train": False}
    params = module.init(jax.random.key(0), *inputs, **more)["params"]
    save(parameters, params)

    def loss(params: Any) -> jax.Array:
        out, _ = module.apply({"params": params}, *inputs, **more)
        return jnp.mean(out * weights)

    step = jax.jit(jax.value_and_grad(loss))
    value, grads = step(params)
    norm = float(np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads))))
    facts = {"losses": [float(value), norm], "flops": count_flops(step, params)}
    return facts, timed(lambda: jax.block_until_ready(step(params)), seconds)


def layer_inputs(layer: str) -> tuple[Any, Any, Any]:
    """Returns vectors `[8, 256, 64]`, token ids `[64, 64]`, and the weights of the layer's output."""
    import numpy as np

    random = np.random.default_rng(0)
    shape = (8, 256, 64) if layer == "attention" else (64, 64, 64)
    vectors, ids = random.standard_normal((8, 256, 64)), random.integers(2, 100, (64, 64))
    return vectors.astype(np.float32), ids.astype(np.int32), random.standard_normal(shape).astype(np.float32)


def save(path: str, params: Any) -> None:
    """Saves parameters by path for the peers."""
    import numpy as np

    np.savez(path, **networks.flat(params))
