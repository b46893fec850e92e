"""Writes `text_encoders.npz`: small text encoders of transformers with random weights, for `test_text_towers.py`.

pip install torch==2.13.0 transformers==5.24.0 numpy
python tests/published/make_text_encoders.py

Each case has the model's `config.json`, the tensors under their published names, token ids, their mask, and the last
hidden state. Ids are padded with 0 at the end; transformers gets its own padding id there.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

CASES = {}
SMALL = {
    "vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "attn_implementation": "eager",
}  # fmt: skip
SMALLER = {**SMALL, "hidden_size": 16, "intermediate_size": 24}


def randomised(module):
    """Returns the module in evaluation mode with random parameters: norms have scales near 1."""
    for name, parameter in module.named_parameters():
        is_scale = "norm" in name.lower() and name.endswith("weight")
        nn.init.normal_(parameter, mean=float(is_scale), std=0.2)
    return module.eval()


def case(name, model, trunk, ids, lengths):
    """Adds a case; `trunk` is the part of the model without a head."""
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    padded = torch.where(mask, ids, model.config.pad_token_id)
    out = trunk(padded, attention_mask=mask.long()).last_hidden_state
    CASES[f"{name}/config"] = np.array(model.config.to_json_string())
    CASES[f"{name}/ids"] = (ids * mask).numpy().astype(np.int32)
    CASES[f"{name}/mask"] = mask.numpy()
    CASES[f"{name}/output"] = out.numpy()
    for key, tensor in model.state_dict().items():
        CASES[f"{name}/tensors/{key}"] = tensor.numpy()


def berts(ids):
    model = randomised(transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=14)))
    case("bert", model, model, ids, (12, 5, 1))
    config = transformers.BertConfig(
        **SMALLER, max_position_embeddings=12, hidden_act="gelu_new", layer_norm_eps=1e-3, type_vocab_size=3
    )
    model = randomised(transformers.BertForMaskedLM(config))
    case("bert-gelu_new", model, model.bert, ids, (12, 5, 1))


def robertas(ids):
    special = {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    model = randomised(
        transformers.RobertaModel(transformers.RobertaConfig(**SMALL, **special, max_position_embeddings=16))
    )
    case("roberta", model, model, ids, (12, 5, 1))
    config = transformers.XLMRobertaConfig(**SMALLER, **special, max_position_embeddings=14, num_labels=3)
    model = randomised(transformers.XLMRobertaForSequenceClassification(config))
    case("xlm-roberta", model, model.roberta, ids, (12, 5, 1))


def modernberts(ids):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = transformers.ModernBertConfig(
        **{**SMALL, "num_hidden_layers": 4}, **special, max_position_embeddings=32, local_attention=6
    )
    model = randomised(transformers.ModernBertForMaskedLM(config))
    case("modernbert", model, model.model, ids, (12, 9, 1))


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        ids = torch.randint(3, 30, (3, 12))
        berts(ids)
        robertas(ids)
        modernberts(ids)
    path = Path(__file__).with_name("text_encoders.npz")
    np.savez_compressed(path, **CASES)
    print(f"{path}: {len(CASES)} arrays, {path.stat().st_size / 1e3:.0f} kB")
