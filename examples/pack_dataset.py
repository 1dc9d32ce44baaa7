"""An existing data set packed for a model of transformers: several samples in a row, without padding, and each gets
what it gets alone.

pip install 'mmkernels[transformers,hf]'
"""

import torch
import transformers
from datasets import Dataset

from mmkernels.integrations.datasets import pack_dataset
from mmkernels.integrations.transformers import register

ROOM = 256


def tokens(length: int) -> list[int]:
    return [token % 90 + 3 for token in range(length)]


def main() -> None:
    torch.manual_seed(0)
    rows = [tokens(length) for length in (120, 40, 200, 75, 30, 90, 150, 60)]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    packed = pack_dataset(dataset, seq_length=ROOM)
    used = sum(map(len, rows)) / (ROOM * len(packed))
    print(f"{len(rows)} rows into {len(packed)} packs of {ROOM}, {used:.0%} full: {packed['seq_lengths'][:]}")

    register()
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="mmkernels").eval()
    with torch.no_grad():
        for row in packed:
            ids = torch.tensor([row["input_ids"]])
            positions = torch.cat([torch.arange(length) for length in row["seq_lengths"]])[None]  # restart
            together = model(input_ids=ids, position_ids=positions).logits[0].split(row["seq_lengths"])
            for sample, logits in zip(ids[0].split(row["seq_lengths"]), together, strict=True):
                alone = model(input_ids=sample[None]).logits[0]
                torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    print("every sample gets the logits that it gets alone")


if __name__ == "__main__":
    main()
