"""Fine-tune LoRA adapters with a causal loss in TRL's SFTTrainer; every field of SFTConfig is a flag.

python examples/trl_sft.py --model Qwen/Qwen2.5-0.5B --train_file train.jsonl --output_dir runs/trl
"""

from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig

import nextquill as nq
from nextquill.data import EncodedDataset, ExampleEncoder, PromptTemplate, load_records
from nextquill.training.trl import CausalSFTTrainer


@dataclass
class Options:
    """The flags that are not fields of SFTConfig."""

    model: str = field(metadata={"help": "The model's folder, or its name on the hub."})
    train_file: str = field(metadata={"help": "The training records, JSONL."})


def main() -> None:
    parser = HfArgumentParser((Options, SFTConfig))
    parser.set_defaults(bf16=torch.accelerator.is_available())  # TRL's own default, True, is refused on a CPU
    options, args = parser.parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encoder = ExampleEncoder(tokenizer, PromptTemplate(order="history_first"), args.max_length or 2048)
    trainer = CausalSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model),
        args=args,
        train_dataset=EncodedDataset(encoder.encode_all(load_records(options.train_file))),
        processing_class=tokenizer,
        encoder=encoder,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        loss=nq.PerCELoss(),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
