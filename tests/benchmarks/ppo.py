"""Episodes a second of our PPO beside TRL's PPOTrainer, in one run on one machine.

    python -m venv peers && peers/bin/pip install -e . trl==1.10.0
    peers/bin/python tests/benchmarks/ppo.py [--batch 64] [--epochs 4] [--steps 4]

One shape for both: 4 layers of width 128, vocabulary 8,192, prompts of 32 and replies of 32 tokens,
a reward model of the same size, 4 PPO epochs. TRL (1.10.0; later releases have no PPOTrainer)
runs a Qwen3 of this shape with a value model and a reward model of their own, as its documentation
has it. An episode is a prompt with its reply: generated, marked, and learned from 4 times. No end
token is ever drawn on purpose, so that both work on full replies.

The two take turns. Prints episodes a second of wall time and of processor time (the median of all
steps; the latter is what counts where other work shares the cores), the ratios, and one JSON line.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tinychat.gpt import GPT, GPTConfig
from tinychat.ppo import ActorCritic, PPOConfig, collect, make_optimizer, update
from tinychat.reward_model import RewardModel, score
from tinychat.runtime.device import describe_hardware, reuse_memory, set_threads

PROMPT, REPLY, VOCABULARY = 32, 32, 8192
WIDTH, LAYERS, HEADS, HIDDEN = 128, 4, 2, 384


Seconds = tuple[float, float]


def now() -> Seconds:
    """Wall time and processor time."""
    return time.perf_counter(), time.process_time()


def elapsed(started: Seconds) -> Seconds:
    wall, processor = now()
    return wall - started[0], processor - started[1]


def our_step(batch: int, epochs: int, precision: str, compiled: bool) -> Callable[[], Seconds]:
    """Return a function that does one step of ours, and returns its seconds (wall, processor)."""
    shape = GPTConfig(
        width=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=1, hidden=HIDDEN, vocab_size=VOCABULARY,
        context=PROMPT + REPLY,
    )  # fmt: skip
    gpt = GPT(shape)
    reference = copy.deepcopy(gpt).requires_grad_(False)
    marker, policy = RewardModel(GPT(shape)), ActorCritic(gpt)
    config = PPOConfig(
        episodes=batch, minibatch=batch, epochs=epochs, max_tokens=REPLY, precision=precision,
        kl_stop=1e9, compiled=compiled,
    )  # fmt: skip
    optimizer = make_optimizer(policy, config)
    generator = torch.Generator().manual_seed(0)

    def reward(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        return score(marker, [p + r for p, r in zip(prompts, replies, strict=True)], 0, batch)

    def step() -> Seconds:
        prompts = torch.randint(10, VOCABULARY, (batch, PROMPT)).tolist()
        started = now()
        rollout = collect(
            policy, reference, prompts, reward, config,
            beta=0.05, stop=(), end=1, pad=0, generator=generator,
        )  # fmt: skip
        learned = update(policy, optimizer, rollout, config, generator)
        assert learned["epochs"] == epochs and int(rollout.mask_BT.sum()) == batch * REPLY
        return elapsed(started)

    return step


def trl_steps(batch: int, epochs: int, steps: int, folder: str) -> list[Seconds]:
    """Seconds of each step of TRL's PPOTrainer, from one `train()`."""
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl.experimental.ppo import PPOConfig as TheirConfig
    from trl.experimental.ppo import PPOTrainer

    words = {"<pad>": 0, "<end>": 1, **{f"w{n}": n for n in range(2, VOCABULARY)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
    )
    tokenizer.padding_side = "left"
    shape = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=1, head_dim=64, intermediate_size=HIDDEN,
        max_position_embeddings=PROMPT + REPLY, tie_word_embeddings=True, num_labels=1,
        pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    policy = transformers.Qwen3ForCausalLM(shape)
    reference = copy.deepcopy(policy)
    value = transformers.Qwen3ForSequenceClassification(shape)
    reward = transformers.Qwen3ForSequenceClassification(shape)
    rows = torch.randint(10, VOCABULARY, (batch * steps, PROMPT)).tolist()
    config = TheirConfig(
        output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_mini_batches=1, local_rollout_forward_batch_size=batch, num_ppo_epochs=epochs,
        response_length=REPLY, temperature=1.0, total_episodes=batch * steps, kl_coef=0.05,
        num_sample_generations=0, report_to="none", use_cpu=True, bf16=False, save_strategy="no",
        gradient_checkpointing=False, logging_steps=1000, disable_tqdm=True,
    )  # fmt: skip
    seconds: list[Seconds] = []

    class Clock(transformers.TrainerCallback):
        """TRL calls it after each step."""

        def on_train_begin(self, *_, **__):
            self.started = now()

        def on_step_end(self, *_, **__):
            seconds.append(elapsed(self.started))
            self.started = now()

    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        callbacks=[Clock()],
    )
    trainer.train()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--ours", action="store_true", help="only ours")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    reuse_memory()
    threads = set_threads()
    torch.manual_seed(0)
    step = our_step(options.batch, options.epochs, options.precision, not options.eager)
    step()
    seconds: dict[str, list[Seconds]] = {"ours": [], "TRL 1.10.0": []}
    for _ in range(options.rounds):
        seconds["ours"] += [step() for _ in range(options.steps)]
        if not options.ours:
            with tempfile.TemporaryDirectory() as folder:
                found = trl_steps(options.batch, options.epochs, options.steps, str(Path(folder)))
            seconds["TRL 1.10.0"] += found[1:] or found  # the first one warms up
    rates = {
        name: [options.batch / statistics.median(column) for column in zip(*times, strict=True)]
        for name, times in seconds.items()
        if times
    }
    print(
        f"4 x 128, vocabulary {VOCABULARY}, {PROMPT} + {REPLY} tokens, batch {options.batch}, "
        f"{options.epochs} epochs, {threads} threads, ours in {options.precision}"
        f"{', eager' if options.eager else ''}"
    )
    for name, (wall, processor) in rates.items():
        ours_wall, ours_processor = rates["ours"]
        print(f"{name:11} {wall:7.2f} episodes/s, ours is {ours_wall / wall:.1f} x", end="; ")
        times = ours_processor / processor
        print(f"{processor:7.2f} a second of processor time, ours is {times:.1f} x")
    print(f"on {describe_hardware()['cpu']}")
    print(json.dumps({name: [round(value, 2) for value in row] for name, row in rates.items()}))


if __name__ == "__main__":
    main()
