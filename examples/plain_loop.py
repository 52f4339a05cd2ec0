"""Fine-tune with a causal loss in a plain PyTorch loop.

python examples/plain_loop.py --model Qwen/Qwen2.5-0.5B --train_file train.jsonl --output_dir runs/plain
"""

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import nextquill as nq
from nextquill.data import ExampleEncoder, PromptTemplate, UserGroupSampler, load_records, to_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--max_length", type=int, default=2048)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)

    # With the history before the query, four examples of a user share their beginning, which is computed once.
    encoder = ExampleEncoder(tokenizer, PromptTemplate(order="history_first"), options.max_length)
    examples = encoder.encode_all(load_records(options.train_file))
    sampler = UserGroupSampler([example.user_id for example in examples], examples_per_user=4)

    with nq.PairPasses(model, nq.PerCELoss()) as passes:
        collate = passes.collator(tokenizer.pad_token_id, max_tokens=16384)
        loader = DataLoader(examples, batch_size=8, sampler=sampler, collate_fn=collate)
        for epoch in range(options.epochs):
            sampler.set_epoch(epoch)
            for step, batch in enumerate(loader):
                loss = passes.backward(to_device(batch, device))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                print(f"epoch {epoch}  step {step}  loss {loss:.4f}")
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
