"""Train steps in Keras, with JAX or TensorFlow behind it (`KERAS_BACKEND`); layers have this package's names."""

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from experiments.benchmark import networks
from experiments.benchmark.contender import timed

HEADS = 4


def gelu(x: Any) -> Any:
    return ops.gelu(x, approximate=True)


class Attention(layers.Layer):
    """Pre-norm attention of `x` to a context with a mask, and an MLP: this package's block."""

    def __init__(self, width: int, name: str):
        super().__init__(name=name.replace("/", "."))
        self.width = width
        dense = [f"{name}/attention/{part}" for part in ("query", "key", "value", "out")]
        self.query, self.key, self.value, self.out = (_dense(width, part, bias="key" not in part) for part in dense)
        self.mlp_in, self.mlp_out = _dense(2 * width, f"{name}/mlp_in"), _dense(width, f"{name}/mlp_out")
        self.norm, self.norm_context, self.norm_mlp = (
            _norm(f"{name}/{part}") for part in ("norm", "norm_context", "norm_mlp")
        )

    def build(self, *shapes: Any) -> None:
        for part in (self.query, self.key, self.value, self.out, self.mlp_in, self.norm, self.norm_context):
            part.build((None, None, self.width))
        self.norm_mlp.build((None, None, self.width))
        self.mlp_out.build((None, None, 2 * self.width))

    def compute_output_shape(self, x: Any, *_: Any) -> Any:
        return x

    def call(self, x: Any, context: Any, mask: Any) -> Any:
        def split(x: Any) -> Any:
            return ops.reshape(x, (-1, x.shape[1], HEADS, self.width // HEADS))

        keys = self.norm_context(context)
        out = ops.dot_product_attention(
            split(self.query(self.norm(x))), split(self.key(keys)), split(self.value(keys)), mask=mask[:, None, None]
        )
        x = x + self.out(ops.reshape(out, (-1, x.shape[1], self.width)))
        return x + self.mlp_out(gelu(self.mlp_in(self.norm_mlp(x))))


class Positions(layers.Layer):
    """Adds learned positions."""

    def build(self, shape: Any) -> None:
        self.positions = self.add_weight(shape=shape[1:], initializer=keras.initializers.RandomNormal(0.0, 0.02))

    def call(self, x: Any) -> Any:
        return x + self.positions


def _dense(units: int, name: str, bias: bool = True) -> layers.Dense:
    return layers.Dense(units, use_bias=bias, name=name.replace("/", "."))


def _norm(name: str) -> layers.LayerNormalization:
    return layers.LayerNormalization(epsilon=1e-6, name=name.replace("/", "."))


def _conv(channels: int, stride: int, number: int, x: Any) -> Any:
    x = x if stride == 1 else layers.ZeroPadding2D(1)(x)
    return layers.Conv2D(channels, 3, stride, "valid", name=f"encoders_image.Conv_{number}")(x)


def network(name: str) -> keras.Model:
    """Returns a model of an image, ids and their mask, which returns logits."""
    made = networks.NETWORKS[name]
    width, length = (128 if name == "article" else 64), made["length"]
    image = layers.Input((made["side"], made["side"], 3), dtype="uint8")
    ids, mask = layers.Input((length,), dtype="int32"), layers.Input((length,), dtype="bool")
    embedding = 64 if name == "easy_vqa" else 32
    embedded = layers.Embedding(made["vocabulary"], embedding, name="encoders_text.embed")(ids)
    x = (ops.cast(image, "float32") / 255 - 0.5) / 0.25
    recurrent = layers.LSTM(64, return_sequences=name != "article", name="encoders_text.forward_0")
    text = recurrent(embedded, mask=mask)  # masked steps keep the state, so that the last one is the text's
    text = _dense(width, "encoders_text/project")(text)
    if name == "article":
        x = layers.MaxPooling2D(2)(ops.relu(_conv(32, 1, 0, x)))
        x = _norm("encoders_image/norm")(_dense(width, "encoders_image/project")(layers.Flatten()(x)))
        fused = gelu(_dense(width, "fusion/Dense_0")(ops.concatenate([x, _norm("encoders_text/norm")(text)], -1)))
    else:
        for number, channels in enumerate((16, 32, 64) if name == "quickstart" else (32, 64, 64)):
            norm = layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name=f"encoders_image.Norm_{number}.batch")
            x = gelu(norm(_conv(channels, 2, number, x)))
        x = ops.reshape(x, (-1, x.shape[1] * x.shape[2], x.shape[3]))
        x = Positions(name="encoders_image.tokens")(_dense(width, "encoders_image/tokens/project")(x))
        x = _norm("encoders_image/tokens/norm")(x)
        keep = ops.cast(mask, "float32")[..., None]
        text = _norm("encoders_text/norm")(text * keep) * keep
        everywhere = ops.ones_like(x[..., 0], dtype="bool")
        for i in range(1 if name == "quickstart" else 2):
            x, text = (
                Attention(width, f"fusion/layer{i}_image")(x, text, mask),
                Attention(width, f"fusion/layer{i}_text")(text, x, everywhere) * keep,
            )
        x, text = _norm("fusion/norm_image")(x), _norm("fusion/norm_text")(text)
        mean = ops.sum(text * keep, 1) / ops.sum(keep, 1)
        pooled = [ops.mean(x, 1), ops.max(x, 1), mean, ops.max(text - 1e9 * (1 - keep), 1)]
        fused = gelu(_dense(width, "fusion/out")(ops.concatenate(pooled, -1)))
    return keras.Model([image, ids, mask], _dense(made["classes"], "heads_label")(fused))


def load(model: keras.Model, path: str) -> None:
    """Copies this package's parameters into a model by the names of its layers."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    for one in model._flatten_layers():
        prefix = one.name.replace(".", "/")
        if isinstance(one, layers.Dense | layers.Conv2D):
            one.set_weights([arrays[f"{prefix}/{key}"] for key in ("kernel", "bias")[: len(one.weights)]])
        elif isinstance(one, layers.LayerNormalization):
            one.set_weights([arrays[f"{prefix}/{key}"] for key in ("scale", "bias")])
        elif isinstance(one, layers.BatchNormalization):
            one.set_weights([arrays[f"{prefix}/scale"], arrays[f"{prefix}/bias"], *one.get_weights()[2:]])
        elif isinstance(one, layers.Embedding):
            one.set_weights([arrays[f"{prefix}/embedding"]])
        elif isinstance(one, Positions):
            one.set_weights([arrays[f"{prefix}/positions"]])
        elif isinstance(one, layers.LSTM):
            parts = [np.concatenate([arrays[f"{prefix}/{side}{gate}/kernel"] for gate in "ifgo"], 1) for side in "ih"]
            one.set_weights([*parts, np.concatenate([arrays[f"{prefix}/h{gate}/bias"] for gate in "ifgo"])])


def step(network: str, size: int, parameters: str, seconds: float) -> tuple[dict[str, Any], Any]:
    """A contender: `train_on_batch`, compiled by Keras, on batches in memory."""
    made, model = networks.NETWORKS[network], globals()["network"](network)
    load(model, parameters)
    adam = keras.optimizers.AdamW(
        made["rate"], weight_decay=1e-4, beta_1=0.9, beta_2=made["b2"], epsilon=1e-8, global_clipnorm=1.0
    )
    adam.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if len(v.shape) <= 1])
    model.compile(adam, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile="auto")
    batches = [((a["image"], a["text"], a["mask"]), a["label"]) for a in networks.batches(network, size)]
    losses = [_one_step(model, *batch) for batch in batches]
    taken = 0

    def run() -> None:
        nonlocal taken
        _one_step(model, *batches[taken % len(batches)])
        taken += 1

    return {"losses": losses, "keras": keras.__version__}, timed(run, seconds)


def _one_step(model: keras.Model, inputs: Any, label: np.ndarray) -> float:
    model.reset_metrics()  # otherwise Keras returns the mean over steps
    return float(model.train_on_batch(inputs, label))
