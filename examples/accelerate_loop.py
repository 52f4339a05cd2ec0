"""Fine-tune with a causal loss under Accelerate: mixed precision, and one process or several.

accelerate launch --config_file examples/configs/ddp.yaml examples/accelerate_loop.py \\
    --model Qwen/Qwen2.5-0.5B --train_file train.jsonl --output_dir runs/accelerate
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import nextquill as nq
from nextquill.data import ExampleEncoder, PromptTemplate, UserGroupSampler, load_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--batch_size", type=int, default=8, help="examples per process and step")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).train()
    encoder = ExampleEncoder(tokenizer, PromptTemplate(order="history_first"), max_length=2048)
    examples = encoder.encode_all(load_records(options.train_file))
    sampler = UserGroupSampler([example.user_id for example in examples], examples_per_user=4)

    # PairPasses needs the bare model, before accelerate may shard it; training then calls the wrapped one.
    with nq.PairPasses(model, nq.PerCELoss()) as passes:
        accelerator = Accelerator()
        collate = passes.collator(tokenizer.pad_token_id)
        loader = DataLoader(examples, options.batch_size, sampler=sampler, collate_fn=collate)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for step, batch in enumerate(loader):
            # The loss is a mean over the examples of all processes. Their gradients are averaged afterwards.
            own = torch.tensor(float(passes.count_items(batch)), device=accelerator.device)
            items = accelerator.reduce(own, reduction="sum") / accelerator.num_processes
            loss = passes.backward(batch, items, wrapped, accelerator.backward)
            accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.print(f"step {step}  loss {accelerator.reduce(loss, reduction='mean'):.4f}")
    accelerator.wait_for_everyone()
    state = accelerator.get_state_dict(wrapped)
    if accelerator.is_main_process:
        accelerator.unwrap_model(wrapped).save_pretrained(options.output_dir, state_dict=state)
        tokenizer.save_pretrained(options.output_dir)
    del wrapped  # before its process group ends; otherwise DDP's destructor may wait forever (with gloo)
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
